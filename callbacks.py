"""Observers of the training: progress, metrics.csv, TensorBoard, the learning curve, checkpoints.

PPO calls every method of every callback, in the order of its list, and nothing here changes the training: no callback
writes to `ppo` or draws a random number. Put `MetricsCSV` before `LearningCurve`, which draws its file, and before
`Checkpoints`, so that a resume point never knows of an update that metrics.csv does not. A full disk costs files, not
the training.
"""

import contextlib
import csv
import io
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from checkpoint import CheckpointError, atomic_write, save_checkpoint

CHARTS = ("lr", "steps_per_second", "train_score")  # the other statistics are losses
EVALUATION = {  # column in metrics.csv: key of an evaluation
    "eval_score": "score", "eval_min": "min", "eval_max": "max", "eval_cleared": "cleared",
    "eval_length": "mean_length", "eval_returned": "returned",
}  # fmt: skip
RANDOM_SCORE, CLEARED_SCORE = 82, 960  # random play; every brick, which a tracker with a one-cell dead zone gets
PLAIN_INTERVAL = 10  # seconds between progress lines where no bar can be drawn


class Callback:
    """Does nothing at any event. They come in this order, but for results that had to be waited for: these come before the
    on_update_end of the update that waits."""

    # fmt: off
    def on_training_start(self, ppo): pass
    def on_rollout_start(self, ppo): pass
    def on_rollout_end(self, ppo): pass
    def on_update_end(self, ppo): pass
    def on_evaluation_end(self, ppo): pass  # of ppo.evaluated, the policy after this update or an earlier one
    def on_training_end(self, ppo): pass  # not after an interruption
    # fmt: on


def say(line):
    """Print a line without tearing a progress bar. Where nobody reads (`| head`) or the disk is full, training goes on."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line)
        sys.stdout.flush()


def duration(seconds):
    """42 -> "42s", 102 -> "1m42s", 7500 -> "2h05m"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def evaluation_line(ppo):
    state, e = ppo.evaluated, ppo.evaluated["evaluation"]
    return (f"{state['global_step']:>11,} steps  {duration(state['seconds']):>6}  score {e['score']:5.1f} "
            f"(min {e['min']:.0f} max {e['max']:.0f})  cleared {e['cleared']}/{e['games']}  "
            f"returned {100 * e['returned']:.0f} %" + ("  best" if ppo.is_best else ""))  # fmt: skip


