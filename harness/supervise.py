"""How a program runs and ends: signals, output, saving what an interrupted training has learned."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings

from harness.checkpoint import LAST, CheckpointError, save_checkpoint
from harness.device import RANK, RANKS, UNDER_TORCHRUN, DeviceError, GPUError, free_memory, out_of_memory
from harness.files import WINDOWS
from harness.messages import no_more_processes, one_line, printable, shortened, tell
from harness.options import CommandLineError, Values
from harness.runs import (
    ROOT,
    delete_unfinished,
    is_replaced,
    locked,
    named_again,
    new_run_dir,
    recorded_id,
    resume_command,
    write_config,
)

# Windows has no SIGHUP and SIGQUIT; its SIGBREAK is Ctrl-Break, which a program can also send to another one.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK") if hasattr(signal, name)
]
PARENT = "STOP_WITH_PARENT"  # an environment variable: the process id of the program that has started this one


class StopTraining(Exception):
    """Raised inside `learn` soon after `request_stop`."""


class InputNotFinite(FloatingPointError):
    """The rewards or observations of a training are not finite, so no learning rate would help."""


# --- signals ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_handled(handler, signals=STOP_SIGNALS):
    """Call handler(signum, frame) for these signals within the context.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    """
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
    """Call signal.signal, but not for a training in another thread: only the main thread may."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signum, handler)


def ignore_signals():
    for signum in STOP_SIGNALS:
        set_handler(signum, signal.SIG_IGN)


def interrupt(signum, frame):
    raise KeyboardInterrupt(signum)


def ctrl_c_outside():
    """Return the handler of Ctrl-C outside of a program's main.

    It ends the process, unless Python goes on interactively.
    """
    interactive = sys.flags.interactive or hasattr(sys, "ps1")  # python -i, or %run in IPython
    return signal.default_int_handler if interactive else signal.SIG_DFL


# --- a training and its end -------------------------------------------------------------------------------------------


def train(trainer, run_dir, prog, advice):
    """Run trainer.learn() to its end, and return the exit status.

    A signal ends it soon, saved so that it can be resumed. After a GPUError the run continues on the CPU in a fresh
    process, because in this one nothing on the GPU may work any more.

    Args:
        prog: "train_ppo.py" or "-m algorithms.NAME", for the command that resumes the run.
        advice: {exception: options that may help a run which ended with it}. MemoryError stands for any lack of memory.

    Raises CommandLineError if another process is training in this directory.
    """
    received = []
    # A second Ctrl-C ends the process of one of our programs. A notebook's kernel must outlive it, so there it ends
    # this call.
    leave = ctrl_c_outside() if signal.getsignal(signal.SIGINT) is interrupt else signal.default_int_handler

    def stop(signum, frame):
        received.append(signum)
        if RANKS == 1:  # torchrun passes on what the terminal has already sent, so there a second signal means nothing
            signal.signal(signum, leave if signum == signal.SIGINT else signal.SIG_DFL)
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
                ignore_signals()  # the run is not saved yet
                status = give_up(error, received, trainer, run_dir, prog, advice)
                if RANKS == 1:
                    set_handler(signal.SIGINT, leave)  # Ctrl-C need not wait until all callbacks are closed
                if received or not isinstance(error, GPUError) or RANKS > 1:  # ranks would have to agree
                    return status
    return continue_on_cpu(trainer, run_dir, prog)


def begin(trainer, run_dir):
    """Prepare the directory of a new or resumed run.

    Its configuration is written, and what a kill has left half written is deleted.
    """
    trainer.metadata["constants"]["RUN_DIR"] = str(run_dir)
    trainer.metadata["run_id"] = recorded_id(run_dir) or trainer.metadata.get("run_id") or uuid.uuid4().hex
    write_config(run_dir, trainer)
    delete_unfinished(run_dir)


def continue_on_cpu(trainer, run_dir, prog):
    """Resume a run in a fresh process, and return its exit status. Signals are passed on to it."""
    again = named_again(trainer.metadata["constants"])
    script = [str(ROOT / prog)] if prog.endswith(".py") else prog.split()
    process = start_program([sys.executable, *script, f"--resume={run_dir}", "--device", "cpu", *again])
    with signals_handled(lambda signum, frame: stop_program(process)):
        return process.wait()


def give_up(error, received, trainer, run_dir, prog, advice):
    """Save the run as it was before the update that failed, say how to resume it, and return the exit status.

    received: the signals that have asked the training to stop. An error that is a defect of the program is raised
    again; with several ranks its traceback is printed instead, because it may be only a consequence of another rank's
    end.
    """
    stopped = isinstance(error, StopTraining) or bool(received)  # a signal to the whole group may end a child first
    no_defects = {GPUError: " --device cpu"}
    no_defects |= dict.fromkeys([InputNotFinite, CheckpointError, CommandLineError, ChildProcessError], "")
    options = (advice | no_defects).get(MemoryError if out_of_memory(error) else type(error))
    defect = options is None and not stopped
    status = 1
    reason = one_line(error)
    if stopped:
        status = 128 + (received[0] if received else signal.SIGTERM)  # without a signal, another rank was told to stop
        reason = "stopped"
        options = ""
    if RANK == 0:
        continues = isinstance(error, GPUError) and RANKS == 1 and not stopped
        go_on = "going on with" if continues else "go on with"
        saved, next_step = save_snapshot(trainer, run_dir, prog, go_on, options or "")
        status = status if saved else 1
        tell(f"\n{reason}{next_step}")
    elif not stopped:
        tell(f"rank {RANK}: {reason}")
    if defect:
        if RANKS == 1:
            raise error
        traceback.print_exception(error)
    return status


