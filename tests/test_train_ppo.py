import contextlib
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import callbacks
import ppo
import train_ppo
from fast import DeviceBreakout
from harness import runs, supervise
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.device import DeviceError
from harness.options import CommandLineError, Values
from harness.supervise import StopTraining, interrupt, less_memory, signals_handled
from ppo import PPO
from train_ppo import CONSTANTS, check, main

ROOT = Path(__file__).parent.parent
SMALL = "--num_envs 4 --rollout_steps 8 --batch_size 16 --epochs 2 --n_head 4 --n_embd 16 --device cpu"
SMALL += f" --num_steps {6 * 32} --eval_interval 2 --save_freq 2"


def done(result):
    future = Future()
    future.set_result(result)
    return future


class AtOnce:
    """Background, without processes."""

    def __init__(self, evaluate, processes):
        self.processes, self.evaluate = processes, evaluate

    def submit(self, state):
        return done(cheap_evaluation(state))

    def close(self):
        pass


def cheap_evaluation(state):
    score = 100 * sum(x.abs().sum().item() for x in state["model"].values()) % 960
    return {"score": score, "min": 0, "max": 960, "cleared": 0, "games": 32, "length": 9.0, "returned": 0.5}


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    monkeypatch.setattr(callbacks, "Background", AtOnce)


def run(tmp_path, name, *more):
    return main([*SMALL.split(), "--run_dir", str(tmp_path / name), *more])


def logged(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in csv.DictReader(file)
        ]


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x and y != y


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The directory of a run of six updates that nothing interrupts."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(callbacks, "Background", AtOnce)
        assert run(tmp_path_factory.mktemp("run"), "straight") == 0
    return tmp_path_factory.getbasetemp() / "run0" / "straight"


def assert_the_same_run(straight, other):
    """Parameters, optimizer, random numbers and rows, bit for bit."""
    states = [load_checkpoint(run_dir) for run_dir in (straight, other)]
    for state in states:
        assert state.pop("seconds") > 0 and state.pop("run_id") and state["constants"].pop("RUN_DIR")
    assert states[0]["update_count"] == 6 and same(*states)
    assert len(logged(straight)) == 6 and logged(straight) == logged(other)


@pytest.mark.parametrize(
    "signum, status, place, call, update",
    [
        (signal.SIGINT, 130, (PPO, "train_step"), 3 * 4 + 1, 3),
        (signal.SIGTERM, 143, (PPO, "train_step"), 3 * 4 + 3, 3),
        (signal.SIGHUP, 129, (PPO, "rollout_step"), 3 * 8 + 5, 3),
        (signal.SIGQUIT, 131, (AtOnce, "submit"), 2, 4),
        (signal.SIGINT, 130, (os, "fsync"), 10, None),
    ],
)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(
    straight, tmp_path, monkeypatch, capsys, signum, status, place, call, update
):
    """Six updates; and some, a signal in the midst of an update, a rollout, an evaluation or a save, and the rest."""
    interrupt, calls = getattr(*place), []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return interrupt(*args)

    with monkeypatch.context() as m:
        m.setattr(*place, interrupted)
        assert run(tmp_path, "stopped") == status
    if place[0] is PPO:
        assert len(calls) == call  # the minibatch was finished, and no other begun
    assert f"go on with: python train_ppo.py --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "stopped")["update_count"] == update or not update
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    assert_the_same_run(straight, tmp_path / "stopped")
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


def test_a_second_ctrl_c_while_files_are_closed_leaves_at_once(tmp_path, monkeypatch):
    """In a program of ours it would be a KeyboardInterrupt, and a traceback, in the middle of some library."""
    update, close, handlers = PPO.update, callbacks.TensorBoard.close, []
    monkeypatch.setattr(PPO, "update", lambda self: os.kill(os.getpid(), signal.SIGINT) or update(self))
    monkeypatch.setattr(
        callbacks.TensorBoard, "close", lambda self: handlers.append(signal.getsignal(signal.SIGINT)) or close(self)
    )
    with signals_handled(interrupt):  # as run_script does
        assert run(tmp_path, "run") == 130
    assert run(tmp_path, "called") == 130 and handlers == [signal.SIG_DFL, signal.default_int_handler]