class ProgressBar(Callback):
    """A bar on a terminal, otherwise a line every few seconds; in both cases a line for each evaluation."""

    def __init__(self, plan=""):
        """plan: a line to print first, on what is about to happen."""
        self.plan = plan

    def on_training_start(self, ppo):
        if self.plan:
            say(self.plan)
        self.first_step, self.first_seconds, self.estimated = ppo.global_step, ppo.seconds, False
        self.said_at, self.bar = ppo.seconds, None
        if sys.stderr.isatty():
            self.bar = tqdm(total=ppo.num_steps, initial=min(ppo.global_step, ppo.num_steps), unit=" steps",
                            unit_scale=True, dynamic_ncols=True)  # fmt: skip

    def on_evaluation_end(self, ppo):
        say(evaluation_line(ppo))
        self.said_at = ppo.seconds
        self.show(ppo)

    def on_update_end(self, ppo):
        train_score = self.train_score(ppo)
        rate = (ppo.global_step - self.first_step) / (ppo.seconds - self.first_seconds)  # of everything
        left = duration(max(ppo.num_steps - ppo.global_step, 0) / rate)
        if not self.estimated:
            say(f"the first update ran at {rate:,.0f} steps/s: about {left} to go")
            self.estimated = True
        self.show(ppo)
        if self.bar is None and ppo.seconds - self.said_at >= PLAIN_INTERVAL:
            say(f"{ppo.global_step:>11,} steps  {duration(ppo.seconds):>6}  in training {train_score}  "
                f"{rate:,.0f} steps/s  {left} left")
            self.said_at = ppo.seconds

    def show(self, ppo):
        if self.bar is not None:
            score = f"{ppo.evaluated['evaluation']['score']:.1f}" if ppo.evaluated else "-"
            self.bar.set_postfix_str(f"score {score}, in training {self.train_score(ppo)}", refresh=False)
            self.bar.update(min(ppo.global_step, ppo.num_steps) - self.bar.n)

    def train_score(self, ppo):
        return f"{ppo.stats['train_score']:.1f}".replace("nan", "-") if ppo.stats else "-"

    def on_training_end(self, ppo):
        if self.bar is not None:
            self.bar.close()
        best = f", best score {ppo.best_score:.1f}" if math.isfinite(ppo.best_score) else ""
        say(f"trained {ppo.global_step:,} steps in {duration(ppo.seconds)}{best}")


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
    """One row per update. A resumed run drops the rows after its checkpoint, and goes on as if never stopped."""

    def __init__(self, path):
        self.path, self.columns = Path(path), None

    def on_update_end(self, ppo):
        row = {"update": ppo.update_count, "global_step": ppo.global_step, "seconds": round(ppo.seconds, 2)}
        row |= ppo.stats | dict.fromkeys(EVALUATION, "")
        with self.going_on(f"row {ppo.update_count}"):
            if self.columns is None:
                old_columns, old_rows = read_metrics(self.path)
                columns = old_columns + [name for name in row if name not in old_columns]
                missing = [""] * (len(columns) - len(old_columns))
                self.write(columns, [old + missing for old in old_rows if int(old[0]) < ppo.update_count])
                self.columns = columns
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def on_evaluation_end(self, ppo):
        update = ppo.evaluated["update_count"]
        with self.going_on(f"the evaluation of row {update}"):
            columns, rows = read_metrics(self.path)
            for row in (row for row in rows if int(row[0]) == update):
                for name, key in EVALUATION.items():
                    row[columns.index(name)] = ppo.evaluated["evaluation"][key]
                self.write(columns, rows)

    def write(self, columns, rows):
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([columns, *rows])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, table.getvalue().encode())

    @contextlib.contextmanager
    def going_on(self, what):
        try:
            yield
        except OSError as error:
            self.columns = None  # the next update starts again, which mends what this one tore
            say(f"warning: {self.path}: {what} not written ({error.strerror}); training goes on")


class TensorBoard(Callback):
    """Event files in the run directory: losses/, charts/ and eval/ over environment steps."""

    def __init__(self, run_dir):
        self.run_dir, self.writer = run_dir, None

    def on_training_start(self, ppo):
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, because the training can do without
        except ImportError:
            say("warning: tensorboard is not installed, so there are no event files (pip install tensorboard)")
            return
        # purge_step hides what an interrupted run logged after the checkpoint that this one goes on from
        purge_step = ppo.global_step + 1 if ppo.global_step else None
        with self.giving_up():
            self.writer = SummaryWriter(self.run_dir, purge_step=purge_step)

    def on_update_end(self, ppo):
        self.add({f"{'charts' if name in CHARTS else 'losses'}/{name}": x for name, x in ppo.stats.items()}, ppo.global_step)

    def on_evaluation_end(self, ppo):
        self.add({f"eval/{name}": x for name, x in ppo.evaluated["evaluation"].items()}, ppo.evaluated["global_step"])

    def on_training_end(self, ppo):
        if self.writer is not None:
            with self.giving_up():
                self.writer.close()

    def add(self, scalars, step):
        if self.writer is not None:
            with self.giving_up():
                for name, value in scalars.items():
                    self.writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def giving_up(self):
        try:
            yield
        except OSError as error:
            self.writer = None  # its thread ends with the first error
            say(f"warning: {self.run_dir}: no more TensorBoard events ({error.strerror}); training goes on")


class LearningCurve(Callback):
    """learning_curve.png, drawn from metrics.csv after each evaluation and at the end."""

    def __init__(self, path, csv_path):
        self.path, self.csv_path = Path(path), csv_path

    def on_evaluation_end(self, ppo):
        self.draw()

    def on_training_end(self, ppo):
        self.draw()

    def draw(self):
        try:
            columns, rows = read_metrics(self.csv_path)
            image = io.BytesIO()
            learning_curve([dict(zip(columns, row)) for row in rows]).savefig(image, format="png", dpi=120)
            atomic_write(self.path, image.getvalue())
        except OSError as error:
            say(f"warning: {self.path}: not drawn ({error.strerror}); training goes on")


