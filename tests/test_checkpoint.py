import contextlib
import errno
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import needs_posix

from harness.checkpoint import (
    CheckpointError,
    _checksum,
    _read,
    check_like,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    newest_run,
    save_checkpoint,
    to_numpy,
    to_plain,
)
from harness.files import atomic_write, replacing

ROOT = Path(__file__).resolve().parent.parent


def same(a, b):
    """Whether two states are equal in value, type and dtype, to any depth; nan equals nan."""
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
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "update": 7,
        "best": -float("inf"),
        "score": float("nan"),
        "name": "run",
        "none": None,
        "on": True,
        "nested": [1, (2.5, {"x": [torch.ones(2)]})],
        "tokens": torch.arange(5, dtype=torch.uint8),
        "huge": [2**128 - 1, -(2**127)],
    }


def test_round_trip(tmp_path):
    state = example()
    save_checkpoint(tmp_path / "last.safetensors", state)
    assert same(load_checkpoint(tmp_path / "last.safetensors"), state)
    assert same(load_checkpoint(tmp_path), state)  # a run directory
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_other_tools_read_the_file(tmp_path):
    """Other programs find every tensor under a flat name, and everything else as JSON."""
    state = example()
    save_checkpoint(tmp_path / "last.safetensors", state)
    names = {"model.weight", "model.bias", "nested.1.1.x.0", "tokens"} | {
        f"optimizer.state.{i}.{moment}" for i in (0, 1) for moment in ("step", "exp_avg", "exp_avg_sq")
    }
    tensors = safetensors.torch.load_file(tmp_path / "last.safetensors")
    assert tensors.keys() == names and torch.equal(tensors["model.weight"], state["model"]["weight"])
    with safetensors.safe_open(tmp_path / "last.safetensors", "np") as file:
        assert file.get_tensor("tokens").tolist() == [0, 1, 2, 3, 4]
        assert json.loads(file.metadata()["state"])["update"] == 7


def test_a_tensor_in_two_places_is_saved_once(tmp_path):
    x, equal = torch.ones(10_000), torch.ones(10_000)
    save_checkpoint(tmp_path / "a", {"a": x, "b": [x, equal]})
    assert 80_000 < (tmp_path / "a").stat().st_size < 90_000
    assert same(load_checkpoint(tmp_path / "a"), {"a": x, "b": [x, x]})


def test_odd_names_come_back(tmp_path):
    """Some keys are no strings, mean something to this format, or give two tensors the same flat name."""
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    for state in (
        {0: one, "0": two, -1: {"": three}},
        {"a.b": one, "a": {"b": two, "b'": three}},
        {"a.b'": one, "a.b": two, "a": {"b": three}},
        {"$tensor": "x", "a": {"$tuple": [1], "$dict": {}}, "b": {"$tensor": one}},
        {"sha256": "x", "state": {}, "format_version": -3, '"': "\ud800\n\0"},
        {"": (), "a": [[], {}, ((),)], "b": [OrderedDict(x=1)]},
    ):
        save_checkpoint(tmp_path / "last.safetensors", state)
        assert same(load_checkpoint(tmp_path), state)


@pytest.mark.parametrize("bad", [np.float64(1), np.zeros(2), {1, 2}, object(), torch.Size([1]), 1j, b"x"])
def test_refuses_what_would_not_load(tmp_path, bad):
    with pytest.raises(TypeError, match="^a.1.b: a checkpoint cannot hold this"):
        save_checkpoint(tmp_path / "last.safetensors", {"a": [0, {"b": bad}]})
    assert not os.listdir(tmp_path)


def test_refuses_odd_keys(tmp_path):
    with pytest.raises(TypeError, match=r"^a: .*\(1, 2\)"):
        save_checkpoint(tmp_path / "last.safetensors", {"a": {(1, 2): 3}})


# --- a save that fails or is killed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "last.safetensors"
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
        assert "No space left on device), the earlier file of this name is intact;" in str(caught.value)
    assert load_checkpoint(path) == {"update": 1}
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_save_into_a_missing_directory(tmp_path):
    path = tmp_path / "gone" / "last.safetensors"
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, {})
    assert_one_line(caught.value, path)
    assert "intact" not in str(caught.value)  # there was no file


