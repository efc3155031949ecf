"""Directories of runs: new ones, locked ones, and what a resumed run takes from them."""

import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import needs_posix, script_constants

from harness import runs
from harness.checkpoint import CheckpointError, save_checkpoint
from harness.options import CommandLineError, read_command_line
from harness.runs import check_begun, check_wandb, locked, new_run_dir, read_run, resume_command


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    """They get directories with different names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(strftime=lambda form: "now"))
    assert [new_run_dir("").as_posix() for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]


def test_a_directory_is_free_if_it_has_only_what_a_run_without_a_checkpoint_leaves(tmp_path):
    """Any other file, or another program's config.json, makes it a directory in use."""
    for name in ("config.json", "run.lock", "last.safetensors.tmp", "events.out.tfevents.7"):
        (tmp_path / name).write_text('{"RUN_DIR": "runs/a"}')
    assert new_run_dir(str(tmp_path)) == tmp_path
    check_begun(tmp_path, {"RUN_DIR": "runs/b"})
    for name, text in (("metrics.csv", ""), ("config.json", '{"seed": 42}')):
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
    """A name with a null byte costs one line."""
    with pytest.raises(CommandLineError, match=r"cannot be made \(.*null.*\); name another --run_dir"):
        new_run_dir(f"{tmp_path}/a\0b")  # "runs\0" is meant as a Windows path


@needs_posix
def test_a_path_through_a_link_that_leads_nowhere(tmp_path, monkeypatch):
    """A dangling link on the way costs one line, and nothing is made at its end."""
    monkeypatch.chdir(tmp_path)
    os.symlink("gone", "runs")
    for name in ("", "runs", "runs/a"):
        message = "^runs.* cannot be made: a link in this path leads nowhere; name another --run_dir"
        with pytest.raises(CommandLineError, match=message):
            new_run_dir(name)
    assert not os.path.exists("gone")


@needs_posix
@pytest.mark.parametrize("name", ["run", "-run", "a b", 'it\'s; $(rm) `x` \\ "q"', "über", "a\nb"])
@pytest.mark.parametrize("prog", ["train_ppo.py", "-m algorithms.grpo_text"])
def test_the_command_that_is_printed_can_be_pasted(tmp_path, monkeypatch, name, prog):
    """From any directory, it finds the script and the run, whatever characters the run's name has."""
    monkeypatch.chdir(tmp_path)
    python, *script, resume, run_dir = shlex.split(resume_command(prog, Path(name), {}))
    assert (python, resume, Path(run_dir)) == ("python", "--resume", Path(name))
    assert script == prog.split() if prog.startswith("-m") else os.path.samefile(script[0], runs.ROOT / prog)
    assert Path(read_command_line(["--resume", run_dir], "script.py", "", {})[0]) == Path(name)
    Path(name).mkdir()
    (Path(name) / "notes.txt").touch()
    nothing_to_resume = "is in use already; name another --run_dir$"
    with pytest.raises(CommandLineError, match=nothing_to_resume):
        new_run_dir(name)
    (Path(name) / "last.safetensors").touch()
    with pytest.raises(CommandLineError, match="is in use already") as error:
        new_run_dir(name)
    assert Path(shlex.split(str(error.value).partition("; ")[2])[-1]) == Path(name)


@pytest.mark.skipif(sys.platform == "win32", reason="there a file that is open cannot be deleted")
def test_a_run_stays_locked_without_its_lock_file(tmp_path):
    """Deleting the lock file lets no second process in."""
    with locked(tmp_path):
        (tmp_path / "run.lock").unlink()
        for _ in range(2):
            with pytest.raises(CommandLineError, match="another process is training this run"), locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


BLOCK = """NUM_STEPS = 100  # [1, inf) steps
WIDTH = 8  # [1, 64] units
ENV_ID: str = "CartPole-v1"
RUN_DIR: str = "~/a"
"""


@pytest.fixture
def known(tmp_path):
    """The constants of a small script, all of which it reads."""
    return script_constants(tmp_path, BLOCK, "def use(c):\n    return c.NUM_STEPS, c.WIDTH, c.ENV_ID, c.RUN_DIR\n")


def read(known, *words):
    """Read a command line of the small script."""
    return read_run(words, "script.py", "", known, kept=["WIDTH"])


def a_run(run_dir, constants):
    """Make a directory that can be resumed, as far as `read_run` looks at it."""
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(constants))
    save_checkpoint(run_dir / "last.safetensors", {"optimizer": {}, "constants": constants})
    return run_dir


