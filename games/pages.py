"""Reads pages of text from Gymnasium environments.

A page is rows * columns ASCII codes, and every line ends in a newline: Breakout's is 24 lines of 80 characters and a
newline. `make` returns an environment whose observations are such pages. It finds them in observations that are text
already, a Box of uint8, flat with a newline at the end of each line, or rows by columns without newlines; or in a dict
with one such entry, of which NetHack's `tty_chars` comes first; or in what `render()` returns with render_mode="ansi".

An environment may name, as attributes, what a page alone does not show. All are optional:

    characters     of which its pages consist, with "\\n"; otherwise all printable ASCII characters
    rows, columns  of its pages, with the newlines; needed only if a rendering may grow
    actions        a name for each action
    moving_costs   True if the first action does nothing, and training may charge for the others (MOVE_COEF)
    colours        {character: (red, green, blue)} for pictures; agents do not see them
"""

import functools
import importlib
import os
import re
import traceback

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from games import nethack
from harness.messages import shortened
from harness.options import CommandLineError

PRINTABLE = "".join(map(chr, range(ord(" "), ord("~") + 1))) + "\n"
STEPS_WITHOUT_LIMIT = 500  # after which an episode is truncated if its environment sets no limit
PROBE_STEPS = 500  # of random play, by whose frames the size of a rendered page is found
NEWLINE = ord("\n")
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
A_PAGE = (
    "a page is an observation of uint8 ASCII codes, flat with a newline at the end of each line or rows by columns, or "
    'a rendering with render_mode="ansi"'
)


class PageError(CommandLineError):
    """Says in one line why an environment, or one of its frames, is no page."""


