"""Writes one HTML file, which shows how a model plays, with its attention, and in which it plays on from any edit."""

import json
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch

from viewer.replay.attention import attention_shares, evenly_spaced, main_thing, order_of_heads, plain_gpt
from viewer.replay.kinds import kind_of
from viewer.replay.weights import written

HERE = Path(__file__).parent
PAGES_AT_ONCE = 256
SCRIPTS = ("gpt.js", "page.js", "look.js")  # in this order, before those of the kind
FINE, COARSE = 3, 2  # letters for each weight of the model itself, and of the earlier stages of its training


class Stage(NamedTuple):
    """A model at some point of its training."""

    label: str
    policy: torch.nn.Module  # a GPT


def replay_html(played, game, name, about, without=None, note=""):
    """Return the text of the HTML file.

    Args:
        played: a list of (`Stage`, the list of `Frame` that it played); all have the same GPTConfig. The last stage is
            the model itself. The weights of the others are written with COARSE letters, see weights.py.
        game: a `Game`.
        name, about: any text about the model.
        without: {head: score without it}, if that has been measured.
        note: any text about the earlier stages.
    """
    kind = kind_of(game)
    things = kind.things_of(np.stack([frame.page for _, frames in played for frame in frames]))
    policy = played[-1][0].policy
    letters = [COARSE] * (len(played) - 1) + [FINE]
    data = {
        "name": name,
        "about": about,
        "note": note,
        "actions": game.actions,
        "things": things.names,
        "config": vars(policy.config),
        "game": kind.game_data(game),
        "weights": {key: list(weight.shape) for key, weight in policy.state_dict().items()},
        "stages": [stage_data(*stage, n, kind, things) for stage, n in zip(played, letters)],
        "without": without or {},
    }
    # Without "<" no text from a checkpoint or a page can end the script element that holds the data, or begin another.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    scripts = "".join(f"<script>\n{read(script)}</script>\n" for script in (*SCRIPTS, *kind.SCRIPTS))
    return Template(read("page.html")).substitute(style=read("page.css"), scripts=scripts, kind=kind.KIND, data=text)


def read(name):
    """Return the text of a file that belongs to the page in the browser."""
    return (HERE / name).read_text(encoding="utf-8")


def stage_data(stage, frames, letters, kind, things):
    """Return what the page shows of a stage: its weights, what it has played, and what its heads look at."""
    gpt = plain_gpt(stage.policy)
    texts, largest = zip(*(written(weight, letters) for weight in gpt.state_dict().values()))
    pages = np.stack([frame.page for frame in frames])
    shares = attention_shares(gpt, evenly_spaced(pages), things).round(4)
    return {
        "label": stage.label,
        "letters": letters,
        "weights": "".join(texts),
        "largest": sum(largest, []),
        "values": values_of(stage.policy, pages),
        "shares": shares.tolist(),
        "names": [main_thing(of_head, things) for of_head in shares],
        "order": order_of_heads(shares, things),
        **kind.replay_data(frames),
    }


def values_of(policy, pages):
    """Return the values of pages (n, T) as a list of floats, to two digits after the point."""
    act = policy.inference_function()
    values = []
    for first in range(0, len(pages), PAGES_AT_ONCE):
        _, some = act(policy.encode(pages[first : first + PAGES_AT_ONCE]))
        values += some.cpu().tolist()
    return [round(value, 2) for value in values]
