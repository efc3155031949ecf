import contextlib
import errno
import io
import math
import os
import random
import struct
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_trainer import EVALUATED, SCORES, STATS, FakeTrainer, FakeWandb, disk_full, table
from helpers import needs_posix
from matplotlib.figure import Figure

import callbacks
from callbacks import (
    Callback,
    Checkpoints,
    Evaluation,
    LearningCurve,
    MetricsCSV,
    ProgressBar,
    TensorBoard,
    WeightsAndBiases,
    tensorboard_name,
)
from harness.background import CannotStart
from harness.checkpoint import CheckpointError, load_checkpoint
from harness.metrics_file import read_metrics
from harness.supervise import StopTraining

LEVELS = {"the best": 960, "random play": 82}


def all_callbacks(run_dir):
    csv = run_dir / "metrics.csv"
    return [
        ProgressBar(),
        MetricsCSV(csv, EVALUATED),
        TensorBoard(run_dir),
        LearningCurve(run_dir / "learning_curve.png", csv, LEVELS),
        Checkpoints(run_dir, save_freq=3),
    ]


# --- evaluation -------------------------------------------------------------------------------------------------------


class Futures:
    """Stands in for Background; the test sets the results."""

    def __init__(self, evaluate, processes):
        self.processes = processes
        self.asked = []
        self.exits = 0

    def submit(self, state):
        self.asked.append((state, Future()))
        return self.asked[-1][1]

    def close(self):
        self.exits += 1


class Trainer:
    """Has as much of a trainer as `Evaluation` needs; `update()` is one update."""

    def __init__(self, evaluation, num_updates=5):
        self.callback = evaluation
        self.pending = []
        self.ends = []
        self.stopped = False
        self.update_count = self.global_step = 0
        self.num_steps = num_updates
        evaluation.on_training_start(self)

    def update(self):
        self.update_count = self.global_step = self.update_count + 1
        self.callback.on_update_end(self)

    def policy_state(self):
        return {"update_count": self.update_count}

    def evaluation_end(self, state, evaluation):
        self.ends.append((self.update_count, state["update_count"], evaluation["score"]))

    def check_stop(self):
        if self.stopped:
            raise KeyboardInterrupt

    def under_way(self):
        return [state["update_count"] for state in self.pending]


@pytest.fixture
def waits(monkeypatch):
    """Let each wait bring the next result, with its update as the score. Returns the list of waits."""
    monkeypatch.setattr(callbacks, "Background", Futures)
    waited = []

    def give(seconds):
        waited.append(seconds)
        state, future = next((state, future) for state, future in evaluations[-1].background.asked if not future.done())
        future.set_result({"score": state["update_count"]})

    # Not time.sleep itself, which other threads call too.
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(sleep=give))
    evaluations = []
    init = Evaluation.__init__

    def recorded_init(self, *args):
        init(self, *args)
        evaluations.append(self)

    monkeypatch.setattr(Evaluation, "__init__", recorded_init)
    return waited


def test_training_goes_on_while_it_is_evaluated(waits):
    """Training waits for a result only when the next evaluation is due; the last update is always evaluated."""
    evaluation = Evaluation(None, 2)
    trainer = Trainer(evaluation)
    under_way = []
    for _ in range(5):
        trainer.update()
        under_way.append(trainer.under_way())
    assert under_way == [[], [2], [2], [4], [5]] and trainer.ends == [(4, 2, 2), (5, 4, 4)]
    evaluation.on_training_end(trainer)
    assert trainer.ends[2:] == [(5, 5, 5)] and trainer.pending == [] and len(waits) == 3


def test_several_evaluations_at_once_end_in_order(waits):
    """A result that comes early is reported only after those of earlier evaluations."""
    evaluation = Evaluation(None, 1, 2)
    trainer = Trainer(evaluation)
    under_way = []
    for _ in range(5):
        trainer.update()
        under_way.append(trainer.under_way())
        if trainer.update_count == 2:
            evaluation.background.asked[1][1].set_result({"score": 2})  # before the first
    assert under_way == [[1], [1, 2], [3], [3, 4], [4, 5]]
    assert trainer.ends == [(3, 1, 1), (3, 2, 2), (5, 3, 3)]


def test_a_result_that_is_there_is_taken_without_waiting(waits):
    """The next update reports it, although no evaluation is due."""
    evaluation = Evaluation(None, 2)
    trainer = Trainer(evaluation)
    trainer.update()
    trainer.update()
    evaluation.background.asked[0][1].set_result({"score": 7})
    trainer.update()
    assert trainer.ends == [(3, 2, 7)] and not waits


