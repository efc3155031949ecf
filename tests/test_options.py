"""Constants of a script as options: what is read from its source, and what is refused."""

import importlib
import math
import re
import sys

import numpy as np
import pytest
from helpers import script_constants

import train_ppo
from harness import options
from harness.options import (
    CommandLineError,
    Constants,
    Interval,
    MissingConstant,
    Parser,
    Values,
    check_divides,
    check_multiple,
    given_path,
    read_command_line,
    within,
)
from sweep import TRAININGS

SCRIPT = """
NUM_STEPS = 100  # [1, inf) steps
GAMMA = 0.9  # [0.0, 1.0] discount; 100 % is none
PAIRED: bool = True
NAME: str = "a"
DROPOUT = 0.1
"""


def module_of(name):
    """Return the module of a training."""
    return importlib.import_module(name if name == "train_ppo" else f"algorithms.{name}")


@pytest.fixture
def known(tmp_path):
    """The constants of a small script."""
    return script_constants(tmp_path, SCRIPT)


def read(text, constants):
    """Read a command line of the small script."""
    return read_command_line(text.split(), "script.py", "what it does", constants)


def test_constants_are_what_a_script_assigns(tmp_path):
    """Every form of assignment at the top level above CONSTANTS counts, and a later one from outside."""
    constants = script_constants(
        tmp_path,
        """
from math import pi as PI
STEPS = 4 * 10  # steps
ENVS: int = 3
STEPS *= 2
LOW, HIGH = 1, STEPS
LR = 2,5e-3
lower = 1
NOTHING = None
# -------
# long ones

WIDTH2 = 2**7  # [1, inf) a name with a digit
SHIFT = -1  # [-5, 5] below zero
LONG = (
    7  # [1, 9] over
    # several lines
)
def f():
    INSIDE = 1
""",
        "AFTER = 1\n",
    )
    assert constants == {
        "STEPS": 80,
        "ENVS": 3,
        "LOW": 1,
        "HIGH": 80,
        "LR": (2, 5e-3),
        "NOTHING": None,
        "WIDTH2": 128,
        "SHIFT": -1,
        "LONG": 7,
    }
    assert constants.groups["STEPS"] == "" and constants.groups["WIDTH2"] == constants.groups["LONG"] == "long ones"
    assert constants.comments["STEPS"] == "steps" and constants.comments["LONG"] == "[1, 9] over several lines"
    constants.script["STEPS"] = 7  # as a program does that has imported the script
    assert (constants | {"LR": 1.0})["STEPS"] == 7
    constants.check({"SHIFT": -5, "LONG": 9, "WIDTH2": 1, "ENVS": -1})
    assert read("--shift -3", constants) == (None, {"SHIFT": -3})


def test_a_script_in_another_encoding_is_read(tmp_path):
    """A script may begin with the byte order mark that editors on Windows write."""
    script = script_constants(tmp_path, "STEPS = 3\n").script
    file = tmp_path / "script.py"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Constants(script) == {"STEPS": 3}


@pytest.mark.parametrize("file", [None, __file__])  # pasted into a notebook; `exec` in another script
def test_a_script_without_its_file_says_so_in_one_line(file):
    """Text that is pasted into a notebook, or run by `exec`, ends with one line."""
    with pytest.raises(SystemExit, match="^the constants are read from the script's own file; import or run it"):
        exec(
            "from harness.options import Constants; STEPS = 3; CONSTANTS = Constants(globals())",
            {"__file__": file} if file else {},
        )


# fmt: off
@pytest.mark.parametrize("text, kind, inside, outside", [
    ("[1, inf)", int, [1, 10**30], [0, -1]),
    ("[0.0, 1.0]", float, [0, 0.0, 1, 1.0], [-1e-9, 1 + 1e-9, math.nan, math.inf]),
    ("(0.0, 1.0] of it", float, [1e-300, 1.0], [0.0, 0, 1.1]),
    ("[0.0, inf)", float, [0.0, 1e308], [math.inf, math.nan, -1e-300]),
    ("(-inf, 5)", int, [4, -(10**30)], [5]),
    ("[1e-3,1]", float, [0.001], [0.0009]),
    ("[0, 4_294_967_295]", int, [4294967295], [4294967296]),
])
# fmt: on
def test_an_interval_holds_what_its_notation_says(text, kind, inside, outside):
    """Brackets say which bounds belong to an interval, and decimal points whether it has fractions."""
    interval = Interval(text)
    assert interval.kind is kind
    assert all(x in interval for x in inside) and not any(x in interval for x in outside)


