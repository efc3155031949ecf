"""Background processes answer, report every failure, and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from harness.background import Background, CannotStart


class Odd(Exception):
    """Can be pickled, and not read again."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def work(x):
    """Fail or die if asked to, and otherwise return x and this process's number after a Ctrl-C that must be ignored."""
    if x == "die":
        os._exit(1)
    if x == "fail":
        raise ValueError("of the function")
    if x == "odd":
        raise Odd("of", "a game")
    if x == "precision":
        return torch.get_float32_matmul_precision()
    signal.raise_signal(signal.SIGINT)  # Ctrl-C reaches every process of a terminal.
    time.sleep(0.2)
    return x, os.getpid()


def test_values_and_errors_come_back_from_other_processes():
    """Two processes share the work; an error of the function and the death of a process reach whoever waits."""
    with contextlib.closing(Background(work, processes=2)) as background:
        futures = [background.submit(i) for i in range(3)]
        results = [future.result() for future in futures]
        assert [x for x, _ in results] == [0, 1, 2] and os.getpid() not in [pid for _, pid in results]
        assert len({pid for _, pid in results}) == 2
        with pytest.raises(ValueError, match="of the function") as error:
            background.submit("fail").result()
        assert "in work" in error.value.__notes__[0]  # The traceback says where it happened.
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in work.*Odd: of a game"):
            background.submit("odd").result()
        for _ in range(3):  # Both processes die and stay dead.
            with pytest.raises(ChildProcessError, match="a background process has died"):
                background.submit("die").result()
    for worker in background.workers:
        worker.process.join(30)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "owner, name, error",
    [
        (
            multiprocessing.get_context("spawn").Process,
            "start",
            BlockingIOError(11, "Resource temporarily unavailable"),
        ),
        (ThreadPoolExecutor, "submit", RuntimeError("can't start new thread")),
    ],
)
def test_where_no_process_or_thread_can_be_started(monkeypatch, owner, name, error):
    """Under a low `ulimit -u`, for example, every wait for a result ends with the reason."""

    def refused(*args):
        raise error

    monkeypatch.setattr(owner, name, refused)
    with contextlib.closing(Background(work)) as background:
        for _ in range(2):
            with pytest.raises(CannotStart, match="^no other process can run it: no more processes or threads"):
                background.submit(0).result()


def test_products_keep_their_precision(monkeypatch):
    """A background process computes without TF32, whatever the environment asks for."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    with contextlib.closing(Background(work)) as background:
        assert background.submit("precision").result() == "highest"


def test_a_function_that_no_process_can_import_is_named():
    """A lambda cannot be pickled by its name, and the error says so in one line."""
    with contextlib.closing(Background(lambda x: x)) as background:
        for _ in range(2):
            with pytest.raises(CannotStart, match="^no other process can run it: .*lambda") as error:
                background.submit(0).result()
            assert "\n" not in str(error.value)


def test_ctrl_c_is_handled_as_before():
    """Starting processes that ignore Ctrl-C does not change this process."""
    before = signal.getsignal(signal.SIGINT)
    with contextlib.closing(Background(work)) as background:
        background.submit(0)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_threads_that_start_processes_leave_the_main_module_as_it_is(monkeypatch):
    """Without a lock the second thread would restore the empty module that the first one has put there."""
    main, first, seen, second_is_there = sys.modules["__main__"], [], [], threading.Event()

    def start(self):
        seen.append(sys.modules["__main__"])
        if len(seen) == 1:
            second_is_there.wait(0.3)
        else:
            second_is_there.set()
            first[0].join()

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    threads = [threading.Thread(target=Background, args=(work,)) for _ in range(2)]
    first.append(threads[0])
    threads[0].start()
    while not seen:
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2 and main not in seen and sys.modules["__main__"] is main


@pytest.mark.faults
def test_the_processes_end_with_this_one(tmp_path):
    """After this process is killed, its output closes only once the processes that share it have ended as well."""
    program = """
import os, time
from harness.background import Background
def work(x): time.sleep(1000)
if __name__ == "__main__":
    background = Background(work)
    background.submit(0)
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=60)
    assert abs(done.returncode) == 9
