import errno
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ppo
from harness import checkpoint, runs, supervise
from harness.checkpoint import CheckpointError, atomic_write, replacing
from harness.messages import one_line, say, shortened, shown
from harness.options import CommandLineError, Constants, Parser, check_constants, given_path, read_command_line
from harness.runs import check_begun, locked, new_run_dir, read_run, resume_command
from harness.supervise import (
    PARENT,
    STOP_SIGNALS,
    finish_output,
    ignore_signals,
    less_memory,
    run_script,
    run_side_by_side,
    signals_handled,
    stop_with_parent,
    train,
)
from sweep import TRAININGS, training
from trainer import Trainer

DEFAULTS = {"NUM_STEPS": 100, "GAMMA": 0.9, "PAIRED": True, "NAME": "a", "DROPOUT": 0.1}
RANGES = {"NUM_STEPS": (1, 10**12), "GAMMA": (0.0, 1.0)}


def read(text, defaults=DEFAULTS):
    return read_command_line(
        text.split() if isinstance(text, str) else text, "script.py", "what it does", defaults, RANGES
    )


def test_constants_are_what_a_script_assigns(tmp_path):
    script = """
from math import pi as PI
STEPS = 4 * 10  # steps
ENVS: int = 3
STEPS *= 2
LOW, HIGH = 1, STEPS
LR = 2,5e-3
lower = 1
NOTHING = None
def f():
    INSIDE = 1
CONSTANTS = {}
RANGES = {}
"""
    (tmp_path / "script.py").write_text(script)
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(script, namespace)
    constants = Constants(namespace)
    assert (
        constants == {"STEPS": 80, "ENVS": 3, "LOW": 1, "HIGH": 80, "LR": (2, 5e-3), "NOTHING": None}
        and "PI" not in constants
    )
    namespace["STEPS"] = 7  # as a program does that has imported the script
    assert (constants | {"LR": 1.0})["STEPS"] == 7


@pytest.mark.parametrize("file", [None, __file__])  # pasted into a notebook; `exec` in another script
def test_a_script_without_its_file_says_so_in_one_line(file):
    with pytest.raises(
        SystemExit, match="^the constants are read from the script's own file; import the script, or run it"
    ):
        exec(
            "from harness.options import Constants; STEPS = 3; CONSTANTS = Constants(globals())",
            {"__file__": file} if file else {},
        )


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("SEED", None, "SEED (--seed) must be an integer from 0 to 4,294,967,295, not None"),
        ("LR", (2, 5e-3), "LR (--lr) must be a number from"),
        ("LR", "2e-3", "LR (--lr) must be a number from"),
        ("RUN_DIR", None, "RUN_DIR (--run_dir) must be text, not None"),
        ("PAIRED_ENVS", "no", "PAIRED_ENVS (--paired_envs) must be true or false, not 'no'"),
        ("DEVICE", ["cpu"], "DEVICE (--device) must be text, not ['cpu']"),
        ("NUM_ENVS", 128.0, "NUM_ENVS (--num_envs) must be an integer"),
        ("RESUME", True, "RESUME among the constants"),
        ("MIN_LR", ..., "MIN_LR is missing among the constants at the top of the script"),
    ],
)
def test_a_constant_that_is_edited_wrongly_is_named(monkeypatch, constant, value, message):
    if value is ...:
        monkeypatch.setattr(
            train_ppo.CONSTANTS, "names", [name for name in train_ppo.CONSTANTS if name != constant]
        )  # deleted, or renamed
    else:
        monkeypatch.setattr(
            train_ppo.CONSTANTS, "names", list(dict.fromkeys([*train_ppo.CONSTANTS, constant]))
        )  # or added
        monkeypatch.setattr(train_ppo, constant, value, raising=False)
    with pytest.raises(CommandLineError, match=re.escape(message)):
        train_ppo.main([])


def test_a_constant_that_somebody_adds_needs_no_range_but_a_type():
    check_constants(DEFAULTS | {"MINE": 3}, DEFAULTS | {"MINE": 4}, RANGES)
    with pytest.raises(CommandLineError, match="MINE .* must be true or false, a number, or text, not "):
        check_constants(DEFAULTS | {"MINE": [3]}, DEFAULTS | {"MINE": [4]}, RANGES)


