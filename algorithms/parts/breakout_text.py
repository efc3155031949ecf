"""ALE Breakout as text, written from the bytes of the game's RAM.

    Ball X: 99, Ball Y: 120, Paddle X: 72, Moving DOWN LEFT, Lives: 5, Score: 12

A ball that waits to be served is served at once, so that the text always has one.
"""

import string
from collections import deque

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from algorithms.parts.atari import make_game, restore_game, save_game

ACTIONS = ("STAY", "RIGHT", "LEFT")
NOOP, FIRE, RIGHT, LEFT = 0, 1, 2, 3  # the actions of the game itself
BUTTONS = (NOOP, RIGHT, LEFT)  # for each of ACTIONS
BALL_X, BALL_Y, PADDLE_X = 99, 101, 72  # bytes of the RAM (Anand et al. 2019)
PADDLE_WIDTH = 16
PADDLE_CENTRE = 9  # how much larger the ball's X is than the paddle's where the ball is above the middle of the paddle
BRICKS_Y = 150  # a ball with a larger Y is below the bricks
TEXT_LENGTH = 96  # bytes of an observation, which is longer than any text
CHARACTERS = string.ascii_letters + string.digits + " ,:"


# --- games ------------------------------------------------------------------------------------------------------------


def make_env(sticky=0.25, skip=4, render_mode=None):
    """One game with texts as observations.

    Args:
        sticky: the probability that a frame repeats the previous action.
        skip: the frames that an action lasts.
    """
    return BreakoutText(make_game("ALE/Breakout-v5", sticky, obs_type="ram", render_mode=render_mode), skip)


class BreakoutText(gym.Wrapper):
    """Turns the RAM of ALE/Breakout-v5 into text, and the actions of ACTIONS into buttons.

    An info has "life_lost" in this step, the "score" so far, and the position of "ball" (x, y) and "paddle" x.
    """

    def __init__(self, env, skip=4):
        super().__init__(env)
        self.skip = skip
        self.observation_space = gym.spaces.Text(TEXT_LENGTH, charset=CHARACTERS)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self.ram = None
        self.score = 0
        self.lives = 0
        self.ball_before = None  # where the ball was at the previous step; None if it has been served since then

    def reset(self, *, seed=None, options=None):
        ram, info = self.env.reset(seed=seed, options=options)
        self.ram = ram.astype(int)  # as bytes, differences would wrap around
        self.score = 0
        self.lives = info["lives"]
        self.serve()
        return self.text(), self.info(life_lost=False)

    def step(self, action):
        self.ball_before = self.ball
        lives_before = self.lives
        points = 0.0
        for _ in range(self.skip):
            reward, terminated, truncated = self.press(BUTTONS[action])
            points += reward
            if terminated or truncated:
                break
        life_lost = self.lives < lives_before
        if not (terminated or truncated):
            reward, terminated, truncated = self.serve()
            points += reward
        return self.text(), points, terminated, truncated, self.info(life_lost)

    def serve(self):
        """Press FIRE until there is a ball. Returns points, terminated and truncated, as `press` does."""
        points = 0.0
        terminated = False
        truncated = False
        while self.ball[1] == 0 and not (terminated or truncated):
            reward, terminated, truncated = self.press(FIRE)
            points += reward
            self.ball_before = None
        return points, terminated, truncated

    def press(self, button):
        """Play one frame. Returns its reward, terminated and truncated."""
        ram, reward, terminated, truncated, info = self.env.step(button)
        self.ram = ram.astype(int)
        self.lives = info["lives"]
        self.score += int(reward)
        return reward, terminated, truncated

    @property
    def ball(self):
        return int(self.ram[BALL_X]), int(self.ram[BALL_Y])

    def info(self, life_lost):
        return {"life_lost": life_lost, "score": self.score, "ball": self.ball, "paddle": int(self.ram[PADDLE_X])}

    def text(self):
        """The observation."""
        x, y = self.ball
        x_before, y_before = self.ball_before or self.ball  # a ball that was just served has not moved
        directions = []
        if y != y_before:
            directions.append("DOWN" if y > y_before else "UP")
        if x != x_before:
            directions.append("RIGHT" if x > x_before else "LEFT")
        moving = " ".join(directions) or "NOWHERE"
        return (
            f"Ball X: {x}, Ball Y: {y}, Paddle X: {self.ram[PADDLE_X]}, Moving {moving}, "
            f"Lives: {self.lives}, Score: {self.score}"
        )

    def state_dict(self):
        """Everything that the game goes on from, its random numbers included."""
        return {
            "game": save_game(self.env),
            "ram": self.ram,
            "score": self.score,
            "lives": self.lives,
            "ball_before": self.ball_before,
        }

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken. Raises ValueError for a state that no game can be in."""
        restore_game(self.env, state["game"])
        self.ram = state["ram"]
        self.score = state["score"]
        self.lives = state["lives"]
        self.ball_before = tuple(state["ball_before"]) if state["ball_before"] else None
        if self.text() not in self.observation_space:
            raise ValueError(f"{self.text()!r} is no text of a game")


class ShapedReward(gym.Wrapper):
    """Adds hints to the points of `BreakoutText`, for training only.

    A step in which the ball is on its way up to the bricks has a hint of 1; each returned ball takes four to eight of
    them. A step in which the paddle comes nearer to the place below the ball has a hint of the distance, in paddle
    widths; with a discount below 1 this amounts to a reward for every step near the ball.
    """

    def __init__(self, env, weight):
        """weight: points for a hint of 1."""
        super().__init__(env)
        self.weight = weight

    def reset(self, **arguments):
        obs, info = self.env.reset(**arguments)
        self.ball = info["ball"]
        self.nearness = nearness(info)
        return obs, info

    def step(self, action):
        obs, points, terminated, truncated, info = self.env.step(action)
        hint = 0.0
        if not (terminated or info["life_lost"]):
            hint = nearness(info) - self.nearness
            if self.ball[1] > info["ball"][1] and self.ball[1] > BRICKS_Y:
                hint += 1
        self.ball = info["ball"]
        self.nearness = nearness(info)
        return obs, points + self.weight * hint, terminated, truncated, info

    def state_dict(self):
        return {"ball": self.ball, "nearness": self.nearness, "env": self.env.state_dict()}

    def load_state_dict(self, state):
        self.env.load_state_dict(state["env"])
        self.ball = tuple(state["ball"])
        self.nearness = state["nearness"]


def nearness(info):
    """0 where the paddle is below the ball, and -1 for each paddle width between them."""
    return -abs(info["ball"][0] - info["paddle"] - PADDLE_CENTRE) / PADDLE_WIDTH


# --- texts as arrays --------------------------------------------------------------------------------------------------


class TextAsBytes(gym.ObservationWrapper):
    """Turns a text into its ASCII codes, (TEXT_LENGTH,) uint8, followed by zeros."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 127, (TEXT_LENGTH,), np.uint8)

    def observation(self, text):
        return np.frombuffer(text.encode("ascii").ljust(TEXT_LENGTH, b"\0"), np.uint8)


