import contextlib
import csv
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
    duration,
    read_metrics,
)
from harness.background import CannotStart
from harness.checkpoint import CheckpointError, load_checkpoint
from harness.supervise import StopTraining

STATS = (
    "policy_loss value_loss entropy prediction_loss approx_kl approx_kl_max clipfrac explained_variance grad_norm lr"
).split()
EVALUATED = ("score", "min", "max", "cleared", "length", "returned")
LEVELS = {"the best": 960, "random play": 82}
SCORES = {2: 90.0, 4: 300.0, 6: 250.0, 8: 400.0}  # update: what its evaluation says; the others have none


class FakeTrainer:
    """Emits what a trainer emits, in its order; every number follows from the update, but for the timings. Evaluations take
    `delay` updates."""

    def __init__(self, callbacks, updates=8, start=0, seconds_per_update=1.5, delay=0):
        self.callbacks, self.num_steps, self.seconds_per_update = callbacks, 100 * updates, seconds_per_update
        self.delay, self.evaluating = delay, None
        self.update_count, self.global_step, self.seconds = start, 100 * start, start * 1.5
        self.evaluated, self.stats, self.is_best, self.pending = None, {}, False, []
        self.best_score = max([s for u, s in SCORES.items() if u <= start], default=-math.inf)

    def emit(self, event):
        for callback in self.callbacks:
            callback.hear(event, self)

    def learn(self, until=None):
        self.emit("on_training_start")
        for update in range(self.update_count + 1, self.num_steps // 100 + 1):
            self.update_count, self.global_step = update, 100 * update
            self.seconds += self.seconds_per_update
            self.stats = {name: update / (i + 3) for i, name in enumerate(STATS)}
            self.stats |= {"steps_per_second": 1 / self.seconds}
            self.stats |= {"episode_return": 10.0 * update if update > 1 else math.nan}
            if update in SCORES:
                self.finish_evaluation()
                self.begin_evaluation(SCORES[update])
            self.emit("on_update_end")
            if self.evaluating and update >= self.evaluating["update_count"] + self.delay:
                self.finish_evaluation()
            if update == until:  # a kill: no more events
                return self
        self.finish_evaluation()
        self.emit("on_training_end")
        for callback in self.callbacks:
            callback.hear("close")
        return self

    def begin_evaluation(self, score):
        evaluation = {
            "score": score,
            "min": score - 80,
            "max": score + 90,
            "cleared": 0,
            "games": 32,
            "length": 812.5,
            "returned": 0.71,
        }
        self.evaluating = {
            **self.policy_state(),
            "global_step": self.global_step,
            "seconds": self.seconds,
            "evaluation": evaluation,
        }
        self.pending = [self.evaluating]

    def finish_evaluation(self):
        if self.evaluating:
            self.evaluated, self.evaluating, self.pending = self.evaluating, None, []
            score = self.evaluated["evaluation"]["score"]
            self.is_best = score > self.best_score
            self.best_score = max(self.best_score, score)
            self.emit("on_evaluation_end")

    def policy_state(self):
        return {"update_count": self.update_count, "model": {"w": torch.ones(2)}}

    def state_dict(self):
        return {**self.policy_state(), "best_score": self.best_score}


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


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
    """Stands in for Background: the test gives the results."""

    def __init__(self, evaluate, processes):
        self.processes, self.asked, self.exits = processes, [], 0

    def submit(self, state):
        self.asked.append((state, Future()))
        return self.asked[-1][1]

    def result(self, future):
        return future.result()

    def close(self):
        self.exits += 1


class Trainer:
    """The evaluation's part of a trainer: `update()` is one update."""

    def __init__(self, evaluation, num_updates=5):
        self.callback, self.pending, self.ends, self.stopped = evaluation, [], [], False
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
    """Whatever is waited for comes, with its own number as the score; -> how often was waited."""
    monkeypatch.setattr(callbacks, "Background", Futures)
    waited = []

    def give(seconds):
        waited.append(seconds)
        state, future = next((state, future) for state, future in evaluations[-1].background.asked if not future.done())
        future.set_result({"score": state["update_count"]})

    monkeypatch.setattr(
        callbacks, "time", SimpleNamespace(sleep=give)
    )  # not time.sleep itself, which other threads call too
    evaluations, init = [], Evaluation.__init__
    monkeypatch.setattr(Evaluation, "__init__", lambda self, *args: (init(self, *args), evaluations.append(self))[0])
    return waited


def test_training_goes_on_while_it_is_evaluated(waits):
    """A result is waited for when the next evaluation is due; the last update is always evaluated."""
    evaluation = Evaluation(None, 2)
    trainer, under_way = Trainer(evaluation), []
    for _ in range(5):
        trainer.update()
        under_way.append(trainer.under_way())
    assert under_way == [[], [2], [2], [4], [5]] and trainer.ends == [(4, 2, 2), (5, 4, 4)]
    evaluation.on_training_end(trainer)
    assert trainer.ends[2:] == [(5, 5, 5)] and trainer.pending == [] and len(waits) == 3


def test_several_evaluations_at_once_end_in_order(waits):
    evaluation = Evaluation(None, 1, 2)
    trainer, under_way = Trainer(evaluation), []
    for _ in range(5):
        trainer.update()
        under_way.append(trainer.under_way())
        if trainer.update_count == 2:
            evaluation.background.asked[1][1].set_result({"score": 2})  # before the first
    assert under_way == [[1], [1, 2], [3], [3, 4], [4, 5]]
    assert trainer.ends == [(3, 1, 1), (3, 2, 2), (5, 3, 3)]


def test_a_result_that_is_there_is_taken_without_waiting(waits):
    evaluation = Evaluation(None, 2)
    trainer = Trainer(evaluation)
    trainer.update()
    trainer.update()
    evaluation.background.asked[0][1].set_result({"score": 7})
    trainer.update()
    assert trainer.ends == [(3, 2, 7)] and not waits


def test_what_was_being_evaluated_is_evaluated_again_in_a_resumed_run(waits):
    evaluation = Evaluation(None, 2)
    trainer = Trainer(evaluation, 6)
    trainer.pending = [{"update_count": 2}, {"update_count": 4}]  # of more processes than there are now
    trainer.update_count = trainer.global_step = 5
    evaluation.on_training_start(trainer)
    trainer.update()
    evaluation.on_training_end(trainer)
    assert trainer.ends == [(6, 2, 2), (6, 4, 4), (6, 6, 6)]


def test_a_stop_while_waiting_loses_no_evaluation(waits):
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
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    watched, alone = FakeTrainer(all_callbacks(tmp_path)).learn(), FakeTrainer([Callback()]).learn()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    watched.callbacks = alone.callbacks
    assert watched.evaluated.pop("model").keys() == alone.evaluated.pop("model").keys()
    assert vars(watched) == vars(alone)


def test_files_of_a_run(tmp_path):
    FakeTrainer(all_callbacks(tmp_path)).learn()
    names = {name for name in os.listdir(tmp_path) if not name.startswith("events")}
    assert names == {
        "metrics.csv",
        "learning_curve.png",
        "best_model.pt",
        "last.pt",
        "checkpoint_3.pt",
        "checkpoint_6.pt",
    }


def test_a_full_disk_during_training_costs_files_only(tmp_path, monkeypatch, capsys):
    ppo = FakeTrainer(all_callbacks(tmp_path))
    monkeypatch.setattr(os, "replace", disk_full)
    ppo.learn(until=8)
    out = capsys.readouterr().out
    for name in ("metrics.csv", "learning_curve.png", "last.pt", "best_model.pt"):
        lines = [line for line in out.splitlines() if name in line]
        assert lines and all("No space left" in line and "training goes on" in line for line in lines)
    for name, cost in (("metrics.csv", "not written"), ("learning_curve.png", "not drawn"), ("last.pt", "not saved")):
        assert f"{name}: {cost} (No space left" in out
    with pytest.raises(CheckpointError, match="No space left"):
        ppo.emit("on_training_end")


@pytest.mark.parametrize(
    "event", ["on_training_start", "on_update_end", "on_evaluation_end", "on_training_end", "close"]
)
def test_what_only_draws_or_logs_ends_no_training(tmp_path, monkeypatch, capsys, event):
    """Whatever it raises: one warning for one reason, and every other callback hears all events."""

    class Panic(BaseException):
        """As that of a library in Rust."""

    def broken(*args):
        raise Panic("initialization of _pywrap failed\nwithout raising an exception")

    watching = [callback for callback in all_callbacks(tmp_path) if callback.cost]
    assert [type(callback) for callback in watching] == [ProgressBar, MetricsCSV, TensorBoard, LearningCurve]
    for callback in watching:
        monkeypatch.setattr(callback, event, broken)
    FakeTrainer([*watching, Checkpoints(tmp_path, save_freq=3)]).learn()
    assert updates(tmp_path)["best_model.pt"] == updates(tmp_path)["last.pt"] == 8
    out = capsys.readouterr().out
    for callback in watching:
        reason = "Panic: initialization of _pywrap failed without raising an exception"
        assert out.count(f"warning: {callback.cost} ({reason}); training goes on\n") == 1


def test_a_stop_and_a_failing_checkpoint_end_the_training():
    class Raising(Callback):
        def __init__(self, error, cost):
            self.error, self.cost = error, cost

        def on_update_end(self, trainer):
            raise self.error

    for error, cost in ((StopTraining(), "not drawn"), (ValueError("broken"), "")):
        with pytest.raises(type(error)):
            FakeTrainer([Raising(error, cost)]).learn()


def test_another_reason_is_another_warning(capsys):
    watching = type(
        "Watching",
        (Callback,),
        {"cost": "nothing is drawn", "on_update_end": lambda self, error: (_ for _ in ()).throw(error)},
    )()
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


# --- progress ---------------------------------------------------------------------------------------------------------


def test_durations():
    assert [duration(s) for s in (0, 42.9, 60, 102, 3599, 3600, 7500)] == [
        "0s",
        "42s",
        "1m00s",
        "1m42s",
        "59m59s",
        "1h00m",
        "2h05m",
    ]


def test_plain_lines(capsys):
    FakeTrainer([ProgressBar("what happens now")], seconds_per_update=6).learn()
    out, err = capsys.readouterr()
    assert err == ""  # a file is no terminal: no bar
    assert out.splitlines() == [
        "what happens now",
        "the first update ran at 17 steps/s: about 42s to go",
        "        200 steps     12s  in training 20.0  17 steps/s  36s left",
        "        200 steps     12s  score  90.0  min 10  max 180  cleared 0  games 32  length 812.5  returned 0.71  best",
        "        400 steps     24s  in training 40.0  17 steps/s  24s left",
        "        400 steps     24s  score 300.0  min 220  max 390  cleared 0  games 32  length 812.5  returned 0.71  best",
        "        600 steps     36s  in training 60.0  17 steps/s  12s left",
        "        600 steps     36s  score 250.0  min 170  max 340  cleared 0  games 32  length 812.5  returned 0.71",
        "        800 steps     48s  in training 80.0  17 steps/s  0s left",
        "        800 steps     48s  score 400.0  min 320  max 490  cleared 0  games 32  length 812.5  returned 0.71  best",
        "trained 800 steps in 48s, best score 400.0",
    ]


def test_plain_lines_between_evaluations(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "SCORES", {})
    FakeTrainer([ProgressBar()], seconds_per_update=4, updates=6, start=2).learn()
    assert capsys.readouterr().out.splitlines() == [  # rate and time left count from the resume: 25 steps/s
        "the first update ran at 25 steps/s: about 12s to go",
        "        500 steps     15s  in training 50.0  25 steps/s  4s left",
        "trained 600 steps in 19s",
    ]


def test_a_first_update_that_compiles_is_not_what_the_rest_takes(capsys):
    trainer = FakeTrainer([ProgressBar()], seconds_per_update=2, updates=5)
    trainer.seconds = -38  # the first takes 40 seconds more
    trainer.callbacks[0].on_training_start = lambda trainer: (
        ProgressBar.on_training_start(trainer.callbacks[0], trainer),
        setattr(trainer, "seconds", 2),
    )
    trainer.learn()
    assert [line for line in capsys.readouterr().out.splitlines() if "update ran" in line] == [
        "the first update ran at 2.4 steps/s: about 2m48s to go",
        "the second update ran at 50 steps/s: about 6s to go",
    ]


def test_a_first_update_that_is_known_to_be_slow(capsys):
    FakeTrainer([ProgressBar(first_is_slow=True)], seconds_per_update=12, updates=3).learn()
    assert [line for line in capsys.readouterr().out.splitlines() if "score" not in line] == [
        "the first update took 12s",
        "the second update ran at 8.3 steps/s: about 12s to go",
        "        200 steps     24s  in training 20.0  8.3 steps/s  12s left",
        "        300 steps     36s  in training 30.0  8.3 steps/s  0s left",
    ]


def test_episode_return_not_known_yet(capsys):
    FakeTrainer([ProgressBar()], seconds_per_update=20, updates=1).learn()
    assert "in training -  5 steps/s  0s left" in capsys.readouterr().out


def test_bar_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    ppo = FakeTrainer([ProgressBar()], start=4)
    ppo.learn()
    bar = ppo.callbacks[0].bar
    assert bar.n == bar.total == 800 and bar.initial == 400
    assert "800/800" in terminal.getvalue() and "score 400.0, in training 80.0" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("score")[0].split() for line in lines[1:3]] == [["600", "steps", "9s"], ["800", "steps", "12s"]]
    assert lines[-1].startswith("trained 800 steps")


