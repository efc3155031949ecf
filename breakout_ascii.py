"""Breakout on a page of text, 24 rows of 80 characters, for one game or for many at once.

`Games` has the rules, for N games at a time. Two environments are built on it: `BreakoutAscii`, a Gymnasium Env, and
`BreakoutAsciiVec`, a Gymnasium VectorEnv for training. `to_text` and `to_image` show a page to people, and
`python breakout_ascii.py` lets you play.

A game is random in the directions of its serves and, with `varied_starts`, in where balls are served and which bricks
are missing. All of this is drawn before the game starts; the rules themselves draw no random numbers.
"""

import functools
import math
import sys
import time
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

# ---------------------------------------------------------------------------------------------------------------------
# Edit any of these: everything else follows, the environments, training, evaluation, pictures and the browser's page.
ROWS = 24  # lines of a page
COLUMNS = 81  # characters of a line, with the newline at its end
BRICK = "|____|"  # of any length, of the characters | and _
BRICK_ROWS = 7
BRICK_COLUMNS = 13  # bricks side by side, midway between the left and the right wall
BRICK_TOP = 5  # the row of the uppermost bricks; row 0 is the ceiling
PADDLE = "======="  # of any length from 2, of the character =
PADDLE_MOVES = (0, -2, 2)  # columns, for the actions 0 stay, 1 left, 2 right
BALL_INTERVAL = 1  # steps between two moves of the ball
LIVES = 5  # also the number of serves in a game
BRICK_POINTS = 10
CLEAR_POINTS = 50  # for the last brick, in addition
MAX_EPISODE_STEPS = 5000 * BALL_INTERVAL  # a longer game is truncated
# ---------------------------------------------------------------------------------------------------------------------

MOST_LIVES = 8  # an evaluation plays all 2^LIVES games


def board_problem():
    """Return one line that says why the constants above make no game, or None."""
    counts = ("ROWS", "COLUMNS", "BRICK_ROWS", "BRICK_COLUMNS", "BRICK_TOP", "BALL_INTERVAL", "LIVES")
    least = dict.fromkeys((*counts, "MAX_EPISODE_STEPS"), 1) | {"BRICK_POINTS": 0, "CLEAR_POINTS": 0}
    for name, low in least.items():
        value = globals()[name]
        if type(value) is not int or value < low:
            return f"{name} must be an integer from {low} up, not {value!r}"
    if LIVES > MOST_LIVES:
        return f"LIVES must be at most {MOST_LIVES}, because an evaluation plays all 2^LIVES games; it is {LIVES}"
    if not isinstance(PADDLE, str) or len(PADDLE) < 2 or set(PADDLE) != {"="}:
        return f"PADDLE must be two or more of the character =, not {PADDLE!r}"
    if not isinstance(BRICK, str) or not BRICK or not set(BRICK) <= set("|_"):
        return f"BRICK must be one or more of the characters | and _, not {BRICK!r}"
    moves = np.atleast_1d(PADDLE_MOVES)
    if moves.dtype.kind != "i" or np.sign(moves).tolist() != [0, -1, 1]:
        return f"PADDLE_MOVES must be 0, an integer below 0 and one above 0, not {PADDLE_MOVES}"
    room = COLUMNS - 3  # columns between the walls
    if len(PADDLE) > room:
        return f"PADDLE has {len(PADDLE)} characters, and between the walls there are {room} columns; shorten it"
    if BRICK_COLUMNS * len(BRICK) > room:
        wall = f"{BRICK_COLUMNS} bricks of {len(BRICK)} characters do not fit between the walls"
        return f"{wall}, where there are {room} columns; lower BRICK_COLUMNS or shorten BRICK"
    free = ROWS - 3 - BRICK_TOP  # rows from BRICK_TOP to the one where the ball is served
    if BRICK_ROWS > free:
        wall = f"{BRICK_ROWS} rows of bricks from row {BRICK_TOP} on leave no room for the ball above the paddle"
        return f"{wall}; lower BRICK_ROWS or BRICK_TOP by {BRICK_ROWS - free}"
    return None


if problem := board_problem():
    sys.exit(f"breakout_ascii.py: {problem}")

