import re
from types import SimpleNamespace

import pytest

import command_line
from command_line import CommandLineError, check_constants, constants_of, new_run_dir, read_command_line

DEFAULTS = {"NUM_STEPS": 100, "GAMMA": 0.9, "PAIRED": True, "NAME": "a", "DROPOUT": 0.1}
RANGES = {"NUM_STEPS": (1, 10**12), "GAMMA": (0.0, 1.0)}


def read(text, defaults=DEFAULTS):
    return read_command_line(text.split(), "script.py", "what it does", defaults, RANGES)


def test_constants_are_what_a_script_assigns(tmp_path):
    script = "from math import pi as PI\nSTEPS = 4 * 10  # steps\nRANGES = {}\nlower = 1\nNOTHING = None\nON = True\ndef f():\n    INSIDE = 1\n"
    (tmp_path / "script.py").write_text(script)
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(script, namespace)
    assert constants_of(namespace) == {"STEPS": 40, "ON": True}


def test_overrides():
    assert read("--num_steps 7 --gamma=0.1 --resume x") == ("x", {"NUM_STEPS": 7, "GAMMA": 0.1})
    assert read("--paired false --name b --dropout 1") == (None, {"PAIRED": False, "NAME": "b", "DROPOUT": 1.0})
    assert read("") == (None, {})


def test_the_type_follows_the_range_then_the_default():
    """Somebody edits a default, another adds a constant: both may have any value that makes sense."""
    edited = DEFAULTS | {"GAMMA": 1}
    assert read("--gamma 0.5", edited) == (None, {"GAMMA": 0.5})
    check_constants(edited | {"DROPOUT": 12.5}, edited, RANGES)


@pytest.mark.parametrize("text, message", [
    ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
    ("--num-steps 9", "unknown argument --num-steps; did you mean --num_steps?"),
    ("--num_steps many", "--num_steps needs an integer, not 'many'"),
    ("--num_steps 1.5", "--num_steps needs an integer"),
    ("--gamma fast", "--gamma needs a number, not 'fast'"),
    ("--paired maybe", "--paired needs true or false, not 'maybe'"),
    ("--num_steps", "expected one argument"),
])  # fmt: skip
def test_wrong_arguments(text, message):
    with pytest.raises(CommandLineError, match=re.escape(message)):
        read(text)


@pytest.mark.parametrize("edit, message", [
    ({"NUM_STEPS": 1e6}, "NUM_STEPS (--num_steps) must be an integer from 1 to 1,000,000,000,000, not 1000000.0"),
    ({"NUM_STEPS": 0}, "must be an integer from 1"), ({"NUM_STEPS": True}, "must be an integer"),
    ({"GAMMA": 1.1}, "GAMMA (--gamma) must be a number from 0.0 to 1.0, not 1.1"), ({"GAMMA": float("nan")}, "must be a number from 0.0 to 1.0"),
    ({"PAIRED": 2}, "must be true or false"), ({"NAME": None}, "NAME (--name) must be text, not None"), ({"DROPOUT": "x"}, "must be a number, not"),
])  # fmt: skip
def test_edited_constants_are_checked_too(edit, message):
    check_constants(DEFAULTS | {"GAMMA": 1}, DEFAULTS, RANGES)  # an integer is a number
    with pytest.raises(CommandLineError, match=re.escape(message)):
        check_constants(DEFAULTS | edit, DEFAULTS, RANGES)


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "time", SimpleNamespace(strftime=lambda form: "runs/now"))
    assert [str(new_run_dir("")) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]
