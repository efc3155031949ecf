"""From the command line to a training and back, for any script with constants at its top.

Every constant of the script is an option, in lower case. Its type follows from its range, or else from its default. A new run
gets a directory; `--resume RUN` goes on with one, with its own constants. Ctrl-C, SIGTERM, SIGQUIT and a terminal that is closed
(SIGHUP) save and say how to go on. Whatever a user gets wrong becomes one line and a non-zero exit status.
"""

import argparse
import ast
import contextlib
import difflib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from checkpoint import CheckpointError, atomic_write, find_checkpoint, load_checkpoint, save_checkpoint
from device import (
    RANK,
    RANKS,
    UNDER_TORCHRUN,
    DeviceError,
    GPUError,
    free_memory,
    out_of_memory,
    printable,
    shortened,
    tell,
)
from trainer import InputNotFinite, StopTraining

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
LOCK = "run.lock"  # in a run directory; the system takes the lock off when its process ends, however it ends
PARENT = "STOP_WITH_PARENT"  # in the environment of a program that another one has started: its process id


class CommandLineError(ValueError):
    """What a user got wrong, in one line."""


class Run(NamedTuple):
    """What is to be trained: a new run, or one that goes on."""

    constants: dict
    directory: Path | None  # None: a new run, which has none yet
    state: dict | None  # of the trainer; None: a new run


# --- constants --------------------------------------------------------------------------------------------------------


class Constants(Mapping):
    """The constants that a script assigns at its top level, before CONSTANTS: {"NUM_STEPS": 4000000, ...}. What is assigned to one
    later, as in `train_ppo.NUM_STEPS = 1024`, counts from then on. They may have any type: `check_constants` refuses what is wrong."""

    def __init__(self, script):
        """script: its globals()."""
        self.script, self.names = script, []
        file = script.get(
            "__file__"
        )  # none, or that of another script, if this one was pasted into a notebook or run by `exec`
        for statement in ast.parse(Path(file).read_text(encoding="utf-8")).body if file else ():
            if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                stored = [
                    node.id
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                ]
                if "CONSTANTS" in stored:
                    return  # what follows is not for the user to set
                self.names += [name for name in stored if name.isupper() and name in script and name not in self.names]
        sys.exit(
            "the constants are read from the script's own file; import the script, or run it, instead of pasting or executing its text"
        )

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        return self.script[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __or__(self, changes):
        return {**self, **changes}


def kind_of(name, defaults, ranges):
    """bool, int, float or str: of the constant's range, which may be bool or str itself, whatever the default has become."""
    within = ranges.get(name, type(defaults.get(name)))
    return within if isinstance(within, type) else type(within[0])


class Parser(argparse.ArgumentParser):
    """Reads the words of a command line, or what a program gives instead of them: numbers and paths too. What is wrong is raised, as a
    CommandLineError."""

    def __init__(self, prog, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=formatter)

    def parse_known_args(self, args, namespace=None):
        return super().parse_known_args(list(map(str, args)), namespace)

    def error(self, message):
        raise CommandLineError(message)


def read_command_line(argv, prog, doc, defaults, ranges):
    """Arguments -> the run to resume or None, and the constants given: {"NUM_STEPS": 200000}."""
    parser = Parser(prog, doc)
    parser.add_argument(
        "--resume", type=given_path, metavar="RUN", help="a run directory, or a checkpoint in it to resume from"
    )
    for name, value in defaults.items():
        if name in ("HELP", "RESUME"):
            raise CommandLineError(
                f"{name} among the constants at the top of the script would hide --{name.lower()}; give it another name"
            )
        parser.add_argument(
            f"--{name.lower()}", metavar=kind_of(name, defaults, ranges).__name__, help=f"default {value!r}"
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name.lower()}" for name in defaults] + ["--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: text for name in defaults if (text := getattr(args, name.lower())) is not None}
    return args.resume, {name: convert(name, text, kind_of(name, defaults, ranges)) for name, text in given.items()}


def given_path(text):
    """The type of an option that names a file or a directory, for argparse. A leading ~ is the home directory."""
    if (
        not text
    ):  # what an unset variable of the shell leaves; the default would be another file than the one that is meant
        raise argparse.ArgumentTypeError("is empty; name a file or a directory")
    return os.path.expanduser(text)