MALFORMED = "[1, inf steps", "[1; 2] steps", "[a, b]", "[2, 1]", "(0.5) of it", "[, 1]", "[1, 2, 3]", "[see above]"


@pytest.mark.parametrize("comment", MALFORMED)
def test_a_malformed_interval_is_named_at_the_start(tmp_path, comment):
    """A comment that begins like an interval and is none ends the program with one line."""
    message = "script.py, line 3: the comment of STEPS should begin with an interval such as"
    with pytest.raises(SystemExit, match=message) as error:
        script_constants(tmp_path, f"ENVS = 1\n\nSTEPS = 3  # {comment}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("comment", ["", "# (see above)", "# steps [1, 2]", "# steps (1 to 3)", '# "a" or "b"'])
def test_a_comment_without_an_interval_leaves_the_type_alone_to_be_checked(tmp_path, comment):
    """Without an interval any value of the right type passes."""
    constants = script_constants(tmp_path, f"STEPS = 3  {comment}\n")
    constants.check({"STEPS": -(10**20)})
    with pytest.raises(CommandLineError, match=r"STEPS \(--steps\) must be an integer, not 1.5"):
        constants.check({"STEPS": 1.5})


# fmt: off
@pytest.mark.parametrize("constant, value, message", [
    ("SEED", None, "SEED (--seed) must be an integer in [0, 4_294_967_295], not None"),
    ("SEED", -1, "SEED (--seed) must be an integer in [0, 4_294_967_295], not -1"),
    ("LR", (2, 5e-3), "LR (--lr) must be a number in (0.0, 1.0], not (2, 0.005)"),
    ("LR", "2e-3", "LR (--lr) must be a number in (0.0, 1.0], not '2e-3'"),
    ("RUN_DIR", None, "RUN_DIR (--run_dir) must be text, not None"),
    ("PAIRED_ENVS", "no", "PAIRED_ENVS (--paired_envs) must be true or false, not 'no'"),
    ("DEVICE", ["cpu"], "DEVICE (--device) must be text, not ['cpu']"),
    ("NUM_ENVS", 128.0, "NUM_ENVS (--num_envs) must be an integer"),
])
# fmt: on
def test_a_default_that_is_edited_wrongly_is_named(monkeypatch, constant, value, message):
    """A default of another type, or outside its range, costs one line that names it."""
    monkeypatch.setattr(train_ppo, constant, value)
    with pytest.raises(CommandLineError, match=re.escape(message)):
        train_ppo.main([])


def test_a_constant_that_is_deleted_or_renamed_is_named(monkeypatch):
    """Reading a constant that is not there costs one line that names it."""
    left = {name: comment for name, comment in train_ppo.CONSTANTS.comments.items() if name != "MIN_LR"}
    monkeypatch.setattr(train_ppo.CONSTANTS, "comments", left)
    with pytest.raises(CommandLineError, match="^MIN_LR is missing among the constants at the top of the script"):
        train_ppo.main([])
    values = Values(STEPS=3)
    assert not hasattr(values, "LR") and values.STEPS == 3
    with pytest.raises(MissingConstant):
        values.LR  # noqa: B018


@pytest.mark.parametrize("name", ["RESUME", "HELP"])
def test_a_constant_that_would_hide_an_option_is_named(tmp_path, name):
    """A constant must not take the name of an option that every training has."""
    with pytest.raises(CommandLineError, match=f"{name} among the constants .* would hide --{name.lower()}"):
        read("", script_constants(tmp_path, f"{name} = True\n"))


def test_a_constant_of_no_type_that_an_option_can_have(tmp_path):
    """A list or None as a default costs one line."""
    constants = script_constants(tmp_path, "MINE = [3]\nNOTHING = None\n")
    for name in constants:
        with pytest.raises(CommandLineError, match=f"{name} .* must be true or false, a number, or text, not "):
            constants.check({name: constants[name]})
    with pytest.raises(CommandLineError, match="--nothing needs another default in the script, not '3'"):
        read("--nothing 3", constants)


def test_overrides(known):
    """Options are read in both spellings and converted to the types of their constants."""
    assert read("--num_steps 7 --gamma=0.1 --resume x", known) == ("x", {"NUM_STEPS": 7, "GAMMA": 0.1})
    assert read("--paired false --name b --dropout 1", known) == (None, {"PAIRED": False, "NAME": "b", "DROPOUT": 1.0})
    assert read("", known) == (None, {})


def test_the_type_follows_the_interval_or_the_annotation_and_then_the_default(known):
    """A default may be edited to any value that makes sense, such as 1 for a number."""
    known.script["GAMMA"] = 1
    assert read("--gamma 0.5", known) == (None, {"GAMMA": 0.5})
    known.check(known | {"DROPOUT": 12.5})


# fmt: off
@pytest.mark.parametrize("text, message", [
    ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
    ("--num-steps 9", "unknown argument --num-steps; did you mean --num_steps?"),
    ("runs/x", "unknown argument runs/x; did you mean --resume runs/x?"),
    ("--something_else 1", "unknown argument --something_else"),
    ("--num_steps many", "--num_steps needs an integer, not 'many'"),
    ("--num_steps 1.5", "--num_steps needs an integer"),
    ("--gamma fast", "--gamma needs a number, not 'fast'"),
    ("--paired maybe", "--paired needs true or false, not 'maybe'"),
    ("--num_steps", "expected one argument"),
])
# fmt: on
def test_wrong_arguments(known, text, message):
    """What is wrong on a command line is named, with the nearest option."""
    with pytest.raises(CommandLineError, match=re.escape(message)):
        read(text, known)


# fmt: off
@pytest.mark.parametrize("edit, message", [
    ({"NUM_STEPS": 1e6}, "NUM_STEPS (--num_steps) must be an integer in [1, inf), not 1000000.0"),
    ({"NUM_STEPS": 0}, "must be an integer in [1, inf), not 0"),
    ({"NUM_STEPS": True}, "must be an integer"),
    ({"GAMMA": 1.1}, "GAMMA (--gamma) must be a number in [0.0, 1.0], not 1.1"),
    ({"GAMMA": float("nan")}, "must be a number in [0.0, 1.0]"),
    ({"PAIRED": 2}, "must be true or false"),
    ({"NAME": None}, "NAME (--name) must be text, not None"),
    ({"DROPOUT": "x"}, "must be a number, not"),
])
# fmt: on
def test_values_are_checked(known, edit, message):
    """Values of the wrong type or outside their range are refused."""
    known.check(known | {"GAMMA": 1})  # an integer is a number
    with pytest.raises(CommandLineError, match=re.escape(message)):
        known.check(known | edit)


def offered(check, *arguments, **options):
    """Return the numbers that the message of a check offers, or None if it passes."""
    try:
        check("SIZE", *arguments, **options)
    except CommandLineError as error:
        assert str(error).startswith(f"SIZE {arguments[0]} must ")
        return [int(number) for number in re.findall(r"\d+", str(error).partition("the nearest that fit: ")[2])]


@pytest.mark.parametrize("whole, unit", [(16_384, 1), (12_000, 2), (17, 1)])
def test_the_message_offers_the_nearest_numbers_that_divide(whole, unit):
    """They are the nearest below and above the value among those that a second try would accept."""
    fitting = [x for x in range(2, whole + 1) if whole % x == 0 and x % unit == 0]
    for value in (1, 2, 5, 17, 500, 1000, 12_000, 16_384, 99_999):
        nearest = [x for x in fitting if x < value][-1:] + [x for x in fitting if x > value][:1]
        expected = None if value in fitting or value == unit == 1 else nearest
        assert offered(check_divides, value, whole, "it", unit, lowest=2) == expected
    assert offered(check_divides, 3 * 10**17, 10**18, "it") == [25 * 10**16, 5 * 10**17]  # at once


def test_the_message_offers_the_nearest_multiples():
    """There is none below a value that is smaller than the unit."""
    found = [offered(check_multiple, value, 4, "so that it fits") for value in (1, 7, 8, 9)]
    assert found == [[4], [4, 8], None, [8, 12]]


def test_help_shows_the_comment_with_the_range_and_the_default(known, capsys, monkeypatch):
    """The help names ranges in words, keeps them in one piece, and copes with a percent sign."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        read("--help", known)
    out = capsys.readouterr().out
    assert "  --num_steps N  steps (at least 1; default 100)\n" in out
    assert "  --gamma X      discount; 100 % is none (0 to 1; default 0.9)\n" in out
    assert "  --paired BOOL  (true or false; default true)\n" in out
    assert '  --name TEXT    (default "a")\n' in out


def test_a_constant_that_nothing_reads(tmp_path, monkeypatch):
    """A constant is in use if its name occurs below the block, in another constant or in a loaded module.

    In a copy that pip has installed, where the project cannot be told from other packages, no constant is unread.
    """
    unread = "MY_" + "BONUS"  # in one word, this file would mention it
    constants = script_constants(
        tmp_path,
        f"{unread} = 1.0  # {unread} has no effect\nEVAL_INTERVAL = 8\nLOW = 1\nHIGH = LOW + 1\nENTROPY_COEF = 0\n",
        "def f(c):\n    return c.HIGH\n",
    )
    assert constants.unread() == [unread]
    monkeypatch.setattr(options, "ROOT", tmp_path / "site-packages")
    assert constants.unread() == []


@pytest.mark.parametrize("name", [*TRAININGS, "actor_critic"])
def test_every_constant_is_read_and_has_a_type_and_a_default_in_its_range(name):
    """Each training's defaults pass; one step below or above a range, nan and wrong types do not."""
    constants = module_of(name).CONSTANTS
    constants.check(constants)
    assert constants.unread() == [] and all(constants.comments.values())
    for constant in constants:
        interval = constants.ranges.get(constant)
        if interval is None:
            assert constants.annotated[constant] in (bool, str)
            wrong = [None, 1, ["no"], "no" if constants.kind(constant) is bool else True]
        else:
            step = 1 if interval.kind is int else 1e-9
            wrong = [interval.low - step, interval.high + step, math.nan, math.inf, "1", None, True]
        for value in wrong:
            with pytest.raises(CommandLineError, match=f"^{constant} .* must be ") as error:
                constants.check({constant: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_call_takes_the_constants_of_now_and_no_command_line(name, monkeypatch):
    """`main` reads its arguments, not the caller's command line, and constants as they are now."""
    script = module_of(name)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(CommandLineError, match="unknown argument --sed; did you mean --seed"):
        script.main(["--sed", 1])
    monkeypatch.setattr(script, "SEED", -1)
    with pytest.raises(CommandLineError, match=r"SEED \(--seed\) must be an integer in \[0, .*\], not -1"):
        script.main()


def test_a_program_may_give_numbers_and_paths(tmp_path):
    """Arguments need not be texts."""
    parser = Parser("script.py", "what it does")
    parser.add_argument("folder", type=given_path)
    parser.add_argument("--seeds", type=int, nargs="+")
    assert vars(parser.parse_args([tmp_path, "--seeds", 3, np.int64(4)])) == {"folder": str(tmp_path), "seeds": [3, 4]}
    with pytest.raises(CommandLineError, match="unknown argument --fold"):
        parser.parse_args([tmp_path, "--fold"])


def test_an_option_within_an_interval(tmp_path):
    """Numbers outside the interval, and words that are no numbers, are refused."""
    parser = Parser("script.py", "what it does")
    parser.add_argument("--games", type=within("[1, 10]"), default=5)
    parser.add_argument("--minutes", type=within("(0.0, inf)"))
    assert vars(parser.parse_args(["--games", 10, "--minutes", "0.5"])) == {"games": 10, "minutes": 0.5}
    for words, message in (
        ("--games 0", r"--games: must be an integer in \[1, 10\], not '0'"),
        ("--games 1.5", r"--games: must be an integer in \[1, 10\], not '1.5'"),
        ("--minutes nan", r"--minutes: must be a number in \(0.0, inf\), not 'nan'"),
    ):
        with pytest.raises(CommandLineError, match=message):
            parser.parse_args(words.split())
