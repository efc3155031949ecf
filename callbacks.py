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

The trainer tells every callback of each event, in the order of its list; whoever called `learn` tells them to close afterwards, as
`train` in command_line.py does. No callback changes what is learned, and one that only draws, logs or prints never ends a training:
whatever it raises becomes a warning. `Evaluation` and `Checkpoints` may end it. Put `Evaluation` before those that report, so that
they hear of a result before they hear of the update that waited for it. Put `MetricsCSV` before `LearningCurve`, which draws its
file, and before `Checkpoints`, so that a resume point never knows of an update that metrics.csv does not.
"""

import codecs
import contextlib
import csv
import io
import itertools
import math
import os
import sys
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from harness.background import Background, CannotStart
from harness.checkpoint import CheckpointError, atomic_write, save_checkpoint
from harness.device import unavailable
from harness.messages import first_line, printable, shortened
from harness.options import CommandLineError
from harness.runs import is_replaced, locked, write_config
from harness.supervise import StopTraining

CHARTS = ("lr", "steps_per_second", "episode_return")  # the other statistics are losses
PROGRESS = ("update", "global_step", "seconds")  # the columns of metrics.csv that are no statistics
PLAIN_INTERVAL = 10  # seconds between progress lines where no bar can be drawn


class Callback:
    """Does nothing at any event."""

    cost = ""  # what is lost if it fails, for a warning; "" if a failure ends the training
    warnings = frozenset()  # the lines that have been printed

    def hear(self, event, *arguments):
        """Call the method of this name. If the callback has a `cost`, whatever it raises becomes a warning, once for each reason."""
        try:
            getattr(self, event)(*arguments)
        except BaseException as error:
            if not self.cost or isinstance(error, (StopTraining, KeyboardInterrupt)):
                raise
            line = f"warning: {self.cost} ({reason(error)}); training goes on"
            if line not in self.warnings:
                say(line)
            self.warnings |= {line}

    # fmt: off
    def on_training_start(self, trainer): pass
    def on_update_end(self, trainer): pass
    def on_evaluation_end(self, trainer): pass  # of trainer.evaluated, the policy after this update or an earlier one
    def on_training_end(self, trainer): pass  # not after an interruption
    def close(self): pass  # always, at the very end
    # fmt: on


class RunDirectory(Callback):
    """If somebody renames or removes the directory of a run, or its config.json, they are made anew, so that what is saved there can be
    resumed. If another run has taken its place, the training ends. The first of all callbacks, because the others write files."""

    def __init__(self, path):
        self.path, self.lock = Path(path), contextlib.ExitStack()

    def keep(self, trainer):
        if is_replaced(self.path, trainer):
            raise CheckpointError(f"something else is at {self.path} now, which was the directory of this run")
        if not (self.path / "config.json").exists():
            say(
                f"warning: {self.path} was renamed or removed, or its config.json; it is made anew, and training goes on"
            )
            with contextlib.suppress(OSError):  # `Checkpoints` says what cannot be saved
                write_config(self.path, trainer)
            with contextlib.suppress(CommandLineError):  # only config.json was removed: the directory is locked still
                self.lock.enter_context(locked(self.path))

    def close(self):
        self.lock.close()

    on_update_end = on_evaluation_end = on_training_end = keep


class Evaluation(Callback):
    """Every so many updates, and after the last, the policy is evaluated in another process while training goes on.

    At most `processes` evaluations run at once: when one more is due, training waits for the oldest. Where there can be no
    other process, or it lacks memory, or may not share the GPU, training and evaluation take turns in this one. An evaluation
    that a stop interrupts is started again when the run is resumed: its policy state stays in `trainer.pending`, which has one
    for each of our futures.
    """

    def __init__(self, evaluate, interval, processes=1):
        """evaluate(policy state) -> a dict of numbers with a "score"; it must be importable. interval: updates, at least 1."""
        self.background = Background(evaluate, processes)
        self.evaluate, self.interval = evaluate, interval
        self.futures = deque()
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
                if not (unavailable(error) or isinstance(error, CannotStart)):
                    raise
                if not self.take_turns:
                    say(
                        f"warning: no evaluation beside the training ({first_line(error)}); from now on they take turns"
                    )
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


def reason(error):
    """An error of any kind -> why it came, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ModuleNotFoundError):
        return f"{shortened(error)}; install it with pip"
    return f"{type(error).__name__}: {shortened(error)}"


def say(line):
    """Print a line without tearing a progress bar. Where nobody reads (`| head`) or the disk is full, training goes on."""
    with contextlib.suppress(Exception):
        tqdm.write("\n".join(map(printable, line.splitlines())))
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
    return (
        f"{state['global_step']:>11,} steps  {duration(state['seconds']):>6}  score {points(evaluation['score']):>5}  {others}"
        + ("  best" if trainer.is_best else "")
    )


