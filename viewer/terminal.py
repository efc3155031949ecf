"""Play Breakout in the terminal:  python breakout_ascii.py

With --watch a trained model plays instead. Its probabilities of left, stay and right and its value stand below the
game, and whenever a running training finds a better model, that one begins a new game.

Both need a terminal of 80 x 24 characters. NO_COLOR in the environment turns colours off.
"""

import contextlib
import itertools
import math
import os
import signal
import sys
import textwrap
import threading
import time

try:
    import curses
except ImportError:
    curses = None

from breakout_ascii import (
    BRICK,
    BRICK_COLOURS,
    BRICK_ROWS,
    BRICK_TOP,
    CHARACTERS,
    COLOURS,
    COLUMNS,
    PADDLE_ROW,
    ROWS,
    BreakoutAscii,
    to_text,
)
from harness.messages import tell
from harness.options import CommandLineError, Parser, given_path, within

WIDTH = COLUMNS - 1  # of a page without its newlines
STAY, LEFT, RIGHT = 0, 1, 2  # actions
SHARED_KEYS = {"p or space": "pause", "+ and -": "faster, slower", "r": "new game", "q": "quit"}
PLAY_KEYS = {"left, right": "serve, and move the paddle", "down": "stop the paddle", **SHARED_KEYS}
WATCH_KEYS = {**SHARED_KEYS, "s": "greedy: the most probable action; or sampled"}
FASTER = 1.25  # what a key multiplies the speed by
FPS = "[0.1, 1000.0]"
NO_KEY = -1  # what curses returns when the time is over


# --- colours ----------------------------------------------------------------------------------------------------------


def palette(number):
    """Return {number of a colour: its RGB} for a terminal with so many colours, without black; {} if it has too few.

    With 256 colours the first 16 are left out, because people choose these themselves.
    """
    if number >= 256:
        levels = (0, 95, 135, 175, 215, 255)
        cube = dict(enumerate(itertools.product(levels, repeat=3), 16))
        greys = {232 + i: (8 + 10 * i,) * 3 for i in range(24)}
        return {**cube, **greys}
    if number < 8:
        return {}
    names = ("RED", "GREEN", "YELLOW", "BLUE", "MAGENTA", "CYAN", "WHITE")
    numbers = [getattr(curses, f"COLOR_{name}") for name in names]  # Windows has another order
    dark = [(205, 0, 0), (0, 205, 0), (205, 205, 0), (0, 0, 238), (205, 0, 205), (0, 205, 205), (229, 229, 229)]
    bright = [(255, 0, 0), (0, 255, 0), (255, 255, 0), (92, 92, 255), (255, 0, 255), (0, 255, 255), (255, 255, 255)]
    colours = dict(zip(numbers, dark))
    if number >= 16:
        colours |= {8 + i: colour for i, colour in zip(numbers, bright)} | {8: (127, 127, 127)}
    return colours


def nearest(colour, colours):
    """Return the number of the colour, of {number: RGB}, that is nearest to an RGB."""
    return min(colours, key=lambda number: sum((a - b) ** 2 for a, b in zip(colour, colours[number])))


def colour_attributes():
    """Return {RGB: attribute} for the colours of the game on black, or {} where no colours can or should be shown."""
    attributes = {}
    with contextlib.suppress(curses.error):
        curses.use_default_colors()  # otherwise all that has no colour would be white on black
        colours = {} if os.environ.get("NO_COLOR") or not curses.has_colors() else palette(curses.COLORS)
        game = dict.fromkeys([*COLOURS.values(), *BRICK_COLOURS]) if colours else ()
        for pair, colour in enumerate(game, 1):
            curses.init_pair(pair, nearest(colour, colours), curses.COLOR_BLACK)
            attributes[colour] = curses.color_pair(pair)
    return attributes


# --- the window -------------------------------------------------------------------------------------------------------


