import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluation
from breakout_ascii import BreakoutAscii
from evaluation import SERVES, Background, evaluate, exact, returned, sampled


class Tracker(torch.nn.Module):
    """Chases the ball with the paddle's centre, still while it is within `slack` columns; reads the page alone."""

    def __init__(self, slack):
        super().__init__()
        self.slack = torch.nn.Parameter(torch.tensor(float(slack)))

    def forward(self, tokens):
        pages = tokens.view(-1, 24, 81)
        ball = (pages == ord("O")).any(1).int().argmax(1)
        offset = ball - ((pages[:, 22] == ord("=")).int().argmax(1) + 3)
        logits = torch.stack([self.slack + 0.5 - offset.abs(), -offset * 1.0, offset * 1.0], dim=1)
        logits[:, 1:][offset.abs() <= self.slack] = -100
        return logits * 1.0, torch.zeros(len(tokens))


class Still(Tracker):
    def forward(self, tokens):
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(tokens), 3), torch.zeros(len(tokens))


def play_one(policy, serves, limit):
    """The slow way: one game, every step to the end."""
    env = BreakoutAscii(max_episode_steps=limit)
    obs, _ = env.reset(options={"serves": serves})
    for step in range(1, limit + 1):
        obs, _, terminated, truncated, info = env.step(int(policy(torch.from_numpy(obs[None]))[0].argmax()))
        if terminated or truncated:
            return info["score"], step, info["bricks"]


@pytest.mark.parametrize("slack, limit", [(1, 5000), (0, 2500)])
def test_exact_equals_games_played_one_by_one(slack, limit):
    """The dead-zone tracker clears every wall; the one that chases the centre is caught in a loop."""
    with torch.no_grad():
        result = exact(Tracker(slack), limit)
        chosen = [0, 13, 31]
        slow = np.array([play_one(Tracker(slack), SERVES[i], limit) for i in chosen])
    assert result["games"] == 32
    if slack:
        assert result["score"] == result["min"] == 960 and result["cleared"] == 32
        assert (slow[:, 0] == 960).all() and 1700 < result["mean_length"] < 1950
    else:
        assert result["mean_length"] == limit and result["cleared"] == 0
        assert {result["min"], result["max"]} == {680, 740} >= set(slow[:, 0])


def test_a_loop_is_noticed_before_truncation(monkeypatch):
    steps = []
    greedy = evaluation.greedy
    monkeypatch.setattr(evaluation, "greedy", lambda *args: steps.append(0) or greedy(*args))
    assert exact(Tracker(0))["mean_length"] == 5000 and len(steps) < 4500


def test_a_paddle_that_stands_still():
    """It misses almost every ball that does not happen to fall on it; the 32 games are short, none is cleared."""
    result = evaluate(Still(0))
    scores = [play_one(Still(0), serves, 5000)[0] for serves in SERVES]
    assert result["score"] == np.mean(scores) and (result["min"], result["max"]) == (min(scores), max(scores))
    assert result["returned"] < 0.2 < 0.9 < returned(Tracker(1))


def test_sampled_games_follow_their_seed():
    results = [sampled(Still(0), 4, seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert results[0]["games"] == 4 and results[0]["min"] <= results[0]["score"] <= results[0]["max"]


def who(policy):
    if policy.slack == 2:
        os._exit(1)
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches every process of a terminal
    return {"slack": policy.slack.item(), "process": os.getpid()}


def test_in_the_background():
    background = Background(who, "cpu")
    for slack in (0, 1):
        future = background(Tracker(slack))
        assert future.result() == {"slack": slack, "process": multiprocessing.active_children()[-1].pid}
        assert not future.done()
    two = Background(who, "cpu", processes=2)
    futures = [two(Tracker(slack)) for slack in (0, 1)]
    assert len({future.result()["process"] for future in futures}) == 2
    for _ in range(2):
        with pytest.raises(ChildProcessError, match="the process that evaluates has died"):
            background(Tracker(2)).result()


def test_the_background_ends_with_the_training(tmp_path):
    """Even with one that is killed: its output, which the background shares, is closed."""
    program = """
import os, signal
from evaluation import Background, evaluate
if __name__ == "__main__":
    Background(evaluate, "cpu")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(evaluation.__file__)}
    subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, stdout=subprocess.PIPE, timeout=60)
