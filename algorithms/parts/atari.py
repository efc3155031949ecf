"""Games of the Arcade Learning Environment: wrappers, stacks of their frames, and a memory of them."""

from collections import deque

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import StickyAction
from PIL import Image

from algorithms.parts.packages import need
from harness.messages import one_line
from harness.options import CommandLineError

SIZE = 84  # pixels, of a frame's height and width


class SkipFrame(gym.Wrapper):
    """An action lasts `skip` frames: rewards are summed, and of the last two frames the brighter pixels stay, for the game draws
    some sprites in every other frame."""

    def __init__(self, env, skip):
        super().__init__(env)
        self.skip, self.pictures = skip, deque(maxlen=2)

    def step(self, action):
        total, frames = 0.0, deque(maxlen=2)
        for _ in range(self.skip):
            frame, reward, terminated, truncated, info = self.env.step(action)
            frames.append(frame)
            if self.render_mode == "rgb_array":
                self.pictures.append(self.env.render())
            total += reward
            if terminated or truncated:
                break
        return np.maximum(frames[0], frames[-1]), total, terminated, truncated, info

    def render(self):
        """What the agent sees, in colour: the same two frames."""
        return np.maximum(self.pictures[0], self.pictures[-1]) if self.pictures else self.env.render()


class ActionSpaceWrapper(gym.ActionWrapper):
    """Action i is the i-th of those allowed, names of the game's own: "NOOP", "FIRE", "RIGHT", ... Raises ValueError for another."""

    def __init__(self, env, allowed):
        super().__init__(env)
        known = env.unwrapped.get_action_meanings()
        if unknown := [name for name in allowed if name not in known]:
            raise ValueError(f"{unknown[0]!r} is no action of this game, which has {', '.join(known)}")
        self.actions = [known.index(name) for name in allowed]
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def action(self, action):
        return self.actions[action]