def test_a_tilde_is_the_home_directory_and_nothing_is_no_path(known, tmp_path, monkeypatch):
    """This holds for a default and for an option."""
    for variable in ("HOME", "USERPROFILE"):  # of Windows
        monkeypatch.setenv(variable, str(tmp_path))
    assert read(known).constants["RUN_DIR"] == f"{tmp_path}/a"
    assert read(known, "--run_dir=~/b").constants["RUN_DIR"] == f"{tmp_path}/b"
    with pytest.raises(CommandLineError, match="--resume: is empty; name a file or a directory"):
        read(known, "--resume", "")


def test_a_constant_that_was_added_since_a_run_began_takes_its_default(known, tmp_path, capsys):
    """One line says so, unless the command line gives its value."""
    constants = {"NUM_STEPS": 50, "ENV_ID": "a", "RUN_DIR": "x"}
    run_dir = a_run(tmp_path / "run", constants)
    resumed = read(known, "--resume", run_dir)
    assert resumed.constants == constants | {"WIDTH": 8, "RUN_DIR": str(run_dir)} and resumed.directory == run_dir
    assert capsys.readouterr().err == "WIDTH was not there when this run began; it takes its default 8\n"
    assert read(known, "--resume", run_dir, "--width", 8, "--num_steps", 70).constants["NUM_STEPS"] == 70
    assert capsys.readouterr().err == ""
    with pytest.raises(CommandLineError, match="--width cannot change in a resumed run; leave it out"):
        read(known, "--resume", run_dir, "--width", 9)


def test_a_constant_that_is_off_by_default_changes_no_older_run_and_needs_no_line(tmp_path, capsys):
    known = script_constants(tmp_path, "# a\nSTOP_AT = 0.0\nWANDB: str = ''\nKEEP: bool = False\n", "")
    assert runs.constants_of("x", {}, known) == {"STOP_AT": 0.0, "WANDB": "", "KEEP": False}
    assert capsys.readouterr().err == ""


def test_constants_that_the_script_no_longer_has(known, tmp_path, capsys):
    """A run with more constants than the script goes on, and a line names them. It is another program's if it has
    others and lacks some."""
    run_dir = a_run(tmp_path / "run", dict(known) | {"WARMUP": 3, "TAU": 0.1})
    assert read(known, "--resume", run_dir).constants.keys() == known.keys()
    said = "constants that the script no longer has (TAU, WARMUP); it goes on without them"
    assert capsys.readouterr().err == f"warning: this run has {said}\n"
    run_dir = a_run(tmp_path / "other", {"NUM_STEPS": 5, "RUN_DIR": "x", "WARMUP": 3, "TAU": 0.1})
    with pytest.raises(CheckpointError, match=r"last.* has other constants than this program \(TAU, WARMUP\); resume"):
        read(known, "--resume", run_dir)


@pytest.mark.parametrize("constants", [None, [1], "text"])
def test_a_run_that_does_not_say_its_constants(known, tmp_path, constants):
    """A checkpoint with other contents in their place costs one line."""
    with pytest.raises(CheckpointError, match="does not say with which constants it was trained"):
        read(known, "--resume", a_run(tmp_path / "run", constants))


def test_values_in_a_checkpoint_that_no_command_line_could_have_set(known, tmp_path):
    """They are refused unless the command line replaces them."""
    run_dir = a_run(tmp_path / "run", dict(known) | {"NUM_STEPS": 0})
    with pytest.raises(CheckpointError, match=r"NUM_STEPS .* must be an integer in \[1, inf\), not 0; use another"):
        read(known, "--resume", run_dir)
    assert read(known, "--resume", run_dir, "--num_steps", 5).constants["NUM_STEPS"] == 5
    run_dir = a_run(tmp_path / "other", dict(known) | {"ENV_ID": "os:Game-v0"})
    with pytest.raises(CheckpointError, match="its ENV_ID 'os:Game-v0' would run a module's code; name it by --env_id"):
        read(known, "--resume", run_dir)
    assert read(known, "--resume", run_dir, "--env_id", "os:Game-v0").constants["ENV_ID"] == "os:Game-v0"


def test_a_constant_that_nothing_reads_costs_one_line(known, tmp_path, capsys):
    """A training starts all the same."""
    name = "MY_" + "BONUS"  # in one word, this file would mention it
    read(script_constants(tmp_path, f"{BLOCK}{name} = 1.0\n"))
    assert f"warning: {name} is read nowhere; it has no effect\n" in capsys.readouterr().err


def test_weights_and_biases_without_the_package_is_one_line_before_anything_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb("")
    with pytest.raises(CommandLineError, match="^--wandb needs a package: pip install wandb"):
        check_wandb("mine")