def test_what_was_being_evaluated_is_evaluated_again_in_a_resumed_run(waits):
    """A stop lost these results, so `pending` has their policy states."""
    evaluation = Evaluation(None, 2)
    trainer = Trainer(evaluation, 6)
    trainer.pending = [{"update_count": 2}, {"update_count": 4}]  # of more processes than there are now
    trainer.update_count = trainer.global_step = 5
    evaluation.on_training_start(trainer)
    trainer.update()
    evaluation.on_training_end(trainer)
    assert trainer.ends == [(6, 2, 2), (6, 4, 4), (6, 6, 6)]


def test_a_stop_while_waiting_loses_no_evaluation(waits):
    """It stays pending, and goes on if the same program trains further."""
    evaluation = Evaluation(None, 1)
    trainer = Trainer(evaluation)
    trainer.update()
    trainer.stopped = True
    with pytest.raises(KeyboardInterrupt):
        trainer.update()
    assert trainer.under_way() == [1] and trainer.ends == []
    trainer.stopped = False  # the training goes on in the same program
    evaluation.on_training_start(trainer)
    evaluation.on_training_end(trainer)
    assert trainer.ends == [(2, 1, 1)] and len(evaluation.background.asked) == 1


def test_an_evaluation_that_fails_stays_under_way(waits):
    """The training ends with its error, and a resumed run evaluates the policy again."""
    with contextlib.closing(Evaluation(None, 1)) as evaluation:
        trainer = Trainer(evaluation)
        trainer.update()
        evaluation.background.asked[0][1].set_exception(ChildProcessError("died"))
        with pytest.raises(ChildProcessError):
            trainer.update()
        assert trainer.under_way() == [1]
    assert evaluation.background.exits == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: device busy\nmore"),
        CannotStart("no other process"),
    ],
)
def test_where_another_process_cannot_evaluate_they_take_turns(waits, capsys, error):
    """One warning says so, and no process is asked again."""
    evaluation = Evaluation(lambda state: {"score": 10 * state["update_count"]}, 2)
    trainer = Trainer(evaluation, 6)
    trainer.update()
    trainer.update()
    evaluation.background.asked[0][1].set_exception(error)
    for _ in range(4):
        trainer.update()
    evaluation.on_training_end(trainer)
    assert trainer.ends == [(3, 2, 20), (5, 4, 40), (6, 6, 60)] and len(evaluation.background.asked) == 1 and not waits
    first_line = str(error).splitlines()[0]
    assert (
        capsys.readouterr().out
        == f"warning: no evaluation beside the training ({first_line}); from now on they take turns\n"
    )


def test_of_several_that_cannot_each_is_evaluated_here(waits, capsys):
    """Every evaluation that was under way is done again, after a single warning."""
    evaluation = Evaluation(lambda state: {"score": 10 * state["update_count"]}, 1, 2)
    trainer = Trainer(evaluation)
    trainer.update()
    trainer.update()
    for _, future in evaluation.background.asked:
        future.set_exception(torch.OutOfMemoryError("CUDA out of memory"))
    trainer.update()
    evaluation.on_training_end(trainer)
    assert trainer.ends == [(3, 1, 10), (3, 2, 20), (3, 3, 30)] and capsys.readouterr().out.count("warning") == 1


# --- all of them ------------------------------------------------------------------------------------------------------


