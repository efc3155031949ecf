import contextlib
import errno
import io
import math
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

from harness.checkpoint import (
    CheckpointError,
    _read,
    atomic_write,
    check_like,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    newest_run,
    replacing,
    save_checkpoint,
    to_numpy,
    to_plain,
)

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
        assert "No space left on device), the earlier file of this name is intact;" in str(caught.value)
    assert load_checkpoint(path) == {"update": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_save_into_a_missing_directory(tmp_path):
    path = tmp_path / "gone" / "last.pt"
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, {})
    assert_one_line(caught.value, path)
    assert "intact" not in str(caught.value)  # there was no file


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
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
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
    "truncated": (torch_bytes({"format_version": 1, "x": torch.ones(1000)})[:3000], "is cut off or damaged"),
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

    def denied(self, *_):  # chmod does not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    for method, reason in (("open", "cannot be read"), ("is_file", "cannot be read")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, denied)
            with pytest.raises(CheckpointError, match=reason) as caught:
                load_checkpoint(path)
        assert_one_line(caught.value, path)


def older(state):
    """A file of a version that had no checksum of its own."""
    return torch_bytes({**state, "format_version": 1})


def newer(state, folder):
    save_checkpoint(folder / "new.pt", state)
    return (folder / "new.pt").read_bytes()


@pytest.mark.parametrize("share", [0.03, pytest.param(1, marks=pytest.mark.faults)])
def test_a_wrong_byte_or_bit_is_noticed_or_harmless(tmp_path, share):
    """A share of the bits of the directory at the end, which the archive has under no checksum, and of the bytes before it: an
    error or, in padding and dates, the same contents. Any cut is an error. With our checksum and without."""
    state = {"x": torch.arange(300), "update": 5}
    for good in (older(state), newer(state, tmp_path)):
        path, directory, refused = tmp_path / "last.pt", good.index(b"PK\1\2"), 0
        changes = [(i, 0xFF) for i in range(0, directory, 9)] + [
            (i, 1 << bit) for i in range(directory, len(good)) for bit in range(8)
        ]
        changes = random.Random(0).sample(changes, int(share * len(changes)))
        for i, mask in changes:
            path.write_bytes(good[:i] + bytes([good[i] ^ mask]) + good[i + 1 :])
            try:
                assert same(_read(path), state), (i, mask)
            except CheckpointError:
                refused += 1
        assert refused > len(changes) / 3
        for length in random.Random(0).sample(range(len(good)), 30):
            path.write_bytes(good[:length])
            with pytest.raises(CheckpointError):
                _read(path)


def test_an_entry_that_torch_takes_for_a_directory_is_refused(tmp_path):
    """One bit of the shipped model, which is under no checksum: torch would return whatever was in the memory."""
    for source in (ROOT / "pretrained" / "breakout.pt", ROOT / "algorithms" / "pretrained" / "reinforce_cartpole.pt"):
        data = bytearray(source.read_bytes())
        entry = data.rindex(b"PK\1\2", 0, data.index(b"/data/0", data.index(b"PK\1\2")))
        data[entry + 38] ^= 0x10
        (tmp_path / "bit.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged .in the attributes of '.*/data/0'") as caught:
            load_checkpoint(tmp_path / "bit.pt")
        assert_one_line(caught.value, tmp_path / "bit.pt")
        assert load_checkpoint(source)["model"]  # and the file itself has no checksum of ours, and loads