def test_overrides():
    assert read("--num_steps 7 --gamma=0.1 --resume x") == ("x", {"NUM_STEPS": 7, "GAMMA": 0.1})
    assert read("--paired false --name b --dropout 1") == (None, {"PAIRED": False, "NAME": "b", "DROPOUT": 1.0})
    assert read("") == (None, {})


def test_the_type_follows_the_range_then_the_default():
    """Somebody edits a default, another adds a constant: both may have any value that makes sense."""
    edited = DEFAULTS | {"GAMMA": 1}
    assert read("--gamma 0.5", edited) == (None, {"GAMMA": 0.5})
    check_constants(edited | {"DROPOUT": 12.5}, edited, RANGES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
        ("--num-steps 9", "unknown argument --num-steps; did you mean --num_steps?"),
        ("--num_steps many", "--num_steps needs an integer, not 'many'"),
        ("--num_steps 1.5", "--num_steps needs an integer"),
        ("--gamma fast", "--gamma needs a number, not 'fast'"),
        ("--paired maybe", "--paired needs true or false, not 'maybe'"),
        ("--num_steps", "expected one argument"),
    ],
)
def test_wrong_arguments(text, message):
    with pytest.raises(CommandLineError, match=re.escape(message)):
        read(text)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"NUM_STEPS": 1e6}, "NUM_STEPS (--num_steps) must be an integer from 1 to 1,000,000,000,000, not 1000000.0"),
        ({"NUM_STEPS": 0}, "must be an integer from 1"),
        ({"NUM_STEPS": True}, "must be an integer"),
        ({"GAMMA": 1.1}, "GAMMA (--gamma) must be a number from 0.0 to 1.0, not 1.1"),
        ({"GAMMA": float("nan")}, "must be a number from 0.0 to 1.0"),
        ({"PAIRED": 2}, "must be true or false"),
        ({"NAME": None}, "NAME (--name) must be text, not None"),
        ({"DROPOUT": "x"}, "must be a number, not"),
    ],
)
def test_edited_constants_are_checked_too(edit, message):
    check_constants(DEFAULTS | {"GAMMA": 1}, DEFAULTS, RANGES)  # an integer is a number
    with pytest.raises(CommandLineError, match=re.escape(message)):
        check_constants(DEFAULTS | edit, DEFAULTS, RANGES)


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(strftime=lambda form: "runs/now"))
    assert [str(new_run_dir("")) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_call_takes_the_constants_of_now_and_no_command_line(name, monkeypatch):
    script = importlib.import_module(name if name == "train_ppo" else f"algorithms.{name}")
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(CommandLineError, match="unknown argument --sed; did you mean --seed"):
        script.main(["--sed", 1])
    monkeypatch.setattr(script, "SEED", -1)
    with pytest.raises(CommandLineError, match=r"SEED \(--seed\) must be an integer from 0 to .*, not -1"):
        script.main()


def test_a_program_may_give_numbers_and_paths(tmp_path):
    parser = Parser("script.py", "what it does")
    parser.add_argument("folder", type=given_path)
    parser.add_argument("--seeds", type=int, nargs="+")
    assert vars(parser.parse_args([tmp_path, "--seeds", 3, np.int64(4)])) == {"folder": str(tmp_path), "seeds": [3, 4]}
    with pytest.raises(CommandLineError, match="unrecognized arguments: --fold"):
        parser.parse_args([tmp_path, "--fold"])


def test_in_a_thread_signals_stay_as_they_are():
    before, within = signal.getsignal(signal.SIGINT), []

    def handled():
        with signals_handled(signal.SIG_IGN):
            ignore_signals()
            within.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=handled)
    thread.start()
    thread.join()
    assert within == [before] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", TRAININGS)
