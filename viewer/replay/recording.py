"""Records played games as the frames of a replay."""

from typing import NamedTuple

import numpy as np

GAME_OVER, RECORDING_ENDS = -1, -2  # in place of an action


class Frame(NamedTuple):
    """A page, and the action that the policy chose on it."""

    page: np.ndarray  # (T,) uint8
    action: int  # or GAME_OVER or RECORDING_ENDS, for a page that the policy did not read
    score: float  # before the action: the sum of the game's rewards so far
    lives: int | None = None  # None in a game without lives


def record(steps):
    """Yield a `Frame` for each of the steps that load_model.play yields, and another for the last page of a game."""
    for step in steps:
        yield Frame(step.before.page, step.action, step.before.score, step.before.lives)
        if step.last:
            end = GAME_OVER if step.over else RECORDING_ENDS
            yield Frame(step.after.page, end, step.after.score, step.after.lives)
