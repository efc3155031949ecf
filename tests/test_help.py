"""What --help prints: words of the first hour that fit the terminal."""

import importlib
import re

import pytest

import load_model
import sweep
from algorithms import actor_critic, reinforce_cartpole
from benchmarks import first_update, learning, on_a_gpu, peers, robustness
from harness.help import filled
from harness.options import Interval

TEXT = """
Do it:  python -m it --now
Also, in three words: python -m it --in "three words"
Lines of a paragraph are joined
up to `python -m it --now` and an empty line.

one    the first entry, which is longer
       than its line
second it

    python -m it.is.too --long for the width
    an example in words is wrapped
"""
FILLED = """
Do it:  python -m it --now
Also, in three words:
    python -m it --in "three words"
Lines of a paragraph are
joined up to
`python -m it --now` and an
empty line.

one    the first entry,
       which is longer than
       its line
second it

    python -m it.is.too --long for the width
    an example in words is
    wrapped
"""


def test_a_docstring_is_wrapped_and_its_commands_stay_whole():
    """Commands can be copied; paragraphs and the entries of lists take the width that there is."""
    assert filled(TEXT.replace("second it", "second  it"), 28) == FILLED.strip("\n").replace("second it", "second  it")


# fmt: off
@pytest.mark.parametrize("text, words", [
    ("[1, inf)", "at least 1"),
    ("[0.0, 1.0]", "0 to 1"),
    ("(0.0, 1.0]", "above 0, at most 1"),
    ("[0, 4_294_967_295]", "0 to 4_294_967_295"),
    ("(-inf, 5)", "below 5"),
    ("[1e-3,1]", "0.001 to 1"),
])
# fmt: on
def test_an_interval_in_words(text, words):
    """Nobody has to know which bracket includes a bound."""
    assert Interval(text).in_words() == words


def programs():
    """Return {name: main} of programs whose help a reader may ask for."""
    names = [name if name == "train_ppo" else f"algorithms.{name}" for name in sweep.TRAININGS]
    trainings = [importlib.import_module(name) for name in names]
    others = [actor_critic, load_model, sweep, learning, peers, robustness, first_update, on_a_gpu]
    return {module.__name__: module.main for module in trainings + others}


@pytest.mark.parametrize("columns", [60, 80])
def test_every_program_explains_itself_within_the_width_of_the_terminal(monkeypatch, capsys, columns):
    """Only commands may be longer, so that they can be copied, and ranges are in words."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, main in programs().items():
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        out = capsys.readouterr().out
        lines = out.splitlines()
        long = [line for line in lines if len(line) > columns and not re.match(" +python ", line)]
        assert ended.value.code == 0 and lines[0].startswith("usage: python ") and not long, (name, long)
        assert "inf)" not in out, name


def test_options_stand_in_the_groups_of_the_file(monkeypatch, capsys):
    """The comments above the constants are the headings."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        reinforce_cartpole.main(["--help"])
    headings = [line for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert headings[-6:] == ["options:", "length:", "REINFORCE:", "optimizer (Adam):", "policy:", "run:"]
