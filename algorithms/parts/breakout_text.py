"""ALE Breakout as text: what the game keeps in its RAM, in words.

    Ball X: 99, Ball Y: 120, Paddle X: 72, Moving DOWN LEFT, Lives: 5, Score: 12

An action lasts some frames, and a ball that waits is served at once, so the text always has a ball in it.
"""

import string
from collections import deque

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from algorithms.parts.atari import make_game, restore_game, save_game

ACTIONS = "STAY", "RIGHT", "LEFT"
NOOP, FIRE, RIGHT, LEFT = range(4)  # as the game numbers them
BUTTONS = NOOP, RIGHT, LEFT
BALL_X, BALL_Y, PADDLE_X = 99, 101, 72  # bytes of the RAM (Anand et al. 2019)
PADDLE_WIDTH = 16
PADDLE_CENTRE = 9  # X of a ball over the middle of the paddle, less the paddle's X
WIDTH = 96  # bytes, of a text in the vector form
CHARACTERS = string.ascii_letters + string.digits + " ,:"


class BreakoutText(gym.Wrapper):
    """ALE/Breakout-v5 of single frames -> observations as text, actions as in ACTIONS.

    info: "life_lost" in this step; "score" in the game's own points so far; "ball" (x, y) and "paddle" x of the RAM.
    """

    def __init__(self, env, skip=4):
        """skip: frames that an action lasts."""
        super().__init__(env)
        self.skip, self.score, self.ball_before, self.ram = skip, 0, None, None
        self.observation_space, self.action_space = (
            gym.spaces.Text(WIDTH, charset=CHARACTERS),
            gym.spaces.Discrete(len(ACTIONS)),
        )

    def reset(self, *, seed=None, options=None):
        ram, info = self.env.reset(seed=seed, options=options)
        self.score, self.lives, self.ram = 0, info["lives"], ram.astype(int)  # bytes would wrap around when subtracted
        self.serve()
        return self.text(), self.info(life_lost=False)

    def step(self, action):
        self.ball_before, lives, points = self.ball, self.lives, 0.0
        for _ in range(self.skip):
            reward, terminated, truncated = self.press(BUTTONS[action])
            points += reward
            if terminated or truncated:
                break
        life_lost = self.lives < lives
        if not (terminated or truncated):
            reward, terminated, truncated = self.serve()
            points += reward
        return self.text(), points, terminated, truncated, self.info(life_lost)

    def serve(self):
        """FIRE until a ball flies -> points, terminated, truncated."""
        points, terminated, truncated = 0.0, False, False
        while self.ball[1] == 0 and not (terminated or truncated):
            reward, terminated, truncated = self.press(FIRE)
            points, self.ball_before = points + reward, None
        return points, terminated, truncated

    def press(self, button):
        ram, reward, terminated, truncated, info = self.env.step(button)
        self.ram, self.lives, self.score = ram.astype(int), info["lives"], self.score + int(reward)
        return reward, terminated, truncated

    @property
    def ball(self):
        return int(self.ram[BALL_X]), int(self.ram[BALL_Y])

    def info(self, life_lost):
        return {"life_lost": life_lost, "score": self.score, "ball": self.ball, "paddle": int(self.ram[PADDLE_X])}

    def text(self):
        (x, y), (x_before, y_before) = (
            self.ball,
            self.ball_before or self.ball,
        )  # a ball that was just served moves nowhere yet
        down, right = np.sign(y - y_before), np.sign(x - x_before)
        moving = (
            " ".join(word for word in (("", "DOWN", "UP")[down], ("", "RIGHT", "LEFT")[right]) if word) or "NOWHERE"
        )
        return (
            f"Ball X: {x}, Ball Y: {y}, Paddle X: {self.ram[PADDLE_X]}, Moving {moving}, Lives: {self.lives}, "
            f"Score: {self.score}"
        )

    def state_dict(self):
        """All that the game goes on from, random numbers too."""
        return {
            "game": save_game(self.env),
            "ram": self.ram,
            "score": self.score,
            "lives": self.lives,
            "ball_before": self.ball_before,
        }

    def load_state_dict(self, state):
        restore_game(self.env, state["game"])
        self.ram, self.score, self.lives = state["ram"], state["score"], state["lives"]
        self.ball_before = state["ball_before"] and tuple(state["ball_before"])
        if self.text() not in self.observation_space:
            raise ValueError(f"{self.text()!r} is no text of a game")


