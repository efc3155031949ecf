"""Compare variants of a training, seed by seed:  python -m benchmarks.compare RUN ...

A RUN is a run's directory or the directory of a sweep, of any training. Runs whose directories differ only in the seed
are one variant. The program prints the score of every seed at --at and the best one, and draws each variant in a panel
of its own, beside the first variant in grey.
"""

import harness.start  # before the slow imports

import math
from pathlib import Path

import numpy as np

from benchmarks.learning import runs_in, variant_of
from harness.figures import new_figure, unit_of_steps
from harness.messages import shown
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, given_path, within
from harness.runs import recorded_constants
from harness.supervise import run_script
from harness.tables import save_figure, show_table

PANEL_WIDTH, PANEL_HEIGHT = 2.9, 2.2  # inches


def scores(run_dir, column):
    """Return the steps and the values of a column of a run's metrics.csv where it is not empty, (rows, 2).

    Raises CommandLineError if it is empty everywhere.
    """
    rows = read_metrics(run_dir / "metrics.csv")
    curve = [[row["global_step"], row[column]] for row in rows if math.isfinite(row.get(column, math.nan))]
    if not curve:
        raise CommandLineError(f"{run_dir / 'metrics.csv'} has no number in the column {column}; leave this run out")
    return np.array(curve)


def read_variants(paths, column="eval_score"):
    """Return {variant: {seed: `scores` of its run}}, both sorted; what all names begin with is left out of them."""
    runs = {}
    for run_dir in runs_in(paths):
        seed = (recorded_constants(run_dir) or {}).get("SEED", 0)
        runs.setdefault(variant_of(run_dir), {})[seed] = scores(run_dir, column)
    names = sorted(runs)
    first = names[0]
    if all(not first or name == first or name.startswith(f"{first},") for name in names):
        labels = [name.removeprefix(first).strip(",") or "default" for name in names]
    else:
        labels = names
    return {label: dict(sorted(runs[name].items())) for label, name in zip(labels, names)}


def shown_score(score):
    return f"{score:.0f}" if abs(score) >= 10 else f"{score:.3g}"


def score_near(curve, step):
    """Return the score of the evaluation that is nearest to this environment step."""
    return curve[np.abs(curve[:, 0] - step).argmin(), 1]


def table_rows(variants, steps):
    """Return a row for each variant: the scores of its seeds, in order, near each of these steps, and the best."""
    rows = []
    for name, runs in variants.items():
        row = {"variant": name, "seeds": " ".join(map(str, runs))}
        for step in steps:
            label = f"near {step / 1e6:g}M" if step >= 10_000 else f"near {step:,}"
            row[label] = " ".join(shown_score(score_near(curve, step)) for curve in runs.values())
        row["best"] = " ".join(shown_score(curve[:, 1].max()) for curve in runs.values())
        rows.append(row)
    return rows


def draw(variants, across=3, levels=(), label="score of an evaluation"):
    """Return a Figure with a panel for each variant but the first, which is drawn in grey in all panels.

    levels: scores at which a dotted line is drawn.
    label: of the vertical axis.
    """
    first, *others = variants
    names = others or [first]
    reference = variants[first] if others else {}
    across = min(across, len(names))
    down = -(-len(names) // across)
    figure = new_figure(max(PANEL_WIDTH * across, 5), PANEL_HEIGHT * down + 0.6)
    figure.set(facecolor="white")
    most = max(curve[-1, 0] for runs in variants.values() for curve in runs.values())
    unit, steps = unit_of_steps(most)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for i, (axes, name) in enumerate(zip(panels, names)):
        axes.tick_params(labelbottom=i + across >= len(names))  # where no panel is below
        for level in levels:
            axes.axhline(level, color="0.5", linestyle=":", linewidth=1)
        for curve in reference.values():
            axes.plot(curve[:, 0] / unit, curve[:, 1], color="0.75", linewidth=1.4, label=first)
        for seed, curve in variants[name].items():
            axes.plot(curve[:, 0] / unit, curve[:, 1], linewidth=1.4, label=f"seed {seed}")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles))  # the reference once, not once for each seed
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=len(legend), frameon=False)
    figure.supxlabel(steps, fontsize=10)
    figure.supylabel(label, fontsize=10)
    return figure


def main(argv=()):
    parser = Parser("-m benchmarks.compare", __doc__)
    parser.add_argument("runs", type=given_path, nargs="+", metavar="RUN")
    at_least_1 = within("[1, inf)")
    steps = [250_000, 500_000, 1_000_000]
    parser.add_argument("--at", type=at_least_1, nargs="+", default=steps, metavar="STEPS", help=f"default {steps}")
    parser.add_argument("--across", type=at_least_1, default=3, help="panels side by side (default 3)")
    parser.add_argument("--level", type=float, nargs="+", default=[], metavar="SCORE", help="draw dotted lines there")
    parser.add_argument("--out", type=given_path, help="the picture (default: compare.png in the first RUN)")
    parser.add_argument("--column", default="eval_score", help="of metrics.csv (default eval_score)")
    args = parser.parse_args(argv)
    variants = read_variants(args.runs, args.column)
    show_table(table_rows(variants, args.at))
    out = Path(args.out or Path(args.runs[0], "compare.png"))
    label = "score of an evaluation" if args.column == "eval_score" else args.column
    save_figure(out, draw, variants, args.across, args.level, label)
    print(f"\nwrote {shown(out)}")
    return 0


if __name__ == "__main__":
    run_script(main, "-m benchmarks.compare")