def test_a_disk_that_is_full_for_a_while_loses_nothing(straight, tmp_path, monkeypatch, capsys):
    """During updates 3 and 4 no file may grow beyond 1000 bytes: not the log, the plot, nor a checkpoint."""
    resource, update, limits = pytest.importorskip("resource"), PPO.update, []

    def limited(self):
        soft, hard = limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if self.update_count in (2, 3) else soft, hard))
        if self.update_count == 4:
            assert (
                load_checkpoint(tmp_path / "run")["update_count"] == 2
            )  # whole, though an attempt to replace it has failed
        return update(self)

    limits.append(resource.getrlimit(resource.RLIMIT_FSIZE))
    monkeypatch.setattr(PPO, "update", limited)
    try:
        assert run(tmp_path, "run") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits[0])
    assert_the_same_run(straight, tmp_path / "run")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    for name in ("metrics.csv", "last.safetensors", "checkpoint_4.safetensors", "learning_curve.png"):
        assert any(name in line and "File too large" in line and "training goes on" in line for line in warnings)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_another_process_in_the_same_run_is_refused_until_it_dies(straight, tmp_path):
    run_dir = shutil.copytree(straight, tmp_path / "run")
    (run_dir / "checkpoint_9.safetensors.tmp").write_bytes(b"half")  # what a kill left
    owner = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", owner, str(run_dir / "run.lock")]

    def times():
        files = [file for file in run_dir.iterdir() if file.name != "run.lock"]  # some versions of filelock touch it
        return {file: file.stat().st_mtime_ns for file in files}

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = times()
        with pytest.raises(CommandLineError, match="run: another process is training this run; stop that one first"):
            main(["--resume", str(run_dir), "--num_steps", str(7 * 32)])
        assert times() == before
        process.kill()
    assert main(["--resume", str(run_dir), "--num_steps", str(7 * 32)]) == 0
    assert [row["update"] for row in logged(run_dir)] == list("1234567") and not list(run_dir.glob("*.tmp"))


def test_a_run_killed_before_its_first_checkpoint_can_be_begun_again(straight, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.json", "run.lock", "events.out.tfevents.1", "last.safetensors.tmp"):
        (run_dir / name).write_bytes(b'{"RUN_DIR": "run"}')
    with pytest.raises(
        CommandLineError, match=f"was stopped before its first checkpoint; begin it again with --run_dir {run_dir}"
    ):
        main(["--resume", str(run_dir)])
    assert run(tmp_path, "run") == 0
    assert_the_same_run(straight, run_dir)


def test_directories_that_cannot_be_written_are_refused_before_the_first_step(straight, monkeypatch):
    monkeypatch.setattr(PPO, "collect", None)
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(straight, f"{folder}/run")
        for directory in (folder, f"{folder}/run"):
            os.chmod(directory, 0o555)
        try:
            if root:  # whom permissions do not stop
                os.seteuid(65534)
            with pytest.raises(
                CommandLineError, match="new cannot be made .Permission denied.; name another --run_dir"
            ):
                run(Path(folder), "new")
            with pytest.raises(
                CommandLineError, match="run cannot be written .Permission denied.; check its permissions"
            ):
                main(["--resume", f"{folder}/run", "--num_steps", "999"])
        finally:
            if root:
                os.seteuid(0)
            for directory in (folder, f"{folder}/run"):
                os.chmod(directory, 0o755)


def test_weights_that_are_not_finite_end_the_training_before_they_are_saved(tmp_path, monkeypatch, capsys):
    def spoiled(self):
        stats = update(self)
        if self.update_count == 3:
            self.weights.data[5] = math.inf
        return stats

    update = PPO.update
    monkeypatch.setattr(PPO, "update", spoiled)
    assert run(tmp_path, "run", "--save_freq", "1") == 1
    assert re.search("weights are not finite after update 3.*--resume .*run --lr ", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


def test_a_reward_that_is_not_finite_ends_the_training(tmp_path, monkeypatch, capsys):
    step = train_ppo.BreakoutAsciiVec.step

    def spoiled(self, actions):
        obs, rewards, *rest = step(self, actions)
        return obs, rewards * (math.nan if self.games.elapsed.max() > 20 else 1), *rest

    monkeypatch.setattr(train_ppo.BreakoutAsciiVec, "step", spoiled)
    assert run(tmp_path, "run", "--paired_envs", "false") == 1
    printed = capsys.readouterr().err
    assert (
        re.search("the rewards are not finite in update 3; mend what gives them.*--resume .*run\n", printed)
        and "--lr" not in printed
    )
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


def test_models_too_large_are_named_before_they_are_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train_ppo, "build", None)
    with pytest.raises(
        CommandLineError,
        match="a GPT of .* parameters needs .* GB or more to train, and cpu has .*; try a smaller --n_embd",
    ):
        run(tmp_path, "run", "--n_embd", "8192", "--n_layer", "1024")
    assert not (tmp_path / "run").exists()
    c = SimpleNamespace(**CONSTANTS | {"N_EMBD": 2048, "N_LAYER": 2})
    train_ppo.check_memory(c, torch.device("cpu"))
    assert "Building a GPT of 101,126,253 parameters; training needs 2 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "batch, ranks, smaller", [(512, 1, 256), (66, 1, 33), (33, 1, 12), (2, 1, None), (64, 2, 32), (2, 2, None)]
)
def test_the_batch_that_is_advised_can_be_trained(monkeypatch, batch, ranks, smaller):
    monkeypatch.setattr(train_ppo, "RANKS", ranks)
    constants = CONSTANTS | {
        "NUM_ENVS": 66 if batch in (66, 33) else 64,
        "ROLLOUT_STEPS": 2 if batch in (66, 33) else 8,
        "BATCH_SIZE": batch,
    }
    assert less_memory(constants, ["BATCH_SIZE"], CONSTANTS, check) == (f" --batch_size {smaller}" if smaller else "")
    shorter = less_memory(
        constants | {"BATCH_SIZE": 2}, ["BATCH_SIZE", "ROLLOUT_STEPS"], CONSTANTS, check
    )  # the batch is as small as can be
    assert shorter == f" --rollout_steps {constants['ROLLOUT_STEPS'] // 2}"


