"""How it learns, seed by seed:  python benchmarks/learning.py --seeds 0 1 2 [--variants recipe ...] [--num_steps 2000000 ...]

Runs train_ppo.py once per variant and seed, one run per core side by side. Whatever it does not know itself goes to
train_ppo.py. Stopped and started again it goes on where it was. At the end it prints three tables, every seed, the medians of
the seeds, and their ranges; writes learning.csv, the first of them; and draws learning.png, the seeds of the first variant.
"""

import csv
import functools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_ppo  # noqa: E402
from evaluation import CLEARED_SCORE, RANDOM_SCORE  # noqa: E402
from harness.device import available_cores
from harness.figures import new_figure
from harness.messages import one_line
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, Values, given_path, read_command_line
from harness.runs import check_begun, finished
from harness.supervise import run_script, run_side_by_side
from model import GPT  # noqa: E402

MARKS = (300, 600, 900, 960)  # points
VARIANTS = {  # name: what goes to train_ppo.py
    "recipe": [],
    "small_weights": [],  # and other weights at the start
    "no_prediction": ["--prediction_coef", "0"],
    "no_varied_starts": ["--varied_starts", "0"],
    "no_paired_envs": ["--paired_envs", "false"],
    "free_moves": ["--move_coef", "0"],
    "lambda_0.95": ["--lambd", "0.95", "--lambd_end", "0.95"],
    "lambda_0.8": ["--lambd_end", "0.8"],
    "gamma_0.99": ["--gamma", "0.99"],
}

# Runs


@torch.no_grad()
def small_weights(gpt):
    """nanoGPT's initialisation: standard deviation 0.02, less for what writes into the residual stream."""
    for name, parameter in gpt.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02 / math.sqrt(2 * gpt.config.n_layer) if "c_proj" in name else 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def train_small_weights(argv):
    """train_ppo.py with `small_weights`. An evaluation loads the weights it is given, so its process need not know of them."""
    GPT.init_weights = small_weights
    return train_ppo.main(argv)


def train(run_dir, variant, seed, more, run):
    """One run to its end, resumed if it began before; does nothing if it has ended. run: of `run_side_by_side`."""
    if finished(run_dir):
        return
    program, where = [ROOT / "train_ppo.py"], ["--resume", run_dir]
    if not (run_dir / "last.pt").exists():
        where = ["--seed", seed, "--run_dir", run_dir]
        if variant == "small_weights":
            program = [__file__, "--train_small_weights"]
    command = [sys.executable, *program, *VARIANTS[variant], *more, *where]
    log = log_of(run_dir)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        run(command, stdout=file, stderr=file)


def log_of(run_dir):
    return run_dir.with_name(run_dir.name + ".log")  # beside the run, whose directory has to be empty when it starts


def check(run_dir, variant, seed, more):
    """Raises CommandLineError for what train_ppo.py does not take, and for a run begun with other constants."""
    known = train_ppo.CONSTANTS
    resume, given = read_command_line([*VARIANTS[variant], *more], "train_ppo.py", train_ppo.__doc__, known)
    if resume is not None or given.keys() & {"SEED", "RUN_DIR"}:
        raise CommandLineError("--seed, --run_dir and --resume differ from run to run; give --seeds and --out")
    wanted = known | given | {"SEED": seed}
    known.check(wanted)
    train_ppo.check(Values(**wanted))
    if wanted["EVAL_INTERVAL"] == 0:
        raise CommandLineError("without evaluations there is no curve; leave --eval_interval out")
    check_begun(run_dir, wanted)


# Tables. A row is a dict {column: number or text}; None: never


def evaluations(run_dir):
    """metrics.csv -> (evaluations, 4): steps, minutes, score, games cleared. Raises CommandLineError if there are none."""
    curve = [
        [row["global_step"], row["seconds"] / 60, row["eval_score"], row["eval_cleared"]]
        for row in read_metrics(run_dir / "metrics.csv")
    ]
    curve = [evaluation for evaluation in curve if all(map(math.isfinite, evaluation))]
    if not curve:
        raise CommandLineError(f"{run_dir / 'metrics.csv'} has no evaluations; name another --out")
    return np.array(curve)


def seed_row(variant, seed, curve):
    """When it first reached each mark, its best evaluation and its last."""
    row = {"variant": variant, "seed": seed}
    for mark in MARKS:
        steps, minutes, *_ = next((e for e in curve if e[2] >= mark), (math.inf, math.inf))
        row |= {f"{mark}: M steps": finite(steps / 1e6, 2), f"{mark}: min": finite(minutes, 1)}
    steps, _, score, cleared = curve[curve[:, 2].argmax()]
    best = {"best": finite(score, 1), "best: games cleared": int(cleared), "best: M steps": finite(steps / 1e6, 2)}
    return row | best | {"last": finite(curve[-1, 2], 1)}


