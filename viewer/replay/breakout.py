"""Shows Breakout. The file of a replay holds only serves and actions, and the browser plays the games again."""

import numpy as np

from breakout_ascii import (
    BALL_INTERVAL,
    BRICK,
    BRICK_COLUMNS,
    BRICK_LEFT,
    BRICK_POINTS,
    BRICK_ROWS,
    BRICK_TOP,
    CLEAR_POINTS,
    LIVES,
    MAX_EPISODE_STEPS,
    PADDLE,
    PADDLE_MAX,
    PADDLE_MIDDLE,
    PADDLE_MOVES,
    PADDLE_ROW,
    PADDLE_START,
    SERVE_ROW,
    SERVE_X,
    to_image,
)
from viewer.replay.attention import Things

KIND = "breakout"  # the class of the page in the browser
SCRIPTS = ("game.js", "live.js", "breakout.js")
FRAME_MS = 40  # 25 frames a second
GAP = 0  # because a page has walls at its sides
GAME = {  # for that script and for game.js, which has the rules
    "brick": BRICK,
    "brick_top": BRICK_TOP,
    "brick_left": BRICK_LEFT,
    "brick_rows": BRICK_ROWS,
    "brick_columns": BRICK_COLUMNS,
    "brick_points": BRICK_POINTS,
    "clear_points": CLEAR_POINTS,
    "paddle": PADDLE,
    "paddle_row": PADDLE_ROW,
    "paddle_max": PADDLE_MAX,
    "paddle_middle": PADDLE_MIDDLE,
    "paddle_moves": [int(columns) for columns in PADDLE_MOVES],
    "paddle_start": PADDLE_START,
    "serve_x": SERVE_X,
    "serve_row": SERVE_ROW,
    "ball_interval": BALL_INTERVAL,
    "lives": LIVES,
    "max_episode_steps": MAX_EPISODE_STEPS,
}
NAMES = (
    "ball", "paddle's left end", "paddle's middle", "paddle's right end", "bricks", "walls", "empty space", "line ends",
)  # fmt: skip
PARTS_OF = ("ball", "paddle", "paddle", "paddle", "bricks", "walls", "empty space", "line ends")


def game_data(game):
    """Return what the browser has to know of the game."""
    return GAME


def drawer(game):
    """Return a function that draws a page as a picture, in the colours of Breakout."""
    return to_image


def starts(env):
    """Return a function that returns what decides the game of an environment, besides the actions: its serves.

    They are a list (5, 3) of ints.
    """
    return lambda: env.unwrapped.games.serves[0].tolist()


def replay_data(frames):
    """Return the games of a recording, from which game.js plays them again: their serves, and the actions as text.

    frames: a list of `Frame`.
    """
    games = []
    for frame in frames:
        if frame.start is not None:
            games.append({"serves": frame.start, "actions": ""})
        if frame.action < 0:
            games[-1]["end"] = frame.action
        else:
            games[-1]["actions"] += str(frame.action)
    return {"games": games}


def things_of(pages):
    """Return the `Things` on pages of Breakout, which are the same for all."""
    return Things(NAMES, PARTS_OF, things_on)


def things_on(pages):
    """Return for each token of pages (n, 1944) the index of its thing in NAMES, (n, 1944) int."""
    paddle = pages == ord("=")
    left = paddle & (np.cumsum(paddle, 1) == 1)
    right = paddle & (np.cumsum(paddle[:, ::-1], 1)[:, ::-1] == 1)
    masks = [  # in the order of NAMES, without the last one, the line ends
        pages == ord("O"),
        left,
        paddle & ~left & ~right,
        right,
        np.isin(pages, (ord("|"), ord("_"))),
        pages == ord("#"),
        pages == ord(" "),
    ]
    return np.select(masks, range(len(masks)), default=len(masks))