def expand_home(constants):
    """A copy of the constants, in which a leading ~ is the home directory."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in constants.items()}


def convert(name, text, kind):
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise CommandLineError(f"--{name.lower()} needs {KINDS[kind]}, not {text!r}") from None


def check_constants(constants, defaults, ranges):
    """Raises CommandLineError for a value of the wrong type or out of its range, and for a constant that the script has no more."""
    for name in ranges:
        if name not in defaults:
            raise CommandLineError(f"{name} is missing among the constants at the top of the script; put it back")
    for name, value in constants.items():
        kind, within = kind_of(name, defaults, ranges), ranges.get(name)
        kinds = (int, float) if kind is float else (kind,)  # an integer is a number
        limits = isinstance(within, tuple)
        if kind not in KINDS or type(value) not in kinds or (limits and not within[0] <= value <= within[1]):
            wanted = KINDS.get(kind, "true or false, a number, or text") + (
                f" from {within[0]:,} to {within[1]:,}" if limits else ""
            )
            raise CommandLineError(f"{name} (--{name.lower()}) must be {wanted}, not {shortened(repr(value))}")


def check_constants_of_file(path, constants, defaults, ranges):
    """Raises CheckpointError for constants that no command line could have set, or only that of somebody who trusts a module."""
    try:
        check_constants(constants, defaults, ranges)
    except CommandLineError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint") from None
    if ":" in constants.get("ENV_ID", ""):  # Gymnasium would import what stands before it
        raise CheckpointError(
            f"{path}: its ENV_ID {shortened(repr(constants['ENV_ID']))} would run a module's code; name it by --env_id if you trust that"
        )


# --- runs -------------------------------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_handled(handler, signals=STOP_SIGNALS):
    """Within, the signals, of those that stop a run, go to handler(signum, frame), but for SIGHUP under nohup."""
    before = {}
    try:
        for signum in signals:
            if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = set_handler(signum, handler)
        yield
    finally:
        for signum, old in before.items():
            set_handler(signum, old)


def set_handler(signum, handler):
    """signal.signal, but for a training in a thread: signals are the main thread's."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signum, handler)


def ignore_signals():
    for signum in STOP_SIGNALS:
        set_handler(signum, signal.SIG_IGN)


def train(trainer, run_dir, prog, advice):
    """trainer.learn() to its end; a signal to stop ends it soon, saved and resumable. Returns the exit status.

    After a GPUError the run goes on with the CPU in a fresh process: in this one nothing that is on the GPU may work any more.
    advice: {exception: options that may help a run that ended with it}; MemoryError stands for all kinds of lack of memory.
    Raises CommandLineError if another process is training in this directory.
    """
    received = []
    # a second Ctrl-C ends the process if that is a program of ours, and otherwise only this call: a notebook's kernel must outlive it
    leave = ctrl_c_outside() if signal.getsignal(signal.SIGINT) is interrupt else signal.default_int_handler

    def stop(signum, frame):
        received.append(signum)
        if RANKS == 1:  # torchrun passes on what the terminal has sent already
            signal.signal(signum, leave if signum == signal.SIGINT else signal.SIG_DFL)  # a second one leaves at once
        trainer.request_stop()

    with signals_handled(stop), contextlib.ExitStack() as stack:
        for callback in reversed(trainer.callbacks):
            stack.callback(callback.hear, "close")
        with locked(run_dir) if RANK == 0 else contextlib.nullcontext():
            if RANK == 0:
                begin(trainer, run_dir)
            try:
                trainer.learn()
                return 0
            except Exception as error:
                ignore_signals()  # the end is near, and the run is not saved yet
                known = {
                    GPUError: " --device cpu",
                    InputNotFinite: "",
                    CheckpointError: "",
                    CommandLineError: "",
                }  # no defects of ours
                status = give_up(error, received, trainer, run_dir, prog, advice | known)
                if RANKS == 1:
                    set_handler(signal.SIGINT, leave)  # one more need not wait until all is closed
                if received or not isinstance(error, GPUError) or RANKS > 1:  # ranks would have to agree
                    return status
    return go_on_with_cpu(run_dir, prog)


