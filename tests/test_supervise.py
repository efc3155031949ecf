"""How a program runs and ends: signals, its output, and what an interrupted training leaves."""

import ast
import errno
import importlib
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from harness import checkpoint, supervise
from harness.files import replacing
from harness.runs import ROOT
from harness.supervise import (
    PARENT,
    STOP_SIGNALS,
    finish_output,
    ignore_signals,
    less_memory,
    run_script,
    signals_handled,
    stop_with_parent,
    train,
)
from sweep import TRAININGS
from trainer import Trainer


def test_in_a_thread_signals_stay_as_they_are():
    """Python lets only the main thread handle signals, so a training in a thread leaves them alone."""
    before = signal.getsignal(signal.SIGINT)
    within = []

    def handled():
        with signals_handled(signal.SIG_IGN):
            ignore_signals()
            within.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=handled)
    thread.start()
    thread.join()
    assert within == [before] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "train_ppo"])
def test_every_algorithm_names_what_takes_less_memory(name):
    """The option that is advised halves a constant, fits the others, and may change on a resume."""
    algorithm = importlib.import_module(f"algorithms.{name}").ALGORITHM
    constants = algorithm.constants | ({"POLICY_MODEL": "folder"} if name == "grpo_text" else {})
    option, smaller = less_memory(constants, algorithm.memory_constants, algorithm.constants, algorithm.check).split()
    lowered = constants | {option[2:].upper(): int(smaller)}
    algorithm.constants.check(lowered)
    first = algorithm.memory_constants[0]
    assert lowered[first] == constants[first] // 2 and first not in algorithm.kept


def test_a_reader_that_has_left_ends_a_script_quietly(capsys):
    """A script whose output goes to `| head` ends with the status of one that SIGPIPE stops."""

    def broken(argv):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit, match="141"):
        run_script(broken, "script.py")
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_what_nohup_ignores_stays_ignored(monkeypatch):
    """SIGHUP stops a run only if it was not ignored when the run began."""
    received = []
    for before, expected in ((signal.SIG_IGN, []), (signal.SIG_DFL, [signal.SIGHUP])):
        own = signal.signal(signal.SIGHUP, before)
        try:
            with supervise.signals_handled(lambda signum, frame: received.append(signum)):
                signal.raise_signal(signal.SIGHUP)
            assert received == expected and signal.getsignal(signal.SIGHUP) == before
        finally:
            signal.signal(signal.SIGHUP, own)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_reaches_nobody_is_no_success(monkeypatch, capsys):
    """A full disk behind the standard output makes the exit status 1, unless it is already another."""
    for status in (0, 130):
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            print("the result")
            assert finish_output("script.py", status) == (status or 1)
        assert capsys.readouterr().err == "script.py: the output could not be written (No space left on device)\n"


class Failing(Trainer):
    """A trainer whose first state, or whose first update, fails."""

    def __init__(self, first_state=None, update=None):
        super().__init__(torch.nn.Linear(1, 1), metadata={"constants": {}})
        self.num_steps = 1
        self.first_state = first_state
        self.update = update

    def state_dict(self):
        if self.first_state:
            raise self.first_state
        return self.training_state()

    def collect_and_update(self):
        raise self.update


def test_an_error_in_the_first_state_leaves_the_last_checkpoint_alone(tmp_path, capsys):
    """There is nothing to save then, so the line names the error only. A lack of memory comes with advice."""
    (tmp_path / "last.safetensors").write_bytes(b"an earlier one")
    with pytest.raises(RuntimeError, match="environment cannot be saved"):
        train(Failing(RuntimeError("environment cannot be saved")), tmp_path, "script.py", {})
    assert capsys.readouterr().err == "\nenvironment cannot be saved\n"
    assert train(Failing(MemoryError()), tmp_path, "script.py", {MemoryError: " --small 1"}) == 1
    assert capsys.readouterr().err == "\nout of memory; try --small 1\n"
    assert (tmp_path / "last.safetensors").read_bytes() == b"an earlier one"


