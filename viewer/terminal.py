"""Play Breakout in the terminal with the arrow keys:  python breakout_ascii.py [--fps 15]"""

import argparse
import os
import sys
import time

try:
    import curses
except ImportError:
    curses = None

from breakout_ascii import COLUMNS, ROWS, BreakoutAscii, to_text

SCREEN_ROWS = ROWS + 2  # the page, the score and a line of help
SCREEN_COLUMNS = COLUMNS - 1  # without the newline


def last_key(screen, seconds):
    """Wait for this many seconds, and return the last key that was pressed meanwhile, or -1."""
    key = -1
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        screen.timeout(max(1, int(1000 * left)))
        pressed = screen.getch()
        if pressed not in (-1, curses.KEY_RESIZE):
            key = pressed
    return key


def show(screen, lines):
    """Show these lines and nothing else."""
    screen.erase()
    for row, line in enumerate(lines):
        try:
            screen.addstr(row, 0, line)
        except curses.error:  # the window has just become smaller
            break
    screen.refresh()


def play(screen, fps):
    """Let somebody play until q is pressed. Returns None, or one line that says why one cannot play here."""

    def fits():
        rows, columns = screen.getmaxyx()
        return rows >= SCREEN_ROWS and columns >= SCREEN_COLUMNS

    if not fits():
        return f"the terminal is smaller than {SCREEN_COLUMNS}x{SCREEN_ROWS}: enlarge it and start again"
    try:
        curses.curs_set(0)
    except curses.error:  # some terminals cannot hide the cursor
        pass
    env = BreakoutAscii(max_episode_steps=None)
    tokens, info = env.reset()
    over = False
    while True:
        status = f"score {info['score']}   lives {info['lives']}" + ("   GAME OVER" if over else "")
        help_line = "left and right arrow: move   r: new game   q: quit"
        if fits():
            show(screen, [*to_text(tokens).splitlines(), status, help_line])
        else:
            show(screen, ["too small"])  # the game waits
        key = last_key(screen, 1 / fps)
        if key in (ord("q"), ord("Q")):
            return None
        if key in (ord("r"), ord("R")):
            tokens, info = env.reset()
            over = False
        elif fits() and not over:
            action = {curses.KEY_LEFT: 1, curses.KEY_RIGHT: 2}.get(key, 0)
            tokens, _, over, _, info = env.step(action)


def terminal_problem():
    """Return one line that says why one cannot play here, or None."""
    if curses is None:
        return "Python's curses module is missing (on Windows: pip install windows-curses)"
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)):  # a closed stream is None
        return "input and output must be a terminal"
    if os.name == "nt":
        return None  # there curses has no descriptions of terminals to look at
    try:
        curses.setupterm()
        able = curses.tigetstr("cup")  # the command that moves the cursor
    except curses.error:
        able = False
    return None if able else "the terminal type in TERM is unknown or too simple: try TERM=xterm"


def main(argv=()):
    """Let somebody play, and return the exit status. argv: the words of the command line."""
    description = "Play Breakout in the terminal with the arrow keys."
    parser = argparse.ArgumentParser(prog="breakout_ascii.py", description=description, allow_abbrev=False)
    parser.add_argument("--fps", type=float, default=15.0, help="steps per second (default 15)")
    fps = parser.parse_args(list(map(str, argv))).fps
    if not 0.1 <= fps <= 1000:
        parser.error(f"--fps must lie between 0.1 and 1000; got {fps}")
    try:
        problem = terminal_problem() or curses.wrapper(play, fps)
    except KeyboardInterrupt:
        return 130
    if problem:
        print(f"breakout_ascii.py: {problem}", file=sys.stderr)
    return 1 if problem else 0