@needs_posix
def test_a_file_is_replaced_when_its_successor_is_whole(tmp_path):
    """A link stays a link, other files stay, and what is no ordinary file is refused."""
    (tmp_path / "real.gif").write_bytes(b"old")
    (tmp_path / "link.gif").symlink_to("real.gif")
    (tmp_path / "link.gif.part").write_bytes(b"mine")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "link.gif") as file:
        file.write_bytes(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "real.gif").read_bytes() == b"old"
    with replacing(tmp_path / "link.gif") as file:
        file.write_bytes(b"new")
    assert (tmp_path / "real.gif").read_bytes() == b"new" and (tmp_path / "link.gif").is_symlink()
    assert (tmp_path / "link.gif.part").read_bytes() == b"mine" and len(os.listdir(tmp_path)) == 3
    (tmp_path / "null.gif").symlink_to(os.devnull)
    for path, reason in (
        (tmp_path / "null.gif", "is no ordinary file"),
        (tmp_path / "gone" / "x.gif", r"not written \(No such file"),
    ):
        with pytest.raises(OSError, match=reason) as caught, replacing(path) as file:
            file.write_bytes(b"new")
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
from harness.checkpoint import load_checkpoint, save_checkpoint
torch.set_num_threads(1)  # a thread pool does not survive a fork
path = Path(sys.argv[1]) / "last.safetensors"
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
    leftover += path.with_name("last.safetensors.tmp").exists()
save_checkpoint(path, state(1))
print(whole(), leftover, os.listdir(path.parent))
"""


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    final, leftover, names = done.stdout.split(maxsplit=2)
    assert int(leftover) > 0  # otherwise no kill fell into a write, and nothing was tested
    assert final == "1" and names.strip() == "['last.safetensors']"  # a later save clears what a kill left


# --- files that are no checkpoint -------------------------------------------------------------------------------------


def assert_one_line(error, path):
    message = str(error)
    assert message.startswith(f"{path}: ") and "\n" not in message and "; " in message


def torch_bytes(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def file_bytes(header, data=b""):
    """Returns a safetensors file with this header: a dict, or bytes in place of its JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def signed(text, tensors=None, version="2"):
    """Returns a checkpoint with this text in place of its JSON, and a right checksum."""
    metadata = {"format_version": version, "sha256": _checksum(text, tensors or {}), "state": text}
    return safetensors.torch.save(tensors or {}, metadata)


def tensor_bytes(shape, dtype="F32", size=4):
    """Returns a file with one tensor that claims this shape, and with `size` bytes of numbers."""
    metadata = {"format_version": "2", "sha256": "0", "state": "{}"}
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    return file_bytes({"__metadata__": metadata, "x": tensor}, bytes(size))


BAD_FILES = {
    "empty": (b"", "header too small"),
    "text": (b"hello, I am no checkpoint\n", "is no checkpoint, or is cut off or damaged"),
    "zeros": (bytes(1000), "is no checkpoint, or is cut off or damaged"),
    "zip": (torch_bytes([1, 2]), "is no checkpoint, or is cut off or damaged"),
    "truncated": (signed("{}", {"x": torch.ones(1000)})[:3000], "is cut off or damaged"),
    "weights": (safetensors.torch.save({"x": torch.ones(2)}), "of another program"),
    "metadata": (safetensors.torch.save({}, {"format": "pt"}), "of another program"),
    "odd version": (signed("{}", version="two"), "of another program"),
    "newer": (signed("{}", version="3"), "has format version 3, not 2 .update the code."),
    "newer and long": (signed("{}", version="3" * 10**6), "has format version 3{196} ..., not 2 ."),
    "no state": (safetensors.torch.save({}, {"format_version": "2"}), "damaged .'state'"),
    "long": (signed('{"x": "' + "a" * 2**25 + '"}'), "holds more values than any training has"),
    "other checksum": (signed("{}").replace(b'"{}"', b'"[]"'), "is not what was saved"),
    "list": (signed("[]"), "holds no state"),
    "number": (signed("1"), "holds no state"),
    "no JSON": (signed("{"), "Expecting"),
    "lost tensor": (signed('{"x": {"$tensor": "x"}}'), "damaged .'x'"),
    "odd tensor": (signed('{"x": {"$tensor": []}}'), "unhashable"),
    "odd dict": (signed('{"x": {"$dict": [1]}}'), "is cut off or damaged"),
    "odd tuple": (signed('{"x": {"$tuple": 1}}'), "is cut off or damaged"),
    "deep": (signed('{"x": ' + "[" * 10**5 + "]" * 10**5 + "}"), "recursion"),
    "long number": (signed('{"x": 1' + "0" * 5000 + "}"), "4300 digits"),
    "shape": (tensor_bytes([2]), "is cut off or damaged"),
    "huge shape": (tensor_bytes([2**40, 2**40]), "is cut off or damaged"),
    "huge empty shape": (tensor_bytes([0, 2**63], size=0), "is cut off or damaged"),
    "odd dtype": (tensor_bytes([8], "F4"), "is cut off or damaged"),
    "unknown dtype": (tensor_bytes([4], "X8"), "is cut off or damaged"),
    "more axes than numbers": (tensor_bytes([1] * 10**5), "is not what was saved"),
    "deep header": (file_bytes(b'{"__metadata__":' + b"[" * 10**5), "is cut off or damaged"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, kind):
    data, reason = BAD_FILES[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert_one_line(caught.value, path)
    assert len(str(caught.value)) < 600


def test_a_run_of_an_earlier_version(tmp_path):
    """A .pt file is refused in one line, without being unpickled, wherever it is found."""
    for name, data in (("last.pt", torch_bytes({"format_version": 1})), ("best_model.pt", b"x")):
        (tmp_path / name).write_bytes(data)
        for path in (tmp_path, tmp_path / name):
            file = find_checkpoint(path, ("best_model.safetensors", "last.safetensors"))
            with pytest.raises(CheckpointError, match="is a .pt file, which older versions read") as caught:
                load_checkpoint(file)
            assert_one_line(caught.value, file)


def test_missing_file_and_empty_directory(tmp_path):
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert_one_line(caught.value, path)


def test_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {})

    def denied(*_, **__):  # chmod does not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(safetensors, "safe_open", denied)
    with pytest.raises(CheckpointError, match="cannot be read .Permission denied") as caught:
        load_checkpoint(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.faults)])
