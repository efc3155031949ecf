"""How it learns, seed by seed:  python benchmarks/learning.py --seeds 0 1 2 [--num_steps 2000000 ...]

Runs train_ppo.py once per seed, one run per core side by side. Whatever it does not know itself
goes to train_ppo.py. Stopped and started again it goes on where it was. At the end it prints a table, writes
learning.csv and draws learning.png beside the runs.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from callbacks import CLEARED_SCORE, RANDOM_SCORE, read_metrics  # noqa: E402

MARKS = (300, 600, 800, 900, 960)


def train(out, seed, more):
    """One run to its end, resumed if it began before -> its exit status."""
    run_dir, log = out / f"seed{seed}", out / f"seed{seed}.log"
    if log.exists() and log.read_text().rpartition("\ntrained ")[1]:
        return 0
    where = ["--resume", run_dir] if (run_dir / "last.pt").exists() else ["--seed", str(seed), "--run_dir", run_dir]
    with open(log, "a") as log:
        command = [sys.executable, ROOT / "train_ppo.py", *where, *more]
        return subprocess.run(command, stdout=log, stderr=log).returncode


def evaluations(run_dir):
    """metrics.csv -> [(steps, minutes, score), ...]"""
    columns, rows = read_metrics(run_dir / "metrics.csv")
    rows = [dict(zip(columns, row)) for row in rows]
    return [(int(r["global_step"]), float(r["seconds"]) / 60, float(r["eval_score"])) for r in rows if r["eval_score"]]


def summary(seed, curve):
    """One row of the table: steps and minutes to each mark, the best and the last score."""
    row = {"seed": seed}
    for mark in MARKS:
        reached = next(((steps, minutes) for steps, minutes, score in curve if score >= mark), None)
        row[f"to {mark}"] = f"{reached[0] / 1e6:.2f}M {reached[1]:.1f}min" if reached else "-"
    best = max(curve, key=lambda e: e[2])
    return row | {"best": f"{best[2]:.1f}", "at": f"{best[0] / 1e6:.2f}M", "last": f"{curve[-1][2]:.1f}"}


def draw(curves):
    """Every seed thin, the median thick, over steps and over minutes."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, column, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("million environment steps", "minutes, one core per run")):
        for seed, curve in curves.items():
            axes.plot([e[column] / (1e6, 1)[column] for e in curve], [e[2] for e in curve], linewidth=1, alpha=0.6, label=f"seed {seed}")
        together = list(zip(*curves.values()))
        axes.plot([statistics.median(e[column] for e in es) / (1e6, 1)[column] for es in together],
                  [statistics.median(e[2] for e in es) for es in together], color="black", linewidth=2.2, label="median")  # fmt: skip
        axes.axhline(CLEARED_SCORE, color="tab:green", linestyle="--", linewidth=1.2, label=f"the whole wall: {CLEARED_SCORE}")
        axes.axhline(320, color="tab:orange", linestyle="-.", linewidth=1.2, label="best published agent of this kind: 320")
        axes.axhline(RANDOM_SCORE, color="gray", linestyle=":", linewidth=1.5, label=f"random play: {RANDOM_SCORE}")
        axes.set(xlabel=label, ylim=(0, 1000))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="exact greedy score")
    figure.axes[0].legend(loc="lower right", fontsize=9)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="default runs/learning")
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        statuses = list(pool.map(lambda seed: train(args.out, seed, more), args.seeds))
    failed = [f"seed {seed}: {args.out / f'seed{seed}.log'}" for seed, status in zip(args.seeds, statuses) if status]
    if failed:
        sys.exit(f"learning.py: some runs did not finish, see {', '.join(failed)}; start again to go on")
    curves = {seed: evaluations(args.out / f"seed{seed}") for seed in args.seeds}
    rows = [summary(seed, curve) for seed, curve in curves.items()]
    with open(args.out / "learning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    draw(curves).savefig(args.out / "learning.png", dpi=120)


if __name__ == "__main__":
    main()