def test_what_a_run_leaves(tmp_path):
    run(tmp_path, "run")
    names = {file.name for file in (tmp_path / "run").iterdir() if "tfevents" not in file.name}
    assert names == {
        "config.json",
        "run.lock",
        "metrics.csv",
        "learning_curve.png",
        "best_model.safetensors",
        "last.safetensors",
        "checkpoint_0.safetensors",
        "checkpoint_2.safetensors",
        "checkpoint_4.safetensors",
        "checkpoint_6.safetensors",
    }
    constants = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        constants == {**CONSTANTS, **constants}
        and constants["NUM_ENVS"] == 4
        and constants["GAMMA"] == CONSTANTS["GAMMA"]
    )
    best = load_checkpoint(tmp_path / "run" / "best_model.safetensors")
    assert best["evaluation"]["score"] == max(float(row["eval_score"] or 0) for row in logged(tmp_path / "run"))
    assert "optimizer" not in best and best["constants"] | {"RUN_ID": best["run_id"]} == constants
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").split("## Columns")[1].split("## Stopping")[0]
    documented = set(re.findall(r"^\| `(.*?)` \|", page, re.M))
    assert documented == {*logged(tmp_path / "run")[0], "seconds", "steps_per_second"}


def test_one_seed_one_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, name, "--seed", str(seed))
    assert logged(tmp_path / "a") == logged(tmp_path / "b") != logged(tmp_path / "c")


