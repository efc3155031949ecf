"""Shows Breakout. The file of a replay holds only where the ball, the paddle and the bricks are."""

import numpy as np

from breakout_ascii import (
    BRICK,
    BRICK_COLUMNS,
    BRICK_LEFT,
    BRICK_ROWS,
    BRICK_TOP,
    BRICK_WIDTH,
    COLUMNS,
    PADDLE,
    PADDLE_MAX,
    PADDLE_MIDDLE,
    PADDLE_ROW,
    ROWS,
    SERVE_ROW,
    WALL,
    to_image,
)
from viewer.replay.attention import Things

KIND = "breakout"  # the script, breakout.js
FRAME_MS = 40  # 25 frames a second
GAP = 0  # because a page has walls at its sides
GAME = {  # for that script
    "brick": BRICK,
    "brick_top": BRICK_TOP,
    "brick_left": BRICK_LEFT,
    "brick_rows": BRICK_ROWS,
    "brick_columns": BRICK_COLUMNS,
    "paddle": PADDLE,
    "paddle_row": PADDLE_ROW,
    "paddle_max": PADDLE_MAX,
    "paddle_middle": PADDLE_MIDDLE,
    "serve_row": SERVE_ROW,
}
NAMES = (
    "ball", "paddle's left end", "paddle's middle", "paddle's right end", "bricks", "walls", "empty space", "line ends",
)  # fmt: skip
PARTS_OF = ("ball", "paddle", "paddle", "paddle", "bricks", "walls", "empty space", "line ends")


def drawer(game):
    """Return a function that draws a page as a picture, in the colours of Breakout."""
    return to_image


def replay_data(frames, game):
    """Return what breakout.js needs to show frames, a list of `Frame`."""
    pages = np.stack([frame.page for frame in frames])
    return {
        "game": GAME,
        "frames": [[*ball_and_paddle(frame.page), frame.action, int(frame.score), frame.lives] for frame in frames],
        "walls": changed_walls(pages),
    }


def ball_and_paddle(page):
    """Return the column and the row of the ball, and the column of the paddle's left end, on a page (1944,)."""
    row, column = divmod(int((page == ord("O")).argmax()), COLUMNS)
    left, right = np.flatnonzero(page == ord("="))[[0, -1]] % COLUMNS
    if right - left < len(PADDLE) - 1:  # the last ball of a game lies over an end of the paddle
        left = min(left, column)
    return column, row, int(left)


def changed_walls(pages):
    """Find the pages (n, 1944) whose wall differs from that of the page before.

    Returns:
        {index of such a page: its bricks row by row, as text of 0 and 1}; the first page is always there.
    """
    left_ends = pages.reshape(-1, ROWS, COLUMNS)[:, *WALL][..., ::BRICK_WIDTH]
    bricks = (left_ends == ord(BRICK[0])).reshape(len(pages), -1)
    changed = np.flatnonzero(np.r_[True, (bricks[1:] != bricks[:-1]).any(1)])
    return {int(i): "".join("01"[brick] for brick in bricks[i].astype(int)) for i in changed}


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
