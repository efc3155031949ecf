"""How it learns, seed by seed:  python benchmarks/learning.py --seeds 0 1 2 [--variants recipe ...] [--num_steps 2000000 ...]

Runs train_ppo.py once per variant and seed, one run per core side by side. Whatever it does not know itself goes to
train_ppo.py. Stopped and started again it goes on where it was. At the end it prints two tables, seeds and variants, writes
learning.csv and draws learning.png, the seeds of the first variant.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import pages  # noqa: E402
import train_ppo  # noqa: E402
from callbacks import CLEARED_SCORE, RANDOM_SCORE, read_metrics  # noqa: E402
from model import GPT  # noqa: E402
from pages import CHARACTERS, NEWLINE, POSITIONS  # noqa: E402

MARKS = (300, 600, 900, 960)
VARIANTS = {  # name: what goes to train_ppo.py
    "recipe": [],
    "small_weights": [],
    "flat_positions": [],
    "no_prediction": ["--prediction_coef", "0"],
    "no_varied_starts": ["--varied_starts", "0"],
    "no_twins": ["--twins", "0"],
    "free_moves": ["--move_coef", "0"],
    "lambda_0.95": ["--lambd", "0.95", "--lambd_end", "0.95"],
    "lambda_0.8": ["--lambd_end", "0.8"],
    "gamma_0.99": ["--gamma", "0.99"],
}


class SmallWeights(GPT):
    """nanoGPT's initialisation: standard deviation 0.02, less for what writes into the residual stream."""

    def init_weights(self):
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02)
            else:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)


class FlatPositions(GPT):
    """nanoGPT's position embedding: a vector for each position, here drawn as large as a row's and a column's together."""

    def __init__(self, config):
        super().__init__(config)
        del self.wre, self.wce
        self.wpe = torch.nn.Embedding(POSITIONS, config.n_embd)
        torch.nn.init.normal_(self.wpe.weight, std=math.sqrt(0.5))
        pages.EMBEDDINGS = 0, len(CHARACTERS), len(CHARACTERS) + POSITIONS
        pages.PAIRS = np.stack([x.ravel() for x in np.indices((len(CHARACTERS), POSITIONS))], 1) + np.array(pages.EMBEDDINGS[:-1])
        model.PAIRS = pages.PAIRS

    def embed(self, characters, positions):
        return self.wte(characters) + self.wpe(positions)

    def last_embedding(self):
        return self.wte.weight[NEWLINE] + self.wpe.weight[-1]

    def pair_table(self):
        x = torch.cat([self.wte.weight, self.wpe.weight])
        x = x - x.mean(1, keepdim=True)
        c, p = x.split([len(CHARACTERS), POSITIONS])
        mean = lambda x: x.square().mean(1)
        return self.project(x), self.rstd(mean(c).unsqueeze(1) + mean(p) + 2 * c @ p.T / self.config.n_embd)

    def __setstate__(self, state):  # in the process that evaluates: it has modules of its own
        self.__init__(state["config"])
        super().__setstate__(state)


CLASSES = {"small_weights": SmallWeights, "flat_positions": FlatPositions}


def train(out, variant, seed, more):
    """One run to its end, resumed if it began before -> its exit status."""
    run_dir, log = out / variant / f"seed{seed}", out / variant / f"seed{seed}.log"
    if log.exists() and log.read_text().rpartition("\ntrained ")[1]:
        return 0
    where = ["--resume", run_dir]
    if not (run_dir / "last.pt").exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # killed before there was anything to resume
        run_dir.parent.mkdir(exist_ok=True)
        where = ["--seed", seed, "--run_dir", run_dir]
    program = [__file__, "--train", variant] if variant in CLASSES else [ROOT / "train_ppo.py"]
    command = [sys.executable, *program, *where, *VARIANTS[variant], *more]
    with open(log, "a") as file:
        return subprocess.run(list(map(str, command)), stdout=file, stderr=file).returncode


def check(out, runs, more):
    """Raises CommandLineError for what train_ppo.py does not take, and for a run begun with other constants."""
    for variant, seed in runs:
        _, given = train_ppo.read_command_line([*VARIANTS[variant], *more], train_ppo.CONSTANTS)
        wanted = train_ppo.CONSTANTS | given | {"SEED": seed}
        train_ppo.check(wanted)
        if wanted["EVAL_INTERVAL"] == 0:
            raise train_ppo.CommandLineError("without evaluations there is no curve; leave --eval_interval out")
        config = out / variant / f"seed{seed}" / "config.json"
        begun = json.loads(config.read_text()) if config.exists() else wanted
        if begun | {"RUN_DIR": ""} != wanted | {"RUN_DIR": ""}:
            raise train_ppo.CommandLineError(f"{config.parent} was begun with other constants; name another --out")


def evaluations(run_dir):
    """metrics.csv -> [(steps, minutes, score, games cleared), ...]"""
    columns, rows = read_metrics(run_dir / "metrics.csv")
    rows = [dict(zip(columns, row)) for row in rows]
    return [(int(r["global_step"]), float(r["seconds"]) / 60, float(r["eval_score"]), int(r["eval_cleared"]))
            for r in rows if r["eval_score"]]  # fmt: skip


