"""Reads and writes metrics.csv, the table of a training's statistics with one row per update.

People open this file in spreadsheets, and may save it there while a run writes it or afterwards. So reading accepts
what spreadsheets and pandas make of it, and what cannot be read is set aside, not overwritten.
"""

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
        earlier, odd_lines = read_table(path)
        self.rows = {update: row for update, row in earlier.items() if update <= last_update}  # {update: row}
        missing = last_update - len(self.rows)
        if self.path.exists() and (missing or odd_lines):
            self.set_aside(f"earlier rows missing: {missing}, lines not understood: {odd_lines}")
        columns = {"update": "update"}
        for row in self.rows.values():
            columns |= {name: name for name in row}
        self.rows[0] = columns  # the header
        self.lines = {}  # what the file holds: {update: bytes}
        self.first_unwritten = 0  # the file lacks this row, or has it as it was before
        self.stamp = None  # the file's size and time after our last write; None before it, and if it failed

    def add(self, row):
        """Write a new row {column: value}, whose "update" is higher than that of all others."""
        self.rows[row["update"]] = {}
        self.change(row["update"], row)

    def change(self, update, cells):
        """Write {column: value} into the row of an update. Does nothing if an earlier run has lost that row."""
        if update not in self.rows:
            return
        self.rows[update] |= cells
        if not cells.keys() <= self.rows[0].keys():
            self.rows[0] |= {name: name for name in cells}
            update = 0  # the header changes, and all rows with it
        self.first_unwritten = min(self.first_unwritten, update)
        self.write()

    def write(self):
        """Write the file from the first row on that has changed, or all of it if it is not as we left it."""
        exists = self.path.exists()
        if self.stamp is None or not exists or self.stamp != self.size_and_time():
            if self.stamp is not None and exists:
                self.set_aside("another program has changed it, and training goes on with its own rows")
            self.first_unwritten = 0
        kept = {update: line for update, line in self.lines.items() if update < self.first_unwritten}
        changed = [update for update in sorted(self.rows) if update >= self.first_unwritten]
        self.lines = kept | {update: self.as_csv(self.rows[update]) for update in changed}
        self.stamp = None  # until the write has succeeded
        data = b"".join(self.lines[update] for update in changed)
        if not kept:
            atomic_write(self.path, data)
        else:
            with open(self.path, "r+b") as file:
                file.seek(sum(map(len, kept.values())))
                file.write(data)
                file.truncate()
        self.stamp = self.size_and_time()
        self.first_unwritten = math.inf

    def as_csv(self, row):
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.rows[0], lineterminator="\n").writerow(row)
        return line.getvalue().encode("utf-8", "surrogateescape")

    def size_and_time(self):
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def set_aside(self, reason):
        """Rename the file to metrics.copy-1.csv, or to the first such name that is free, and say why."""
        names = (self.path.with_stem(f"{self.path.stem}.copy-{i}") for i in itertools.count(1))
        copy = next(name for name in names if not name.exists())
        self.path.rename(copy)
        say(f"warning: {self.path}: {reason}; the file as it was: {copy}")


def read_table(path):
    """Read metrics.csv as text, also as a spreadsheet or pandas has saved it.

    They may write a byte order mark, semicolons or tabs instead of commas, and then decimal commas, a column without a
    name, and no line break at the end.

    Returns:
        rows: {update: {column: text}} in the order of the updates; the column "update" holds integers.
        odd_lines: how many other lines there are, without an incomplete last one.
    """
    text = ""
    if Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = text.split("\n")
    delimiter = max(",;\t", key=lines[0].count)
    if lines[-1].count(delimiter) < lines[0].count(delimiter):
        lines.pop()  # a kill or a full disk has cut it off, or it is empty
    rows = {}
    odd_lines = 0
    try:
        for row in csv.DictReader(lines, delimiter=delimiter):
            complete = None not in row and None not in row.values()  # DictReader's mark of cells too many and too few
            update = number(row.get("update") or "")
            if complete and isinstance(update, int) and update > 0 and update not in rows:
                rows[update] = {name: as_written(cell, delimiter) for name, cell in row.items() if name}
                rows[update]["update"] = update
            else:
                odd_lines += any(row.values())  # empty lines do not count
    except csv.Error:
        odd_lines += 1
    return dict(sorted(rows.items())), odd_lines


def as_written(cell, delimiter):
    """Return "81.25" for "81,25" if commas do not separate the cells; a text keeps its commas."""
    with_point = cell.replace(",", ".")
    return cell if delimiter == "," or math.isnan(number(with_point)) else with_point


def number(cell):
    """Return the number in a cell: 81.25 for "81.25", the integer 3 for "3" and "3.0", and nan if there is none."""
    try:
        x = float(cell)
    except ValueError:
        return math.nan
    return int(x) if x.is_integer() else x
