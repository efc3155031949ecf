"""Shows results: as a table on the screen, as a csv file, as a heat map."""

import csv
import sys

import numpy as np

from harness.figures import new_figure
from harness.lines import columns
from harness.messages import one_line
from harness.options import CommandLineError


def show_table(rows, labels=1):
    """Print rows, dicts with the same keys: as a markdown table, or on a terminal in columns that fit its width.

    None is shown as a dash.

    Args:
        labels: how many of the first columns say what a row is about. If the columns do not fit side by side, the rest
            follows below, beside these.
    """
    cells = {name: [cell(row[name]) for row in rows] for name in rows[0]}
    if width := columns(sys.stdout):
        print("\n\n".join(blocks(cells, labels, width)))
        return
    for line in [list(cells), None, *zip(*cells.values())]:
        print("|" + "---|" * len(cells) if line is None else "| " + " | ".join(line) + " |")


def blocks(cells, labels, width):
    """Return {name: cells} of some columns as texts of at most so many characters in a line.

    Each text begins with the first columns, the labels. Headers are broken into several lines.
    """
    widths = {name: max(map(len, name.split() + column)) + 2 for name, column in cells.items()}
    first, others = list(cells)[:labels], list(cells)[labels:]
    parts = [first[:]]
    for name in others:
        if len(parts[-1]) > labels and sum(widths[other] for other in [*parts[-1], name]) - 2 > width:
            parts.append(first[:])
        parts[-1].append(name)
    return ["\n".join(lines_of({name: cells[name] for name in part}, widths)) for part in parts]


def lines_of(cells, widths):
    """Return the lines of {name: cells} of some columns: texts to the left, numbers and their headers to the right."""
    height = max(len(name.split()) for name in cells)
    padded = []
    for name, column in cells.items():
        header = [""] * (height - len(name.split())) + name.split()
        is_text = any(not text[:1].isdigit() and text[:1] not in ("-", "+") for text in column)
        justify = str.ljust if is_text else str.rjust
        padded.append([justify(text, widths[name] - 2) for text in header + column])
    return ["  ".join(line).rstrip() for line in zip(*padded)]


def cell(x):
    """Return a value as the text of a table's cell."""
    if isinstance(x, float):
        return f"{x:.5g}"
    return "-" if x is None else str(x)


def write_csv(path, rows):
    """Write rows, dicts with the same keys, as a csv file with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def heat_map(rows, x, y, value):
    """Draw the mean of one column of the rows over two others. Returns a Figure."""
    xs, ys = (sorted({row[name] for row in rows}) for name in (x, y))
    means = np.array([[np.mean([row[value] for row in rows if (row[x], row[y]) == (a, b)]) for a in xs] for b in ys])
    figure = new_figure(2.5 + len(xs), 2 + 0.7 * len(ys))
    axes = figure.subplots()
    image = axes.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = (means.min() + means.max()) / 2
    for (i, j), mean in np.ndenumerate(means):
        axes.text(j, i, f"{mean:.4g}", ha="center", va="center", color="white" if mean < middle else "black")
    axes.set(xlabel=x, ylabel=y, xticks=range(len(xs)), xticklabels=xs, yticks=range(len(ys)), yticklabels=ys)
    figure.colorbar(image, label=f"{value}, mean of the runs")
    return figure


def save_figure(path, draw, *arguments):
    """Save the Figure that draw(*arguments) returns. Raises CommandLineError, in one line, if that fails."""
    try:
        draw(*arguments).savefig(path, dpi=120)
    except Exception as error:  # whatever matplotlib raises, the results themselves are not lost
        raise CommandLineError(f"{path}: not drawn ({one_line(error)}); start again to draw it") from None
