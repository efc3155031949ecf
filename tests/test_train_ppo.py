"""train_ppo.py as a whole: what a run leaves, how it is stopped and resumed, and what survives which failure."""

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
from helpers import SIGHUP, SIGQUIT, explained, logged_columns, needs_posix

import callbacks
import ppo
import train_ppo
from breakout_ascii import BreakoutAsciiVec
from fast import DeviceBreakout
from harness import runs, supervise
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, to_plain
from harness.device import DeviceError
from harness.lines import wrapped_lines
from harness.options import CommandLineError, Values
from harness.supervise import StopTraining, interrupt, less_memory, signals_handled
from policies import load_policy
from ppo import PPO
from train_ppo import CONSTANTS, check, main

ROOT = Path(__file__).parent.parent
SMALL = "--num_envs 4 --rollout_steps 8 --batch_size 16 --epochs 2 --n_head 4 --n_embd 16 --device cpu"
SMALL += f" --num_steps {6 * 32} --eval_interval 2 --save_freq 2"
ENDLESS = f"{SMALL} --num_steps 100000000"
DRAW = callbacks.LearningCurve.draw


def done(result):
    future = Future()
    future.set_result(result)
    return future


class AtOnce:
    """Stands in for Background: an evaluation takes no process and no time."""

    def __init__(self, evaluate, processes):
        self.processes = processes

    def submit(self, state):
        return done(cheap_evaluation(state))

    def close(self):
        pass


def cheap_evaluation(state):
    """Return an evaluation whose score follows from the weights."""
    score = 100 * sum(x.abs().sum().item() for x in state["model"].values()) % 960
    others = {"min": 0, "max": 960, "cleared": 0, "games": 32, "length": 9.0, "varied": 0.5, "returned": 0.5}
    return {"score": score} | others


def draw_nothing(curve):
    curve.out_of_date = False
    callbacks.atomic_write(curve.path, b"")


def make_cheap(monkeypatch):
    """Let evaluations take no time, and learning curves be empty files: Matplotlib takes longer than a small run."""
    monkeypatch.setattr(callbacks, "Background", AtOnce)
    monkeypatch.setattr(callbacks.LearningCurve, "draw", draw_nothing)


@pytest.fixture(autouse=True)
def cheap_callbacks(monkeypatch):
    make_cheap(monkeypatch)


@pytest.fixture
def real_curves(cheap_callbacks, monkeypatch):
    """Draw learning curves all the same."""
    monkeypatch.setattr(callbacks.LearningCurve, "draw", DRAW)


def run(tmp_path, name, *more):
    return main([*SMALL.split(), "--run_dir", str(tmp_path / name), *more])


def logged(run_dir):
    """Return the rows of a run's metrics.csv, without timings."""
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["steps_per_second"]
    return rows


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    both_nan = x != x and y != y
    return x == y or both_nan


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The directory of a run of six updates that nothing interrupts."""
    with pytest.MonkeyPatch.context() as m:
        make_cheap(m)
        assert run(tmp_path_factory.mktemp("run"), "straight") == 0
    return tmp_path_factory.getbasetemp() / "run0" / "straight"


def assert_the_same_run(straight, other):
    """Assert that parameters, optimizer, random states and rows are the same, bit for bit."""
    states = [load_checkpoint(run_dir) for run_dir in (straight, other)]
    for state in states:
        assert state.pop("seconds") > 0 and state.pop("run_id") and state["constants"].pop("RUN_DIR")
    assert states[0]["update_count"] == 6 and same(*states)
    assert len(logged(straight)) == 6 and logged(straight) == logged(other)


def stage_weights(run_dir):
    """Return {name: weights} of the stages of a run."""
    return {file.name: load_checkpoint(file)["model"] for file in run_dir.glob("stage_*.safetensors")}


# fmt: off
@pytest.mark.parametrize("signum, status, place, call, update", [
    (signal.SIGINT, 130, (PPO, "train_step"), 3 * 4 + 1, 3),
    (signal.SIGTERM, 143, (PPO, "train_step"), 3 * 4 + 3, 3),
    pytest.param(SIGHUP, 129, (PPO, "rollout_step"), 3 * 8 + 5, 3, marks=needs_posix),
    pytest.param(SIGQUIT, 131, (AtOnce, "submit"), 2, 4, marks=needs_posix),
    (signal.SIGINT, 130, (os, "fsync"), 10, None),
])
# fmt: on
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(
    straight, tmp_path, monkeypatch, capsys, signum, status, place, call, update
):
    """A run of six updates loses nothing by a signal in the middle of an update, a rollout, an evaluation or a save."""
    function, calls = getattr(*place), 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signum)
        return function(*args)

    with monkeypatch.context() as m:
        m.setattr(*place, interrupted)
        assert run(tmp_path, "stopped") == status
    if place[0] is PPO:  # the step was finished, and no other begun
        assert calls == call
    assert f"go on with: python train_ppo.py --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "stopped")["update_count"] == update or update is None
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    assert_the_same_run(straight, tmp_path / "stopped")
    assert same(stage_weights(straight), stage_weights(tmp_path / "stopped"))
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


def interrupt_updates(monkeypatch, when=lambda ppo: True, action=lambda: signal.raise_signal(signal.SIGINT)):
    """Do something, by default press Ctrl-C, at the beginning of the updates for which `when(ppo)` holds."""
    update = PPO.update

    def interrupted(ppo):
        if when(ppo):
            action()
        return update(ppo)

    monkeypatch.setattr(PPO, "update", interrupted)


def test_a_second_ctrl_c_while_files_are_closed_leaves_at_once(tmp_path, monkeypatch):
    """In our programs it ends the process, which spares the user a traceback from the middle of some library.

    For a caller of main(), such as a notebook, it is a KeyboardInterrupt.
    """
    close, handlers = callbacks.TensorBoard.close, []

    def recording(self):
        handlers.append(signal.getsignal(signal.SIGINT))
        close(self)

    interrupt_updates(monkeypatch)
    monkeypatch.setattr(callbacks.TensorBoard, "close", recording)
    with signals_handled(interrupt):  # as run_script does
        assert run(tmp_path, "run") == 130
    assert run(tmp_path, "called") == 130
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]


def test_a_disk_that_is_full_for_a_while_loses_nothing(straight, tmp_path, monkeypatch, capsys, real_curves):
    """During updates 3 and 4 no file may grow beyond 1000 bytes: not the log, nor the plot, nor a checkpoint.

    Each failure is a warning, and what was saved before stays whole until it can be replaced.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    update = PPO.update

    def limited(ppo):
        full = ppo.update_count in (2, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else soft, hard))
        if ppo.update_count == 4:
            assert load_checkpoint(tmp_path / "run")["update_count"] == 2
        return update(ppo)

    monkeypatch.setattr(PPO, "update", limited)
    try:
        assert run(tmp_path, "run") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_the_same_run(straight, tmp_path / "run")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    for name in ("metrics.csv", "last.safetensors", "checkpoint_4.safetensors", "learning_curve.png"):
        assert any(name in line and "File too large" in line and "training goes on" in line for line in warnings)
    assert not list((tmp_path / "run").glob("*.tmp"))


