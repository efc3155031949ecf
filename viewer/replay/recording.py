"""Records played games as the frames of a replay."""

from typing import NamedTuple

import numpy as np

from breakout_ascii import (
    BRICK,
    BRICK_WIDTH,
    COLUMNS,
    LIVES,
    PADDLE,
    ROWS,
    WALL,
)

GAME_OVER, RECORDING_ENDS = -1, -2  # in place of an action


class Frame(NamedTuple):
    """A page, and the action that the policy chose on it."""

    page: np.ndarray  # (1944,) uint8
    action: int  # or GAME_OVER or RECORDING_ENDS, for a page that the policy did not read
    score: int  # before the action
    lives: int


def record(steps):
    """Yield a `Frame` for each of the steps that load_model.play yields, and another for the last page of a game."""
    score = 0
    lives = LIVES
    for step in steps:
        yield Frame(step.page, step.action, score, lives)
        score = step.info["score"]
        lives = step.info["lives"]
        if step.last:
            yield Frame(step.next_page, GAME_OVER if step.over else RECORDING_ENDS, score, lives)
            score = 0
            lives = LIVES


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