def test_every_constant_has_a_range_or_a_type_that_holds(name):
    """One step below it, one above it, nan, and the wrong type."""
    constants, ranges = training(name).constants, training(name).ranges
    assert constants.keys() == ranges.keys()
    check_constants(constants, constants, ranges)
    for constant, within in ranges.items():
        if within in (bool, str):
            for bad in (None, 1, ["no"], "no" if within is bool else True):
                for defaults in (constants, constants | {constant: bad}):  # also where it has been edited in the script
                    with pytest.raises(CommandLineError, match=f"{constant} .* must be (true or false|text), not "):
                        check_constants(constants | {constant: bad}, defaults, ranges)
            continue
        low, high = within
        step = 1 if type(low) is int else 1e-9 + high * 1e-9
        for bad in (low - step, high + step, math.nan, "1", None, True):
            with pytest.raises(CommandLineError, match=f"{constant} .* must be an? (integer|number) from") as error:
                check_constants(constants | {constant: bad}, constants, ranges)
            assert "\n" not in str(error.value)


def test_a_directory_is_free_if_it_has_only_what_a_run_without_a_checkpoint_leaves(tmp_path):
    for name in ("config.json", "run.lock", "last.pt.tmp", "events.out.tfevents.7"):
        (tmp_path / name).write_text('{"RUN_DIR": "runs/a"}')
    assert new_run_dir(str(tmp_path)) == tmp_path
    check_begun(tmp_path, {"RUN_DIR": "runs/b"})
    for name, text in (
        ("metrics.csv", ""),
        ("config.json", '{"seed": 42}'),
    ):  # the latter is of actor_critic.py, or of another program
        before = (tmp_path / "config.json").read_text()
        (tmp_path / name).write_text(text)
        for check in (
            lambda: new_run_dir(tmp_path),
            lambda: check_begun(tmp_path, json.loads((tmp_path / "config.json").read_text())),
        ):
            with pytest.raises(CommandLineError, match="is in use already"):
                check()
        (tmp_path / "metrics.csv").unlink(missing_ok=True)
        (tmp_path / "config.json").write_text(before)


def test_a_directory_that_no_system_can_make(tmp_path):
    with pytest.raises(CommandLineError, match=r"cannot be made \(.*null.*\); name another --run_dir"):
        new_run_dir(f"{tmp_path}/a\0b")  # "runs\0" is meant as a Windows path


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "train_ppo"])
def test_every_algorithm_names_what_takes_less_memory(name):
    algorithm = importlib.import_module(f"algorithms.{name}").ALGORITHM
    constants = algorithm.constants | ({"POLICY_MODEL": "folder"} if name == "grpo_text" else {})
    option, smaller = less_memory(constants, algorithm.memory, algorithm.ranges, algorithm.check).split()
    lowered = constants | {option[2:].upper(): int(smaller)}
    check_constants(lowered, algorithm.constants, algorithm.ranges)
    assert (
        lowered[algorithm.memory[0]] == constants[algorithm.memory[0]] // 2
        and algorithm.memory[0] not in algorithm.kept
    )


def test_a_path_through_a_link_that_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("gone", "runs")
    for name in ("", "runs", "runs/a"):
        with pytest.raises(
            CommandLineError, match="^runs.* cannot be made: a link in this path leads nowhere; name another --run_dir"
        ):
            new_run_dir(name)
    assert not os.path.exists("gone")


def test_a_tilde_is_the_home_directory_and_nothing_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    defaults = {"RUN_DIR": "~/a", "SEED": 0}
    assert read_run([], "script.py", "", defaults, {}).constants["RUN_DIR"] == f"{tmp_path}/a"
    assert read_run(["--run_dir=~/b"], "script.py", "", defaults, {}).constants["RUN_DIR"] == f"{tmp_path}/b"
    with pytest.raises(CommandLineError, match="--resume: is empty; name a file or a directory"):
        read_run(["--resume", ""], "script.py", "", defaults, {})