def test_a_finished_run_can_be_made_longer(tmp_path, monkeypatch):
    """Its learning rate jumps to that of the longer training, lambda goes on, its seconds go on counting, and no constant that was edited
    meanwhile reaches it."""
    lambds, gae_lambda = [], ppo.gae_lambda
    monkeypatch.setattr(ppo, "gae_lambda", lambda *args: lambds.append(gae_lambda(*args)) or lambds[-1])
    run(tmp_path, "run", "--lambd_steps", str(7 * 32))
    monkeypatch.setattr(train_ppo, "GAMMA", 0.5)
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", str(8 * 32), "--num_envs", "4"]) == 0
    rows = logged(tmp_path / "run")
    assert [row["update"] for row in rows] == [str(i) for i in range(1, 9)]
    lr, min_lr = CONSTANTS["LR"], CONSTANTS["MIN_LR"]
    planned = [min_lr + (lr - min_lr) * math.cos(math.pi / 2 * i / (6 if i < 6 else 8)) ** 2 for i in range(8)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(planned, rel=1e-4)
    assert lambds == pytest.approx([0.8 + 0.18 * i / 7 for i in range(8)])
    with open(tmp_path / "run" / "metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert (
        load_checkpoint(tmp_path / "run")["constants"]["GAMMA"]
        == json.loads((tmp_path / "run" / "config.json").read_text())["GAMMA"]
        == 0.995
    )


def test_the_readme_shows_what_is_printed():
    c = SimpleNamespace(**CONSTANTS)
    printed = train_ppo.plan(c, train_ppo.build(c, torch.device("cpu")), "runs/2026-01-31_12-00-00")
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")


def another(name, value):
    """A value that no constant has, but these: they must fit together."""
    fitting = {
        "NUM_STEPS": 11,
        "NUM_ENVS": 3,
        "ROLLOUT_STEPS": 5,
        "BATCH_SIZE": 15,
        "N_LAYER": 2,
        "N_HEAD": 2,
        "N_EMBD": 8,
        "MLP_EXPANSION": 3,
        "EPOCHS": 5,
        "SEED": 4,
        "DEVICE": "cpu",
        "RUN_DIR": "run",
        "PAIRED_ENVS": False,
        "LR": 0.019,
        "MIN_LR": 0.0019,
    }
    fraction = 0.001 * len(name) + 0.0001 * sum(map(ord, name))
    return fitting.get(name, value + 1 if CONSTANTS.kind(name) is int else fraction)


def test_every_constant_reaches_what_it_is_for(tmp_path):
    """Another value for each: nothing is dropped on the way, nothing swapped."""
    other = {name: another(name, value) for name, value in CONSTANTS.items()}
    c = Values(**other)
    check(c)
    ppo = train_ppo.build(c, torch.device("cpu"))
    evaluation = train_ppo.evaluation_of(c, torch.device("cpu"))
    checkpoints = train_ppo.watch(ppo, c, tmp_path / c.RUN_DIR, evaluation)[-1]
    found = {
        **vars(ppo.config),
        **vars(ppo.policy.config),
        "num_envs": ppo.env.num_envs,
        "varied_starts": ppo.env.varied_starts,
        "device": str(ppo.device),
        "run_dir": checkpoints.run_dir.name,
        "save_freq": checkpoints.save_freq,
        "eval_interval": evaluation.interval,
    }
    assert {name: found[name.lower()] for name in other} == other
    assert torch.initial_seed() == c.SEED


def test_a_kill_before_the_first_checkpoint_leaves_something_to_resume(straight, tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(PPO, "collect", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_the_same_run(straight, tmp_path / "run")


def test_the_loop_for_a_gpu_leaves_the_same_files_and_either_loop_goes_on(tmp_path, monkeypatch):
    """With the GPU's parts on the CPU."""
    build = train_ppo.build

    def on_device(c, device):
        ppo = build(c, device)
        env = DeviceBreakout(c.NUM_ENVS, device, varied_starts=c.VARIED_STARTS)
        policy = train_ppo.fast.DeviceGPT(ppo.policy.config)
        policy.load_state_dict(ppo.policy.state_dict())
        return PPO(policy, env, ppo.config, metadata=ppo.metadata)

    with monkeypatch.context() as m:
        m.setattr(train_ppo, "build", on_device)
        assert run(tmp_path, "run") == 0
        assert main(["--resume", str(tmp_path / "run"), "--num_steps", "224"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", "256"]) == 0
    rows = logged(tmp_path / "run")
    assert [row["global_step"] for row in rows] == [str(32 * n) for n in range(1, 9)]
    assert [row["update"] for row in rows if row["eval_score"]] == ["2", "4", "6", "7", "8"]
    assert all(
        math.isfinite(float(rows[-2][name])) for name in rows[0] if not name.startswith(("eval_", "episode_return"))
    )
    assert (
        load_checkpoint(tmp_path / "run")["update_count"] == 8
        and (tmp_path / "run" / "best_model.safetensors").exists()
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ["DeviceBreakout", "checked"]),
        ({"N_LAYER": 2}, ["BreakoutAsciiVec", "checked"]),
        ({"DEVICE": "cpu"}, ["BreakoutAsciiVec", None]),
    ],
)
def test_where_games_and_steps_run(monkeypatch, changes, expected):
    """One layer on CUDA: everything on the GPU. What is built is looked at, not run."""
    c, built = SimpleNamespace(**CONSTANTS | {"DEVICE": "cuda"} | changes), []
    monkeypatch.setattr(train_ppo, "make_gpt", lambda config, device: None)
    monkeypatch.setattr(
        train_ppo, "PPO", lambda policy, env, config, metadata, runner: built.extend([type(env).__name__, runner])
    )
    monkeypatch.setattr(
        train_ppo.fast, "DeviceBreakout", type("DeviceBreakout", (), {"__init__": lambda self, *args, **kwargs: None})
    )
    monkeypatch.setattr(train_ppo.fast, "GPURunner", lambda: "checked")
    train_ppo.build(c, torch.device(c.DEVICE))
    assert built == expected


@pytest.mark.parametrize(
    "device, layers, cores, processes",
    [("cuda", 1, 16, 8), ("cuda", 1, 4, 3), ("cuda", 1, 1, 1), ("cuda", 2, 16, 1), ("cpu", 1, 16, 1)],
)
def test_how_many_processes_evaluate(monkeypatch, device, layers, cores, processes):
    monkeypatch.setattr(train_ppo, "available_cores", lambda: cores)
    evaluation = train_ppo.evaluation_of(SimpleNamespace(**CONSTANTS | {"N_LAYER": layers}), torch.device(device))
    assert evaluation.background.processes == processes


def test_a_stop_while_the_last_evaluation_is_waited_for_does_not_lose_it(tmp_path, monkeypatch, capsys):
    class Slow(AtOnce):
        def submit(self, state):
            return Future()

    with monkeypatch.context() as m:
        m.setattr(callbacks, "Background", Slow)
        clock = SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGINT), monotonic=time.monotonic)
        m.setattr(callbacks, "time", clock)  # not time.sleep itself, which other threads call too
        assert run(tmp_path, "run", "--eval_interval", "100", "--save_freq", "1") == 130
    assert (
        load_checkpoint(tmp_path / "run")["update_count"] == 6
        and not (tmp_path / "run" / "best_model.safetensors").exists()
    )
    assert main(["--resume", str(tmp_path / "run")]) == 0
    best = load_checkpoint(tmp_path / "run" / "best_model.safetensors")
    assert best["update_count"] == 6 and logged(tmp_path / "run")[5]["eval_score"] == str(best["evaluation"]["score"])
    with pytest.raises(CommandLineError, match="has done 192 steps already"):
        main(["--resume", str(tmp_path / "run")])


def test_an_evaluator_that_dies_at_once_loses_nothing(tmp_path, monkeypatch, capsys):
    """Neither at first nor in a resume, which starts with an evaluation."""

    class Dead(AtOnce):
        def submit(self, state):
            future = Future()
            future.set_exception(ChildProcessError("a background process has died"))
            return future

    run(tmp_path, "run")
    for name in ("last.safetensors", "checkpoint_4.safetensors"):
        with monkeypatch.context() as m:
            m.setattr(callbacks, "Background", Dead)
            assert main(["--resume", str(tmp_path / "run" / name), "--num_steps", "400"]) == 1
        assert (
            load_checkpoint(tmp_path / "run")["update_count"]
            == {"last.safetensors": 8, "checkpoint_4.safetensors": 4}[name]
        )
        assert "has died; go on with" in capsys.readouterr().err


def test_resuming_an_older_checkpoint_keeps_a_better_model(tmp_path, monkeypatch):
    scores, evaluation = iter([100.0, 900.0, 200.0]), cheap_evaluation({"model": {}})
    monkeypatch.setattr(AtOnce, "submit", lambda self, state: done(evaluation | {"score": next(scores, 300.0)}))
    run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run" / "checkpoint_2.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "run" / "best_model.safetensors")["evaluation"]["score"] == 900


