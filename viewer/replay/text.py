"""Shows any game but Breakout, as text. The file of a replay holds how each page differs from the one before."""

import numpy as np

from viewer.drawing import page_drawer
from viewer.replay.attention import Things

KIND = "text"  # the class of the page in the browser
SCRIPTS = ("text.js",)
GAP = 4
FRAME_MS = 100  # slow enough to follow games in which every step is a turn
NAMES = {" ": "space", "\n": "line ends"}  # of characters that cannot be seen
JOINED = 6  # unchanged characters between two changes; to leave them out would take more room than to write them


def drawer(game):
    """Return a function that draws a page as a picture, in the colours that the game names."""
    return page_drawer(game.rows, game.columns, game.colours)


def game_data(game):
    """Return what the browser has to know of the game."""
    return {"colours": game.colours}


def starts(env):
    """Return a function that returns nothing, because the pages themselves are kept."""
    return lambda: None


def replay_data(frames):
    """Return a recording, a list of `Frame`, as text.js unpacks it."""
    return {
        "frames": [[frame.action, rounded(frame.score), *lives_of(frame)] for frame in frames],
        "changes": changes_of(np.stack([frame.page for frame in frames])),
    }


def lives_of(frame):
    """Return the lives of a `Frame` as a list, which is empty if the game has none."""
    return [] if frame.lives is None else [frame.lives]


def rounded(score):
    """Return a score without the digits that only rounding has left, and as an int where it is one."""
    score = round(float(score), 4)
    return int(score) if score == int(score) else score


def changes_of(pages):
    """Return for each of pages (n, tokens) how it differs from the page before.

    Returns:
        a list of [position, text, position, text, ...]; the first one has the whole page.
    """
    changes = [[0, pages[0].tobytes().decode("ascii")]]
    for before, page in zip(pages, pages[1:]):
        changed = np.flatnonzero(page != before)
        runs = np.split(changed, np.flatnonzero(np.diff(changed) > JOINED) + 1) if len(changed) else []
        changes.append([])
        for run in runs:
            changes[-1] += [int(run[0]), page[run[0] : run[-1] + 1].tobytes().decode("ascii")]
    return changes


def things_of(pages):
    """Return the characters of pages (n, tokens) as `Things`: the rarest first, those that cannot be seen last."""
    counts = np.bincount(pages.ravel(), minlength=128)
    codes = sorted(np.flatnonzero(counts).tolist(), key=lambda code: (chr(code) in NAMES, counts[code]))
    index = np.zeros(128, int)
    index[codes] = np.arange(len(codes))
    names = [NAMES.get(chr(code), f"'{chr(code)}'") for code in codes]
    return Things(names, names, lambda pages: index[pages])