# What follows from these. The values and shapes in comments are those of the standard game.
TOKENS = ROWS * COLUMNS  # 1944, the length of an observation
CHARACTERS = " #|_=O\n"  # a page contains no others
RIGHT_WALL = COLUMNS - 2  # 79, a column; the left wall is column 0
FLOOR = ROWS - 1  # 23, a row; the ceiling is row 0
BRICK_WIDTH = len(BRICK)  # 6
BRICK_LEFT = 1 + (COLUMNS - 3 - BRICK_COLUMNS * BRICK_WIDTH) // 2  # 1, the column where the bricks begin
PADDLE_ROW = FLOOR - 1  # 22
PADDLE_MAX = RIGHT_WALL - len(PADDLE)  # 72; the paddle's left end moves in 1..72
PADDLE_START = (1 + PADDLE_MAX) // 2  # 36, where that is when a ball is served
PADDLE_MIDDLE = (len(PADDLE) - 1) // 2  # 3; a paddle's cells 0..3 send the ball to the left, the others to the right
SERVE_X = COLUMNS // 2  # 40
SERVE_ROW = PADDLE_ROW - 1  # 21
MOST_POINTS = BRICK_POINTS * BRICK_ROWS * BRICK_COLUMNS + CLEAR_POINTS  # 10 * 91 + 50 = 960
WALL = np.s_[BRICK_TOP : BRICK_TOP + BRICK_ROWS, BRICK_LEFT : BRICK_LEFT + BRICK_COLUMNS * BRICK_WIDTH]  # in a page

# Colours are for people: agents see the page, which has none.
COLOURS = {"#": (140, 140, 140), "=": (230, 110, 200), "O": (255, 255, 255)}  # RGB
BRICK_COLOURS = [
    (232, 80, 80), (226, 120, 64), (214, 154, 58), (206, 196, 70), (92, 190, 96), (74, 170, 200), (104, 120, 240),
]  # top row first; further rows begin again  # fmt: skip


def codes(lines):
    """Return lines of text as an array of ASCII codes, (lines, characters) uint8."""
    return np.array([list(line.encode()) for line in lines], np.uint8)


SOLID = "#" * (COLUMNS - 1) + "\n"
HOLLOW = "#" + " " * (COLUMNS - 3) + "#\n"
EMPTY_PAGE = codes([SOLID] + [HOLLOW] * (ROWS - 2) + [SOLID])  # (24, 81)
PADDLE_LINES = codes(  # (73, 81), the line for each paddle_x; 0 does not occur
    [("#" + " " * (x - 1) + PADDLE).ljust(RIGHT_WALL) + "#\n" for x in range(PADDLE_MAX + 1)]
)

# What the constants at the top are for the game that the shipped model and all figures in the docs belong to. A
# checkpoint records its game's, and one that records none is of the standard game.
STANDARD_BOARD = {
    "ROWS": 24,
    "COLUMNS": 81,
    "BRICK": "|____|",
    "BRICK_ROWS": 7,
    "BRICK_COLUMNS": 13,
    "BRICK_TOP": 5,
    "PADDLE": "=======",
    "PADDLE_MOVES": [0, -2, 2],
    "BALL_INTERVAL": 1,
    "LIVES": 5,
    "BRICK_POINTS": 10,
    "CLEAR_POINTS": 50,
    "MAX_EPISODE_STEPS": 5000,
}
BOARD = {name: globals()[name] for name in STANDARD_BOARD} | {"PADDLE_MOVES": [int(x) for x in PADDLE_MOVES]}


def other_board(recorded):
    """Compare the board that a checkpoint records with this game's.

    Args:
        recorded: a `BOARD`; None, or anything else that a file may hold in its place, means the standard one.

    Returns:
        "" if they are the same, otherwise the differences, such as "PADDLE '=======' (here '=========')".
    """
    recorded = recorded if isinstance(recorded, dict) else {}
    differences = []
    for name, here in BOARD.items():
        there = recorded.get(name, STANDARD_BOARD[name])
        if repr(there) != repr(here):  # a damaged file may hold what cannot be compared
            differences.append(f"{name} {there!r} (here {here!r})")
    return ", ".join(differences)


