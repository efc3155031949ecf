"""Watches a training: evaluation, progress, metrics.csv, TensorBoard, W&B, the learning curve, checkpoints.

A `Trainer` (trainer.py) tells its callbacks of each event, in the order of its list, and `train` (harness/supervise.py)
closes them at the end. No callback changes what is learned. An error in one that only draws, logs or prints becomes a
warning, and so does a checkpoint that cannot be saved, except at the end. Other errors end the training.

The order of the list matters. `Evaluation` comes before the callbacks that report, so that they hear of a result before
they hear of the update that waited for it. `MetricsCSV` comes before `LearningCurve`, which draws its file, and before
`Checkpoints`, so that a run is never resumed from an update that metrics.csv does not have.
"""

import contextlib
import io
import math
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from harness.background import Background, CannotStart
from harness.checkpoint import BEST, LAST, STAGE, SUFFIX, CheckpointError, save_checkpoint
from harness.device import unavailable
from harness.figures import learning_curve
from harness.files import atomic_write
from harness.lines import columns, fitted, format_count, format_duration, format_rate, format_score
from harness.messages import one_line, say
from harness.metrics_file import MetricsFile, read_metrics
from harness.options import CommandLineError
from harness.runs import is_replaced, locked, write_config
from harness.supervise import StopTraining

# What TensorBoard calls a statistic; one that is not here is a loss, and stands under losses/ with its own name.
TENSORBOARD_NAMES = {
    "lr": "charts/learning_rate",
    "steps_per_second": "charts/SPS",
    "episode_return": "charts/episodic_return",
    "episodes": "charts/episodes",
    "epsilon": "charts/epsilon",
    "replay": "charts/replay_size",
    "answer_tokens": "charts/answer_tokens",
    "cut_off": "charts/cut_off",
    "distinct_answers": "charts/distinct_answers",
    "max_reward": "charts/max_reward",
    "reward_std": "charts/reward_std",
    "entropy": "policy/entropy",
    "approx_kl": "policy/approx_kl",
    "approx_kl_max": "policy/approx_kl_max",
    "clipfrac": "policy/clipfrac",
    "kl_reference": "policy/kl_reference",
    "logprob_gap": "policy/logprob_gap",
    "logprob_gap_max": "policy/logprob_gap_max",
    "value": "value/mean",
    "explained_variance": "value/explained_variance",
    "pair_correlation": "value/pair_correlation",
}
PLAIN_INTERVAL = 10  # seconds between progress lines where no bar can be drawn
REDRAW_INTERVAL = 0.1  # seconds between two drawings of the bar, at least
SHORTEST_BAR = 18  # characters that remain for the percentage and the bar itself
STAGES = (0, 1, 3, 10, 30)  # percent of the steps after which `Checkpoints` keeps what a training has learned


class Callback:
    """Ignores every event; a subclass overrides the methods of those that it needs."""

    cost = ""  # the warning's words for what is lost if it fails; "" if a failure ends the training
    printed = ()  # the warnings so far

    def hear(self, event, *arguments):
        """Call the method with the event's name. If it fails, warn once for each reason, or raise without a `cost`."""
        try:
            getattr(self, event)(*arguments)
        except BaseException as error:
            if not self.cost or isinstance(error, (StopTraining, KeyboardInterrupt)):
                raise
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {one_line(error)}"
            warning = f"warning: {self.cost} ({reason}); training goes on"
            if warning not in self.printed:
                say(warning)
                self.printed += (warning,)

    def on_training_start(self, trainer):
        pass

    def on_rollout_start(self, trainer):
        """An update begins to play its games; trainings without rollouts, such as DQN, do not say so.

        On a GPU the first update plays some rollouts more than once, to check itself.
        """

    def on_rollout_end(self, trainer):
        """The games of an update are played, and it begins to learn from them."""

    def on_progress(self, trainer):
        """`trainer.doing`, `trainer.unfinished_steps` and `trainer.prepared` say how far the current update is."""

    def on_update_end(self, trainer):
        pass

    def on_evaluation_end(self, trainer):
        """`trainer.evaluated` is new; it may be the policy of an earlier update."""

    def on_training_end(self, trainer):
        """The training has done all its steps. This event does not come if it is interrupted."""

    def close(self):
        """The training has ended in whatever way. This event is always the last."""


