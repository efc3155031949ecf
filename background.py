"""A function that is called in processes of its own."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from command_line import signals_handled
from device import first_line


class CannotStart(RuntimeError):
    """No process can be started here, or none that finds the function; in one line."""


class Background:
    """`submit(x)` -> the future of function(x), computed in one of some processes; `result(future)` waits for it.

    The processes ignore Ctrl-C, which reaches every process of a terminal. They read from a pipe that nobody writes to, and leave
    when its other end is closed: by `close()`, which waits for nothing, or because this process has ended, however it ended.

    function: must be importable, because it is pickled by its name.
    """

    def __init__(self, function, processes=1):
        self.function, self.processes = function, processes
        self.context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.reader, self.writer = self.context.Pipe(duplex=False)
        self.started = self.run(pickle.loads)  # the imports take seconds: start one process now, and let it find the function

    @functools.cached_property
    def pool(self):
        return ProcessPoolExecutor(self.processes, self.context, initializer=prepare, initargs=(self.reader,))

    def submit(self, x):
        """-> a future for `result`."""
        return self.run(call, pickle.dumps(x))  # pickled here: the pool would move tensors into shared memory

    def run(self, job, *args):
        """-> the future of job(function, pickled, *args), also where it cannot be started: `result` then says why."""
        try:
            function = pickle.dumps(self.function)
            with sigint_ignored(), contextlib.nullcontext() if b"__main__" in function else main_hidden():
                return self.pool.submit(job, function, *args)
        except Exception as error:
            future = Future()
            future.set_exception(error)
            return future

    def result(self, future):
        """Raises what function raised, CannotStart if nothing can run, ChildProcessError if a process has died since the start."""
        try:
            self.started.result()
        except Exception as error:
            raise CannotStart(f"no other process can run it: {first_line(error)}") from error
        try:
            return future.result()
        except BrokenProcessPool:
            raise ChildProcessError("a background process has died: what it wrote stands above, or memory ran out") from None

    def close(self):
        self.writer.close()


def call(function, x):
    return pickle.loads(function)(pickle.loads(x))


def prepare(reader):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    threading.Thread(target=end_with_parent, args=(reader,), daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # as device.py says; no TF32


def end_with_parent(reader):
    with contextlib.suppress(EOFError, OSError):
        reader.recv()
    os._exit(0)


def sigint_ignored():
    """Inherited by a process that starts within: until `prepare`, Ctrl-C would print tracebacks."""
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
