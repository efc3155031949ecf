"""Calls a function in other processes, while this one goes on."""

import contextlib
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

from harness.messages import one_line
from harness.supervise import signals_handled

STARTING = threading.Lock()  # `main_hidden` changes what all threads see


class Background:
    """Calls a function in other processes: `submit(x)` returns the future of function(x).

    The future's result raises what the function raises, or BrokenProcessPool if no process can be started or one has
    died. The processes ignore Ctrl-C, which reaches every process of a terminal, and end with this one, however it
    ends. `close()` ends them at once.

    Args:
        function: must be importable, because it is pickled by its name.
        processes: how many calls may run at once. A process is started when all others are busy.
    """

    def __init__(self, function, processes=1):
        self.function = function
        self.processes = processes
        # CUDA does not survive a fork.
        self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=prepare_process)
        self.failed = None  # the future of a call that no process could be started for; later calls get it too
        self.submit_pickled(do_nothing, None)  # starts a process now, because its imports take seconds

    def submit(self, x):
        return self.submit_pickled(self.function, x)

    def submit_pickled(self, function, x):
        """Pickle and submit a call. The pool's own pickling would put tensors into shared memory, of which containers
        have little."""
        if self.failed:
            return self.failed
        try:
            function = pickle.dumps(function)
            x = pickle.dumps(x)
            of_main_script = b"__main__" in function
            # Until `prepare_process` runs, Ctrl-C would print a traceback in the new process, which inherits this.
            ctrl_c_ignored = signals_handled(signal.SIG_IGN, [signal.SIGINT])
            with STARTING, ctrl_c_ignored, contextlib.nullcontext() if of_main_script else main_hidden():
                return self.pool.submit(call, function, x)
        except Exception as error:
            self.failed = Future()
            self.failed.set_exception(BrokenProcessPool(f"no other process can run it: {one_line(error)}"))
            return self.failed

    def close(self):
        for process in list((self.pool._processes or {}).values()):
            process.kill()  # from Python 3.14 on, the pool has kill_workers()
        self.pool.shutdown(wait=False, cancel_futures=True)


def prepare_process():
    """Set up a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems that do not inherit it
    with contextlib.suppress(RuntimeError):  # no more threads can be started
        threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32, for the reason in device.py


def end_with_parent():
    """End this process as soon as its parent has ended, even if the parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(0)


def call(function, x):
    """Call a function, in a process of the pool; both are pickled."""
    return pickle.loads(function)(pickle.loads(x))


def do_nothing(x):
    pass


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