# --- metrics.csv ------------------------------------------------------------------------------------------------------


def table(path):
    """metrics.csv as a list of dicts of text, without the timings."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds"), row.pop("steps_per_second")
    return rows


@pytest.fixture
def straight(tmp_path):
    FakeTrainer([MetricsCSV(tmp_path / "straight.csv", EVALUATED)]).learn()
    return table(tmp_path / "straight.csv")


def test_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn()
    with open(path) as file:
        columns, *rows = csv.reader(file)
    assert columns == [
        "update",
        "global_step",
        "seconds",
        *STATS,
        "steps_per_second",
        "episode_return",
        "eval_score",
        "eval_min",
        "eval_max",
        "eval_cleared",
        "eval_length",
        "eval_returned",
    ]
    assert [row[0] for row in rows] == list("12345678")
    assert rows[0][-7:] == ["nan", "", "", "", "", "", ""]
    assert rows[3][:4] == ["4", "400", "6.0", str(4 / 3)]
    assert rows[3][-7:] == ["40.0", "300.0", "220.0", "390.0", "0", "812.5", "0.71"]
    assert rows[4][-6:] == [""] * 6


@pytest.mark.parametrize("delay", [1, 2])
def test_an_evaluation_belongs_to_the_row_of_its_update(tmp_path, straight, delay, capsys):
    """And to its step on the line, in TensorBoard and in best_model.pt, though its result comes later."""
    FakeTrainer(all_callbacks(tmp_path), delay=delay).learn()
    assert table(tmp_path / "metrics.csv") == straight
    assert [line.split("steps")[0].strip() for line in capsys.readouterr().out.splitlines() if "cleared" in line] == [
        "200",
        "400",
        "600",
        "800",
    ]
    assert updates(tmp_path)["best_model.pt"] == 8
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]


def test_every_row_is_on_disk_at_once(tmp_path):
    for n in (1, 2, 3):
        FakeTrainer([MetricsCSV(tmp_path / "metrics.csv", EVALUATED)]).learn(until=n)
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == n + 1


@pytest.mark.parametrize("saved, killed", [(3, 3), (3, 5), (4, 7), (0, 2)])
def test_resumed_metrics_equal_a_straight_run(tmp_path, straight, saved, killed):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=killed)
    FakeTrainer([MetricsCSV(path, EVALUATED)], start=saved).learn()
    assert table(path) == straight
    assert sorted(os.listdir(tmp_path)) == ["metrics.csv", "straight.csv"]


def test_an_evaluation_of_before_the_stop_brings_no_stale_rows_back(tmp_path, straight):
    """It is reported at the first update after the resume, before that has its row."""

    class Report(Callback):
        def on_update_end(self, trainer):
            if trainer.evaluating and trainer.evaluating["update_count"] < trainer.update_count:
                trainer.finish_evaluation()

    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)], delay=4).learn(until=7)
    resumed = FakeTrainer([Report(), MetricsCSV(path, EVALUATED)], start=4, delay=9)
    resumed.begin_evaluation(SCORES[4])
    resumed.learn()
    assert table(path) == straight


def test_torn_last_line(tmp_path, straight, capsys):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=5)
    whole = path.read_bytes()
    last_line = whole.rindex(b"\n", 0, -1) + 1
    for cut, rows in (
        (last_line + 1, 4),
        (last_line + 30, 4),
        (len(whole) - 1, 5),
    ):  # the last has all its cells, but no end
        path.write_bytes(whole[:cut])
        assert [row["update"] for row in read_metrics(path)] == list(range(1, rows + 1))
        FakeTrainer([MetricsCSV(path, EVALUATED)], start=4).learn()
        assert table(path) == straight
    assert capsys.readouterr().out == "" and not list(tmp_path.glob("*copy*"))


def test_garbage_or_nothing_in_the_file(tmp_path, straight):
    path = tmp_path / "metrics.csv"
    for garbage in (b"", b"\n", b"upda", bytes(100), b"\xff\xfe\n"):
        path.write_bytes(garbage)
        FakeTrainer([MetricsCSV(path, EVALUATED)]).learn()
        assert [{name: row[name] for name in straight[0]} for row in table(path)] == straight


def test_a_new_statistic_after_a_resume_gets_a_column(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=2)
    monkeypatch.setattr(sys.modules[__name__], "STATS", STATS + ["new"])
    resumed = FakeTrainer([MetricsCSV(path, EVALUATED)], start=2)
    resumed.begin_evaluation(SCORES[2])
    resumed.callbacks[0].on_training_start(resumed)
    resumed.finish_evaluation()  # before there is a row with the new column
    resumed.learn(until=3)
    assert [bool(row["new"]) for row in table(path)] == [False, False, True]


def test_rows_after_a_full_disk(tmp_path, monkeypatch, straight, capsys):
    path = tmp_path / "metrics.csv"
    ppo = FakeTrainer([MetricsCSV(path, EVALUATED)])
    ppo.learn(until=3)
    with open(path, "a") as file:
        file.write("4,400,0.")  # a write that failed half-way
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "atomic_write", disk_full)
        ppo.learn(until=5)
    assert capsys.readouterr().out == f"warning: {path}: not written (No space left on device); training goes on\n"
    ppo.learn()
    assert [row["update"] for row in table(path)] == list("12345678")
    assert [row for row in table(path) if row["update"] not in "45"] == [
        row for row in straight if row["update"] not in "45"
    ]


def semicolons(text):
    return text.replace(".", "@").replace(",", ";").replace("@", ",")


def as_pandas(text):
    """With an index, and with a decimal point in what were integers."""
    lines = text.splitlines()
    return (
        "\n".join([f",{lines[0]}"] + [f"{i},{line.replace(',', '.0,', 2)}" for i, line in enumerate(lines[1:])]) + "\n"
    )


SAVED_BY_OTHERS = {
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "no end": lambda text: text[:-1].encode("utf-8-sig"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "semicolons and decimal commas": lambda text: semicolons(text).encode("utf-8-sig"),
    "UTF-16 and tabs": lambda text: text.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "quotation marks": lambda text: ('"' + text[:-1].replace(",", '","').replace("\n", '"\n"') + '"\n').encode(),
    "stray quotation marks": lambda text: ('"' + text.replace("\n3,", '\n"3,').replace(",400,", ',"400,')).encode(),
    "empty lines": lambda text: (text + ",,,\n\n").encode(),
    "sorted": lambda text: "".join(
        [*text.splitlines(True)[:1], *sorted(text.splitlines(True)[1:], reverse=True)]
    ).encode(),
    "pandas": lambda text: as_pandas(text).encode(),
}


@pytest.mark.parametrize("saved", SAVED_BY_OTHERS.values(), ids=SAVED_BY_OTHERS)
@pytest.mark.parametrize("resumed", [True, False])
def test_a_file_that_a_spreadsheet_has_saved_keeps_its_rows(tmp_path, straight, capsys, saved, resumed):
    """Between two runs, or while the training goes on."""
    path = tmp_path / "metrics.csv"
    trainer = FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=5)
    path.write_bytes(saved(path.read_text()))
    if resumed:
        trainer = FakeTrainer([MetricsCSV(path, EVALUATED)], start=5)
    trainer.learn()
    columns = {name: list(range(8)) for name in straight[0]}
    assert [{name: callbacks.number(row[name]) for name in columns} for row in table(path)] == [
        pytest.approx({name: callbacks.number(row[name]) for name in columns}, nan_ok=True) for row in straight
    ]
    assert capsys.readouterr().out == "" and sorted(os.listdir(tmp_path)) == ["metrics.csv", "straight.csv"]


@pytest.mark.parametrize(
    "change, missing, odd",
    [
        (lambda text: text.replace("3,300,", "3,300,,"), 1, 1),
        (lambda text: text.replace("update,", "upd,"), 5, 6),
        (lambda text: text.replace("2,200,", "2nd,200,"), 1, 1),
        (lambda text: text + "looks good from here\n", 0, 1),
        (lambda text: text[:-9], 1, 1),
        (lambda text: text + text.splitlines()[2] + ",9\n", 0, 1),
        (lambda text: "", 5, 0),
        (lambda text: text[: text.index("\n4,") + 1], 2, 0),
        (lambda text: text.replace("1,100,", "1," + "9" * 200_000), 1, 1),
        (lambda text: text + text.splitlines()[2] + "\n", 0, 1),
        (lambda text: "sep=,\n" + text, 0, 1),
        (lambda text: text + text, 0, 6),
    ],
)
def test_what_is_not_understood_stays_in_a_copy(tmp_path, straight, capsys, change, missing, odd):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=5)
    changed = change(path.read_text())
    for number in (1, 2):
        path.write_text(changed)
        FakeTrainer([MetricsCSV(path, EVALUATED)], start=5).learn()
        copy = path.with_name(f"metrics.copy-{number}.csv")
        kept = f"; the file as it was: {copy}" if odd else ""
        assert (
            capsys.readouterr().out
            == f"warning: {path}: earlier rows missing: {missing}, lines not understood: {odd}{kept}\n"
        )
        assert copy.exists() == bool(odd) and (not odd or copy.read_text() == changed)
        rows = table(path)
        assert len(rows) == 8 - missing and all(row in straight for row in rows)


def test_nothing_goes_before_there_is_a_copy_of_it(tmp_path, monkeypatch, straight, capsys):
    """The disk is full for two rows."""
    path = tmp_path / "metrics.csv"
    trainer = FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=3)
    changed = path.read_text() + "my notes\n"
    path.write_text(changed)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "atomic_write", disk_full)
        trainer.learn(until=5)
    assert path.read_text() == changed and capsys.readouterr().out.count("not written (No space left on device)") == 1
    trainer.learn()
    assert [row["update"] for row in table(path)] == list("12345678")
    assert [row for row in table(path) if row["update"] not in "45"] == [
        row for row in straight if row["update"] not in "45"
    ]
    assert path.with_name("metrics.copy-1.csv").read_text() == changed and len(list(tmp_path.glob("*copy*"))) == 1


def test_a_file_that_is_deleted_while_training(tmp_path, straight, capsys):
    path = tmp_path / "metrics.csv"
    trainer = FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=3)
    path.unlink()
    trainer.learn()
    assert table(path) == straight[3:]
    assert capsys.readouterr().out == f"warning: {path}: earlier rows missing: 3, lines not understood: 0\n"


def test_a_column_of_the_users_stays(tmp_path, straight):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=2)
    path.write_bytes(path.read_bytes().replace(b"\n", b",n\xf6te\n").replace(b"n\xf6te", b"note", 1))  # in Latin-1
    FakeTrainer([MetricsCSV(path, EVALUATED)], start=2).learn()
    with open(path, encoding="latin-1") as file:
        assert [row.pop("note") for row in csv.DictReader(file)] == ["n\xf6te"] * 2 + [""] * 6


def test_a_text_of_the_users_keeps_its_commas(tmp_path):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=2)
    header, *rows = semicolons(path.read_text()).splitlines()
    path.write_text("\n".join([f"{header};note", *(f"{row};good, better" for row in rows), ""]))
    FakeTrainer([MetricsCSV(path, EVALUATED)], start=2).learn()
    assert [row["note"] for row in table(path)] == ["good, better"] * 2 + [""] * 6


def test_a_column_that_vanishes_while_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    trainer = FakeTrainer([MetricsCSV(path, EVALUATED)]).learn(until=2)
    path.write_text(path.read_text().replace("\n", ",mine\n"))
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "atomic_write", disk_full)
        trainer.learn(until=4)
    path.unlink()  # to make room
    trainer.learn()
    assert [(row["update"], row["mine"]) for row in table(path)] == [
        (str(u), "mine" if u <= 2 else "") for u in range(1, 9)
    ]


def test_a_late_evaluation_leaves_the_rows_before_it_alone(tmp_path, monkeypatch, straight):
    path = tmp_path / "metrics.csv"
    written, real = [], callbacks.atomic_write
    monkeypatch.setattr(callbacks, "atomic_write", lambda path, data: (written.append(path), real(path, data)))
    FakeTrainer([MetricsCSV(path, EVALUATED)], delay=1).learn()
    assert table(path) == straight and written == [path]  # at the first row
    monkeypatch.setitem(SCORES, 12, 50.0)
    trainer = FakeTrainer([MetricsCSV(path, EVALUATED)], updates=500, delay=400).learn()
    assert [int(row["update"]) for row in table(path) if row["eval_score"]] == list(SCORES) and len(written) == 2
    assert len(trainer.callbacks[0].path.read_text().splitlines()) == 501


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events_of(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir)).Reload()


def close_as_older(tensorboard):
    """Event files are read in the order of their names, which begin with the second."""
    tensorboard.close()
    (file,) = tensorboard.run_dir.glob("events*")
    file.rename(file.with_name("events.out.tfevents.1"))


def eval_scores(run_dir):
    return [(e.step, e.value) for e in events_of(run_dir).Scalars("eval/score")]


def test_tensorboard(tmp_path):
    killed = FakeTrainer([TensorBoard(tmp_path)]).learn(until=5)  # its last checkpoint is of update 3
    close_as_older(killed.callbacks[0])
    FakeTrainer([TensorBoard(tmp_path)], start=3).learn()
    events = events_of(tmp_path)
    tags = events.Tags()["scalars"]
    losses = {f"losses/{name}" for name in STATS if name != "lr"}
    charts = {"charts/lr", "charts/steps_per_second", "charts/episode_return"}
    evals = {f"eval/{n}" for n in "score min max cleared games length returned".split()}
    assert set(tags) == losses | charts | evals
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]
    assert [e.step for e in events.Scalars("charts/lr")] == [100 * u for u in range(1, 9)]  # none twice


def test_an_evaluation_that_a_resumed_run_repeats_is_logged_once(tmp_path):
    def watching():
        return [MetricsCSV(tmp_path / "metrics.csv", EVALUATED), TensorBoard(tmp_path)]

    killed = FakeTrainer(watching(), delay=1).learn(
        until=5
    )  # the result of update 4 has come; the last checkpoint still waits for it
    close_as_older(killed.callbacks[1])
    assert (400, SCORES[4]) in eval_scores(tmp_path)
    resumed = FakeTrainer(watching(), start=4, delay=1)
    resumed.begin_evaluation(SCORES[4])
    resumed.learn()
    assert eval_scores(tmp_path) == [(100 * u, s) for u, s in SCORES.items()]
    assert [(e.step, e.value) for e in events_of(tmp_path).Scalars("losses/entropy")] == [
        (100 * u, pytest.approx(u / 5)) for u in range(1, 9)
    ]


def test_a_run_that_begins_again_hides_what_it_logged_before(tmp_path):
    """It is resumed from the checkpoint before the first update."""
    close_as_older(FakeTrainer([TensorBoard(tmp_path)]).learn(until=3).callbacks[0])
    FakeTrainer([TensorBoard(tmp_path)]).learn()
    assert [e.step for e in events_of(tmp_path).Scalars("charts/lr")] == [100 * u for u in range(1, 9)]


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    FakeTrainer(
        [MetricsCSV(tmp_path / "metrics.csv"), LearningCurve(tmp_path / "curve.png", tmp_path / "metrics.csv")]
    ).learn()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "import of matplotlib.figure halted" in out and "install it with pip" in out
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    FakeTrainer([TensorBoard(tmp_path)]).learn()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "import of torch.utils.tensorboard halted" in out and "install it with pip" in out
    assert not os.listdir(tmp_path)


def test_tensorboard_on_a_full_disk(tmp_path, capsys):
    ppo = FakeTrainer([TensorBoard(tmp_path)])
    ppo.emit("on_training_start")
    ppo.callbacks[0].writer = SimpleNamespace(add_scalar=disk_full, close=disk_full)
    ppo.stats = {"lr": 1.0}
    ppo.emit("on_update_end")
    ppo.emit("on_update_end")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "No space left" in out


# --- the learning curve -----------------------------------------------------------------------------------------------


def test_learning_curve_is_drawn_when_its_evaluation_is_in_the_file(tmp_path, monkeypatch):
    seen, real = [], callbacks.learning_curve
    monkeypatch.setattr(
        callbacks, "learning_curve", lambda rows, levels: (seen.append(len(rows)), real(rows, levels))[1]
    )
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: 0.0)  # a machine that draws in no time
    csv, png = tmp_path / "metrics.csv", tmp_path / "learning_curve.png"
    FakeTrainer([MetricsCSV(csv, EVALUATED), LearningCurve(png, csv)]).learn()
    assert seen == [2, 4, 6, 8, 8]
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 400
    assert sorted(os.listdir(tmp_path)) == ["learning_curve.png", "metrics.csv"]


def test_learning_curve_is_not_drawn_all_the_time(tmp_path, monkeypatch):
    """It takes a second here: the next is drawn 20 seconds later at the earliest, or when training is stopped."""
    clock, drawn = [0.0], []

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


def test_learning_curve_shows_the_scores(tmp_path):
    csv = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(csv, EVALUATED)]).learn()
    rows = read_metrics(csv)
    figure = callbacks.learning_curve(rows, LEVELS)
    steps, minutes = figure.axes
    lines = {line.get_label().split(":")[0]: line for line in steps.get_lines()}
    assert set(lines["random play"].get_ydata()) == {82}
    assert set(lines["the best"].get_ydata()) == {960}
    assert lines["evaluation"].get_xydata().tolist() == [[100 * u, s] for u, s in SCORES.items()]
    assert minutes.get_lines()[2].get_xdata().tolist() == pytest.approx([u * 1.5 / 60 for u in SCORES])
    assert steps.get_ylim() == minutes.get_ylim() and steps.get_ylim()[0] == 0 and steps.get_ylim()[1] > 960
    assert (steps.get_xlabel(), minutes.get_xlabel()) == ("steps", "minutes")
    for row in rows:
        row["global_step"] *= 100
    steps = callbacks.learning_curve(rows, LEVELS).axes[0]
    assert steps.get_xlabel() == "thousand environment steps" and steps.get_lines()[2].get_xdata().tolist() == [
        10 * u for u in SCORES
    ]


def test_a_cell_that_holds_no_number_is_left_out_of_the_curve(tmp_path):
    path = tmp_path / "metrics.csv"
    FakeTrainer([MetricsCSV(path, EVALUATED)]).learn()
    for old, new in (
        (",90.0,", ',"81,25",'),
        (",250.0,", ",n/a,"),
        (",300.0,", ",inf,"),
        ("\n5,500,", "\n5,,"),
        (",70.0,", ",yes,"),
    ):
        path.write_text(path.read_text().replace(old, new))
    steps = callbacks.learning_curve(read_metrics(path), LEVELS).axes[0]
    assert steps.get_lines()[2].get_xydata().tolist() == [[800, 400]]
    LearningCurve(tmp_path / "curve.png", path).draw()
    FakeTrainer([MetricsCSV(path, EVALUATED)], updates=9, start=8).learn()
    assert [row["eval_score"] for row in table(path)] == [
        "",
        "81,25",
        "",
        "inf",
        "",
        "n/a",
        "",
        "400.0",
        "",
    ]  # the cells stay as they are


def test_a_figure_needs_no_backend(monkeypatch):
    """matplotlib refuses to be imported with one that is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for tried_before in (False, True):
        monkeypatch.setenv("MPLBACKEND", "not_installed")
        if tried_before:
            for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
                del sys.modules[name]
            with pytest.raises(ValueError, match="is not a valid value for backend"):
                import matplotlib.figure  # noqa: F401
        image = io.BytesIO()
        callbacks.new_figure(1, 1).savefig(image, format="png")
        assert image.getvalue().startswith(b"\x89PNG")