def test_callbacks_do_not_touch_the_training(tmp_path):
    """Neither random numbers nor the trainer's state depend on the callbacks."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    watched = FakeTrainer(all_callbacks(tmp_path)).learn()
    alone = FakeTrainer([Callback()]).learn()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    watched.callbacks = alone.callbacks
    watched.snapshot = alone.snapshot
    assert watched.evaluated.pop("model").keys() == alone.evaluated.pop("model").keys()
    assert vars(watched) == vars(alone)


def test_files_of_a_run(tmp_path):
    """A run leaves these files."""
    FakeTrainer(all_callbacks(tmp_path)).learn()
    names = {name for name in os.listdir(tmp_path) if not name.startswith("events")}
    assert names == {
        "metrics.csv",
        "learning_curve.png",
        "best_model.safetensors",
        "last.safetensors",
        "checkpoint_3.safetensors",
        "checkpoint_6.safetensors",
    }


def test_a_full_disk_during_training_costs_files_only(tmp_path, monkeypatch, capsys):
    """Every file that is lost has a warning, but without the last checkpoint the training fails."""
    ppo = FakeTrainer(all_callbacks(tmp_path))
    monkeypatch.setattr(os, "replace", disk_full)
    ppo.learn(until=8)
    out = capsys.readouterr().out
    for name in ("metrics.csv", "learning_curve.png", "last.safetensors", "best_model.safetensors"):
        lines = [line for line in out.splitlines() if name in line]
        assert lines and all("No space left" in line and "training goes on" in line for line in lines)
    for name, cost in (
        ("metrics.csv", "not written"),
        ("learning_curve.png", "not drawn"),
        ("last.safetensors", "not saved"),
    ):
        assert f"{name}: {cost} (No space left" in out
    with pytest.raises(CheckpointError, match="No space left"):
        ppo.emit("on_training_end")


@pytest.mark.parametrize(
    "event",
    [
        "on_training_start",
        "on_rollout_start",
        "on_rollout_end",
        "on_update_end",
        "on_evaluation_end",
        "on_training_end",
        "close",
    ],
)
def test_what_only_draws_or_logs_ends_no_training(tmp_path, monkeypatch, capsys, event):
    """Whatever a callback raises, there is one warning for each reason, and the other callbacks hear all events."""

    class Panic(BaseException):
        """An error like those of libraries in Rust, which is no Exception."""

    def broken(*args):
        raise Panic("initialization of _pywrap failed\nwithout raising an exception")

    watching = [callback for callback in all_callbacks(tmp_path) if callback.cost]
    assert [type(callback) for callback in watching] == [ProgressBar, MetricsCSV, TensorBoard, LearningCurve]
    for callback in watching:
        monkeypatch.setattr(callback, event, broken)
    FakeTrainer([*watching, Checkpoints(tmp_path, save_freq=3)]).learn()
    assert updates(tmp_path)["best_model.safetensors"] == updates(tmp_path)["last.safetensors"] == 8
    out = capsys.readouterr().out
    for callback in watching:
        reason = "Panic: initialization of _pywrap failed"
        assert out.count(f"warning: {callback.cost} ({reason}); training goes on\n") == 1


def test_a_stop_and_a_failing_checkpoint_end_the_training():
    """Only other errors of callbacks with a `cost` become warnings."""

    class Raising(Callback):
        def __init__(self, error, cost):
            self.error = error
            self.cost = cost

        def on_update_end(self, trainer):
            raise self.error

    for error, cost in ((StopTraining(), "not drawn"), (ValueError("broken"), "")):
        with pytest.raises(type(error)):
            FakeTrainer([Raising(error, cost)]).learn()


def test_another_reason_is_another_warning(capsys):
    """The same reason is printed once."""

    class Watching(Callback):
        cost = "nothing is drawn"

        def on_update_end(self, error):
            raise error

    watching = Watching()
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SystemExit(1),
        OSError(errno.ENOSPC, "No space left on device"),
    ):
        watching.hear("on_update_end", error)
    assert capsys.readouterr().out.splitlines() == [
        "warning: nothing is drawn (No space left on device); training goes on",
        "warning: nothing is drawn (SystemExit: 1); training goes on",
    ]


@pytest.mark.parametrize("delay", [1, 2])
def test_an_evaluation_belongs_to_the_row_of_its_update(tmp_path, delay, capsys):
    """It also belongs to that step in the printed line, TensorBoard and best_model.safetensors, however late it
    comes."""
    FakeTrainer([MetricsCSV(tmp_path / "at_once.csv", EVALUATED)]).learn()
    FakeTrainer(all_callbacks(tmp_path), delay=delay).learn()
    assert table(tmp_path / "metrics.csv") == table(tmp_path / "at_once.csv")
    lines = [line for line in capsys.readouterr().out.splitlines() if "cleared" in line]
    assert [int(line.split("steps")[0]) for line in lines] == [200, 400, 600, 800]
    assert updates(tmp_path)["best_model.safetensors"] == 8
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_plain_lines(capsys):
    """Where the output is a file, not a terminal, there is no bar. The first score is the best, which is not said."""
    endings = {"go on": "like this", "stop": "now"}
    metrics = ("cleared", "varied")
    FakeTrainer([ProgressBar("what happens now", metrics=metrics, endings=endings)], seconds_per_update=6).learn()
    out, err = capsys.readouterr()
    lines = """