class ShapedReward(gym.Wrapper):
    """Adds hints to the points of `BreakoutText`, for training alone: 1 for each step in which a returned ball is still on its way up to
    the bricks, five or six a return, and how many of its own widths the paddle has come nearer to being under the ball. With a discount
    below 1 that amounts to a reward for every step near the ball."""

    def __init__(self, env, weight):
        """weight: of the hints, in points."""
        super().__init__(env)
        self.weight = weight

    def reset(self, **arguments):
        obs, info = self.env.reset(**arguments)
        self.ball, self.nearness = info["ball"], nearness(info)
        return obs, info

    def step(self, action):
        obs, points, terminated, truncated, info = self.env.step(action)
        ended = terminated or info["life_lost"]
        rising = not ended and self.ball[1] > info["ball"][1] and self.ball[1] > LOW
        hint = rising + (nearness(info) - self.nearness) * (not ended)
        self.ball, self.nearness = info["ball"], nearness(info)
        return obs, points + self.weight * hint, terminated, truncated, info

    def state_dict(self):
        return {"ball": self.ball, "nearness": self.nearness, "env": self.env.state_dict()}

    def load_state_dict(self, state):
        self.env.load_state_dict(state["env"])
        self.ball, self.nearness = tuple(state["ball"]), state["nearness"]


LOW = 150  # the ball's Y: bricks are above, the paddle is below


def nearness(info):
    """0 where the paddle is under the ball, and less by 1 for each paddle's width between them."""
    return -abs(info["ball"][0] - info["paddle"] - PADDLE_CENTRE) / PADDLE_WIDTH


class TextAsBytes(gym.ObservationWrapper):
    """Text -> its ASCII codes (WIDTH,) uint8, and zeros behind them."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 127, (WIDTH,), np.uint8)

    def observation(self, text):
        return np.frombuffer(text.encode("ascii").ljust(WIDTH, b"\0"), np.uint8)


def texts_of(obs):
    """ASCII codes (N, WIDTH), an array or a tensor on any device -> N texts."""
    obs = obs.cpu() if isinstance(obs, torch.Tensor) else obs
    return [bytes(row).rstrip(b"\0").decode("ascii") for row in np.asarray(obs, np.uint8)]


class BreakoutTexts(SyncVectorEnv):
    """N games side by side; observations (N, WIDTH) uint8 as `texts_of` reads them. `scores`: of the games that ended, in points."""

    def __init__(self, n, sticky=0.25, skip=4, shaping=0.0):
        """shaping: weight of the hints of `ShapedReward`; none if 0."""
        self.scores = deque(maxlen=100)

        def make():
            env = make_env(sticky, skip)
            return TextAsBytes(ShapedReward(env, shaping) if shaping else env)

        super().__init__([make] * n, autoreset_mode=AutoresetMode.SAME_STEP)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = super().step(actions)
        over = terminated | truncated
        if over.any():
            self.scores.extend(infos["final_info"]["score"][over].tolist())
        return obs, rewards, terminated, truncated, infos

    def state_dict(self):
        return {"envs": [env.env.state_dict() for env in self.envs], "scores": list(self.scores)}

    def load_state_dict(self, state):
        for env, saved in zip(self.envs, state["envs"]):
            env.env.load_state_dict(saved)
        self.scores = deque(state["scores"], maxlen=100)


def make_env(sticky=0.25, skip=4, render_mode=None):
    """A game of single text observations. sticky: probability that a frame repeats the action before instead."""
    return BreakoutText(make_game("ALE/Breakout-v5", sticky, obs_type="ram", render_mode=render_mode), skip)


def numbers_of(text):
    """What the text says of ball, paddle and lives -> Ball X, Ball Y, Paddle X, right (1, -1 for left, or 0), down, lives."""
    x, y, paddle, moving, lives, _ = (part.rpartition(": ")[2] for part in text.split(", "))
    return (
        int(x),
        int(y),
        int(paddle),
        ("RIGHT" in moving) - ("LEFT" in moving),
        ("DOWN" in moving) - ("UP" in moving),
        int(lives),
    )


def follow_the_ball(text):
    """What a person would write who reads the same text: the number of an action."""
    x, _, paddle, *_ = numbers_of(text)
    distance = x - paddle - PADDLE_CENTRE
    return 0 if abs(distance) <= 6 else 1 if distance > 0 else 2