def first(curve, mark):
    """(steps in millions, minutes) of the first evaluation of `mark` points or more, or None."""
    return next(((steps / 1e6, minutes) for steps, minutes, score, _ in curve if score >= mark), None)


def seed_row(variant, seed, curve):
    """When it reached each mark, its best and its last score."""
    row = {"variant": variant, "seed": seed}
    for mark in MARKS:
        reached = first(curve, mark)
        row[f"to {mark}"] = "{:.2f}M {:.1f}min".format(*reached) if reached else "-"
    best = max(curve, key=lambda e: e[2])
    return row | {"best": f"{best[2]:.1f}", "cleared": best[3], "at": f"{best[0] / 1e6:.2f}M", "last": f"{curve[-1][2]:.1f}"}


def variant_row(variant, curves):
    """Median and range over the seeds; a mark that a seed never reached counts as later than all others."""
    row = {"variant": variant, "seeds": len(curves)}
    for mark in MARKS:
        reached = [first(curve, mark) for curve in curves]
        steps, minutes = (spread([r[i] if r else np.inf for r in reached], 2 - i) for i in (0, 1))
        row[f"to {mark}"] = f"{steps} M, {minutes} min" if any(reached) else "-"
    row["best"] = spread([max(e[2] for e in curve) for curve in curves], 0)
    row["cleared"] = spread([max(e[3] for e in curve) for curve in curves], 0)
    row["last"] = spread([curve[-1][2] for curve in curves], 0)
    return row


def spread(xs, digits):
    text = [f"{x:.{digits}f}" if x < np.inf else "-" for x in (statistics.median(xs), min(xs), max(xs))]
    return text[0] if len(set(text)) == 1 else "{} ({} to {})".format(*text)


def interquartile_mean(scores):
    """(..., seeds) -> (...): the mean without the lowest and the highest quarter (Agarwal et al. 2021)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def draw(curves):
    """Every seed thin, the interquartile mean thick with a 95 % bootstrap interval, over steps and over minutes."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    data = np.array(list(curves.values()))  # (seeds, evaluations, 4)
    scores = data[:, :, 2].T  # (evaluations, seeds)
    drawn = np.random.default_rng(0).integers(len(data), size=(2000, len(data)))
    low, high = np.percentile(interquartile_mean(scores[:, drawn]), (2.5, 97.5), axis=1)
    for axes, column, unit, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), (1e6, 1),
                                         ("million environment steps", "minutes, as many runs side by side as cores")):  # fmt: skip
        for seed, curve in zip(curves, data):
            axes.plot(curve[:, column] / unit, curve[:, 2], linewidth=0.8, alpha=0.6, label=f"seed {seed}")
        x = np.median(data[:, :, column], axis=0) / unit
        axes.plot(x, interquartile_mean(scores), color="black", linewidth=2.2, label="interquartile mean, 95 % bootstrap")
        axes.fill_between(x, low, high, color="black", alpha=0.15, linewidth=0)
        for level, color, style, name in ((CLEARED_SCORE, "tab:green", "--", "the whole wall, a simple tracker"),
                                          (320, "tab:orange", "-.", "best published agent of this kind"),
                                          (RANDOM_SCORE, "gray", ":", "random play")):  # fmt: skip
            axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level}")
        axes.set(xlabel=label, ylim=(0, 1000))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="exact greedy score")
    figure.axes[0].legend(loc="lower right", fontsize=9)
    return figure


def show(rows):
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["recipe"])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="default runs/learning")
    args, more = parser.parse_known_args()
    runs = [(variant, seed) for variant in dict.fromkeys(args.variants) for seed in dict.fromkeys(args.seeds)]
    try:
        check(args.out, runs, more)
        args.out.mkdir(parents=True, exist_ok=True)
    except (train_ppo.CommandLineError, OSError) as error:
        sys.exit(f"learning.py: {error}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            statuses = list(pool.map(lambda run: train(args.out, *run, more), runs))
        except KeyboardInterrupt:  # the running trainings have got it too, and save
            pool.shutdown(cancel_futures=True)
            sys.exit("learning.py: stopped; start again to go on")
    failed = [str(args.out / variant / f"seed{seed}.log") for (variant, seed), status in zip(runs, statuses) if status]
    if failed:
        sys.exit(f"learning.py: some runs did not finish, see {', '.join(failed)}; start again to go on")
    curves = {v: {seed: evaluations(args.out / v / f"seed{seed}") for seed in args.seeds} for v in args.variants}
    rows = [seed_row(variant, seed, curve) for variant, seeds in curves.items() for seed, curve in seeds.items()]
    with open(args.out / "learning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    show(rows)
    show([variant_row(variant, list(seeds.values())) for variant, seeds in curves.items()])
    draw(curves[args.variants[0]]).savefig(args.out / "learning.png", dpi=120)


if __name__ == "__main__":
    if "--train" in sys.argv[1:2]:  # a variant with a class of its own: --train NAME, and what goes to train_ppo.py
        train_ppo.GPT = CLASSES[sys.argv[2]]
        sys.exit(train_ppo.main(sys.argv[3:]))
    main()