def test_learning_curve_of_nothing(tmp_path):
    LearningCurve(tmp_path / "curve.png", tmp_path / "missing.csv").draw()
    assert (tmp_path / "curve.png").stat().st_size > 1000


# --- checkpoints ------------------------------------------------------------------------------------------------------


def updates(run_dir):
    """name: the update at which it was saved."""
    return {path.name: load_checkpoint(path)["update_count"] for path in run_dir.glob("*.pt")}


def test_checkpoints(tmp_path):
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)])
    ppo.learn(until=6)
    assert updates(tmp_path) == {"last.pt": 6, "checkpoint_5.pt": 5, "checkpoint_6.pt": 6, "best_model.pt": 4}
    assert "best_score" not in load_checkpoint(tmp_path / "best_model.pt")  # the smaller state
    assert load_checkpoint(tmp_path)["best_score"] == 300


def test_stages_of_a_training_stay(tmp_path):
    """The start, and what is saved after a tenth of 40 updates."""
    FakeTrainer([Checkpoints(tmp_path, save_freq=3, keep=1, keep_stages=True)], updates=40).learn()
    assert {"checkpoint_0.pt": 0, "checkpoint_6.pt": 6, "checkpoint_39.pt": 39}.items() <= updates(tmp_path).items()
    assert len(list(tmp_path.glob("checkpoint_*.pt"))) == 3


