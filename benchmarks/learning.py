"""Tabulate and draw how runs learned Breakout:  python -m benchmarks.learning [SWEEP or RUN ...]

The default is runs/sweep/train_ppo, which `python sweep.py train_ppo --seed 0 1 2 3 4` leaves. Runs whose directories
differ only in the seed are one variant, such as prediction_coef=0.0. The program prints three tables: every seed, the
medians of each variant, and its lowest and highest values, interquartile means and their 95 % bootstrap intervals. It
also writes the first table to learning.csv, and draws the first variant as learning.png. For runs of other games there
is benchmarks.compare.
"""

import harness.start  # before the slow imports

import math
import re
import statistics
from itertools import groupby
from pathlib import Path

import numpy as np

from breakout_ascii import BOARD, MOST_POINTS, STANDARD_BOARD
from evaluation import levels
from harness.figures import new_figure
from harness.messages import shown, tell
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, given_path
from harness.runs import recorded_constants
from harness.supervise import run_script
from harness.tables import save_figure, show_table, write_csv

MARKS = (300, 600, 900, MOST_POINTS)


# --- runs -------------------------------------------------------------------------------------------------------------


def runs_in(paths):
    """Return the directories of runs among these paths and in them, each once.

    Raises CommandLineError if a path has none, or if two have the same name, which is their variant and their seed.
    """
    runs = {}
    for path in map(Path, paths):
        found = [file.parent for pattern in ("metrics.csv", "*/metrics.csv") for file in sorted(path.glob(pattern))]
        if not found:
            raise CommandLineError(f"{path}: there are no runs; name a run, or the directory of a sweep")
        for run_dir in found:
            other = runs.setdefault(run_dir.name, run_dir)
            if other.resolve() != run_dir.resolve():
                raise CommandLineError(f"{other} and {run_dir} have the same name; leave one out, or rename it")
    return list(runs.values())


def variant_of(run_dir):
    """Return the name of a run's directory without its seed, which is "" if no other constants are in it."""
    return re.sub(r"seed=\d+", "", run_dir.name).replace(",,", ",").strip(",")


def evaluations(run_dir):
    """Return steps, minutes, score, games cleared and share of varied games cleared of a run's n evaluations, (n, 5).

    An older run has no varied games, so these are nan. Raises CommandLineError if there are no evaluations.
    """
    rows = read_metrics(run_dir / "metrics.csv")
    names = "global_step seconds eval_score eval_cleared eval_varied".split()
    curve = [[row[name] for name in names] for row in rows]
    curve = [evaluation for evaluation in curve if all(map(math.isfinite, evaluation[:4]))]
    if not curve:
        raise CommandLineError(f"{run_dir / 'metrics.csv'} has no evaluations of Breakout; leave this run out")
    return np.array(curve) / [1, 60, 1, 1, 1]


# --- tables -----------------------------------------------------------------------------------------------------------

# A row is a dict {column: number or text}, in which None stands for never.


def seed_row(variant, seed, curve):
    """Return a row that says when a run first reached each mark, and its best and its last evaluation."""
    row = {"variant": variant, "seed": seed}
    for mark in MARKS:
        steps, minutes, *_ = next((e for e in curve if e[2] >= mark), (math.inf, math.inf))
        row |= {f"{mark}: M steps": finite(steps / 1e6, 2), f"{mark}: min": finite(minutes, 1)}
    steps, _, score, cleared, varied = max(curve, key=lambda e: (e[2], np.nan_to_num(e[4])))  # as best_model is chosen
    best = {"best": finite(score, 1), "best: games cleared": int(cleared), "best: M steps": finite(steps / 1e6, 2)}
    last = {"last": finite(curve[-1, 2], 1), "last: varied": finite(curve[-1, 4], 3)}
    return row | best | {"best: varied": finite(varied, 3)} | last


def finite(x, digits):
    """Round a number; infinity becomes None."""
    return round(float(x), digits) if math.isfinite(x) else None


def summary_row(rows, name, statistic):
    """Return a row with a statistic of each column over the seeds of one variant. Never is later than any number."""
    row = {"variant": rows[0]["variant"], "seeds": len(rows), "of the seeds": name}
    for column in list(rows[0])[2:]:
        x = statistic([math.inf if row[column] is None else row[column] for row in rows])
        row[column] = finite(x, 3 if "varied" in column else 2 if "steps" in column else 1)
    return row


# --- the picture ------------------------------------------------------------------------------------------------------


