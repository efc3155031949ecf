"""Checkpoints that survive a kill, and that cannot run code when they are loaded.

A checkpoint is a safetensors file. Its tensors have flat names such as "model.wte.weight"; everything else is JSON in
the header's metadata, beside a format version and a SHA-256 over all of it. It is saved whole or not at all. Whatever
is wrong with a file becomes a `CheckpointError`: one line that names the file, says what is wrong and what to do.

A checksum proves that nothing was damaged, but not who wrote the file. So what is in a file goes into a model or a
training only after `check_like` has compared it with what the program itself has.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from harness.device import memory_of
from harness.files import atomic_write
from harness.messages import one_line, shortened

FORMAT_VERSION = "2"  # raise it when a change makes older code misread a file; version 1 were the .pt files
SUFFIX = ".safetensors"
LAST = f"last{SUFFIX}"  # what a run is resumed from
BEST = f"best_model{SUFFIX}"
STAGE = "stage_"  # begins the names of small models that show how a training went; see callbacks.py
PLAYED = (BEST, LAST)  # what is played of a run: the first of these that it has
LONGEST_TEXT = 2**25  # characters of everything but the tensors; no training has as many
COUNTERS = {"update_count": 0, "global_step": 0, "seconds": 0.0}  # compared in every file, because programs print them


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line: file, what is wrong, what to do."""


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(path, state):
    """Writes `state` to `path`; a kill at any moment leaves either the previous file or the new one.

    Args:
        state: a dict of None, bool, int, float, str, list, tuple, dict (its keys str or int) and tensors, to any depth.

    Raises:
        TypeError: the state holds something else; the message names the place.
        CheckpointError: the disk refuses; the previous file is then still whole.
    """
    tensors = {}
    text = json.dumps(_to_json(state, "", tensors))
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    metadata = {"format_version": FORMAT_VERSION, "sha256": _checksum(text, tensors), "state": text}
    try:
        atomic_write(path, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        intact = ", the earlier file of this name is intact" if os.path.exists(path) else ""
        raise CheckpointError(
            f"{path}: not saved ({error.strerror}){intact}; free some disk space or check the permissions"
        ) from error


def _to_json(value, name, tensors):
    """Returns `value` as JSON can hold it, and puts every tensor in it into `tensors` under its flat name.

    A tensor that is in several places is put there once.
    """

    def inner(key, item):
        return _to_json(item, f"{name}.{key}" if name else str(key), tensors)

    if type(value) in (type(None), bool, int, float, str):  # exactly: NumPy's float64 is a float to isinstance
        return value
    if isinstance(value, torch.Tensor):
        for known, x in tensors.items():
            if x is value:
                return {"$tensor": known}
        while name in tensors:  # {"a.b": x, "a": {"b": y}} would give two tensors one name
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if type(value) in (list, tuple):
        items = [inner(i, item) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        pairs = [(key, inner(key, item)) for key, item in value.items()]
        is_json = all(type(key) is str and not key.startswith("$") for key in value)
        return dict(pairs) if is_json else {"$dict": pairs}
    raise TypeError(f"{name}: a checkpoint cannot hold this {type(value).__name__} (see to_plain): {value!r}")


def _checksum(text, tensors):
    """Returns the SHA-256 of the JSON and of the tensors' names, types, shapes and numbers, in hexadecimal digits."""
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        if x.numel():  # NumPy's empty arrays have strides that `view` refuses
            digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path, like=None):
    """Returns the state that was given to `save_checkpoint`, its tensors on the CPU.

    Args:
        path: a file, or a run directory, which stands for its last checkpoint.
        like: what the state must be built like (see `check_like`).

    Raises:
        CheckpointError: there is no such file; or it is unreadable, damaged, foreign or too new; or it holds numbers
            that are not finite; or it is not built like `like`.
    """
    path = find_checkpoint(path)
    try:
        state = _read(path)
        check_like(state, {name: value for name, value in COUNTERS.items() if name in state} | (like or {}))
        return state
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint{_newest_good(path.parent)}") from error


def _read(path):
    """Returns the state in a file. Raises ValueError, which says what is wrong with it."""
    if path.suffix == ".pt":
        raise ValueError("is a .pt file, which older versions read (see `git log -1 -- pretrained/breakout.pt`)")
    try:
        size = path.stat().st_size
        memory = memory_of(torch.device("cpu"))
        if size > memory:
            raise ValueError(f"has {size / 1e9:,.0f} GB, and this machine {memory / 1e9:,.0f} GB of memory")
        # With pread the file is opened once. A training may put another file in its place at any moment.
        with safetensors.safe_open(path, "pt", backend="pread") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version", "")
            if not version.isdecimal():
                raise ValueError("is a safetensors file of another program")
            if version != FORMAT_VERSION:
                raise ValueError(f"has format version {shortened(version)}, not {FORMAT_VERSION} (update the code)")
            if len(metadata["state"]) > LONGEST_TEXT:
                raise ValueError("holds more values than any training has")
            tensors = file.get_tensors()
        if metadata["sha256"] != _checksum(metadata["state"], tensors):
            raise ValueError("is not what was saved (its checksum differs)")
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise ValueError(f"{shortened(name)} is not finite")
        state = json.loads(metadata["state"], object_hook=lambda item: _from_json(item, tensors))
    except ValueError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # safetensors, torch and json raise many kinds for damaged or hostile files
        raise ValueError(f"is no checkpoint, or is cut off or damaged ({one_line(error)})") from error
    if not isinstance(state, dict):
        raise ValueError("holds no state")
    return state


def _from_json(item, tensors):
    """Returns what `_to_json` has turned into this JSON object, whose own items have been restored before."""
    match item:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(items)
        case {"$dict": pairs}:
            return dict(pairs)
    return item


# --- finding ----------------------------------------------------------------------------------------------------------


def find_checkpoint(path, names=(LAST,)):
    """Return the checkpoint that `path` means: the file itself, or the first of `names` in a run directory.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if os.path.isfile(path):
        return path
    # A run of an older version has .pt files: reading one says so.
    for name in (*names, *(Path(name).with_suffix(".pt") for name in names)):
        if os.path.isfile(path / name):
            return path / name
    if os.path.isdir(path):
        reason = f"has no {' or '.join(names)} in it; name a run directory or a file"
        directory = path
    else:
        reason = "there is no such file; check the path and its permissions"
        directory = path.parent
    raise CheckpointError(f"{path}: {reason}{_newest_good(directory)}")


def _newest_good(directory):
    """Returns the end of a message that names the newest checkpoint in `directory` that loads, or "" if none does.

    The best model comes last, because no run can be resumed from it. Stages of the training stand in for nothing.
    """
    files = [file for file in Path(directory).glob(f"*{SUFFIX}") if not file.name.startswith(STAGE)]
    for file in sorted(files, key=lambda file: (file.name != BEST, _time_written(file)), reverse=True):
        with contextlib.suppress(ValueError):
            _read(file)
            return f" (the newest good one here is {file})"
    return ""


def _time_written(file):
    with contextlib.suppress(OSError):  # it may just have been deleted
        return file.stat().st_mtime_ns
    return 0


def model_to_play(name, shipped, is_mine):
    """Finds the checkpoint to play: the file or run that was named, else the newest run, else the shipped model.

    Returns its path, and a remark that says why it was taken, empty if it was named. is_mine: as for `newest_run`.
    Raises CheckpointError if there is no such model.
    """
    if name is not None:
        return find_checkpoint(name, PLAYED), ""
    run_dir = newest_run("runs", is_mine)
    if run_dir is not None:
        path = find_checkpoint(run_dir, PLAYED)
        if path.name == BEST:
            return path, " (the newest run)"
        with_best = newest_run("runs", is_mine, [BEST])
        elsewhere = f"; to play another run's, name {with_best}" if with_best else ""
        return path, f" (the newest run; it has no best model yet{elsewhere})"
    if shipped.exists():
        return shipped, " (the shipped model, because there is no run)"
    problem = f"no model of {shipped.stem} is shipped, and there is no run here"
    raise CheckpointError(f"{problem}; name one, or train one first, by the same command without options")


def newest_run(runs_dir, is_mine, names=PLAYED):
    """Returns the directory, up to four levels below `runs_dir`, of a program's run that was written last, or None.

    Args:
        is_mine: takes what a checkpoint holds, without its tensors, and returns whether that program wrote it. A run
            without a readable checkpoint counts, too: it may be the one that is meant, and loading it names the fault.
        names: of the checkpoints that are looked for; a run without any of them does not count.
    """
    patterns = [depth * "*/" + name for depth in range(1, 5) for name in names]
    files = [file for pattern in patterns for file in Path(runs_dir).glob(pattern) if os.path.isfile(file)]
    files.sort(key=lambda file: (_time_written(file), file.parent.name), reverse=True)  # a date settles a tie
    for run_dir in dict.fromkeys(file.parent for file in files):
        states = [state for name in names if (state := _state_without_tensors(run_dir / name)) is not None]
        if is_mine(states[0]) if states else (run_dir / "config.json").exists():
            return run_dir
    return None


def _state_without_tensors(path):
    """Returns what the header of a checkpoint says, with names in place of tensors, or None if it cannot be read."""
    try:
        with safetensors.safe_open(path, "pt", backend="pread") as file:
            return dict(json.loads(file.metadata()["state"]))
    except Exception:  # as in `_read`
        return None


# --- comparing --------------------------------------------------------------------------------------------------------


def check_like(found, own, where="state"):
    """Raises ValueError, naming the place, unless `found`, from a file, is built like `own`, of this program.

    That is, to any depth: the same keys, or more; the same types, shapes and dtypes; lists of the same length. Lists of
    numbers, and uint8 tensors with one axis, may have any length. A tuple stands for any number of items like its
    first, and None for numbers too. Integers are counters and random states, so they must not be negative; floats must
    be finite where this program's are.
    """
    if isinstance(own, dict) and isinstance(found, dict):
        for name, value in own.items():
            if name not in found:
                raise ValueError(f"{where} lacks {name!r}")
            check_like(found[name], value, f"{where}[{name!r}]")
    elif isinstance(own, (list, tuple)) and isinstance(found, (list, tuple)) and not _are_numbers(own):
        if isinstance(own, list) and len(own) != len(found):
            raise ValueError(f"{where} has {len(found)} items, and this program has {len(own)}")
        for i, item in enumerate(found):
            check_like(item, own[i] if isinstance(own, list) else own[0], f"{where}[{i}]")
    elif not _fits(found, own):
        raise ValueError(f"{where} is {_described(found)}, and this program has {_described(own)}")


def _fits(found, own):
    if isinstance(own, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.dtype != own.dtype:
            return False
        return found.shape == own.shape or own.dtype == torch.uint8 and own.dim() == found.dim() == 1
    if own is None:
        return found is None or _are_numbers(found) or _are_numbers([found])
    if isinstance(own, (list, tuple)):
        return _are_numbers(found)
    if type(own) is int:
        return type(found) is int and 0 <= found < 2**128
    if type(own) is float:
        return _are_numbers([found]) and (math.isfinite(found) or not math.isfinite(own))
    return type(found) is type(own)


def _are_numbers(items):
    return isinstance(items, (list, tuple)) and all(
        type(x) is int and abs(x) < 2**128 or type(x) is float and not math.isnan(x) for x in items
    )


def _described(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"{type(value).__name__} {shortened(value, 40)}" if _are_numbers([value]) else type(value).__name__


def load_weights(module, weights):
    """Loads weights from a file into a module.

    Raises ValueError, before anything has changed, unless they are those of such a module.
    """
    check_like(weights, own := module.state_dict(), "state['model']")
    if odd := [name for name in weights if name not in own]:
        raise ValueError(f"state['model'] has {shortened(repr(odd[0]))}, and this program has not")
    module.load_state_dict(weights)


def load_optimizer(optimizer, saved):
    """Loads the moments of an Adam optimizer from a file. Its settings stay: learning rates and devices may be others.

    Raises ValueError, before anything has changed, unless they are those of such an optimizer.
    """
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    own = {i: {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    check_like(saved, {"state": {}}, "state['optimizer']")
    if saved["state"]:  # it is empty before the first step
        check_like(saved["state"], own, "state['optimizer']['state']")
    moments = to_plain(saved["state"])  # a copy, because a step changes the moments in place
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


# --- plain values -----------------------------------------------------------------------------------------------------


def to_plain(value, old=None):
    """Returns a copy of `value`, to any depth, as a checkpoint can hold it.

    Tensors and NumPy arrays become contiguous tensors on the CPU, NumPy's numbers Python's.

    Args:
        old: an earlier copy that nobody needs any more. Its tensors are overwritten and returned where they fit, which
            is several times as fast as new memory, and takes none.
    """
    if isinstance(value, dict):
        old = old if isinstance(old, dict) else {}
        return {key: to_plain(item, old.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        old_items = old if isinstance(old, (list, tuple)) and len(old) == len(value) else [None] * len(value)
        return type(value)(map(to_plain, value, old_items))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.require(value, requirements=("C", "W")))
    if isinstance(value, torch.Tensor):
        if isinstance(old, torch.Tensor) and old.shape == value.shape and old.dtype == value.dtype:
            return old.copy_(value.detach())
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return value


def to_numpy(value):
    """Returns a copy of `value`, to any depth, with NumPy arrays in place of tensors: the way back from `to_plain`."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_numpy(item) for item in value)
    return value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else value