def save_snapshot(trainer, run_dir, prog, go_on, options):
    """Save the trainer's snapshot.

    Returns whether there is something to resume now, and the end of a sentence that says what to do.

    Args:
        go_on: the words before the command that resumes the run.
        options: of this command.
    """
    if trainer.snapshot is None:  # the training has not begun, so nothing is lost
        return False, f"; try{options}" if options else ""
    place = run_dir
    remark = ""
    try:
        if is_replaced(run_dir, trainer):
            place = new_run_dir("", run_dir.parent)
        if not (place / "config.json").exists():
            write_config(place, trainer)
            remark = f"{run_dir} was renamed or removed; "
        save_checkpoint(place / LAST, trainer.snapshot)
        saved = True
    except Exception as failure:  # it must not hide the reason for the end
        remark = f"{one_line(failure)}; then "
        saved = False
    return saved, f"; {remark}{go_on}: {resume_command(prog, place, trainer.metadata['constants'], RANKS)}{options}"


# --- memory -----------------------------------------------------------------------------------------------------------


def check_free_memory(needed, device, what, advice):
    """Raise CommandLineError if `what` needs more than nine tenths of the free memory. advice: what to lower."""
    free = free_memory(device)
    if needed > 0.9 * free:
        room = f"{device} has {free / 1e9:,.1f} GB free, of which a tenth is for the rest"
        raise CommandLineError(f"{what} needs {needed / 1e9:,.1f} GB or more, and {room}; {advice}")


def less_memory(constants, names, known, check):
    """The option that lowers the first of these constants that can be lowered, or "" if none can.

    The new value is half the old one, or the next smaller value that fits the other constants.

    Args:
        constants: {name: value} of the run.
        names: of the constants that take memory, the one that takes most first.
        known: the `Constants` of the script.
        check: raises CommandLineError for `Values` that do not fit together.
    """
    for name in names:
        for smaller in range(constants[name] // 2, 0, -1):
            with contextlib.suppress(CommandLineError):
                known.check({name: smaller})
                check(Values(**constants | {name: smaller}))
                return f" --{name.lower()} {smaller}"
    return ""


@contextlib.contextmanager
def memory_advice(advice):
    """A context in which lack of memory raises CommandLineError with this advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise CommandLineError(advice) from None


# --- programs ---------------------------------------------------------------------------------------------------------


def start_program(command, env=None, **options):
    """Start one of our programs, as subprocess.Popen does. It stops and saves when this process ends or is killed."""
    environment = {**(os.environ if env is None else env), PARENT: str(os.getpid())}
    if WINDOWS:  # a group of its own, so that `stop_program` does not stop this process too
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    return subprocess.Popen(list(map(str, command)), env=environment, **options)


def stop_program(process):
    """Ask a program that `start_program` has started to save and stop."""
    if WINDOWS:
        with contextlib.suppress(OSError):  # it has ended, or there is no console
            process.send_signal(signal.CTRL_BREAK_EVENT)
            return
    process.terminate()  # which kills it on Windows


def stop_with_parent():
    """Stop this program, as SIGTERM does, when the process that has started it ends.

    That is whoever called `start_program`, or torchrun. On Windows a process does not learn that its parent has ended.
    """
    parent = int(os.environ.pop(PARENT, 0)) or (os.getppid() if UNDER_TORCHRUN else 0)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent and not WINDOWS:
        with contextlib.suppress(RuntimeError):  # no more threads can be started
            threading.Thread(target=watch, daemon=True).start()


def run_script(main, prog):
    """Run main(words of the command line) and end the program with the status that it returns.

    An error that a user can cause becomes one line. A signal to stop is a KeyboardInterrupt in main, so that what it
    has begun is cleaned up.
    """
    prepare_output()
    # Python would add the line of code that warns.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {shortened(message, 300)}\n"
    set_handler(signal.SIGINT, ctrl_c_outside())
    try:
        with signals_handled(interrupt):
            stop_with_parent()
            status = main(sys.argv[1:]) or 0
    except BrokenPipeError:  # the reader of the output has left (`| head`)
        status = 141  # 128 + SIGPIPE
    except KeyboardInterrupt as error:
        status = 128 + (error.args or [signal.SIGINT])[0]
    except Exception as error:
        line = line_for_user(error)
        if line is None:
            raise
        rank = f"rank {RANK}: " if RANKS > 1 else ""
        tell(printable(f"{prog}: {rank}{line}"))
        status = 1
    sys.exit(finish_output(prog, status))


def line_for_user(error):
    """One line for an error that a user can cause, or None for a defect of the program."""
    if isinstance(error, OSError) or no_more_processes(error):
        return one_line(error)
    if isinstance(error, (CommandLineError, DeviceError, GPUError, CheckpointError, FloatingPointError, MemoryError)):
        return str(error) or "out of memory"
    return None


def prepare_output():
    """Let output that is closed go nowhere, and escape what the output's encoding has no characters for."""
    while True:  # the next file to be opened must not get the number of a closed output, and be taken for it
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish_output(prog, status):
    """Flush the output and return the exit status: 1 instead of 0 if the output could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes again
            reader_has_left = isinstance(error, BrokenPipeError)
            if stream is sys.stdout and not reader_has_left:
                status = status or 1
                tell(f"{prog}: the output could not be written ({error.strerror})")
    return status