def test_a_second_ctrl_c_ends_the_training_and_not_a_notebooks_kernel(tmp_path, monkeypatch):
    """It raises KeyboardInterrupt, and the old handler is back afterwards."""
    trainer = Failing()

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "collect_and_update", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, tmp_path, "script.py", {})
    assert trainer.stop_requested and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("goes_on, handler", [(True, signal.default_int_handler), (False, signal.SIG_DFL)])
def test_ctrl_c_does_not_end_a_python_that_goes_on_after_the_program(tmp_path, monkeypatch, goes_on, handler):
    """Under python -i or IPython's %run, Ctrl-C in a training, or after it, leaves Python running."""
    if goes_on:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    trainer, handlers = Failing(), []

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        trainer.check_stop()

    monkeypatch.setattr(trainer, "collect_and_update", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            run_script(lambda argv: train(trainer, tmp_path, "script.py", {}), "script.py")
        assert [*handlers, signal.getsignal(signal.SIGINT)] == [handler, handler]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("no memory to save in")]
)
def test_a_run_that_cannot_be_saved_still_says_why_it_ended(tmp_path, monkeypatch, capsys, failure):
    """One line gives both errors and the command that goes on."""

    def fail(*args):
        raise failure

    monkeypatch.setattr(checkpoint, "atomic_write", fail)
    trainer = Failing(update=FloatingPointError("the gradient is not finite"))
    assert train(trainer, tmp_path, "script.py", {FloatingPointError: " --lr 1"}) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("the gradient is not finite; ") and line.endswith(f"--resume {tmp_path} --lr 1")
    assert str(failure.args[-1]) in line


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_leaves_the_old_file_and_nothing_else(tmp_path, signum):
    """A half-written file is removed, and the exit status says which signal it was."""
    (tmp_path / "gpt.gif").write_text("old")

    def main(argv):
        with replacing(tmp_path / "gpt.gif") as unfinished:
            unfinished.write_text("half")
            signal.raise_signal(signum)

    with pytest.raises(SystemExit) as error:
        run_script(main, "a.py")
    assert error.value.code == 128 + signum
    assert os.listdir(tmp_path) == ["gpt.gif"] and (tmp_path / "gpt.gif").read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="there a process does not learn of it")
@pytest.mark.parametrize("parent, stops", [(os.getppid(), False), (1 if os.getppid() > 1 else 2, True)])
def test_a_program_stops_when_the_one_that_started_it_has_ended(monkeypatch, parent, stops):
    """It gets SIGTERM, and does not hand the parent's number on to its own children."""
    monkeypatch.setenv(PARENT, str(parent))
    received, deadline = [], time.monotonic() + (10 if stops else 0.2)
    with signals_handled(lambda signum, frame: received.append(signum)):
        stop_with_parent()
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
    assert received == [signal.SIGTERM] * stops and PARENT not in os.environ


def first_import(file):
    """Return the first import of a file, as source."""
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(imports[0])


def test_every_program_prepares_its_start():
    """Programs that import PyTorch import harness.start before it."""
    files = [*ROOT.glob("*.py"), *(ROOT / "algorithms").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    programs = [file for file in files if "run_script(" in file.read_text(encoding="utf-8")]
    assert len(programs) > 10
    for file in programs:
        assert first_import(file) == "import harness.start", file


@pytest.mark.parametrize(
    "place, handler",
    [
        (ROOT / "train_ppo.py", signal.SIG_DFL),
        (ROOT / "algorithms" / "grpo_text.py", signal.SIG_DFL),
        (ROOT / ".venv" / "bin" / "jupyter.py", signal.default_int_handler),
        (None, signal.default_int_handler),
    ],
)
def test_ctrl_c_during_the_imports_leaves_at_once_in_our_programs_only(monkeypatch, place, handler):
    """A notebook that imports our modules keeps its own handler."""
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=place and str(place)))
    monkeypatch.setattr(os, "environ", {})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        exec((ROOT / "harness" / "start.py").read_text(), {"__file__": str(ROOT / "harness" / "start.py")})
        assert signal.getsignal(signal.SIGINT) == handler
        assert os.environ == (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            if handler == signal.SIG_DFL and sys.platform == "linux"
            else {}
        )
    finally:
        signal.signal(signal.SIGINT, before)