@pytest.mark.parametrize("name", ["run", "-run", "a b", 'it\'s; $(rm) `x` \\ "q"', "über", "a\nb"])
@pytest.mark.parametrize("prog", ["train_ppo.py", "-m algorithms.grpo_text"])
def test_the_command_that_is_printed_can_be_pasted(tmp_path, monkeypatch, name, prog):
    """From whatever directory: the script is found, and the run is read as it was named."""
    monkeypatch.chdir(tmp_path)
    python, *script, resume, run_dir = shlex.split(resume_command(prog, Path(name), ranks=1))
    assert (python, resume, Path(run_dir)) == ("python", "--resume", Path(name))
    assert script == prog.split() if prog.startswith("-m") else os.path.samefile(script[0], runs.ROOT / prog)
    assert Path(read(["--resume", run_dir])[0]) == Path(name)
    Path(name).mkdir()
    (Path(name) / "notes.txt").touch()
    with pytest.raises(
        CommandLineError, match="is in use already; name another --run_dir$"
    ):  # there is nothing to resume
        new_run_dir(name)
    (Path(name) / "last.pt").touch()
    with pytest.raises(CommandLineError, match="is in use already") as error:
        new_run_dir(name)
    assert Path(shlex.split(str(error.value).partition("; ")[2])[-1]) == Path(name)


def test_a_reader_that_has_left_ends_a_script_quietly(capsys):
    def broken(argv):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit, match="141"):
        run_script(broken, "script.py")
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError) as error:
            atomic_write(tmp_path / "config.json", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error.value).startswith(f"{tmp_path}/config.json: File too large; ") and not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_what_nohup_ignores_stays_ignored(monkeypatch):
    ended = []
    for before, seen in ((signal.SIG_IGN, []), (signal.SIG_DFL, [signal.SIGHUP])):
        own = signal.signal(signal.SIGHUP, before)
        try:
            with supervise.signals_handled(lambda signum, frame: ended.append(signum)):
                os.kill(os.getpid(), signal.SIGHUP)
            assert ended == seen and signal.getsignal(signal.SIGHUP) == before
        finally:
            signal.signal(signal.SIGHUP, own)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_reaches_nobody_is_no_success(monkeypatch, capsys):
    for status in (0, 130):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            print("the result")
            assert finish_output("script.py", status) == (status or 1)
        assert capsys.readouterr().err == "script.py: the output could not be written (No space left on device)\n"


def test_errors_of_the_system_name_their_file(tmp_path):
    with pytest.raises(OSError) as error:
        open(tmp_path / "gone" / "x")
    assert (
        one_line(error.value)
        == f"{tmp_path}/gone/x: No such file or directory; check the path, its permissions and the space on the disk"
    )