def test_the_newest_three_checkpoints_stay_and_without_evaluations_there_is_no_best_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SCORES", {})
    FakeTrainer([Checkpoints(tmp_path, save_freq=1)], updates=5).learn()
    assert updates(tmp_path) == {"last.pt": 5, "checkpoint_3.pt": 3, "checkpoint_4.pt": 4, "checkpoint_5.pt": 5}


def test_last_is_saved_at_the_end(tmp_path):
    FakeTrainer([Checkpoints(tmp_path, save_freq=5)], updates=7).learn()
    assert updates(tmp_path) == {"last.pt": 7, "checkpoint_5.pt": 5, "best_model.pt": 4}


def test_there_is_something_to_resume_from_the_start(tmp_path):
    FakeTrainer([Checkpoints(tmp_path, save_freq=100)]).learn(until=1)
    assert updates(tmp_path) == {"last.pt": 0}


def test_a_best_model_that_could_not_be_saved_is_saved_later(tmp_path, monkeypatch, capsys):
    """The best score comes with update 4, on a full disk; the disk has room again from update 6."""
    monkeypatch.setattr(sys.modules[__name__], "SCORES", {4: 300.0})
    ppo, fsync = FakeTrainer([Checkpoints(tmp_path, save_freq=100)]), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: fsync(fd) if ppo.update_count not in (4, 5) else disk_full())
    ppo.learn(until=5)
    assert "best_model.pt" not in updates(tmp_path)
    ppo.update_count = 5
    ppo.learn(until=6)
    assert updates(tmp_path)["best_model.pt"] == 4


