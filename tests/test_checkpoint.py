import errno
import io
import os
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import (CheckpointError, atomic_write, find_checkpoint, load_checkpoint, newest_run,
                        save_checkpoint, to_numpy, to_plain)

ROOT = Path(__file__).resolve().parent.parent


def same(a, b):
    """Equal in value, type and dtype, to any depth; nan equals nan."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def example():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "update": 7, "best": -float("inf"),
            "score": float("nan"), "name": "run", "none": None, "on": True,
            "nested": [1, (2.5, {"x": [torch.ones(2)]})],
            "tokens": torch.arange(5, dtype=torch.uint8), "huge": [2**128 - 1, -2**127]}


def test_round_trip(tmp_path):
    state = example()
    save_checkpoint(tmp_path / "last.pt", state)
    assert same(load_checkpoint(tmp_path / "last.pt"), state)
    assert same(load_checkpoint(tmp_path), state)  # a run directory
    assert "format_version" not in state  # the caller's dict is not touched
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("bad", [np.float64(1), np.zeros(2), {1, 2}, object(), torch.Size([1]), 1j, b"x"])
def test_refuses_what_would_not_load(tmp_path, bad):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]\['b'\]"):
        save_checkpoint(tmp_path / "last.pt", {"a": [0, {"b": bad}]})
    assert not os.listdir(tmp_path)


def test_refuses_odd_keys(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\].*\(1, 2\)"):
        save_checkpoint(tmp_path / "last.pt", {"a": {(1, 2): 3}})


# --- a save that fails or is killed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"update": 1})

    def fail(*args):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            save_checkpoint(path, {"update": 2})
    if expected is CheckpointError:
        assert_one_line(caught.value, path)
        assert "No space left" in str(caught.value)
    assert load_checkpoint(path) == {"update": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_save_into_a_missing_directory(tmp_path):
    path = tmp_path / "gone" / "last.pt"
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, {})
    assert_one_line(caught.value, path)


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    atomic_write(tmp_path / "file", b"12345")
    assert calls[:2] == [("fsync", 5), "replace"]
    assert len(calls) == (3 if os.name == "posix" else 2)  # then the directory
    assert (tmp_path / "file").read_bytes() == b"12345"


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from checkpoint import load_checkpoint, save_checkpoint
torch.set_num_threads(1)  # a thread pool does not survive a fork
path = Path(sys.argv[1]) / "last.pt"
state = lambda i: {"i": i, "x": torch.full((200_000,), i)}

def fork(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(1)
    return pid

def whole():
    loaded = load_checkpoint(path)
    assert bool((loaded["x"] == loaded["i"]).all())
    return loaded["i"]

def forever():
    i = whole()
    while True:
        i += 1
        save_checkpoint(path, state(i))

def killed_at(step):  # step: the name of the os function at whose start the process dies
    def child():
        setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        save_checkpoint(path, state(-1))
    return child

save_checkpoint(path, state(0))
for step in ["fsync", "replace"]:
    _, status = os.waitpid(fork(killed_at(step)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert whole() == 0, step
leftover = trial = 0
while leftover < 3 and trial < 100:  # until three kills fell into a write: on a busy machine most come before
    trial += 1
    pid = fork(forever)
    time.sleep(random.Random(trial).uniform(0.01, 0.06))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child ended by itself"
    whole()
    leftover += path.with_name("last.pt.tmp").exists()
save_checkpoint(path, state(1))
print(whole(), leftover, os.listdir(path.parent))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    final, leftover, names = done.stdout.split(maxsplit=2)
    assert int(leftover) > 0  # otherwise no kill fell into a write, and nothing was tested
    assert final == "1" and names.strip() == "['last.pt']"  # a later save clears what a kill left


# --- files that are no checkpoint -------------------------------------------------------------------------------------


def assert_one_line(error, path):
    message = str(error)
    assert message.startswith(f"{path}: ") and "\n" not in message and "; " in message


def torch_bytes(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello/readme.txt", "hello")
    return buffer.getvalue()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"hello, I am no checkpoint\n", "not a checkpoint"),
    "zeros": (bytes(1000), "not a checkpoint"),
    "zip": (zip_bytes(), "not a PyTorch file"),
    "truncated": (torch_bytes({"format_version": 1, "x": torch.ones(1000)})[:3000], "cut off or damaged"),
    "state_dict": (torch_bytes(torch.nn.Linear(2, 2).state_dict()), "another kind"),
    "list": (torch_bytes([1, 2]), "another kind"),
    "odd version": (torch_bytes({"format_version": "1"}), "another kind"),
    "newer": (torch_bytes({"format_version": 2}), "update the code"),
    "malicious": (torch_bytes({"format_version": 1, "x": Malicious()}), "foreign code"),
    "numpy": (torch_bytes({"format_version": 1, "x": np.zeros(2)}), "foreign code"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data, reason = BAD_FILES[kind]
    path = tmp_path / "bad.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert_one_line(caught.value, path)
    assert os.listdir(tmp_path) == ["bad.pt"]  # nothing ran


def test_missing_file_and_empty_directory(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert_one_line(caught.value, path)


def test_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {})

    def denied(self):  # chmod does not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    for method, reason in (("read_bytes", "cannot be read"), ("is_file", "cannot be read")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, denied)
            with pytest.raises(CheckpointError, match=reason) as caught:
                load_checkpoint(path)
        assert_one_line(caught.value, path)


def test_damage_is_noticed_or_harmless(tmp_path):
    """Any one wrong byte gives an error or, in padding and dates, the same contents; any cut gives an error."""
    state = {"x": torch.arange(300), "update": 5}
    path = tmp_path / "last.pt"
    save_checkpoint(path, state)
    good = path.read_bytes()
    refused = 0
    for i in range(0, len(good), 5):
        path.write_bytes(good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1:])
        try:
            assert same(load_checkpoint(path), state), i
        except CheckpointError:
            refused += 1
    assert refused > len(good) / 5 / 2
    for length in random.Random(0).sample(range(len(good)), 100):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_find_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "best_model.pt", {})
    save_checkpoint(tmp_path / "last.pt", {})
    assert find_checkpoint(str(tmp_path / "best_model.pt")) == tmp_path / "best_model.pt"
    assert find_checkpoint(tmp_path) == tmp_path / "last.pt"
    assert find_checkpoint(tmp_path, ("best_model.pt", "last.pt")) == tmp_path / "best_model.pt"
    assert find_checkpoint(tmp_path, ("none.pt", "last.pt")) == tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="no a.pt or b.pt"):
        find_checkpoint(tmp_path, ("a.pt", "b.pt"))


def test_newest_run(tmp_path):
    assert newest_run(tmp_path / "missing") is None and newest_run(tmp_path) is None
    for name, when in (("a", 100), ("b", 300), ("c", 200), ("d", 300)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "best_model.pt", {})
        os.utime(tmp_path / name / "best_model.pt", (when, when))
    (tmp_path / "e").mkdir()  # newest of all, but nothing in it
    assert newest_run(tmp_path) == tmp_path / "d"
    assert newest_run(tmp_path, "last.pt") is None


# --- numpy and random states ------------------------------------------------------------------------------------------


def test_numpy_round_trip(tmp_path):
    backward = np.arange(6, dtype=np.int64)[::-1].reshape(2, 3)
    state = {"x": backward, "alive": np.array([True, False]), "zero": np.array(3.5),
             "n": [np.uint8(7), (np.float32(2),)],
             "keys": np.arange(3, dtype=np.uint32), "text": "a", "none": None}
    save_checkpoint(tmp_path / "last.pt", to_plain(state))
    expected = {**state, "n": [7, (2.0,)]}
    assert same(to_numpy(load_checkpoint(tmp_path / "last.pt")), expected)


def test_to_plain_takes_a_snapshot():
    array = np.zeros(2)
    plain = to_plain({"a": array})
    array[:] = 1
    assert plain["a"].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [{1}, np.array(["a"]), np.array([None])])
def test_to_plain_names_what_it_cannot_convert(bad):
    with pytest.raises(TypeError, match=r"state\['a'\]\[0\]"):
        to_plain(OrderedDict(a=[bad]))
