"""The directories of runs: make a new one, lock it, and read from it what a resume needs."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from harness.checkpoint import BEST, LAST, SUFFIX, CheckpointError, find_checkpoint, load_checkpoint
from harness.device import RANK, out_of_memory
from harness.files import atomic_write
from harness.messages import one_line, quoted, shortened, shown, tell
from harness.options import CommandLineError, Values, expand_home, read_command_line

ROOT = Path(__file__).parent.parent

LOCK = "run.lock"  # a file in a run's directory; the system releases its lock however the process ends


class Run(NamedTuple):
    """A run that the command line asks for, either new or resumed."""

    constants: dict
    directory: Path | None  # None for a new run, which has no directory yet
    state: dict | None  # the trainer's, from the checkpoint; None for a new run


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
    check_wandb(run.constants.get("WANDB"))
    if RANK == 0:
        for name in known.unread():
            tell(f"warning: {name} is read nowhere; it has no effect")
    return run


def check_wandb(project):
    """Raise CommandLineError if a run is to log to a project of Weights & Biases, and the package for it is missing."""
    if project and sys.modules.get("wandb") is None and not importlib.util.find_spec("wandb"):
        raise CommandLineError('--wandb needs a package: pip install wandb (or --wandb "" to train without it)')


def read_resumed(name, given, known, kept):
    """The `Run` to resume from a run directory or checkpoint, with the constants `given` on the command line."""
    path = find_run(name)
    state = load_resumable(path)
    recorded = state.get("constants")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{path}: does not say with which constants it was trained; resume another run")
    check_same_program(path, recorded, known)
    for constant in kept:
        if constant in given and given[constant] != recorded.get(constant, known[constant]):
            raise CommandLineError(f"--{constant.lower()} cannot change in a resumed run; leave it out")
    constants = constants_of(path, recorded, known, given) | given | {"RUN_DIR": str(path.parent)}
    return Run(constants, path.parent, state)


def check_same_program(path, recorded, known):
    """Raises CheckpointError for the constants of another program's run.

    No program has all constants of another one. So a run that has all of this program's, and more, is of this program:
    somebody had added the others, and has removed them. A line says so.
    """
    gone = sorted(map(str, recorded.keys() - known.keys()))
    if gone and known.keys() - recorded.keys():
        problem = f"has other constants than this program ({shortened(', '.join(gone))})"
        raise CheckpointError(f"{path}: {problem}; resume it with the program that wrote it")
    if gone and RANK == 0:
        names = shortened(", ".join(gone))
        tell(f"warning: this run has constants that the script no longer has ({names}); it goes on without them")


def load_resumable(path):
    """The state in a checkpoint. Raises CheckpointError unless it lies in its own run and can be resumed."""
    in_a_run = (path.parent / "config.json").exists()
    # Without the lock, a process that still trains this run would soon replace what is read here.
    with locked(path.parent) if in_a_run and RANK == 0 else contextlib.nullcontext():
        state = load_checkpoint(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: holds a model to play, not a run to resume; resume from its run's {LAST}")
    if not in_a_run:
        problem = "lies outside its run (there is no config.json beside it)"
        raise CheckpointError(f"{path}: {problem}; resume it in its run directory")
    run_id = recorded_id(path.parent)
    if run_id and state.get("run_id", run_id) != run_id:  # metrics.csv would mix the rows of two runs
        problem = "is of another run than the config.json beside it"
        raise CheckpointError(f"{path}: {problem}; resume it in its own run directory")
    return state


def find_run(name):
    """The checkpoint to resume from.

    Raises CommandLineError for a run that has no checkpoint yet, CheckpointError if there is nothing at all.
    """
    if (Path(name) / "config.json").exists() and not in_use(Path(name)):
        advice = f"begin it again with --run_dir {quoted(name)}"
        raise CommandLineError(f"{name} was stopped before its first checkpoint; {advice}")
    return find_checkpoint(name)


def constants_of(path, recorded, known, given=()):
    """The constants of a checkpoint, except those `given` on the command line.

    A constant that was added to the script since then takes its default. A line says so, unless it is off by default.
    Raises CheckpointError for a value that the script would not accept.
    """
    constants = {}
    for name, default in expand_home(known).items():
        if name in given:
            continue
        if name not in recorded and default and RANK == 0:
            tell(f"{name} was not there when this run began; it takes its default {default!r}")
        constants[name] = recorded.get(name, default)
    try:
        known.check(constants)
    except CommandLineError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint") from None
    for name in foreign_code(constants):
        problem = f"its {name} {shortened(repr(constants[name]))} would run a module's code"
        raise CheckpointError(f"{path}: {problem}; name it by --{name.lower()} if you trust that")
    return constants


def foreign_code(constants):
    """The names of those constants that would run a module of another project, as no checkpoint alone may."""
    would_import = {"ENV_ID": imports_foreign_code, "GAME": imports_foreign_code, "REWARD_MODEL": names_function}
    return [name for name in would_import if would_import[name](constants.get(name, ""))]


def named_again(constants):
    """The words of a command line that name these constants, without which no run with them is resumed or played."""
    return [word for name in foreign_code(constants) for word in (f"--{name.lower()}", constants[name])]


def names_function(text):
    """Return whether a text is a "module:function"; a path, even one of Windows, is none."""
    return re.fullmatch(r"[\w.]+:\w+", text) is not None


def imports_foreign_code(gym_id):
    """Return whether making an environment with this id would import a module of another project."""
    module, colon, _ = gym_id.rpartition(":")
    return bool(colon) and module.split(".")[0] not in ("games", "breakout_ascii")


# --- directories ------------------------------------------------------------------------------------------------------


def new_run_dir(name, parent="runs"):
    """Make the directory of a new run: `name`, or else <parent>/<date-time>, numbered if there is one of this second.

    Raises CommandLineError if the directory cannot be made, or is in use.
    """
    stem = name or f"{parent}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    candidates = [stem] if name else [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    for run_dir in map(Path, candidates):
        if make_directory(run_dir, exist_ok=bool(name)) and not in_use(run_dir):
            return run_dir
    go_on = f", or --resume {quoted(run_dir)}" if (run_dir / LAST).exists() else ""
    raise CommandLineError(f"{run_dir} is in use already; name another --run_dir{go_on}")


def make_directory(path, exist_ok):
    """Make a directory. Returns False if the name is taken. Raises CommandLineError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        return True
    except FileExistsError:  # a file, a directory that must be new, or a link to nothing
        if path.exists():
            return False
        reason = ": a link in this path leads nowhere"
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        reason = f" ({getattr(error, 'strerror', error)})"
    raise CommandLineError(f"{path} cannot be made{reason}; name another --run_dir")


