"""The game is played on a stand-in for the screen, and as a whole program in a pseudo-terminal and without one."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import breakout_ascii
import viewer.terminal

curses = pytest.importorskip("curses")


class Screen:
    """A stand-in for a curses window. In each frame one of the keys is pressed, and the lines of the frame are kept.

    A key may also be (rows, columns), which changes the size of the terminal.
    """

    now = 0.0  # the time in seconds, which passes only in `getch`

    def __init__(self, keys):
        self.keys = list(keys)
        self.shown = []
        self.size = (26, 80)

    def getmaxyx(self):
        return self.size

    def erase(self):
        self.shown.append([])

    def addstr(self, row, column, line):
        assert (row, column) == (len(self.shown[-1]), 0)
        self.shown[-1].append(line)

    def refresh(self):
        pass

    def timeout(self, milliseconds):
        self.milliseconds = milliseconds

    def getch(self):
        Screen.now += self.milliseconds / 1000
        key = self.keys.pop(0)
        if isinstance(key, tuple):
            self.size = key
            return curses.KEY_RESIZE
        return key


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(viewer.terminal, "time", SimpleNamespace(monotonic=lambda: Screen.now))


def test_keys():
    screen = Screen([curses.KEY_RIGHT, curses.KEY_RIGHT, curses.KEY_LEFT, ord("x"), -1, ord("r"), ord("q")])
    assert viewer.terminal.play(screen, fps=1000) is None and not screen.keys
    assert [lines[22].index("=======") for lines in screen.shown] == [36, 38, 40, 38, 38, 38, 36]
    assert [lines[21][40] == "O" for lines in screen.shown] == [True] + [False] * 5 + [True]  # r serves anew
    assert all(lines[24].startswith("score 0   lives 5") and "r: new game" in lines[25] for lines in screen.shown)


def test_the_game_waits_while_the_terminal_is_too_small():
    screen = Screen([(25, 80), curses.KEY_RIGHT, (27, 81), ord("Q")])
    assert viewer.terminal.play(screen, fps=1000) is None
    before, *small, after = screen.shown
    assert small == [["too small"]] * 2
    assert before[22] == after[22]  # the paddle has not moved
    assert before[21] != after[21]  # the ball goes on once there is room


def test_a_game_that_is_over_stays_on_the_screen():
    screen = Screen([-1] * 200 + [ord("r"), ord("q")])  # nobody moves: any five balls are lost in 158 steps
    assert viewer.terminal.play(screen, fps=1000) is None
    over = ["GAME OVER" in lines[24] for lines in screen.shown]
    assert over == sorted(over[:-1]) + [False] and over[-2] and screen.shown[-2] == screen.shown[over.index(True)]


@pytest.mark.parametrize("arguments", [["--fps", "0"], ["--fps", "nan"], ["--fp", "15"]])
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        viewer.terminal.main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].startswith("breakout_ascii.py: error: ")


def test_a_call_takes_no_command_line_of_its_caller(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(viewer.terminal, "terminal_problem", lambda: "no terminal here")
    assert viewer.terminal.main() == viewer.terminal.main(["--fps", 30]) == 1
    assert capsys.readouterr().err == "breakout_ascii.py: no terminal here\n" * 2


def test_play_without_a_terminal_is_one_line():
    run = subprocess.run(
        [sys.executable, breakout_ascii.__file__], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr == "breakout_ascii.py: input and output must be a terminal\n"


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_input_or_output_that_is_closed_is_no_terminal(monkeypatch, name):
    """After <&- or >&- in a shell, Python's stdin or stdout is None."""
    terminal = SimpleNamespace(isatty=lambda: True)
    streams = {"stdin": terminal, "stdout": terminal} | {name: None}
    monkeypatch.setattr(viewer.terminal, "sys", SimpleNamespace(**streams))
    assert viewer.terminal.terminal_problem() == "input and output must be a terminal"


def test_play_without_curses(monkeypatch):
    monkeypatch.setattr(viewer.terminal, "curses", None)
    assert "pip install windows-curses" in viewer.terminal.terminal_problem()


def test_windows_has_no_description_of_its_terminal(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(viewer.terminal, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    unknown = SimpleNamespace(setupterm=lambda: None, tigetstr=lambda name: None, error=curses.error)
    monkeypatch.setattr(viewer.terminal, "curses", unknown)
    for name, able in (("posix", False), ("nt", True)):
        monkeypatch.setattr(viewer.terminal, "os", SimpleNamespace(name=name))
        assert (viewer.terminal.terminal_problem() is None) == able


def play_in_a_terminal(keys, rows=26, columns=80, term="xterm"):
    """Play in a pseudo-terminal. Returns the exit status and everything that was written."""
    pty, fcntl, termios, struct = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios", "struct"))
    pid, terminal = pty.fork()
    if pid == 0:
        # Whoever imports readline leaves LINES and COLUMNS behind, and curses would believe them.
        environment = {key: os.environ[key] for key in os.environ if key not in ("LINES", "COLUMNS")}
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # Tests that run in the background ignore this signal, and so would the program.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.alarm(60)  # a program that does not end fails the test, instead of halting it
        command = [sys.executable, breakout_ascii.__file__, "--fps", "100"]
        os.execve(sys.executable, command, environment | {"TERM": term})
    written = b""
    try:
        while chunk := os.read(terminal, 4096):
            written += chunk
            if keys and b"quit" in written:  # it is ready
                os.write(terminal, keys)
                keys = b""
    except OSError:  # the other end is closed
        pass
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_play_in_a_terminal():
    status, written = play_in_a_terminal(b"q")
    assert status == 0 and "|____|" in written and "lives 5" in written
    assert play_in_a_terminal(b"\x03")[0] == 130
    for bad, said in (
        (dict(columns=79), "smaller than 80x26"),
        (dict(rows=25), "smaller"),
        (dict(term="none"), "TERM"),
    ):
        status, written = play_in_a_terminal(b"", **bad)
        assert status == 1 and said in written and "Traceback" not in written
