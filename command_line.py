"""From the command line to a training and back, for any script with constants at its top.

Every constant of the script is an option, in lower case. Its type follows from its range, or else from its default. A new run
gets a directory; `--resume RUN` goes on with one, with its own constants. Ctrl-C saves and says how to go on. Whatever a user gets
wrong becomes one line and a non-zero exit status.
"""

import argparse
import ast
import contextlib
import difflib
import json
import math
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from checkpoint import CheckpointError, atomic_write, find_checkpoint, load_checkpoint, save_checkpoint
from device import RANK, RANKS, DeviceError, GPUError, out_of_memory
from trainer import StopTraining

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}


class CommandLineError(ValueError):
    """What a user got wrong, in one line."""


class Run(NamedTuple):
    """What is to be trained: a new run, or one that goes on."""

    constants: dict
    directory: Path | None  # None: a new run, which has none yet
    state: dict | None  # of the trainer; None: a new run


# --- constants --------------------------------------------------------------------------------------------------------


def constants_of(script):
    """globals() of a script -> the constants that it assigns at its top level: {"NUM_STEPS": 4000000, ...}"""
    statements = ast.parse(Path(script["__file__"]).read_text()).body
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return {name: script[name] for name in names if name.isupper() and type(script.get(name)) in KINDS}


def kind_of(name, defaults, ranges):
    """bool, int, float or str. A range of integers wants an integer, whatever the default has become."""
    return type(ranges[name][0]) if name in ranges else type(defaults[name])


def read_command_line(argv, prog, doc, defaults, ranges):
    """Arguments -> the run to resume or None, and the constants given: {"NUM_STEPS": 200000}."""
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = raise_error
    parser.add_argument("--resume", metavar="RUN", help="a run directory, or a checkpoint in it to resume from")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.lower()}", metavar=kind_of(name, defaults, ranges).__name__, help=f"default {value!r}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name.lower()}" for name in defaults] + ["--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: text for name in defaults if (text := getattr(args, name.lower())) is not None}
    return args.resume, {name: convert(name, text, kind_of(name, defaults, ranges)) for name, text in given.items()}


def raise_error(message):
    raise CommandLineError(message)


def convert(name, text, kind):
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise CommandLineError(f"--{name.lower()} needs {KINDS[kind]}, not {text!r}") from None


def check_constants(constants, defaults, ranges):
    """Raises CommandLineError for a value of the wrong type or out of its range."""
    for name, value in constants.items():
        kind = kind_of(name, defaults, ranges)
        low, high = ranges.get(name, (-math.inf, math.inf))
        kinds = (int, float) if kind is float else (kind,)  # an integer is a number
        if type(value) not in kinds or (name in ranges and not low <= value <= high):
            within = f" from {low:,} to {high:,}" if name in ranges else ""
            raise CommandLineError(f"{name} (--{name.lower()}) must be {KINDS[kind]}{within}, not {value!r}")


# --- runs -------------------------------------------------------------------------------------------------------------


def read_run(argv, prog, doc, defaults, ranges, kept=(), check=lambda constants: None):
    """The command line -> the `Run` that it asks for, its constants checked.

    kept: constants that a resumed run keeps. check(constants) raises CommandLineError for values that do not fit together.
    """
    resume, given = read_command_line(argv, prog, doc, defaults, ranges)
    run = Run(defaults | given, None, None) if resume is None else read_resumed(resume, given, defaults, kept)
    check_constants(run.constants, defaults, ranges)
    check(run.constants)
    return run


