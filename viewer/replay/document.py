"""Writes one HTML file, which replays games with the model's attention and computes its answer to an edited page."""

import base64
import json
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch

from viewer.replay.attention import attention_shares, evenly_spaced, main_thing, order_of_heads, plain_gpt
from viewer.replay.kinds import kind_of

HERE = Path(__file__).parent
PAGES_AT_ONCE = 256


class Stage(NamedTuple):
    """A model at some point of its training. The page in the browser has a button for each."""

    label: str
    policy: torch.nn.Module  # a GPT


def replay_html(frames, stages, game, name, about):
    """Return the text of the HTML file.

    Args:
        frames: a list of `Frame`.
        stages: a list of `Stage`, models with the same GPTConfig; the last one has played.
        game: a `Game`.
        name, about: any text about the model.
    """
    kind = kind_of(game)
    pages = np.stack([frame.page for frame in frames])
    things = kind.things_of(pages)
    data = {
        "name": name,
        "about": about,
        "actions": game.actions,
        "things": things.names,
        "config": vars(stages[-1].policy.config),
        "weights": [[key, weight.numel()] for key, weight in stages[-1].policy.state_dict().items()],
        "stages": [stage_data(stage, pages, things) for stage in stages],
        **kind.replay_data(frames, game),
    }
    # Without "<" no text from a checkpoint or a page can end the script element that holds the data, or begin another.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    names = {"style": "page.css", "gpt": "gpt.js", "script": "page.js", "kind_script": f"{kind.KIND}.js"}
    files = {part: read(name) for part, name in names.items()}
    return Template(read("page.html")).substitute(files, kind=kind.KIND, data=text)


def read(name):
    """Return the text of a file that belongs to the page in the browser."""
    return (HERE / name).read_text(encoding="utf-8")


def stage_data(stage, pages, things):
    """Return what page.js shows of a stage: its weights, its value of every page, and what its heads look at."""
    gpt = plain_gpt(stage.policy)
    weights = np.concatenate([weight.numpy().ravel() for weight in gpt.state_dict().values()]).astype("<f4")
    shares = attention_shares(gpt, evenly_spaced(pages), things)
    return {
        "label": stage.label,
        "weights": base64.b64encode(weights.tobytes()).decode(),
        "values": values_of(stage.policy, pages),
        "shares": shares.round(5).tolist(),
        "names": [main_thing(of_head, things) for of_head in shares],
        "order": order_of_heads(shares, things),
    }


def values_of(policy, pages):
    """Return the values of pages (n, T) as a list of floats, to four digits."""
    act = policy.inference_function()
    values = []
    for first in range(0, len(pages), PAGES_AT_ONCE):
        _, some = act(policy.encode(pages[first : first + PAGES_AT_ONCE]))
        values += some.cpu().tolist()
    return [round(value, 4) for value in values]