def test_a_best_model_that_is_a_copy_of_a_checkpoint_stops_no_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(AtOnce, "submit", lambda self, state: done(cheap_evaluation({"model": {}}) | {"score": 7.0}))
    run(tmp_path, "run")
    shutil.copy(tmp_path / "run" / "last.safetensors", tmp_path / "run" / "best_model.safetensors")
    assert main(["--resume", str(tmp_path / "run" / "checkpoint_2.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "run" / "best_model.safetensors")["evaluation"]["score"] == 7


def test_a_gradient_that_is_not_finite_loses_nothing(tmp_path, monkeypatch, capsys):
    update = PPO.update

    def spoiled(self):
        if self.update_count == 2:
            self.buffer.samples.returns[:] = math.nan
        return update(self)

    monkeypatch.setattr(PPO, "update", spoiled)
    assert run(tmp_path, "run") == 1
    assert re.search(
        f"the loss is not finite in update 3.*--resume .*run --lr {CONSTANTS['LR'] / 2:g} --min_lr",
        capsys.readouterr().err,
    )
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


@pytest.mark.parametrize(
    "error, message",
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "can't allocate memory; go on with: .*run --batch_size 8",
        ),
        (MemoryError(), "out of memory; go on with: .*run --batch_size 8"),
        (ChildProcessError("a background process has died"), "has died; go on with: .*run$"),
        (StopTraining(), "stopped; go on with: .*run$"),  # a rank that got no signal itself
    ],
)
def test_a_run_that_cannot_go_on_is_saved(tmp_path, monkeypatch, capsys, error, message):
    def fail(self):
        raise error

    monkeypatch.setattr(PPO, "update", fail)
    assert run(tmp_path, "run") in (1, 143)
    assert re.search(message, capsys.readouterr().err.strip())
    assert load_checkpoint(tmp_path / "run")["update_count"] == 0


def test_any_other_error_is_shown_and_the_run_is_saved(tmp_path, monkeypatch, capsys):
    """It is a defect, or a GPU's fault; an illegal memory access is no lack of memory."""

    def fail(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(PPO, "update", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path, "run")
    assert capsys.readouterr().err.strip().endswith("/run")  # how to go on, without advice on memory
    assert load_checkpoint(tmp_path / "run")["update_count"] == 0


def test_a_model_too_large_for_the_memory(tmp_path, monkeypatch):
    def build(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train_ppo, "build", build)
    with pytest.raises(CommandLineError, match="does not fit into the memory of cpu; try a smaller --n_embd"):
        run(tmp_path, "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
        ("--gamma 1.1", "GAMMA (--gamma) must be a number in [0.0, 1.0], not 1.1"),
        ("--num_envs 0", "NUM_ENVS"),
        ("--batch_size 1", "BATCH_SIZE (--batch_size) must be an integer in [2, inf), not 1"),
        ("--batch_size 99999", "BATCH_SIZE must divide NUM_ENVS * ROLLOUT_STEPS, the "),
        (
            "--num_envs 33 --rollout_steps 2 --batch_size 66 --paired_envs true --num_steps 1",
            "PAIRED_ENVS needs an even number of games; change NUM_ENVS",
        ),
        ("--min_lr 0.5 --lr 0.1", "MIN_LR 0.5 must not exceed"),
        ("--n_head 7 --n_embd 64", "multiple of n_head"),
        ("--device tpu9", "--device tpu9 does not work here"),
        ("--seed", "expected one argument"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_anything_starts(tmp_path, arguments, message):
    with pytest.raises((CommandLineError, DeviceError), match=re.escape(message)) as error:
        main([*arguments.split(), "--run_dir", str(tmp_path / "run")] if "--seed" != arguments else ["--seed"])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run/notes.txt")
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_a_checkpoint_of_another_run_is_not_resumed(straight, tmp_path):
    """Its rows would be joined to those of the run that it lies in. Checkpoints and runs of before they had a number are resumed."""
    shutil.copytree(straight, tmp_path / "run")
    last = tmp_path / "run" / "last.safetensors"
    own = load_checkpoint(last)
    save_checkpoint(last, own | {"run_id": "another"})
    with pytest.raises(
        CheckpointError, match="last.safetensors: is of another run than the config.json beside it"
    ) as error:
        main(["--resume", str(tmp_path / "run"), "--num_steps", "320"])
    assert "\n" not in str(error.value)
    save_checkpoint(last, {name: value for name, value in own.items() if name != "run_id"})
    (tmp_path / "run").rename(tmp_path / "renamed")
    assert main(["--resume", str(tmp_path / "renamed"), "--num_steps", "224"]) == 0
    config = tmp_path / "renamed" / "config.json"
    assert load_checkpoint(tmp_path / "renamed")["run_id"] == json.loads(config.read_text())["RUN_ID"] == own["run_id"]
    config.write_text(
        json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "RUN_ID"})
    )
    assert main(["--resume", str(tmp_path / "renamed" / "checkpoint_6.safetensors"), "--num_steps", "256"]) == 0
    assert json.loads(config.read_text())["RUN_ID"] == own["run_id"]


@pytest.mark.parametrize("removed, last", [(True, False), (False, True)])
def test_a_directory_that_is_removed_or_renamed_while_training_can_be_resumed(
    straight, tmp_path, monkeypatch, capsys, removed, last
):
    """In the third update, or in the one that a signal interrupts."""
    update, run_dir = PPO.update, tmp_path / "run"

    def meanwhile(ppo):
        if ppo.update_count == 2:
            shutil.rmtree(run_dir) if removed else run_dir.rename(tmp_path / "renamed")
        if ppo.update_count == 4:
            with pytest.raises(CommandLineError, match="another process is training this run"):
                runs.read_resumed(str(run_dir), {}, CONSTANTS, ())
        if ppo.update_count == (2 if last else 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(ppo)

    with monkeypatch.context() as m:
        m.setattr(PPO, "update", meanwhile)
        assert run(tmp_path, "run") == 143
    out, err = capsys.readouterr()
    assert f"{run_dir} was renamed or removed" in (err if last else out) and f"--resume {run_dir}" in err
    assert main(["--resume", str(run_dir)]) == 0
    states = [load_checkpoint(path) for path in (straight, run_dir)]
    assert same(states[0]["model"], states[1]["model"])
    rows = [row["update"] for row in logged(run_dir)]
    assert rows == list("3456" if last else "123456")  # the training that goes on writes all its rows again


@pytest.mark.parametrize("another, stopped", [(True, False), (True, True), (False, False)])
def test_what_has_taken_the_place_of_a_run_that_trains_stays_as_it_is(
    straight, tmp_path, monkeypatch, capsys, another, stopped
):
    """Another run, or a file; the run itself goes on from a new directory, and nothing of it is lost."""
    update, run_dir = PPO.update, tmp_path / "run"

    def meanwhile(ppo):
        if ppo.update_count == 2:
            run_dir.rename(tmp_path / "renamed")
            shutil.copytree(straight, run_dir) if another else run_dir.write_text("mine")
            if stopped:
                os.kill(os.getpid(), signal.SIGTERM)
        return update(ppo)

    with monkeypatch.context() as m:
        m.setattr(PPO, "update", meanwhile)
        assert run(tmp_path, "run") == (143 if stopped else 1)
    err = capsys.readouterr().err
    (reason,) = err.strip().splitlines()
    assert (
        reason.startswith("stopped; " if stopped else f"something else is at {run_dir} now")
        and f"{run_dir} was renamed or removed; go on with" in reason
    )
    if another:
        assert {file.name: file.read_bytes() for file in run_dir.iterdir()} == {
            file.name: file.read_bytes() for file in straight.iterdir()
        }
    else:
        assert run_dir.read_text() == "mine"
    place = shlex.split(reason)[-1]
    assert main(["--resume", place]) == 0
    states = [load_checkpoint(path) for path in (straight, place)]
    assert same(states[0]["model"], states[1]["model"])


def test_what_cannot_be_resumed(tmp_path):
    run(tmp_path, "run")
    last = tmp_path / "run" / "last.safetensors"
    with pytest.raises(
        CheckpointError, match="best_model.safetensors: holds a model to play, not a run to resume; .*last.safetensors"
    ):
        main(["--resume", str(tmp_path / "run" / "best_model.safetensors")])
    with pytest.raises(CommandLineError, match="--n_embd cannot change in a resumed run"):
        main(["--resume", str(last), "--n_embd", "32"])
    state = load_checkpoint(last)
    del state["model"]["wte.weight"]
    save_checkpoint(tmp_path / "run" / "spoiled.safetensors", state)
    with pytest.raises(CheckpointError, match="does not fit this program.*wte.weight"):
        main(["--resume", str(tmp_path / "run" / "spoiled.safetensors"), "--num_steps", "1000"])
    save_checkpoint(tmp_path / "elsewhere.safetensors", state)
    with pytest.raises(CheckpointError, match="elsewhere.safetensors: lies outside its run"):
        main(["--resume", str(tmp_path / "elsewhere.safetensors")])
    save_checkpoint(tmp_path / "run" / "older.safetensors", state | {"constants": state["constants"] | {"WARMUP": 0.0}})
    with pytest.raises(CheckpointError, match="older.safetensors: has other constants than this program .WARMUP."):
        main(["--resume", str(tmp_path / "run" / "older.safetensors")])
    with pytest.raises(CommandLineError, match="has done 192 steps already; to go on, give a larger --num_steps"):
        main(["--resume", str(last)])
    with pytest.raises(CommandLineError, match="--resume: is empty; name a file or a directory"):
        main(["--resume", ""])
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="last.safetensors"):
        main(["--resume", str(tmp_path / "run")])


def script(*arguments, cwd, **kwargs):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_ppo.py"), *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def wait_for(pattern, folder):
    deadline = time.time() + 60
    while not list(folder.glob(pattern)) and time.time() < deadline:
        time.sleep(0.1)


def test_on_the_command_line(tmp_path):
    """In another directory: one run stopped by Ctrl-C, one by Ctrl-C twice while its output is closed or full, one mistake."""
    long = [*SMALL.split(), "--num_steps", "100000000"]
    once = script(*long, cwd=tmp_path)
    unheard = ["bash", "-c", 'exec "$@" >&- 2>/dev/full', "", sys.executable, str(ROOT / "train_ppo.py")]
    twice = subprocess.Popen([*unheard, *long, "--eval_interval", "0", "--run_dir", "twice"], cwd=tmp_path)
    mistake = script("--sede", "1", cwd=tmp_path)
    try:
        wait_for("runs/*/checkpoint_[1-9]*.safetensors", tmp_path)
        wait_for("twice/checkpoint_[1-9]*.safetensors", tmp_path)
        once.send_signal(signal.SIGINT)
        _, err = once.communicate(timeout=30)
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert once.returncode == 130 and "Traceback" not in err
        assert f"go on with: python {os.path.relpath(ROOT, tmp_path)}/train_ppo.py --resume runs/{run_dir.name}" in err
        assert load_checkpoint(run_dir)["update_count"] >= 2

        assert twice.poll() is None
        twice.send_signal(signal.SIGINT)
        time.sleep(0.002)
        twice.send_signal(signal.SIGINT)
        assert twice.wait(timeout=30) in (-signal.SIGINT, 130)

        _, err = mistake.communicate(timeout=60)
        assert mistake.returncode == 1 and err == "train_ppo.py: unknown argument --sede; did you mean --seed?\n"
    finally:
        for process in (once, twice, mistake):
            process.kill()
        twice.wait()


def train_in_a_terminal(folder, *arguments):
    """In 40 columns, without UTF-8 and colours -> the process, the other end of its terminal."""
    pty, termios = (pytest.importorskip(name) for name in ("pty", "termios"))
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 40))
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "NO_COLOR": "1",
        "HOME": "/proc/nowhere",
    }
    command = [
        sys.executable,
        str(ROOT / "train_ppo.py"),
        *SMALL.split(),
        "--num_steps",
        "100000000",
        "--eval_interval",
        "0",
        *arguments,
    ]
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", own, *command],
        cwd=folder,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        env=environment,
    )
    return process, terminal, end


