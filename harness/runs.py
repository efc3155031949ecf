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
from harness.messages import one_line, quoted, shortened, shown, tell
from harness.options import CommandLineError, Values, expand_home, read_command_line

ROOT = Path(__file__).parent.parent

LOCK = "run.lock"  # in a run directory; the system takes the lock off when its process ends, however it ends


class Run(NamedTuple):
    """What is to be trained: a new run, or one that goes on."""

    constants: dict
    directory: Path | None  # None: a new run, which has none yet
    state: dict | None  # of the trainer; None: a new run


def read_run(argv, prog, doc, known, kept=(), check=lambda c: None):
    """Read the command line of a training.

    Args:
        argv: the words of the command line
        prog, doc: how the program is started, and its docstring, both for --help
        known: the `Constants` of the script
        kept: names of constants that must not change when a run is resumed
        check: called with `Values`; raises CommandLineError if they do not fit together

    Returns:
        the `Run` that it asks for, its constants checked
    """
    resume, given = read_command_line(argv, prog, doc, known)
    given = expand_home(given)
    if resume is None:
        run = Run(expand_home(known) | given, None, None)
    else:
        run = read_resumed(resume, given, known, kept)
    known.check(run.constants)
    check(Values(**run.constants))
    if RANK == 0:
        for name in known.unread():
            tell(f"warning: {name} is read nowhere; it has no effect")
    return run


def read_resumed(name, given, known, kept):
    """The `Run` to resume from this run directory or checkpoint, with the constants given on the command line."""
    path = find_run(name)
    run_dir = path.parent
    in_a_run = (run_dir / "config.json").exists()
    with locked(run_dir) if in_a_run and RANK == 0 else contextlib.nullcontext():  # a training would soon replace it
        state = load_checkpoint(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: holds a model to play, not a run to resume; resume from its run's last.pt")
    if not in_a_run:
        raise CheckpointError(
            f"{path}: lies outside its run (there is no config.json beside it); resume it in its run directory"
        )
    run_id = recorded_id(run_dir)
    if run_id and state.get("run_id", run_id) != run_id:  # metrics.csv would mix the rows of two runs
        raise CheckpointError(
            f"{path}: is of another run than the config.json beside it; resume it in its own run directory"
        )
    recorded = state.get("constants")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{path}: does not say with which constants it was trained; resume another run")
    if gone := sorted(map(str, recorded.keys() - known.keys())):
        names = shortened(", ".join(gone))
        raise CheckpointError(
            f"{path}: has other constants than this program ({names}); resume it with the program that wrote it"
        )
    for constant in kept:
        if constant in given and given[constant] != recorded.get(constant, known[constant]):
            raise CommandLineError(f"--{constant.lower()} cannot change in a resumed run; leave it out")
    constants = constants_of(path, recorded, known, given) | given | {"RUN_DIR": str(run_dir)}
    return Run(constants, run_dir, state)


def find_run(name):
    """The checkpoint to resume from. Raises CommandLineError for a run that has none yet, CheckpointError if there is no run."""
    if (Path(name) / "config.json").exists() and not any(Path(name).glob("*.pt")):
        raise CommandLineError(
            f"{name} was stopped before its first checkpoint; begin it again with --run_dir {quoted(name)}"
        )
    return find_checkpoint(name)


def constants_of(path, recorded, known, given=()):
    """The constants of a checkpoint, without those `given` on the command line. One added to the script since then has its default.

    Raises CheckpointError for a value that the script would not accept.
    """
    constants = {}
    for name, default in expand_home(known).items():
        if name in given:
            continue
        if name not in recorded and RANK == 0:
            tell(f"{name} was not there when this run began; it takes its default {default!r}")
        constants[name] = recorded.get(name, default)
    try:
        known.check(constants)
    except CommandLineError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint") from None
    if ":" in constants.get("ENV_ID", ""):  # Gymnasium would import the module before the colon
        env_id = shortened(repr(constants["ENV_ID"]))
        raise CheckpointError(
            f"{path}: its ENV_ID {env_id} would run a module's code; name it by --env_id if you trust that"
        )
    return constants


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
