"""A function that is called in processes of its own."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch


class Background:
    """`submit(x)` -> the future of function(x), computed in one of some processes; `result(future)` waits for it.

    The processes ignore Ctrl-C, which reaches every process of a terminal. They read from a pipe that nobody writes to, and leave
    when its other end is closed: by `close()`, which waits for nothing, or because this process has ended, however it ended.

    function: must be importable, because it is pickled by its name.
    """

    def __init__(self, function, processes=1):
        self.function, self.processes = function, processes
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        reader, self.writer = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(processes, context, initializer=prepare, initargs=(reader,))
        with sigint_ignored():  # inherited: until `prepare`, Ctrl-C would print tracebacks
            self.pool.submit(os.getpid)  # the imports take seconds: start one process now

    def submit(self, x):
        """-> a future for `result`. Raises ChildProcessError if a process has died."""
        # pickled here: the pool would move tensors into shared memory
        with sigint_ignored(), child_errors():
            return self.pool.submit(call, self.function, pickle.dumps(x))

    def result(self, future):
        """Raises what function raised, ChildProcessError if its process has died."""
        with child_errors():
            return future.result()

    def close(self):
        self.writer.close()


def call(function, x):
    return function(pickle.loads(x))


def prepare(reader):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    threading.Thread(target=end_with_parent, args=(reader,), daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # as device.py says; no TF32


def end_with_parent(reader):
    with contextlib.suppress(EOFError, OSError):
        reader.recv()
    os._exit(0)


@contextlib.contextmanager
def sigint_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def child_errors():
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError("a background process has died: what it wrote stands above, or memory ran out") from None
