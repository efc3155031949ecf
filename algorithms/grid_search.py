"""A training with every combination of some constants:  python -m algorithms.grid_search reinforce_cartpole --lr 1e-3 1e-2 --seed 0 1 2

TRAINING is a file of this folder, or train_ppo for the GPT. As many runs as there are cores go on side by side, each with a
directory below --out; stopped and started again, the search goes on where it was. At the end it prints the runs, the best first, writes
them to grid.csv, and with --map draws the mean of the best scores over two of the constants: --map lr gamma.
"""

import csv
import functools
import importlib
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from algorithms import actor_critic
from algorithms.parts.common import Algorithm, load_model
from harness.checkpoint import CheckpointError
from harness.device import available_cores
from harness.figures import new_figure
from harness.messages import one_line, shown
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, check_constants, convert, given_path, kind_of
from harness.runs import check_begun, finished, recorded_constants
from harness.supervise import run_script, run_side_by_side

HERE = Path(__file__).parent
FRESH_SEED = 1_000_000  # as --evaluate takes
TRAININGS = (
    "train_ppo",
    "reinforce_cartpole",
    "ppo_lunarlander",
    "actor_critic_tictactoe",
    "dqn_space_invaders",
    "actor_critic",
    "ppo_llm_breakout",
    "grpo_text",
)


class Training(NamedTuple):
    """What a search must know of a training whose runs leave last.pt and metrics.csv."""

    program: list  # of the command line
    constants: dict
    ranges: dict
    check: Callable  # raises CommandLineError for constants that do not fit together
    algorithm: Algorithm | None = None  # None: not one of algorithms/common.py, and cannot be scored in fresh games

    def check_directory(self, run_dir, constants):
        """Raises CommandLineError for a directory in which a run with these constants can neither begin nor go on."""
        check_begun(run_dir, constants)

    def command(self, run_dir, values):
        """-> what starts a run, or goes on with it."""
        if (run_dir / "last.pt").exists():
            return [*self.program, "--resume", run_dir]
        return [
            *self.program,
            "--run_dir",
            run_dir,
            *(word for name, value in values.items() for word in (f"--{name.lower()}", value)),
        ]

    def finished(self, run_dir):
        """Whether the run has done all its steps, and its last evaluation has ended."""
        try:
            return finished(run_dir)
        except CheckpointError:  # the run says what is wrong when it is to go on
            return False

    def result(self, run_dir):
        """-> the best and the last score of a run, its steps and minutes."""
        rows = read_metrics(run_dir / "metrics.csv")
        if not rows:
            raise CommandLineError(f"{run_dir}: has lost its metrics.csv; delete the directory to train it again")
        scores = [row["eval_score"] for row in rows if math.isfinite(row["eval_score"])]
        best, last = (max(scores), scores[-1]) if scores else (math.nan, math.nan)
        return {
            "best": best,
            "last": last,
            "steps": rows[-1]["global_step"],
            "minutes": round(rows[-1]["seconds"] / 60, 2),
        }

    def fresh(self, run_dir, episodes):
        """-> the score of the best model in fresh games, its standard error, and the lowest of them, if asked for."""
        if episodes is None:
            return {}
        state, path, _ = load_model(self.algorithm, run_dir / "best_model.pt")
        try:
            result = self.algorithm.evaluate(state, episodes, FRESH_SEED)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: does not fit this program ({error}); move its directory away to train it again"
            ) from None
        return {
            name: result[key]
            for name, key in (("fresh", "score"), ("fresh error", "error"), ("fresh min", "min"))
            if key in result
        }


class JSONTraining(Training):
    """actor_critic.py, which reads its constants from a file and leaves another kind of directory."""

    def check_directory(self, run_dir, constants):
        if recorded_constants(run_dir) not in (None, lower(constants)):
            raise CommandLineError(f"{run_dir} was begun with other constants; name another --out")

    def command(self, run_dir, values):
        if final := self.newest(run_dir):
            return [*self.program, "--resume", final]
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(lower(self.constants | values)))
        return [*self.program, run_dir / "config.json", "--directory", run_dir]

    def finished(self, run_dir):
        final = self.newest(run_dir)
        return final is not None and (agent := actor_critic.load_agent(final)).epoch >= agent.config.num_epochs

    def result(self, run_dir):
        agent = actor_critic.load_agent(self.newest(run_dir))
        score = agent.evaluate()["share"]
        return {"best": score, "last": score, "steps": agent.epoch * actor_critic.STEPS_PER_EPOCH}

    def newest(self, run_dir):
        """-> the last checkpoint of the run that began last, each of which has a directory of its own, or None."""
        return max(run_dir.glob("checkpoints_*/final.pt"), default=None)


def lower(constants):
    return {name.lower(): value for name, value in constants.items()}


def training(name):
    """The name of a training -> its `Training`."""
    program = ["train_ppo.py"] if name == "train_ppo" else ["-m", f"algorithms.{name}"]
    if name == "train_ppo":
        import train_ppo

        return Training(program, train_ppo.CONSTANTS, train_ppo.RANGES, train_ppo.check)
    if name == "actor_critic":
        upper = lambda x: {key.upper(): value for key, value in x.items()}
        return JSONTraining(
            program, upper(actor_critic.Config()._asdict()), upper(actor_critic.RANGES), check_dimensions
        )
    algorithm = importlib.import_module(f"algorithms.{name}").ALGORITHM
    return Training(program, algorithm.constants, algorithm.ranges, algorithm.check, algorithm)