class ProgressBar(Callback):
    """A bar on a terminal, otherwise a line every few seconds; in both cases a line for each evaluation."""

    cost = "the progress is not shown"

    def __init__(self, plan="", first_is_slow=False):
        """plan: a line to print first, on what is about to happen. first_is_slow: the first update says nothing about the pace of the rest."""
        self.plan, self.first_is_slow, self.bar = plan, first_is_slow, None

    def on_training_start(self, trainer):
        if self.plan:
            say(self.plan)
        self.first_step, self.first_seconds, self.said_at = trainer.global_step, trainer.seconds, trainer.seconds
        self.estimates = []  # steps per second of the first two updates
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=trainer.num_steps,
                initial=min(trainer.global_step, trainer.num_steps),
                unit=" steps",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_evaluation_end(self, trainer):
        say(evaluation_line(trainer))
        self.said_at = trainer.seconds
        self.show(trainer)

    def on_update_end(self, trainer):
        rate = (trainer.global_step - self.first_step) / (
            trainer.seconds - self.first_seconds
        )  # callbacks and waiting included
        left = duration(max(trainer.num_steps - trainer.global_step, 0) / rate)
        if len(self.estimates) < 2:
            if self.first_is_slow and not self.estimates:
                say(f"the first update took {duration(trainer.seconds - self.first_seconds)}")
                rate, self.said_at = 0, trainer.seconds
            elif rate > 4 * sum(self.estimates):  # the first update, or one that has nothing to compile any more
                say(f"the {'second' if self.estimates else 'first'} update ran at {pace(rate)}: about {left} to go")
            self.estimates.append(rate)
            self.first_step, self.first_seconds = (
                trainer.global_step,
                trainer.seconds,
            )  # later rates are of what follows
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
    """metrics.csv -> its rows, each {column: number}. A cell without a number, and a missing column, is nan. No file: no rows."""
    rows, _ = read_table(path)
    return [defaultdict(lambda: math.nan, {name: number(cell) for name, cell in row.items()}) for row in rows]


def number(cell):
    """ "81.25" -> 81.25, "3" and "3.0" -> 3; what is no number, as "" and "n/a" -> nan."""
    try:
        x = float(cell)
    except ValueError:
        return math.nan
    return int(x) if x.is_integer() else x


def read_table(path, ended=False):
    """metrics.csv, also as a spreadsheet or pandas saves it -> its rows, as of `rows_of`, and the lines that are not understood.

    They may write a byte order mark or UTF-16, semicolons or tabs and then decimal commas, a column without a name, lines above the
    header, and no end of the last line. ended: that line does not count, because a kill or a full disk may have torn it.
    """
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16", "replace") if utf_16 else data.decode("utf-8-sig", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if ended:
        lines.pop()
    for header in lines:
        delimiter = max(",;\t", key=header.count)
        columns = cells_of(header.replace('"', ""), delimiter)
        if "update" in columns:
            lines.remove(header)
            return rows_of(lines, columns, delimiter)
    return [], list(filter(None, lines))


def rows_of(lines, columns, delimiter):
    """-> rows in the order of their updates, each {column: text}, with an int as "update"; and the lines that are not understood."""
    rows, odd = {}, []
    for line in lines:
        cells = cells_of(line, delimiter)
        if len(cells) != len(columns):
            cells = cells_of(line.replace('"', ""), delimiter)  # a stray quotation mark
        row = dict(zip(columns, cells))
        update = number(row.get("update", ""))
        if len(cells) == len(columns) and type(update) is int and update > 0 and update not in rows:
            rows[update] = {name: cell for name, cell in row.items() if name} | {"update": update}
        elif any(cells):
            odd.append(line)
    return [rows[update] for update in sorted(rows)], odd


def cells_of(line, delimiter):
    """One line of a table -> its cells. Line by line, because a stray quotation mark must not swallow what follows."""
    try:
        (cells,) = csv.reader([line], delimiter=delimiter)
    except csv.Error:
        return [line]
    return [cell.strip() if delimiter == "," else with_point(cell.strip()) for cell in cells]


def with_point(cell):
    """ "81,25" -> "81.25"; a text keeps its commas."""
    point = cell.replace(",", ".")
    return cell if math.isnan(number(point)) else point


