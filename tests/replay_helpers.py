"""Recorded games, a game that is hard to show, and what a model computes: what the tests of a replay share."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

from breakout_ascii import BreakoutAsciiVec
from games.game import BREAKOUT, load_game
from load_model import play
from policies import SHIPPED, load_policy, make_gpt
from viewer.replay.document import COARSE, Stage, replay_html
from viewer.replay.kinds import kind_of
from viewer.replay.recording import record
from viewer.replay.weights import rounded

CPU = torch.device("cpu")
GAME = load_game(BREAKOUT)


def recorded(policy, *limits, game=GAME, **options):
    """Return the frames of a policy's play."""
    env = game.make()
    return list(record(play(policy, env, *limits, **options), kind_of(game).starts(env)))


def write_replay(path, policy, frames, game=GAME):
    """Write the page of one model, without a name."""
    path.write_text(replay_html([(Stage("", policy), frames)], game, "", ""), encoding="utf-8")
    return path


def text_of(page):
    return bytes(page).decode()


def data_of(text):
    """Return the data in the text of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def random_pages(n, seed=0):
    """Return pages of random play from varied starts."""
    env = BreakoutAsciiVec(n, varied_starts=1.0)
    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        obs, *_ = env.step(rng.integers(3, size=n))
    return obs


class Markup(gym.Env):
    """A game whose pages, actions and rewards are as hard to show as any: markup, quotes, 25 actions, a fine of -0.1.

    Each action writes somewhere. Now and then a life is lost; an episode has 40 steps.
    """

    ROWS, COLUMNS = 5, 33
    actions = ("<b>stay</b>", 'a "quoted" name', *(f"action {i}" for i in range(2, 25)))
    colours = {"<": (255, 80, 80), '"': (90, 200, 255)}
    text = r"""</script><script>alert(1)</script> <!-- &amp; ${data} $data '"` \\ \u003c"""

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 127, (self.ROWS, self.COLUMNS), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.page = np.frombuffer(self.text.ljust(self.ROWS * self.COLUMNS).encode(), np.uint8).copy()
        self.steps = 0
        self.lives = 3
        return self.page.reshape(self.ROWS, self.COLUMNS).copy(), {"lives": self.lives}

    def step(self, action):
        self.steps += 1
        self.page[self.np_random.integers(len(self.page))] = ord("<") + action
        self.lives -= int(self.steps % 20 == 0)
        reward = 1.0 if self.page[0] != ord("<") else -0.1
        page = self.page.reshape(self.ROWS, self.COLUMNS).copy()
        return page, reward, False, self.steps == 40, {"lives": np.int64(self.lives)}


def numbers(policy, pages):
    """Return probabilities, values and predicted changes of a policy on pages."""
    with torch.no_grad():
        features = policy.features(policy.encode(pages))
        logits, values = policy.heads(features)
        return logits.softmax(-1).numpy(), values.numpy(), policy.change_head(features).sigmoid().numpy()


# The page in a browser


class Replay(NamedTuple):
    """Holds a page for the browser, and what it was made of: the last one of each is of the model itself."""

    path: Path
    recordings: list  # of frames, for each stage
    policies: list

    @property
    def frames(self):
        return self.recordings[-1]


def write_shipped(path):
    """Write a replay of 1000 steps, with an untrained model, whose weights are rounded, as the first stage."""
    policy, _ = load_policy(SHIPPED)
    torch.manual_seed(0)
    untrained = make_gpt(policy.config, CPU)
    rounded(untrained, COARSE)
    recordings = [recorded(untrained, 400, sample=True), recorded(policy, 1000)]
    hostile = "<img src=x onerror=alert(1)>"
    stages = [Stage("start", untrained), Stage(hostile, policy)]
    path.write_text(replay_html(list(zip(stages, recordings)), GAME, hostile, hostile, {3: 940}), encoding="utf-8")
    return Replay(path, recordings, [untrained, policy])


def wait_for(page, expression):
    """Wait until an expression is true. Playwright's own function would evaluate a string, which the page forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 30 s: {expression}")


def mouse_on(page, rows=24, columns=80):
    """Return a function from a cell (row, column) to its middle in pixels, x and y."""
    box = page.locator("#page").bounding_box()
    return lambda row, column: (
        box["x"] + (column + 0.5) * box["width"] / columns,
        box["y"] + (row + 0.5) * box["height"] / rows,
    )


def check_answer(page, policy):
    """Compare the answer that is shown with PyTorch's. Returns the page that is shown, (rows * columns,) uint8."""
    tokens = np.frombuffer(page.evaluate("textOf(pageOf(current()))").encode(), np.uint8).copy()
    (probabilities,), (value,), (changes,) = numbers(policy, tokens[None])
    np.testing.assert_allclose(page.evaluate("answer.probabilities"), probabilities, atol=1e-4)
    np.testing.assert_allclose(page.evaluate("[...answer.changes]"), changes, atol=1e-4)
    np.testing.assert_allclose(page.evaluate("answer.value"), value, atol=1e-4, rtol=1e-4)
    assert page.locator("#value").text_content() == page.evaluate("answer.value.toFixed(3)")
    return tokens
