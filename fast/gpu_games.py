"""Breakout's games as tensors, so that a training need not leave the GPU.

The rules are those of `breakout_ascii.Games`, which run on tensors as they are. This file adds two things that a CUDA
graph needs: drawing takes the same operations in every step, and tensors keep their addresses.
"""

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete

from breakout_ascii import (
    BRICK,
    BRICK_COLUMNS,
    BRICK_LEFT,
    BRICK_ROWS,
    BRICK_TOP,
    BRICK_WIDTH,
    COLUMNS,
    EMPTY_PAGE,
    LIVES,
    MAX_EPISODE_STEPS,
    PADDLE,
    PADDLE_MOVES,
    PADDLE_ROW,
    RIGHT_WALL,
    TOKENS,
    WALL,
    Games,
    RandomNumbers,
    new_games,
)
from rollout_buffer import copy_into, select


class TensorGames(Games):
    """`Games` whose arrays are tensors on one device.

    The rules make new tensors in each step, but a CUDA graph finds tensors by their addresses. So the games live in
    `buffers`, and `copy_back` copies the new tensors there.
    """

    xp = torch

    def __init__(self, num_games, device):
        self.device = device
        super().__init__(num_games)
        whole_page = EMPTY_PAGE.copy()  # a page with all bricks
        whole_page[WALL] = list((BRICK * BRICK_COLUMNS).encode())
        is_brick = (whole_page != EMPTY_PAGE).ravel()
        cell = np.arange(TOKENS)
        row = cell // COLUMNS - BRICK_TOP
        column = (cell % COLUMNS - BRICK_LEFT) // BRICK_WIDTH
        brick = np.where(is_brick, row * BRICK_COLUMNS + column, BRICK_ROWS * BRICK_COLUMNS)
        self.cell = self.array(cell)
        self.brick = self.array(brick)  # the index of the brick in each cell; without a brick, one after the last index
        self.empty_page = self.array(EMPTY_PAGE.ravel())
        self.whole_page = self.array(whole_page.ravel())
        self.buffers = {name: getattr(self, name) for name in [*self.STATE, "pages"]}

    def array(self, x):
        return torch.as_tensor(x, device=self.device)

    def draw(self, *_):
        """Draw all pages whole, because a CUDA graph cannot hold a number of changed cells that varies."""
        bricks = F.pad(self.bricks.flatten(1), (0, 1))  # False after the last brick, for the cells without one
        pages = torch.where(bricks[:, self.brick], self.whole_page, self.empty_page)  # (N, 1944)
        offset = self.cell - (PADDLE_ROW * COLUMNS + self.paddle_x).unsqueeze(1)
        pages = torch.where((offset >= 0) & (offset < len(PADDLE)), ord(PADDLE[0]), pages)
        pages = torch.where(self.cell == (self.ball_y * COLUMNS + self.ball_x).unsqueeze(1), ord("O"), pages)
        self.pages = pages.view_as(self.pages)

    redraw = draw

    def copy_back(self):
        """Copy the state and the pages into the buffers."""
        for name, buffer in self.buffers.items():
            setattr(self, name, buffer.copy_(getattr(self, name)))

    def use_buffers(self):
        """Return to the buffers, because a CUDA graph whose recording failed half-way leaves tensors of its own."""
        for name, buffer in self.buffers.items():
            setattr(self, name, buffer)

    def state_dict(self):
        return {name: getattr(self, name).cpu().numpy().copy() for name in self.STATE}


class DeviceBreakout:
    """N games for training as tensors on one device; in the step that ends a game, the next one starts.

    It is used like `BreakoutAsciiVec`. In `step` the host never waits for the device, which takes these differences:

    - `step` takes and returns tensors. Rewards are integers, and the returned observations change with the next step.
    - `start_rollout` draws the random numbers of all steps of a rollout.
    - Games that have become too long are truncated only in `start_rollout`, where a rollout has ended and its returns
      have been bootstrapped anyway.
    - The only info is `life_lost`, also for games that ended.
    - The same seed gives other games.
    """

    on_device = True  # actions, rewards and observations are tensors

    def __init__(self, num_envs, device, *, varied_starts=0.0, max_episode_steps=MAX_EPISODE_STEPS):
        self.num_envs = num_envs
        self.device = device
        self.varied_starts = varied_starts
        self.max_episode_steps = max_episode_steps
        self.single_action_space = Discrete(len(PADDLE_MOVES))
        self.games = TensorGames(num_envs, device)
        # `RandomNumbers` with an axis of steps in front. For a rollout of S steps there are S + 1, of which the last is
        # for the games that start before the first step.
        self.numbers = None
        self.played = torch.zeros(1, dtype=torch.int64, device=device)  # how many steps of the rollout have been played

    def reset(self, *, seed):
        """Start N new games. Returns observations (N, 1944) uint8, and no infos."""
        self.np_random = np.random.default_rng(seed)
        self.new_games(self.games.index >= 0, select(self.random_numbers(1), torch.zeros_like(self.played)))
        return self.observation(), {}

    def start_rollout(self, steps):
        """Draw the random numbers of the next `steps` steps, and truncate the games that have become too long.

        Returns: observations (N, 1944), and which games were truncated (N,).
        """
        self.numbers = copy_into(self.numbers, self.random_numbers(steps + 1))
        truncated = self.games.elapsed >= self.max_episode_steps
        self.new_games(truncated, select(self.numbers, self.played.fill_(steps)))
        self.played.zero_()
        return self.observation(), truncated

    def random_numbers(self, steps):
        """Draw `RandomNumbers` for N games in each of a number of steps, (steps, N, ...)."""
        generator = torch.Generator(self.device).manual_seed(int(self.np_random.integers(2**62)))
        options = dict(generator=generator, device=self.device)
        games = (steps, self.num_envs)
        return RandomNumbers(
            torch.randint(2, (*games, LIVES), **options),
            torch.rand(*games, LIVES, **options),
            torch.randint(1, RIGHT_WALL, (*games, LIVES), **options),
            torch.rand(games, **options),
            torch.rand(games, **options),
            torch.rand(*games, BRICK_ROWS * BRICK_COLUMNS, **options),
        )

    def new_games(self, mask, numbers):
        """Start new games where mask (N,) is true, from the `RandomNumbers` of N games."""
        self.games.reset(mask, *new_games(numbers, self.varied_starts, torch))
        self.games.copy_back()

    def step(self, actions):
        """Play one step. Returns observations (N, 1944), rewards, terminated and truncated (N,), and infos."""
        rewards, terminated, life_lost = self.games.step(actions)
        self.new_games(terminated, select(self.numbers, self.played))
        self.played += 1
        return self.observation(), rewards, terminated, torch.zeros_like(terminated), {"life_lost": life_lost}

    def observation(self):
        """Return the current pages (N, 1944) uint8, not a copy."""
        return self.games.pages.flatten(1)

    def pair(self):
        """Turn the games of the second half into copies of the first half's. Returns observations (N, 1944)."""
        self.games.pair()
        return self.observation()

    def in_sync(self):
        """Return (N / 2,) bool: whether the pages of paired games agree above the paddle's row."""
        return self.games.in_sync()

    def state_dict(self):
        """Return the state in the form of `BreakoutAsciiVec.state_dict`, so that a run may go on with either class."""
        return self.games.state_dict() | {"np_random": self.np_random.bit_generator.state}

    def load_state_dict(self, state):
        self.games.use_buffers()
        self.games.load_state_dict(state)
        self.games.copy_back()
        self.np_random.bit_generator.state = state["np_random"]
