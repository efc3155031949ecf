"""One HTML file that replays a game with the model's attention, and computes anew what the model makes of an edited page.

page.html is the frame, page.css its looks, gpt.js the model in the browser, page.js everything that moves.
"""

import base64
import json
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch

from breakout_ascii import (
    BRICK,
    BRICK_COLUMNS,
    BRICK_ROWS,
    BRICK_TOP,
    BRICK_WIDTH,
    CHARACTERS,
    COLUMNS,
    LIVES,
    PADDLE,
    PADDLE_MAX,
    PADDLE_ROW,
    ROWS,
    SERVE_ROW,
)
from viewer.replay.attention import THINGS, name_of, plain_gpt, shares, sort_heads, spread

HERE = Path(__file__).parent
ACTIONS = ["stay", "left", "right"]
GAME = {
    "characters": CHARACTERS,
    "rows": ROWS,
    "columns": COLUMNS,
    "brick": BRICK,
    "brick_top": BRICK_TOP,
    "brick_rows": BRICK_ROWS,
    "brick_columns": BRICK_COLUMNS,
    "paddle": PADDLE,
    "paddle_row": PADDLE_ROW,
    "paddle_max": PADDLE_MAX,
    "serve_row": SERVE_ROW,
}
GAME_OVER, RECORDING_ENDS = -1, -2
PAGES_AT_ONCE = 256


class Frame(NamedTuple):
    page: np.ndarray  # (1944,) uint8, what was read
    action: int  # what was done; or GAME_OVER or RECORDING_ENDS, for a page that nothing was done on
    score: int  # before that
    lives: int


class Stage(NamedTuple):
    label: str
    policy: torch.nn.Module  # a GPT


def record(steps):
    """The steps that load_model.play yields -> yields a `Frame` for each page that was read, and for the last of each game."""
    score, lives = 0, LIVES
    for step in steps:
        yield Frame(step.page, step.action, score, lives)
        score, lives = step.info["score"], step.info["lives"]
        if step.last:
            yield Frame(step.next_page, GAME_OVER if step.over else RECORDING_ENDS, score, lives)
            score, lives = 0, LIVES


def html(frames, stages, name, about):
    """frames: a list of what `record` yields. stages: of one architecture; the last one played. name, about: of the model, any text. -> the file's text."""
    pages = np.stack([frame.page for frame in frames])
    data = {
        "name": name,
        "about": about,
        "game": GAME,
        "actions": ACTIONS,
        "things": THINGS,
        "config": vars(stages[-1].policy.config),
        "frames": [[*place_of(frame.page), frame.action, frame.score, frame.lives] for frame in frames],
        "walls": walls_of(pages),
        "weights": [[key, weight.numel()] for key, weight in stages[-1].policy.state_dict().items()],
        "stages": [describe(stage, pages) for stage in stages],
    }
    parts = {"style": "page.css", "gpt": "gpt.js", "script": "page.js"}
    template = Template((HERE / "page.html").read_text(encoding="utf-8"))
    text = json.dumps(data, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no text of a checkpoint can end the element, or begin another
    return template.substitute(
        {part: (HERE / file).read_text(encoding="utf-8") for part, file in parts.items()}, data=text
    )


def place_of(page):
    """A page (1944,) -> column and row of the ball, column of the paddle's left end."""
    row, column = divmod(int((page == ord("O")).argmax()), COLUMNS)
    left, right = np.flatnonzero(page == ord("="))[[0, -1]] % COLUMNS
    whole = right - left == len(PADDLE) - 1
    return (
        column,
        row,
        int(left if whole else min(left, column)),
    )  # the last ball of a game may lie over an end of the paddle


def walls_of(pages):
    """(n, 1944) -> {frame: its bricks row by row, a string of 0 and 1}, for each frame whose wall differs from the one before."""
    rows = pages.reshape(-1, ROWS, COLUMNS)[
        :, BRICK_TOP : BRICK_TOP + BRICK_ROWS, 1 : 1 + BRICK_COLUMNS * BRICK_WIDTH : BRICK_WIDTH
    ]
    bricks = (rows == ord(BRICK[0])).reshape(len(pages), -1)
    changed = np.flatnonzero(np.r_[True, (bricks[1:] != bricks[:-1]).any(1)])
    return {int(i): "".join("01"[brick] for brick in bricks[i].astype(int)) for i in changed}


def describe(stage, pages):
    """-> what page.js shows of a stage: its weights as base64, its value of every page, and what its heads look at."""
    gpt = plain_gpt(stage.policy)
    weights = np.concatenate([weight.numpy().ravel() for weight in gpt.state_dict().values()]).astype("<f4")
    found = shares(gpt, spread(pages))
    return {
        "label": stage.label,
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "values": values_of(stage.policy, pages),
        "shares": found.round(5).tolist(),
        "names": [name_of(head) for head in found],
        "order": sort_heads(found),
    }


def values_of(policy, pages):
    """-> a list of n floats, to four digits."""
    act, values = policy.inference_cache(), []
    for first in range(0, len(pages), PAGES_AT_ONCE):
        values += act(policy.encode(pages[first : first + PAGES_AT_ONCE]))[1].cpu().tolist()
    return [round(value, 4) for value in values]