class RunDirectory(Callback):
    """Makes a run's directory and its config.json anew if somebody has moved them, so that the run can be resumed.

    If something else has taken the directory's place, the training ends. This callback is the first, because the others
    write files there.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.lock = contextlib.ExitStack()

    def ensure(self, trainer):
        if is_replaced(self.path, trainer):
            raise CheckpointError(f"something else is at {self.path} now, which was the directory of this run")
        if (self.path / "config.json").exists():
            return
        say(f"warning: {self.path} was renamed or removed, or its config.json; it is made anew, and training goes on")
        with contextlib.suppress(OSError):  # `Checkpoints` says what cannot be saved
            write_config(self.path, trainer)
        with contextlib.suppress(CommandLineError):  # still locked, if only config.json was removed
            self.lock.enter_context(locked(self.path))

    def close(self):
        self.lock.close()

    on_update_end = on_evaluation_end = on_training_end = ensure


class Evaluation(Callback):
    """Evaluates the policy in another process while training goes on, every `interval` updates and after the last.

    When one is due while `processes` are running, training waits for the oldest. If no other process can be started, or
    it lacks memory, or may not share the GPU, training and evaluation take turns in this process.

    `trainer.pending` has the policy state for each of `self.futures`, so an evaluation that a stop interrupts is
    started again when the run is resumed.

    Args:
        evaluate: a function that can be imported; it takes a policy state and returns a dict of numbers with a "score".
        interval: updates between two evaluations, at least 1.
        processes: how many evaluations may run at once.
    """

    def __init__(self, evaluate, interval, processes=1):
        self.background = Background(evaluate, processes)
        self.evaluate = evaluate
        self.interval = interval
        self.futures = deque()
        self.take_turns = False

    def on_training_start(self, trainer):
        for state in trainer.pending[len(self.futures) :]:  # a resumed run was stopped during these evaluations
            self.start(state)

    def on_update_end(self, trainer):
        self.report_finished(trainer)
        if trainer.update_count % self.interval == 0 or trainer.global_step >= trainer.num_steps:
            self.wait_until_running(self.background.processes - 1, trainer)
            trainer.pending.append(trainer.policy_state())
            self.start(trainer.pending[-1])

    def on_training_end(self, trainer):
        self.wait_until_running(0, trainer)

    def close(self):
        self.background.close()

    def wait_until_running(self, number, trainer):
        """Wait until at most this number of evaluations are still running."""
        self.report_finished(trainer)
        while len(self.futures) > number:
            trainer.check_stop()
            time.sleep(0.02)
            self.report_finished(trainer)

    def report_finished(self, trainer):
        """Give the trainer the results that are there, in the order in which the evaluations were started."""
        while self.futures and self.futures[0].done():
            evaluation = self.result(self.futures[0], trainer.pending[0])
            self.futures.popleft()
            trainer.evaluation_end(trainer.pending.pop(0), evaluation)

    def result(self, future, state):
        """Return the result of a finished evaluation. If it lacked a process, memory or the GPU, evaluate here."""
        try:
            return future.result()
        except Exception as error:
            if not (unavailable(error) or isinstance(error, CannotStart)):
                raise
            if not self.take_turns:
                say(f"warning: no evaluation beside the training ({one_line(error)}); from now on they take turns")
            self.take_turns = True
            return self.evaluate(state)

    def start(self, state):
        if self.take_turns:
            future = Future()
            future.set_result(self.evaluate(state))
        else:
            future = self.background.submit(state)
        self.futures.append(future)


class ProgressBar(Callback):
    """Prints a line for each evaluation. Between them it shows a bar on a terminal, and elsewhere prints more lines.

    On a terminal every line fits its width, so what comes last in a line may be left out. While a training prepares,
    the bar shows how much of that is done.

    Args:
        plan: text to print first, about what is going to happen.
        estimate: a function that returns a line on how long that will take; it is called after `plan` is printed.
        metrics: the results of an evaluation to print beside the score, in this order; by default all.
        endings: {label: text} to print below the last line: what was written, and what to do next.
        first_is_slow: the first update has to compile, so its rate says nothing about the rest.
    """

    cost = "the progress is not shown"

    def __init__(self, plan="", estimate=None, metrics=None, endings=None, first_is_slow=False):
        self.plan = plan
        self.estimate = estimate
        self.metrics = metrics
        self.endings = endings or {}
        self.first_is_slow = first_is_slow
        self.bar = None

    def on_training_start(self, trainer):
        if self.plan:
            say(self.plan)
        if trainer.update_count > 0:
            steps = f"{trainer.global_step:,} of {trainer.total_steps:,} steps"
            say(f"resumed after {steps} and {format_duration(trainer.seconds)}{best_of(trainer)}")
        try:
            if self.estimate and (line := self.estimate()):
                say(line)
        finally:  # without an estimate the rest goes on
            self.begin(trainer)

    def begin(self, trainer):
        """Start the bar, and measure from here on."""
        self.best_score = trainer.best_score
        self.measure_from_here(trainer)
        self.printed_at = self.update_began_at = trainer.seconds
        self.drawn_at = -math.inf
        if sys.stderr.isatty():
            shape = {"bar_format": "{percentage:3.0f}%|{bar}| {desc}", "ncols": self.bar_width()}
            self.bar = tqdm(total=trainer.total_steps, initial=trainer.global_step, **shape)
            self.update_bar(trainer)

    def on_evaluation_end(self, trainer):
        state = trainer.evaluated
        evaluation = state["evaluation"]
        # The first evaluation is always the best so far, which means nothing yet.
        gained = trainer.is_best and math.isfinite(self.best_score)
        self.best_score = trainer.best_score
        pieces = [
            self.beginning(state["global_step"], state["seconds"]),
            f"score {format_score(evaluation['score']):>5}",
            "best" if gained else "    ",
        ]
        names = self.metrics or [name for name in evaluation if name != "score"]
        pieces += [f"{name} {evaluation[name]:.4g}" for name in names]
        say(fitted(pieces, columns(sys.stdout)).rstrip())
        self.printed_at = trainer.seconds
        self.update_bar(trainer)

    def on_progress(self, trainer):
        if trainer.prepared is not None:
            self.measure_from_here(trainer)  # the rate is that of the steps that count
        self.update_bar(trainer)
        self.print_progress(trainer)

    def on_update_end(self, trainer):
        self.update_bar(trainer)
        if self.first_is_slow:
            say(f"the first update took {format_duration(trainer.seconds - self.measured_from_seconds)}")
            self.first_is_slow = False
            self.measure_from_here(trainer)
        else:
            self.print_progress(trainer)
        self.update_began_at = trainer.seconds

    def on_training_end(self, trainer):
        if self.bar is not None:
            self.bar.close()
        say(f"trained {trainer.global_step:,} steps in {format_duration(trainer.seconds)}{best_of(trainer)}")
        label_width = max(map(len, self.endings), default=0) + 2
        for label, text in self.endings.items():
            line = f"  {label + ':':{label_width}}{text}"
            too_long = len(line) > (columns(sys.stdout) or math.inf)
            say(f"  {label}:\n  {text}" if too_long else line)  # so that most commands can be copied as one line

    def close(self):
        if self.bar is not None:
            self.bar.leave = False  # after an interruption, whose message is already below the bar
            self.bar.close()

    def measure_from_here(self, trainer):
        """Let the rate and the time that is left follow from the updates after this one."""
        self.measured_from_step = trainer.global_step
        self.measured_from_seconds = trainer.seconds

    def print_progress(self, trainer):
        """Print a line where no bar can be drawn, if the last line is some seconds old."""
        if self.bar is None and trainer.seconds - self.printed_at >= PLAIN_INTERVAL:
            beginning = self.beginning(trainer.global_step, trainer.seconds)
            say("  ".join(filter(None, [beginning, in_training(trainer), *self.pace(trainer), self.doing(trainer)])))
            self.printed_at = trainer.seconds

    def update_bar(self, trainer):
        if self.bar is None:
            return
        position = trainer.global_step + trainer.unfinished_steps
        self.bar.total = max(self.bar.total, position)  # the last update of some trainings goes beyond
        self.bar.n = position if trainer.prepared is None else trainer.prepared * self.bar.total
        now = time.monotonic()
        if now - self.drawn_at < REDRAW_INTERVAL and position < self.bar.total:
            return
        self.drawn_at = now
        rate, left = self.pace(trainer)
        pieces = [
            f"{format_count(position)}/{format_count(self.bar.total)}",
            format_duration(trainer.seconds),
            left,
            self.doing(trainer),
            *self.scores(trainer),
            in_training(trainer),
            rate,
        ]
        if trainer.prepared is not None:
            pieces = [trainer.doing, format_duration(trainer.seconds)]
        self.bar.ncols = self.bar_width()
        self.bar.set_description_str(fitted(pieces, self.bar.ncols - SHORTEST_BAR), refresh=False)
        self.bar.refresh()

    def bar_width(self):
        """Return how wide the bar may be: the terminal shows ^C behind it when somebody presses Ctrl-C."""
        return (columns(sys.stderr) or 80) - 2

    def beginning(self, step, seconds):
        """Return the beginning of a line."""
        return f"{step:>11,} steps  {format_duration(seconds):>6}"

    def pace(self, trainer):
        """Return how many steps are done in a second, and the time that is left at this rate; as text, if known."""
        position = trainer.global_step + trainer.unfinished_steps
        elapsed = trainer.seconds - self.measured_from_seconds  # including callbacks and waiting
        done = position - self.measured_from_step
        if done <= 0 or elapsed <= 0 or self.first_is_slow:
            return "", ""
        left = max(trainer.total_steps - position, 0) * elapsed / done
        return format_rate(done / elapsed), f"{format_duration(left)} left"

    def doing(self, trainer):
        """Return what the current update does if it takes long, otherwise "": nobody could read it."""
        return trainer.doing if trainer.seconds - self.update_began_at > 2 else ""

    def scores(self, trainer):
        """Return the last and the best score as text, if there are any. The best one is left out if it is the last."""
        if not trainer.evaluated:
            return []
        last = trainer.evaluated["evaluation"]["score"]
        best = f"best {format_score(self.best_score)}" if self.best_score > last else ""
        return [f"score {format_score(last)}", best]


def best_of(trainer):
    """Return the best score as the end of a line, or "" before the first evaluation."""
    return f", best score {format_score(trainer.best_score)}" if math.isfinite(trainer.best_score) else ""


def in_training(trainer):
    """Return the mean return of the last training episodes as text, or "" before the first one has ended."""
    score = trainer.stats.get("episode_return", math.nan)
    return "" if math.isnan(score) else f"in training {format_score(score)}"


class MetricsCSV(Callback):
    """Writes a row for each update, and the results of an evaluation into the row of the update that was evaluated.

    A resumed run drops the rows after its checkpoint, and goes on as if it had never stopped.

    Args:
        evaluation: names of the results of an evaluation that get a column, `eval_<name>`.
    """

    def __init__(self, path, evaluation=("score",)):
        self.path = path
        self.evaluation = evaluation
        self.cost = f"{path}: not written"
        self.file = None

    def on_training_start(self, trainer):
        if self.file is None:  # a training that goes on in the same process keeps its rows
            self.file = MetricsFile(self.path, trainer.update_count)

    def on_update_end(self, trainer):
        row = {"update": trainer.update_count, "global_step": trainer.global_step, "seconds": round(trainer.seconds, 2)}
        self.file.add(row | trainer.stats | {f"eval_{name}": "" for name in self.evaluation})

    def on_evaluation_end(self, trainer):
        evaluation = trainer.evaluated["evaluation"]
        columns = {f"eval_{name}": evaluation[name] for name in self.evaluation}
        self.file.change(trainer.evaluated["update_count"], columns)


def tensorboard_name(name):
    """Return what TensorBoard and Weights & Biases call a statistic."""
    return TENSORBOARD_NAMES.get(name, f"losses/{name}")


class TensorBoard(Callback):
    """Writes event files into the run directory: losses, policy, value, charts and eval over environment steps."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.writer = None
        self.excepthook = threading.excepthook
        self.steps_evaluated = set()  # evaluations that were logged before the run was resumed
        self.cost = f"{run_dir}: no more TensorBoard events"

    def on_training_start(self, trainer):
        from torch.utils.tensorboard import SummaryWriter  # here, because a training runs without it too

        threading.excepthook = self.ignore_writer_thread
        # A resumed run repeats the updates after its checkpoint: purge_step hides what was logged of them before.
        self.writer = SummaryWriter(self.run_dir, purge_step=trainer.global_step + 1)
        # It also repeats evaluations that its checkpoint waited for. metrics.csv says whose results had come since.
        for row in read_metrics(Path(self.run_dir, "metrics.csv")):
            if row["global_step"] <= trainer.global_step and math.isfinite(row["eval_score"]):
                self.steps_evaluated.add(row["global_step"])

    def on_update_end(self, trainer):
        for name, value in trainer.stats.items():
            self.add(tensorboard_name(name), value, trainer.global_step)

    def on_evaluation_end(self, trainer):
        step = trainer.evaluated["global_step"]
        if step not in self.steps_evaluated:
            for name, value in trainer.evaluated["evaluation"].items():
                self.add(f"eval/{name}", value, step)

    def add(self, name, value, step):
        if self.writer is not None:  # otherwise a warning has said that it could not be made
            self.writer.add_scalar(name, value, step)

    def ignore_writer_thread(self, args):
        """Print no traceback if the writer's thread fails, because the writer's next call raises the same error."""
        if "tensorboard" not in type(args.thread).__module__:
            self.excepthook(args)

    def close(self):
        threading.excepthook = self.excepthook
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases(Callback):
    """Sends the columns of metrics.csv to a project of wandb.ai, with TensorBoard's names, over environment steps.

    A resumed run goes on there as the same run, because both have one number.
    """

    cost = "no more goes to Weights & Biases"

    def __init__(self, project, run_dir):
        self.project = project
        self.run_dir = Path(run_dir)
        self.run = None

    def on_training_start(self, trainer):
        import wandb  # here, because a training runs without it too

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; by default it would wait for a network for ever
        self.run = wandb.init(
            project=self.project,
            id=trainer.metadata["run_id"],
            resume="allow",
            name=self.run_dir.name,
            dir=self.run_dir,
            config=trainer.metadata["constants"],
            settings={"console": "off", "quiet": True, "init_timeout": 30},
        )
        # W&B's own step may not go back, as it would for the evaluation of an earlier update.
        self.run.define_metric("*", step_metric="global_step")

    def on_update_end(self, trainer):
        stats = {tensorboard_name(name): value for name, value in trainer.stats.items()}
        self.log(trainer.global_step, {"update": trainer.update_count, "seconds": trainer.seconds} | stats)

    def on_evaluation_end(self, trainer):
        evaluation = trainer.evaluated["evaluation"]
        self.log(trainer.evaluated["global_step"], {f"eval/{name}": value for name, value in evaluation.items()})

    def log(self, step, values):
        if self.run is not None:  # otherwise a warning has said that it could not be made
            self.run.log({"global_step": step} | values)

    def close(self):
        if self.run is not None:
            self.run.finish()


