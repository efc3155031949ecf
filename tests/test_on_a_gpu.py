"""What is measured on a GPU in one visit, tried out on the CPU with small sizes and with programs that do nothing."""

import json
import re
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest
import torch
from helpers import device_trainer
from software_graph import use_software_graphs

from benchmarks import first_update, on_a_gpu
from fast.cuda_graphs import COMPILE, GRAPHS
from harness.checkpoint import load_checkpoint
from harness.options import CommandLineError
from model import GPTConfig

# first_update.py


def test_the_first_update_is_timed_and_learns_the_same(monkeypatch):
    """Both steps are recorded and replayed, and the weights are those of a training without a stopwatch."""
    config = dict(num_envs=8, rollout_steps=6, batch_size=8, num_steps=96)
    plain = device_trainer(**config)
    plain.learn()
    tapes = use_software_graphs(monkeypatch)
    trainer = device_trainer(**config)
    runner = first_update.TimedRunner([GRAPHS, COMPILE], without=[COMPILE])
    ppo = first_update.TimedPPO(trainer.policy, trainer.env, trainer.config, runner=runner)
    result = first_update.measure(ppo, updates=1)
    assert len(tapes) == 2 and result["shortcuts"] == [GRAPHS] and torch.equal(ppo.weights, plain.weights)
    assert {check["name"][0] for check in result["checks"]} == set("ABCD")
    steps = [f"step of the {name}, call {n}" for name in ("rollout", "gradient") for n in (1, 2, 3, 4)]
    rest = ["checks after", "checks before", "rest of the gradient steps", "rest of the rollouts"]
    assert sorted(result["parts of it, s"]) == sorted(steps + rest)
    assert result["first update, s"] == pytest.approx(sum(result["parts of it, s"].values()))
    assert result["steps/s"] > 0 and json.loads(json.dumps(result)) == result


def test_a_part_is_timed_without_the_parts_within_it(monkeypatch):
    """Time is read from a clock that ticks once for each reading."""
    readings = iter(range(10**6))
    monkeypatch.setattr(first_update.time, "perf_counter", lambda: float(next(readings)))
    watch = first_update.Stopwatch()
    with watch.part("outer"):
        for _ in range(2):
            with watch.part("inner"):
                pass
    assert watch.seconds == {"outer": 5 - 2, "inner": 2}


# on_a_gpu.py

METRICS = """update,global_step,seconds,steps_per_second,eval_score
1,16384,9,2000,
2,32768,10,150000,310.5
3,49152,11,160000,960
4,65536,12,140000,945
"""
ALL = [
    "one_layer_cold",
    "one_layer_warm",
    "one_layer_not_compiled",
    "training_cold",
    "training_warm",
    "six_layers_6_heads",
    "six_layers_3_heads",
    "six_layers_2_heads",
    "six_layers_training",
]


class Programs:
    """Stands in for `start_program`: a program has its figures at once, or ends as it is told here.

    Args:
        fates: {part: what its program prints before it fails, or the exception that waiting for it raises}.
    """

    def __init__(self, fates):
        self.fates = fates
        self.started = {}  # {part: (command, directory of the cache)}

    def __call__(self, command, environment, cwd, stdout, stderr):
        command = list(map(str, command))
        option = next(word for word in ("--json", "--run_dir", "--resume") if word in command)
        place = Path(command[command.index(option) + 1])
        self.started[place.stem] = command, environment["TORCHINDUCTOR_CACHE_DIR"]
        fate = self.fates.get(place.stem)
        if option == "--json" and fate is None:
            speed = 900.0 if place.stem == "six_layers_3_heads" else 700.0
            figures = {"first update, s": 4.5, "steps/s": speed, "checks": [{"name": "D weights", "passed": True}]}
            place.write_text(json.dumps(figures), encoding="utf-8")
        elif option == "--run_dir":
            place.mkdir()
            (place / "metrics.csv").write_text(METRICS, encoding="utf-8")
            (place / "last.safetensors").touch()
        stdout.write(fate if isinstance(fate, str) else "warning: no compiler; going on without torch.compile\n")

        def wait(limit):
            if isinstance(fate, BaseException):
                raise fate
            return int(isinstance(fate, str))

        return SimpleNamespace(poll=lambda: 0, wait=wait)