def test_in_a_terminal(tmp_path):
    """The key Ctrl-\\ stops like Ctrl-C; what was printed is plain lines, and the terminal is as before."""
    termios = pytest.importorskip("termios")
    process, terminal, end = train_in_a_terminal(tmp_path, "--run_dir", "f\u00fcr alle")
    before, printed = termios.tcgetattr(end), b""
    os.set_blocking(terminal, False)
    deadline = time.time() + 60
    try:
        while process.poll() is None and time.time() < deadline:
            with contextlib.suppress(BlockingIOError):
                printed += os.read(terminal, 65536)
            if (
                b"\x1c" not in printed
                and b"^\\" not in printed
                and list((tmp_path / "f\u00fcr alle").glob("checkpoint_[1-9]*.safetensors"))
            ):
                os.write(terminal, b"\x1c")
            time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            printed += os.read(terminal, 65536)
    finally:
        process.kill()
    assert process.returncode == 131 and b"train_ppo.py --resume" in printed, printed
    assert b"Traceback" not in printed and b"\x1b[3" not in printed and printed.isascii() and b"steps/s" in printed
    assert termios.tcgetattr(end) == before and printed.endswith(b"\n")
    os.close(end), os.close(terminal)


@pytest.mark.faults
def test_a_terminal_that_is_closed(tmp_path):
    process, terminal, end = train_in_a_terminal(tmp_path, "--run_dir", "run", "--save_freq", "1000000")
    os.close(end)
    wait_for("run/metrics.csv", tmp_path)
    time.sleep(1)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    assert load_checkpoint(tmp_path / "run")["update_count"] > 0