# A process that holds the lock of a run until it is killed.
OWNER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
sys.stdin.read()
"""


def test_another_process_in_the_same_run_is_refused_until_it_dies(straight, tmp_path):
    """Two processes that train one run would spoil it; the second touches nothing. A killed one locks nobody out."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    (run_dir / "checkpoint_9.safetensors.tmp").write_bytes(b"half")  # what a kill left
    command = [sys.executable, "-c", OWNER, str(run_dir / "run.lock")]

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
    """There is nothing to resume, so the error says how to begin again in the same directory."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.json", "run.lock", "events.out.tfevents.1", "last.safetensors.tmp"):
        (run_dir / name).write_bytes(b'{"RUN_DIR": "run"}')
    wanted = f"was stopped before its first checkpoint; begin it again with --run_dir {run_dir}"
    with pytest.raises(CommandLineError, match=re.escape(wanted)):
        main(["--resume", str(run_dir)])
    assert run(tmp_path, "run") == 0
    assert_the_same_run(straight, run_dir)


@needs_posix
def test_directories_that_cannot_be_written_are_refused_before_the_first_step(straight, monkeypatch):
    """Nobody should train for an hour and then learn that nothing can be saved."""
    monkeypatch.setattr(PPO, "collect", None)
    root = os.geteuid() == 0
    new_is_refused = "new cannot be made .Permission denied.; name another --run_dir"
    old_is_refused = "run cannot be written .Permission denied.; check its permissions"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(straight, f"{folder}/run")
        for directory in (folder, f"{folder}/run"):
            os.chmod(directory, 0o555)
        try:
            if root:  # whom permissions do not stop
                os.seteuid(65534)
            with pytest.raises(CommandLineError, match=new_is_refused):
                run(Path(folder), "new")
            with pytest.raises(CommandLineError, match=old_is_refused):
                main(["--resume", f"{folder}/run", "--num_steps", "999"])
        finally:
            if root:
                os.seteuid(0)
            for directory in (folder, f"{folder}/run"):
                os.chmod(directory, 0o755)


def test_weights_that_are_not_finite_end_the_training_before_they_are_saved(tmp_path, monkeypatch, capsys):
    """The last checkpoint stays one to go on from."""
    update = PPO.update

    def spoiled(self):
        stats = update(self)
        if self.update_count == 3:
            self.weights.data[5] = math.inf
        return stats

    monkeypatch.setattr(PPO, "update", spoiled)
    assert run(tmp_path, "run", "--save_freq", "1") == 1
    assert re.search("weights are not finite after update 3.*--resume .*run --lr ", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


def test_a_reward_that_is_not_finite_ends_the_training(tmp_path, monkeypatch, capsys):
    """No learning rate helps against it, so none is advised."""
    step = BreakoutAsciiVec.step

    def spoiled(self, actions):
        obs, rewards, *rest = step(self, actions)
        if self.games.elapsed.max() > 20:
            rewards = rewards * math.nan
        return obs, rewards, *rest

    monkeypatch.setattr(BreakoutAsciiVec, "step", spoiled)
    assert run(tmp_path, "run", "--paired_envs", "false") == 1
    printed = capsys.readouterr().err
    assert re.search("the rewards are not finite in update 3; check the environment.*--resume .*run\n", printed)
    assert "--lr" not in printed
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


def test_models_too_large_are_named_before_they_are_built(monkeypatch, capsys, tmp_path):
    """A model for which the memory is too small is refused, and one that takes long to build is announced."""
    monkeypatch.setattr(train_ppo, "build", None)
    refused = "a GPT of .* parameters needs .* GB or more to train, and cpu has .*; try a smaller --n_embd"
    with pytest.raises(CommandLineError, match=refused):
        run(tmp_path, "run", "--n_embd", "8192", "--n_layer", "1024")
    assert not (tmp_path / "run").exists()
    c = SimpleNamespace(**CONSTANTS | {"N_EMBD": 2048, "N_LAYER": 2})
    train_ppo.check_memory(c, torch.device("cpu"))
    assert "Building a GPT of 101,126,253 parameters; training needs 2 GB" in capsys.readouterr().out


# fmt: off
@pytest.mark.parametrize("envs, steps, batch, ranks, smaller", [
    (64, 8, 512, 1, 256),
    (66, 2, 66, 1, 33),
    (66, 2, 33, 1, 12),
    (64, 8, 2, 1, None),
    (64, 8, 64, 2, 32),
    (64, 8, 2, 2, None),
])
# fmt: on
def test_the_batch_that_is_advised_can_be_trained(monkeypatch, envs, steps, batch, ranks, smaller):
    """It divides the samples of a rollout among all ranks; if none is smaller, a shorter rollout is advised."""
    monkeypatch.setattr(train_ppo, "RANKS", ranks)
    constants = CONSTANTS | {"NUM_ENVS": envs, "ROLLOUT_STEPS": steps, "BATCH_SIZE": batch}
    advised = f" --batch_size {smaller}" if smaller else ""
    assert less_memory(constants, ["BATCH_SIZE"], CONSTANTS, check) == advised
    smallest = constants | {"BATCH_SIZE": 2}
    shorter = less_memory(smallest, ["BATCH_SIZE", "ROLLOUT_STEPS"], CONSTANTS, check)
    assert shorter == f" --rollout_steps {steps // 2}"


def test_what_a_run_leaves(tmp_path, real_curves):
    """These files are what docs/runs.md describes, and the glossary has every column of the log."""
    run_dir = tmp_path / "run"
    run(tmp_path, "run")
    names = {file.name for file in run_dir.iterdir() if "tfevents" not in file.name}
    checkpoints = {f"checkpoint_{update}.safetensors" for update in (2, 4, 6)}
    stages = {f"stage_{steps}.safetensors" for steps in (0, 32, 64)}
    models = {"best_model.safetensors", "last.safetensors"}
    assert names == {"config.json", "run.lock", "metrics.csv", "learning_curve.png", *models, *checkpoints, *stages}
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    constants = json.loads((run_dir / "config.json").read_text())
    assert constants == {**CONSTANTS, **constants}
    assert constants["NUM_ENVS"] == 4 and constants["GAMMA"] == CONSTANTS["GAMMA"]
    best = load_checkpoint(run_dir / "best_model.safetensors")
    assert best["evaluation"]["score"] == max(float(row["eval_score"] or 0) for row in logged(run_dir))
    assert "optimizer" not in best and best["constants"] | {"RUN_ID": best["run_id"]} == constants
    assert logged_columns(run_dir) == explained("Breakout")
    assert {f"eval_{name}" for name in best["evaluation"]} == explained("Breakout", evaluation=True)


def test_stages_are_the_policy_of_their_update(straight):
    """A stage is the rounded policy of the checkpoint after the same update, and is played with the same numbers."""
    stage, checkpoint = straight / "stage_64.safetensors", straight / "checkpoint_2.safetensors"
    rounded = {name: x.half() for name, x in load_checkpoint(checkpoint)["model"].items()}
    assert same(stage_weights(straight)[stage.name], rounded)
    policy, meta = load_policy(stage)
    expected = {name: x.float() for name, x in rounded.items()}
    assert same(dict(policy.state_dict()), expected) and meta["global_step"] == 64 and "optimizer" not in meta
    for name in ("game", "board", "gpt_config", "constants", "run_id"):
        assert same(meta[name], load_checkpoint(checkpoint)[name])
    assert stage.stat().st_size < checkpoint.stat().st_size / 4
    with pytest.raises(CheckpointError, match="stage_64.safetensors: holds a model to play, not a run to resume"):
        main(["--resume", str(stage)])


def test_stages_change_nothing_that_is_learned(straight, tmp_path, monkeypatch):
    """A training that keeps none has the same weights, random states and rows."""

    def without(run_dir, save_freq, keep_stages):
        return callbacks.Checkpoints(run_dir, save_freq)

    monkeypatch.setattr(train_ppo, "Checkpoints", without)
    run(tmp_path, "run")
    assert stage_weights(straight) and not stage_weights(tmp_path / "run")
    assert_the_same_run(straight, tmp_path / "run")


def test_one_seed_one_run(straight, tmp_path):
    """A seed decides everything that is logged, and another seed gives another run."""
    run(tmp_path, "same")
    run(tmp_path, "other", "--seed", "1")
    assert logged(straight) == logged(tmp_path / "same") != logged(tmp_path / "other")


def test_a_finished_run_can_be_made_longer(tmp_path, monkeypatch):
    """Its learning rate jumps to that of the longer training, while lambda and the seconds simply go on.

    A constant that was edited in the script meanwhile does not reach it.
    """
    lambds, gae_lambda = [], ppo.gae_lambda

    def recording(*args):
        lambds.append(gae_lambda(*args))
        return lambds[-1]

    monkeypatch.setattr(ppo, "gae_lambda", recording)
    run_dir = tmp_path / "run"
    run(tmp_path, "run", "--lambd_steps", str(7 * 32))
    monkeypatch.setattr(train_ppo, "GAMMA", 0.5)
    assert main(["--resume", str(run_dir), "--num_steps", str(8 * 32), "--num_envs", "4"]) == 0
    rows = logged(run_dir)
    assert [row["update"] for row in rows] == list("12345678")
    lr, min_lr = CONSTANTS["LR"], CONSTANTS["MIN_LR"]
    planned = [min_lr + (lr - min_lr) * math.cos(math.pi / 2 * i / (6 if i < 6 else 8)) ** 2 for i in range(8)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(planned, rel=1e-4)
    assert lambds == pytest.approx([0.8 + 0.18 * i / 7 for i in range(8)])
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    recorded = json.loads((run_dir / "config.json").read_text())
    assert load_checkpoint(run_dir)["constants"]["GAMMA"] == recorded["GAMMA"] == 0.995


def test_the_readme_shows_what_is_printed():
    """The README quotes the lines with which a training begins, as a terminal of 80 columns shows them."""
    c = SimpleNamespace(**CONSTANTS)
    printed = train_ppo.plan(c, train_ppo.build(c, torch.device("cpu")), "runs/2026-01-31_12-00-00")
    assert wrapped_lines(printed, 79) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("layers", [1, 2])
def test_measuring_how_long_a_training_takes_does_not_change_it(layers):
    """Games, weights and random numbers stay as they are. A training of a few updates is not measured."""
    sizes = dict(NUM_ENVS=8, ROLLOUT_STEPS=8, BATCH_SIZE=16, N_HEAD=2, N_EMBD=8, N_LAYER=layers)
    c = Values(**CONSTANTS | sizes)
    ppo = train_ppo.build(c, torch.device("cpu"))
    before = to_plain(ppo.state_dict())
    random_state = torch.get_rng_state()
    line = train_ppo.estimate(c, ppo)
    assert same(to_plain(ppo.state_dict()), before) and torch.equal(torch.get_rng_state(), random_state)
    duration = r"about [\d,]+ (second|minute|hour|day)s?"
    others = f"; one layer takes {duration}" if layers == 2 else ""
    assert re.fullmatch(f"This will take {duration} on this machine{others}.", line)
    assert 0 < ppo.playing_share < 1
    ppo.global_step = c.NUM_STEPS - 3 * ppo.samples_per_update
    if layers == 1:
        assert train_ppo.estimate(c, ppo) == ""


# Values that fit together, for the constants that depend on each other.
FITTING = dict(
    NUM_STEPS=11, NUM_ENVS=3, ROLLOUT_STEPS=5, BATCH_SIZE=15, EPOCHS=5, LR=0.019, MIN_LR=0.0019, PAIRED_ENVS=False,
    N_LAYER=2, N_HEAD=2, N_EMBD=8, MLP_EXPANSION=3, SEED=4, DEVICE="cpu", RUN_DIR="run",
    GAME="breakout_ascii:BreakoutAscii-v0", ASYNC_ENVS=True, WANDB="project",
)  # fmt: skip


def another(name, value):
    """Return a value that differs from the default, and from the values of all other constants."""
    if name in FITTING:
        return FITTING[name]
    if CONSTANTS.kind(name) is int:
        return value + 1
    return 0.001 * len(name) + 0.0001 * sum(map(ord, name))


def test_every_constant_reaches_what_it_is_for(tmp_path):
    """With another value for each, nothing is dropped on the way, and nothing swapped."""
    other = {name: another(name, value) for name, value in CONSTANTS.items()}
    c = Values(**other)
    check(c)
    ppo = train_ppo.build(c, torch.device("cpu"))
    evaluation = train_ppo.evaluation_of(c, torch.device("cpu"))
    *_, checkpoints, wandb = train_ppo.watch(ppo, c, tmp_path / c.RUN_DIR, evaluation)
    found = {
        **vars(ppo.config),
        **vars(ppo.policy.config),
        "num_envs": ppo.env.num_envs,
        "varied_starts": ppo.env.varied_starts,
        "device": str(ppo.device),
        "run_dir": checkpoints.run_dir.name,
        "save_freq": checkpoints.save_freq,
        "wandb": wandb.project,
        "eval_interval": evaluation.interval,
        "eval_episodes": ppo.metadata["constants"]["EVAL_EPISODES"],
        "async_envs": ppo.metadata["constants"]["ASYNC_ENVS"],
        "game": f"breakout_ascii:{ppo.metadata['game']}",
    }
    assert {name: found[name.lower()] for name in other} == other
    assert torch.initial_seed() == c.SEED


def test_a_kill_before_the_first_update_leaves_something_to_resume(straight, tmp_path, monkeypatch):
    """The initial state is saved before anything else happens."""

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(PPO, "collect", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_the_same_run(straight, tmp_path / "run")


def test_the_loop_for_a_gpu_leaves_the_same_files_and_either_loop_goes_on(tmp_path, monkeypatch):
    """A run can move between a GPU, whose parts run on the CPU here, and a CPU."""
    build = train_ppo.build

    def on_device(c, device):
        ppo = build(c, device)
        env = DeviceBreakout(c.NUM_ENVS, device, varied_starts=c.VARIED_STARTS)
        policy = train_ppo.fast.DeviceGPT(ppo.policy.config)
        policy.load_state_dict(ppo.policy.state_dict())
        return PPO(policy, env, ppo.config, metadata=ppo.metadata)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as m:
        m.setattr(train_ppo, "build", on_device)
        assert run(tmp_path, "run") == 0
        assert main(["--resume", str(run_dir), "--num_steps", "224"]) == 0
    assert main(["--resume", str(run_dir), "--num_steps", "256"]) == 0
    rows = logged(run_dir)
    assert [row["global_step"] for row in rows] == [str(32 * n) for n in range(1, 9)]
    assert [row["update"] for row in rows if row["eval_score"]] == ["2", "4", "6", "7", "8"]
    of_updates = [name for name in rows[0] if not name.startswith(("eval_", "episode_return"))]
    assert all(math.isfinite(float(rows[-2][name])) for name in of_updates)
    assert load_checkpoint(run_dir)["update_count"] == 8 and (run_dir / "best_model.safetensors").exists()


# fmt: off
@pytest.mark.parametrize("changes, expected", [
    ({}, ["DeviceBreakout", "checked"]),
    ({"N_LAYER": 2}, ["BreakoutAsciiVec", "checked"]),
    ({"DEVICE": "cpu"}, ["BreakoutAsciiVec", None]),
])
# fmt: on
def test_where_games_and_steps_run(monkeypatch, changes, expected):
    """On CUDA a run checks itself, and with one layer the games are played there too. Here nothing is run."""
    c = SimpleNamespace(**CONSTANTS | {"DEVICE": "cuda"} | changes)

    class DeviceBreakout:
        def __init__(self, *args, **kwargs):
            pass

    def built(policy, env, config, metadata, runner):
        return [type(env).__name__, runner]

    monkeypatch.setattr(train_ppo, "make_gpt", lambda config, device: None)
    monkeypatch.setattr(train_ppo, "PPO", built)
    monkeypatch.setattr(train_ppo.fast, "DeviceBreakout", DeviceBreakout)
    monkeypatch.setattr(train_ppo.fast, "GPURunner", lambda: "checked")
    assert train_ppo.build(c, torch.device(c.DEVICE)) == expected


# fmt: off
@pytest.mark.parametrize("device, layers, cores, processes", [
    ("cuda", 1, 16, 8),
    ("cuda", 1, 4, 3),
    ("cuda", 1, 1, 1),
    ("cuda", 2, 16, 1),
    ("cpu", 1, 16, 1),
])
# fmt: on
def test_how_many_processes_evaluate(monkeypatch, device, layers, cores, processes):
    """Several do only where a GPU trains faster than one core can evaluate."""
    monkeypatch.setattr(train_ppo, "available_cores", lambda: cores)
    evaluation = train_ppo.evaluation_of(SimpleNamespace(**CONSTANTS | {"N_LAYER": layers}), torch.device(device))
    assert evaluation.background.processes == processes


def test_a_stop_while_the_last_evaluation_is_waited_for_does_not_lose_it(tmp_path, monkeypatch, capsys):
    """A resume repeats the evaluation, after which nothing is left to do."""
    run_dir = tmp_path / "run"
    best_model = run_dir / "best_model.safetensors"

    class Slow(AtOnce):
        def submit(self, state):
            return Future()

    with monkeypatch.context() as m:
        m.setattr(callbacks, "Background", Slow)
        # Not time.sleep itself is replaced, because other threads call it too.
        clock = SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGINT), monotonic=time.monotonic)
        m.setattr(callbacks, "time", clock)
        assert run(tmp_path, "run", "--eval_interval", "100", "--save_freq", "1") == 130
    assert load_checkpoint(run_dir)["update_count"] == 6 and not best_model.exists()
    assert main(["--resume", str(run_dir)]) == 0
    best = load_checkpoint(best_model)
    assert best["update_count"] == 6 and logged(run_dir)[5]["eval_score"] == str(best["evaluation"]["score"])
    with pytest.raises(CommandLineError, match="has done 192 steps already"):
        main(["--resume", str(run_dir)])


@pytest.mark.parametrize("name, updates", [("last", 8), ("checkpoint_4", 4)])
def test_an_evaluator_that_dies_at_once_loses_nothing(straight, tmp_path, monkeypatch, capsys, name, updates):
    """The run is saved where it is, even if it dies in the evaluation with which a resume begins."""

    class Dead(AtOnce):
        def submit(self, state):
            future = Future()
            future.set_exception(ChildProcessError("a background process has died"))
            return future

    run_dir = shutil.copytree(straight, tmp_path / "run")
    monkeypatch.setattr(callbacks, "Background", Dead)
    assert main(["--resume", str(run_dir / f"{name}.safetensors"), "--num_steps", "400"]) == 1
    assert load_checkpoint(run_dir)["update_count"] == updates
    assert "has died; go on with" in capsys.readouterr().err


def test_resuming_an_older_checkpoint_keeps_a_better_model(tmp_path, monkeypatch):
    """The best model may be younger than the checkpoint; worse ones that follow do not replace it."""
    scores, evaluation = iter([100.0, 900.0, 200.0]), cheap_evaluation({"model": {}})
    monkeypatch.setattr(AtOnce, "submit", lambda self, state: done(evaluation | {"score": next(scores, 300.0)}))
    run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run" / "checkpoint_2.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "run" / "best_model.safetensors")["evaluation"]["score"] == 900


def test_a_best_model_that_is_a_copy_of_a_checkpoint_stops_no_resume(tmp_path, monkeypatch):
    """Such a file has no score of its own, so the next evaluation replaces it."""
    monkeypatch.setattr(AtOnce, "submit", lambda self, state: done(cheap_evaluation({"model": {}}) | {"score": 7.0}))
    run(tmp_path, "run")
    shutil.copy(tmp_path / "run" / "last.safetensors", tmp_path / "run" / "best_model.safetensors")
    assert main(["--resume", str(tmp_path / "run" / "checkpoint_2.safetensors")]) == 0
    assert load_checkpoint(tmp_path / "run" / "best_model.safetensors")["evaluation"]["score"] == 7


def test_a_loss_that_is_not_finite_loses_nothing(tmp_path, monkeypatch, capsys):
    """The run is saved as it was before the update, and lower learning rates are advised."""
    update = PPO.update

    def spoiled(self):
        if self.update_count == 2:
            self.buffer.samples.returns[:] = math.nan
        return update(self)

    monkeypatch.setattr(PPO, "update", spoiled)
    assert run(tmp_path, "run") == 1
    advice = f"the loss is not finite in update 3.*--resume .*run --lr {CONSTANTS['LR'] / 2:g} --min_lr"
    assert re.search(advice, capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


# fmt: off
@pytest.mark.parametrize("error, message", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't .* memory; go on with: .*run --batch_size 8"),
    (MemoryError(), "out of memory; go on with: .*run --batch_size 8"),
    (ChildProcessError("a background process has died"), "has died; go on with: .*run$"),
    (StopTraining(), "stopped; go on with: .*run$"),  # a rank that got no signal itself
])
# fmt: on
def test_a_run_that_cannot_go_on_is_saved(tmp_path, monkeypatch, capsys, error, message):
    """One line says what happened and how to go on, with options that help against it."""

    def fail(self):
        raise error

    monkeypatch.setattr(PPO, "update", fail)
    assert run(tmp_path, "run") in (1, 143)
    assert re.search(message, capsys.readouterr().err.strip())
    assert load_checkpoint(tmp_path / "run")["update_count"] == 0


def test_any_other_error_is_shown_and_the_run_is_saved(tmp_path, monkeypatch, capsys):
    """It is a defect or a GPU's fault, so its traceback is needed. An illegal memory access is not a lack of memory."""

    def fail(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(PPO, "update", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path, "run")
    # The line says how to go on, without advice on memory.
    assert capsys.readouterr().err.strip().endswith("/run")
    assert load_checkpoint(tmp_path / "run")["update_count"] == 0


def test_a_model_too_large_for_the_memory(tmp_path, monkeypatch):
    """If the memory runs out while the model is built, the error advises smaller models and leaves no directory."""

    def build(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train_ppo, "build", build)
    with pytest.raises(CommandLineError, match="does not fit into the memory of cpu; try a smaller --n_embd"):
        run(tmp_path, "run")
    assert not (tmp_path / "run").exists()


# fmt: off
@pytest.mark.parametrize("arguments, message", [
    ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
    ("--gamma 1.1", "GAMMA (--gamma) must be a number in [0.0, 1.0], not 1.1"),
    ("--num_envs 0", "NUM_ENVS"),
    ("--batch_size 1", "BATCH_SIZE (--batch_size) must be an integer in [2, inf), not 1"),
    ("--num_steps 1e6", "--num_steps needs an integer, not '1e6'; write 1000000"),
    ("--batch_size 500", "BATCH_SIZE 500 must divide the 16,384 samples of a rollout (NUM_ENVS * ROLLOUT_STEPS); "
     "the nearest that fit: 256 and 512"),
    ("--batch_size 99999", "the nearest that fit: 16384"),
    ("--num_envs 33",
     "NUM_ENVS 33 must be a multiple of 2, so that games can be paired (off with --paired_envs false); the nearest "
     "that fit: 32 and 34"),
    ("--lr 1e-5", "MIN_LR 5e-05 must not exceed LR 1e-05; lower MIN_LR to 1e-05, or raise LR to 5e-05"),
    ("--n_head 7", "N_HEAD 7 must divide N_EMBD 64; the nearest that fit: 4 and 8"),
    ("--n_embd 62 --n_head 2", "N_EMBD 62 must be a multiple of 4, "),
    ("--device tpu9", "--device tpu9 does not work here"),
    ("--seed", "expected one argument"),
])
# fmt: on
def test_wrong_arguments_are_refused_in_one_line_before_anything_starts(tmp_path, arguments, message):
    """A mistake costs neither a traceback to read nor a directory to delete."""
    with pytest.raises((CommandLineError, DeviceError), match=re.escape(message)) as error:
        main(["--run_dir", str(tmp_path / "run"), *arguments.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_directory_in_use_is_not_touched(tmp_path):
    """A new run refuses a directory that holds anything, and a path that is a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run/notes.txt")
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_a_checkpoint_of_another_run_is_not_resumed(straight, tmp_path):
    """Its rows would be appended to those of the run in whose directory it lies."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    last = run_dir / "last.safetensors"
    save_checkpoint(last, load_checkpoint(last) | {"run_id": "another"})
    refused = "last.safetensors: is of another run than the config.json beside it"
    with pytest.raises(CheckpointError, match=refused) as error:
        main(["--resume", str(run_dir), "--num_steps", "320"])
    assert "\n" not in str(error.value)


def test_runs_from_before_they_had_a_number_are_resumed(straight, tmp_path):
    """Where only the checkpoint or only config.json has a number, the run takes that one."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    config, last = run_dir / "config.json", run_dir / "last.safetensors"
    state = load_checkpoint(last)
    number = state.pop("run_id")
    save_checkpoint(last, state)
    assert main(["--resume", str(run_dir), "--num_steps", "224"]) == 0
    constants = json.loads(config.read_text())
    assert load_checkpoint(run_dir)["run_id"] == constants.pop("RUN_ID") == number
    config.write_text(json.dumps(constants))
    assert main(["--resume", str(run_dir / "checkpoint_6.safetensors"), "--num_steps", "256"]) == 0
    assert json.loads(config.read_text())["RUN_ID"] == number


@needs_posix
@pytest.mark.parametrize("removed, last", [(True, False), (False, True)])
def test_a_directory_that_is_removed_or_renamed_while_training_can_be_resumed(
    straight, tmp_path, monkeypatch, capsys, removed, last
):
    """This happens in the third update, and a signal ends the training then (`last`) or two updates later."""
    update, run_dir = PPO.update, tmp_path / "run"

    def meanwhile(ppo):
        if ppo.update_count == 2 and removed:
            shutil.rmtree(run_dir)
        elif ppo.update_count == 2:
            run_dir.rename(tmp_path / "renamed")
        if ppo.update_count == 4:
            with pytest.raises(CommandLineError, match="another process is training this run"):
                runs.read_resumed(str(run_dir), {}, CONSTANTS, ())
        if ppo.update_count == (2 if last else 4):
            signal.raise_signal(signal.SIGTERM)
        return update(ppo)

    with monkeypatch.context() as m:
        m.setattr(PPO, "update", meanwhile)
        assert run(tmp_path, "run") == 143
    out, err = capsys.readouterr()
    assert f"{run_dir} was renamed or removed" in (err if last else out) and f"--resume {run_dir}" in err
    assert main(["--resume", str(run_dir)]) == 0
    assert same(load_checkpoint(straight)["model"], load_checkpoint(run_dir)["model"])
    # A training that is not stopped at once writes all its rows again.
    assert [row["update"] for row in logged(run_dir)] == list("3456" if last else "123456")


@needs_posix
@pytest.mark.parametrize("another, stopped", [(True, False), (True, True), (False, False)])
def test_what_has_taken_the_place_of_a_run_that_trains_stays_as_it_is(
    straight, tmp_path, monkeypatch, capsys, another, stopped
):
    """Be it another run or a file. The training loses nothing either: it can be resumed from a new directory."""
    update, run_dir = PPO.update, tmp_path / "run"

    def meanwhile(ppo):
        if ppo.update_count == 2:
            run_dir.rename(tmp_path / "renamed")
            if another:
                shutil.copytree(straight, run_dir)
            else:
                run_dir.write_text("mine")
            if stopped:
                signal.raise_signal(signal.SIGTERM)
        return update(ppo)

    with monkeypatch.context() as m:
        m.setattr(PPO, "update", meanwhile)
        assert run(tmp_path, "run") == (143 if stopped else 1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("stopped; " if stopped else f"something else is at {run_dir} now")
    assert f"{run_dir} was renamed or removed; go on with" in line
    if another:
        contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (run_dir, straight)]
        assert contents[0] == contents[1]
    else:
        assert run_dir.read_text() == "mine"
    new_dir = shlex.split(line)[-1]
    assert main(["--resume", new_dir]) == 0
    assert same(load_checkpoint(straight)["model"], load_checkpoint(new_dir)["model"])


def test_what_cannot_be_resumed(straight, tmp_path):
    """Every refusal names the file and what is wrong with it, or with the command line."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    last = run_dir / "last.safetensors"
    state = load_checkpoint(last)
    others = {name: x for name, x in state["constants"].items() if name != "LAMBD_END"} | {"WARMUP": 0.0}
    without_a_weight = state | {"model": {name: x for name, x in state["model"].items() if name != "wte.weight"}}
    save_checkpoint(run_dir / "older.safetensors", state | {"constants": others})
    save_checkpoint(run_dir / "edited.safetensors", state | {"board": state["board"] | {"LIVES": 3}})
    save_checkpoint(run_dir / "spoiled.safetensors", without_a_weight)
    save_checkpoint(tmp_path / "elsewhere.safetensors", state)

    def assert_refused(file, message, *more, error=CheckpointError):
        with pytest.raises(error, match=message):
            main(["--resume", str(file), *more])

    a_model = "best_model.safetensors: holds a model to play, not a run to resume; .*last.safetensors"
    assert_refused(run_dir / "best_model.safetensors", a_model)
    assert_refused(run_dir / "spoiled.safetensors", "does not fit this program.*wte.weight", "--num_steps", "1000")
    assert_refused(tmp_path / "elsewhere.safetensors", "elsewhere.safetensors: lies outside its run")
    assert_refused(
        run_dir / "older.safetensors", "older.safetensors: has other constants than this program .WARMUP."
    )
    another_board = r"was begun with LIVES 3 \(here 5\); put that back in breakout_ascii.py, or begin a new run"
    assert_refused(run_dir / "edited.safetensors", another_board, error=CommandLineError)
    kept = "--n_embd cannot change in a resumed run"
    assert_refused(last, kept, "--n_embd", "32", error=CommandLineError)
    finished = "has done 192 steps already; to go on, give a larger --num_steps"
    assert_refused(last, finished, error=CommandLineError)
    assert_refused("", "--resume: is empty; name a file or a directory", error=CommandLineError)
    last.write_bytes(last.read_bytes()[:1000])
    assert_refused(run_dir, "last.safetensors")


# --- in processes of their own ----------------------------------------------------------------------------------------


def wait_for(pattern, folder):
    deadline = time.time() + 60
    while not list(folder.glob(pattern)) and time.time() < deadline:
        time.sleep(0.1)


def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys):
    """The program ends with the status 1, and says what was wrong."""
    monkeypatch.setattr(sys, "argv", ["train_ppo.py", "--sede", "1"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as error:
            supervise.run_script(main, "train_ppo.py")
    finally:
        signal.signal(signal.SIGINT, before)
    assert error.value.code == 1
    assert capsys.readouterr().err == "train_ppo.py: unknown argument --sede; did you mean --seed?\n"


@pytest.mark.faults
@needs_posix
def test_on_the_command_line(tmp_path):
    """Ctrl-C saves a run that was started in another directory; pressed twice it ends one whose output nobody hears."""
    python = [sys.executable, str(ROOT / "train_ppo.py"), *ENDLESS.split()]
    unheard = ["bash", "-c", 'exec "$@" >&- 2>/dev/full', "", *python, "--eval_interval", "0", "--run_dir", "twice"]
    once = subprocess.Popen(python, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    twice = subprocess.Popen(unheard, cwd=tmp_path)
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
    finally:
        for process in (once, twice):
            process.kill()
        twice.wait()


# Makes the standard input the terminal that controls this process, and becomes the command in its arguments.
IN_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def train_in_a_terminal(folder, *arguments):
    """Train in a terminal of 40 columns, without UTF-8 and colours.

    Returns:
        the process
        our end of the terminal
        the end of the process
    """
    pty, termios = (pytest.importorskip(name) for name in ("pty", "termios"))
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 40))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1", "HOME": "/proc/nowhere"}
    command = [sys.executable, str(ROOT / "train_ppo.py"), *ENDLESS.split(), "--eval_interval", "0", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ITS_TERMINAL, *command],
        cwd=folder,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        env={**os.environ, **plain},
    )
    return process, ours, its


@pytest.mark.faults
def test_in_a_terminal(tmp_path):
    """The key Ctrl-\\ stops like Ctrl-C; what was printed is plain lines, and the terminal is as before."""
    termios = pytest.importorskip("termios")
    run_dir = tmp_path / "f\u00fcr alle"
    process, ours, its = train_in_a_terminal(tmp_path, "--run_dir", run_dir.name)
    before, printed, pressed = termios.tcgetattr(its), b"", False
    os.set_blocking(ours, False)
    deadline = time.time() + 60

    def read():
        with contextlib.suppress(BlockingIOError):
            return os.read(ours, 65536)
        return b""

    try:
        while process.poll() is None and time.time() < deadline:
            printed += read()
            if not pressed and list(run_dir.glob("checkpoint_[1-9]*.safetensors")):
                os.write(ours, b"\x1c")
                pressed = True
            time.sleep(0.02)
        printed += read()
    finally:
        process.kill()
    assert process.returncode == 131 and b"train_ppo.py --resume" in printed, printed
    assert b"Traceback" not in printed and b"\x1b[3" not in printed and printed.isascii() and b"%|" in printed
    assert termios.tcgetattr(its) == before and printed.endswith(b"\n")
    os.close(its)
    os.close(ours)


@pytest.mark.faults
def test_a_terminal_that_is_closed(tmp_path):
    """SIGHUP saves the run, though there is nobody left to tell."""
    process, ours, its = train_in_a_terminal(tmp_path, "--run_dir", "run", "--save_freq", "1000000")
    os.close(its)
    wait_for("run/metrics.csv", tmp_path)
    time.sleep(1)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    assert load_checkpoint(tmp_path / "run")["update_count"] > 0


# fmt: off
@pytest.mark.parametrize("edit, message", [
    ({"NUM_ENVS": 9, "PAIRED_ENVS": False}, "NUM_ENVS 9 must be a multiple of 2, .* ranks .*: 8 and 10$"),
    ({"NUM_ENVS": 6, "PAIRED_ENVS": True}, "NUM_ENVS 6 must be a multiple of 4, .* paired .*: 4 and 8$"),
    ({"NUM_ENVS": 12, "ROLLOUT_STEPS": 11, "BATCH_SIZE": 33},
     "BATCH_SIZE 33 must divide the 132 samples .* and be a multiple of 2; the nearest that fit: 22 and 44$"),
])
# fmt: on
def test_what_two_ranks_cannot_share(monkeypatch, edit, message):
    """Games and minibatches must be split evenly, and pairs of games must stay on one rank."""
    monkeypatch.setattr(train_ppo, "RANKS", 2)
    check(Values(**CONSTANTS | {"NUM_ENVS": 8, "ROLLOUT_STEPS": 4, "BATCH_SIZE": 16}))
    with pytest.raises(CommandLineError, match=message):
        check(Values(**CONSTANTS | edit))


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.faults
def test_two_ranks_on_the_command_line(tmp_path):
    """Rank 0 alone prints, logs and saves; the run can be resumed by two ranks, and not by one."""

    def launch(*more):
        command = [*LAUNCHER, "train_ppo.py", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    run_dir = tmp_path / "run"
    done = launch(*SMALL.split(), "--run_dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learns Breakout") + done.stdout.count("learns Breakout") == 1
    assert [row["global_step"] for row in logged(run_dir)] == [str(32 * i) for i in range(1, 7)]
    assert [bool(row["eval_score"]) for row in logged(run_dir)] == [False, True] * 3
    refused = "was trained by 2 ranks, not 1; go on with torchrun .*train_ppo.py --resume /"
    with pytest.raises(CommandLineError, match=refused):
        main(["--resume", str(run_dir), "--num_steps", "256"])
    assert launch("--resume", str(run_dir), "--num_steps", "256", "--eval_interval", "0").returncode == 0
    assert load_checkpoint(run_dir)["global_step"] == 256


@pytest.mark.faults
@needs_posix
def test_ctrl_c_stops_all_ranks(tmp_path):
    """It reaches the launcher and every rank at once, as a terminal sends it."""
    command = [*LAUNCHER, str(ROOT / "train_ppo.py"), *ENDLESS.split(), "--eval_interval", "0", "--run_dir", "run"]
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


# Trains with the options in its arguments, and plays what was learned.
TRAIN_AND_PLAY = """
import sys
import train_ppo, load_model
from model import GPT
assert train_ppo.main(sys.argv[1:]) == 0
assert type(load_model.load_policy("without")[0]) is GPT
load_model.main(["without", "--steps", "5"])
"""


@pytest.mark.faults
def test_without_the_folder_of_shortcuts_everything_trains_and_plays(tmp_path):
    """If fast/ is deleted, two small updates give the same numbers except for rounding, and a game is played.

    Nothing that draws works here either: a training goes on without it.
    """
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for name in ("games", "harness", "viewer"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "imageio.py").write_text("raise ImportError('absent')")
    (tmp_path / "matplotlib.py").write_text("raise AttributeError('no _ARRAY_API')")
    (tmp_path / "tensorboard.py").write_text("raise TypeError('protobuf')")

    # Without pairs, because in a minibatch of four what a pair does not share is often mere rounding, then normalised.
    tiny = "--num_envs 2 --rollout_steps 4 --batch_size 4 --n_head 2 --n_embd 8 --num_steps 16 --eval_interval 0"
    tiny = [*tiny.split(), "--paired_envs", "false", "--device", "cpu", "--run_dir"]
    command = [sys.executable, "-c", TRAIN_AND_PLAY, *tiny, "without"]
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert without.returncode == 0, without.stderr
    assert len(logged(tmp_path / "without")) == 2 and "wrote gpt.gif" in without.stdout
    assert [line for line in without.stdout.splitlines() if "warning" in line] == [
        "warning: without: no more TensorBoard events (TypeError: protobuf); training goes on",
        f"warning: {Path('without/learning_curve.png')}: not drawn (AttributeError: no _ARRAY_API); training goes on",
    ]

    assert main([*tiny, str(tmp_path / "with")]) == 0
    slow, quick = (load_checkpoint(tmp_path / name) for name in ("without", "with"))
    assert slow["update_count"] == 2
    for name, x in slow["model"].items():
        torch.testing.assert_close(x, quick["model"][name], rtol=1e-3, atol=1e-4)  # after four steps of 0.002


def test_a_rollout_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    """It is refused before anything is built, with the constants to lower."""
    monkeypatch.setattr(supervise, "free_memory", lambda device: 7e9)
    huge = f"--num_envs 65536 --rollout_steps 65536 --run_dir {tmp_path / 'run'} --device cpu"
    refused = "^a rollout of 4,294,967,296 samples needs 2,147.5 GB .* lower --num_envs or --rollout_steps$"
    with pytest.raises(CommandLineError, match=refused):
        main(huge.split())
    assert not (tmp_path / "run").exists()
