"""Reads and writes metrics.csv, the table of a training's statistics with one row per update.

People open this file in spreadsheets while a run writes it and afterwards. So reading accepts what spreadsheets and
pandas save, and whatever the next write would destroy of somebody else's changes is first copied to another file.
"""

import codecs
import csv
import io
import itertools
import math
from collections import defaultdict
from pathlib import Path

from harness.files import atomic_write
from harness.messages import say


def read_metrics(path):
    """Read metrics.csv as numbers, for a curve or a table.

    Returns:
        A list with a dict {column: number} for each row, empty if there is no such file. A cell that holds no number is
        nan, and so is a column that does not exist.
    """
    rows, _ = read_table(path)
    return [defaultdict(lambda: math.nan, {name: number(cell) for name, cell in row.items()}) for row in rows.values()]


class MetricsFile:
    """Keeps the rows of a training in memory and writes those that change. A row that cannot be written is written
    with the next."""

    def __init__(self, path, last_update):
        """The rows of an existing file up to `last_update` are kept; a resumed run comes to the later ones again."""
        self.path = Path(path)
        self.last_update = last_update
        self.rows = {}  # {update: {column: value}}
        self.columns = {"update": None}  # a dict, because it keeps the order
        self.earlier_rows_read = False
        self.first_changed = math.inf  # the file does not have this row, or has it as it was before
        self.lines = {}  # what the file holds: {update: bytes}, with the header under 0
        # The file's size and time after our last write. None if we have not written it, or not to the end.
        self.stamp = None

    def add(self, row):
        """Write a new row {column: value}, whose "update" is higher than that of all others."""
        self.rows[row["update"]] = row
        self.first_changed = min(self.first_changed, row["update"])
        self.write()

    def change(self, update, cells):
        """Write {column: value} into the row of an update that was added before."""
        self.read_earlier_rows()
        if update in self.rows:  # unless somebody has deleted it
            self.rows[update] |= cells
            self.first_changed = min(self.first_changed, update)
            self.write()

    def write(self):
        """Write the end of the file from the first changed row on, or all of it if its columns change or it is not
        what we wrote."""
        self.read_earlier_rows()
        whole = not self.is_as_we_left_it()
        for row in self.rows.values():
            if row["update"] >= self.first_changed and not row.keys() <= self.columns.keys():
                self.columns |= dict.fromkeys(row)
                whole = True
        if whole:
            kept = {0: self.as_csv(dict(zip(self.columns, self.columns)))}
            changed = self.rows
        else:
            kept = {update: line for update, line in self.lines.items() if update < self.first_changed}
            changed = {update: row for update, row in self.rows.items() if update >= self.first_changed}
        self.lines = kept | {update: self.as_csv(row) for update, row in changed.items()}
        self.stamp = None  # until the write has succeeded
        if whole:
            atomic_write(self.path, b"".join(self.lines.values()))
        else:
            with open(self.path, "r+b") as file:
                file.seek(sum(map(len, kept.values())))
                file.write(b"".join(line for update, line in self.lines.items() if update not in kept))
                file.truncate()
        self.stamp = self.size_and_time()
        self.first_changed = math.inf

    def as_csv(self, row):
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.columns, lineterminator="\n").writerow(row)
        return line.getvalue().encode("utf-8", "surrogateescape")

    def size_and_time(self):
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def read_earlier_rows(self):
        """Take over what an interrupted run has written, once. If something is wrong with it, keep a copy and say
        so."""
        if self.earlier_rows_read:
            return
        rows, not_understood = read_table(self.path)
        earlier = {update: row for update, row in rows.items() if update <= self.last_update}
        missing = self.last_update - len(earlier)
        if missing or not_understood:
            copy = f"; the file as it was: {keep_copy(self.path)}" if self.path.exists() else ""
            wrong = f"earlier rows missing: {missing}, lines not understood: {len(not_understood)}"
            say(f"warning: {self.path}: {wrong}{copy}")
        self.rows = earlier | self.rows
        self.first_changed = 0
        self.earlier_rows_read = True

    def is_as_we_left_it(self):
        """Whether the file still holds what we wrote last. If somebody has changed it, keep a copy and say so."""
        if self.stamp is None or not self.path.exists():
            return False
        if self.size_and_time() == self.stamp or self.path.read_bytes() == b"".join(self.lines.values()):
            return True
        copy = keep_copy(self.path)
        say(f"warning: {self.path}: another program has changed it; its version: {copy}; training goes on with ours")
        return False


def keep_copy(path):
    """Copy metrics.csv to metrics.copy-1.csv, or to the first such name that is free, and return that path."""
    names = (path.with_stem(f"{path.stem}.copy-{i}") for i in itertools.count(1))
    copy = next(name for name in names if not name.exists())
    atomic_write(copy, path.read_bytes())
    return copy


def read_table(path):
    """Read metrics.csv as text, also as a spreadsheet or pandas has saved it.

    They may write a byte order mark or UTF-16, semicolons or tabs instead of commas, and then decimal commas, a column
    without a name, lines above the header, and no line break at the end.

    Returns:
        rows: {update: {column: text}} in the order of the updates; the column "update" holds integers.
        not_understood: the other lines, except an incomplete last one, which a kill or a full disk leaves.
    """
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    columns = None
    delimiter = ","
    rows = {}
    not_understood = []
    for line in lines:
        if columns is None:
            delimiter = max(",;\t", key=line.count)
            cells = split_cells(line.replace('"', ""), delimiter)
            if "update" in cells:
                columns = cells
                continue
        row = parse_row(line, columns, delimiter)
        if row and row["update"] not in rows:
            rows[row["update"]] = row
        elif line.strip(f"{delimiter} "):
            not_understood.append(line)
    if lines[-1] and not_understood[-1:] == lines[-1:]:
        not_understood.pop()
    return dict(sorted(rows.items())), not_understood


def parse_row(line, columns, delimiter):
    """Return a line of the table as {column: text}, with an integer under "update", or None if it is no row of these
    columns."""
    if columns is None:
        return None
    cells = split_cells(line, delimiter)
    if len(cells) != len(columns):
        cells = split_cells(line.replace('"', ""), delimiter)  # there may be a stray quotation mark
    if len(cells) != len(columns):
        return None
    row = {column: cell for column, cell in zip(columns, cells) if column}
    row["update"] = number(row["update"])
    return row if isinstance(row["update"], int) and row["update"] > 0 else None


def split_cells(line, delimiter):
    """Return the cells of one line. Lines are split one by one, so that a stray quotation mark cannot swallow the
    next line."""
    try:
        (cells,) = csv.reader([line], delimiter=delimiter)
    except csv.Error:
        return [line]
    cells = [cell.strip() for cell in cells]
    return cells if delimiter == "," else [with_decimal_point(cell) for cell in cells]


def with_decimal_point(cell):
    """Return "81.25" for "81,25"; a text keeps its commas."""
    converted = cell.replace(",", ".")
    return cell if math.isnan(number(converted)) else converted


def number(cell):
    """Return the number in a cell: 81.25 for "81.25", the integer 3 for "3" and "3.0", and nan if there is none."""
    try:
        x = float(cell)
    except ValueError:
        return math.nan
    return int(x) if x.is_integer() else x
