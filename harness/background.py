"""A function that is called in processes of its own."""

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

STARTING = threading.Lock()  # `main_hidden` changes what all threads see


class CannotStart(RuntimeError):
    """No process can be started here, or none that finds the function; in one line."""


class Background:
    """`submit(x)` gives the future of function(x), computed in one of some processes; `result(future)` waits for it.

    A thread for each process sends what is submitted and waits for the answer. The processes ignore Ctrl-C, which reaches every
    process of a terminal, and end with this one, however it ends. `close()` ends them at once.

    function: must be importable, because it is pickled by its name.
    """

    def __init__(self, function, processes=1):
        self.function, self.processes = function, processes
        self.threads = ThreadPoolExecutor(processes)
        self.started, self.futures = [], []
        self.idle = (
            queue.SimpleQueue()
        )  # connections to processes that wait for work, and whether they have said that they can work
        with contextlib.suppress(Exception):  # `submit` tries again
            self.start_process()  # the imports take seconds: one process starts now

    def start_process(self):
        function, context = (
            pickle.dumps(self.function),
            multiprocessing.get_context("spawn"),
        )  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(function, theirs), daemon=True)
        with STARTING, sigint_ignored(), contextlib.nullcontext() if b"__main__" in function else main_hidden():
            process.start()
        theirs.close()  # only the process has it now: if that ends, so does what we wait for
        self.started.append(process)
        self.idle.put((ours, False))

    def submit(self, x):
        """Gives a future for `result`, also where no process or thread can be started: `result` then says why."""
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
                raise CannotStart(
                    "no other process can run it: what it wrote stands above, or memory ran out"
                ) from None
            raise ChildProcessError(
                "a background process has died: what it wrote stands above, or memory ran out"
            ) from None
        finally:
            self.idle.put((connection, works))
        if error:
            raise error
        return result

    def result(self, future):
        """Raises what function raised, CannotStart if nothing can run, ChildProcessError if a process has died since the start."""
        return future.result()

    def close(self):
        for process in self.started:
            process.kill()
        self.threads.shutdown(wait=False)


def serve(function, connection):
    """What a process does: it says whether it finds the function, and then answers until there is nobody to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    with contextlib.suppress(RuntimeError):  # where no more threads can be started, a process ends when it next answers
        threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # as device.py says; no TF32
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
    """-> pickled: function(x) and None, or None and what it raised."""
    try:
        return pickle.dumps((function(pickle.loads(data)), None))
    except Exception as error:
        error.add_note(traceback.format_exc())
        return pickle.dumps((None, error))


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(0)


def sigint_ignored():
    """Inherited by a process that starts within: until `serve`, Ctrl-C would print tracebacks."""
    return signals_handled(signal.SIG_IGN, [signal.SIGINT])


@contextlib.contextmanager
def main_hidden():
    """A process that starts within does not run the main script again, which would train there too if it has no main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
