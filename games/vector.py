"""Many games side by side whose state can be saved, whatever the game is made of.

A game repeats itself if it is reset with the same seed and gets the same actions. So its state is a seed, the number of
the episode, and the actions of this episode so far. To load it, they are played again. This takes a moment for long
episodes, but needs nothing from the environment, and works also where a game cannot be copied, such as NetHack.
"""

import functools
import multiprocessing
import signal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper

from games import pages


class Repeatable(gym.Wrapper):
    """Gives every episode a seed of its own, and remembers its actions, so that it can be played again."""

    def __init__(self, env):
        super().__init__(env)
        self.seed = int(np.random.SeedSequence().generate_state(1)[0])  # until a reset brings another
        self.number = 0  # of the episode
        self.played = []  # the actions of the episode so far
        self.last_page = None

    def reset(self, *, seed=None, options=None):
        if seed is None:
            self.number += 1
        else:
            self.seed = seed
            self.number = 0
        self.played = []
        self.last_page, info = self.env.reset(seed=self.seed_of_episode(), options=options)
        return self.last_page, info

    def seed_of_episode(self):
        """Return the seed of the present episode. The first one has the seed that `reset` was given."""
        if self.number == 0:
            return self.seed
        return int(np.random.SeedSequence([self.seed, self.number]).generate_state(1)[0])

    def step(self, action):
        self.played.append(int(action))
        self.last_page, *rest = self.env.step(action)
        return self.last_page, *rest

    @property
    def episode(self):
        """The seed, the number of the episode and its actions so far. Setting it plays the episode again."""
        return self.seed, self.number, self.played

    @episode.setter
    def episode(self, episode):
        self.seed, self.number, actions = episode
        self.played = []
        self.last_page, _ = self.env.reset(seed=self.seed_of_episode())
        for action in actions:
            _, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:  # a game that does not repeat itself: it starts anew
                self.reset()
                break


class RepeatableVec(VectorWrapper):
    """Adds `observation`, `state_dict` and `load_state_dict` to a vector environment of `Repeatable` ones."""

    def observation(self):
        """Return the present pages, (N, rows * columns) uint8."""
        return np.stack(self.env.get_attr("last_page"))

    def state_dict(self):
        """Return the state from which the games continue bit for bit, if they repeat themselves."""
        seeds, numbers, played = zip(*self.env.get_attr("episode"))
        return {
            "seeds": list(seeds),
            "numbers": list(numbers),
            "lengths": [len(actions) for actions in played],
            # As bytes, of which a checkpoint may hold any number
            "actions": np.concatenate([*map(np.int32, played), np.zeros(0, np.int32)]).view(np.uint8),
        }

    def load_state_dict(self, state):
        """Play the episodes of a state_dict again. Raises ValueError if it is not one of as many games."""
        seeds, numbers, lengths = (state[name] for name in ("seeds", "numbers", "lengths"))
        actions = np.frombuffer(np.asarray(state["actions"]).tobytes(), np.int32)
        counts = [len(seeds), len(numbers), len(lengths), self.num_envs]
        numbers_fit = all(type(x) is int and x >= 0 for x in [*seeds, *numbers, *lengths])
        if len(set(counts)) > 1 or not numbers_fit or sum(lengths) != len(actions):
            raise ValueError(f"this is no state of {self.num_envs} games")
        if len(actions) and not 0 <= actions.min() <= actions.max() < self.single_action_space.n:
            raise ValueError("the state of the games has an action that they do not have")
        played = np.split(actions, np.cumsum(lengths)[:-1])
        self.env.set_attr("episode", list(zip(seeds, numbers, [part.tolist() for part in played])))


def make_vec(game_id, num_envs, processes=False):
    """Return a `RepeatableVec` of a game, which need not have a vector environment of its own.

    processes: whether each game runs in a process of its own.
    """
    kind = AsyncVectorEnv if processes else SyncVectorEnv
    make = functools.partial(make_repeatable, game_id)
    return RepeatableVec(kind([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP))


def make_repeatable(game_id):
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which then ends this process
    return Repeatable(pages.make(game_id))
