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
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from harness.checkpoint import CheckpointError, save_checkpoint
from harness.device import RANK, RANKS, UNDER_TORCHRUN, DeviceError, GPUError, free_memory, out_of_memory
from harness.messages import no_more_processes, one_line, printable, shortened, tell
from harness.options import CommandLineError
from harness.runs import (
    ROOT,
    delete_unfinished,
    is_replaced,
    locked,
    new_run_dir,
    recorded_id,
    resume_command,
    write_config,
)

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
PARENT = "STOP_WITH_PARENT"  # in the environment of a program that another one has started: its process id


class StopTraining(Exception):
    """Raised inside `learn` soon after `request_stop`."""


class InputNotFinite(FloatingPointError):
    """What a training is given is not finite, so no learning rate would help."""


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
    script = [str(ROOT / prog)] if prog.endswith(".py") else prog.split()  # "train_ppo.py", or -m and its module
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
        reason = one_line(error)
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
        return False, f"; {one_line(failure)}; then {command(place)}"
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