def test_checkpoints_left_from_before_a_resume_do_not_push_out_new_ones(tmp_path):
    FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)]).learn(until=8)
    for name in ("checkpoint_7.pt", "checkpoint_8.pt"):
        os.utime(tmp_path / name, (1, 1))  # long ago
    (tmp_path / "checkpoint_mine.pt").write_bytes(b"")  # not ours to delete
    FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)], start=3).learn(until=5)
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == [
        "checkpoint_4.pt",
        "checkpoint_5.pt",
        "checkpoint_mine.pt",
    ]


def test_links_to_nothing_and_directories_among_the_checkpoints_stop_nothing(tmp_path):
    (tmp_path / "checkpoint_9.pt").symlink_to("gone")
    (tmp_path / "checkpoint_8.pt").mkdir()
    FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)]).learn(until=5)
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == [f"checkpoint_{i}.pt" for i in (4, 5, 8, 9)]


def test_the_newest_checkpoint_stays_when_the_clock_has_been_set_back(tmp_path):
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=2)])
    ppo.learn(until=2)
    for file in tmp_path.glob("checkpoint_*"):
        os.utime(file, (4e9, 4e9))  # as if written in the year 2096
    ppo.learn(until=3)
    assert "checkpoint_3.pt" in updates(tmp_path) and len(updates(tmp_path)) == 4


def test_a_full_disk_keeps_the_old_files(tmp_path, monkeypatch, capsys):
    ppo = FakeTrainer([Checkpoints(tmp_path, save_freq=1, keep=1)])
    ppo.learn(until=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        ppo.learn(until=5)
    assert updates(tmp_path) == {"last.pt": 2, "checkpoint_2.pt": 2, "best_model.pt": 2}
    assert all(line.startswith("warning: ") for line in capsys.readouterr().out.splitlines())
    ppo.learn()
    assert updates(tmp_path) == {"last.pt": 8, "checkpoint_8.pt": 8, "best_model.pt": 8}
