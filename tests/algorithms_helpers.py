"""Helpers for the tests of algorithms/: small trainings that are stopped and resumed."""

import csv
import json

import torch
from helpers import explained, logged_columns
from PIL import Image, ImageSequence

from algorithms.parts.training import run_algorithm
from harness.checkpoint import load_checkpoint


class NoProcess:
    """Stands in for Background: evaluates in this process and at once."""

    def __init__(self, evaluate, processes):
        self.evaluate = evaluate
        self.processes = processes

    def submit(self, state):
        return Done(self.evaluate(state))

    def close(self):
        pass


class Done:
    """An evaluation that has ended, with the methods of a Future."""

    def __init__(self, evaluation):
        self.evaluation = evaluation

    def done(self):
        return True

    def result(self):
        return self.evaluation


def durations(path):
    """Return for how many milliseconds a gif shows each of its frames."""
    with Image.open(path) as gif:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]


def run(algorithm, *words):
    """Run a training with these words of a command line, and return the exit status."""
    return run_algorithm(algorithm, words)


def reports_of_an_update(trainer, monkeypatch):
    """Do an update, and return what the trainer reports meanwhile: [(what it does, environment steps so far)]."""
    reports = []

    def emit(event):
        if event == "on_progress":
            reports.append((trainer.doing.rpartition(" ")[0], trainer.global_step + trainer.unfinished_steps))

    monkeypatch.setattr("trainer.REPORT_INTERVAL", -1.0)
    monkeypatch.setattr(trainer, "emit", emit)
    trainer.collect_and_update()
    return reports


def states_of_a_straight_and_a_resumed_run(algorithm, small, tmp_path, steps, stop_at):
    """Train to `steps` in one run, and in another that ends at `stop_at`, is evaluated there, and is resumed.

    Returns the last state and the rows of metrics.csv of each run, without timings and evaluations.
    """
    assert run(algorithm, *small.split(), "--num_steps", steps, "--run_dir", tmp_path / "straight") == 0
    assert logged_columns(tmp_path / "straight") == explained(algorithm.name)  # in docs/glossary.md
    assert run(algorithm, *small.split(), "--num_steps", stop_at, "--run_dir", tmp_path / "stopped") == 0
    assert run(algorithm, "--resume", tmp_path / "stopped", "--num_steps", steps) == 0
    return [(plain(load_checkpoint(tmp_path / name)), logged(tmp_path / name)) for name in ("straight", "stopped")]


def plain(state):
    """Return a state without what two equal runs may differ in."""
    return {name: x for name, x in state.items() if name not in ("seconds", "constants", "best_score", "run_id")}


def logged(run_dir):
    """Return the rows of metrics.csv, without what two equal runs may differ in."""
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["steps_per_second"], row["eval_score"]
    return rows


def same(a, b):
    """Return whether two states are equal, bit for bit; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    both_nan = a != a and b != b
    return a == b or both_nan


def evaluated(algorithm, model, capsys, *words):
    """Evaluate a model, by default the one that `--evaluate` finds, and return the JSON that it prints."""
    capsys.readouterr()
    assert run(algorithm, "--evaluate", *([model] if model else []), *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert {f"eval_{name}" for name in result} == explained(algorithm.name, evaluation=True)  # in docs/glossary.md
    return result