def in_use(run_dir):
    """Whether a directory holds a file that is worth keeping. A run that was killed before its first checkpoint leaves
    none.
    """
    return any(map(worth_keeping, run_dir.iterdir()))


def worth_keeping(file):
    """Whether a file is not one of those that a run writes before its first checkpoint."""
    if file.name == "config.json":  # other programs have one too
        return '"RUN_DIR"' not in file.read_text(encoding="utf-8", errors="replace")
    return not (file.name in ("config.json.tmp", f"{LAST}.tmp", LOCK) or file.name.startswith("events.out.tfevents."))


# --- what a directory says about its run ------------------------------------------------------------------------------


def write_config(run_dir, trainer):
    """Write a run's config.json, without which nothing can be resumed there. Makes the directory if need be."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = trainer.metadata["constants"] | {"RUN_ID": trainer.metadata["run_id"]}
    atomic_write(run_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def recorded_constants(run_dir):
    """The content of a directory's config.json, or None if it has none. Raises CommandLineError if it is damaged."""
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
    """The RUN_ID in a run's config.json, which its checkpoints have too. None if the run is older than this number."""
    with contextlib.suppress(OSError, CommandLineError, AttributeError):
        run_id = recorded_constants(run_dir).get("RUN_ID")
        return run_id if isinstance(run_id, str) else None
    return None


def is_replaced(run_dir, trainer):
    """Whether something else has taken the place of a run's directory: a file, a dangling link, or another run."""
    no_directory = os.path.lexists(run_dir) and not run_dir.is_dir()
    return no_directory or recorded_id(run_dir) not in (None, trainer.metadata.get("run_id"))