def texts_of(obs):
    """The texts that `TextAsBytes` turned into codes (N, TEXT_LENGTH), an array or a tensor on any device."""
    if isinstance(obs, torch.Tensor):
        obs = obs.cpu()
    return [bytes(row).rstrip(b"\0").decode("ascii") for row in np.asarray(obs, np.uint8)]


class BreakoutTexts(SyncVectorEnv):
    """N games side by side, with observations (N, TEXT_LENGTH) uint8 that `texts_of` reads.

    `scores` has the scores of the games that have ended, without hints.
    """

    def __init__(self, n, sticky=0.25, skip=4, shaping=0.0):
        """shaping: the weight of the hints of `ShapedReward`; none if 0."""
        self.scores = deque(maxlen=100)

        def make():
            env = make_env(sticky, skip)
            if shaping:
                env = ShapedReward(env, shaping)
            return TextAsBytes(env)

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


# --- reading a text without a language model --------------------------------------------------------------------------


def numbers_of(text):
    """The numbers in a text: ball X, ball Y, paddle X, the ball's direction to the right and down, and the lives.

    A direction is 1, -1 for the opposite one, or 0.
    """
    x, y, paddle, moving, lives, _ = text.split(", ")
    right = ("RIGHT" in moving) - ("LEFT" in moving)
    down = ("DOWN" in moving) - ("UP" in moving)
    return number_in(x), number_in(y), number_in(paddle), right, down, number_in(lives)


def number_in(part):
    """The number in a part of a text, such as 99 in "Ball X: 99"."""
    return int(part.rpartition(": ")[2])


def follow_the_ball(text):
    """The action of a simple rule: move the paddle below the ball."""
    x, _, paddle, _, _, _ = numbers_of(text)
    distance = x - paddle - PADDLE_CENTRE
    if abs(distance) <= 6:
        return ACTIONS.index("STAY")
    return ACTIONS.index("RIGHT" if distance > 0 else "LEFT")