@pytest.mark.parametrize(
    "edit",
    [{"NUM_ENVS": 9, "ROLLOUT_STEPS": 2, "BATCH_SIZE": 18}, {"NUM_ENVS": 6, "ROLLOUT_STEPS": 11, "BATCH_SIZE": 33}],
)
def test_what_two_ranks_cannot_share(monkeypatch, edit):
    monkeypatch.setattr(train_ppo, "RANKS", 2)
    check(Values(**CONSTANTS | {"NUM_ENVS": 8, "ROLLOUT_STEPS": 4, "BATCH_SIZE": 16}))
    with pytest.raises(CommandLineError, match="NUM_ENVS and BATCH_SIZE are shared by 2 ranks"):
        check(Values(**CONSTANTS | edit))
    with pytest.raises(CommandLineError, match="PAIRED_ENVS needs an even number of games on each rank"):
        check(Values(**CONSTANTS | {"NUM_ENVS": 6, "ROLLOUT_STEPS": 4, "BATCH_SIZE": 12}))


@pytest.mark.faults
def test_two_ranks_on_the_command_line(tmp_path):
    def launch(*more):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ppo.py"]
        return subprocess.run([*launcher, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)

    run_dir = tmp_path / "run"
    done = launch(*SMALL.split(), "--run_dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learns Breakout") + done.stdout.count("learns Breakout") == 1  # rank 0 alone prints
    assert [row["global_step"] for row in logged(run_dir)] == [str(32 * i) for i in range(1, 7)]
    assert [bool(row["eval_score"]) for row in logged(run_dir)] == [False, True] * 3
    with pytest.raises(
        CommandLineError, match="was trained by 2 ranks, not 1; go on with torchrun .*train_ppo.py --resume /"
    ):
        main(["--resume", str(run_dir), "--num_steps", "256"])
    assert launch("--resume", str(run_dir), "--num_steps", "256", "--eval_interval", "0").returncode == 0
    assert load_checkpoint(run_dir)["global_step"] == 256


@pytest.mark.faults
def test_ctrl_c_stops_all_ranks(tmp_path):
    """It reaches the launcher and every rank at once, as a terminal sends it."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train_ppo.py"),
    ]
    command = [*launcher, *SMALL.split(), "--num_steps", "100000000", "--eval_interval", "0", "--run_dir", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for("run/checkpoint_[1-9]*.safetensors", tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert re.search(r"stopped; go on with: torchrun --standalone --nproc_per_node=2 \S*train_ppo.py --resume run", err)
    assert load_checkpoint(tmp_path / "run")["update_count"] > 0


def test_without_the_folder_of_shortcuts_everything_trains_and_plays(tmp_path):
    """Delete fast/: two small updates, then a game. The same numbers as with it, but for rounding. Nor does anything work that draws."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for name in ("harness", "viewer"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name, error in (
        ("imageio", "ImportError('absent')"),
        ("matplotlib", "AttributeError('no _ARRAY_API')"),
        ("tensorboard", "TypeError('protobuf')"),
    ):
        (tmp_path / f"{name}.py").write_text(f"raise {error}")

    def python(*command, cwd):
        result = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    # without pairs: in a minibatch of four, what a pair does not share is often nothing but rounding, which is then normalised
    tiny = "train_ppo.py --num_envs 2 --rollout_steps 4 --batch_size 4 --n_head 2 --n_embd 8 --num_steps 16 --eval_interval 0 --device cpu"
    tiny += " --paired_envs false --run_dir"
    out = python(*tiny.split(), "without", cwd=tmp_path)
    assert len(logged(tmp_path / "without")) == 2 and [line for line in out.splitlines() if "warning" in line] == [
        "warning: without: no more TensorBoard events (TypeError: protobuf); training goes on",
        "warning: without/learning_curve.png: not drawn (AttributeError: no _ARRAY_API); training goes on",
    ]
    assert main([*tiny.split()[1:], str(tmp_path / "with")]) == 0
    slow, quick = (load_checkpoint(tmp_path / name) for name in ("without", "with"))
    assert slow["update_count"] == 2
    for name, x in slow["model"].items():
        torch.testing.assert_close(x, quick["model"][name], rtol=1e-3, atol=1e-4)  # four steps of 0.002
    plays = "import load_model; from model import GPT; assert type(load_model.load_policy('without')[0]) is GPT; load_model.main(['without', '--steps', '5'])"
    assert "wrote gpt.gif" in python("-c", plays, cwd=tmp_path)


def test_a_rollout_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "free_memory", lambda device: 7e9)
    huge = f"--num_envs 65536 --rollout_steps 65536 --run_dir {tmp_path / 'run'} --device cpu"
    with pytest.raises(
        CommandLineError,
        match="^a rollout of 4,294,967,296 samples needs 2,147.5 GB .* lower --num_envs or --rollout_steps$",
    ):
        main(huge.split())
    assert not (tmp_path / "run").exists()
