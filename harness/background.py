"""Calls a function in other processes, while this one goes on."""

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
from multiprocessing.connection import wait

import torch

from harness.messages import one_line
from harness.supervise import signals_handled

STARTING = threading.Lock()  # `main_hidden` changes what all threads see


class CannotStart(RuntimeError):
    """No other process can be started, or it cannot find the function; the message is one line."""


class Background:
    """Calls a function in other processes: `submit(x)` returns the future of function(x).

    The future's result raises what the function raises, CannotStart, or ChildProcessError if a process has died.

    The processes ignore Ctrl-C, which reaches every process of a terminal, and end with this one, however it ends.
    `close()` ends them at once.

    Args:
        function: must be importable, because it is pickled by its name.
        processes: how many calls may run at once. A process is started when all others are busy.
    """

    def __init__(self, function, processes=1):
        self.function = function
        self.processes = processes
        self.threads = ThreadPoolExecutor(processes)  # each waits for the answer of one worker
        self.workers = []
        self.futures = []
        self.idle = queue.SimpleQueue()  # the workers that wait for a call
        with contextlib.suppress(Exception):  # `submit` tries again
            self.start_worker()  # now, because its imports take seconds

    def submit(self, x):
        data = pickle.dumps(x)
        self.futures = [future for future in self.futures if not future.done()]
        all_busy = len(self.futures) >= len(self.workers)
        try:
            if all_busy and len(self.workers) < self.processes:
                self.start_worker()
            future = self.threads.submit(self.call, data)
        except Exception as error:
            future = Future()
            future.set_exception(CannotStart(f"no other process can run it: {one_line(error)}"))
        self.futures.append(future)
        return future

    def start_worker(self):
        worker = Worker(self.function)
        self.workers.append(worker)
        self.idle.put(worker)

    def call(self, data):
        worker = self.idle.get()
        try:
            return worker.call(data)
        finally:
            self.idle.put(worker)

    def close(self):
        for worker in self.workers:
            worker.process.kill()
        self.threads.shutdown(wait=False)


class Worker:
    """One process that calls the function, seen from the process that waits for the results."""

    def __init__(self, function):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        pickled = pickle.dumps(function)
        self.connection, its_end = context.Pipe()
        self.process = context.Process(target=serve, args=(pickled, its_end), daemon=True)
        of_main_script = b"__main__" in pickled
        with STARTING, sigint_ignored(), contextlib.nullcontext() if of_main_script else main_hidden():
            self.process.start()
        its_end.close()  # only the process holds it now, so we notice when the process ends
        self.started = False  # whether the process has said that it found the function

    def call(self, data):
        """Return the result of the function for this pickled argument, or raise its error."""
        self.ask(data)
        return self.answer()

    def ask(self, data):
        """Let the process call the function with this pickled argument; `answer` waits for the result."""
        with self.dying_explained():
            if not self.started:
                if reason := pickle.loads(self.receive()):
                    raise CannotStart(f"no other process can run it: {reason}")
                self.started = True
            self.connection.send_bytes(data)

    def answer(self):
        """Return the result of the call that `ask` began, or raise its error."""
        with self.dying_explained():
            result, error = pickle.loads(self.receive())
        if error:
            raise error
        return result

    @contextlib.contextmanager
    def dying_explained(self):
        """Raise CannotStart or ChildProcessError if the process has died."""
        try:
            yield
        except (EOFError, OSError):
            why = "what it wrote stands above, or memory ran out"
            if not self.started:
                raise CannotStart(f"no other process can run it: {why}") from None
            raise ChildProcessError(f"a background process has died: {why}") from None

    def receive(self):
        """Wait for the next message of the process. Raises EOFError if it has ended instead.

        On Windows the connection alone does not notice the end of a process that has not taken its end of it yet.
        """
        if self.connection not in wait([self.connection, self.process.sentinel]):
            raise EOFError
        return self.connection.recv_bytes()


def serve(function, connection):
    """Run a worker's process: say whether the pickled function is found, then answer calls until the other end is
    closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    if hasattr(signal, "SIGBREAK"):  # Ctrl-Break on Windows
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):  # without another thread, the process ends when it next answers
        threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32, for the reason in device.py
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
    """Return, pickled, the function's result and None, or None and its error."""
    try:
        return pickle.dumps((function(pickle.loads(data)), None))
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            answer = pickle.dumps((None, error))
            pickle.loads(answer)
            return answer
        except Exception:  # not all exceptions can be pickled and read again
            return pickle.dumps((None, RuntimeError("".join(traceback.format_exception(error)))))


def end_with_parent():
    """End this process as soon as its parent has ended, even if the parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(0)


def sigint_ignored():
    """Ignore Ctrl-C while a process starts, which inherits this: until `serve` runs, Ctrl-C would print tracebacks
    there."""
    return signals_handled(signal.SIG_IGN, [signal.SIGINT])


@contextlib.contextmanager
def main_hidden():
    """Hide the main script while a process starts. Otherwise the process would run it again, and a script without a
    main guard would train there too."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
