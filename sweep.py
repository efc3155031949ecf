"""Train with many settings, side by side:  python sweep.py reinforce_cartpole --lr 1e-3 1e-2 --seed 0 1 2

TRAINING is train_ppo or a file of algorithms/. Every combination of the values is trained once. With --search N,
Optuna tries N settings instead, more and more of them near those that did well; two numbers are then the ends of a
range.

As many runs go on at once as there are cores. Each has a directory below --out, named after its values, and a log
beside it. The same command joins in on another machine that sees the folder, and goes on where it was after a stop.
At the end it prints a table of the runs, the best first, and writes it to sweep.csv. --help of a training lists its
constants:
    python -m algorithms.reinforce_cartpole --help
"""

import harness.start  # before the slow imports

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import filelock

from algorithms.parts.packages import need
from algorithms.parts.playing import load_policy_state
from harness import messages
from harness.checkpoint import BEST, LAST, CheckpointError, load_checkpoint
from harness.device import available_cores
from harness.messages import shown
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Constants, Parser, Values, given_path, within
from harness.runs import LOCK, ROOT, Run, check_begun, check_wandb, foreign_code, named_again
from harness.supervise import run_script, start_program, stop_program
from harness.tables import heat_map, save_figure, show_table, write_csv

try:
    import optuna
except ImportError:  # `main` says how to install it
    optuna = None

STATE_INTERVAL = 60.0  # seconds between two lines that say how far the runs are
POLL_INTERVAL = 0.5  # seconds between two looks at whether a run has ended
FRESH_SEED = 1_000_000  # of the games of --fresh, which are those of --evaluate
TRAININGS = (
    "train_ppo reinforce_cartpole ppo_lunarlander actor_critic_tictactoe dqn_space_invaders ppo_llm_breakout grpo_text"
).split()
# what is varied if the command line names no constant
DEFAULT_WORDS = {"ppo_llm_breakout": "--lr 2e-4 5e-4 1e-3 --kl_target 0.2 0.8 --num_steps 40960"}


# --- trainings and their runs -----------------------------------------------------------------------------------------


class Training(NamedTuple):
    """What a sweep has to know about a training."""

    program: list[str]  # what follows `python` on its command line
    constants: Constants
    check: Any  # raises CommandLineError for constants that do not fit together
    applied: Any = lambda c: c  # the constants as the training records them
    check_run: Any = None  # raises CommandLineError for a `Run` that was begun with another version of the game
    algorithm: Any = None  # the `Algorithm`; None for train_ppo, which plays no fresh games


def find_training(name):
    """Return the `Training` of this name."""
    if name == "train_ppo":
        import train_ppo

        return Training(
            ["train_ppo.py"],
            train_ppo.CONSTANTS,
            train_ppo.check,
            applied=lambda c: train_ppo.applicable(c)[0],  # those that the game has nothing for are off
            check_run=train_ppo.check_board,
        )
    algorithm = importlib.import_module(f"algorithms.{name}").ALGORITHM
    return Training(["-m", f"algorithms.{name}"], algorithm.constants, algorithm.check, algorithm=algorithm)


def directory_of(out, values):
    """Return the directory of the run with these values, such as out/lr=0.001,seed=0."""
    name = ",".join(f"{name.lower()}={value}" for name, value in values.items())
    return out / re.sub(r'[\\/:*?"<>|]', "_", name)  # which a name must not contain, on one system or another


def command_of(training, run_dir, values):
    """Return the command that starts a run, or goes on with it."""
    if (run_dir / LAST).exists():
        return [sys.executable, *training.program, "--resume", run_dir, *named_again(training.constants | values)]
    options = [word for name, value in values.items() for word in (f"--{name.lower()}", value)]
    return [sys.executable, *training.program, "--run_dir", run_dir, *options]


def is_finished(run_dir):
    """Whether a run has done all its steps, and its last evaluation has ended.

    A run that cannot be read is not finished: it says why when it is resumed.
    """
    try:
        state = load_checkpoint(run_dir, {"global_step": 0, "constants": {"NUM_STEPS": 0}, "evaluations": ({},)})
    except CheckpointError:
        return False
    return state["global_step"] >= state["constants"]["NUM_STEPS"] and not state["evaluations"]


def scores_of(rows):
    """Return the scores of all evaluations in the rows of a metrics.csv."""
    return [row["eval_score"] for row in rows if math.isfinite(row["eval_score"])]


