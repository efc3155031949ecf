"""What watches a training: evaluation, progress, metrics.csv, TensorBoard, the learning curve, checkpoints.

A trainer is anything that has this, most of which `Trainer` brings (trainer.py):

    num_steps global_step update_count seconds  counters; seconds of training so far
    stats                                       {name: float} of the last update, the same names in each; every one becomes a
                                                column and a curve
    evaluated best_score is_best                the last evaluated policy_state(), with its "evaluation", which has a "score"
    pending                                     the policy states that are being evaluated
    policy_state() state_dict()                 what playing needs, and what a resume needs; plain types and tensors
    evaluation_end(state, evaluation)           tells the trainer, and by it all callbacks, what came of an evaluation
    check_stop()                                raises StopTraining if somebody asked for it

The trainer calls the on_... methods of every callback, in the order of its list; whoever called `learn` calls `close` afterwards,
as `train` in command_line.py does. No callback changes what is learned. Put `Evaluation` first, so that the others hear of a
result before they hear of the update that waited for it. Put `MetricsCSV` before `LearningCurve`, which draws its file, and
before `Checkpoints`, so that a resume point never knows of an update that metrics.csv does not. A full disk costs files, not the
training.
"""

import contextlib
import csv
import io
import math
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from background import Background
from checkpoint import CheckpointError, atomic_write, save_checkpoint
from device import first_line, unavailable

CHARTS = ("lr", "steps_per_second", "episode_return")  # the other statistics are losses
PLAIN_INTERVAL = 10  # seconds between progress lines where no bar can be drawn


class Callback:
    """Does nothing at any event."""

    # fmt: off
    def on_training_start(self, trainer): pass
    def on_update_end(self, trainer): pass
    def on_evaluation_end(self, trainer): pass  # of trainer.evaluated, the policy after this update or an earlier one
    def on_training_end(self, trainer): pass  # not after an interruption
    def close(self): pass  # always, at the very end
    # fmt: on


class Evaluation(Callback):
    """Every so many updates, and after the last, the policy is evaluated in another process while training goes on.

    At most `processes` evaluations run at once: when one more is due, training waits for the oldest. Where the other process lacks
    memory, or may not share the GPU, training and evaluation take turns in this one. An evaluation that a stop interrupts is started
    again when the run is resumed: its policy state stays in `trainer.pending`, which has one for each of our futures.
    """

    def __init__(self, evaluate, interval, processes=1):
        """evaluate(policy state) -> a dict of numbers with a "score"; it must be importable. interval: updates, at least 1."""
        self.background, self.evaluate, self.interval, self.futures = Background(evaluate, processes), evaluate, interval, deque()
        self.take_turns = False

    def on_training_start(self, trainer):
        for state in trainer.pending[len(self.futures) :]:  # of a run that was stopped
            self.start(state)

    def on_update_end(self, trainer):
        self.report_finished(trainer)
        if trainer.update_count % self.interval == 0 or trainer.global_step >= trainer.num_steps:
            self.wait_until_under_way(self.background.processes - 1, trainer)
            trainer.pending.append(trainer.policy_state())
            self.start(trainer.pending[-1])

    def on_training_end(self, trainer):
        self.wait_until_under_way(0, trainer)

    def wait_until_under_way(self, number, trainer):
        """Wait until no more evaluations than this are under way."""
        self.report_finished(trainer)
        while len(self.futures) > number:
            trainer.check_stop()
            time.sleep(0.02)
            self.report_finished(trainer)

    def report_finished(self, trainer):
        """Tell the trainer what is finished, in the order in which it was started."""
        while self.futures and self.futures[0].done():
            try:
                evaluation = self.background.result(self.futures[0])
            except Exception as error:
                if not unavailable(error):
                    raise
                if not self.take_turns:
                    say(f"warning: no evaluation beside the training ({first_line(error)}); from now on they take turns")
                self.take_turns = True
                evaluation = self.evaluate(trainer.pending[0])
            self.futures.popleft()
            trainer.evaluation_end(trainer.pending.pop(0), evaluation)

    def start(self, state):
        if self.take_turns:
            future = Future()
            future.set_result(self.evaluate(state))
        else:
            future = self.background.submit(state)
        self.futures.append(future)

    def close(self):
        self.background.close()


