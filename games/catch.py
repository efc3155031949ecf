"""Catch on a page of text, as a template for a game of your own: a ball falls, and a paddle catches or misses it.

An agent sees the page and nothing else, so whatever decides how the game goes on must be on it. A game is one ball.
It returns 1 for a catch and 0 for a miss; every ball can be caught, so perfect play returns 1.
"""

import gymnasium
import numpy as np

ROWS = 16
COLUMNS = 26  # without the newline at each line's end
PADDLE = "==="


class Catch(gymnasium.Env):
    metadata = {"render_modes": ["ansi"], "render_fps": 10}
    characters = " o=\n"  # a page has no others
    actions = ("stay", "left", "right")
    colours = {"o": (255, 255, 255), "=": (230, 110, 200)}  # RGB, for people; agents see none

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 127, (ROWS * (COLUMNS + 1),), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball_x = self.np_random.integers(COLUMNS)
        self.ball_y = 0
        self.paddle_x = (COLUMNS - len(PADDLE)) // 2  # the paddle's left end
        return self.observation(), {}

    def step(self, action):
        self.paddle_x += (0, -2, 2)[action]
        self.paddle_x = min(max(self.paddle_x, 0), COLUMNS - len(PADDLE))
        self.ball_y += 1
        landed = self.ball_y == ROWS - 1
        caught = landed and self.paddle_x <= self.ball_x < self.paddle_x + len(PADDLE)
        reward = 1.0 if caught else 0.0
        return self.observation(), reward, landed, False, {}

    def observation(self):
        return np.frombuffer(self.render().encode(), np.uint8).copy()

    def render(self):
        page = [[" "] * COLUMNS for _ in range(ROWS)]
        page[-1][self.paddle_x : self.paddle_x + len(PADDLE)] = PADDLE
        page[self.ball_y][self.ball_x] = "o"
        return "".join("".join(line) + "\n" for line in page)


if "Catch-v0" not in gymnasium.registry:  # a reload must not warn
    gymnasium.register("Catch-v0", entry_point="games.catch:Catch")