def fresh_scores(training, run_dir, values, episodes):
    """Score the best model of a run in games that no evaluation has played. Raises CheckpointError."""
    constants = training.constants | values
    trusted = {name: constants[name] for name in foreign_code(constants)}
    state, _, _ = load_policy_state(training.algorithm, run_dir / BEST, trusted)
    result = training.algorithm.evaluate(state, episodes, FRESH_SEED)
    columns = {"fresh": "score", "fresh error": "error", "fresh min": "min"}
    return {column: result[key] for column, key in columns.items() if key in result}


# --- the sweep --------------------------------------------------------------------------------------------------------


class Sweep:
    """Runs the trials of an Optuna study, together with every other process that sees its folder.

    All trials are enqueued at the start. A trial is RUNNING in the study until its run has finished, and the process
    that runs it holds a lock on it. A trial that is RUNNING but not locked was interrupted, so the next process with a
    free core goes on with it. (Optuna's heartbeat would tell the same, but its journal has none.)
    """

    def __init__(self, training, out, grid, search):
        """Open the study in the journal of the folder, or begin it.

        Args:
            search: how many trials, whose values Optuna chooses; None for one trial of each combination.
        """
        self.training = training
        self.out = out
        self.grid = grid
        self.search = search
        self.lock = filelock.FileLock(out / "sweep.lock")
        self.running = []  # the runs that this process has started
        self.failed = {}  # {trial number: directory} of runs that have failed, and that this process does not try again
        self.study = open_study(out, f"{'search' if search else 'grid'} {training.program[-1]} {json.dumps(grid)}")
        # Optuna chooses what {} leaves open. Its GridSampler would be simpler, but works within study.optimize only.
        settings = search * [{}] if search else combinations(grid)
        with self.lock:
            for values in settings[len(self.study.trials) :]:
                self.study.enqueue_trial(values)

    def run(self, prune):
        """Run until all trials have ended, here and elsewhere. If this process is stopped, its runs save and stop too.

        Args:
            prune: whether runs without hope are stopped early.
        """
        said = time.monotonic()
        try:
            self.begin_runs()
            while self.running or self.others():
                time.sleep(POLL_INTERVAL)
                for run in [run for run in self.running if run.process.poll() is not None]:
                    self.running.remove(run)
                    self.end(run)
                if time.monotonic() - said > STATE_INTERVAL:
                    said = time.monotonic()
                    self.say_state()
                    if prune:
                        self.prune()
                self.begin_runs()
        except BaseException as error:
            for run in self.running:
                stop_program(run.process)
            for run in self.running:
                run.process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise CommandLineError("stopped; start again to go on") from None
            raise

    def begin_runs(self):
        """Begin as many runs as there are free cores and free trials."""
        while len(self.running) < available_cores() and (run := self.take()):
            if is_finished(run.directory):  # an earlier sweep, with fewer values, has trained it
                self.end(run)
                continue
            if run.directory.exists():  # the training of a sweep that was killed ends a moment later
                with filelock.FileLock(run.directory / LOCK, timeout=60):
                    pass
            command = command_of(self.training, run.directory, run.trial.params)
            with open(f"{run.directory}.log", "a", encoding="utf-8") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                run.process = start_program(command, environment, cwd=ROOT, stdout=log, stderr=log)
            self.running.append(run)
            say(f"{run.directory.name} {'goes on' if '--resume' in command else 'begins'}")

    def take(self):
        """Take a trial that was interrupted, or else one that nobody has begun. Returns None if there is none."""
        with self.lock:
            for trial in self.candidates():
                values = {name: self.suggest(trial, name) for name in self.grid}
                directory = directory_of(self.out, values)
                try:
                    self.training.check(Values(**self.training.constants | values))
                except CommandLineError as error:  # within a range, not all values fit together
                    self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    say(f"{directory.name} is left out: {error}")
                    continue
                lock = filelock.FileLock(f"{directory}.lock", timeout=0)
                try:
                    lock.acquire()
                    return SimpleNamespace(trial=trial, directory=directory, lock=lock, process=None)
                except filelock.Timeout:
                    pass
        return None

    def candidates(self):
        """Yield the trials that may be free: those that others have begun, and then those that nobody has."""
        for trial in self.others():
            yield optuna.trial.Trial(self.study, trial._trial_id)
        while self.trials("WAITING"):
            yield self.study.ask()

    def trials(self, *states):
        """Return the trials in these states, or all."""
        states = [optuna.trial.TrialState[state] for state in states] or None
        return self.study.get_trials(deepcopy=False, states=states)

    def others(self):
        """Return the trials that have begun and not ended, without those that run here or have failed here."""
        mine = {run.trial.number for run in self.running} | self.failed.keys()
        return [trial for trial in self.trials("RUNNING") if trial.number not in mine]

    def suggest(self, trial, name):
        """Let Optuna choose a value for this trial, or return the value that it has."""
        values = self.grid[name]
        if not self.search or len(values) != 2 or type(values[0]) not in (int, float):
            return trial.suggest_categorical(name, values)
        low, high = sorted(values)
        suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        return suggest(name, low, high, log=0 < 10 * low <= high)

    def report(self, run):
        """Tell the study the newest scores of a run. Returns the rows of its metrics.csv."""
        rows = read_metrics(run.directory / "metrics.csv")
        known = len(self.trials()[run.trial.number].intermediate_values)
        for i, score in enumerate(scores_of(rows)[known:], start=known):
            run.trial.report(score, step=i)
        return rows

    def say_state(self):
        """Say how many runs have ended and are left, and how far the runs of this process are."""
        ended = len(self.trials("COMPLETE", "PRUNED"))
        left = len(self.trials("WAITING"))
        here, elsewhere = len(self.running), len(self.others())
        say(f"{ended} ended, {here} running here, {elsewhere} elsewhere, {left} to begin")
        for run in self.running:
            rows = self.report(run)
            if rows:
                scores = scores_of(rows)
                score = f", score {scores[-1]:.5g}" if scores else ""
                minutes = rows[-1]["seconds"] / 60
                say(f"    {run.directory.name}: {rows[-1]['global_step']:,} steps in {minutes:.1f} minutes{score}")

    def prune(self):
        """Stop the runs whose scores are below the median of the others."""
        for run in [run for run in self.running if run.trial.should_prune()]:
            self.running.remove(run)
            stop_program(run.process)
            run.process.wait()
            self.end(run, pruned=True)

    def end(self, run, pruned=False):
        """Tell the study the result of a run that does not go on, and let go of it."""
        rows = self.report(run)
        scores = scores_of(rows)
        ended_well = run.process is not None and run.process.poll() == 0  # one that may stop early, too
        complete = ended_well or is_finished(run.directory)
        result = None
        if scores and (complete or pruned):
            result = {"best": max(scores), "last": scores[-1], "steps": rows[-1]["global_step"]}
            result["minutes"] = round(rows[-1]["seconds"] / 60, 2)
            end = "has finished" if complete else f"was stopped early, after {result['steps']:,} steps"
            how = f"{end}: best {result['best']:.5g}, last {result['last']:.5g}, {result['minutes']:g} minutes"
        else:
            how = f"has no result; see {shown(run.directory)}.log"
        with self.lock:  # otherwise another process could take the trial between its result and its release
            if result is None:
                self.failed[run.trial.number] = run.directory
            else:
                run.trial.set_user_attr("result", result)
                state = optuna.trial.TrialState.COMPLETE if complete else optuna.trial.TrialState.PRUNED
                self.study.tell(run.trial, result["best"] if complete else None, state)
            run.lock.release()
        left = len(self.trials("WAITING", "RUNNING")) - len(self.failed)
        say(f"{run.directory.name} {how}; {left} of {len(self.trials())} runs left")

    def rows(self):
        """Return a row for each run that has ended, with its values and its result, the best first."""
        ended = self.trials("COMPLETE", "PRUNED")
        rows = [{name: trial.params[name] for name in self.grid} | trial.user_attrs["result"] for trial in ended]
        return sorted(rows, key=lambda row: -row["best"])