def learning_curve(rows):
    """Rows of metrics.csv (dicts of str) -> a Figure: scores over steps, and over minutes."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")  # no pyplot: it keeps global state and may want a screen
    left, right = figure.subplots(1, 2, sharey=True)
    long_run = any(int(row["global_step"]) >= 1_000_000 for row in rows)
    unit, name = (1e6, "million") if long_run else (1e3, "thousand")
    draw_scores(left, rows, "global_step", unit, f"{name} environment steps")
    draw_scores(right, rows, "seconds", 60, "minutes")
    left.set(ylabel="points per game", ylim=(0, 1000), yticks=range(0, 1001, 200))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_scores(axes, rows, column, unit, label):
    """The scores of `rows` over `column` / `unit`, between the two yardsticks."""
    evaluated = [row for row in rows if row["eval_score"]]
    axes.axhline(CLEARED_SCORE, color="tab:green", linestyle="--", linewidth=1.2,
                 label=f"the whole wall, as a simple tracker plays it: {CLEARED_SCORE}")  # fmt: skip
    axes.axhline(RANDOM_SCORE, color="gray", linestyle=":", linewidth=1.5, label=f"random play: {RANDOM_SCORE}")
    axes.plot([float(row[column]) / unit for row in evaluated], [float(row["eval_score"]) for row in evaluated],
              color="tab:blue", linewidth=2, marker="o", markersize=3.5, zorder=3,
              label="exact greedy score: the mean of all games")  # fmt: skip
    axes.plot([float(row[column]) / unit for row in rows], [float(row["train_score"] or "nan") for row in rows],
              color="tab:blue", linewidth=1, alpha=0.4, label="training games: actions are sampled")  # fmt: skip
    axes.set(xlabel=label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


class Checkpoints(Callback):
    """last.pt and the newest few checkpoint_<update>.pt to resume from, best_model.pt to play."""

    def __init__(self, run_dir, save_freq, keep=3):
        """save_freq: updates between two checkpoints. keep: how many checkpoint_<update>.pt stay."""
        self.run_dir, self.save_freq, self.keep, self.best = Path(run_dir), save_freq, keep, None

    def on_training_start(self, ppo):
        if ppo.update_count == 0:
            self.save("last.pt", ppo.state_dict())  # a kill before the first checkpoint leaves something to resume

    def on_evaluation_end(self, ppo):
        if ppo.is_best:
            self.best = ppo.evaluated
        self.save_best()

    def save_best(self):
        if self.best and self.save("best_model.pt", self.best):  # else again after the next update
            self.best = None

    def on_update_end(self, ppo):
        self.save_best()
        if ppo.update_count % self.save_freq == 0:
            state = ppo.state_dict()
            self.save("last.pt", state)
            self.save(f"checkpoint_{ppo.update_count}.pt", state)
            self.prune()

    def on_training_end(self, ppo):
        """Raises CheckpointError if the result of the training cannot be saved."""
        self.save_best()
        save_checkpoint(self.run_dir / "last.pt", ppo.state_dict())

    def save(self, name, state):
        """-> whether it worked."""
        try:
            save_checkpoint(self.run_dir / name, state)
            return True
        except CheckpointError as error:
            say(f"warning: {error}; training goes on")
            return False

    def prune(self):
        """Delete all but the newest. By time, not by number: higher numbers may be left from before a resume."""
        def written(file):
            return file.stat().st_mtime_ns, int(file.stem.removeprefix("checkpoint_"))

        files = [f for f in self.run_dir.glob("checkpoint_*.pt") if f.stem.removeprefix("checkpoint_").isdecimal()]
        for file in sorted(files, key=written, reverse=True)[self.keep :]:
            with contextlib.suppress(OSError):  # one file too many is no reason to stop
                file.unlink()
