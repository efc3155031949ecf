"""Records played games as the frames of a replay."""

from typing import Any, NamedTuple

import numpy as np

GAME_OVER, RECORDING_ENDS = -1, -2  # in place of an action


class Frame(NamedTuple):
    """A page, and the action that the policy chose on it."""

    page: np.ndarray  # (T,) uint8
    action: int  # or GAME_OVER or RECORDING_ENDS, for a page that the policy did not read
    score: float  # before the action: the sum of the game's rewards so far
    lives: int | None = None  # None in a game without lives
    start: Any = None  # in the first frame of a game, what its kind has to know to play it again


def record(steps, start_of=lambda: None):
    """Yield a `Frame` for each of the steps that load_model.play yields, and another for the last page of a game.

    start_of: returns what `Frame.start` is to be; called while the environment is in its first step.
    """
    for step in steps:
        start = start_of() if step.before.steps == 0 else None
        yield Frame(step.before.page, step.action, step.before.score, step.before.lives, start)
        if step.last:
            end = GAME_OVER if step.over else RECORDING_ENDS
            yield Frame(step.after.page, end, step.after.score, step.after.lives)
