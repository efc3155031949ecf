"""Calls a function in background processes, such as the evaluation of a policy that trains on meanwhile."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import types
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from harness.messages import one_line
from harness.supervise import signals_handled

# Held while a process starts, because `main_hidden` changes a module that all threads see.
STARTING = threading.Lock()


class CannotStart(RuntimeError):
    """No process can be started here, or none that can import the function; the message is one line."""


class Background:
    """Computes function(x) in other processes: `submit(x)` returns a future, and `result(future)` waits for its value.

    One thread per process sends it the submitted values and waits for the answers. The processes ignore Ctrl-C, which
    reaches every process of a terminal. They end together with this process, however it ends, and `close()` ends them
    at once.

    Args:
        function: is pickled by its name, so it must be importable.
        processes: the largest number of processes; all but the first start only when they are needed.
    """

    def __init__(self, function, processes=1):
        self.function, self.processes = function, processes
        self.threads = ThreadPoolExecutor(processes)
        self.started, self.futures = [], []
        # Pairs of a connection to a process that waits for work, and whether this process has reported that it can
        # work.
        self.idle = queue.SimpleQueue()
        # One process starts now, because its imports take seconds. If that fails, `submit` tries again and reports the
        # reason.
        with contextlib.suppress(Exception):
            self.start_process()

    def start_process(self):
        function = pickle.dumps(self.function)
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork.
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(function, theirs), daemon=True)
        hidden = contextlib.nullcontext() if b"__main__" in function else main_hidden()
        with STARTING, sigint_ignored(), hidden:
            process.start()
        theirs.close()  # Now only the process has this end, so receiving fails as soon as the process has ended.
        self.started.append(process)
        self.idle.put((ours, False))

    def submit(self, x):
        """Return a future for `result`. Where no process or thread can be started, `result` raises the reason."""
        data = pickle.dumps(x)
        self.futures = [future for future in self.futures if not future.done()]
        try:
            if len(self.futures) >= len(self.started) < self.processes:
                self.start_process()
            future = self.threads.submit(self.call, data)
        except Exception as error:
            future = Future()
            future.set_exception(CannotStart(f"no other process can run it: {one_line(error)}"))
        self.futures.append(future)
        return future

    def call(self, data):
        """Send a pickled value to an idle process and return its answer; runs in one of the threads."""
        connection, works = self.idle.get()
        try:
            if not works:
                if reason := connection.recv():
                    raise CannotStart(f"no other process can run it: {reason}")
                works = True
            connection.send_bytes(data)
            result, error = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            if not works:
                reason = "what it wrote stands above, or memory ran out"
                raise CannotStart(f"no other process can run it: {reason}") from None
            raise ChildProcessError(
                "a background process has died: what it wrote stands above, or memory ran out"
            ) from None
        finally:
            self.idle.put((connection, works))
        if error:
            raise error
        return result

    def result(self, future):
        """Wait for the value of a future and return it.

        Raises:
            CannotStart: no process can run the function.
            ChildProcessError: a process has died since it started.
            Exception: whatever the function itself has raised.
        """
        return future.result()

    def close(self):
        for process in self.started:
            process.kill()
        self.threads.shutdown(wait=False)


def serve(function, connection):
    """Run a background process: report whether it can import the function, then answer until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Not every system lets a process inherit this.
    # Where no more threads can be started, the process ends when it next tries to answer.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # No TF32, for the reason given in harness/device.py.
    with contextlib.suppress(EOFError, OSError):
        try:
            function = pickle.loads(function)
        except Exception as error:
            connection.send(one_line(error))
            return
        connection.send("")
        while True:
            answer = answer_to(function, connection.recv_bytes())
            connection.send_bytes(answer)


def answer_to(function, data):
    """Return a pickled pair: the function's value and None, or None and the exception that it raised."""
    try:
        return pickle.dumps((function(pickle.loads(data)), None))
    except Exception as error:
        error.add_note(traceback.format_exc())
        return pickle.dumps((None, error))


def end_with_parent():
    """End this process as soon as the one that started it has ended, even if that was killed."""
    multiprocessing.parent_process().join()
    os._exit(0)


def sigint_ignored():
    """Let a process that is started within ignore Ctrl-C from its first moment, when Ctrl-C would print a traceback."""
    return signals_handled(signal.SIG_IGN, [signal.SIGINT])


@contextlib.contextmanager
def main_hidden():
    """Keep a process that is started within from running the main script again, which may have no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
