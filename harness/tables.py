"""Shows results: as a table on the screen, as a csv file, as a heat map."""

import csv

import numpy as np

from harness.figures import new_figure
from harness.messages import one_line
from harness.options import CommandLineError


def show_table(rows):
    """Print rows, dicts with the same keys, as a markdown table. None is shown as a dash."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


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
