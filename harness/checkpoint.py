"""Checkpoints that survive a kill, and that never run code when they are loaded.

A checkpoint is a dict of plain values and tensors, written by `torch.save` with a format version and a checksum added. It
is saved whole or not at all, checked for damage before it is unpickled, read with `weights_only=True`, and compared with
its checksum. Whatever is wrong with a file becomes a `CheckpointError`: one line that names the file, says what is wrong
and what to do.

A checksum says that nothing was damaged, and not who wrote the file. So no file is believed about its own size, and what
is in it goes into a model or a training only after `check_like` has compared it with what is there.

What belongs into a checkpoint is not decided here; `to_plain` helps to put NumPy arrays in.
"""

import contextlib
import hashlib
import io
import math
import os
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from harness.device import memory_of
from harness.messages import shortened

FORMAT_VERSION = 1  # raise it when a change makes older code misread the file
PLAYED = ("best_model.pt", "last.pt")  # what is played of a run: the first of them that it has
PLAIN_TYPES = (type(None), bool, int, float, str)
COUNTERS = {
    "update_count": 0,
    "global_step": 0,
    "seconds": 0.0,
}  # of a training; programs read them before they know of what kind it is
MOST_VALUES = 2**18  # in a checkpoint; a tensor is one
LONGEST_INDEX = 2**25  # bytes of everything in a file but the tensors' numbers


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line: file, what is wrong, what to do."""


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(path, state):
    """Write `state` to `path`, so that a kill at any moment leaves either the previous file or the new one.

    state: dict of None, bool, int, float, str, list, tuple, dict and tensors, to any depth. The keys "format_version" and
        "checksum" are reserved.

    Raises TypeError for any other type (it names the key), CheckpointError if the disk refuses; the previous file is
    then still whole.
    """
    _check_plain(state, "state")
    buffer = io.BytesIO()
    torch.save({**state, "format_version": FORMAT_VERSION, "checksum": checksum(state)}, buffer)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        intact = ", the earlier file of this name is intact" if os.path.exists(path) else ""
        raise CheckpointError(
            f"{path}: not saved ({error.strerror}){intact}; free some disk space or check the permissions"
        ) from error


def atomic_write(path, data):
    """Replace the file `path` by the bytes `data`, all or nothing. Raises OSError and then leaves no trace."""
    path = Path(path)
    # A fixed name in the same directory: os.replace is atomic only within one file system, and what a killed
    # process leaves behind is overwritten by the next save instead of piling up.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # makes the new name itself survive a power cut; not every OS can
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def replacing(path):
    """Within, write to the path that this gives; at the end that file takes the place of `path`, or of the file that a
    link points to. What is interrupted leaves the old file. Raises OSError with one line: file, what is wrong, what to do.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: is no ordinary file; name another")
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            yield Path(folder, target.name)
            os.replace(Path(folder, target.name), target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            f"{path}: not written ({error.strerror}); free some disk space or check the permissions"
        ) from error


def walk(value, where="state"):
    """Yields (place, value) for `value` and for everything in it. Raises ValueError for what is nested very deeply, and for more values
    than any training has: sixty lists that hold each other twice would take for ever."""
    places, left = [(where, value)], MOST_VALUES
    while places:
        where, value = places.pop()
        yield where, value
        left -= len(value) if isinstance(value, (dict, list, tuple)) else 0
        if len(where) > 10_000 or left < 0:
            raise ValueError("holds too many values, or they are nested too deeply")
        if isinstance(value, dict):
            places += [(f"{where}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            places += [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def checksum(state):
    """SHA-256 over every name, value and tensor in `state` -> hexadecimal digits."""
    digest = hashlib.sha256()
    for where, value in walk(state):
        if isinstance(value, torch.Tensor):
            digest.update(f"{where} {value.dtype} {tuple(value.shape)}".encode())
            if value.numel():  # a view of nothing is refused
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{where} {len(value) if isinstance(value, (dict, list, tuple)) else repr(value)}".encode())
    return digest.hexdigest()


def _check_plain(state, where):
    """Raise TypeError, naming the place, unless `state` will load again with weights_only=True."""
    # Exact types: np.float64 is a float to isinstance, yet its pickle needs numpy.
    for place, value in walk(state, where):
        if type(value) in (dict, OrderedDict):  # model.state_dict() is an OrderedDict
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"{place} has the key {key!r} of type {type(key).__name__}; keys are str or int")
        elif type(value) not in (*PLAIN_TYPES, list, tuple, torch.Tensor):
            raise TypeError(
                f"{place} is a {type(value).__module__}.{type(value).__name__}; a checkpoint holds plain "
                "values and tensors (see to_plain)"
            )


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path, like=None):
    """The dict given to `save_checkpoint`, its tensors on the CPU. `path`: a file, or a run directory (its last.pt).

    Raises CheckpointError if there is no such file, or if it is unreadable, damaged, foreign or too new, if it holds numbers
    that are not finite, or if it is not built as `like` (see `check_like`).
    """
    path = find_checkpoint(path)
    try:
        return _read(path, like)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_newest_good(path.parent)}") from error