def say(line):
    """Print a line without tearing a progress bar. Where nobody reads (`| head`) or the disk is full, training goes on."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line)
        sys.stdout.flush()


def points(score):
    """761.5625 -> "761.6", 0.8234 -> "0.823", nan -> "-"."""
    return "-" if math.isnan(score) else f"{score:.1f}" if abs(score) >= 10 else f"{score:.3g}"


def pace(rate):
    """0.72 -> "0.72 steps/s", 20078.3 -> "20,078 steps/s"."""
    return f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s"


def duration(seconds):
    """42 -> "42s", 102 -> "1m42s", 7500 -> "2h05m"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def evaluation_line(trainer):
    """trainer.evaluated as one line of text."""
    state, evaluation = trainer.evaluated, trainer.evaluated["evaluation"]
    others = "  ".join(f"{name} {value:.4g}" for name, value in evaluation.items() if name != "score")
    return (f"{state['global_step']:>11,} steps  {duration(state['seconds']):>6}  score {points(evaluation['score']):>5}  {others}"
            + ("  best" if trainer.is_best else ""))  # fmt: skip


class ProgressBar(Callback):
    """A bar on a terminal, otherwise a line every few seconds; in both cases a line for each evaluation."""

    def __init__(self, plan="", first_is_slow=False):
        """plan: a line to print first, on what is about to happen. first_is_slow: the first update says nothing about the pace of the rest."""
        self.plan, self.first_is_slow, self.bar = plan, first_is_slow, None

    def on_training_start(self, trainer):
        if self.plan:
            say(self.plan)
        self.first_step, self.first_seconds, self.said_at = trainer.global_step, trainer.seconds, trainer.seconds
        self.estimates = []  # steps per second of the first two updates
        if sys.stderr.isatty():
            self.bar = tqdm(total=trainer.num_steps, initial=min(trainer.global_step, trainer.num_steps), unit=" steps",
                            unit_scale=True, dynamic_ncols=True)  # fmt: skip

    def on_evaluation_end(self, trainer):
        say(evaluation_line(trainer))
        self.said_at = trainer.seconds
        self.show(trainer)

    def on_update_end(self, trainer):
        rate = (trainer.global_step - self.first_step) / (trainer.seconds - self.first_seconds)  # callbacks and waiting included
        left = duration(max(trainer.num_steps - trainer.global_step, 0) / rate)
        if len(self.estimates) < 2:
            if self.first_is_slow and not self.estimates:
                say(f"the first update took {duration(trainer.seconds - self.first_seconds)}")
                rate, self.said_at = 0, trainer.seconds
            elif rate > 4 * sum(self.estimates):  # the first update, or one that has nothing to compile any more
                say(f"the {'second' if self.estimates else 'first'} update ran at {pace(rate)}: about {left} to go")
            self.estimates.append(rate)
            self.first_step, self.first_seconds = trainer.global_step, trainer.seconds  # later rates are of what follows
        self.show(trainer)
        if self.bar is None and trainer.seconds - self.said_at >= PLAIN_INTERVAL:
            say(
                f"{trainer.global_step:>11,} steps  {duration(trainer.seconds):>6}  in training {self.recent(trainer)}  "
                f"{pace(rate)}  {left} left"
            )
            self.said_at = trainer.seconds

    def show(self, trainer):
        if self.bar is not None:
            score = points(trainer.evaluated["evaluation"]["score"]) if trainer.evaluated else "-"
            self.bar.set_postfix_str(f"score {score}, in training {self.recent(trainer)}", refresh=False)
            self.bar.update(min(trainer.global_step, trainer.num_steps) - self.bar.n)

    def recent(self, trainer):
        """-> the mean return of the last training episodes, as text."""
        return points(trainer.stats.get("episode_return", math.nan))

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def on_training_end(self, trainer):
        self.close()
        best = f", best score {points(trainer.best_score)}" if math.isfinite(trainer.best_score) else ""
        say(f"trained {trainer.global_step:,} steps in {duration(trainer.seconds)}{best}")


def read_metrics(path):
    """metrics.csv -> (columns, rows), lists of str. No file: empty. What a kill or a full disk tore is left out."""
    path = Path(path)
    text = path.read_text(errors="replace") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a line without its end is torn, even if it parses
    columns, *rows = list(csv.reader(whole.split("\n")[:-1])) or [[]]
    if columns[:1] != ["update"]:
        return [], []
    return columns, [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]