what happens now
        200 steps     12s  in training 20.0  17 steps/s  36s left
        200 steps     12s  score  90.0        cleared 0  varied 0.25
        400 steps     24s  in training 40.0  17 steps/s  24s left
        400 steps     24s  score 300.0  best  cleared 0  varied 0.25
        600 steps     36s  in training 60.0  17 steps/s  12s left
        600 steps     36s  score 250.0        cleared 0  varied 0.25
        800 steps     48s  in training 80.0  17 steps/s  0s left
        800 steps     48s  score 400.0  best  cleared 0  varied 0.25
trained 800 steps in 48s, best score 400.0
  go on: like this
  stop:  now
"""
    assert out == lines.removeprefix("\n") and err == ""


def test_plain_lines_of_a_resumed_run(capsys):
    """It says where it stands. The rate and the time that is left count from there, the clock from the start."""
    FakeTrainer([ProgressBar()], seconds_per_update=4, updates=6, start=2, scores={1: 90.0}).learn()
    assert capsys.readouterr().out.splitlines() == [
        "resumed after 200 of 600 steps and 3s, best score 90.0",
        "        500 steps     15s  in training 50.0  25 steps/s  4s left",
        "trained 600 steps in 19s, best score 90.0",
    ]


def test_plain_lines_within_an_update(capsys):
    """An update that takes long says what it does."""
    trainer = FakeTrainer([ProgressBar()])
    trainer.emit("on_training_start")
    for done in range(1, 5):
        trainer.seconds += 5
        trainer.doing = f"learning {done}/4"
        trainer.unfinished_steps = 25 * done
        trainer.emit("on_progress")
    assert capsys.readouterr().out.splitlines() == [
        "          0 steps     10s  5 steps/s  2m30s left  learning 2/4",
        "          0 steps     20s  5 steps/s  2m20s left  learning 4/4",
    ]


def test_scores_are_printed_also_if_the_estimate_fails(capsys):
    def fail():
        raise OSError("no more memory")

    FakeTrainer([ProgressBar("the plan", estimate=fail)]).learn()
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == printed.count("no more memory") == 1 and "score 400.0" in printed


def test_an_estimate_comes_after_the_plan(capsys):
    """It takes a while, in which there is something to read. An empty one is not printed."""
    FakeTrainer([ProgressBar("the plan", estimate=lambda: print("measuring") or "the estimate")], scores={}).learn()
    FakeTrainer([ProgressBar("the plan", estimate=lambda: "")], scores={}).learn()
    lines = [line for line in capsys.readouterr().out.splitlines() if " steps" not in line]
    assert lines == ["the plan", "measuring", "the estimate", "the plan"]


def test_a_first_update_that_compiles_does_not_count_for_the_rate(capsys):
    """It gets a line of its own, and the next line has the rate of the updates after it."""

    class SlowFirst(FakeTrainer):
        def update(self, update):
            self.seconds += 60 if update == 1 else 0
            super().update(update)

    SlowFirst([ProgressBar(first_is_slow=True)], seconds_per_update=12, updates=3).learn()
    assert [line for line in capsys.readouterr().out.splitlines() if "score" not in line] == [
        "the first update took 1m12s",
        "        200 steps   1m24s  in training 20.0  8.3 steps/s  12s left",
        "        300 steps   1m36s  in training 30.0  8.3 steps/s  0s left",
    ]


def test_episode_return_not_known_yet(capsys):
    """Nothing stands for it."""
    FakeTrainer([ProgressBar()], seconds_per_update=20, updates=1).learn()
    assert "        100 steps     20s  5 steps/s  0s left" in capsys.readouterr().out


def test_bar_of_a_resumed_run(monkeypatch, capsys):
    """It starts where the run was stopped, its clock too."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    ppo = FakeTrainer([ProgressBar()], start=4)
    ppo.learn()
    first, second, *_, last = [line for line in terminal.getvalue().split("\r") if "|" in line]
    assert first.split()[0].startswith("50%|") and second.split()[-2:] == ["400/800", "6s"]
    assert "800/800  12s  0s left  score 400.0  in training 80.0" in last