def check_dimensions(constants):
    if constants["OUTPUT_DIM"] > constants["INPUT_DIM"]:
        raise CommandLineError("OUTPUT_DIM must not exceed INPUT_DIM")


def read_grid(words, what):
    """["--lr", "1e-3", "1e-2", "--seed", "0"] -> {"LR": [0.001, 0.01], "SEED": [0]}, checked."""
    grid, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:].upper()
            if name not in what.constants or name == "RUN_DIR":
                raise CommandLineError(
                    f"{word}: is no constant to search; those are {', '.join(map(str.lower, what.constants))}"
                )
            grid[name] = []
        elif name is None:
            raise CommandLineError(f"{word!r} stands before any constant; name one first, as --seed {word}")
        else:
            grid[name].append(convert(name, word, kind_of(name, what.constants, what.ranges)))
    for name, values in grid.items():
        if not values:
            raise CommandLineError(f"--{name.lower()} needs at least one value")
        for value in values:
            check_constants({name: value}, what.constants, what.ranges)
    if not grid:
        raise CommandLineError("name at least one constant and its values, as --seed 0 1 2")
    return grid


def combinations(grid):
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def directory_of(out, values):
    """One directory per combination, named by it: out/lr=0.001,seed=0"""
    return out / ",".join(f"{name.lower()}={value}" for name, value in values.items()).replace("/", "_")


def train(what, run_dir, values, run):
    """One run to its end; its output goes to a log beside its directory. run: of `run_side_by_side`."""
    if what.finished(run_dir):
        return
    command = [sys.executable, *what.command(run_dir, values)]
    with open(run_dir.with_name(run_dir.name + ".log"), "a") as log:
        run(command, cwd=HERE.parent, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def heat_map(rows, x, y):
    """The mean of the best scores over two constants -> a Figure."""
    xs, ys = (sorted({row[name] for row in rows}) for name in (x, y))
    means = np.array([[np.mean([row["best"] for row in rows if (row[x], row[y]) == (a, b)]) for a in xs] for b in ys])
    figure = new_figure(2.5 + len(xs), 2 + 0.7 * len(ys))
    axes = figure.subplots()
    image = axes.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (i, j), mean in np.ndenumerate(means):
        axes.text(j, i, f"{mean:.4g}", ha="center", va="center", color="white" if mean < middle else "black")
    axes.set(xlabel=x, ylabel=y, xticks=range(len(xs)), xticklabels=xs, yticks=range(len(ys)), yticklabels=ys)
    figure.colorbar(image, label="best score, mean of the runs")
    return figure


def main(argv=()):
    parser = Parser("-m algorithms.grid_search", __doc__)
    parser.add_argument("training", choices=TRAININGS, metavar="TRAINING", help=", ".join(TRAININGS))
    parser.add_argument("--out", type=given_path, help="default runs/grid/TRAINING")
    parser.add_argument("--map", nargs=2, metavar="CONSTANT", help="two constants for a heat map, grid.png")
    parser.add_argument(
        "--fresh", type=int, metavar="EPISODES", help="also score each best model in so many fresh games"
    )
    args, words = parser.parse_known_args(argv)
    what, out = training(args.training), Path(args.out or f"runs/grid/{args.training}").resolve()
    grid = read_grid(words, what)
    if args.fresh is not None and not (what.algorithm and args.fresh > 0):
        raise CommandLineError(
            "--fresh must be 1 or more"
            if what.algorithm
            else f"--fresh: {args.training} cannot be scored in fresh games; leave it out"
        )
    axes = [name.upper() for name in args.map or ()]
    if missing := [name for name in axes if name not in grid]:
        raise CommandLineError(
            f"--map {missing[0].lower()}: is not searched; the grid has {', '.join(map(str.lower, grid))}"
        )
    runs = {directory_of(out, values): values for values in combinations(grid)}
    for run_dir, values in runs.items():
        check_constants(what.constants | values, what.constants, what.ranges)
        what.check(what.constants | values)
        if values.get("EVAL_INTERVAL") == 0:
            raise CommandLineError("without evaluations there is nothing to compare; leave --eval_interval 0 out")
        what.check_directory(run_dir, what.constants | values)
        if what.finished(run_dir):
            what.result(run_dir)  # or say now that it has lost its metrics
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs, {available_cores()} at a time, in {shown(out)}", flush=True)
    run_side_by_side(
        [functools.partial(train, what, run_dir, values) for run_dir, values in runs.items()], available_cores()
    )
    if failed := [run_dir for run_dir in runs if not what.finished(run_dir)]:
        raise CommandLineError(f"{len(failed)} runs did not finish, see {failed[0]}.log; start again to go on")
    rows = [values | what.result(run_dir) | what.fresh(run_dir, args.fresh) for run_dir, values in runs.items()]
    rows.sort(key=lambda row: -row["best"])
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{x:.5g}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    with open(out / "grid.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if axes:
        try:
            heat_map(rows, *axes).savefig(out / "grid.png", dpi=120)
        except Exception as error:  # the runs are not lost
            raise CommandLineError(
                f"{out / 'grid.png'}: not drawn ({one_line(error)}); start again to draw it"
            ) from None
        print(f"wrote {shown(out / 'grid.png')}")
    return 0


if __name__ == "__main__":
    run_script(main, "-m algorithms.grid_search")