class MetricsCSV(Callback):
    """One row per update; what cannot be written is written with the next. A resumed run drops the rows after its checkpoint, and
    goes on as if never stopped. Where somebody has changed the file, the rows that are understood stay, and before anything else is
    dropped, the whole file is copied.
    """

    def __init__(self, path, evaluation=("score",)):
        """evaluation: the names of an evaluation that get a column, with `eval_` before them."""
        self.path, self.evaluation = Path(path), evaluation
        self.cost = f"{path}: not written"
        self.unwritten = []  # rows that belong behind what the file keeps
        self.columns = []
        self.kept = 0  # bytes of the file that stay as they are; 0: it is written anew
        self.known = ()  # the `stamp` of the file when we last read or wrote it; () equals none

    def on_training_start(self, trainer):
        self.last = trainer.update_count  # rows behind it are not of this run

    def on_update_end(self, trainer):
        self.last = trainer.update_count
        row = {"update": trainer.update_count, "global_step": trainer.global_step, "seconds": round(trainer.seconds, 2)}
        row |= trainer.stats | dict.fromkeys([f"eval_{name}" for name in self.evaluation], "")
        self.unwritten.append(row)
        self.read_if_changed()
        self.write()

    def on_evaluation_end(self, trainer):
        update, evaluation = trainer.evaluated["update_count"], trainer.evaluated["evaluation"]
        self.read_if_changed()
        self.take_back(update)
        for row in self.unwritten:
            if row["update"] == update:
                row |= {f"eval_{name}": evaluation[name] for name in self.evaluation}
        self.write()

    def write(self):
        if not self.unwritten:
            return
        if self.kept:
            with open(self.path, "r+b") as file:
                file.seek(self.kept)
                file.write(self.as_csv(self.unwritten))
                file.truncate()
        else:
            self.columns = list(dict.fromkeys(["update", *itertools.chain(*self.unwritten)]))
            atomic_write(self.path, self.as_csv([dict(zip(self.columns, self.columns)), *self.unwritten]))
        self.known = self.stamp()
        self.kept = self.path.stat().st_size
        self.unwritten = []

    def as_csv(self, rows):
        table = io.StringIO(newline="")
        csv.DictWriter(table, self.columns, lineterminator="\n").writerows(rows)
        return table.getvalue().encode("utf-8", "surrogateescape")

    def stamp(self):
        """-> the file's size and time, None if there is no file."""
        stat = self.path.stat() if self.path.exists() else None
        return stat and (stat.st_size, stat.st_mtime_ns)

    def first_unwritten(self):
        return self.unwritten[0]["update"] if self.unwritten else self.last + 1

    def take_back(self, update):
        """Make the rows from this update on unwritten again, because one of them is to change."""
        if update < self.first_unwritten():
            table = self.path.read_bytes()
            start = table.rfind(b"\n%d," % update) + 1
            if start:  # else somebody has deleted the row
                rows, _ = rows_of(table[start:].decode("utf-8", "surrogateescape").split("\n"), self.columns, ",")
                self.unwritten[:0] = rows
                self.kept = start

    def read_if_changed(self):
        """Make all rows unwritten again at first, where a write tore the file or somebody changed it, and for a new column.

        A copy of the file keeps what is not understood, and a line says so.
        """
        stamp = self.stamp()
        new_column = self.kept and self.unwritten and not self.unwritten[-1].keys() <= set(self.columns)
        if stamp == self.known and not new_column:
            return
        first = self.first_unwritten()
        rows, odd = read_table(self.path, ended=True)
        if (
            sum(row["update"] < first for row in rows) < first - 1
        ):  # a kill tears only a later row: somebody has left the end out
            rows, odd = read_table(self.path)
        rows = [row for row in rows if row["update"] < first]
        missing = first - 1 - len(rows)
        if missing or odd:
            copy = f"; the file as it was: {keep_copy(self.path)}" if odd else ""
            say(f"warning: {self.path}: earlier rows missing: {missing}, lines not understood: {len(odd)}{copy}")
        self.unwritten[:0] = rows
        self.known = stamp
        self.kept = 0


def keep_copy(path):
    """metrics.csv -> metrics.copy-1.csv, or the first such name that is free, with the same contents."""
    names = (path.with_stem(f"{path.stem}.copy-{number}") for number in itertools.count(1))
    copy = next(name for name in names if not name.exists())
    atomic_write(copy, path.read_bytes())
    return copy