def _read(path, like=None):
    try:
        with path.open("rb") as file:  # opened once: a training run may put another file in its place at any moment
            return _contents(path, file, like or {})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _contents(path, file, like):
    size, memory = os.fstat(file.fileno()).st_size, memory_of(torch.device("cpu"))
    if size > memory:
        raise CheckpointError(
            f"{path}: has {size / 1e9:,.0f} GB, and this machine {memory / 1e9:,.0f} GB of memory; use another checkpoint"
        )
    _check_zip(path, file, size)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        _check_plain(state, "state")
        tensors = [(where, x) for where, x in walk(state) if isinstance(x, torch.Tensor)]
        if sum(x.numel() * x.element_size() for _, x in tensors) > size:  # one number can be a view of any shape
            raise ValueError("its tensors are larger than the file")
        version, expected = (
            state.pop(key, None) if isinstance(state, dict) else None for key in ("format_version", "checksum")
        )
        found = checksum(state) if expected else None  # files of older versions have none
        spoiled = next((where for where, x in tensors if not x.isfinite().all()), None)
    except (pickle.UnpicklingError, TypeError) as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values, loading it could run foreign code; "
            "use a checkpoint written by train_ppo.py"
        ) from error
    except Exception as error:  # torch raises whatever its reader met
        raise CheckpointError(
            f"{path}: is a zip archive but not a PyTorch file; use a checkpoint written by train_ppo.py"
        ) from error

    if type(version) is not int or not 0 < version < 2**31:
        raise CheckpointError(
            f"{path}: is a PyTorch file of another kind (it has no format version); "
            "use a checkpoint written by train_ppo.py"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this code reads up to {FORMAT_VERSION}; update the code"
        )
    if expected != found:
        raise CheckpointError(
            f"{path}: is not what was saved (its checksum differs); use another checkpoint of the run"
        )
    if spoiled:
        raise CheckpointError(f"{path}: {shortened(spoiled)} is not finite; use an earlier checkpoint of the run")
    try:
        check_like(state, {name: x for name, x in COUNTERS.items() if name in state} | like)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint of the run") from None
    return state


def _check_zip(path, file, size):
    """Compare every checksum in the archive before anything in it is interpreted; torch.load does not."""
    if not size:
        raise CheckpointError(f"{path}: is empty; use another checkpoint of the run")
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(f"{path}: is not a checkpoint (no zip archive); use a checkpoint written by train_ppo.py")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # No checksum covers the attributes, which torch writes as 0. It does not read what they call a directory,
            # and returns whatever was in the memory.
            odd = next((member.filename for member in members if member.external_attr or member.compress_type), None)
            if sum(member.file_size for member in members) > size:
                raise ValueError("members that share their bytes")
            if any(member.file_size > LONGEST_INDEX for member in members if member.filename.endswith(".pkl")):
                raise ValueError("more values than any training has")
            damaged = odd or archive.testzip()
    except Exception as error:  # a damaged header makes zipfile raise almost anything
        odd, damaged = None, f"archive: {type(error).__name__}"
    file.seek(0)
    if odd:
        raise CheckpointError(
            f"{path}: is not a PyTorch file, or is damaged (in the attributes of {shortened(repr(odd))}); "
            "use a checkpoint written by train_ppo.py"
        )
    if damaged:
        raise CheckpointError(
            f"{path}: is cut off or damaged (at {shortened(repr(damaged))}); use another checkpoint of the run"
        )


def _newest_good(directory):
    """-> the end of a message, which names the newest checkpoint in `directory` that loads, or "". One that can be resumed goes
    before one that can only be played."""

    def written(file):
        return file.stat().st_mtime_ns

    found = None
    with contextlib.suppress(OSError):
        for file in sorted(filter(Path.is_file, Path(directory).glob("*.pt")), key=written, reverse=True):
            with contextlib.suppress(CheckpointError):
                if "optimizer" in _read(file):
                    return f" (the newest good one here is {file})"
                found = found or file
    return f" (a good one here is {found})" if found else ""


