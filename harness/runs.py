"""Directories of runs: new ones, locks, and what a resume reads from them."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from harness.checkpoint import CheckpointError, atomic_write, find_checkpoint, load_checkpoint
from harness.device import RANK, out_of_memory
from harness.messages import one_line, quoted, shortened, shown
from harness.options import CommandLineError, check_constants, check_constants_of_file, expand_home, read_command_line

ROOT = Path(__file__).parent.parent

LOCK = "run.lock"  # in a run directory; the system takes the lock off when its process ends, however it ends


class Run(NamedTuple):
    """What is to be trained: a new run, or one that goes on."""

    constants: dict
    directory: Path | None  # None: a new run, which has none yet
    state: dict | None  # of the trainer; None: a new run


def read_run(argv, prog, doc, defaults, ranges, kept=(), check=lambda constants: None):
    """The command line -> the `Run` that it asks for, its constants checked.

    kept: constants that a resumed run keeps. check(constants) raises CommandLineError for values that do not fit together.
    """
    resume, given = read_command_line(argv, prog, doc, defaults, ranges)
    defaults = expand_home(defaults)
    given = expand_home(given)
    run = Run(defaults | given, None, None) if resume is None else read_resumed(resume, given, defaults, ranges, kept)
    check_constants(run.constants, defaults, ranges)
    check(run.constants)
    return run


def read_resumed(name, given, defaults, ranges, kept):
    if (Path(name) / "config.json").exists() and not any(Path(name).glob("*.pt")):
        raise CommandLineError(
            f"{name} was stopped before its first checkpoint; begin it again with --run_dir {quoted(name)}"
        )
    path = find_checkpoint(name)
    in_a_run = RANK == 0 and (path.parent / "config.json").exists()
    with locked(path.parent) if in_a_run else contextlib.nullcontext():  # or it would soon be out of date
        state = load_checkpoint(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: holds a model to play, not a run to resume; resume from its run's last.pt")
    if not (path.parent / "config.json").exists():
        raise CheckpointError(
            f"{path}: lies outside its run (there is no config.json beside it); resume it in its run directory"
        )
    recorded = recorded_id(path.parent)
    if recorded and state.get("run_id", recorded) != recorded:  # its rows would be joined to those of this run
        raise CheckpointError(
            f"{path}: is of another run than the config.json beside it; resume it in its own run directory"
        )
    constants = state.get("constants")
    if not isinstance(constants, dict) or constants.keys() != defaults.keys():
        differing = shortened(
            ", ".join(sorted(map(str, set(constants if isinstance(constants, dict) else ()) ^ set(defaults))))
        )
        raise CheckpointError(
            f"{path}: has other constants than this program ({differing}); resume it with the program that wrote it"
        )
    check_constants_of_file(
        path, {name: value for name, value in constants.items() if name not in given}, defaults, ranges
    )
    for constant in kept:
        if given.get(constant, constants[constant]) != constants[constant]:
            raise CommandLineError(f"--{constant.lower()} cannot change in a resumed run; leave it out")
    return Run(constants | given | {"RUN_DIR": str(path.parent)}, path.parent, state)


def new_run_dir(name, parent="runs"):
    """Makes the directory of a new run, <parent>/<date-time> for ""; two that start in the same second get two."""
    stem = name or time.strftime(f"{parent}/%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        run_dir = Path(stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            run_dir.mkdir(parents=True, exist_ok=bool(name))
            if not in_use(run_dir):
                return run_dir
        except FileExistsError:
            if not run_dir.exists():
                raise CommandLineError(
                    f"{run_dir} cannot be made: a link in this path leads nowhere; name another --run_dir"
                ) from None
        except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
            raise CommandLineError(
                f"{run_dir} cannot be made ({getattr(error, 'strerror', error)}); name another --run_dir"
            ) from None
        if name:
            break
    go_on = f", or --resume {quoted(run_dir)}" if (run_dir / "last.pt").exists() else ""
    raise CommandLineError(f"{run_dir} is in use already; name another --run_dir{go_on}")


def in_use(run_dir):
    """Whether a directory has more in it than what a run leaves that was killed before its first checkpoint."""
    return any(map(worth_keeping, run_dir.iterdir()))


def check_begun(run_dir, constants):
    """Raises CommandLineError for a directory in which a search can neither begin a run with these constants nor go on with one."""
    free = {"RUN_DIR": "", "RUN_ID": "", "DEVICE": ""}  # a GPU may have failed since, and the CPU gone on
    begun = recorded_constants(run_dir)
    if begun is not None and begun | free != constants | free:
        raise CommandLineError(f"{run_dir} was begun with other constants; name another --out")
    if run_dir.exists() and not (run_dir / "last.pt").exists() and in_use(run_dir):
        raise CommandLineError(
            f"{run_dir} is in use already, and has no last.pt to go on from; move it away, or name another --out"
        )


def worth_keeping(file):
    if file.name == "config.json":  # other programs have one too
        return '"RUN_DIR"' not in file.read_text(encoding="utf-8", errors="replace")
    return not (file.name in ("config.json.tmp", "last.pt.tmp", LOCK) or file.name.startswith("events.out.tfevents."))


def recorded_constants(run_dir):
    """What the config.json in a directory holds, or None if there is none. Raises CommandLineError if it is damaged."""
    config = run_dir / "config.json"
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CommandLineError(f"{config}: is damaged; move its directory away, or name another --out")
    return found


def recorded_id(run_dir):
    """The number in a run's config.json that every checkpoint of the run has too. None: the run is older than that."""
    with contextlib.suppress(OSError, CommandLineError, AttributeError):
        run_id = recorded_constants(run_dir).get("RUN_ID")
        return run_id if isinstance(run_id, str) else None
    return None


