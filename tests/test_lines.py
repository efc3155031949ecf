"""The lines that programs print fit terminals of 60, 80 and 120 columns, and say what matters first."""

import contextlib
import io
import os
import sys

import pytest
from fake_trainer import FakeTrainer

import harness.messages
from callbacks import ProgressBar
from harness.lines import (
    columns,
    fitted,
    format_count,
    format_duration,
    format_rate,
    format_score,
    in_words,
    wrapped_lines,
)

termios = pytest.importorskip("termios", reason="Windows has no pseudo-terminals")


class Terminal:
    """A pseudo-terminal of some width, which both outputs are within the context."""

    def __init__(self, width):
        self.width = width

    def __enter__(self):
        self.primary, secondary = os.openpty()
        termios.tcsetwinsize(secondary, (24, self.width))
        self.stream = os.fdopen(secondary, "w", buffering=1)
        self.outputs = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self.stream
        return self

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.outputs
        self.stream.close()
        os.close(self.primary)

    def lines(self):
        """Return what was printed since the last call. A line that was drawn several times stands there as often."""
        self.stream.flush()
        os.set_blocking(self.primary, False)
        written = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                written += os.read(self.primary, 100_000)
        return [part for line in written.decode().split("\n") for part in line.split("\r") if part.strip()]


widths = pytest.mark.parametrize("width", [60, 80, 120])


@widths
def test_progress_fits_the_terminal(width):
    """No line is longer than the terminal, and each has steps, time and score, however narrow it is."""
    endings = {"go on": "python train_ppo.py --resume runs/a-name --num_steps 100000"}
    plan = "A line about what is going to happen, which is longer than sixty columns."
    bar = ProgressBar(plan, metrics=("cleared", "varied", "length"), endings=endings)
    with Terminal(width) as terminal:
        FakeTrainer([bar], seconds_per_update=6).learn()
        text = terminal.lines()
    *others, command = text
    beside_its_label = f"  go on: {endings['go on']}"
    assert command == (beside_its_label if len(beside_its_label) < width else f"  {endings['go on']}")
    assert max(map(len, others)) < width
    assert "      400 steps     24s  score 300.0  best" in "\n".join(others)
    bars = [line for line in others if "%|" in line]
    assert min(len(line.split("|")[1]) for line in bars) > 8
    assert "800/800  48s  0s left  score 400.0" in bars[-1]
    assert ("varied" in "\n".join(others)) == (width >= 80)
    assert ("in training 80.0" in bars[-1]) == (width >= 80)


def test_progress_within_an_update():
    """The bar moves within an update that takes long, and says what the update does."""
    bar = ProgressBar()
    trainer = FakeTrainer([bar])
    with Terminal(80) as terminal:
        trainer.emit("on_training_start")
        for done in range(1, 4):
            bar.drawn_at = 0  # as if a tenth of a second had passed
            trainer.seconds += 10
            trainer.doing = f"learning {done}/4"
            trainer.unfinished_steps = 25 * done
            trainer.emit("on_progress")
        drawn = [line for line in terminal.lines() if "learning" in line]
        bar.close()
    assert ["75/800  30s  4m50s left  learning 3/4" in line for line in drawn] == [False, False, True]


@widths
def test_errors_and_warnings_are_broken_between_words(width):
    """Commands to copy stay whole."""
    command = "python train_ppo.py --resume runs/2026-01-31_12-00-00 --batch_size 256"
    with Terminal(width) as terminal:
        harness.messages.tell(f"some reason that takes some words to say, as reasons do; go on with: {command}")
        harness.messages.say("a warning " * 20)
        text = terminal.lines()
    assert all(len(line) < width or command in line for line in text)
    assert any(command in line for line in text)
    assert " ".join(" ".join(text).split()).count("a warning") == 20


def test_files_get_whole_lines(capsys):
    """There is no width to fit in a file."""
    FakeTrainer([ProgressBar("a plan " * 50)], updates=2).learn()
    first, *_, line, last = capsys.readouterr().out.splitlines()
    assert first == "a plan " * 50
    assert line.endswith("min 10  max 180  cleared 0  games 32  length 812.5  varied 0.25  returned 0.71")
    assert columns(io.StringIO()) is None and columns(None) is None


def test_numbers():
    """At most two units of a duration are shown, and three digits of a number."""
    durations = {0: "0s", 42.9: "42s", 60: "1m00s", 3599: "59m59s", 3600: "1h00m", 86399: "23h59m", 777600: "9d00h"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    words = {0: "about 0 seconds", 1: "about 1 second", 95: "about 2 minutes", 250: "about 4 minutes"}
    words |= {7200: "about 2 hours", 777600: "about 9 days"}
    assert {seconds: in_words(seconds) for seconds in words} == words
    counts = {950: "950", 9_999: "9,999", 163_840: "164k", 999_499: "999k", 999_500: "1.00M", 4_014_080: "4.01M"}
    assert {number: format_count(number) for number in counts} == counts
    rates = {20_078.3: "20,078 steps/s", 0.72: "0.72 steps/s", 1 / 46: "46 s/step", 0: "-"}
    assert {rate: format_rate(rate) for rate in rates} == rates
    assert [format_score(score) for score in (761.5625, 0.8234, float("nan"))] == ["761.6", "0.823", "-"]


def test_what_does_not_fit_is_left_out():
    """The first piece is always there, and nothing that comes after a piece without room."""
    assert fitted(["abc", "", "de", "fghij", "k"], 10) == "abc  de"
    assert fitted(["a long beginning", "b"], 5) == "a long beginning"
    assert fitted(["abc", "de"], None) == "abc  de"
    assert wrapped_lines("one two three\n  indented lines stay", 7) == "one two three\n  indented lines stay"
    assert wrapped_lines("one two three four five", 20) == "one two three four\nfive"
    for command in ("python '../a b/train_ppo.py' --resume 'c d'", 'python "C:\\a b\\train_ppo.py" --resume "c d"'):
        assert wrapped_lines(f"stopped; go on with: {command}", 20).splitlines()[-1] == command