def open_study(out, name):
    """Open the study of this name in the journal of a folder, or begin it. Raises CommandLineError."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = str(out / "sweep.journal")
    try:
        lock = optuna.storages.journal.JournalFileOpenLock(journal)  # not a link, which needs a privilege on Windows
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal, lock))
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=3)  # the first evaluations say little
        return optuna.create_study(
            storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
        )
    except OSError:
        raise
    except Exception:  # Optuna has no error of its own for lines that it cannot read
        raise CommandLineError(f"{journal}: is damaged; delete it: runs that have finished are found again") from None


# --- command line and output ------------------------------------------------------------------------------------------


def absolute(text):
    """The absolute path, if this is the path of a file or a folder, and not only a name that there is one of."""
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.dirname(path) and os.path.exists(path) else text


def read_grid(words, training):
    """Return {name: values} for the constants and values that a command line names, all checked."""
    constants = training.constants
    parser = Parser("sweep.py", "", "python sweep.py TRAINING --constant value ...")
    for name in constants.keys() - {"RUN_DIR"}:
        parser.add_argument(f"--{name.lower()}", dest=name, nargs="+", default=argparse.SUPPRESS)
    grid = {}
    for name, texts in vars(parser.parse_args(words)).items():
        texts = map(absolute, texts)  # as its runs record them
        grid[name] = list(dict.fromkeys(constants.convert(name, text) for text in texts))  # without repetitions
        for value in grid[name]:
            constants.check({name: value})
    if not grid:
        raise CommandLineError("name at least one constant and its values, as --seed 0 1 2")
    return grid


def combinations(grid):
    """Return every combination of the values, each as a dict."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def check_runs(training, out, grid, search=None):
    """Raises CommandLineError for a combination of values that cannot be trained, or not in its directory.

    search: as in `Sweep`; which values of a search fit together turns out only when they are chosen.
    """
    for values in combinations(grid):
        constants = training.constants | values
        training.constants.check(constants)
        if not search:
            training.check(Values(**constants))
        check_wandb(constants["WANDB"])
        if constants["EVAL_INTERVAL"] == 0:
            raise CommandLineError("without evaluations there is nothing to compare; leave --eval_interval 0 out")
        directory = directory_of(out, values)
        if directory.exists():
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(f"{directory}.lock", timeout=0):
                check_begun(directory, vars(training.applied(Values(**constants))))  # if it is not training just now
                if training.check_run:
                    with contextlib.suppress(CheckpointError):  # none yet, or damaged, which resuming it will report
                        training.check_run(Run(constants, directory, load_checkpoint(directory)))


