"""Games of the Arcade Learning Environment: their wrappers, stacks of their frames, and a replay memory."""

import functools
from collections import deque

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import StickyAction

from algorithms.parts.packages import need
from harness.messages import one_line
from harness.options import CommandLineError

SIZE = 84  # pixels, the height and the width of a frame

# --- games ------------------------------------------------------------------------------------------------------------


def make_envs(c, n):
    """n games side by side; `c` as in `make_env`."""
    return SyncVectorEnv([lambda: make_env(c)] * n, autoreset_mode=AutoresetMode.SAME_STEP)


def make_env(c, render_mode=None):
    """One game with all of its wrappers.

    Args:
        c: the constants ENV_ID, STICKY, SKIP and ACTIONS of `dqn_space_invaders`.

    Raises CommandLineError for a game or an action that does not exist.
    """
    try:
        game = make_game(c.ENV_ID, c.STICKY, obs_type="grayscale", render_mode=render_mode)
        env = SkipFrame(game, c.SKIP)
        if c.ACTIONS:
            env = ActionSpaceWrapper(env, [name.strip() for name in c.ACTIONS.split(",")])
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise CommandLineError(f"{c.ENV_ID}: {one_line(error)}") from None
    return SmallFrame(env)


def make_game(env_id, sticky, **options):
    """A game in single frames, each of which repeats the previous action with probability `sticky`.

    A wrapper repeats it and not the emulator, because a saved state of the emulator lacks the previous action.
    """
    ale_py = need("ale_py")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # or it prints a greeting for each game
    gym.register_envs(ale_py)
    game = gym.make(env_id, frameskip=1, repeat_action_probability=0.0, **options)
    return StickyAction(game, sticky)


def save_game(env):
    """The state of a game of `make_game`, its random numbers included."""
    action = env.get_wrapper_attr("last_action")
    game = env.unwrapped.ale.cloneState(include_rng=True).serialize()
    return {
        "game": np.frombuffer(game, np.uint8),
        "last_action": None if action is None else int(action),
        "np_random": env.np_random.bit_generator.state,
    }


def restore_game(env, state):
    """Put a game of `make_game` into the state that `save_game` returned.

    Raises ValueError, before anything has changed, for a last action that the game does not have.
    """
    action = state["last_action"]
    if action is not None and action not in env.unwrapped.action_space:
        raise ValueError(f"the game has no action {action!r}")
    # An emulator that has only been reset would restore Qbert and Tetris wrongly; it must have drawn a frame.
    env.unwrapped.ale.act(0)
    env.unwrapped.ale.restoreState(need("ale_py").ALEState(np.asarray(state["game"]).tobytes()))
    env.set_wrapper_attr("last_action", action)
    env.np_random.bit_generator.state = state["np_random"]


class SkipFrame(gym.Wrapper):
    """Repeats each action for `skip` frames, and adds up their rewards.

    The observation has the brighter pixels of the last two frames, because games draw some sprites only in every other
    frame.
    """

    def __init__(self, env, skip):
        super().__init__(env)
        self.skip = skip
        self.pictures = deque(maxlen=2)  # of the last two frames of this action

    def reset(self, **arguments):
        self.pictures.clear()
        return self.env.reset(**arguments)

    def step(self, action):
        self.pictures.clear()
        total = 0.0
        frames = deque(maxlen=2)
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
        """What the agent sees, in colour: the last two frames."""
        if not self.pictures:
            return self.env.render()
        return np.maximum(self.pictures[0], self.pictures[-1])


class ActionSpaceWrapper(gym.ActionWrapper):
    """Allows only some of the game's actions; action i is the i-th of them."""

    def __init__(self, env, allowed):
        """allowed: names such as "NOOP", "FIRE" and "RIGHT". Raises ValueError for one that the game does not know."""
        super().__init__(env)
        known = env.unwrapped.get_action_meanings()
        for name in allowed:
            if name not in known:
                raise ValueError(f"{name!r} is no action of this game, which has {', '.join(known)}")
        self.actions = [known.index(name) for name in allowed]
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def action(self, action):
        return self.actions[action]


class SmallFrame(gym.ObservationWrapper):
    """Shrinks grey frames (210, 160) to (84, 84) uint8.

    A pixel is the mean of the area that it covers, in which pixels that it covers in part count in part, as in OpenCV's
    INTER_AREA. If each pixel counted for one target alone, moving sprites would flicker.
    """

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE), np.uint8)

    def observation(self, frame):
        rows, columns = frame.shape
        lines = sum(lengths[:, None] * frame[row] for row, lengths in overlaps(rows, SIZE))  # (84, 160)
        sums = sum(lengths * lines[:, column] for column, lengths in overlaps(columns, SIZE))  # (84, 84)
        return np.rint(sums / (rows * columns)).astype(np.uint8)