def finite(x, digits):
    """Rounded, infinity as None."""
    return round(float(x), digits) if math.isfinite(x) else None


def summary_row(rows, name, statistic):
    """One variant's rows of seeds -> a row: statistic([numbers]) of each column. Never counts as later than all else."""
    row = {"variant": rows[0]["variant"], "seeds": len(rows), "of the seeds": name}
    for column in list(rows[0])[2:]:
        x = statistic([math.inf if row[column] is None else row[column] for row in rows])
        row[column] = finite(x, 2 if "steps" in column else 1)
    return row


def show(rows):
    """Prints a markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join("-" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in row.values())
            + " |"
        )
    print()


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# The picture


def interquartile_mean(scores):
    """(..., seeds) -> (...): the mean without the lowest and the highest quarter (Agarwal et al. 2021)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def draw(curves):
    """{seed: (evaluations, 4)} -> a Figure: every seed thin, the interquartile mean thick with a 95 % bootstrap interval."""
    figure = new_figure(12, 4.8)
    shortest = min(map(len, curves.values()))  # a full disk may have cost one a row
    data = np.array([curve[:shortest] for curve in curves.values()])  # (seeds, evaluations, 4)
    scores = data[:, :, 2].T  # (evaluations, seeds)
    drawn = np.random.default_rng(0).integers(len(data), size=(2000, len(data)))
    low, high = np.percentile(interquartile_mean(scores[:, drawn]), (2.5, 97.5), axis=1)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, unit, label in (
        (left, 0, 1e6, "million environment steps"),
        (right, 1, 1, "minutes, as many runs side by side as cores"),
    ):
        for seed, curve in zip(curves, data):
            axes.plot(curve[:, column] / unit, curve[:, 2], linewidth=0.8, alpha=0.6, label=f"seed {seed}")
        x = np.median(data[:, :, column], axis=0) / unit
        axes.plot(
            x, interquartile_mean(scores), color="black", linewidth=2.2, label="interquartile mean, 95 % bootstrap"
        )
        axes.fill_between(x, low, high, color="black", alpha=0.15, linewidth=0)
        for level, color, style, name in (
            (CLEARED_SCORE, "tab:green", "--", "the whole wall, as a simple tracker plays it"),
            (320, "tab:orange", "-.", "the public attempt's better game"),
            (RANDOM_SCORE, "gray", ":", "random play"),
        ):
            axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level}")
        axes.set(xlabel=label, ylim=(0, 1000))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="exact greedy score")
    left.legend(loc="lower right", fontsize=9)
    return figure


def main(argv=()):
    parser = Parser("learning.py", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["recipe"], help="default recipe")
    parser.add_argument("--out", type=given_path, default="runs/learning", help="default runs/learning")
    args, more = parser.parse_known_args(argv)
    out = Path(args.out)
    runs = {(variant, seed): out / variant / f"seed{seed}" for variant in args.variants for seed in args.seeds}
    for (variant, seed), run_dir in runs.items():
        check(run_dir, variant, seed, more)
    out.mkdir(parents=True, exist_ok=True)
    tasks = [functools.partial(train, run_dir, variant, seed, more) for (variant, seed), run_dir in runs.items()]
    run_side_by_side(tasks, available_cores())
    if failed := [str(log_of(run_dir)) for run_dir in runs.values() if not finished(run_dir)]:
        raise CommandLineError(f"some runs did not finish, see {', '.join(failed)}; start again to go on")
    curves = {variant: {seed: evaluations(runs[variant, seed]) for seed in args.seeds} for variant in args.variants}
    tables = [[seed_row(variant, seed, curve) for seed, curve in seeds.items()] for variant, seeds in curves.items()]
    rows = [row for table in tables for row in table]
    show(rows)
    show([summary_row(table, "median", statistics.median) for table in tables])
    show([summary_row(table, name, statistic) for table in tables for name, statistic in (("min", min), ("max", max))])
    write(out / "learning.csv", rows)
    try:
        draw(curves[args.variants[0]]).savefig(out / "learning.png", dpi=120)
    except Exception as error:  # the tables are not lost
        raise CommandLineError(
            f"{out / 'learning.png'}: not drawn ({one_line(error)}); start again to draw it"
        ) from None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train_small_weights"]:
        run_script(lambda argv: train_small_weights(argv[1:]), "train_ppo.py")
    run_script(main, "learning.py")