def test_a_warning_is_one_line(monkeypatch, capsys):
    """Without the file and the code that gave it, and however long a compiler's message is."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(
            warnings, "showwarning", lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4]))
        )  # pytest's keeps them
        run_script(lambda argv: warnings.warn("no compiler:\n" + "x" * 1000), "a.py")
    line = capsys.readouterr().err
    assert re.fullmatch(r"warning: no compiler: x+ \.\.\.\n", line) and len(line) < 320


def test_a_terminal_obeys_nothing_that_a_file_says(monkeypatch, capsys):
    """An error, a warning, a line of a training, a path."""
    evil = "\x1b]0;pwned\x07\n\u202e"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(words):
        say(f"plan\n{evil}")
        print(shown(f"/{evil}"))
        raise CheckpointError(f"{evil}.pt: has other constants ({evil})")

    with pytest.raises(SystemExit):
        run_script(main, "a.py")
    out, err = capsys.readouterr()
    assert err == r"a.py: \x1b]0;pwned\x07\n\u202e.pt: has other constants (\x1b]0;pwned\x07\n\u202e)" + "\n"
    assert (
        out.startswith("plan\n\\x1b]0;pwned")
        and out.count("\n") == 4
        and not any(ord(c) < 32 and c != "\n" for c in out)
    )
    assert shortened(f"a {evil} b") == r"a \x1b]0;pwned\x07 \u202e b"


class Failing(Trainer):
    """Its first state, or its first update, fails."""

    def __init__(self, first_state=None, update=None):
        super().__init__(torch.nn.Linear(1, 1), metadata={"constants": {}})
        self.num_steps, self.first_state, self.update = 1, first_state, update

    def state_dict(self):
        if self.first_state:
            raise self.first_state
        return self.training_state()

    def collect_and_update(self):
        raise self.update


@pytest.mark.parametrize(
    "error, advice",
    [(RuntimeError("environment cannot be saved"), ""), (MemoryError(), "\nout of memory; try --small 1\n")],
)
def test_where_the_first_state_cannot_be_taken_the_error_is_that_one(tmp_path, capsys, error, advice):
    """And the last.pt of a resumed run stays as it is."""
    (tmp_path / "last.pt").write_bytes(b"an earlier one")
    if advice:
        assert train(Failing(error), tmp_path, "script.py", {MemoryError: " --small 1"}) == 1
    else:
        with pytest.raises(RuntimeError, match="environment cannot be saved"):
            train(Failing(error), tmp_path, "script.py", {})
    assert (tmp_path / "last.pt").read_bytes() == b"an earlier one"
    assert capsys.readouterr().err == (advice or "\nenvironment cannot be saved\n")


def test_a_second_ctrl_c_ends_the_training_and_not_a_notebooks_kernel(tmp_path, monkeypatch):
    trainer = Failing(update=RuntimeError("never raised"))
    monkeypatch.setattr(trainer, "collect_and_update", lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, tmp_path, "script.py", {})
    assert trainer.stop_requested and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("goes_on, handler", [(True, signal.default_int_handler), (False, signal.SIG_DFL)])
def test_ctrl_c_does_not_end_a_python_that_goes_on_after_the_program(tmp_path, monkeypatch, goes_on, handler):
    """As python -i and IPython's %run do: neither the second one in a training, nor one after it."""
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
    def fail(*args):
        raise failure

    monkeypatch.setattr(checkpoint, "atomic_write", fail)
    assert (
        train(
            Failing(update=FloatingPointError("the gradient is not finite")),
            tmp_path,
            "script.py",
            {FloatingPointError: " --lr 1"},
        )
        == 1
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line.startswith("the gradient is not finite; ")
        and str(failure.args[-1]) in line
        and line.endswith(f"--resume {tmp_path} --lr 1")
    )


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_leaves_the_old_file_and_nothing_else(tmp_path, signum):
    (tmp_path / "gpt.gif").write_text("old")

    def main(argv):
        with replacing(tmp_path / "gpt.gif") as unfinished:
            unfinished.write_text("half")
            signal.raise_signal(signum)

    with pytest.raises(SystemExit) as error:
        run_script(main, "a.py")
    assert (
        error.value.code == 128 + signum
        and os.listdir(tmp_path) == ["gpt.gif"]
        and (tmp_path / "gpt.gif").read_text() == "old"
    )


def test_no_more_threads_is_one_line(capsys):
    def main(argv):
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit):
        run_script(main, "a.py")
    assert (
        capsys.readouterr().err
        == "a.py: no more processes or threads can be started; end some, or raise the limit (ulimit -u)\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there a file that is open cannot be deleted")
def test_a_run_stays_locked_without_its_lock_file(tmp_path):
    with locked(tmp_path):
        (tmp_path / "run.lock").unlink()
        for _ in range(2):
            with pytest.raises(CommandLineError, match="another process is training this run"), locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="there a process does not learn of it")
@pytest.mark.parametrize("parent, stops", [(os.getppid(), False), (1 if os.getppid() > 1 else 2, True)])
def test_a_program_stops_when_the_one_that_started_it_has_ended(monkeypatch, parent, stops):
    monkeypatch.setenv(PARENT, str(parent))
    received, deadline = [], time.monotonic() + (10 if stops else 0.2)
    with signals_handled(lambda signum, frame: received.append(signum)):
        stop_with_parent()
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
    assert received == [signal.SIGTERM] * stops and PARENT not in os.environ  # nor is it handed on


WAITS = [sys.executable, "-c", "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(1000)"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_programs_side_by_side_are_stopped_together(tmp_path, error):
    started, ended = tmp_path / "started", []

    def waits(run):
        run([*WAITS, started])
        ended.append(0)

    def fails(run):
        while not started.exists():
            time.sleep(0.01)
        raise error

    with pytest.raises(CommandLineError if error is KeyboardInterrupt else error):
        run_side_by_side([waits, fails], 2)
    assert ended == [0]
