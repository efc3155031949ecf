"""Damaged and forged files, and trainings that are killed at random moments. They take minutes and need --faults."""

import copy
import functools
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SIGKILL, needs_posix
from test_checkpoint import example, same
from test_train_ppo import SMALL, logged

import algorithms.parts.training
import train_ppo
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from harness.runs import locked

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.faults


def damaged(data, rng):
    """Return the data with flipped bits, without its end, with two stretches swapped, or with a stretch of zeros."""
    data = bytearray(data)
    kind = rng.choice(["flips", "cut", "swap", "zeros"])
    length = rng.choice([1, 8, 64, 1000])
    i, j = (rng.randrange(len(data) - length) for _ in range(2))
    if kind == "flips":
        for place in rng.choices(range(len(data)), k=rng.choice([1, 1, 2, 10])):
            data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[i:]
    elif kind == "swap":
        data[i : i + length], data[j : j + length] = data[j : j + length], data[i : i + length]
    else:
        data[i : i + length] = bytes(length)
    return bytes(data)


def test_a_thousand_damaged_checkpoints(tmp_path):
    """Every damaged file is refused in one line, unless the damage changes nothing of what was saved."""
    save_checkpoint(tmp_path / "new.safetensors", example() | {"score": 0.5})
    rng, refused = random.Random(0), 0
    for source in (tmp_path / "new.safetensors", ROOT / "pretrained" / "breakout.safetensors"):
        data, state = source.read_bytes(), load_checkpoint(source)
        for trial in range(500):
            path = tmp_path / "damaged" / "bad.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged(data, rng))
            try:
                assert same(load_checkpoint(path), state), (source, trial)
            except CheckpointError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
                refused += 1
    assert refused > 900


def places(value, path=()):
    """Yield the path of keys to every value in a state."""
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def strange(value, rng):
    """Return something that does not belong in the place of a value."""
    others = [None, True, -1, 10**30, float("nan"), -2.5, "\x1b[31m\n", [], ["a"], {}]
    others += [{0: torch.ones(2)}, torch.ones(3), torch.ones(4, dtype=torch.int64)]
    if isinstance(value, torch.Tensor):
        others += [value[None], value.flatten()[:1], value.double(), value.int(), value.bool()]
        others.append(torch.full_like(value, 1 if value.dtype == torch.bool else 100))
    if isinstance(value, list):
        others += [[value], value * 2]
    if isinstance(value, dict):
        others += [[value], {f"{key}x": item for key, item in value.items()}]
    return rng.choice(others)


# Options with which each training takes seconds.
SMALL_RUNS = {
    "train_ppo": f"{SMALL} --num_steps 64",
    "reinforce_cartpole": "--episodes 2 --hidden 4 --num_steps 40",
    "ppo_lunarlander": "--num_envs 2 --rollout_steps 64 --batch_size 32 --epochs 1 --hidden 8 --num_steps 256",
    "actor_critic_tictactoe": "--games 8 --hidden 8 --pool 2 --num_steps 40",
    "dqn_space_invaders": "--num_envs 2 --update_steps 12 --replay_size 100 --burn_in 40 --batch_size 4 --num_steps 24 "
    "--keep_replay true",
    "ppo_llm_breakout": "--model mlp --num_envs 2 --rollout_steps 8 --batch_size 8 --epochs 1 --num_steps 32 "
    "--video_freq 0",
}


@pytest.mark.parametrize("training", SMALL_RUNS)
def test_a_strange_value_anywhere_in_a_checkpoint(training, tmp_path, without_processes, capsys):
    """One line says what is wrong with a forged file whose checksum is right, unless nobody reads the forged value."""
    if training == "train_ppo":
        main = train_ppo.main
    else:
        module = importlib.import_module(f"algorithms.{training}")
        main = functools.partial(algorithms.parts.training.run_algorithm, module.ALGORITHM)
    small = [*SMALL_RUNS[training].split(), "--eval_interval", "0", "--device", "cpu"]
    refused, rng = 0, random.Random(0)
    assert main([*small, "--run_dir", str(tmp_path / "run")]) == 0
    state = load_checkpoint(tmp_path / "run")
    for trial in range(30):
        hostile, path = copy.deepcopy(state), rng.choice(list(places(state)))
        *parents, last = path
        parent = functools.reduce(lambda value, key: value[key], parents, hostile)
        parent[last] = strange(parent[last], rng)
        shutil.copytree(tmp_path / "run", tmp_path / f"{trial}")
        save_checkpoint(tmp_path / f"{trial}" / "last.safetensors", hostile)
        try:
            status = main(["--resume", str(tmp_path / f"{trial}"), "--num_steps", str(state["global_step"] + 1)])
            assert status == 0 or "is not finite" in capsys.readouterr().err  # weights and rewards can be too large
        except (CheckpointError, CommandLineError) as error:
            refused += 1
            assert "\n" not in str(error), path
        except FloatingPointError:
            pass  # The forged weights may be too large.
        except BaseException as error:
            raise AssertionError(f"{path}: {parent[last]!r}") from error
    assert refused > 8


# Kills a training fifty times. It prints the number of kills, and how many of them have left half-written files.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import matplotlib.figure, torch.utils.tensorboard  # Imported once for all children.
import train_ppo
from harness.checkpoint import load_checkpoint
torch.set_num_threads(1)  # A thread pool does not survive a fork.
folder, small = sys.argv[1], sys.argv[2].split()
run_dir, rng, kills, leftovers = Path(folder, "killed"), random.Random(0), 0, 0

def start(arguments):  # Returns the process id of a training.
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(train_ppo.main(arguments))
    return pid

