"""Draws the learning curve of a training with matplotlib, which is imported only here and only when something is
drawn."""

import math
import os
import sys


def new_figure(width, height):
    """Return an empty matplotlib Figure of this size in inches. It bypasses pyplot, which keeps global state and may
    need a screen."""
    try:
        from matplotlib.figure import Figure
    except (ValueError, AttributeError):  # MPLBACKEND names a backend that is not installed; writing a file needs none
        os.environ.pop("MPLBACKEND", None)
        for name in list(sys.modules):
            if name.split(".")[0] == "matplotlib":
                del sys.modules[name]  # the failed import, ours or an earlier one, has left half of it
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def learning_curve(rows, levels):
    """Return a Figure of the scores over environment steps and over minutes.

    Args:
        rows: of metrics.csv, as `read_metrics` returns them.
        levels: {label: score}, horizontal lines to compare with.
    """
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = max((row["global_step"] for row in rows if math.isfinite(row["global_step"])), default=0)
    unit, label = unit_of_steps(steps)
    draw_scores(left, rows, levels, "global_step", unit, label)
    draw_scores(right, rows, levels, "seconds", 60, "minutes")
    left.set(ylabel="score per episode")
    handles, labels = left.get_legend_handles_labels()
    if any(math.isfinite(row["eval_varied"]) for row in rows):
        handles += draw_varied(left, rows, "global_step", unit)
        labels.append(handles[-1].get_label())
        draw_varied(right, rows, "seconds", 60)[0].axes.set(ylabel="share of varied games cleared")
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_varied(axes, rows, column, unit):
    """Draw the share of varied games that were cleared, on a second vertical axis. Returns the line in a list."""
    twin = axes.twinx()
    evaluated = [row for row in rows if math.isfinite(row["eval_varied"])]
    shares = [row["eval_varied"] for row in evaluated]
    x = [row[column] / unit for row in evaluated]
    line = twin.plot(x, shares, color="tab:purple", linewidth=1.3, label="varied games cleared (right axis)")
    twin.set_ylim(0, 1.02)
    twin.spines["top"].set_visible(False)
    return line


def unit_of_steps(steps):
    """Return the number of steps that is 1 on an axis which ends after so many steps, and the label of that axis."""
    if steps >= 1_000_000:
        return 1_000_000, "million environment steps"
    if steps >= 1000:
        return 1000, "thousand environment steps"
    return 1, "steps"


def draw_scores(axes, rows, levels, column, unit, label):
    """Draw evaluations, training episodes and levels, with this column of the rows, divided by `unit`, along the
    horizontal axis."""
    for (name, level), color, style in zip(levels.items(), ("tab:green", "gray", "tab:orange"), ("--", ":", "-.")):
        axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level:g}")
    evaluated = [row for row in rows if math.isfinite(row["eval_score"])]
    scores = [row["eval_score"] for row in evaluated]
    evaluation_style = {"color": "tab:blue", "linewidth": 2, "marker": "o", "markersize": 3.5, "zorder": 3}
    axes.plot([row[column] / unit for row in evaluated], scores, label="evaluation", **evaluation_style)
    returns = [row["episode_return"] for row in rows]
    training_style = {"color": "tab:blue", "linewidth": 1, "alpha": 0.4}
    training_label = "training episodes: actions are sampled"
    axes.plot([row[column] / unit for row in rows], returns, label=training_label, **training_style)
    axes.set(xlabel=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min([0, *scores, *levels.values(), *filter(math.isfinite, returns)]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
