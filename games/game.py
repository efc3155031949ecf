"""What a training asks about a game: its pages, its environments, and what else it can do."""

import functools
import inspect

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode

from games import pages, vector

BREAKOUT = "BreakoutAscii-v0"


class Game:
    """Describes a game whose pages a GPT can read, and makes its environments.

    Attributes:
        id, name: such as "games.catch:Catch-v0" and "Catch"
        rows, columns, characters, actions, colours, note: as of `pages.Pages`
        has_vec: whether it has a vector environment of its own that can be used
        varies: whether that takes `varied_starts`
        pairs: whether it can start pairs of games in the same state
        moving_costs: whether its first action does nothing, and training may charge for the others
        made_by: its class, such as "games.catch.Catch"

    Raises PageError if there is no such game, or if it shows no pages.
    """

    def __init__(self, game_id):
        self.id = game_id
        self.name = game_id.split(":")[-1].split("/")[-1].rsplit("-v", 1)[0]
        env = pages.make(game_id)
        for name in ("rows", "columns", "characters", "actions", "colours", "note"):
            setattr(self, name, getattr(env, name))
        self.moving_costs = bool(pages.named(env, "moving_costs", False))
        self.made_by = f"{type(env.unwrapped).__module__}.{type(env.unwrapped).__qualname__}"
        env.close()
        entry = getattr(gym.registry.get(game_id.split(":")[-1]), "vector_entry_point", None)
        vec = gym.make_vec(game_id, vectorization_mode="vector_entry_point") if entry else None
        self.has_vec = entry is not None and self.fits(vec)
        entry = load_env_creator(entry) if isinstance(entry, str) else entry
        self.varies = self.has_vec and "varied_starts" in inspect.signature(entry).parameters
        self.pairs = self.has_vec and hasattr(vec, "pair") and hasattr(vec, "in_sync")

    def fits(self, env):
        """Return whether a vector environment shows pages as they are, and begins a game in the step that ends one."""
        space = env.single_observation_space
        same_step = env.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
        return same_step and space.dtype == np.uint8 and space.shape == (self.rows * self.columns,)

    def make(self):
        """Return an environment for one game, a `pages.Pages`."""
        return pages.make(self.id)

    def make_vec(self, num_envs, varied_starts=0.0, processes=1):
        """Return a vector environment with SAME_STEP autoreset: the game's own, or else Gymnasium's.

        Args:
            varied_starts: ignored unless the game `varies`.
            processes: that share the games, unless the game has a vector environment of its own.
        """
        if not self.has_vec:
            return vector.make_vec(self.id, num_envs, processes)
        options = {"varied_starts": varied_starts} if self.varies else {}
        return gym.make_vec(self.id, num_envs, vectorization_mode="vector_entry_point", **options)

    def page_sizes(self):
        """Return the arguments of a GPTConfig that follow from the game."""
        return dict(rows=self.rows, columns=self.columns, characters=self.characters, n_action=len(self.actions))

    def misfit(self, config):
        """Return what a GPT with this config does not share with the game, such as its rows; "" if it can play it."""
        differences = [
            f"{name} {getattr(config, name)!r} (the game: {here!r})"
            for name, here in self.page_sizes().items()
            if getattr(config, name) != here
        ]
        return ", ".join(differences)


@functools.cache
def load_game(game_id):
    """Return the `Game` with a Gymnasium id. Raises PageError."""
    return Game(BREAKOUT if game_id == f"breakout_ascii:{BREAKOUT}" else game_id)