def begin(trainer, run_dir):
    """Prepare the directory of a run, new or resumed: write what it is, and delete what a kill has left half written."""
    trainer.metadata["constants"]["RUN_DIR"] = str(run_dir)
    trainer.metadata["run_id"] = recorded_id(run_dir) or trainer.metadata.get("run_id") or uuid.uuid4().hex
    write_config(run_dir, trainer)
    delete_unfinished(run_dir)


def go_on_with_cpu(run_dir, prog):
    """Resume a run in a fresh process -> its exit status. A signal to stop is passed on."""
    script = (
        [str(Path(__file__).with_name(prog))] if prog.endswith(".py") else prog.split()
    )  # "train_ppo.py", or -m and its module
    process = start_program([sys.executable, *script, f"--resume={run_dir}", "--device", "cpu"])
    with signals_handled(lambda signum, frame: process.terminate()):
        return process.wait()


def give_up(error, received, trainer, run_dir, prog, advice):
    """Save the run as it was before the update that failed, and say how to go on -> exit status.

    An error that is a defect of the program is raised again; with several ranks its traceback is printed.
    """
    status, help_with = 1, ""
    if isinstance(error, StopTraining) or received:  # a signal to the whole group may have ended a child first
        reason = "stopped"
        status = 128 + (received[0] if received else signal.SIGTERM)  # without one, another rank was told to stop
    else:
        kind = MemoryError if out_of_memory(error) else type(error)
        reason = one_line(error) or ("out of memory" if kind is MemoryError else kind.__name__)
        help_with = advice.get(kind, "")
    if RANK == 0:
        how = "going on with" if isinstance(error, GPUError) and RANKS == 1 and not received else "go on with"
        saved, next_step = save_snapshot(
            trainer, run_dir, lambda place: f"{how}: {resume_command(prog, place, RANKS)}{help_with}", help_with
        )
        status = status if saved else 1
        tell(f"\n{reason}{next_step}")
    elif reason != "stopped":
        tell(f"rank {RANK}: {reason}")
    if reason != "stopped" and not isinstance(error, ChildProcessError) and kind not in advice:
        if RANKS == 1:
            raise error
        traceback.print_exception(error)  # not raised: it may be but the end of another rank
    return status


def save_snapshot(trainer, run_dir, command, help_with):
    """Save what a resume needs -> whether there is something to resume now, and what to do, to follow the reason why the run ended.

    command(directory): what goes on with the run.
    """
    if (
        trainer.snapshot is None
    ):  # the first state could not be taken, so nothing is lost, and what a resumed run has stays
        return False, f"; try{help_with}" if help_with else ""
    place, remark = run_dir, ""
    try:
        if is_replaced(run_dir, trainer):
            place = new_run_dir("", run_dir.parent)
        if not (place / "config.json").exists():
            write_config(place, trainer)
            remark = f"{run_dir} was renamed or removed; "
        save_checkpoint(place / "last.pt", trainer.snapshot)
    except Exception as failure:  # it must not hide the reason
        return False, f"; {one_line(failure) or type(failure).__name__}; then {command(place)}"
    return True, f"; {remark}{command(place)}"


def check_free_memory(needed, device, what, advice):
    """Raises CommandLineError if `what` would take more than nine tenths of the memory that is free now. advice: what to lower."""
    free = free_memory(device)
    if needed > 0.9 * free:
        room = f"{device} has {free / 1e9:,.1f} GB free, of which a tenth is for the rest"
        raise CommandLineError(f"{what} needs {needed / 1e9:,.1f} GB or more, and {room}; {advice}")