def test_a_wrong_byte_or_bit_is_noticed_or_harmless(tmp_path, share):
    """A changed bit or byte is an error or, in the padding, changes no contents; a cut is always an error."""
    state, path = {"x": torch.arange(300), "update": 5, "on": torch.ones(3) > 0}, tmp_path / "last.safetensors"
    save_checkpoint(path, state)
    good, refused = path.read_bytes(), 0
    header = 8 + struct.unpack("<Q", good[:8])[0]
    changes = [(i, 1 << bit) for i in range(header) for bit in range(8)] + [(i, 0xFF) for i in range(header, len(good))]
    changes = random.Random(0).sample(changes, int(share * len(changes)))
    for i, mask in changes:
        path.write_bytes(good[:i] + bytes([good[i] ^ mask]) + good[i + 1 :])
        try:
            assert same(_read(path), state), (i, mask)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0.98 * len(changes)
    for length in random.Random(0).sample(range(len(good)), 30):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError):
            _read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"gpt_config": {"n_head": 8}},
        {"update": 8},
        {"x": torch.arange(4)},
        {"x": torch.zeros(4)},
        {"x": torch.ones(2, 2)},
        {"y": 1},
        {"y": torch.ones(4)},
    ],
)
def test_what_is_edited_is_not_what_was_saved(tmp_path, change):
    """The checksum covers the JSON as well as the tensors."""
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"gpt_config": {"n_head": 16}, "update": 7, "x": torch.ones(4)})
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = file.get_tensors(), file.metadata()
    for name, value in change.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            metadata["state"] = json.dumps(json.loads(metadata["state"]) | {name: value})
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="is not what was saved .its checksum differs") as caught:
        load_checkpoint(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    save_checkpoint(tmp_path / "last.safetensors", {"best": -math.inf, "model": {"w": torch.tensor([0.0, number])}})
    with pytest.raises(CheckpointError, match="model.w is not finite") as caught:
        load_checkpoint(tmp_path)
    assert_one_line(caught.value, tmp_path / "last.safetensors")


def test_the_newest_good_checkpoint_is_named(tmp_path):
    for age, name, state in (
        (3, "checkpoint_1.safetensors", {"optimizer": 1}),
        (2, "checkpoint_2.safetensors", {"optimizer": 1}),
        (1, "best_model.safetensors", {}),
    ):
        save_checkpoint(tmp_path / name, state)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    save_checkpoint(tmp_path / "stage_7.safetensors", {})  # newer than all, but it stands in for none of them
    (tmp_path / "last.safetensors").write_bytes(b"")
    (tmp_path / "directory.safetensors").mkdir()
    for name in ("last.safetensors", "lost.safetensors"):
        with pytest.raises(CheckpointError, match=r"newest good one here is .*checkpoint_2.safetensors\)$") as caught:
            load_checkpoint(tmp_path / name)
        assert_one_line(caught.value, tmp_path / name)
    for name in ("checkpoint_1.safetensors", "checkpoint_2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"newest good one here is .*best_model.safetensors\)$"):
        load_checkpoint(tmp_path)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    """Such a file is not read either to find a good checkpoint beside one that is missing."""
    save_checkpoint(tmp_path / "good.safetensors", {"optimizer": {}})
    os.utime(tmp_path / "good.safetensors", (1e9, 1e9))
    tensor = {"dtype": "U8", "shape": [10**13], "data_offsets": [0, 10**13]}
    start = file_bytes({"__metadata__": {"format_version": "2", "sha256": "", "state": "{}"}, "x": tensor})
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(start)
        file.truncate(len(start) + 10**13)  # a sparse file: it needs no space
    for name, reason in (
        ("large.safetensors", r"has 10,000 GB, and this machine .*newest good one here is .*good.safetensors"),
        ("larg.safetensors", "good.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_checkpoint(tmp_path / name)
        assert_one_line(caught.value, tmp_path / name)


# --- comparing with what a program has --------------------------------------------------------------------------------


OWN = {
    "model": {"w": torch.ones(2, 3)},
    "count": 0,
    "seconds": 0.0,
    "best": -math.inf,
    "on": True,
    "name": "a",
    "last_action": None,
    "returns": [],
    "games": [{"lives": 1}, {"lives": 2}],
    "pending": ({"step": 0},),
    "bytes": torch.zeros(4, dtype=torch.uint8),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seconds": 3},
        {"best": 1.5},
        {"name": "b"},
        {"last_action": 3},
        {"last_action": (1, 2)},
        {"returns": [1.5, -2, 3]},
        {"pending": []},
        {"pending": [{"step": 1}, {"step": 2, "more": "x"}]},
        {"bytes": torch.zeros(9, dtype=torch.uint8)},
        {"more": object()},
    ],
)
def test_what_is_alike(change):
    check_like({**OWN, **change}, OWN)


@pytest.mark.parametrize(
    "place, value",
    [
        ("model", 3),
        ("model", {}),
        ("model", {"w": 1.0}),
        ("model", {"w": torch.ones(3, 2)}),
        ("model", {"w": torch.ones(2, 3).double()}),
        ("count", -1),
        ("count", 1.0),
        ("count", True),
        ("count", "1"),
        ("count", 10**400),
        ("seconds", math.nan),
        ("seconds", math.inf),
        ("seconds", "1"),
        ("seconds", 10**400),
        ("best", math.nan),
        ("on", 1),
        ("name", 1),
        ("name", None),
        ("last_action", "x"),
        ("last_action", [[1]]),
        ("last_action", torch.ones(1)),
        ("returns", ["x"]),
        ("returns", 3),
        ("returns", [math.nan]),
        ("returns", None),
        ("games", [{"lives": 1}]),
        ("games", [{"lives": 1}, {"lives": "x"}]),
        ("games", {}),
        ("pending", [3]),
        ("pending", [{}]),
        ("pending", None),
        ("bytes", torch.zeros(4)),
        ("bytes", torch.zeros(2, 2, dtype=torch.uint8)),
        ("bytes", b"x"),
    ],
)
def test_what_is_not_alike_is_named(place, value):
    with pytest.raises(ValueError, match=rf"^state\['{place}'\]") as caught:
        check_like({**OWN, place: value}, OWN)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^state lacks '{place}'$"):
        check_like({name: x for name, x in OWN.items() if name != place}, OWN)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        {"state": 3},
        {"state": {0: {}}},
        {"state": {0: torch.ones(2)}},
        {"state": {"0": "x"}},
        "shape",
        "dtype",
        "step",
    ],
)
def test_moments_that_are_those_of_other_parameters_are_refused(wrong):
    """torch would load them, and Adam with moments of another shape ended in a segmentation fault."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3))]
    optimizer, other = torch.optim.Adam(parameters, lr=0.1, fused=True), torch.optim.Adam(parameters, lr=0.5)
    parameters[0].sum().backward()
    other.step()
    saved = to_plain(other.state_dict())
    load_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["lr"] == 0.1 and torch.equal(
        optimizer.state[parameters[0]]["exp_avg"], saved["state"][0]["exp_avg"]
    )
    optimizer.step()  # which leaves what was loaded as it is
    assert saved["state"][0]["step"] == 1 and optimizer.state[parameters[0]]["step"] == 2
    load_optimizer(optimizer, {"state": {}})  # that of a run before its first update
    if wrong in ("shape", "dtype", "step"):
        name = "step" if wrong == "step" else "exp_avg"
        saved["state"][0][name] = {
            "shape": torch.ones(7),
            "dtype": torch.ones(2, 3).double(),
            "step": torch.ones(2, 3),
        }[wrong]
        wrong = saved
    with pytest.raises(ValueError, match=r"^state\['optimizer'\]"):
        load_optimizer(optimizer, wrong)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_find_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "best_model.safetensors", {})
    save_checkpoint(tmp_path / "last.safetensors", {})
    assert find_checkpoint(str(tmp_path / "best_model.safetensors")) == tmp_path / "best_model.safetensors"
    assert find_checkpoint(tmp_path) == tmp_path / "last.safetensors"
    assert (
        find_checkpoint(tmp_path, ("best_model.safetensors", "last.safetensors")) == tmp_path / "best_model.safetensors"
    )
    assert find_checkpoint(tmp_path, ("none.safetensors", "last.safetensors")) == tmp_path / "last.safetensors"
    with pytest.raises(CheckpointError, match="no a.safetensors or b.safetensors"):
        find_checkpoint(tmp_path, ("a.safetensors", "b.safetensors"))


def test_newest_run(tmp_path):
    assert (
        newest_run(tmp_path / "missing", lambda state: True) is None
        and newest_run(tmp_path, lambda state: True) is None
    )
    for name, when in (("a", 100), ("b", 300), ("c", 200), ("d", 300)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "best_model.safetensors", {"name": name})
        os.utime(tmp_path / name / "best_model.safetensors", (when, when))
    (tmp_path / "e").mkdir()  # newest of all, but nothing in it
    with contextlib.suppress(OSError):  # on Windows most users may not make links
        (tmp_path / "e" / "last.safetensors").symlink_to("nowhere")
    assert newest_run(tmp_path, lambda state: True) == tmp_path / "d"
    assert newest_run(tmp_path, lambda state: state["name"] in "ac") == tmp_path / "c"
    assert newest_run(tmp_path, lambda state: False) is None
    save_checkpoint(tmp_path / "a" / "last.safetensors", {"name": "a"})  # a run is as new as what it wrote last
    assert newest_run(tmp_path, lambda state: True) == tmp_path / "a"


# --- numpy and random states ------------------------------------------------------------------------------------------


def test_numpy_round_trip(tmp_path):
    backward = np.arange(6, dtype=np.int64)[::-1].reshape(2, 3)
    state = {
        "x": backward,
        "alive": np.array([True, False]),
        "zero": np.array(3.5),
        "n": [np.uint8(7), (np.float32(2),)],
        "keys": np.arange(3, dtype=np.uint32),
        "text": "a",
        "none": None,
    }
    save_checkpoint(tmp_path / "last.safetensors", to_plain(state))
    expected = {**state, "n": [7, (2.0,)]}
    assert same(to_numpy(load_checkpoint(tmp_path / "last.safetensors")), expected)


def test_to_plain_takes_a_snapshot():
    array = np.zeros(2)
    plain = to_plain({"a": array})
    array[:] = 1
    assert plain["a"].tolist() == [0, 0]


def test_to_plain_overwrites_an_older_copy_where_it_fits():
    """Tensors and arrays of the same shape and type keep their memory; whatever else has changed gets new memory."""
    old = to_plain({"x": torch.ones(2, 3), "y": np.ones(4), "z": [torch.ones(1), 1], "w": torch.ones(2), "v": 1})
    kept = {name: old[name].data_ptr() for name in ("x", "y", "w")}
    new = {
        "x": torch.arange(6.0).view(3, 2).T,
        "y": np.arange(4.0),
        "z": [torch.zeros(1), 2, torch.zeros(2)],
        "w": torch.zeros(2, dtype=torch.int64),
        "v": None,
    }
    copy = to_plain(new, old)
    assert same(copy, to_plain(new))
    assert {name: copy[name].data_ptr() == pointer for name, pointer in kept.items()} == {
        "x": True,
        "y": True,
        "w": False,
    }


def test_a_layout_in_memory_comes_back_contiguous(tmp_path):
    """A safetensors file holds contiguous tensors only."""
    x = torch.arange(6.0).reshape(2, 3).T
    save_checkpoint(tmp_path / "last.safetensors", to_plain({"x": x, "y": x.numpy(), "z": torch.ones(1).expand(3)}))
    state = load_checkpoint(tmp_path)
    assert same(state, {"x": x, "y": x, "z": torch.ones(3)}) and state["x"].is_contiguous()


@pytest.mark.parametrize("bad", [{1}, np.array(["a"]), np.array([None])])
def test_what_to_plain_cannot_convert_is_refused(tmp_path, bad):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "last.safetensors", to_plain({"a": [bad]}))
