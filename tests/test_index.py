"""docs/index.html, the page of the shipped model, is what its command writes today.

What the models chose and measured hangs on rounding, which differs between CPUs. So the page is written again from
the actions, values and shares that it holds, and these are compared with the models apart, as closely as they may be.
"""

import json
import re

import numpy as np
import pytest
import torch

import load_model
from docs import index
from policies import SHIPPED, load_policy
from viewer.replay import document
from viewer.replay.attention import attention_shares, evenly_spaced, plain_gpt
from viewer.replay.breakout import things_of

STALE = "docs/index.html is out of date; write it again:  python -m docs.index"
TEXT = index.OUT.read_text(encoding="utf-8")
RECORDED = json.loads(re.search(r'id="data">(.*?)</script>', TEXT, re.S)[1])["stages"]


@pytest.fixture(scope="module")
def shipped():
    """Return what `page_of` takes, with the recorded actions in place of the policies' own."""
    policy, meta = load_policy(SHIPPED)
    actions = iter("".join(game["actions"] for stage in RECORDED for game in stage["games"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_model, "greedy", lambda policy: lambda pages: [int(next(actions, "0"))])
        played = index.whole_games(policy, meta)
    assert [stage.label for stage, _ in played] == [stage["label"] for stage in RECORDED], STALE
    return played


def test_the_page_is_what_the_command_writes(shipped, monkeypatch):
    """Its scripts and style, the weights, the games by today's rules and the table of heads.md are in it."""
    values = iter([stage["values"] for stage in RECORDED])
    shares = iter([np.array(stage["shares"]) for stage in RECORDED])
    monkeypatch.setattr(document, "values_of", lambda *_: next(values))
    monkeypatch.setattr(document, "attention_shares", lambda *_: next(shares))
    written = index.page_of(shipped)
    same = written == TEXT  # alone, because pytest would compare a million characters
    assert same, STALE
    assert len(TEXT.encode()) < 1_000_000 and sorted(index.scores_without()) == [*range(16)]


def test_the_actions_and_values_are_the_models(shipped):
    """On a sample of its pages each stage prefers the recorded action, up to a tie, and gives the recorded value."""
    for (stage, frames), recorded in zip(shipped, RECORDED):
        sample = range(0, len(frames) - 1, 20)
        with torch.no_grad():
            logits, values = stage.policy(np.stack([frames[i].page for i in sample]))
        chosen = logits[range(len(sample)), [frames[i].action for i in sample]]
        assert (chosen > logits.max(1).values - 1e-3).all(), STALE
        assert np.abs(values.numpy() - [recorded["values"][i] for i in sample]).max() < 0.01, STALE


def test_the_shares_of_attention_are_the_models(shipped):
    """The first stage stands for all, because it has few pages."""
    (stage, frames), *_ = shipped
    pages = np.stack([frame.page for frame in frames])
    shares = attention_shares(plain_gpt(stage.policy), evenly_spaced(pages), things_of(pages))
    assert np.abs(shares - RECORDED[0]["shares"]).max() < 1e-3, STALE
