"""What differs on Windows, as far as it can be tried elsewhere."""

import ast
import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import needs_posix

from harness import device, files, messages, supervise
from harness.background import CannotStart, Worker
from harness.runs import resume_command
from sweep import directory_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def windows(monkeypatch):
    """Let the modules that ask believe that this is Windows."""
    for module in (files, messages, supervise):
        monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)


@pytest.mark.parametrize("on_windows, failures, tries", [(True, 4, 5), (True, 100, 6), (False, 100, 1)])
def test_a_file_that_a_program_reads_just_now(windows, tmp_path, monkeypatch, on_windows, failures, tries):
    """Windows refuses to replace it, so the next try comes a moment later; if none succeeds the old file stays.

    Elsewhere a permission that is missing is missing for good.
    """
    path = tmp_path / "last.safetensors"
    path.write_bytes(b"old")
    replace, calls, pauses = os.replace, [], []

    def refuse(source, target):
        calls.append(target)
        if len(calls) <= failures:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(files, "WINDOWS", on_windows)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=pauses.append))
    succeeds = tries > failures
    with contextlib.nullcontext() if succeeds else pytest.raises(PermissionError):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == (b"new" if succeeds else b"old") and os.listdir(tmp_path) == [path.name]
    assert len(calls) == tries and len(pauses) == tries - 1 and sum(pauses) < 2


@pytest.mark.parametrize(
    "run_dir, word",
    [
        (r"runs\2026-01-31_12-00-00", r"runs\2026-01-31_12-00-00"),
        (r"C:\Users\Ann Lee\runs\a", r'"C:\Users\Ann Lee\runs\a"'),
        (r"runs\sweep\lr=0.001,seed=0", r'"runs\sweep\lr=0.001,seed=0"'),
        ("it's", '"it\'s"'),
        ("-run", "./-run"),
    ],
)
def test_the_command_that_is_printed_can_be_pasted(windows, run_dir, word):
    """The command interpreter knows no single quotes, and PowerShell splits a word without quotes at its commas."""
    assert resume_command("-m algorithms.x", run_dir, {}) == f"python -m algorithms.x --resume {word}"


def test_a_program_is_asked_to_stop_and_not_killed(windows, monkeypatch):
    """On Windows `terminate` would kill it. So it gets Ctrl-Break, which must not reach the process that sends it."""
    started, sent = {}, []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.update(options) or process)
    process = SimpleNamespace(send_signal=sent.append, terminate=lambda: sent.append("killed"))
    supervise.stop_program(supervise.start_program(["python"]))
    assert started["creationflags"] == subprocess.CREATE_NEW_PROCESS_GROUP and sent == [signal.CTRL_BREAK_EVENT]
    process.send_signal = Mock(side_effect=OSError(22, "Invalid argument"))  # without a console
    supervise.stop_program(process)
    assert sent[1:] == ["killed"]


def test_a_process_that_ends_before_it_has_taken_its_end_of_a_pipe():
    """The copy of that end, which Windows then leaves open in this process, does not keep us waiting."""
    context = multiprocessing.get_context("spawn")
    worker = Worker.__new__(Worker)
    worker.connection, its_end = context.Pipe()
    worker.started = False
    worker.process = context.Process(target=int)
    worker.process.start()
    with contextlib.closing(its_end), pytest.raises(CannotStart, match="^no other process can run it"):
        worker.call(b"")


def test_memory(monkeypatch):
    """Windows fills a structure of 64 bytes with it, and refuses one of another length."""

    def fill(pointer):
        memory = pointer._obj
        assert memory.length == ctypes.sizeof(memory) == 64
        memory.total, memory.free = 16 * 2**30, 5 * 2**30

    monkeypatch.setattr(device, "sys", SimpleNamespace(platform="win32"))
    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    cpu = torch.device("cpu")
    assert (device.memory_of(cpu), device.free_memory(cpu)) == (16 * 2**30, 5 * 2**30)


@needs_posix
def test_memory_of_a_mac(monkeypatch):
    """It does not say in a file how much is free, so all of it counts."""
    monkeypatch.setattr(device, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    cpu = torch.device("cpu")
    assert device.free_memory(cpu) == device.memory_of(cpu) > 2**30


def test_names_of_runs_are_allowed_everywhere(tmp_path):
    """A sweep's directories, which are named after values, can lie on a drive that Windows shares."""
    values = {"MODEL": r"C:\models\a/b", "DEVICE": "cuda:0", "SEED": 0}
    assert directory_of(tmp_path, values) == tmp_path / "model=C__models_a_b,device=cuda_0,seed=0"


def test_texts_of_programs_are_in_the_characters_of_a_western_windows():
    """Output that goes to a file or a pipe is in cp1252 there. Other characters would be printed as \\u2588."""
    folders = ("algorithms", "fast", "games", "harness", "viewer")
    sources = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    assert len(sources) > 50
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.encode("cp1252", "replace").decode("cp1252") == node.value, f"{file}: {node.value}"


@pytest.mark.faults
def test_programs_start_on_windows():
    """They do without the modules that it lacks, and Ctrl-Break stops them like the signals that it has."""
    missing = ("curses", "fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
    program = f"""
import filelock, multiprocessing.util, signal, sys
sys.modules |= dict.fromkeys({missing})
signal.SIGBREAK = 21
import train_ppo, load_model, sweep, viewer.terminal
from harness.supervise import STOP_SIGNALS
print(STOP_SIGNALS[-1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "21\n", done.stderr