def test_the_bar_shows_how_far_a_preparation_is(monkeypatch, capsys):
    """It fills, begins anew with the first step, and the time that is left does not include the preparation."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("callbacks.REDRAW_INTERVAL", -1.0)
    trainer = FakeTrainer([ProgressBar()])
    trainer.emit("on_training_start")
    for done in (2500, 7500):
        trainer.seconds += 30
        trainer.prepared = done / 10_000
        trainer.doing = f"filling the memory {done:,}/10,000"
        trainer.emit("on_progress")
    trainer.prepared = None
    trainer.update(1)
    *_, first, second, step = [line.split("| ") for line in terminal.getvalue().split("\r") if "|" in line]
    assert first[0].startswith(" 25%|") and first[1].rstrip() == "filling the memory 2,500/10,000  30s"
    assert second[0].startswith(" 75%|") and second[1].rstrip() == "filling the memory 7,500/10,000  1m00s"
    assert step[0].startswith(" 12%|") and step[1].split()[:3] == ["100/800", "1m01s", "10s"]  # of 1.5 s an update


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events_of(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir)).Reload()


def close_as_older(tensorboard):
    """Close the event file and make it the first that is read: names are sorted, and begin with the time in seconds."""
    tensorboard.close()
    (file,) = tensorboard.run_dir.glob("events*")
    file.rename(file.with_name("events.out.tfevents.1"))


def eval_scores(run_dir):
    return [(e.step, e.value) for e in events_of(run_dir).Scalars("eval/score")]


def test_tensorboard(tmp_path):
    """A resumed run logs every update once, under the group of its name."""
    killed = FakeTrainer([TensorBoard(tmp_path)]).learn(until=5)  # its last checkpoint is of update 3
    close_as_older(killed.callbacks[0])
    FakeTrainer([TensorBoard(tmp_path)], start=3).learn()
    events = events_of(tmp_path)
    tags = events.Tags()["scalars"]
    losses = {f"losses/{name}" for name in STATS if name.endswith("loss") or name == "grad_norm"}
    charts = {"charts/learning_rate", "charts/SPS", "charts/episodic_return"}
    others = {"policy/entropy", "policy/approx_kl", "policy/approx_kl_max", "policy/clipfrac"}
    evals = {f"eval/{n}" for n in "score min max cleared games length varied returned".split()}
    assert set(tags) == losses | charts | others | {"value/explained_variance"} | evals
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]
    assert [e.step for e in events.Scalars("policy/entropy")] == [100 * u for u in range(1, 9)]  # none twice


def test_an_evaluation_that_a_resumed_run_repeats_is_logged_once(tmp_path):
    """The result of update 4 had come, but the last checkpoint still waited for it."""

    def watching():
        return [MetricsCSV(tmp_path / "metrics.csv", EVALUATED), TensorBoard(tmp_path)]

    killed = FakeTrainer(watching(), delay=1).learn(until=5)
    close_as_older(killed.callbacks[1])
    assert (400, SCORES[4]) in eval_scores(tmp_path)
    resumed = FakeTrainer(watching(), start=4, delay=1)
    resumed.begin_evaluation()
    resumed.learn()
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]
    entropies = [(e.step, e.value) for e in events_of(tmp_path).Scalars("policy/entropy")]
    assert entropies == [(100 * u, pytest.approx(u / 5)) for u in range(1, 9)]


def test_a_run_that_begins_again_hides_what_it_logged_before(tmp_path):
    """Such a run is resumed from the checkpoint before the first update."""
    close_as_older(FakeTrainer([TensorBoard(tmp_path)]).learn(until=3).callbacks[0])
    FakeTrainer([TensorBoard(tmp_path)]).learn()
    assert [e.step for e in events_of(tmp_path).Scalars("charts/learning_rate")] == [100 * u for u in range(1, 9)]


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Only the curve is missing, and one warning names the package."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    FakeTrainer(
        [MetricsCSV(tmp_path / "metrics.csv"), LearningCurve(tmp_path / "curve.png", tmp_path / "metrics.csv")]
    ).learn()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "import of matplotlib.figure halted" in out and "install it with pip" in out
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    """Only the event files are missing, and one warning names the package."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    FakeTrainer([TensorBoard(tmp_path)]).learn()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "import of torch.utils.tensorboard halted" in out and "install it with pip" in out
    assert not os.listdir(tmp_path)


def test_tensorboard_on_a_full_disk(tmp_path, capsys):
    """There is one warning, although every value of every update fails."""
    ppo = FakeTrainer([TensorBoard(tmp_path)])
    ppo.emit("on_training_start")
    ppo.callbacks[0].writer = SimpleNamespace(add_scalar=disk_full, close=disk_full)
    ppo.stats = {"lr": 1.0}
    ppo.emit("on_update_end")
    ppo.emit("on_update_end")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "No space left" in out


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def learn_with_wandb(run_dir, **options):
    trainer = FakeTrainer(
        [MetricsCSV(run_dir / "metrics.csv", EVALUATED), WeightsAndBiases("mine", run_dir)], **options
    )
    trainer.metadata = {"run_id": "abc", "constants": {"LR": 0.1}}
    return trainer.learn()