class MetricsCSV(Callback):
    """One row per update; what a full disk refuses is written with the next. A resumed run drops the rows after its checkpoint, and goes
    on as if never stopped."""

    def __init__(self, path, evaluation=("score",)):
        """evaluation: the names of an evaluation that get a column, with `eval_` before them."""
        self.path, self.evaluation, self.columns, self.unwritten = Path(path), evaluation, None, []

    def on_training_start(self, trainer):
        self.last = trainer.update_count  # rows behind it are not of this run

    def on_update_end(self, trainer):
        self.last = trainer.update_count
        row = {"update": trainer.update_count, "global_step": trainer.global_step, "seconds": round(trainer.seconds, 2)}
        row |= trainer.stats | dict.fromkeys([f"eval_{name}" for name in self.evaluation], "")
        self.unwritten.append(row)
        with self.warn_and_continue(f"row {trainer.update_count}"):
            self.write()

    def on_evaluation_end(self, trainer):
        update, evaluation = trainer.evaluated["update_count"], trainer.evaluated["evaluation"]
        with self.warn_and_continue(f"the evaluation of row {update}"):
            first = min([int(row["update"]) for row in self.unwritten], default=self.last + 1)
            if update < first:
                columns, rows = read_metrics(self.path)
                self.unwritten[:0] = [dict(zip(columns, row)) for row in rows if update <= int(row[0]) < first]
                self.columns = None
            for row in self.unwritten:
                if int(row["update"]) == update:
                    row |= {f"eval_{name}": evaluation[name] for name in self.evaluation}
            self.write()

    def write(self):
        """Append the unwritten rows, or write the whole file if it may be torn or lacks a column."""
        if not self.unwritten:
            return
        if self.columns is None:
            columns, rows = read_metrics(self.path)
            rows = [dict(zip(columns, row)) for row in rows if int(row[0]) < int(self.unwritten[0]["update"])] + self.unwritten
            columns += [name for name in self.unwritten[-1] if name not in columns]
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerow(columns)
            csv.DictWriter(table, columns, lineterminator="\n").writerows(rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, table.getvalue().encode())
            self.columns = columns
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerows(self.unwritten)
        self.unwritten = []

    @contextlib.contextmanager
    def warn_and_continue(self, what):
        try:
            yield
        except OSError as error:
            self.columns = None  # the next update starts again, which repairs what this one tore
            say(f"warning: {self.path}: {what} not written ({error.strerror}); training goes on")


class TensorBoard(Callback):
    """Event files in the run directory: losses/, charts/ and eval/ over environment steps."""

    def __init__(self, run_dir):
        self.run_dir, self.writer, self.excepthook = run_dir, None, threading.excepthook

    def on_training_start(self, trainer):
        threading.excepthook = self.thread_ended
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, because the training can do without
        except ImportError:
            say("warning: tensorboard is not installed, so there are no event files (pip install tensorboard)")
            return
        # purge_step hides what an interrupted run logged after the checkpoint that this one goes on from
        purge_step = trainer.global_step + 1 if trainer.global_step else None
        with self.warn_and_give_up():
            self.writer = SummaryWriter(self.run_dir, purge_step=purge_step)

    def on_update_end(self, trainer):
        self.add(
            {f"{'charts' if name in CHARTS else 'losses'}/{name}": x for name, x in trainer.stats.items()}, trainer.global_step
        )

    def on_evaluation_end(self, trainer):
        self.add({f"eval/{name}": x for name, x in trainer.evaluated["evaluation"].items()}, trainer.evaluated["global_step"])

    def thread_ended(self, args):
        """The writer's thread ends with its first error, which the next call raises again: a traceback would say no more."""
        if not (isinstance(args.exc_value, OSError) and "tensorboard" in type(args.thread).__module__):
            self.excepthook(args)

    def close(self):
        threading.excepthook = self.excepthook
        if self.writer is not None:
            with self.warn_and_give_up():
                self.writer.close()

    def add(self, scalars, step):
        if self.writer is not None:
            with self.warn_and_give_up():
                for name, value in scalars.items():
                    self.writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def warn_and_give_up(self):
        try:
            yield
        except (OSError, UnicodeError) as error:  # the latter for a directory whose name is not UTF-8
            self.writer = None  # its thread ends with the first error
            reason = error.strerror if isinstance(error, OSError) else error.reason
            say(f"warning: {self.run_dir}: no more TensorBoard events ({reason}); training goes on")


class LearningCurve(Callback):
    """learning_curve.png, drawn from metrics.csv after evaluations, for at most 5 % of the time, and at the end."""

    def __init__(self, path, csv_path, levels=None):
        """levels: {label: score} to compare with, drawn as lines."""
        self.path, self.csv_path, self.levels, self.missing = Path(path), csv_path, levels or {}, False
        self.next_at, self.out_of_date = -math.inf, False

    def on_evaluation_end(self, trainer):
        self.out_of_date = True
        if time.monotonic() >= self.next_at:
            self.draw()

    def on_training_end(self, trainer):
        self.draw()

    def close(self):
        if self.out_of_date:  # the training was stopped
            self.draw()

    def draw(self):
        start, self.out_of_date = time.monotonic(), False
        try:
            columns, rows = read_metrics(self.csv_path)
            image = io.BytesIO()
            learning_curve([dict(zip(columns, row)) for row in rows], self.levels).savefig(image, format="png", dpi=120)
            atomic_write(self.path, image.getvalue())
        except OSError as error:
            say(f"warning: {self.path}: not drawn ({error.strerror}); training goes on")
        except ImportError as error:
            if not self.missing:
                say(f"warning: {error.name} is not installed, so there is no learning curve (pip install matplotlib)")
            self.missing = True
        end = time.monotonic()
        self.next_at = end + 20 * (end - start)  # on a GPU evaluations end faster than a curve is drawn


