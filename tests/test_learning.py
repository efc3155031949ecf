"""Trainings that take minutes, until something is learned, so these tests run only with --slow."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PAGE

from breakout_ascii import BreakoutAsciiVec
from model import GPT, GPTConfig
from train_ppo import main


@pytest.mark.slow
def test_the_initial_weights_can_see():
    """The untrained GPT can tell where the ball and the paddle are.

    Supervised by a tracker's actions on varied pages, it imitates them after 300 thousand frames.
    """
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**PAGE))
    env = BreakoutAsciiVec(256, varied_starts=1.0)
    optimizer = torch.optim.Adam(gpt.parameters(), lr=1e-3)
    obs, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    correct = []
    for _ in range(300_000 // 256):
        offset = env.games.ball_x - env.games.paddle_x - 3
        target = np.where(np.abs(offset) <= 1, 0, np.where(offset < 0, 1, 2))
        logits, _ = gpt(torch.from_numpy(obs))
        correct.append((logits.argmax(-1).numpy() == target).mean())
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(target)).backward()
        optimizer.step()
        obs, *_ = env.step(np.where(rng.random(256) < 0.5, target, rng.integers(3, size=256)))
    assert np.mean(correct[-20:]) > 0.95


@pytest.mark.slow
def test_default_constants_learn(tmp_path):
    """After 600 thousand steps the score is above 400: random play has 82, a public attempt 320."""
    main(["--num_steps", "600000", "--run_dir", str(tmp_path / "run"), "--device", "cpu"])
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        assert max(float(row["eval_score"] or 0) for row in csv.DictReader(file)) > 400