class Window:
    """Shows pages with texts over them in a terminal of at least 80 x 24 characters, and reads its keys."""

    def __init__(self, screen):
        self.screen = screen
        self.colours = colour_attributes()
        self.blank = self.colours.get(COLOURS["O"], 0)  # so that the page is black in a terminal that is white
        self.text = self.blank | curses.A_BOLD
        # For each row, how each character of a page is shown there.
        self.attributes = [{c: self.attribute(row, c) for c in CHARACTERS} for row in range(ROWS)]
        with contextlib.suppress(curses.error):  # some terminals cannot hide the cursor
            curses.curs_set(0)

    def fits(self):
        rows, columns = self.screen.getmaxyx()
        return rows >= ROWS and columns >= WIDTH

    def next_key(self, moment):
        """Return the next key that is pressed, or NO_KEY at this moment of time.monotonic()."""
        left = max(0.0, moment - time.monotonic())
        self.screen.timeout(math.ceil(1000 * left))
        return self.screen.getch()

    def show(self, page, top, bottom, box=()):
        """Show a page with texts in its top and bottom walls, each (left, right), and lines of a box in its middle."""
        self.screen.erase()
        if self.fits():
            lines = to_text(page).splitlines()
            cells = [[(c, shown[c]) for c in line] for line, shown in zip(lines, self.attributes)]
            self.write_in_wall(cells[0], *top)
            if "O" in lines[0]:  # the ball is in the top wall
                cells[0][lines[0].index("O")] = ("O", self.attributes[0]["O"])
            self.write_in_wall(cells[-1], *bottom)
            self.write_box(cells, box)
        else:
            cells = self.too_small()
        for row, line in enumerate(cells):
            self.put(row, line)
        self.screen.refresh()

    def attribute(self, row, character):
        """Return how a character of a page is shown."""
        if character in BRICK:
            return self.colours.get(BRICK_COLOURS[(row - BRICK_TOP) % len(BRICK_COLOURS)], 0)
        return self.colours.get(COLOURS.get(character), self.blank)

    def write_in_wall(self, cells, left, right):
        """Write two texts over the cells of a wall."""
        self.write(cells, 2, f" {left} ")
        if right:
            self.write(cells, WIDTH - 4 - len(right), f" {right} ")

    def write_box(self, cells, lines):
        """Write lines between the bricks and the paddle, in the middle and all equally wide."""
        width = min(max(map(len, lines), default=0), WIDTH - 4)
        first = max(1, (BRICK_TOP + BRICK_ROWS + PADDLE_ROW - len(lines)) // 2)
        for row, line in zip(range(first, ROWS - 1), lines):
            self.write(cells[row], (WIDTH - width - 2) // 2, f" {line[:width]:^{width}} ")

    def write(self, cells, column, text):
        for cell, character in zip(range(column, WIDTH), text):
            cells[cell] = (character, self.text)

    def too_small(self):
        """Return the cells of a text that says how large the window must be."""
        rows, columns = self.screen.getmaxyx()
        text = f"the window is {columns}x{rows}, but the game needs {WIDTH}x{ROWS} (q: quit)"
        return [[(c, 0) for c in line] for line in textwrap.wrap(text, max(1, columns - 1))[:rows]]

    def put(self, row, cells):
        """Put the cells of a row on the screen."""
        column = 0
        for attribute, run in itertools.groupby(cells, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in run)
            # The cursor cannot go on after the last cell of a window, which is written in spite of that, and a window
            # may just have become smaller.
            with contextlib.suppress(curses.error):
                self.screen.addstr(row, column, text, attribute)
            column += len(text)


def key_lines(keys):
    """Return a line for each of {keys: what they do}."""
    widest = max(map(len, keys))
    longest = max(map(len, keys.values()))
    return [f"{key:<{widest}}   {effect:<{longest}}" for key, effect in keys.items()]


# --- the game ---------------------------------------------------------------------------------------------------------


class TerminalGame:
    """Shows a game and obeys the keys that playing and watching have in common."""

    keys = SHARED_KEYS

    def __init__(self, screen, fps, max_episode_steps=None):
        self.window = Window(screen)
        self.fps = fps
        self.paused = False
        self.env = BreakoutAscii(max_episode_steps=max_episode_steps)
        self.new_game()

    def run(self):
        """Play until q is pressed."""
        next_step = time.monotonic() + 1 / self.fps
        while True:
            self.show()
            key = self.window.next_key(next_step)
            if key in (ord("q"), ord("Q")):
                return
            if key == curses.KEY_RESIZE and os.name == "nt":
                curses.resize_term(0, 0)  # elsewhere curses does this by itself
            if key != NO_KEY:
                self.press(key)
                next_step = min(next_step, time.monotonic() + 1 / self.fps)  # the key may have made it faster
            now = time.monotonic()
            if now >= next_step:
                if self.window.fits() and not self.paused:
                    self.step()
                # A large model rests for as long as it thinks, because a training beside it needs the cores.
                next_step = max(next_step + 1 / self.fps, 2 * time.monotonic() - now)

    def new_game(self):
        self.page, self.info = self.env.reset()
        self.over = False

    def press(self, key):
        if key in (ord("p"), ord("P"), ord(" ")):
            self.paused = not self.paused
        elif key in (ord("+"), ord("=")):  # on many keyboards + is a shifted =
            self.fps = min(self.fps * FASTER, 1000.0)
        elif key == ord("-"):
            self.fps = max(self.fps / FASTER, 0.1)
        elif key in (ord("r"), ord("R")):
            self.paused = False
            self.new_game()

    def result(self):
        """Return how a game that is over has ended."""
        end = "GAME OVER" if self.info["bricks"] else "THE WALL IS CLEARED"
        return f"{end}: {self.info['score']} points"

    def status(self):
        return f"score {self.info['score']}  lives {self.info['lives']}"


class Steering:
    """Turns key presses into moves, because a terminal reports that a key is pressed, but not that it is released.

    A key that is held down repeats, but only after up to half a second. Until then the paddle moves slowly, so that it
    does not stop and go, and a short press moves it by about its own width. From the first repetition on it moves in
    every step, and it stops soon after the last one.
    """

    DELAY = 0.55  # seconds until a key that is held down repeats
    INTERVAL = 0.125  # seconds between two moves until then
    REPETITION = 0.13  # seconds between two repetitions

    def __init__(self):
        self.stop()

    def stop(self):
        self.action = STAY
        self.held = False
        self.until = self.next_move = 0.0
        self.moved = True

    def press(self, action):
        now = time.monotonic()
        self.held = action == self.action and now < self.until
        if self.held:
            self.until = max(self.until, now + self.REPETITION)
        else:
            self.until = now + self.DELAY
            self.next_move = now
            self.moved = False
        self.action = action

    def next_action(self):
        """Return the action of the next step. Every key moves the paddle at least once, however slow the game is."""
        now = time.monotonic()
        if self.moved and now >= self.until:
            self.stop()
        elif not self.moved or self.held or now >= self.next_move:
            self.moved = True
            self.next_move = now + self.INTERVAL
            return self.action
        return STAY


class PlayedGame(TerminalGame):
    """A game that somebody plays. Every ball waits until it is served."""

    keys = PLAY_KEYS
    REST = 0.7  # seconds after a lost ball during which no key serves the next one, so that nobody does by accident

    def new_game(self):
        super().new_game()
        self.steering = Steering()
        self.serving = True
        self.serve_from = 0.0

    def press(self, key):
        move = {curses.KEY_LEFT: LEFT, curses.KEY_RIGHT: RIGHT}.get(key)
        if move is not None:
            self.paused = False
            self.steering.press(move)
        if self.serving and not self.over and (move is not None or key == ord(" ")):
            self.serving = time.monotonic() < self.serve_from
        elif key == curses.KEY_DOWN:
            self.steering.stop()
        elif key == curses.KEY_RESIZE:
            self.paused = not (self.serving or self.over)
        elif move is None:
            super().press(key)
            self.paused &= not (self.serving or self.over)

    def step(self):
        action = self.steering.next_action()
        if self.serving or self.over:
            return
        self.page, _, self.over, _, self.info = self.env.step(action)
        if self.info["life_lost"] and not self.over:
            self.steering.stop()
            self.serving = True
            self.serve_from = time.monotonic() + self.REST

    def show(self):
        keys = key_lines(self.keys)
        if self.over:
            box = [self.result(), "", "r: new game   q: quit"]
        elif self.paused:
            box = ["paused: an arrow key, p or space goes on", "", *keys]
        elif self.serving and self.serve_from:
            box = [f"lives left: {self.info['lives']}", "", "press left, right or space to serve"]
        elif self.serving:
            box = ["press left, right or space to serve", "", *keys]
        else:
            box = []
        top = self.status(), f"{self.fps:.3g} steps a second"
        self.window.show(self.page, top, ("arrows: move  p: pause  + -: speed  r: new game  q: quit", ""), box)


# --- the program ------------------------------------------------------------------------------------------------------


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


def read_command_line(argv):
    """Return the options. Raises CommandLineError."""
    keys = ["Keys:", *key_lines(PLAY_KEYS), "", "Keys with --watch:", *key_lines(WATCH_KEYS)]
    parser = Parser("breakout_ascii.py", "\n".join([__doc__, *keys]))
    parser.add_argument("--fps", type=within(FPS), default=15.0, help="steps a second at the start (default 15)")
    watch = "let a model play: of this run or checkpoint (default: the newest run, else the shipped model)"
    parser.add_argument("--watch", nargs="?", const=True, type=given_path, metavar="MODEL", help=watch)
    return parser.parse_args(argv)


def end_cleanly(signum, frame):
    """Leave by an exception, so that curses gives the terminal back as it was."""
    sys.exit(128 + signum)


def main(argv=()):
    """Let somebody play or watch, and return the exit status. argv: the words of the command line."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        args = read_command_line(argv)
        if problem := terminal_problem():
            raise CommandLineError(problem)
        if in_main_thread:
            signal.signal(signal.SIGTERM, end_cleanly)
        if args.watch is None:
            curses.wrapper(lambda screen: PlayedGame(screen, args.fps).run())
        else:
            print("Loading PyTorch and the model ...", flush=True)  # which takes seconds, so playing does without
            from viewer.watch import watch

            watch(None if args.watch is True else args.watch, args.fps)
        return 0
    except (CommandLineError, FloatingPointError) as error:
        tell(f"breakout_ascii.py: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)