def interquartile_mean(scores):
    """Return the mean over the last axis without its lowest and highest quarter (Agarwal et al. 2021)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap_interval(scores):
    """Return the ends of the 95 % bootstrap interval of the interquartile mean over the last axis, (2, ...)."""
    seeds = scores.shape[-1]
    drawn = np.random.default_rng(0).integers(seeds, size=(2000, seeds))
    means = interquartile_mean(scores[..., drawn])
    return np.percentile(means, (2.5, 97.5), axis=-1, method="nearest")  # which can be infinite, but not between


STATISTICS = [  # of a column over the seeds
    ("min", min),
    ("max", max),
    ("interquartile mean", lambda x: interquartile_mean(np.array(x))),
    ("interval, low", lambda x: bootstrap_interval(np.array(x))[0]),
    ("interval, high", lambda x: bootstrap_interval(np.array(x))[1]),
]


def drawn_levels():
    """Return scores to compare with as (score, colour, line style, label) each, the highest first."""
    styles = [("tab:green", "--"), ("gray", ":"), ("tab:orange", "-.")]
    drawn = [(score, *style, label) for (label, score), style in zip(levels().items(), styles)]
    if BOARD == STANDARD_BOARD:
        drawn.append((320, *styles[2], "the public attempt's better game"))
    return sorted(drawn, reverse=True)


def draw(curves):
    """Draw score over steps and minutes: each seed thin, the interquartile mean thick with a 95 % bootstrap interval.

    Args:
        curves: {seed: `evaluations` of its run}.
    """
    figure = new_figure(12, 4.8)
    shortest = min(map(len, curves.values()))  # a run may lack a row that a full disk refused
    data = np.array([curve[:shortest] for curve in curves.values()])  # (seeds, evaluations, 5)
    scores = data[:, :, 2].T  # (evaluations, seeds)
    low, high = bootstrap_interval(scores)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = [
        (left, 0, 1e6, "million environment steps"),
        (right, 1, 1, "minutes, as many runs side by side as cores"),
    ]
    for axes, column, unit, label in panels:
        for seed, curve in zip(curves, data):
            axes.plot(curve[:, column] / unit, curve[:, 2], linewidth=0.8, alpha=0.6, label=f"seed {seed}")
        x = np.median(data[:, :, column], axis=0) / unit
        mean = interquartile_mean(scores)
        axes.plot(x, mean, color="black", linewidth=2.2, label="interquartile mean, 95 % bootstrap")
        axes.fill_between(x, low, high, color="black", alpha=0.15, linewidth=0)
        for level, color, style, name in drawn_levels():
            axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level}")
        axes.set(xlabel=label, ylim=(0, max(1000, MOST_POINTS)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="exact greedy score")
    left.legend(loc="lower right", fontsize=9)
    return figure


def read_variants(paths):
    """Return the runs in these places, grouped by variant: a list of (variant, seed, evaluations) for each."""
    runs = []
    for run_dir in runs_in(paths):
        constants = recorded_constants(run_dir) or {}
        curve = evaluations(run_dir)
        if curve[-1, 0] < constants.get("NUM_STEPS", 0):
            tell(f"{run_dir} has not finished: its last evaluation is after {curve[-1, 0]:,.0f} steps")
        runs.append((variant_of(run_dir), constants.get("SEED", 0), curve))
    runs.sort(key=lambda run: run[:2])
    return [list(variant) for _, variant in groupby(runs, key=lambda run: run[0])]


def main(argv=()):
    parser = Parser("-m benchmarks.learning", __doc__)
    parser.add_argument(
        "runs",
        type=given_path,
        nargs="*",
        default=["runs/sweep/train_ppo"],
        metavar="RUN",
        help="runs or sweeps (default runs/sweep/train_ppo)",
    )
    parser.add_argument(
        "--out", type=given_path, help="folder of learning.csv and learning.png (default: the first RUN)"
    )
    args = parser.parse_args(argv)
    out = Path(args.out or args.runs[0])
    variants = read_variants(args.runs)
    tables = [[seed_row(name or "default constants", seed, curve) for name, seed, curve in runs] for runs in variants]
    show_table([row for table in tables for row in table], labels=2)
    print()
    show_table([summary_row(table, "median", statistics.median) for table in tables], labels=3)
    print()
    show_table([summary_row(table, name, statistic) for table in tables for name, statistic in STATISTICS], labels=3)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "learning.csv", [row for table in tables for row in table])
    print(f"\nwrote {shown(out / 'learning.csv')}, the first table")
    save_figure(out / "learning.png", draw, {seed: curve for _, seed, curve in variants[0]})
    print(f"wrote {shown(out / 'learning.png')}, the curves of {tables[0][0]['variant']}")
    return 0


if __name__ == "__main__":
    run_script(main, "-m benchmarks.learning")