def find_checkpoint(path, names=("last.pt",)):
    """The checkpoint meant by `path`: a file is itself, a run directory the first of `names` in it.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            for name in names:
                if (path / name).is_file():
                    return path / name
            raise CheckpointError(
                f"{path}: has no {' or '.join(names)} in it; name a run directory or a file{_newest_good(path)}"
            )
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    raise CheckpointError(f"{path}: there is no such file; check the path{_newest_good(path.parent)}")


def model_to_play(name, shipped, is_mine):
    """Find the checkpoint to play: the file or run that was named, else the newest run, else the shipped model.

    Returns its path, and a remark that says why it was taken where none was named (None). is_mine: as for `newest_run`.
    Raises CheckpointError if there is no such model.
    """
    if name is not None:
        return find_checkpoint(name, PLAYED), ""
    run_dir = newest_run("runs", is_mine)
    if run_dir is not None:
        path = find_checkpoint(run_dir, PLAYED)
        return path, " (the newest run)" if path.name == PLAYED[0] else " (the newest run; it has no best model yet)"
    if shipped.exists():
        return shipped, " (the shipped model, because there is no run)"
    raise CheckpointError(f"no model of {shipped.stem} is shipped, and there is no run; train one, or name one")


def newest_run(runs_dir, is_mine):
    """The directory, up to four levels below `runs_dir`, of the run of one program that was written last, or None.

    is_mine: takes the state in a checkpoint, its tensors not yet read, and says whether that program wrote it. A run of which
    nothing can be read counts too, because it may be the one that is meant: who loads it hears what is wrong.
    """
    written = {}
    for pattern in (depth * "*/" + name for depth in range(1, 5) for name in PLAYED):
        for file in filter(Path.is_file, Path(runs_dir).glob(pattern)):
            with contextlib.suppress(OSError):  # it has just been deleted
                written[file.parent] = max(file.stat().st_mtime_ns, written.get(file.parent, 0))
    for run_dir in sorted(
        written, key=lambda run_dir: (written[run_dir], run_dir.name), reverse=True
    ):  # a date settles a tie
        states = [state for name in PLAYED if (state := _peek(run_dir / name)) is not None]
        if is_mine(states[0]) if states else (run_dir / "config.json").exists():
            return run_dir
    return None


def _peek(path):
    """The state in a checkpoint, its tensors left on the disk; None if it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises whatever its reader met
        return None
    return state if isinstance(state, dict) else {}


# --- comparing ---------------------------------------------------------------------------------------------------------


def check_like(found, own, where="state"):
    """Raises ValueError, naming the place, unless `found`, from a file, is built as `own`, of this program, is, to any depth.

    The same keys, or more; the same types, shapes and dtypes; lists as long. What may differ: a list of numbers, and a row of bytes (a
    uint8 tensor with one axis), has any length. A tuple stands for any number of items like its first. For None the file may have
    numbers. Integers are counters and random states, so they are not negative, and floats are finite, or both are not.
    """
    if isinstance(own, dict) and isinstance(found, dict):
        if lacking := [name for name in own if name not in found]:
            raise ValueError(f"{where} lacks {lacking[0]!r}")
        for name, value in own.items():
            check_like(found[name], value, f"{where}[{name!r}]")
    elif isinstance(own, (list, tuple)) and isinstance(found, (list, tuple)) and not _numbers(own):
        if isinstance(own, list) and len(own) != len(found):
            raise ValueError(f"{where} has {len(found)} items, and this program has {len(own)}")
        for i, item in enumerate(found):
            check_like(item, own[i] if isinstance(own, list) else own[0], f"{where}[{i}]")
    elif not _alike(found, own):
        raise ValueError(f"{where} is {_described(found)}, and this program has {_described(own)}")


def _alike(found, own):
    if isinstance(own, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.dtype != own.dtype:
            return False
        return found.shape == own.shape or own.dtype == torch.uint8 and own.dim() == found.dim() == 1
    if own is None:
        return found is None or _numbers(found) or _numbers([found])
    if isinstance(own, (list, tuple)):
        return _numbers(found)
    if type(own) is int:
        return type(found) is int and 0 <= found < 2**128
    if type(own) is float:
        return _numbers([found]) and (math.isfinite(found) or not math.isfinite(own))
    return type(found) is type(own)


def _numbers(items):
    """Whether this is a list of nothing but numbers."""
    return isinstance(items, (list, tuple)) and all(
        type(x) is int and abs(x) < 2**128 or type(x) is float and not math.isnan(x) for x in items
    )


def _described(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"{type(value).__name__} {shortened(value, 40)}" if _numbers([value]) else type(value).__name__


def load_weights(module, weights):
    """Loads the parameters of a file into a module. Raises ValueError, before anything has changed, if they are not as its own."""
    check_like(weights, own := module.state_dict(), "state['model']")
    if odd := [name for name in weights if name not in own]:
        raise ValueError(f"state['model'] has {shortened(repr(odd[0]))}, and this program has not")
    module.load_state_dict(weights)


def load_optimizer(optimizer, saved):
    """Loads the moments of an Adam optimizer from a file. What it is set to stays: learning rates and devices may be others.

    Raises ValueError, before anything has changed, unless they are as this optimizer's would be.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        i: {"step": torch.tensor(0.0), "exp_avg": p.detach(), "exp_avg_sq": p.detach()}
        for i, p in enumerate(parameters)
    }
    check_like(saved, {"state": {}}, "state['optimizer']")
    if saved["state"]:  # else no step was taken yet
        check_like(saved["state"], own, "state['optimizer']['state']")
    moments = to_plain(
        saved["state"]
    )  # copies: torch would write beyond the end of one that repeats a number as a view
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


# --- numpy ------------------------------------------------------------------------------------------------------------


def to_plain(value, where="state"):
    """A copy of `value`, to any depth: tensors on the CPU, numpy arrays as tensors, numpy scalars as numbers.

    Raises TypeError, naming the place, for what still is not plain.
    """
    if isinstance(value, dict):
        return {key: to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)  # keeps the order in memory, on which rounding depends
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy(order="C"))
    _check_plain(value, where)
    return value


def to_numpy(value):
    """The way back from `to_plain`: `value` with every tensor copied into a numpy array."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_numpy(item) for item in value)
    return value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else value
