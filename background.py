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
    """`submit(x)` -> the future of function(x), computed in one of some processes. They end with this one, however it ends, and
    Ctrl-C, which reaches every process of a terminal, is not for them. A context manager: at its end they are stopped.

    function: a function of a module, for it is imported there.
    """

    def __init__(self, function, processes=1):
        self.function, self.processes, context = function, processes, multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        theirs, self.alive = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(processes, context, initializer=prepare, initargs=(theirs,))
        with sigint_ignored():  # the processes inherit this
            self.pool.submit(os.getpid)  # the imports take seconds: start with them

    def submit(self, x):
        """Raises ChildProcessError, now or by the future's result(), if a process has died."""
        # pickled here: the pool would move tensors into shared memory
        with sigint_ignored(), child_errors():
            return self.pool.submit(call, self.function, pickle.dumps(x))

    def result(self, future):
        with child_errors():
            return future.result()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.alive.close()


def call(function, x):
    return function(pickle.loads(x))


def prepare(alive):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    threading.Thread(target=end_with_parent, args=(alive,), daemon=True).start()
    torch.set_num_threads(1)


def end_with_parent(alive):
    with contextlib.suppress(EOFError, OSError):
        alive.recv()  # nothing is ever sent: this ends when the other end is closed, or its process dead
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
        raise ChildProcessError("the process that evaluates has died: what it wrote stands above, or memory ran out") from None