class SmallFrame(gym.ObservationWrapper):
    """Grey frames (210, 160) -> (84, 84) uint8, each pixel the mean of the pixels whose centres it covers: of 2 or 3 rows, 1 or 2 columns."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE), np.uint8)

    def observation(self, frame):
        return np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX))


def register_games():
    """So that Gymnasium knows ALE/..."""
    ale_py = need("ale_py")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # it greets at every start
    gym.register_envs(ale_py)


def make_game(env_id, sticky, **options):
    """A game of single frames, in each of which the action before is repeated with probability `sticky`. Not by the emulator: its saved state
    leaves out which action that was."""
    register_games()
    return StickyAction(gym.make(env_id, frameskip=1, repeat_action_probability=0.0, **options), sticky)


def save_game(env):
    """-> all that a game of `make_game` goes on from, random numbers too."""
    game, action = env.unwrapped.ale.cloneState(include_rng=True).serialize(), env.get_wrapper_attr("last_action")
    return {
        "game": np.frombuffer(game, np.uint8),
        "last_action": action if action is None else int(action),
        "np_random": env.np_random.bit_generator.state,
    }


def restore_game(env, state):
    env.unwrapped.ale.act(
        0
    )  # in an emulator that was only reset, Qbert and Tetris would go on otherwise than where they were saved
    env.unwrapped.ale.restoreState(need("ale_py").ALEState(np.asarray(state["game"]).tobytes()))
    env.set_wrapper_attr("last_action", state["last_action"])
    env.np_random.bit_generator.state = state["np_random"]


def make_env(c, render_mode=None):
    """One game with its wrappers, c: ENV_ID, STICKY, SKIP, ACTIONS. Raises CommandLineError for a game or an action that there is not."""
    try:
        env = SkipFrame(make_game(c.ENV_ID, c.STICKY, obs_type="grayscale", render_mode=render_mode), c.SKIP)
        if c.ACTIONS:
            env = ActionSpaceWrapper(env, [name.strip() for name in c.ACTIONS.split(",")])
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise CommandLineError(f"{c.ENV_ID}: {one_line(error)}") from None
    return SmallFrame(env)


def make_envs(c, n):
    return SyncVectorEnv([lambda: make_env(c)] * n, autoreset_mode=AutoresetMode.SAME_STEP)


class Stacks:
    """The last frames of N games, (N, STACK, 84, 84) uint8. A game that starts has its first frame in every place."""

    def __init__(self, frames, depth):
        self.frames = np.repeat(frames[:, None], depth, axis=1)

    def push(self, frames, first):
        """frames (N, 84, 84), first (N,) bool: those that start a game."""
        self.frames[:, :-1] = self.frames[:, 1:]
        self.frames[:, -1] = frames
        self.frames[first] = frames[first, None]


class Replay:
    """The last transitions of N games side by side. Each frame is kept once, as uint8; stacks are put together when drawn."""

    def __init__(self, size, num_envs, stack):
        """size: transitions of all games. Raises ValueError for a memory too small for one stack of each game."""
        rows = size // num_envs
        if rows < stack + 2:
            raise ValueError(
                f"a memory of {size} transitions is too small for {num_envs} games; {num_envs * (stack + 2)} are the least"
            )
        self.frames = np.zeros((rows, num_envs, SIZE, SIZE), np.uint8)
        self.actions, self.rewards = np.zeros((rows, num_envs), np.uint8), np.zeros((rows, num_envs), np.float32)
        self.ends = np.zeros((rows, num_envs), bool)  # nothing follows: the return ends here
        self.unfinished = np.zeros((rows, num_envs), bool)  # what follows is not in the memory: the game was cut off
        self.age = np.zeros((rows, num_envs), np.uint8)  # frames of the same game before this one, at most stack - 1
        self.back = np.arange(stack)[::-1]  # [3, 2, 1, 0]: a stack, as frames back from its last
        self.added = 0  # rows, ever

    def add(self, frames, first, actions, rewards, ends, unfinished):
        """One step of each game, (N, ...): the frame that the action answered, and what came of it."""
        row, before = self.added % len(self.age), (self.added - 1) % len(self.age)
        self.frames[row], self.actions[row], self.rewards[row] = frames, actions, rewards
        self.ends[row], self.unfinished[row] = ends, unfinished
        self.age[row] = np.where(first, 0, np.minimum(self.age[before] + 1, len(self.back) - 1))
        self.added += 1

    def __len__(self):
        """Transitions that can be drawn: the last row has no next frame yet, the oldest may lack some of their stack."""
        return max(min(self.added, len(self.age)) - len(self.back) - 1, 0) * self.age.shape[1]

    def sample(self, n, rng):
        """-> stacks (n, STACK, 84, 84) uint8, actions (n,) int64, rewards (n,), next stacks, ends (n,) float32."""
        i = rng.integers(len(self), size=n)
        while (cut := self.unfinished[self.place(i)]).any():
            i[cut] = rng.integers(len(self), size=cut.sum())
        row, env = self.place(i)
        return (
            self.stacks(row, env),
            self.actions[row, env].astype(np.int64),
            self.rewards[row, env],
            self.stacks((row + 1) % len(self.age), env),
            self.ends[row, env].astype(np.float32),
        )

    def place(self, i):
        """The i-th transitions that can be drawn, newest first -> their rows and games."""
        back, env = np.divmod(i, self.age.shape[1])
        return (self.added - 2 - back) % len(self.age), env

    def stacks(self, row, env):
        """The first frame of a game stands for those before it."""
        rows = row[:, None] - np.minimum(self.back, self.age[row, env][:, None])
        return self.frames[rows % len(self.age), env[:, None]]

    def state_dict(self):
        return {**vars(self), "back": None}

    def load_state_dict(self, state, num_actions):
        """Raises ValueError for what no game of so many actions has left."""
        if state["actions"].max() >= num_actions or state["unfinished"].all():
            raise ValueError("the replay memory is that of another game")
        vars(self).update({name: state[name] for name in vars(self) if name != "back"})
