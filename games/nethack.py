"""Makes NetHack readable: its terminal is a page of 24 lines of 80 characters.

NetHack is the original terminal game, played by way of the NetHack Learning Environment (NLE); MiniHack makes small
levels of its rooms, rivers and monsters. `make` takes the id of any of their environments, such as NetHackScore-v0 or
MiniHack-Room-Random-5x5-v0, and returns it with pages as observations. Both packages are installed by
`pip install --no-deps -r games/requirements.txt`, which does for Linux and not for Windows.
"""

import importlib
import math
import os
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np

ROWS = 24
COLUMNS = 81  # with the newline at each line's end
INSTALL = "pip install --no-deps -r games/requirements.txt"

# The pages are NLE's "tty_chars". Rewards and ends of episodes follow from the others.
OBSERVATIONS = {"tty_chars", "chars", "glyphs", "blstats", "message", "program_state", "internal"}

COMPASS = {"N": "north", "E": "east", "S": "south", "W": "west"}


def is_nethack(game_id):
    """Return whether an id is one of NetHack or MiniHack, with or without a module in front."""
    return game_id.split(":")[-1].startswith(("NetHack", "MiniHack-"))


def make(game_id, **kwargs):
    """Return the environment with an id of NetHack or MiniHack as `NetHackPages`.

    Args:
        kwargs: for the environment, such as `character="val-dwa-law-fem"`.

    Raises:
        ModuleNotFoundError: its package is not installed.
        gymnasium.error.Error: there is no such environment, or it does not work.
    """
    package = import_package("minihack" if "MiniHack" in game_id else "nle", game_id)
    if "NetHackChallenge" in game_id:
        raise gym.error.Error(
            "it refuses seeds, so that no game could be played again; NetHackScore-v0 is the same game"
        )
    if package.__name__ == "minihack" and " " in package.__file__:
        raise gym.error.Error(f"MiniHack makes no levels from a folder with a space in its path, {package.__file__}")
    kwargs = {"observation_keys": ("tty_chars",), "fix_moon_phase": True, **kwargs}
    return NetHackPages(gym.make(game_id, disable_env_checker=True, **kwargs))


def import_package(package, game_id):
    """Import and return a package, which registers its environments. Raises ModuleNotFoundError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources, which MiniHack imports, is deprecated.
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{game_id} needs {error.name}: {INSTALL}", name=error.name) from None


class NetHackPages(gym.Wrapper):
    """Turns the terminal of an NLE environment into pages, (24 * 81,) uint8, and mends its seeds and its time limit.

    NLE ignores the seed that `reset` is given. Here it decides all that happens, in this episode and in the next ones.

    When time is up, NLE says that the episode has terminated, and shows NetHack's list of high scores. Here the episode
    is truncated, and its last page is that of the game.

    At the end of an episode, `info["success"]` says whether its task was solved, where there is one: for most of
    MiniHack, whether the stairs were reached. Otherwise `info` is empty.
    """

    rows = ROWS
    columns = COLUMNS
    characters = "".join(map(chr, range(ord(" "), ord("~") + 1))) + "\n"
    colours = {
        "@": (255, 255, 255),
        ">": (255, 210, 80),
        "}": (80, 140, 255),
        "`": (200, 160, 110),
        "#": (130, 130, 130),
    }

    def __init__(self, env):
        super().__init__(env)
        game = env.unwrapped
        self.observation_space = gym.spaces.Box(0, 127, (ROWS * COLUMNS,), np.uint8)
        self.actions = tuple(map(action_name, game.actions))
        self.max_episode_steps = game._max_episode_steps
        game._max_episode_steps = math.inf
        self.solved = game.StepStatus.__members__.get("TASK_SUCCESSFUL")
        self.steps = 0
        self.playing = False
        write_no_logs(game)
        # A manager of rewards may look for a fountain, and the key for a door: by their names.
        if getattr(game, "reward_manager", None) is None and "KeyRoom" not in env.spec.id:
            fill_only(game, OBSERVATIONS)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random, _ = gym.utils.seeding.np_random(seed)
        obs = None
        while obs is None:
            obs = self.new_game(options or None)  # NLE fails on an empty dict.
        self.steps = 0
        return page_of(obs), {}

    def new_game(self, options):
        """Return the first observation of a new game, or None if the next seeds from `np_random` do not start one.

        One game of NetHack in some thousands asks for the name of a scroll before the first step. NLE cannot answer,
        warns, and would play another game without seeds.
        """
        game = self.unwrapped
        if self.playing:
            game._quit_game(game.last_observation, False)  # NetHack leaks two kilobytes for each game that is not quit.
        core, display = self.np_random.integers(2**31, size=2)
        game.seed(int(core), int(display), reseed=False)
        self.playing = True
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not in moveloop")
            try:
                return self.env.reset(options=options)[0]
            except UserWarning:
                return None

    def step(self, action):
        obs, reward, terminated, _, info = self.env.step(action)
        self.steps += 1
        self.playing = not terminated
        truncated = self.playing and self.steps >= self.max_episode_steps
        ended = terminated or truncated
        info = {"success": info["end_status"] == self.solved} if ended and self.solved else {}
        return page_of(obs), reward, terminated, truncated, info


def page_of(obs):
    """Return the page of an observation, (24 * 81,) uint8."""
    page = np.full((ROWS, COLUMNS), ord("\n"), np.uint8)
    page[:, :-1] = obs["tty_chars"]
    return page.reshape(-1)


def action_name(action):
    """Return the name of one of NLE's actions: "north", "far north" (until something is met), "search"."""
    kind = type(action).__name__
    if not kind.startswith("CompassDirection"):
        return action.name.lower()
    direction = "".join(COMPASS[letter] for letter in action.name)
    return f"far {direction}" if kind.endswith("Longer") else direction


def fill_only(game, keys):
    """Let NLE fill only these observations. The names of all things on the map alone take a third of a step."""
    nethack = game.nethack
    buffers = {key: buffer for key, buffer in nethack._obs_buffers.items() if key in keys}
    nethack._pynethack.set_buffers(**buffers)
    empty = np.zeros(0, np.uint8)
    nethack._obs = tuple(buffers.get(key, empty) for key in nethack._obs_buffers)


def write_no_logs(game):
    """Keep NetHack from writing 370 bytes about each game into a temporary folder: a training plays millions."""
    for name in ("logfile", "xlogfile"):
        log = Path(game.nethack._vardir, name)
        log.unlink()
        log.symlink_to(os.devnull)