def read_resumed(name, given, defaults, kept):
    path = find_checkpoint(name)
    state = load_checkpoint(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: holds a model to play, not a run to resume; resume from its run's last.pt")
    if not (path.parent / "config.json").exists():
        raise CheckpointError(f"{path}: lies outside its run (there is no config.json beside it); resume it in its run directory")
    constants = state.get("constants")
    if not isinstance(constants, dict) or constants.keys() != defaults.keys():
        differing = ", ".join(sorted(set(constants or ()) ^ set(defaults))[:3])
        raise CheckpointError(
            f"{path}: has other constants than this program (as {differing}); resume it with the program that wrote it"
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
            if not any(run_dir.iterdir()):
                return run_dir
        except FileExistsError:
            pass
        except OSError as error:
            raise CommandLineError(f"{run_dir} cannot be made ({error.strerror}); name another --run_dir") from None
        if name:
            break
    raise CommandLineError(f"{run_dir} is in use already; name another --run_dir, or --resume {run_dir}")


def load_state(trainer, run):
    """Puts the state of a resumed run into its trainer. Raises CheckpointError if it does not fit."""
    try:
        trainer.load_state_dict(run.state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run.directory}: does not fit this program ({one_line(error)}); resume another run") from None
    if trainer.global_step >= trainer.num_steps and not trainer.pending:
        raise CommandLineError(
            f"{run.directory} has done {trainer.global_step:,} steps already; to go on, give a larger --num_steps"
        )
    try:
        trainer.best_score = load_checkpoint(run.directory / "best_model.pt")["evaluation"]["score"]
    except CheckpointError:  # none, or spoiled: the next evaluation leaves another
        trainer.best_score = -math.inf


# --- training ---------------------------------------------------------------------------------------------------------


def train(trainer, run_dir, prog, advice):
    """trainer.learn() to its end; Ctrl-C and SIGTERM end it soon, saved and resumable. Returns the exit status.

    After a GPUError the run goes on with the CPU in a fresh process: in this one nothing that is on the GPU may work any more.
    advice: {exception: options that may help a run that ended with it}; MemoryError stands for all kinds of lack of memory.
    """
    if RANK == 0:
        atomic_write(run_dir / "config.json", (json.dumps(trainer.metadata["constants"], indent=2) + "\n").encode())
    received = []

    def stop(signum, frame):
        received.append(signum)
        if RANKS == 1:  # torchrun passes on what the terminal has sent already
            signal.signal(signum, signal.SIG_DFL)  # a second one leaves at once
        trainer.request_stop()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.learn()
        return 0
    except Exception as error:
        for signum in before:  # the end is near, and the run is not saved yet
            signal.signal(signum, signal.SIG_IGN)
        status = give_up(error, received, trainer, run_dir, prog, {**advice, GPUError: " --device cpu"})
        if received or not isinstance(error, GPUError) or RANKS > 1:  # ranks would have to agree
            return status
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for callback in trainer.callbacks:
            callback.close()
    return go_on_with_cpu(run_dir)


def go_on_with_cpu(run_dir):
    """Resume a run in a fresh process -> its exit status. Ctrl-C reaches both processes, SIGTERM is passed on."""
    script = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]  # its name, or -m and its module, without its options
    process = subprocess.Popen([sys.executable, *script, "--resume", str(run_dir), "--device", "cpu"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: process.terminate())
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
        save_checkpoint(run_dir / "last.pt", trainer.snapshot)
        print(f"\n{reason}; go on with: {launcher(RANKS)} {prog} --resume {shlex.quote(str(run_dir))}{help_with}", file=sys.stderr)
    elif reason != "stopped":
        print(f"rank {RANK}: {reason}", file=sys.stderr)
    if reason != "stopped" and not isinstance(error, ChildProcessError) and kind not in advice:
        if RANKS == 1:
            raise error
        traceback.print_exception(error)  # not raised: it may be but the end of another rank
    return status


@contextlib.contextmanager
def memory_advice(advice):
    """Raises CommandLineError with the advice for lack of memory within."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise CommandLineError(advice) from None


def launcher(ranks):
    return "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"


def one_line(error):
    return " ".join(str(error).split())[:200]


def run_script(main, prog):
    """main() -> the end of the program: its exit status, or one line that says what was wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except (CommandLineError, DeviceError, GPUError, CheckpointError, OSError) as error:
        rank = f"rank {RANK}: " if RANKS > 1 else ""
        with contextlib.suppress(OSError):
            print(f"{prog}: {rank}{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
