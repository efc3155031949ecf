"""Breakout's games as tensors, so that training never leaves the GPU."""

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete

from breakout_ascii import (
    BRICK,
    BRICK_COLUMNS,
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
    Games,
    RandomNumbers,
    new_games,
)
from rollout_buffer import copy_into, select


class TensorGames(Games):
    """`Games` of tensors on one device.

    A CUDA graph knows tensors by their addresses, but the rules make new ones. `copy_back` brings these back into the buffers in
    which the games live.
    """

    xp = torch

    def __init__(self, num_games, device):
        self.device = device
        super().__init__(num_games)
        cell, whole_page = np.arange(TOKENS), EMPTY_PAGE.copy()
        whole_page[BRICK_TOP : BRICK_TOP + BRICK_ROWS, 1:RIGHT_WALL] = list((BRICK * BRICK_COLUMNS).encode())
        row, column = cell // COLUMNS - BRICK_TOP, (cell % COLUMNS - 1) // BRICK_WIDTH
        brick = np.where(
            whole_page.ravel() != EMPTY_PAGE.ravel(), row * BRICK_COLUMNS + column, BRICK_ROWS * BRICK_COLUMNS
        )
        self.cell, self.brick, self.empty_page, self.whole_page = map(
            self.array, (cell, brick, EMPTY_PAGE.ravel(), whole_page.ravel())
        )
        self.buffers = {name: getattr(self, name) for name in [*self.STATE, "pages"]}

    def array(self, x):
        return torch.as_tensor(x, device=self.device)

    def draw(self, *_):
        """Every page from nothing: which cells have changed would be a list of no fixed length, which CUDA graphs forbid."""
        bricks = F.pad(self.bricks.flatten(1), (0, 1))[
            :, self.brick
        ]  # (N, 1944); cells without a brick see the padding
        pages = torch.where(bricks, self.whole_page, self.empty_page)
        along = self.cell - (PADDLE_ROW * COLUMNS + self.paddle_x).unsqueeze(1)
        pages = torch.where((along >= 0) & (along < len(PADDLE)), ord(PADDLE[0]), pages)
        pages = torch.where(self.cell == (self.ball_y * COLUMNS + self.ball_x).unsqueeze(1), ord("O"), pages)
        self.pages = pages.view_as(self.pages)

    redraw = draw

    def from_buffers(self):
        """The games are in the buffers already, unless the recording of a CUDA graph failed half-way and left tensors of its own."""
        for name, buffer in self.buffers.items():
            setattr(self, name, buffer)

    def copy_back(self):
        for name, buffer in self.buffers.items():
            setattr(self, name, buffer.copy_(getattr(self, name)))

    def state_dict(self):
        return {name: getattr(self, name).cpu().numpy().copy() for name in self.STATE}


class DeviceBreakout:
    """N training games, each started anew in the step that ends it.

    Like `BreakoutAsciiVec`, but: `step` takes and gives tensors, and never makes the host wait. So the random numbers of new
    games are drawn ahead, by `start_rollout(S)` for S steps, and a game that has become too long is truncated there, between two
    rollouts, where the values of what follows bootstrap it anyway. Rewards are integers, infos have `life_lost` alone, also for
    games that ended, and observations are overwritten by the next step. The same seed gives other games than there.
    """

    on_device = True  # actions, rewards and observations are tensors

    def __init__(self, num_envs, device, *, varied_starts=0.0, max_episode_steps=MAX_EPISODE_STEPS):
        self.num_envs, self.device, self.varied_starts, self.max_episode_steps = (
            num_envs,
            device,
            varied_starts,
            max_episode_steps,
        )
        self.single_action_space = Discrete(len(PADDLE_MOVES))
        self.games = TensorGames(num_envs, device)
        self.numbers = (
            None  # `RandomNumbers` with a leading axis: those of each step of a rollout, and those of its start
        )
        self.played = torch.zeros(1, dtype=torch.int64, device=device)  # how many of these steps have been played

    def reset(self, *, seed):
        """Start N new games -> observations (N, 1944) uint8, infos."""
        self.np_random = np.random.default_rng(seed)
        self.new_games(self.games.index >= 0, select(self.random_numbers(1), torch.zeros_like(self.played)))
        return self.observation(), {}

    def start_rollout(self, steps):
        """Draw the random numbers of the next `steps` steps, and truncate the games that have become too long.

        -> observations (N, 1944), and which games were truncated (N,)
        """
        self.numbers = copy_into(self.numbers, self.random_numbers(steps + 1))
        truncated = self.games.elapsed >= self.max_episode_steps
        self.new_games(truncated, select(self.numbers, self.played.fill_(steps)))
        self.played.zero_()
        return self.observation(), truncated

    def random_numbers(self, steps):
        """-> the `RandomNumbers` of N games in each of so many steps, (steps, N, ...)."""
        generator = torch.Generator(self.device).manual_seed(int(self.np_random.integers(2**62)))
        options, games = dict(generator=generator, device=self.device), (steps, self.num_envs)
        return RandomNumbers(
            torch.randint(2, (*games, LIVES), **options),
            torch.rand(*games, LIVES, **options),
            torch.randint(1, RIGHT_WALL, (*games, LIVES), **options),
            torch.rand(games, **options),
            torch.rand(games, **options),
            torch.rand(*games, BRICK_ROWS * BRICK_COLUMNS, **options),
        )

    def new_games(self, mask, numbers):
        """Start new games where mask (N,) is true, made of the `RandomNumbers` of N games."""
        self.games.reset(mask, *new_games(numbers, self.varied_starts, torch))
        self.games.copy_back()

    def step(self, actions):
        """One step of every game -> observations (N, 1944), rewards, terminated, truncated, each (N,), and infos."""
        rewards, terminated, life_lost = self.games.step(actions)
        self.new_games(terminated, select(self.numbers, self.played))
        self.played += 1
        return self.observation(), rewards, terminated, torch.zeros_like(terminated), {"life_lost": life_lost}

    def observation(self):
        """-> (N, 1944) uint8, the current pages themselves."""
        return self.games.pages.flatten(1)

    def pair(self):
        """Turn the games of the second half into copies of the first half's -> observations (N, 1944)."""
        self.games.pair()
        return self.observation()

    def in_sync(self):
        """-> (N / 2,) bool: do the pages of paired games agree above the paddle's row?"""
        return self.games.in_sync()

    def state_dict(self):
        """What `BreakoutAsciiVec.state_dict` gives: a run may go on with either."""
        return self.games.state_dict() | {"np_random": self.np_random.bit_generator.state}

    def load_state_dict(self, state):
        self.games.from_buffers()
        self.games.load_state_dict(state)
        self.games.copy_back()
        self.np_random.bit_generator.state = state["np_random"]
