"""Many games side by side whose state can be saved, whatever the game is made of.

A game repeats itself if it is reset with the same seed and gets the same actions. So its state is a seed, the number of
the episode, and the actions of this episode so far. To load it, they are played again. This takes a moment for long
episodes, but needs nothing from the environment, and works also where a game cannot be copied, such as NetHack.
"""

import functools
import pickle

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from games import pages
from harness.background import CannotStart, Worker


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
        return self.last_page, self.learned_from(info)

    @staticmethod
    def learned_from(info):
        """Return what PPO reads of an info. Gymnasium could not put together all that games tell."""
        return {"life_lost": bool(info["life_lost"])} if "life_lost" in info else {}

    def seed_of_episode(self):
        """Return the seed of the present episode. The first one has the seed that `reset` was given."""
        if self.number == 0:
            return self.seed
        return int(np.random.SeedSequence([self.seed, self.number]).generate_state(1)[0])

    def step(self, action):
        self.played.append(int(action))
        self.last_page, *rest, info = self.env.step(action)
        return self.last_page, *rest, self.learned_from(info)

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


class SharedVec(VectorEnv):
    """Shares games among processes, each of which plays its games one after the other.

    Gymnasium's AsyncVectorEnv has a process for each game, so it can play only a few.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, make, num_envs, processes):
        """
        Args:
            make: makes one environment. It is pickled, for the processes.
            processes: at most num_envs.
        """
        env = make()
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        env.close()
        self.ends = np.cumsum([len(part) for part in np.array_split(range(num_envs), processes)])
        self.workers = [Worker(Share(make, size)) for size in np.diff(self.ends, prepend=0).tolist()]

    def split(self, values):
        """Return the part of N values that belongs to the games of each process."""
        return [values[start:end] for start, end in zip([0, *self.ends[:-1]], self.ends)]

    def call(self, name, parts):
        """Call a method of each process's vector environment, with arguments for each. Returns the results."""
        try:
            for worker, arguments in zip(self.workers, parts):
                worker.ask(pickle.dumps((name, arguments)))
            return [worker.answer() for worker in self.workers]
        except CannotStart as error:
            raise pages.PageError(f"the games cannot be played in processes of their own: {error}") from None

    def reset(self, *, seed=None, options=None):
        seeds = [None] * self.num_envs if seed is None else [seed + i for i in range(self.num_envs)]
        return joined(self.call("reset", [{"seed": part, "options": options} for part in self.split(seeds)]))

    def step(self, actions):
        return joined(self.call("step", [{"actions": part} for part in self.split(actions)]))

    def get_attr(self, name):
        return sum(self.call("get_attr", [{"name": name}] * len(self.workers)), ())

    def set_attr(self, name, values):
        self.call("set_attr", [{"name": name, "values": part} for part in self.split(values)])

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.connection.close()  # its games end, and delete what files they have
        for worker in self.workers:
            worker.process.join(1)
            worker.process.kill()


class Share:
    """The games of one process: is called there with a method of their vector environment, and its arguments."""

    def __init__(self, make, num_envs):
        self.make = make
        self.num_envs = num_envs
        self.env = None  # made in the process

    def __call__(self, request):
        if self.env is None:
            self.env = one_after_the_other(self.make, self.num_envs)
        name, arguments = request
        return getattr(self.env, name)(**arguments)


def joined(parts):
    """Return what several vector environments have returned, as one of all their games would return it.

    parts: a tuple of arrays (n, ...) and a dictionary of infos from each.
    """
    arrays = [np.concatenate(values) for values in zip(*(part[:-1] for part in parts))]
    return *arrays, joined_infos([part[-1] for part in parts], [len(part[0]) for part in parts])


def joined_infos(infos, sizes):
    """Return the infos of several vector environments as those of one; where one has no value, there are zeros."""
    result = {}
    for name in dict.fromkeys(name for info in infos for name in info):
        values = [info.get(name) for info in infos]
        known = next(value for value in values if value is not None)
        if isinstance(known, dict):
            result[name] = joined_infos([value or {} for value in values], sizes)
        else:
            zeros = (np.zeros((size, *known.shape[1:]), known.dtype) for size in sizes)
            result[name] = np.concatenate([z if value is None else value for value, z in zip(values, zeros)])
    return result


def make_vec(game_id, num_envs, processes=1):
    """Return a `RepeatableVec` of a game, which need not have a vector environment of its own.

    processes: that share the games, if there are more than one. Otherwise this process plays them all.
    """
    make = functools.partial(make_repeatable, game_id)
    processes = min(processes, num_envs)
    return RepeatableVec(SharedVec(make, num_envs, processes) if processes > 1 else one_after_the_other(make, num_envs))


def one_after_the_other(make, num_envs):
    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def make_repeatable(game_id):
    return Repeatable(pages.make(game_id))