class LearningCurve(Callback):
    """Draws learning_curve.png from metrics.csv after evaluations, for at most 5 % of the time, and at the end.

    Args:
        levels: {label: score}, lines to compare with.
    """

    def __init__(self, path, csv_path, levels=None):
        self.path = Path(path)
        self.csv_path = csv_path
        self.levels = levels or {}
        self.next_at = -math.inf
        self.out_of_date = False
        self.cost = f"{path}: not drawn"

    def on_update_end(self, trainer):
        self.out_of_date = True

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
        start = time.monotonic()
        self.out_of_date = False
        try:
            image = io.BytesIO()
            learning_curve(read_metrics(self.csv_path), self.levels).savefig(image, format="png", dpi=120)
            atomic_write(self.path, image.getvalue())
        finally:
            end = time.monotonic()
            self.next_at = end + 20 * (end - start)  # on a GPU, evaluations come faster than curves can be drawn


class Checkpoints(Callback):
    """Saves `last` and the newest few `checkpoint_<update>` to resume from, and `best_model` to play.

    Args:
        save_freq: updates between two checkpoints.
        keep: how many of `checkpoint_<update>` stay.
        keep_stages: save also `stage_<environment steps>` at each of STAGES, to show how the policy came about. Such a
            file holds the weights alone, in float16, and can only be played.
    """

    def __init__(self, run_dir, save_freq, keep=3, keep_stages=False):
        self.run_dir = Path(run_dir)
        self.save_freq = save_freq
        self.keep = keep
        self.keep_stages = keep_stages
        self.unsaved_best = None  # the best policy state, until it is saved
        self.newest_stage = -1  # the environment steps of the last one that was saved, if any was

    def on_training_start(self, trainer):
        if trainer.update_count == 0:
            self.save(LAST, trainer.snapshot)  # a run that is killed early can be resumed too
        if self.keep_stages:
            self.find_stages(trainer.global_step)
            self.save_stage(trainer)

    def on_evaluation_end(self, trainer):
        if trainer.is_best:
            self.unsaved_best = trainer.evaluated
        self.save_best()

    def on_update_end(self, trainer):
        self.save_best()
        if self.keep_stages:
            self.save_stage(trainer)
        if trainer.update_count % self.save_freq == 0:
            trainer.keep_snapshot()
            self.save(LAST, trainer.snapshot)
            self.save(f"checkpoint_{trainer.update_count}{SUFFIX}", trainer.snapshot)
            self.delete_old(trainer)

    def on_training_end(self, trainer):
        """Save the result of the training. Raises CheckpointError if that is impossible."""
        self.save_best()
        trainer.keep_snapshot()
        save_checkpoint(self.run_dir / LAST, trainer.snapshot)

    def save_best(self):
        if self.unsaved_best and self.save(BEST, self.unsaved_best):
            self.unsaved_best = None  # otherwise the next update tries again

    def save(self, name, state):
        """Save a checkpoint, or print a warning. Returns whether it worked."""
        try:
            save_checkpoint(self.run_dir / name, state)
            return True
        except CheckpointError as error:
            say(f"warning: {error}; training goes on")
            return False

    def delete_old(self, trainer):
        """Delete all of `checkpoint_<update>` up to this update, except the newest.

        Higher numbers may be left from before a resume. They are deleted once the training has reached them again.
        """
        old = {}
        for file in self.run_dir.glob(f"checkpoint_*{SUFFIX}"):
            number = file.stem.removeprefix("checkpoint_")
            if number.isdecimal() and int(number) <= trainer.update_count:
                old[int(number)] = file
        for update in sorted(old)[: -self.keep]:
            with contextlib.suppress(OSError):  # one file too many is no reason to stop
                old[update].unlink()

    def find_stages(self, steps):
        """Find the newest stage up to these environment steps, after which the training begins or goes on.

        Later ones are deleted, because the training takes those steps again, and perhaps in another way.
        """
        self.newest_stage = -1
        for file in self.run_dir.glob(f"{STAGE}*{SUFFIX}"):
            number = file.stem.removeprefix(STAGE)
            if number.isdecimal() and int(number) <= steps:
                self.newest_stage = max(self.newest_stage, int(number))
            elif number.isdecimal():
                with contextlib.suppress(OSError):  # one file too many is no reason to stop
                    file.unlink()

    def save_stage(self, trainer):
        """Save the policy as a stage if one of STAGES has passed since the newest stage.

        So a stage that the disk refused comes one update later, and several of STAGES in one update give one file. In a
        run that is resumed with more steps, the policy with which it goes on makes up for those that it passed before.
        """
        steps = trainer.global_step
        passed = max(percent for percent in STAGES if percent * trainer.num_steps <= 100 * steps)
        if 100 * self.newest_stage >= passed * trainer.num_steps:
            return
        state = trainer.policy_state()
        state["model"] = {name: weights.half() for name, weights in state["model"].items()}
        if self.save(f"{STAGE}{steps}{SUFFIX}", state):
            self.newest_stage = steps