def test_weights_and_biases_get_every_column_of_metrics_csv(tmp_path, monkeypatch):
    """A result that comes late has the steps of the policy that was evaluated."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    learn_with_wandb(tmp_path, delay=1)
    assert wandb.metrics == [(("*",), {"step_metric": "global_step"})] and wandb.finished == 1
    logged = {}
    for row in wandb.rows:
        logged.setdefault(row["global_step"], {}).update(row)
    for row in read_metrics(tmp_path / "metrics.csv"):
        sent = logged.pop(row["global_step"])
        sent["seconds"] = round(sent["seconds"], 2)
        for column, value in row.items():
            name = column if column in ("update", "global_step", "seconds") else tensorboard_name(column)
            name = column.replace("eval_", "eval/") if column.startswith("eval_") else name
            assert sent.get(name, math.nan) == pytest.approx(value, nan_ok=True), column
    assert not logged


def test_a_resumed_run_goes_on_as_the_same_run_of_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    learn_with_wandb(tmp_path)
    learn_with_wandb(tmp_path, start=3)
    first, second = wandb.inits
    assert first == second and first["id"] == "abc" and first["resume"] == "allow" and first["config"] == {"LR": 0.1}
    assert (first["project"], first["name"], first["dir"]) == ("mine", tmp_path.name, tmp_path)


def fails(*args, **kwargs):
    raise RuntimeError("No API key configured.\nUse `wandb login`")


# fmt: off
@pytest.mark.parametrize("wandb, reason", [
    (None, "ModuleNotFoundError: import of wandb halted; None in sys.modules; install it with pip"),
    (SimpleNamespace(init=fails), "RuntimeError: No API key configured."),
    (SimpleNamespace(init=lambda **_: SimpleNamespace(define_metric=fails, log=fails, finish=fails)),
     "RuntimeError: No API key configured."),
])
# fmt: on
def test_weights_and_biases_that_fail_end_no_training(tmp_path, monkeypatch, capsys, wandb, reason):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert learn_with_wandb(tmp_path).global_step == 800
    warning = f"warning: no more goes to Weights & Biases ({reason}); training goes on"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [warning]


# --- the learning curve -----------------------------------------------------------------------------------------------


def test_learning_curve_is_drawn_when_its_evaluation_is_in_the_file(tmp_path, monkeypatch):
    """Each curve shows the evaluation that it is drawn after."""
    seen = []
    real = callbacks.learning_curve

    def counting(rows, levels):
        seen.append(len(rows))
        return real(rows, levels)

    monkeypatch.setattr(callbacks, "learning_curve", counting)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: 0.0)  # a machine that draws in no time
    csv = tmp_path / "metrics.csv"
    png = tmp_path / "learning_curve.png"
    FakeTrainer([MetricsCSV(csv, EVALUATED), LearningCurve(png, csv)]).learn()
    assert seen == [2, 4, 6, 8, 8]
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 400
    assert sorted(os.listdir(tmp_path)) == ["learning_curve.png", "metrics.csv"]


def test_learning_curve_is_not_drawn_all_the_time(tmp_path, monkeypatch):
    """Drawing takes a second here, so the next curve is drawn after 20 more seconds, or when training is stopped."""
    clock = [0.0]
    drawn = []

    def slow(rows, levels):
        clock[0] += 1
        drawn.append(clock[0])
        return Figure()

    monkeypatch.setattr(callbacks, "learning_curve", slow)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    curve = LearningCurve(tmp_path / "curve.png", tmp_path / "metrics.csv")
    for clock[0] in (10.0, 15.0, 30.0, 31.0, 40.0):
        curve.on_evaluation_end(None)
    assert drawn == [11.0, 32.0]
    curve.close()
    assert drawn == [11.0, 32.0, 41.0]
    curve.close()
    curve.on_training_end(None)
    assert drawn == [11.0, 32.0, 41.0, 42.0]


def test_the_curve_of_a_stopped_training_has_its_last_updates(tmp_path, monkeypatch):
    """Updates after the last evaluation are drawn when the training is stopped."""
    drawn = []
    monkeypatch.setattr(callbacks, "learning_curve", lambda rows, levels: drawn.append(len(rows)) or Figure())
    metrics = tmp_path / "metrics.csv"
    trainer = FakeTrainer([MetricsCSV(metrics), LearningCurve(tmp_path / "curve.png", metrics)]).learn(until=5)
    assert drawn[-1] < 5
    for callback in trainer.callbacks:
        callback.close()
    assert drawn[-1] == 5


def test_learning_curve_of_nothing(tmp_path):
    """A run without rows gets an empty picture."""
    LearningCurve(tmp_path / "curve.png", tmp_path / "missing.csv").draw()
    assert (tmp_path / "curve.png").stat().st_size > 1000


# --- checkpoints ------------------------------------------------------------------------------------------------------


def updates(run_dir):
    """Return {name: update at which it was saved} of all checkpoints."""
    return {path.name: load_checkpoint(path)["update_count"] for path in run_dir.glob("*.safetensors")}


def test_checkpoints(tmp_path):
    """`last` and the newest two are there to resume, and the best model, which is smaller, to play."""
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)])
    ppo.learn(until=6)
    assert updates(tmp_path) == {
        "last.safetensors": 6,
        "checkpoint_5.safetensors": 5,
        "checkpoint_6.safetensors": 6,
        "best_model.safetensors": 4,
    }
    assert "best_score" not in load_checkpoint(tmp_path / "best_model.safetensors")  # the smaller state
    assert load_checkpoint(tmp_path)["best_score"] == 300


def test_the_newest_three_checkpoints_stay_and_without_evaluations_there_is_no_best_model(tmp_path):
    """Three is the default of `keep`."""
    FakeTrainer([Checkpoints(tmp_path, save_freq=1)], updates=5, scores={}).learn()
    assert updates(tmp_path) == {
        "last.safetensors": 5,
        "checkpoint_3.safetensors": 3,
        "checkpoint_4.safetensors": 4,
        "checkpoint_5.safetensors": 5,
    }


def test_last_is_saved_at_the_end(tmp_path):
    """It is, even if no checkpoint is due."""
    FakeTrainer([Checkpoints(tmp_path, save_freq=5)], updates=7).learn()
    assert updates(tmp_path) == {"last.safetensors": 7, "checkpoint_5.safetensors": 5, "best_model.safetensors": 4}


def test_there_is_something_to_resume_from_the_start(tmp_path):
    """A kill in the first update loses nothing."""
    FakeTrainer([Checkpoints(tmp_path, save_freq=100)]).learn(until=1)
    assert updates(tmp_path) == {"last.safetensors": 0}


def test_a_best_model_that_could_not_be_saved_is_saved_later(tmp_path, monkeypatch, capsys):
    """The best score comes with update 4, while the disk is full; from update 6 on there is room again."""
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=100)], scores={4: 300.0})
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: fsync(fd) if ppo.update_count not in (4, 5) else disk_full())
    ppo.learn(until=5)
    assert "best_model.safetensors" not in updates(tmp_path)
    ppo.update_count = 5
    ppo.learn(until=6)
    assert updates(tmp_path)["best_model.safetensors"] == 4


def numbers(run_dir):
    """Return the <update> of every checkpoint_<update> in a directory, as text."""
    return sorted(path.stem.removeprefix("checkpoint_") for path in run_dir.glob("checkpoint_*"))


def test_checkpoints_left_from_before_a_resume_do_not_push_out_new_ones(tmp_path):
    """They stay until the training reaches their updates again. Files with other names are not ours to delete."""
    FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)], updates=9).learn(until=8)
    (tmp_path / "checkpoint_mine.safetensors").write_bytes(b"")
    resumed = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)], updates=9, start=3)
    resumed.learn(until=5)
    assert numbers(tmp_path) == ["4", "5", "7", "8", "mine"]
    resumed.learn(until=9)
    assert numbers(tmp_path) == ["8", "9", "mine"]


@needs_posix
def test_links_to_nothing_and_directories_among_the_checkpoints_stop_nothing(tmp_path):
    """A link is deleted like a checkpoint, and a directory stays."""
    (tmp_path / "checkpoint_1.safetensors").symlink_to("gone")
    (tmp_path / "checkpoint_2.safetensors").mkdir()
    FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)], start=3).learn(until=6)
    assert numbers(tmp_path) == ["2", "5", "6"]


def test_a_full_disk_keeps_the_old_files(tmp_path, monkeypatch, capsys):
    """Warnings are all that comes of it, and files are written again once there is room."""
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=1)])
    ppo.learn(until=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        ppo.learn(until=5)
    assert updates(tmp_path) == {"last.safetensors": 2, "checkpoint_2.safetensors": 2, "best_model.safetensors": 2}
    assert all(line.startswith("warning: ") for line in capsys.readouterr().out.splitlines())
    ppo.learn()
    assert updates(tmp_path) == {"last.safetensors": 8, "checkpoint_8.safetensors": 8, "best_model.safetensors": 8}


# --- stages -----------------------------------------------------------------------------------------------------------


def with_stages(run_dir, updates, start=0):
    """Return a trainer whose updates are 100 steps each, and which keeps stages in a directory."""
    return FakeTrainer([Checkpoints(run_dir, save_freq=100, keep_stages=True)], updates=updates, start=start)


def stages(run_dir):
    """Return the environment steps of all stages, and check that they are what is in the files."""
    steps = [load_checkpoint(path)["global_step"] for path in run_dir.glob("stage_*")]
    assert {path.name for path in run_dir.glob("stage_*")} == {f"stage_{number}.safetensors" for number in steps}
    return sorted(steps)


@pytest.mark.parametrize(
    "updates, expected",
    [
        (200, [0, 200, 600, 2000, 6000]),
        (150, [0, 200, 500, 1500, 4500]),  # 1 % are 1.5 updates, and 3 % are 4.5
        (50, [0, 100, 200, 500, 1500]),
        (4, [0, 100, 200]),  # the first update is a quarter of them
        (1, [0, 100]),
    ],
)
def test_stages(tmp_path, updates, expected):
    """They are the start, and the first update after 1, 3, 10 and 30 % of the steps, whatever `save_freq` is."""
    with_stages(tmp_path, updates).learn()
    assert stages(tmp_path) == expected
    for path in tmp_path.glob("stage_*"):
        state = load_checkpoint(path)
        assert state["model"]["w"].dtype == torch.float16 and "best_score" not in state  # the smaller state


def test_a_resumed_run_has_the_stages_of_a_straight_one(tmp_path):
    """Those after the checkpoint are of steps that are now taken again. Files with other names are not ours."""
    with_stages(tmp_path, 200).learn(until=120)
    (tmp_path / "stage_mine.safetensors").write_bytes(b"")
    resumed = with_stages(tmp_path, 200, start=10)
    resumed.learn(until=11)
    (tmp_path / "stage_mine.safetensors").unlink()
    assert stages(tmp_path) == [0, 200, 600]
    resumed.learn(until=50)
    assert stages(tmp_path) == [0, 200, 600, 2000]
    with_stages(tmp_path, 200, start=50).learn()  # nothing but what is to come
    assert stages(tmp_path) == [0, 200, 600, 2000, 6000]


@pytest.mark.parametrize(
    "updates, more",
    [
        (201, [20_000]),  # 30 % are 6030 steps now, and the newest stage has 6000
        (400, [20_000]),
        (2000, [20_000, 60_000]),  # 10 % are 20,000
        (20_000, [20_000, 60_000, 200_000, 600_000]),
    ],
)
def test_a_longer_run_keeps_its_stages(tmp_path, updates, more):
    """The policy with which it goes on makes up for what the longer training would have kept before."""
    with_stages(tmp_path, 200).learn()
    with_stages(tmp_path, updates, start=200).learn(until=7000)
    assert stages(tmp_path) == [0, 200, 600, 2000, 6000, *more]


def test_a_run_without_stages_gets_those_that_are_to_come(tmp_path):
    """It may be of an older version; and a shorter training needs no more of them."""
    with_stages(tmp_path, 200, start=10).learn()
    assert stages(tmp_path) == [1000, 2000, 6000]
    with_stages(tmp_path, 150, start=100).learn()
    assert stages(tmp_path) == [1000, 2000, 6000]


def test_a_stage_that_could_not_be_saved_is_saved_later(tmp_path, monkeypatch, capsys):
    """The disk is full in updates 2 and 3 of 200, at 1 % of the steps."""
    trainer = with_stages(tmp_path, 200)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: fsync(fd) if trainer.update_count not in (2, 3) else disk_full())
    trainer.learn(until=10)
    assert stages(tmp_path) == [0, 400, 600]
    assert "stage_200.safetensors: not saved" in capsys.readouterr().out


@needs_posix
def test_links_to_nothing_and_directories_among_the_stages_stop_nothing(tmp_path):
    """A link is deleted like a stage, and a directory stays."""
    (tmp_path / "stage_9999.safetensors").symlink_to("gone")
    (tmp_path / "stage_99999.safetensors").mkdir()
    with_stages(tmp_path, 200).learn(until=2)
    (tmp_path / "stage_99999.safetensors").rmdir()
    assert stages(tmp_path) == [0, 200]