assert os.waitstatus_to_exitcode(os.waitpid(start([*small, "--run_dir", f"{folder}/straight"]), 0)[1]) == 0
while True:
    resumable = (run_dir / "last.safetensors").exists()
    before = load_checkpoint(run_dir)["update_count"] if resumable else 0
    pid = start(["--resume", str(run_dir)] if resumable else [*small, "--run_dir", str(run_dir)])
    deadline = time.monotonic() + rng.uniform(0.05, 0.6)
    while kills < 50 and time.monotonic() < deadline:
        time.sleep(0.002)
    saving = run_dir / "last.safetensors.tmp"
    while kills < 50 and kills % 2 and time.monotonic() < deadline + 2 and not saving.exists():
        pass  # Every other kill falls into a save.
    if kills < 50:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if kills == 50 or status == 0:
        break
    assert status == -signal.SIGKILL, status
    kills += 1
    leftovers += any(run_dir.glob("*.tmp"))
    for file in run_dir.glob("*.safetensors"):
        assert load_checkpoint(file)["update_count"] >= (before if file.name == "last.safetensors" else 0), file
assert status == 0 and not list(run_dir.glob("*.safetensors.tmp")), status
print(kills, leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_training_that_is_killed_fifty_times(tmp_path):
    """Every checkpoint loads after every kill, and the run ends with the numbers and rows of one that never stopped."""
    small = f"{SMALL} --num_steps {200 * 32} --eval_interval 0 --save_freq 1"
    command = [sys.executable, "-c", KILLS, tmp_path, small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kills, leftovers = map(int, done.stdout.split()[-2:])
    # With fewer, the training ended too early; without leftovers, no kill fell into a write.
    assert kills == 50 and leftovers > 0, done.stdout
    states = [load_checkpoint(tmp_path / name) for name in ("straight", "killed")]
    for state in states:
        assert state.pop("seconds") > 0 and state.pop("run_id") and state["constants"].pop("RUN_DIR")
    assert states[0]["update_count"] == 200 and same(*states)
    assert len(logged(tmp_path / "straight")) == 200 and logged(tmp_path / "straight") == logged(tmp_path / "killed")


# Options of a training that neither ends nor saves by itself.
ENDLESS = "--num_envs 2 --rollout_steps 8 --batch_size 8 --eval_interval 1000000 --save_freq 1000000"
ENDLESS += " --num_steps 1000000000 --paired_envs false"


def start(log, *command):
    """Start one of our programs with its output in a file, because its trainings would keep a pipe open."""
    with open(log, "a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, command)]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)


def wait_until(condition, seconds=120):
    """Wait for a condition, and fail if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@needs_posix
@pytest.mark.parametrize("program", ["sweep.py", "torchrun"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, SIGKILL])
def test_trainings_save_and_end_with_the_program_that_started_them(tmp_path, program, signum):
    """Trainings do not outlive a sweep or torchrun that is terminated or killed."""
    if program == "sweep.py":
        command = ["sweep.py", "train_ppo", *ENDLESS.split(), "--seed", 0, 1, "--out", tmp_path]
    else:
        command = "-m torch.distributed.run --standalone --nproc_per_node=2 train_ppo.py".split()
        command += [*ENDLESS.split(), "--device", "cpu", "--run_dir", tmp_path / "run"]
    process = start(tmp_path / "log", *command)
    wanted = 2 if program == "sweep.py" else 1
    wait_until(lambda: len(list(tmp_path.glob("*/metrics.csv"))) == wanted)
    process.send_signal(signum)
    process.wait(60)
    runs = [path.parent for path in tmp_path.glob("*/metrics.csv")]
    wait_until(lambda: all(free(run) for run in runs))
    # After their start they were saved only because they were stopped.
    assert all(load_checkpoint(run)["update_count"] > 0 for run in runs)


@needs_posix
def test_a_sweep_goes_on_with_the_runs_of_one_that_was_killed(tmp_path):
    """A second sweep joins, waits while the first trains all there is to train, and takes over when that is killed."""
    command = ["sweep.py", "train_ppo", *ENDLESS.split(), "--seed", 0, "--out", tmp_path]
    first = start(tmp_path / "first", *command)
    wait_until(lambda: list(tmp_path.glob("*/metrics.csv")))
    second = start(tmp_path / "second", *command)
    wait_until(lambda: "1 runs, " in (tmp_path / "second").read_text())
    time.sleep(2)
    assert "seed=0" not in (tmp_path / "second").read_text()
    first.kill()
    first.wait()
    wait_until(lambda: "seed=0 goes on" in (tmp_path / "second").read_text())
    (run_dir,) = (path.parent for path in tmp_path.glob("*/metrics.csv"))
    wait_until(lambda: not free(run_dir))
    second.terminate()
    assert second.wait(60) == 1 and "sweep.py: stopped; start again to go on" in (tmp_path / "second").read_text()
    assert free(run_dir)


def free(run_dir):
    """Return whether no process trains in this directory."""
    try:
        with locked(run_dir):
            return True
    except CommandLineError:
        return False


def test_no_training_needs_what_only_draws():
    """Trainings can be imported where Pillow, matplotlib and TensorBoard are missing."""
    names = ("reinforce_cartpole", "actor_critic_tictactoe", "ppo_lunarlander", "dqn_space_invaders", "grpo_text")
    trainings = ["train_ppo", *(f"algorithms.{name}" for name in names)]
    broken = "import sys; sys.modules |= dict.fromkeys(['PIL', 'matplotlib', 'tensorboard', 'torch.utils.tensorboard'])"
    subprocess.run([sys.executable, "-c", f"{broken}; import {', '.join(trainings)}"], cwd=ROOT, check=True)