class TensorBoard(Callback):
    """Event files in the run directory: losses/, charts/ and eval/ over environment steps."""

    def __init__(self, run_dir):
        self.run_dir, self.writer, self.excepthook = run_dir, None, threading.excepthook
        self.cost = f"{run_dir}: no more TensorBoard events"

    def on_training_start(self, trainer):
        threading.excepthook = self.thread_ended
        from torch.utils.tensorboard import SummaryWriter  # here, because the training can do without

        # Hidden is what was logged from this step on: of updates after the checkpoint, and of evaluations that were under way in it.
        # Both come again. The updates from such an evaluation to the checkpoint do not, so they are logged again.
        first = min([state["global_step"] for state in trainer.pending], default=trainer.global_step + 1)
        self.writer = SummaryWriter(self.run_dir, purge_step=first)
        for row in read_metrics(Path(self.run_dir, "metrics.csv")) if trainer.pending else ():
            if first <= row["global_step"] <= trainer.global_step:
                stats = {name: x for name, x in row.items() if name not in PROGRESS and not name.startswith("eval_")}
                self.add_stats(stats, row["global_step"])

    def on_update_end(self, trainer):
        self.add_stats(trainer.stats, trainer.global_step)

    def add_stats(self, stats, step):
        self.add({f"{'charts' if name in CHARTS else 'losses'}/{name}": x for name, x in stats.items()}, step)

    def on_evaluation_end(self, trainer):
        self.add(
            {f"eval/{name}": x for name, x in trainer.evaluated["evaluation"].items()}, trainer.evaluated["global_step"]
        )

    def add(self, scalars, step):
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def thread_ended(self, args):
        """The writer's thread ends with its first error, which every later call raises again: a traceback would say no more."""
        if "tensorboard" not in type(args.thread).__module__:
            self.excepthook(args)

    def close(self):
        threading.excepthook = self.excepthook
        if self.writer is not None:
            self.writer.close()


class LearningCurve(Callback):
    """learning_curve.png, drawn from metrics.csv after evaluations, for at most 5 % of the time, and at the end."""

    def __init__(self, path, csv_path, levels=None):
        """levels: {label: score} to compare with, drawn as lines."""
        self.path, self.csv_path, self.levels = Path(path), csv_path, levels or {}
        self.next_at, self.out_of_date = -math.inf, False
        self.cost = f"{path}: not drawn"

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
            image = io.BytesIO()
            learning_curve(read_metrics(self.csv_path), self.levels).savefig(image, format="png", dpi=120)
            atomic_write(self.path, image.getvalue())
        finally:
            end = time.monotonic()
            self.next_at = end + 20 * (end - start)  # on a GPU evaluations end faster than a curve is drawn


def new_figure(width, height):
    """-> a matplotlib Figure of so many inches. It is not of pyplot, which keeps global state and may want a screen."""
    try:
        from matplotlib.figure import Figure  # here, because the training can do without
    except (ValueError, AttributeError):  # MPLBACKEND names a backend that is not installed; a file needs none
        os.environ.pop("MPLBACKEND", None)
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]  # half imported, by us or by somebody before
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def learning_curve(rows, levels):
    """Rows of metrics.csv, {label: score} -> a Figure: scores over steps, and over minutes."""
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = max((row["global_step"] for row in rows if math.isfinite(row["global_step"])), default=0)
    unit, name = (
        (1e6, "million environment steps")
        if steps >= 1_000_000
        else (1e3, "thousand environment steps")
        if steps >= 1000
        else (1, "steps")
    )
    draw_scores(left, rows, levels, "global_step", unit, name)
    draw_scores(right, rows, levels, "seconds", 60, "minutes")
    left.set(ylabel="score per episode")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_scores(axes, rows, levels, column, unit, label):
    """The scores of `rows` over `column` / `unit`, and the levels to compare with."""
    evaluated = [row for row in rows if math.isfinite(row["eval_score"])]
    for (name, level), color, style in zip(levels.items(), ("tab:green", "gray", "tab:orange"), ("--", ":", "-.")):
        axes.axhline(level, color=color, linestyle=style, linewidth=1.3, label=f"{name}: {level:g}")
    scores = [row["eval_score"] for row in evaluated]
    axes.plot(
        [row[column] / unit for row in evaluated],
        scores,
        color="tab:blue",
        linewidth=2,
        marker="o",
        markersize=3.5,
        zorder=3,
        label="evaluation",
    )
    axes.plot(
        [row[column] / unit for row in rows],
        [row["episode_return"] for row in rows],
        color="tab:blue",
        linewidth=1,
        alpha=0.4,
        label="training episodes: actions are sampled",
    )
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
        self.run_dir, self.save_freq, self.keep, self.keep_stages, self.best = (
            Path(run_dir),
            save_freq,
            keep,
            keep_stages,
            None,
        )

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
            self.prune(
                trainer.update_count,
                {0, math.ceil(tenth / self.save_freq) * self.save_freq} if self.keep_stages else {},
            )

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

        files = filter(
            Path.is_file, self.run_dir.glob("checkpoint_*.pt")
        )  # links to nothing, and directories, are not ours
        files = [f for f in files if f.stem.removeprefix("checkpoint_").isdecimal() and update(f) not in kept]
        for file in sorted(files, key=written, reverse=True)[self.keep :]:
            with contextlib.suppress(OSError):  # one file too many is no reason to stop
                file.unlink()