def learning_curve(rows, levels):
    """Rows of metrics.csv (dicts of str), {label: score} -> a Figure: scores over steps, and over minutes. Raises ImportError."""
    from matplotlib.figure import Figure  # here, because the training can do without

    figure = Figure(figsize=(12, 4.8), layout="constrained")  # no pyplot: it keeps global state and may want a screen
    left, right = figure.subplots(1, 2, sharey=True)
    steps = max((int(row["global_step"]) for row in rows), default=0)
    unit, name = (1e6, "million environment steps") if steps >= 1_000_000 else (1e3, "thousand environment steps") if steps >= 1000 else (1, "steps")
    draw_scores(left, rows, levels, "global_step", unit, name)
    draw_scores(right, rows, levels, "seconds", 60, "minutes")
    left.set(ylabel="score per episode")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_scores(axes, rows, levels, column, unit, label):
    """The scores of `rows` over `column` / `unit`, and the levels to compare with."""
    evaluated = [row for row in rows if row["eval_score"]]
    for (name, level), color, style in zip(levels.items(), ("tab:green", "gray", "tab:orange"), ("--", ":", "-.")):
        axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level:g}")
    scores = [float(row["eval_score"]) for row in evaluated]
    axes.plot([float(row[column]) / unit for row in evaluated], scores,
              color="tab:blue", linewidth=2, marker="o", markersize=3.5, zorder=3, label="evaluation")  # fmt: skip
    axes.plot([float(row[column]) / unit for row in rows], [float(row.get("episode_return") or "nan") for row in rows],
              color="tab:blue", linewidth=1, alpha=0.4, label="training episodes: actions are sampled")  # fmt: skip
    axes.set(xlabel=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min([0, *scores, *levels.values()]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


class Checkpoints(Callback):
    """last.pt and the newest few checkpoint_<update>.pt to resume from, best_model.pt to play."""

    def __init__(self, run_dir, save_freq, keep=3, keep_stages=False):
        """save_freq: updates between two checkpoints. keep: how many checkpoint_<update>.pt stay; with keep_stages those before the
        first update and after a tenth of the training stay too, to look at what was learned."""
        self.run_dir, self.save_freq, self.keep, self.keep_stages, self.best = Path(run_dir), save_freq, keep, keep_stages, None

    def on_training_start(self, trainer):
        if trainer.update_count == 0:
            state = trainer.state_dict()
            self.save("last.pt", state)  # a kill before the first checkpoint leaves something to resume
            if self.keep_stages:
                self.save("checkpoint_0.pt", state)

    def on_evaluation_end(self, trainer):
        if trainer.is_best:
            self.best = trainer.evaluated
        self.save_best()

    def save_best(self):
        if self.best and self.save("best_model.pt", self.best):  # else again after the next update
            self.best = None

    def on_update_end(self, trainer):
        self.save_best()
        if trainer.update_count % self.save_freq == 0:
            state = trainer.state_dict()
            self.save("last.pt", state)
            self.save(f"checkpoint_{trainer.update_count}.pt", state)
            tenth = trainer.num_steps / trainer.global_step * trainer.update_count / 10  # in updates
            self.prune(trainer.update_count, {0, math.ceil(tenth / self.save_freq) * self.save_freq} if self.keep_stages else {})

    def on_training_end(self, trainer):
        """Raises CheckpointError if the result of the training cannot be saved."""
        self.save_best()
        save_checkpoint(self.run_dir / "last.pt", trainer.state_dict())

    def save(self, name, state):
        """-> whether it worked."""
        try:
            save_checkpoint(self.run_dir / name, state)
            return True
        except CheckpointError as error:
            say(f"warning: {error}; training goes on")
            return False

    def prune(self, current, kept):
        """Delete all but the newest, and the updates that are kept. By time, not by number: higher numbers may be left from before a resume.
        The one of the current update stays, even if the clock has been set back."""

        def update(file):
            return int(file.stem.removeprefix("checkpoint_"))

        def written(file):
            return update(file) == current, file.stat().st_mtime_ns, update(file)

        files = filter(Path.is_file, self.run_dir.glob("checkpoint_*.pt"))  # links to nothing, and directories, are not ours
        files = [f for f in files if f.stem.removeprefix("checkpoint_").isdecimal() and update(f) not in kept]
        for file in sorted(files, key=written, reverse=True)[self.keep :]:
            with contextlib.suppress(OSError):  # one file too many is no reason to stop
                file.unlink()