def read_command_line(argv):
    """Return the options of a sweep, its training, and the values of its constants. Raises CommandLineError."""
    parser = Parser("sweep.py", __doc__, "python sweep.py TRAINING [--constant value ...] [option ...]")
    parser.add_argument("training", choices=TRAININGS, metavar="TRAINING", help=", ".join(TRAININGS))
    parser.add_argument("--out", type=given_path, help="default runs/sweep/TRAINING")
    at_least_1 = within("[1, inf)")
    parser.add_argument("--search", type=at_least_1, metavar="N", help="N settings by Optuna, not all combinations")
    parser.add_argument("--prune", action="store_true", help="stop runs that are worse than the median of the others")
    parser.add_argument("--map", nargs=2, metavar="CONSTANT", help="two constants for a heat map, sweep.png")
    parser.add_argument("--fresh", type=at_least_1, metavar="GAMES", help="also score best models in so many new games")
    args, words = parser.parse_known_args(argv)
    training = find_training(args.training)
    grid = read_grid(words or DEFAULT_WORDS.get(args.training, "").split(), training)
    args.map = [name.upper() for name in args.map or ()]
    if args.fresh is not None and not training.algorithm:
        raise CommandLineError(f"--fresh: {args.training} cannot be scored in fresh games; leave it out")
    if args.search and (args.map or max(map(len, grid.values())) < 2):
        raise CommandLineError("--search needs a constant with two values or more, and no --map, which draws a grid")
    if not set(args.map) <= grid.keys():
        raise CommandLineError(f"--map takes two of the constants of the grid: {', '.join(grid).lower()}")
    return args, training, grid


def say(line):
    """Print a line with the time of day."""
    messages.say(f"{time.strftime('%H:%M:%S')}  {line}")


def main(argv=()):
    need("optuna")
    args, training, grid = read_command_line(argv)
    out = Path(args.out or f"runs/sweep/{args.training}").resolve()
    check_runs(training, out, grid, args.search)
    out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(training, out, grid, args.search)
    say(f"{len(sweep.trials())} runs, {available_cores()} at a time, in {shown(out)}")
    sweep.run(args.prune)
    if rows := sweep.rows():
        for row in rows if args.fresh else ():
            values = {name: row[name] for name in grid}
            row |= fresh_scores(training, directory_of(out, values), values, args.fresh)
        print()
        show_table(rows, labels=len(grid))
        write_csv(out / "sweep.csv", rows)
        print(f"\nwrote {shown(out / 'sweep.csv')}; the directory of each run has its learning curve")
    if sweep.failed:
        log = f"{next(iter(sweep.failed.values()))}.log"
        raise CommandLineError(f"{len(sweep.failed)} runs did not finish, see {log}; start again to go on")
    if args.map:
        save_figure(out / "sweep.png", heat_map, rows, *args.map, "best")
        print(f"wrote {shown(out / 'sweep.png')}")
    return 0


if __name__ == "__main__":
    run_script(main, "sweep.py")