@functools.cache
def overlaps(source, target):
    """How a line of `target` pixels covers an equally long line of `source` pixels.

    Lengths are integers, because the line counts as source * target long. With them all processors get the same frames.
    A product of matrices would say the same, but NumPy would start threads for it, which trainings side by side, or
    beside an evaluation, would wait for most of the time.

    Returns a list of pairs: the first pixel that each of the target covers, (target,), and the length that it covers of
    it, (target,) int32; then the second pixel and its length, and so on.
    """
    starts = np.arange(target) * source
    pairs = []
    for i in range(source // target + 2):
        pixels = starts // target + i
        lengths = np.minimum(starts + source, (pixels + 1) * target) - np.maximum(starts, pixels * target)
        if lengths.max() > 0:
            pairs.append((np.minimum(pixels, source - 1), np.maximum(lengths, 0).astype(np.int32)))
    return pairs


# --- stacks and the replay memory -------------------------------------------------------------------------------------


class Stacks:
    """The last frames of N games, (N, STACK, 84, 84) uint8. Before its first frame a game has copies of that frame."""

    def __init__(self, frames, depth):
        self.frames = np.repeat(frames[:, None], depth, axis=1)

    def push(self, frames, first):
        """Append frames (N, 84, 84); first (N,) bool says which of them begin a game."""
        self.frames[:, :-1] = self.frames[:, 1:]
        self.frames[:, -1] = frames
        self.frames[first] = frames[first, None]


class Replay:
    """A ring buffer of the last transitions of N games side by side.

    Each frame is stored once, as uint8, and stacks of frames are put together when transitions are drawn.
    """

    def __init__(self, size, num_envs, stack):
        """size: transitions of all games together. Raises ValueError if it is too small for one stack of each game."""
        rows = size // num_envs
        if rows < stack + 2:
            least = num_envs * (stack + 2)
            raise ValueError(f"REPLAY_SIZE {size} is too small for {num_envs} games (NUM_ENVS); the least is {least}")
        self.frames = np.zeros((rows, num_envs, SIZE, SIZE), np.uint8)
        self.actions = np.zeros((rows, num_envs), np.uint8)
        self.rewards = np.zeros((rows, num_envs), np.float32)
        self.ends = np.zeros((rows, num_envs), bool)  # the return ends here: nothing follows
        self.unfinished = np.zeros((rows, num_envs), bool)  # the game was cut off: what follows is not in the memory
        self.age = np.zeros((rows, num_envs), np.uint8)  # frames of the same game before this one, at most stack - 1
        self.back = np.arange(stack)[::-1]  # [3, 2, 1, 0]: how many steps before the last each frame of a stack is
        self.added = 0  # rows, ever

    def add(self, frames, first, actions, rewards, ends, unfinished):
        """Store one step of each game.

        Args:
            frames: (N, 84, 84), the frames that the actions responded to.
            first: (N,) bool, which of the frames begin a game.
            actions, rewards, ends, unfinished: (N,).
        """
        row = self.added % len(self.age)
        row_before = (self.added - 1) % len(self.age)
        self.frames[row] = frames
        self.actions[row] = actions
        self.rewards[row] = rewards
        self.ends[row] = ends
        self.unfinished[row] = unfinished
        self.age[row] = np.where(first, 0, np.minimum(self.age[row_before] + 1, len(self.back) - 1))
        self.added += 1

    def __len__(self):
        """How many transitions can be drawn: without the newest row, which has no next frame, and the oldest ones."""
        rows = min(self.added, len(self.age)) - len(self.back) - 1
        return max(rows, 0) * self.age.shape[1]

    def sample(self, n, rng):
        """Draw n transitions that are not unfinished. Raises CommandLineError if all are.

        Returns stacks (n, STACK, 84, 84) uint8, actions (n,) int64, rewards (n,) float32, the next stacks, and
        ends (n,) float32, in this order.
        """
        indices = rng.integers(len(self), size=n)
        row, env = self.place(indices)
        unfinished = self.unfinished[row, env]
        if unfinished.any():  # which is rare, so only now all others are looked for
            finished = np.flatnonzero(~self.unfinished[self.place(np.arange(len(self)))])
            if not len(finished):
                reason = "every step in the replay memory was cut off, so there is nothing to learn from"
                raise CommandLineError(f"{reason}; check the time limit of the game")
            indices[unfinished] = rng.choice(finished, size=unfinished.sum())
            row, env = self.place(indices)
        next_row = (row + 1) % len(self.age)
        return (
            self.stacks(row, env),
            self.actions[row, env].astype(np.int64),
            self.rewards[row, env],
            self.stacks(next_row, env),
            self.ends[row, env].astype(np.float32),
        )

    def place(self, indices):
        """The rows and the games of transitions that can be drawn, which are counted from the newest."""
        rows_back, env = np.divmod(indices, self.age.shape[1])
        return (self.added - 2 - rows_back) % len(self.age), env

    def stacks(self, row, env):
        """The stacks that end with these frames. The first frame of a game stands for those before it."""
        back = np.minimum(self.back, self.age[row, env][:, None])
        rows = (row[:, None] - back) % len(self.age)
        return self.frames[rows, env[:, None]]

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "back"}

    def load_state_dict(self, state, num_actions):
        """Go on with a memory. Raises ValueError for one that no game with so many actions has filled."""
        if state["actions"].max() >= num_actions or state["unfinished"].all():
            raise ValueError("the replay memory is that of another game")
        for name in self.state_dict():
            setattr(self, name, state[name])
