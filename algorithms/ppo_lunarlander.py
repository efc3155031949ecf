"""PPO lands on the moon:  python -m algorithms.ppo_lunarlander

The root's PPO, loop, losses and rollout buffer, as they are, with a policy of its own: two small networks, one that acts and one that
estimates the return.
"""

import harness.start  # before the slow imports

import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from algorithms.parts.common import (
    Algorithm,
    check_ppo,
    greedy_frames,
    greedy_returns,
    need,
    ppo_config,
    run_algorithm,
    summary,
)
from harness.checkpoint import load_weights
from harness.device import choose_device, set_threads
from harness.options import Constants
from harness.supervise import run_script
from ppo import PPO, Policy

# ---------------------------------------------------------------------------------------------------------------------
# length
NUM_STEPS = 1_000_000  # [1, inf) environment steps in all; the learning rate falls over this length
NUM_ENVS = 16  # [1, 4096] landers side by side
ROLLOUT_STEPS = 256  # [1, 65536] steps of every lander between two updates
# PPO
EPOCHS = 4  # [1, inf) passes over each rollout
BATCH_SIZE = 256  # [2, inf) samples in a minibatch; must divide NUM_ENVS * ROLLOUT_STEPS
GAMMA = 0.999  # [0.0, 1.0] discount per step; a landing takes 200 to 400 steps
LAMBD = 0.98  # [0.0, 1.0] lambda of GAE: 0 trusts the critic alone, 1 the returns alone
EPS_CLIP = 0.2  # (0.0, 1.0] the probability ratio is clipped to 1 +- this
VALUE_LOSS_COEF = 0.5  # [0.0, inf) weight of half the squared error of the value
ENTROPY_COEF = 0.01  # [0.0, inf) weight of the entropy bonus
REWARD_SCALE = 0.02  # (0.0, inf) a landing is worth some 250 points in the game and 5 in training
# optimizer (Adam)
LR = 1e-3  # (0.0, 1.0] learning rate of the first update
MIN_LR = 1e-5  # [0.0, 1.0] learning rate at the end of half a cosine
MAX_GRAD_NORM = 0.5  # (0.0, inf) gradients with a larger norm are scaled down to it
# policy
HIDDEN = 64  # [1, 8192] units in each of the two hidden layers
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the landers, the actions and the minibatches
DEVICE: str = "cpu"  # a GPU is slower with networks this small
RUN_DIR: str = ""  # directory of the run; "" for runs/ppo_lunarlander/<date-time>
EVAL_INTERVAL = 20  # [0, inf) updates between two evaluations; never if 0
SAVE_FREQ = 20  # [1, inf) updates between two checkpoints
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "NUM_ENVS HIDDEN SEED RUN_DIR".split()
ENV_ID = "LunarLander-v3"
OBSERVATIONS, NUM_ACTIONS = 8, 4


class ActorCritic(Policy):
    """Observations (B, 8) -> action logits (B, 4), values (B,)."""

    def __init__(self, hidden):
        super().__init__()
        self.actor, self.critic = mlp(hidden, NUM_ACTIONS, 0.01), mlp(hidden, 1, 1.0)

    def forward(self, obs):
        return self.actor(obs), self.critic(obs).squeeze(-1)


def mlp(hidden, outputs, gain):
    """Two hidden layers of tanh, orthogonal weights; gain: of the last layer."""
    layers = [
        nn.Linear(OBSERVATIONS, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    ]
    for layer, layer_gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain)):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


# --- environments that can be saved -----------------------------------------------------------------------------------


class Recorded(gym.Wrapper):
    """Remembers how its episode came about: the random numbers it started with, and the actions since. Physics has no state that
    could be saved, but is deterministic."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
        self.start, self.actions = self.unwrapped.np_random.bit_generator.state, []
        return self.env.reset(options=options)

    def step(self, action):
        self.actions.append(int(action))
        return self.env.step(action)

    def state_dict(self):
        return {"start": self.start, "actions": np.array(self.actions, np.uint8)}

    def load_state_dict(self, state):
        self.unwrapped.np_random.bit_generator.state = state["start"]
        self.reset()
        over = False
        for action in state["actions"]:
            if over or action not in self.action_space:
                raise ValueError(f"{len(state['actions'])} actions are no episode")
            _, _, terminated, truncated, _ = self.step(int(action))
            over = terminated or truncated


class ReplayableEnvs(SyncVectorEnv):
    """`Recorded` landers side by side, with the state that PPO saves."""

    def state_dict(self):
        return {"envs": [env.state_dict() for env in self.envs]}

    def load_state_dict(self, state):
        for env, saved in zip(self.envs, state["envs"]):
            env.load_state_dict(saved)


def make_env(render_mode=None):
    need("Box2D")
    return gym.make(ENV_ID, render_mode=render_mode)


def build(c):
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    torch.manual_seed(c.SEED)
    envs = ReplayableEnvs([lambda: Recorded(make_env())] * c.NUM_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c))}
    return PPO(ActorCritic(c.HIDDEN).to(device), envs, ppo_config(c), metadata=metadata)


# --- playing ----------------------------------------------------------------------------------------------------------


def greedy(state):
    """A policy state -> the player that takes the most probable action: observations (N, 8) -> actions (N,)."""
    policy = ActorCritic(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])
    return lambda obs: policy(torch.from_numpy(obs))[0].argmax(-1).numpy()


def evaluate(state, episodes=30, seed=0):
    """Episodes of the most probable actions -> the `summary` of their returns."""
    return summary(greedy_returns(make_env, greedy(state), episodes, seed))


def frames(state, episodes, seed, human):
    return greedy_frames(make_env("human" if human else "rgb_array"), greedy(state), episodes, seed)


LEVELS = {"solved": 200}
ALGORITHM = Algorithm(
    "ppo_lunarlander",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    frames,
    levels=LEVELS,
    frame_ms=20,
    check=check_ppo,
    memory=("BATCH_SIZE", "ROLLOUT_STEPS"),
)


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.ppo_lunarlander")