def less_memory(constants, names, ranges, check):
    """The option that lowers the first of these constants that can be lowered: to half, or to the next less that fits. "" if none can.

    check: raises CommandLineError for constants that do not fit together.
    """
    for name in names:
        lowest, value = ranges[name][0], constants[name]
        for smaller in range(min(max(value // 2, lowest), value - 1), lowest - 1, -1):
            with contextlib.suppress(CommandLineError):
                check(constants | {name: smaller})
                return f" --{name.lower()} {smaller}"
    return ""


@contextlib.contextmanager
def memory_advice(advice):
    """Raises CommandLineError with the advice for lack of memory within."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise CommandLineError(advice) from None


def resume_command(prog, run_dir, ranks):
    """The command that goes on with a run, to be pasted into a shell in this directory."""
    launcher = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    script = prog if prog.startswith("-m ") else quoted(shown(Path(__file__).parent / prog))
    return f"{launcher} {script} --resume {quoted(run_dir)}"


def quoted(path):
    """A path as one word of a shell's command, which is no option even if it begins with a dash."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def shown(path):
    """A path as it is printed: from the working directory, or as it stands where no way leads there from it."""
    try:
        return printable(os.path.relpath(path))
    except (ValueError, OSError):  # it is on another drive of Windows; the working directory has been removed
        return printable(path)


# --- programs that start others ---------------------------------------------------------------------------------------


def start_program(command, env=None, **options):
    """subprocess.Popen of one of our programs. It stops, as after SIGTERM, when this one has ended, however that came about."""
    environment = {**(os.environ if env is None else env), PARENT: str(os.getpid())}
    return subprocess.Popen(list(map(str, command)), env=environment, **options)


def stop_with_parent():
    """Watch whoever started this program by `start_program` or torchrun. On Windows a process does not learn that its parent has ended."""
    parent = int(os.environ.pop(PARENT, 0)) or (os.getppid() if UNDER_TORCHRUN else 0)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent and sys.platform != "win32":
        with contextlib.suppress(RuntimeError):  # no more threads can be started
            threading.Thread(target=watch, daemon=True).start()


def run_side_by_side(tasks, at_once):
    """Calls task(run) for every task, `at_once` at a time; run(command, **options) runs one of our programs to its end.

    An error of a task, or a signal to stop, stops all programs: they save, and then the error is raised, or CommandLineError.
    """
    running, stopping = set(), threading.Event()

    def run(command, **options):
        with start_program(command, **options) as process:
            running.add(process)
            if stopping.is_set():
                process.terminate()
            process.wait()
            running.remove(process)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = [pool.submit(task, run) for task in tasks]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException as error:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                raise CommandLineError("stopped; start again to go on") from None
            raise


# --- the program itself -----------------------------------------------------------------------------------------------


def one_line(error):
    """An error as one line. One of the system names its file and says what to do."""
    if no_more_processes(error):
        return "no more processes or threads can be started; end some, or raise the limit (ulimit -u)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output'}: {error.strerror}; check the path, its permissions and the space on the disk"
    return shortened(error)


def no_more_processes(error):
    return (
        isinstance(error, BlockingIOError) or isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    )


def interrupt(signum, frame):
    raise KeyboardInterrupt(signum)


def ctrl_c_outside():
    """What Ctrl-C does before and after a program of ours: it leaves at once, but not a Python that goes on (python -i, IPython's %run)."""
    return signal.default_int_handler if sys.flags.interactive or hasattr(sys, "ps1") else signal.SIG_DFL


def run_script(main, prog):
    """main(words of the command line) -> the end of the program: its exit status, or one line that says what was wrong.

    Any signal to stop is a KeyboardInterrupt in main, so that what it has begun is cleaned up.
    """
    prepare_output()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {shortened(message, 300)}\n"  # without its code
    set_handler(signal.SIGINT, ctrl_c_outside())
    try:
        with signals_handled(interrupt):
            stop_with_parent()
            status = main(sys.argv[1:]) or 0
    except BrokenPipeError:  # the reader of the output has left (`| head`)
        status = 141  # 128 + SIGPIPE
    except (
        CommandLineError,
        DeviceError,
        GPUError,
        CheckpointError,
        FloatingPointError,
        MemoryError,
        OSError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and not (isinstance(error, GPUError) or no_more_processes(error)):
            raise
        rank = f"rank {RANK}: " if RANKS > 1 else ""
        line = (
            one_line(error) if isinstance(error, OSError) or no_more_processes(error) else str(error) or "out of memory"
        )
        tell(printable(f"{prog}: {rank}{line}"))
        status = 1
    except KeyboardInterrupt as error:
        status = 128 + (error.args or [signal.SIGINT])[0]
    sys.exit(finish_output(prog, status))


def prepare_output():
    """Output that is closed goes nowhere, and what it has no characters for is escaped."""
    while (
        descriptor := os.open(os.devnull, os.O_RDWR)
    ) < 3:  # or the next file to be opened would be taken for the output
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def finish_output(prog, status):
    """-> the exit status: not 0 if what was printed has reached nobody, but for a reader that has left (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes again
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                status = status or 1
                tell(f"{prog}: the output could not be written ({error.strerror})")
    return status