class Games:
    """Plays N games of Breakout side by side; game i is row i of every array.

    ball_x, ball_y, dx, dy, paddle_x  (N,) int      cells, and cells per step
    lives, score, elapsed             (N,) int      lives left, points, steps since the game started
    bricks, bricks_left               (N, 7, 13) bool, (N,) int
    serves                            (N, 5, 3) int for each serve of the game: ball_x, dx, paddle_x
    pages                             (N, 24, 81) uint8 ASCII codes, up to date from the first reset on
    """

    LIMITS = {  # the arrays that make up a state, and the lowest and highest value that `load_state_dict` accepts
        "ball_x": (0, RIGHT_WALL),
        "ball_y": (0, FLOOR - 1),
        "dx": (-1, 1),
        "dy": (-1, 1),
        "paddle_x": (1, PADDLE_MAX),
        "lives": (0, LIVES),
        "score": (0, MOST_POINTS),
        "elapsed": (0, 10**18),
        "bricks": (False, True),
        "bricks_left": (0, BRICK_ROWS * BRICK_COLUMNS),
        "serves": (-1, RIGHT_WALL),
    }
    STATE = list(LIMITS)  # without the pages, which can be drawn from these arrays

    # The array library. A subclass for another one (fast/gpu_games.py) has its own `array`, `draw` and `redraw`.
    xp = np

    def __init__(self, num_games):
        for name in ("ball_x", "ball_y", "dx", "dy", "paddle_x", "lives", "score", "elapsed", "bricks_left"):
            setattr(self, name, self.array(np.zeros(num_games, np.int64)))
        self.bricks = self.array(np.ones((num_games, BRICK_ROWS, BRICK_COLUMNS), bool))
        self.serves = self.array(np.zeros((num_games, LIVES, 3), np.int64))
        self.pages = self.array(np.tile(EMPTY_PAGE, (num_games, 1, 1)))
        self.index = self.array(np.arange(num_games))
        self.paddle_moves = self.array(np.array(PADDLE_MOVES))

    def array(self, x):
        """Return a NumPy array as an array of this library."""
        return x

    def reset(self, mask, serves, bricks):
        """Start new games with these serves (N, 5, 3) and bricks (N, 7, 13) where mask (N,) is true.

        Raises ValueError for a mask that is not boolean, such as indices of games.
        """
        if mask.dtype != self.xp.bool or mask.shape != self.index.shape:
            raise ValueError(
                f"mask must be bool of shape {tuple(self.index.shape)}; got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        where = self.xp.where
        self.serves = where(mask[:, None, None], serves, self.serves)
        self.bricks = where(mask[:, None, None], bricks, self.bricks)
        self.bricks_left = where(mask, self.bricks.sum((1, 2)), self.bricks_left)
        self.lives = where(mask, LIVES, self.lives)
        self.score = where(mask, 0, self.score)
        self.elapsed = where(mask, 0, self.elapsed)
        self.serve(mask)
        self.draw(mask)

    def step(self, actions):
        """Play one step of every game. Takes actions (N,), and returns rewards, terminated, life_lost, each (N,)."""
        old_x = self.ball_x
        old_y = self.ball_y
        self.elapsed = self.elapsed + 1
        self.move_paddles(actions)
        self.move_balls()
        self.bounce_off_walls()
        life_lost = self.lose_balls(old_x, old_y)
        self.bounce_off_paddles()
        rewards, brick = self.break_bricks()
        self.redraw(old_x, old_y, brick)
        terminated = (self.lives == 0) | (self.bricks_left == 0)
        return rewards, terminated, life_lost

    # The rules, in the order in which a step applies them. They branch only by `where`, so that they run on NumPy
    # arrays and on tensors alike. `1 *` turns bools into integers, because torch does not subtract bools.

    def move_paddles(self, actions):
        self.paddle_x = self.xp.clip(self.paddle_x + self.paddle_moves[actions], 1, PADDLE_MAX)

    def move_balls(self):
        """A ball moves in every BALL_INTERVAL-th step of its game, and waits in the others."""
        dx = self.dx
        dy = self.dy
        if BALL_INTERVAL > 1:
            moves = self.elapsed % BALL_INTERVAL == 0
            dx = dx * moves
            dy = dy * moves
        self.ball_x = self.ball_x + dx
        self.ball_y = self.ball_y + dy

    def bounce_off_walls(self):
        """A ball that reaches the left, right or top wall is in the wall's cell until it moves on, away from the wall.

        A bounce sets the direction, and does not reverse it, because the ball may wait in that cell.
        """
        where = self.xp.where
        left = self.ball_x <= 0
        right = self.ball_x >= RIGHT_WALL
        top = self.ball_y <= 0
        self.ball_x = where(left, 0, where(right, RIGHT_WALL, self.ball_x))
        self.dx = where(left, 1, where(right, -1, self.dx))
        self.ball_y = where(top, 0, self.ball_y)
        self.dy = where(top, 1, self.dy)

    def lose_balls(self, old_x, old_y):
        """A ball at the floor costs a life, and the next is served. The last ball stays where it was before the step.

        Returns life_lost (N,).
        """
        life_lost = self.ball_y >= FLOOR
        self.lives = self.lives - 1 * life_lost
        self.ball_x = self.xp.where(life_lost, old_x, self.ball_x)
        self.ball_y = self.xp.where(life_lost, old_y, self.ball_y)
        self.serve(life_lost & (self.lives > 0))
        return life_lost

    def serve(self, mask):
        """Serve the next ball where mask (N,) is true."""
        where = self.xp.where
        number = (LIVES - self.lives) % LIVES  # valid also without lives, where nothing is served
        serve = self.serves[self.index, number]  # (N, 3)
        self.ball_x = where(mask, serve[:, 0], self.ball_x)
        self.ball_y = where(mask, SERVE_ROW, self.ball_y)
        self.dx = where(mask, serve[:, 1], self.dx)
        self.dy = where(mask, -1, self.dy)
        self.paddle_x = where(mask, serve[:, 2], self.paddle_x)

    def bounce_off_paddles(self):
        """A paddle's cells up to the middle one send the ball up and left, the others up and right.

        A ball that waits in the paddle's row is returned, too, if the paddle comes to it.
        """
        where = self.xp.where
        offset = self.ball_x - self.paddle_x
        # The last ball of a lost game may lie in the paddle's row, and must not bounce there.
        hit = (self.ball_y == PADDLE_ROW) & (offset >= 0) & (offset < len(PADDLE)) & (self.lives > 0)
        self.ball_y = where(hit, SERVE_ROW, self.ball_y)
        self.dy = where(hit, -1, self.dy)
        self.dx = where(hit, where(offset <= PADDLE_MIDDLE, -1, 1), self.dx)

    def break_bricks(self):
        """A brick under the ball disappears and the ball turns round.

        Returns rewards (N,), and (hit, row, column): which games lost a brick, and where it was, each (N,).
        """
        row = self.ball_y - BRICK_TOP
        column = (self.ball_x - BRICK_LEFT) // BRICK_WIDTH
        inside = (row >= 0) & (row < BRICK_ROWS) & (column >= 0) & (column < BRICK_COLUMNS)
        # The index must be valid also where the ball is not inside the wall.
        row = row % BRICK_ROWS
        column = column % BRICK_COLUMNS
        whole = self.bricks[self.index, row, column]
        hit = inside & whole
        self.bricks[self.index, row, column] = whole & ~inside
        self.bricks_left = self.bricks_left - 1 * hit
        self.dy = self.xp.where(hit, -self.dy, self.dy)
        rewards = BRICK_POINTS * hit + CLEAR_POINTS * (hit & (self.bricks_left == 0))
        self.score = self.score + rewards
        return rewards, (hit, row, column)

    def state_dict(self):
        """Return the state as {name: NumPy array}."""
        return {name: np.array(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state):
        """Continue from a state_dict of the same number of games. Raises ValueError, before anything has changed."""
        values = {name: np.asarray(state.get(name)) for name in self.STATE}
        for name, x in values.items():
            shape = tuple(getattr(self, name).shape)
            low, high = self.LIMITS[name]
            kinds = "iu"
            expected = f"integers from {low} to {high}"
            if name == "bricks":
                kinds = "b"
                expected = "bool"
            if x.shape != shape:
                raise ValueError(f"state[{name!r}] must have shape {shape} with this num_envs; got {x.shape}")
            if x.dtype.kind not in kinds or not low <= x.min() <= x.max() <= high:
                raise ValueError(f"state[{name!r}] must be {expected}; got {x.dtype}, {x.flat[0]!r} first")
        for name, x in values.items():
            getattr(self, name)[...] = self.array(x)
        self.draw(self.index >= 0)  # all games

    def pair(self):
        """Copy the games of the first half over those of the second: game N / 2 + i is then paired with game i."""
        half = len(self.index) // 2
        for name in self.STATE + ["pages"]:
            x = getattr(self, name)
            x[half:] = x[:half]

    def in_sync(self):
        """Return, for each pair of games, whether their pages agree above the paddle's row, (N / 2,) bool."""
        above = self.pages[:, :PADDLE_ROW]
        half = len(self.index) // 2
        return (above[:half] == above[half : 2 * half]).all((1, 2))

    # The pages. A step changes few cells, so only these are written; the ball comes last, on top of all others.

    def draw(self, mask):
        """Draw whole pages where mask (N,) is true."""
        wall = np.where(self.bricks[mask, :, :, None], list(BRICK.encode()), ord(" "))  # (n, 7, 13, 6)
        wall = wall.reshape(-1, BRICK_ROWS, BRICK_COLUMNS * BRICK_WIDTH)
        self.pages[mask] = EMPTY_PAGE
        self.pages[mask, *WALL] = wall
        self.pages[mask, PADDLE_ROW] = PADDLE_LINES[self.paddle_x[mask]]
        self.pages[mask, self.ball_y[mask], self.ball_x[mask]] = ord("O")

    def redraw(self, old_x, old_y, brick):
        """Update the pages after a step, before which the balls were at old_x, old_y. brick: from `break_bricks`."""
        hit, row, column = brick
        game = np.flatnonzero(hit)
        self.pages[self.index, old_y, old_x] = EMPTY_PAGE[old_y, old_x]  # right, because a ball is never on a brick
        cells = BRICK_LEFT + BRICK_WIDTH * column[game, None] + np.arange(BRICK_WIDTH)
        self.pages[game[:, None], BRICK_TOP + row[game, None], cells] = ord(" ")
        self.pages[:, PADDLE_ROW] = PADDLE_LINES[self.paddle_x]
        self.pages[self.index, self.ball_y, self.ball_x] = ord("O")


def standard_serves(dx):
    """Return the serves (n, 5, 3) of the standard game for dx (n, 5) of -1 and +1."""
    return np.stack(np.broadcast_arrays(SERVE_X, dx, PADDLE_START), axis=-1)


class RandomNumbers(NamedTuple):
    """Holds the random numbers from which `new_games` makes n games, in arrays of one library, a row for each game."""

    right: np.ndarray  # (n, 5) 0 or 1: 1 serves to the right
    varied: np.ndarray  # (n, 5) in [0, 1): a serve is varied where this is below varied_starts
    x: np.ndarray  # (n, 5) 1..78: where a varied serve starts
    wall: np.ndarray  # (n,) in [0, 1): a wall is varied where this is below varied_starts
    share: np.ndarray  # (n,) in [0, 1): the share of its bricks that a varied wall keeps
    brick: np.ndarray  # (n, 91) in [0, 1): a varied wall keeps the bricks where this is below its share


def draw_numbers(rng, n):
    """Draw the `RandomNumbers` of n games from a NumPy generator."""
    serves = (n, LIVES)
    return RandomNumbers(
        rng.integers(2, size=serves),
        rng.random(serves),
        rng.integers(1, RIGHT_WALL, size=serves),
        rng.random(n),
        rng.random(n),
        rng.random((n, BRICK_ROWS * BRICK_COLUMNS)),
    )


def new_games(numbers, varied_starts=0.0, xp=np):
    """Make n games from their `RandomNumbers`. Returns serves (n, 5, 3) and bricks (n, 7, 13) bool.

    With probability varied_starts a serve starts anywhere on its row, with the paddle under the ball. With the same
    probability a wall keeps only a share of its bricks, which is uniform in [0, 1).

    Args:
        xp: the library of the arrays, numpy or torch.
    """
    where = xp.where
    varied = numbers.varied < varied_starts
    ball_x = where(varied, numbers.x, SERVE_X)
    paddle_x = where(varied, xp.clip(numbers.x - PADDLE_MIDDLE, 1, PADDLE_MAX), PADDLE_START)
    serves = xp.stack([ball_x, 2 * numbers.right - 1, paddle_x], -1)
    share = where(numbers.wall < varied_starts, numbers.share, 1.0)
    bricks = numbers.brick < share[:, None]
    # A varied wall would be empty with probability 1/92; it then keeps its first brick.
    first = bricks[:, :1] | ~bricks.any(1)[:, None]
    bricks = xp.concatenate([first, bricks[:, 1:]], 1)
    return serves, bricks.reshape(-1, BRICK_ROWS, BRICK_COLUMNS)


def check_options(options, known):
    """Return the options of reset, {} for None. Raises ValueError unless they are a dict with known names."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(f'options must be None or {{"{known[0]}": ...}}; got {options!r}')
    if set(options) - set(known):
        raise ValueError(f"the options of reset are {' and '.join(known)}; got {', '.join(map(repr, options))}")
    return options


def reset_mask(options, num_games):
    """Return which games reset starts anew, (num_games,) bool: those in options["reset_mask"], or all without it.

    Raises ValueError if the option is no such mask.
    """
    if options.get("reset_mask") is None:
        return np.ones(num_games, bool)
    mask = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.shape != (num_games,) or mask.dtype != bool or not mask.any():
        got = f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, np.ndarray) else repr(mask)
        raise ValueError(
            f'options["reset_mask"] must be an array of shape ({num_games},), bool, true somewhere; got {got}'
        )
    return mask.copy()


def generators(seeds, num_games):
    """Return {game: NumPy generator} for a list of seeds, one for each game, as `BreakoutAscii` seeds itself.

    A game whose seed is None is left out. Raises ValueError if seeds is no such list.
    """
    listed = list(seeds) if np.iterable(seeds) else []
    if len(listed) != num_games or not all(map(is_seed, listed)):
        raise ValueError(
            f"seed must be None, an integer, or a list of {num_games} of these, integers from 0 up; got {seeds!r}"
        )
    return {game: gym.utils.seeding.np_random(int(x))[0] for game, x in enumerate(listed) if x is not None}


def is_seed(x):
    return x is None or (is_whole(x) and x >= 0)


def is_whole(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def fixed_serves(options, num_games):
    """Return the serves (num_games, 5, 3) that options["serves"] fixes, or None.

    Raises ValueError unless the option is the dx of the serves, -1 or +1, in shape (5,) or (num_games, 5).
    """
    if options.get("serves") is None:
        return None
    try:
        dx = np.asarray(options["serves"])
    except ValueError:
        dx = np.asarray(None)  # rows of unequal length: refused below
    fits = dx.shape in ((LIVES,), (num_games, LIVES)) and dx.dtype.kind in "iuf"
    if not fits or not np.isin(dx, (-1, 1)).all():
        raise ValueError(
            f'options["serves"] must be the dx of the {LIVES} serves, -1 or +1 each, in shape ({LIVES},) or '
            f"({num_games}, {LIVES}); got shape {dx.shape}, values {np.unique(dx.astype(str))[:4]}"
        )
    return standard_serves(np.broadcast_to(dx.astype(np.int64), (num_games, LIVES)))


def check_actions(actions, shape):
    """Return actions as an integer array. Raises ValueError unless they have this shape and are all 0, 1 or 2."""
    actions = np.asarray(actions)
    if actions.shape != shape or actions.dtype.kind not in "iu":
        raise ValueError(f"actions must be integers of shape {shape}; got {actions.dtype} of shape {actions.shape}")
    if actions.min() < 0 or actions.max() > 2:
        bad = np.flatnonzero((actions < 0) | (actions > 2))[0]
        where = f" for game {bad}" if shape else ""
        raise ValueError(f"actions must be 0 (stay), 1 (left) or 2 (right); got {actions.flat[bad]}{where}")
    return actions


def check_arguments(max_episode_steps, render_mode, modes, num_envs=1, varied_starts=0.0):
    """Raise ValueError for the first argument of an environment that is out of range."""
    if not is_whole(num_envs) or num_envs < 1:
        raise ValueError(f"num_envs must be an integer above 0; got {num_envs!r}")
    if max_episode_steps is not None and (not is_whole(max_episode_steps) or max_episode_steps < 1):
        raise ValueError(f"max_episode_steps must be None (no limit) or an integer above 0; got {max_episode_steps!r}")
    if not isinstance(varied_starts, (int, float, np.number)) or not 0.0 <= varied_starts <= 1.0:
        raise ValueError(f"varied_starts is a probability, 0 to 1; got {varied_starts!r}")
    if render_mode not in (None, *modes):
        raise ValueError(f"render_mode must be None or one of {', '.join(modes)}; got {render_mode!r}")


class BreakoutAsciiVec(VectorEnv):
    """Plays many games at once, as a Gymnasium VectorEnv that starts a new game in the step that ends one (SAME_STEP).

    step returns observations (N, 1944) uint8, rewards (N,) in raw points, terminated and truncated (N,) bool, and infos
    `score lives bricks life_lost`. Where a game ended there are also `final_obs` and `final_info`, in the form of
    Gymnasium's SyncVectorEnv.

    Args:
        max_episode_steps: a longer game is truncated; None for no limit.
        varied_starts: the probability that a serve is varied, and that a wall is (for training).

    Raises:
        ValueError: an argument is out of range.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 15, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs, *, max_episode_steps=MAX_EPISODE_STEPS, varied_starts=0.0, render_mode=None):
        check_arguments(max_episode_steps, render_mode, self.metadata["render_modes"], num_envs, varied_starts)
        self.num_envs = int(num_envs)
        self.render_mode = render_mode
        self.varied_starts = varied_starts
        self.max_episode_steps = max_episode_steps or math.inf
        self.single_observation_space = gym.spaces.Box(0, 127, (TOKENS,), np.uint8)
        self.single_action_space = gym.spaces.Discrete(len(PADDLE_MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.games = Games(num_envs)
        self.seeded = {}  # {game: its own NumPy generator}; the other games share np_random
        self._started = False

    def reset(self, *, seed=None, options=None):
        """Start N new games. Returns observations and infos.

        Args:
            seed: an integer for all games together, or a list with a seed or None for each game. With a seed of its
                own, a game and those that follow it are the ones that a `BreakoutAscii` with this seed plays.
            options: {"serves": (5,) or (N, 5) of -1 and +1} makes all serves standard ones with these dx, in their
                order; games that start later are random again. {"reset_mask": (N,) bool} starts only these games
                anew, and only they have infos.

        Raises:
            ValueError: the seed or an option is none of these.
        """
        options = check_options(options, ("serves", "reset_mask"))
        mask = reset_mask(options, self.num_envs)
        serves = fixed_serves(options, self.num_envs)
        if not mask.all():
            self._check_started()
        self._seed(seed, mask)
        self._new_games(mask, serves)
        self._started = True
        return self.observation(), self._infos(life_lost=np.zeros(self.num_envs, bool), mask=mask)

    def _seed(self, seed, mask):
        """Seed the generator that all games share, or a generator for each game, where mask (N,) is true."""
        if seed is None:
            return
        if is_seed(seed):
            super().reset(seed=int(seed))
            self.seeded = {game: own for game, own in self.seeded.items() if not mask[game]}
        else:
            own = generators(seed, self.num_envs)
            self.seeded |= {game: own[game] for game in own if mask[game]}

    def step(self, actions):
        """Play one step of every game. Raises ResetNeeded before the first reset, ValueError for a bad action."""
        self._check_started()
        actions = check_actions(actions, (self.num_envs,))
        rewards, terminated, life_lost = self.games.step(actions)
        truncated = (self.games.elapsed >= self.max_episode_steps) & ~terminated
        done = terminated | truncated
        infos = {}
        if done.any():
            infos = self._final(life_lost, done)
            self._new_games(done)
            life_lost &= ~done  # from here on about the new games
        infos |= self._infos(life_lost, mask=np.ones(self.num_envs, bool))
        return self.observation(), rewards.astype(float), terminated, truncated, infos

    def observation(self):
        """Return a copy of the current pages, (N, 1944) uint8."""
        self._check_started()
        return self.games.pages.reshape(self.num_envs, TOKENS).copy()

    def render(self):
        """Return for each game a str ("ansi") or a (264, 480, 3) uint8 picture ("rgb_array"); None without a mode."""
        if self.render_mode is None:
            return None
        return tuple(rendered(tokens, self.render_mode) for tokens in self.observation())

    def pair(self):
        """Copy the games of the first half over those of the second. Returns observations (N, 1944).

        Game N / 2 + i is then paired with game i. Raises ValueError for an odd number of games.
        """
        self._check_started()
        if self.num_envs % 2:
            raise ValueError(f"{self.num_envs} games do not make pairs; take an even num_envs")
        self.games.pair()
        return self.observation()

    def in_sync(self):
        """Return, for each pair of games, whether their pages agree above the paddle's row, (N / 2,) bool."""
        self._check_started()
        return self.games.in_sync()

    def state_dict(self):
        """Return the state from which the games continue bit for bit, in NumPy arrays and plain types."""
        self._check_started()
        state = self.games.state_dict() | {"np_random": self.np_random.bit_generator.state}
        if self.seeded:
            state["seeded"] = {str(game): own.bit_generator.state for game, own in self.seeded.items()}
        return state

    def load_state_dict(self, state):
        """Continue from a state_dict of the same number of games. Raises ValueError, before anything has changed."""
        if not isinstance(state, dict) or "np_random" not in state:
            raise ValueError("state['np_random'], the state of the random generator, is missing")
        shared = np.random.default_rng()
        try:
            shared.bit_generator.state = state["np_random"]
            seeded = {int(game): np.random.default_rng() for game in state.get("seeded", {})}
            for game, own in seeded.items():
                own.bit_generator.state = state["seeded"][str(game)]
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ValueError("state['np_random'] is not the state of the random generator") from None
        self.games.load_state_dict(state)
        self.np_random = shared
        self.seeded = seeded
        self._started = True

    def _check_started(self):
        if not self._started:
            raise ResetNeeded("call reset() first: no game has started")

    def _new_games(self, mask, serves=None):
        """Start new games where mask (N,) is true, with these serves (N, 5, 3) or, for None, with random ones."""
        drawn_serves, bricks = new_games(self.random_numbers(mask), self.varied_starts)
        row = np.cumsum(mask) - 1  # where a new game is in the arrays that were drawn; unused for the other games
        self.games.reset(mask, drawn_serves[row] if serves is None else serves, bricks[row])

    def random_numbers(self, mask):
        """Draw the `RandomNumbers` of the new games where mask (N,) is true."""
        numbers = draw_numbers(self.np_random, mask.sum())
        for row, game in enumerate(np.flatnonzero(mask)):
            if game in self.seeded:
                for x, own in zip(numbers, draw_numbers(self.seeded[game], 1)):
                    x[row] = own[0]
        return numbers

    def _infos(self, life_lost, mask):
        """Return infos as Gymnasium wants them: each array (N,) is zero where mask (N,) is false, and has a mask."""
        games = self.games
        values = {"score": games.score, "lives": games.lives, "bricks": games.bricks_left, "life_lost": life_lost}
        infos = {}
        for name, value in values.items():
            infos[name] = value * mask
            infos[f"_{name}"] = mask.copy()
        return infos

    def _final(self, life_lost, done):
        """Return the infos about the last step of the games that are done."""
        final_obs = np.full(self.num_envs, None, object)
        for i in np.flatnonzero(done):
            final_obs[i] = self.games.pages[i].flatten()
        return {
            "final_obs": final_obs,
            "_final_obs": done.copy(),
            "final_info": self._infos(life_lost, mask=done),
            "_final_info": done.copy(),
        }


class BreakoutAscii(gym.Env):
    """Plays one game, as a Gymnasium Env: observations (1944,) uint8, rewards in raw points, infos of ints and bools.

    Args:
        render_mode: "ansi": the page as str; "rgb_array": (264, 480, 3) uint8; "human": drawn over the terminal.
        max_episode_steps: a longer game is truncated; None for no limit.
    """

    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 15}
    characters = CHARACTERS
    actions = ("stay", "left", "right")
    moving_costs = True  # a little, in training

    def __init__(self, render_mode=None, max_episode_steps=MAX_EPISODE_STEPS):
        check_arguments(max_episode_steps, render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps or math.inf
        self.observation_space = gym.spaces.Box(0, 127, (TOKENS,), np.uint8)
        self.action_space = gym.spaces.Discrete(len(PADDLE_MOVES))
        self.games = Games(1)
        self._playing = False

    def reset(self, *, seed=None, options=None):
        """Start a game. options={"serves": (5,) of -1 and +1} fixes the dx of its serves. Returns observation, info."""
        serves = fixed_serves(check_options(options, ("serves",)), 1)
        super().reset(seed=seed)
        drawn_serves, bricks = new_games(draw_numbers(self.np_random, 1))
        self.games.reset(np.ones(1, bool), drawn_serves if serves is None else serves, bricks)
        self._playing = True
        if self.render_mode == "human":
            sys.stdout.write("\x1b[2J")  # clear the terminal once; from now on each frame overwrites the one before
            self.render()
        return self._observation(), self._info(life_lost=False)

    def step(self, action):
        """Play one step. Raises ResetNeeded if no game is going on, and ValueError for a bad action."""
        if not self._playing:
            raise ResetNeeded("call reset() first: no game has started, or the last one is over")
        rewards, terminated, life_lost = self.games.step(check_actions(action, ())[None])
        terminated = bool(terminated[0])
        truncated = not terminated and bool(self.games.elapsed[0] >= self.max_episode_steps)
        self._playing = not (terminated or truncated)
        if self.render_mode == "human":
            self.render()
            time.sleep(1 / self.metadata["render_fps"])
        return self._observation(), float(rewards[0]), terminated, truncated, self._info(bool(life_lost[0]))

    def render(self):
        """Return a str ("ansi") or a (264, 480, 3) uint8 picture ("rgb_array"), or draw over the terminal ("human")."""
        if self.render_mode in ("ansi", "rgb_array"):
            return rendered(self._observation(), self.render_mode)
        if self.render_mode == "human":
            sys.stdout.write("\x1b[H" + to_text(self._observation()))
            sys.stdout.flush()
        return None

    def _observation(self):
        return self.games.pages[0].flatten()

    def _info(self, life_lost):
        games = self.games
        counts = {"score": games.score, "lives": games.lives, "bricks": games.bricks_left}
        return {name: int(count[0]) for name, count in counts.items()} | {"life_lost": life_lost}


def check_tokens(tokens, dimensions):
    """Return tokens as an array of one of these numbers of dimensions. Raises ValueError unless they are pages."""
    tokens = np.asarray(tokens)
    if tokens.ndim not in dimensions or tokens.shape[-1] != TOKENS:
        expected = " or ".join({1: f"({TOKENS},)", 2: f"(B, {TOKENS})"}[n] for n in dimensions)
        raise ValueError(f"tokens must have shape {expected}; got {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers, ASCII codes; got {tokens.dtype}")
    known = np.isin(tokens, list(CHARACTERS.encode()))
    if not known.all():
        place = tuple(np.argwhere(~known)[0].tolist())
        raise ValueError(f"tokens must be codes of the characters {CHARACTERS!r}; got {tokens[place]} at {place}")
    return tokens


def to_text(tokens):
    """Return a page (1944,) as a str of 24 lines that end in newlines. Raises ValueError for anything but a page."""
    return check_tokens(tokens, (1,)).astype(np.uint8).tobytes().decode("ascii")


def to_image(tokens):
    """Return a picture (264, 480, 3) uint8 RGB of a page (1944,), or pictures (B, 264, 480, 3) of pages (B, 1944).

    Raises ValueError for anything but pages.
    """
    tokens = check_tokens(tokens, (1, 2))
    from viewer.drawing import draw_pages  # here, because only pictures need Pillow

    pages = tokens.reshape(*tokens.shape[:-1], ROWS, COLUMNS)
    return draw_pages(pages[..., :-1], glyphs())  # newlines are not drawn


@functools.cache
def glyphs():
    """Return the `glyph_atlas` of the game. Behind every character but the ball is a darker shade of its colour."""
    from viewer.drawing import glyph_atlas

    ink, paper = np.zeros((2, ROWS, 128, 3), np.uint8)
    for character, colour in COLOURS.items():
        ink[:, ord(character)] = colour
    for character in BRICK:
        for row in range(BRICK_ROWS):
            ink[BRICK_TOP + row, ord(character)] = BRICK_COLOURS[row % len(BRICK_COLOURS)]
    paper[:] = ink // 4
    paper[:, ord("O")] = 0
    return glyph_atlas(ink, paper)


def rendered(tokens, mode):
    """Return a page (1944,) as a str for "ansi", as a (264, 480, 3) uint8 picture for "rgb_array"."""
    if mode == "ansi":
        return to_text(tokens)
    return to_image(tokens)


def untimed(**kwargs):
    """Return a game for gym.make, which itself adds the limit on the steps (TimeLimit)."""
    return BreakoutAscii(max_episode_steps=None, **kwargs)


untimed.metadata = BreakoutAscii.metadata  # gym.make looks up the render modes here

if "BreakoutAscii-v0" not in gym.registry:  # a reload must not warn
    gym.register(
        "BreakoutAscii-v0",
        entry_point="breakout_ascii:untimed",
        max_episode_steps=MAX_EPISODE_STEPS,
        vector_entry_point="breakout_ascii:BreakoutAsciiVec",
    )

if __name__ == "__main__":
    from viewer.terminal import main

    sys.exit(main(sys.argv[1:]))