def check_begun(run_dir, constants):
    """Raises CommandLineError if a run with these constants can neither begin in a directory nor go on there."""
    # These may differ; the device does if the CPU has gone on with a run after a fault of the GPU.
    free = {"RUN_DIR": "", "RUN_ID": "", "DEVICE": ""}
    begun = recorded_constants(run_dir)
    if begun is not None and constants | begun | free != constants | free:
        raise CommandLineError(f"{run_dir} was begun with other constants; name another --out")
    if run_dir.exists() and not (run_dir / LAST).exists() and in_use(run_dir):
        problem = f"is in use already, and has no {LAST} to go on from"
        raise CommandLineError(f"{run_dir} {problem}; move it away, or name another --out")


# --- one process at a time --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run_dir):
    """Keep other processes from training in a directory. Raises CommandLineError if one does, or if it cannot write."""
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(filelock.FileLock(run_dir / LOCK, timeout=0))
            locks.enter_context(directory_locked(run_dir))
        except (filelock.Timeout, BlockingIOError):
            advice = "stop that one first, or name another run"
            raise CommandLineError(f"{run_dir}: another process is training this run; {advice}") from None
        except OSError as error:
            advice = "check its permissions, or name another run"
            raise CommandLineError(f"{run_dir} cannot be written ({error.strerror}); {advice}") from None
        yield


@contextlib.contextmanager
def directory_locked(run_dir):
    """Lock the directory itself, because somebody may delete the lock file in it. Raises BlockingIOError.

    Windows and some network drives cannot lock a directory. Windows does not delete an open file either.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        yield
    finally:
        os.close(descriptor)


def delete_unfinished(run_dir):
    """Delete the checkpoints of a run that a kill has left half written."""
    for file in run_dir.glob(f"*{SUFFIX}.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()


# --- resuming ---------------------------------------------------------------------------------------------------------


def load_state(trainer, run):
    """Put the state of a resumed run into its trainer.

    Raises CheckpointError if it does not fit, CommandLineError if the run has done all its steps.
    """
    try:
        trainer.check_state(run.state)
        trainer.load_state_dict(run.state)
    except Exception as error:  # games and other libraries' generators refuse values in ways of their own
        if out_of_memory(error):
            raise
        line = f"{run.directory}: does not fit this program ({one_line(error)}); resume another run"
        raise CheckpointError(line) from None
    if run.constants.get("EVAL_INTERVAL") == 0:
        trainer.pending = []  # evaluations that a stop has interrupted, and that nobody begins again
    run_id = run.state.get("run_id")  # older versions gave a run no number
    trainer.metadata["run_id"] = run_id if isinstance(run_id, str) else None
    if trainer.global_step >= trainer.num_steps and not trainer.pending:
        done = f"{run.directory} has done {trainer.global_step:,} steps already"
        raise CommandLineError(f"{done}; to go on, give a larger --num_steps")
    try:
        trainer.best = load_checkpoint(run.directory / BEST, {"evaluation": {"score": 0.0}})["evaluation"]
    except CheckpointError:  # there is none, or it is damaged: the next evaluation writes one
        trainer.best = {"score": -math.inf}


def resume_command(prog, run_dir, constants, ranks=1):
    """The command that goes on with a run, to paste into a shell in the working directory."""
    launcher = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    return " ".join([program_command(prog, launcher), "--resume", quoted(run_dir), *named_again(constants)])


def going_on(prog, run_dir, constants, ranks=1):
    """Returns {label: text} to print after a training: where its curve is, and how to train longer."""
    return {
        "see its curve": run_dir / "learning_curve.png",
        "train longer": f"{resume_command(prog, run_dir, constants, ranks)} --num_steps {2 * constants['NUM_STEPS']}",
    }


def program_command(prog, launcher="python"):
    """The command that starts one of our programs, such as "load_model.py" or "-m algorithms.NAME"."""
    script = prog if prog.startswith("-m ") else quoted(shown(ROOT / prog))
    return f"{launcher} {script}"