class Pages(gym.Wrapper):
    """Makes every observation of an environment a page, (rows * columns,) uint8.

    Attributes: rows, columns, characters, actions, colours, as the module says, and

        note: one line about what its pages do not show, or ""

    Args:
        page_of: a function from an observation to its page, of any shape.
        rows, columns: of a page.

    Raises:
        PageError: the environment, or later an observation, does not fit.
    """

    def __init__(self, env, page_of, rows, columns, note=""):
        super().__init__(env)
        self.page_of = page_of
        self.rows = rows
        self.columns = columns
        self.note = note
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        if not isinstance(env.action_space, Discrete):
            raise PageError(
                f"{self.name} has {type(env.action_space).__name__} actions; only Discrete ones are learned"
            )
        self.first_action = int(env.action_space.start)
        self.action_space = Discrete(int(env.action_space.n))
        self.observation_space = Box(0, 127, (rows * columns,), np.uint8)
        self.characters = characters_of(env)
        self.actions = self.named_actions()
        self.colours = named(env, "colours", {})
        if not is_palette(self.colours):
            raise PageError(f"{self.name}: colours must be like {{'o': (255, 255, 255)}}, not {self.colours!r}")

    def named_actions(self):
        """Return a name for each action: the environment's, or "action 0" and so on."""
        n = int(self.action_space.n)
        names = named(self.env, "actions", None)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            names = None  # it means something else by it
        if names is None and self.env.has_wrapper_attr("get_action_meanings"):
            names = [name.lower() for name in self.env.get_wrapper_attr("get_action_meanings")()]
        if names is None:
            return tuple(f"action {i}" for i in range(n))
        if len(names) != n:
            raise PageError(f"{self.name}: actions must be {n} names, not {names!r}")
        return tuple(names)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.page(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(self.first_action + action)
        return self.page(obs), float(reward), bool(terminated), bool(truncated), info

    def page(self, obs):
        """Return an observation as a page. Raises PageError, which names the character, if one is unknown."""
        page = self.page_of(obs).reshape(-1).copy()  # the game may draw into the same array again
        if page.size != self.rows * self.columns:
            size = f"{page.size} characters, newlines among them, and the first one had {self.rows * self.columns}"
            raise PageError(f"{self.name} shows a page of {size}; all pages of a game have one size")
        if others := unknown(page, self.characters):
            which = f"{described(others[0])}, none of its characters {self.characters!r}"
            raise PageError(f"{self.name} shows {which}; add it there, or draw something else")
        return page


def named(env, name, default):
    """Return what an environment or one of its wrappers names, or a default."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else default


def is_palette(colours):
    """Whether this maps characters to RGB colours, as tuples of three integers from 0 to 255."""
    if not isinstance(colours, dict):
        return False
    characters = all(isinstance(character, str) and len(character) == 1 for character in colours)
    tuples = all(isinstance(colour, (tuple, list)) and len(colour) == 3 for colour in colours.values())
    return characters and tuples and all(x in range(256) for colour in colours.values() for x in colour)


def characters_of(env):
    """Return the characters of an environment's pages. Raises PageError if it names something else."""
    characters = named(env, "characters", PRINTABLE)
    fitting = isinstance(characters, str) and characters.isascii() and "\n" in characters
    if not fitting or len(set(characters)) < len(characters):
        raise PageError(
            f"the characters of {env.spec.id} must be different ASCII characters and \\n, not {characters!r}"
        )
    return characters


def unknown(page, characters):
    """Return the bytes of a page that are none of these characters."""
    return page.tobytes().translate(None, delete=characters.encode())


def described(code):
    return f"the character {chr(code)!r} (code {code})"


# --- from an id to pages ----------------------------------------------------------------------------------------------


def make(game_id):
    """Return the environment with a Gymnasium id, such as "CliffWalking-v1" or "module:Name-v0", as `Pages`.

    Raises PageError if there is none, or if it shows no pages.
    """
    env = make_env(game_id)
    try:
        return pages_in_observations(env)
    except PageError:
        if "ansi" not in (env.metadata.get("render_modes") or ()):
            env.close()
            raise
    env.close()
    return pages_in_renderings(game_id)


def make_env(game_id, **kwargs):
    """Return the environment with a Gymnasium id as it is. Raises PageError if there is none."""
    module, _, name = game_id.rpartition(":")
    try:
        if nethack.is_nethack(name):
            return nethack.make(name, **kwargs)
        if module:
            importlib.import_module(module)
        if gym.spec(name).max_episode_steps is None:
            kwargs["max_episode_steps"] = STEPS_WITHOUT_LIMIT
        return gym.make(name, disable_env_checker=True, **kwargs)
    except Exception as error:  # the module is the user's
        own = "; a game of your own has its module in front, as games.catch:Catch-v0"
        advice = "" if module or nethack.is_nethack(name) else own
        reason = " ".join(str(error).split()).rstrip(".")
        if not isinstance(error, (gym.error.Error, ImportError)):
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {reason} ({os.path.basename(place.filename)}, line {place.lineno})"
        raise PageError(f"{game_id} cannot be made: {reason}{advice}") from error


# --- pages in observations --------------------------------------------------------------------------------------------


def pages_in_observations(env):
    """Return `Pages` of an environment whose observations are pages. Raises PageError if they are none."""
    obs, _ = env.reset(seed=0)
    if not isinstance(env.observation_space, Dict):
        return pages_in(env, obs, lambda obs: obs)
    keys = [key for key, x in obs.items() if may_be_page(x) and not unknown(x, characters_of(env))]
    if "tty_chars" in keys:
        keys = ["tty_chars"]
    if len(keys) != 1:
        found = " and ".join(keys) or "none"
        raise PageError(f"of the observations of {env.spec.id}, one should be a page, not {found}; {A_PAGE}")
    [key] = keys
    return pages_in(env, obs[key], lambda obs: obs[key])


def pages_in(env, obs, page_of):
    """Return `Pages` of an environment, given a first observation. Raises PageError if it is no page."""
    problem = f"the observations of {env.spec.id} are no pages of text"
    if not may_be_page(obs):
        raise PageError(f"{problem}, but of the space {shortened(env.observation_space)}; {A_PAGE}")
    if others := unknown(obs, characters_of(env)):
        raise PageError(f"{problem}, because they have {described(others[0])}; {A_PAGE}")
    if obs.ndim == 2:
        if (obs[:, -1] == NEWLINE).all():
            return Pages(env, page_of, *obs.shape)
        return Pages(env, lambda obs: with_newlines(page_of(obs)), obs.shape[0], obs.shape[1] + 1)
    last = [] if obs[-1] == NEWLINE else [NEWLINE]
    ends = np.flatnonzero(np.append(obs, np.uint8(last)) == NEWLINE)
    columns = int(ends[0]) + 1
    if len(ends) == 1 and last or (np.diff(ends) != columns).any():
        raise PageError(f"{problem}: their lines must be of one length, with a newline at the end of each; {A_PAGE}")
    if last:
        return Pages(env, lambda obs: np.append(page_of(obs), np.uint8(NEWLINE)), len(ends), columns)
    return Pages(env, page_of, len(ends), columns)


def may_be_page(obs):
    return isinstance(obs, np.ndarray) and obs.dtype == np.uint8 and obs.ndim in (1, 2) and obs.size > 0


def with_newlines(grid):
    """Return a page (rows, columns) of an array (rows, columns - 1) without newlines."""
    page = np.empty((grid.shape[0], grid.shape[1] + 1), np.uint8)
    page[:, :-1] = grid
    page[:, -1] = NEWLINE
    return page


# --- pages in renderings ----------------------------------------------------------------------------------------------


def pages_in_renderings(game_id):
    """Return `Pages` of an environment whose renderings with render_mode="ansi" are pages."""
    rows, columns, note = layout_of_renderings(game_id)
    env = make_env(game_id, render_mode="ansi")
    return Pages(env, lambda _: page_of_lines(plain_lines(env.render()), rows, columns), rows, columns, note)


@functools.cache  # because a training makes a hundred environments
def layout_of_renderings(game_id):
    """Return the rows and columns of the largest rendering in some random play, unless the environment names them.

    Returns also a note about what only colours tell, or "".
    """
    env = make_env(game_id, render_mode="ansi")
    frames = random_frames(env)
    texts = [plain_lines(frame) for frame in frames]
    rows = named(env, "rows", max(len(lines) for lines in texts))
    columns = named(env, "columns", 1 + max(len(line) for lines in texts for line in lines))
    note = ""
    if len({(*lines,) for lines in texts}) < len(set(frames)):
        note = f"{env.spec.id} tells some things by colour alone, which its pages do not show"
    env.close()
    return rows, columns, note


def random_frames(env):
    """Return what an environment renders in some steps of random play, as text."""
    env.action_space.seed(0)
    over = True
    frames = []
    for step in range(PROBE_STEPS):
        if over:
            env.reset(seed=step)
            over = False
        else:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            over = terminated or truncated
        frames.append(env.render())
        if not isinstance(frames[-1], str):
            found = shortened(repr(frames[-1]), 40)
            raise PageError(f"{env.spec.id} renders no text, but {found}; let its `render` return some")
    return frames


def plain_lines(text):
    """Return the lines of a rendering without colour codes, and without empty lines at the end."""
    return COLOUR_CODE.sub("", text).rstrip("\n").split("\n")


def page_of_lines(lines, rows, columns):
    """Return a page (rows, columns) of lines, with spaces where they end. Raises PageError if they do not fit."""
    longest = max(map(len, lines))
    if len(lines) > rows or longest >= columns:
        raise PageError(
            f"a rendering has {len(lines)} lines of up to {longest} characters, and the page has room for {rows} of "
            f"{columns - 1}, the most in {PROBE_STEPS} steps of random play; let the environment name its rows and "
            "columns"
        )
    text = "".join(line.ljust(columns - 1) + "\n" for line in [*lines, *[""] * (rows - len(lines))])
    if not text.isascii():
        other = next(character for character in text if not character.isascii())
        raise PageError(f"a rendering has {described(ord(other))}, and pages have ASCII characters only")
    return np.frombuffer(text.encode(), np.uint8)
