"""Writes one HTML file, which replays games with the model's attention and computes its answer to an edited page."""

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
    BRICK_LEFT,
    BRICK_ROWS,
    BRICK_TOP,
    CHARACTERS,
    COLUMNS,
    PADDLE,
    PADDLE_MAX,
    PADDLE_MIDDLE,
    PADDLE_ROW,
    ROWS,
    SERVE_ROW,
)
from viewer.replay.attention import THINGS, attention_shares, evenly_spaced, main_thing, order_of_heads, plain_gpt
from viewer.replay.recording import ball_and_paddle, changed_walls

HERE = Path(__file__).parent
ACTIONS = ["stay", "left", "right"]
GAME = {  # for page.js
    "characters": CHARACTERS,
    "rows": ROWS,
    "columns": COLUMNS,
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
PAGES_AT_ONCE = 256


class Stage(NamedTuple):
    """A model at some point of its training. The page in the browser has a button for each."""

    label: str
    policy: torch.nn.Module  # a GPT


def replay_html(frames, stages, name, about):
    """Return the text of the HTML file.

    Args:
        frames: a list of `Frame`.
        stages: a list of `Stage`, models with the same GPTConfig; the last one has played.
        name, about: any text about the model.
    """
    pages = np.stack([frame.page for frame in frames])
    data = {
        "name": name,
        "about": about,
        "game": GAME,
        "actions": ACTIONS,
        "things": THINGS,
        "config": vars(stages[-1].policy.config),
        "frames": [[*ball_and_paddle(frame.page), frame.action, frame.score, frame.lives] for frame in frames],
        "walls": changed_walls(pages),
        "weights": [[key, weight.numel()] for key, weight in stages[-1].policy.state_dict().items()],
        "stages": [stage_data(stage, pages) for stage in stages],
    }
    # Without "<" no text from a checkpoint can end the script element that holds the data, or begin another one.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page, style, gpt, script = (
        (HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "gpt.js", "page.js")
    )
    return Template(page).substitute(style=style, gpt=gpt, script=script, data=text)


def stage_data(stage, pages):
    """Return what page.js shows of a stage: its weights, its value of every page, and what its heads look at."""
    gpt = plain_gpt(stage.policy)
    weights = np.concatenate([weight.numpy().ravel() for weight in gpt.state_dict().values()]).astype("<f4")
    shares = attention_shares(gpt, evenly_spaced(pages))
    return {
        "label": stage.label,
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "values": values_of(stage.policy, pages),
        "shares": shares.round(5).tolist(),
        "names": [main_thing(of_head) for of_head in shares],
        "order": order_of_heads(shares),
    }


def values_of(policy, pages):
    """Return the values of pages (n, 1944) as a list of floats, to four digits."""
    act = policy.inference_function()
    values = []
    for first in range(0, len(pages), PAGES_AT_ONCE):
        _, some = act(policy.encode(pages[first : first + PAGES_AT_ONCE]))
        values += some.cpu().tolist()
    return [round(value, 4) for value in values]