@pytest.mark.parametrize(
    "change", [{"gpt_config": {"n_head": 8}}, {"update": 8}, {"x": torch.arange(4)}, {"x": torch.zeros(4)}, {"y": 1}]
)
def test_what_is_edited_is_not_what_was_saved(tmp_path, change):
    """What defines the model is under the checksum too."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"gpt_config": {"n_head": 16}, "update": 7, "x": torch.ones(4)})
    torch.save({**torch.load(path), **change}, path)
    with pytest.raises(CheckpointError, match="is not what was saved .its checksum differs") as caught:
        load_checkpoint(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    save_checkpoint(tmp_path / "last.pt", {"best": -math.inf, "model": {"w": torch.tensor([0.0, number])}})
    with pytest.raises(CheckpointError, match=r"state\['model'\]\['w'\] is not finite") as caught:
        load_checkpoint(tmp_path)
    assert_one_line(caught.value, tmp_path / "last.pt")


def test_the_newest_good_checkpoint_is_named(tmp_path):
    for age, name, state in (
        (3, "checkpoint_1.pt", {"optimizer": 1}),
        (2, "checkpoint_2.pt", {"optimizer": 1}),
        (1, "best_model.pt", {}),
    ):
        save_checkpoint(tmp_path / name, state)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "directory.pt").mkdir()
    for name in ("last.pt", "lost.pt"):
        with pytest.raises(CheckpointError, match=r"newest good one here is .*checkpoint_2.pt\)$") as caught:
            load_checkpoint(tmp_path / name)
        assert_one_line(caught.value, tmp_path / name)
    for name in ("checkpoint_1.pt", "checkpoint_2.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a good one here is .*best_model.pt\)$"):
        load_checkpoint(tmp_path)


def test_a_hostile_nesting_is_refused(tmp_path):
    nested = []
    for _ in range(5000):
        nested = [nested]
    loop = []
    loop.append(loop)
    doubled = (1.0,)
    for _ in range(60):
        doubled = (doubled, doubled)  # 2^60 numbers for who reads them one by one
    for x in (
        nested,
        loop,
        doubled,
        torch.zeros(1).expand(2**50),
        [torch.zeros(10_000)[:]] * 10_000,
        torch.nn.Parameter(torch.ones(1)),
        10**5000,
    ):
        with contextlib.suppress(RecursionError):
            (tmp_path / "last.pt").write_bytes(torch_bytes({"format_version": 1, "x": x}))
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    """Nor as the neighbour of a name that was mistyped."""
    save_checkpoint(tmp_path / "good.pt", {"optimizer": {}})
    os.utime(tmp_path / "good.pt", (1e9, 1e9))
    for start in b"", b"PK\3\4":
        with open(tmp_path / "large.pt", "wb") as file:
            file.write(start)
            file.truncate(10**13)  # a sparse file: it needs no space
        for name, reason in (
            ("large.pt", r"has 10,000 GB, and this machine .*newest good one here is .*good.pt"),
            ("larg.pt", "good.pt"),
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
    """torch would take them: another shape ended Adam in a segmentation fault. What the optimizer is set to stays."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3))]
    optimizer, other = torch.optim.Adam(parameters, lr=0.1, fused=True), torch.optim.Adam(parameters, lr=0.5)
    parameters[0].sum().backward()
    other.step()
    saved = to_plain(other.state_dict())
    load_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["lr"] == 0.1 and torch.equal(
        optimizer.state[parameters[0]]["exp_avg"], saved["state"][0]["exp_avg"]
    )
    for moment in ("exp_avg", "exp_avg_sq"):  # all of it one number, beyond which Adam would write
        saved["state"][0][moment] = torch.ones(1).expand(parameters[0].shape)
    load_optimizer(optimizer, saved)
    optimizer.step()
    assert (
        optimizer.state[parameters[0]]["exp_avg"].is_contiguous()
        and len(saved["state"][0]["exp_avg"].untyped_storage()) == 4
    )
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
    save_checkpoint(tmp_path / "best_model.pt", {})
    save_checkpoint(tmp_path / "last.pt", {})
    assert find_checkpoint(str(tmp_path / "best_model.pt")) == tmp_path / "best_model.pt"
    assert find_checkpoint(tmp_path) == tmp_path / "last.pt"
    assert find_checkpoint(tmp_path, ("best_model.pt", "last.pt")) == tmp_path / "best_model.pt"
    assert find_checkpoint(tmp_path, ("none.pt", "last.pt")) == tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="no a.pt or b.pt"):
        find_checkpoint(tmp_path, ("a.pt", "b.pt"))


def test_newest_run(tmp_path):
    assert (
        newest_run(tmp_path / "missing", lambda state: True) is None
        and newest_run(tmp_path, lambda state: True) is None
    )
    for name, when in (("a", 100), ("b", 300), ("c", 200), ("d", 300)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "best_model.pt", {"name": name})
        os.utime(tmp_path / name / "best_model.pt", (when, when))
    (tmp_path / "e").mkdir()  # newest of all, but nothing in it
    (tmp_path / "e" / "last.pt").symlink_to("nowhere")
    assert newest_run(tmp_path, lambda state: True) == tmp_path / "d"
    assert newest_run(tmp_path, lambda state: state["name"] in "ac") == tmp_path / "c"
    assert newest_run(tmp_path, lambda state: False) is None
    save_checkpoint(tmp_path / "a" / "last.pt", {"name": "a"})  # a run is as new as what it wrote last
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