@pytest.fixture
def visit(tmp_path, monkeypatch, capsys):
    """Return a function that makes a visit with `Programs`.

    It returns the exit status, {part: its row in the table}, the JSON, and the programs that were started.
    """

    def make(fates=None, minutes=10):
        programs = Programs(fates or {})
        monkeypatch.setattr(on_a_gpu, "start_program", programs)
        status = None
        try:
            status = on_a_gpu.main(["--device", "cpu", "--out", tmp_path, "--minutes", minutes, "--lr", "0.001"])
        except KeyboardInterrupt:
            pass
        lines = [line.strip("|").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        return status, rows, json.loads((tmp_path / "on_a_gpu.json").read_text(encoding="utf-8")), programs.started

    return make


def test_every_part_has_a_row(visit):
    """What fails or takes too long says so there."""
    traceback = 'Traceback (most recent call last):\n  File "x", line 1\nRuntimeError: CUDA error\nread the manual\n'
    fates = {"six_layers_6_heads": traceback, "one_layer_not_compiled": TimeoutExpired("program", 50)}
    status, rows, figures, started = visit(fates)
    assert status == 1 and list(started) == ALL and list(rows) == list(figures)
    assert rows["six layers, 6 heads"]["remarks"] == "not measured: RuntimeError: CUDA error"
    assert rows["one layer, not compiled"]["remarks"] == "not measured: took longer than 50 s"
    row = rows["one layer, cold"]
    assert [row[name] for name in ("first update, s", "steps/s", "checks")] == ["4.50", "700", "1 of 1"]
    row = rows["training, cold"]
    reached = [row[f"{mark} points, s"] for mark in (300, 600, 900, 960)]
    assert reached == ["10", "11", "11", "11"]
    assert [row[name] for name in ("steps/s", "best", "last", "steps")] == ["150,000", "960", "945", "65,536"]
    assert row["remarks"] == "warning: no compiler; going on without torch.compile"
    assert figures["training, cold"]["device"].startswith("cpu, torch 2.")


def test_what_the_programs_are_told(visit):
    """Cold programs find an empty cache, and warm ones the same cache. The fastest heads are trained."""
    *_, started = visit()
    caches = {part: cache for part, (_, cache) in started.items()}
    assert caches["one_layer_cold"] == caches["one_layer_warm"] != caches["training_cold"] == caches["training_warm"]
    assert all(command[-4:] == ["--device", "cpu", "--lr", "0.001"] for command, _ in started.values())
    command, _ = started["six_layers_training"]
    assert command[1] == "train_ppo.py" and command[command.index("--n_head") + 1] == "3"
    assert "compile" in started["one_layer_not_compiled"][0]


def test_the_next_visit_measures_what_is_missing(visit):
    """A warm program needs the cold one before it, and every visit goes on with the training of six layers."""
    visit({"training_warm": "no\n", "six_layers_2_heads": "no\n"})
    status, rows, _, started = visit()
    assert status == 0 and len(rows) == len(ALL)
    assert list(started) == ["training_cold", "training_warm", "six_layers_2_heads", "six_layers_training"]
    command, _ = started["six_layers_training"]
    assert "--resume" in command and "--n_head" not in command
    status, rows, _, started = visit({"six_layers_training": "it has done 65,536 steps already\n"})
    assert status == 0 and list(started) == ["six_layers_training"]
    row = rows["six layers, training"]
    assert row["steps"] == "65,536" and row["remarks"] == "complete: it has done 65,536 steps already"


def test_what_does_not_fit_into_the_time_is_skipped(visit):
    """The rest is measured."""
    status, rows, _, started = visit(minutes=2)
    assert status == 1 and list(started) == ["one_layer_not_compiled", "six_layers_training"]
    skipped = "not measured: needs 100 s and (90|89) s are left; start again with this --out"
    assert re.fullmatch(skipped, rows["one layer, cold"]["remarks"])
    reason = "not measured: its cache is not filled, because 'one layer, cold' was not measured"
    assert rows["one layer, warm"]["remarks"] == reason


def test_an_interrupt_keeps_what_was_measured(visit):
    """The table is printed, and the next visit begins with the part that was interrupted."""
    status, rows, figures, started = visit({"training_cold": KeyboardInterrupt()})
    assert status is None and list(started) == ALL[:4] and list(rows) == list(figures)
    assert rows["one layer, warm"]["remarks"].startswith("warning: no compiler")
    assert rows["training, cold"]["remarks"] == "not measured: interrupted"
    *_, started = visit()
    assert list(started) == ALL[3:]


def test_a_damaged_file_of_results_is_refused(visit, tmp_path):
    """Nothing is overwritten."""
    (tmp_path / "on_a_gpu.json").write_text("{", encoding="utf-8")
    with pytest.raises(CommandLineError, match="on_a_gpu.json: is damaged; move it away, or name another --out"):
        visit()


def test_a_checkpoint_of_six_layers_is_small():
    """Weights, gradients' moments and a state that waits for its evaluation fit into a file that is easy to carry."""
    sizes = dict(zip(*[iter(word.removeprefix("--") for word in on_a_gpu.SIX_LAYERS)] * 2))
    config = GPTConfig(24, 81, " #|_=O\n", n_action=3, n_head=6, **{name: int(x) for name, x in sizes.items()})
    assert 4 * 4 * config.num_parameters < 10e6


@pytest.mark.faults
def test_two_visits_on_the_cpu(tmp_path, monkeypatch, capsys):
    """The real programs run, and the second visit goes on where the first was."""
    monkeypatch.setattr(on_a_gpu, "SIX_LAYERS", ["--n_layer", "2"])
    monkeypatch.setattr(on_a_gpu, "HEADS", (2,))
    sizes = "--n_head 2 --n_embd 8 --num_envs 4 --rollout_steps 4 --batch_size 8 --epochs 1 --eval_interval 0"
    small = ["--device", "cpu", "--out", tmp_path, *sizes.split()]
    assert on_a_gpu.main([*small, "--num_steps", "32"]) == 0
    assert "| C gradient | " in capsys.readouterr().out  # the checks, one by one
    assert load_checkpoint(tmp_path / "six_layers_training")["global_step"] == 32
    assert on_a_gpu.main([*small, "--num_steps", "64"]) == 0
    assert "C gradient" not in capsys.readouterr().out
    figures = json.loads((tmp_path / "on_a_gpu.json").read_text(encoding="utf-8"))
    assert [figures[part]["steps"] for part in ("training, cold", "six layers, training")] == [32, 64]
    for part in ("one layer, cold", "six layers, 2 heads"):
        assert figures[part]["first update, s"] > 0 and all(check["passed"] for check in figures[part]["checks"])
    assert all(file.stat().st_size < 1e6 for file in tmp_path.rglob("*"))


@pytest.mark.faults
def test_a_training_whose_time_is_over_is_saved(tmp_path):
    """It goes on from there in the next visit."""
    visit = on_a_gpu.Visit(tmp_path, tmp_path / "caches", torch.device("cpu"), [], end=0.0, results={})
    sizes = "--n_head 2 --n_embd 8 --num_envs 4 --rollout_steps 4 --batch_size 8 --save_freq 1000000"
    command = ["train_ppo.py", "--run_dir", tmp_path / "run", *sizes.split(), "--device", "cpu", "--eval_interval", "0"]
    seconds, status = visit.run_program(command, tmp_path / "log", 30, tmp_path / "cache")
    assert 30 <= seconds < 30 + on_a_gpu.GRACE and status is None
    assert load_checkpoint(tmp_path / "run")["global_step"] > 0