def finished(run_dir):
    """Whether a run has done all its steps, and its last evaluation has ended. Raises CheckpointError."""
    if not (run_dir / "last.pt").exists():
        return False
    state = load_checkpoint(run_dir, {"global_step": 0, "constants": {"NUM_STEPS": 0}, "evaluations": ({},)})
    return state["global_step"] >= state["constants"]["NUM_STEPS"] and not state["evaluations"]


def write_config(run_dir, trainer):
    """Make the directory of a run, if it is not there, and write its config.json: without that, nothing in it can be resumed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = trainer.metadata["constants"] | {"RUN_ID": trainer.metadata["run_id"]}
    atomic_write(run_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def is_replaced(run_dir, trainer):
    """Whether something else is now where the directory of a run was: a file, a link to nothing, the directory of another run."""
    no_directory = os.path.lexists(run_dir) and not run_dir.is_dir()
    return no_directory or recorded_id(run_dir) not in (None, trainer.metadata.get("run_id"))


@contextlib.contextmanager
def locked(run_dir):
    """Within, no other process trains in this directory. Raises CommandLineError."""
    lock, stack = filelock.FileLock(run_dir / LOCK), contextlib.ExitStack()
    try:
        lock.acquire(blocking=False)
        stack.callback(lock.release)
        stack.enter_context(directory_locked(run_dir))
    except (filelock.Timeout, BlockingIOError):
        stack.close()
        raise CommandLineError(
            f"{run_dir}: another process is training this run; stop that one first, or name another run"
        ) from None
    except OSError as error:
        raise CommandLineError(
            f"{run_dir} cannot be written ({error.strerror}); check its permissions, or name another run"
        ) from None
    with stack:
        yield


@contextlib.contextmanager
def directory_locked(run_dir):
    """Within, the directory itself is locked too, because somebody may delete the lock file. Raises BlockingIOError.

    Windows locks no directories, but does not delete a file that is open either; nor do some network drives.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # the file's lock has to do
            pass
        yield
    finally:
        os.close(descriptor)


def delete_unfinished(run_dir):
    """Delete the checkpoints of a run that a kill has left half written."""
    for file in run_dir.glob("*.pt.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()


def load_state(trainer, run):
    """Puts the state of a resumed run into its trainer. Raises CheckpointError if it does not fit."""
    try:
        trainer.check_state(run.state)
        trainer.load_state_dict(run.state)
        run_id = run.state.get("run_id")
        trainer.metadata["run_id"] = run_id if isinstance(run_id, str) else None  # None: the run is older than that
    except Exception as error:  # a value can be of the right type and yet be none: of a game, of a random generator, of another library
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{run.directory}: does not fit this program ({one_line(error)}); resume another run"
        ) from None
    if trainer.global_step >= trainer.num_steps and not trainer.pending:
        raise CommandLineError(
            f"{run.directory} has done {trainer.global_step:,} steps already; to go on, give a larger --num_steps"
        )
    try:
        best = load_checkpoint(run.directory / "best_model.pt", {"evaluation": {"score": 0.0}})
        trainer.best_score = best["evaluation"]["score"]
    except CheckpointError:  # none, or spoiled: the next evaluation leaves another
        trainer.best_score = -math.inf


def resume_command(prog, run_dir, ranks):
    """The command that goes on with a run, to be pasted into a shell in this directory."""
    launcher = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    script = prog if prog.startswith("-m ") else quoted(shown(ROOT / prog))
    return f"{launcher} {script} --resume {quoted(run_dir)}"
