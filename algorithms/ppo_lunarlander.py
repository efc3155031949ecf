"""PPO lands on the moon:  python -m algorithms.ppo_lunarlander

PPO, its losses and its rollout buffer are those of the root. This file adds a policy of two small networks, one that
acts and one that estimates the return, and environments whose state can be saved.
"""

import harness.start  # before the slow imports

import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from algorithms.parts.packages import need
from algorithms.parts.playing import episode_frames, episode_returns, summary
from algorithms.parts.training import Algorithm, check_ppo, ppo_config, run_algorithm
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
REWARD_SCALE = 0.02  # (0.0, inf) multiplies rewards: a landing is worth some 250 points in the game and 5 in training
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
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "NUM_ENVS HIDDEN SEED RUN_DIR".split()
ENV_ID = "LunarLander-v3"
OBSERVATION_SIZE = 8
NUM_ACTIONS = 4


class ActorCritic(Policy):
    """Computes action logits (B, 4) and values (B,) from observations (B, 8), in two networks that share nothing."""

    def __init__(self, hidden):
        super().__init__()
        self.actor = mlp(hidden, NUM_ACTIONS, last_gain=0.01)
        self.critic = mlp(hidden, 1, last_gain=1.0)

    def forward(self, obs):
        return self.actor(obs), self.critic(obs).squeeze(-1)


def mlp(hidden, outputs, last_gain):
    """A network with two hidden layers of tanh, and orthogonal weights; last_gain scales those of the last layer."""
    layers = [nn.Linear(OBSERVATION_SIZE, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    gains = [math.sqrt(2), math.sqrt(2), last_gain]
    for layer, gain in zip(layers, gains):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


# --- environments that can be saved -----------------------------------------------------------------------------------


class Recorded(gym.Wrapper):
    """Remembers what its episode follows from, because the physics engine has no state that could be saved.

    The engine is deterministic: the random state before the reset and the actions since then reproduce the episode.
    """

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.unwrapped.np_random, _ = gym.utils.seeding.np_random(seed)
        self.start = self.unwrapped.np_random.bit_generator.state  # before the reset draws from it
        self.actions = []
        return self.env.reset(options=options)

    def step(self, action):
        self.actions.append(int(action))
        return self.env.step(action)

    def state_dict(self):
        """What `load_state_dict` needs to reproduce the episode."""
        return {"start": self.start, "actions": np.array(self.actions, np.uint8)}

    def load_state_dict(self, state):
        """Play the episode again. Raises ValueError for actions that no episode can have had."""
        self.unwrapped.np_random.bit_generator.state = state["start"]
        self.reset()
        over = False
        for action in state["actions"]:
            if over or action not in self.action_space:
                raise ValueError(f"{len(state['actions'])} actions are no episode")
            _, _, terminated, truncated, _ = self.step(int(action))
            over = terminated or truncated


class RecordedEnvs(SyncVectorEnv):
    """`Recorded` environments side by side, with the state that PPO saves."""

    def state_dict(self):
        return {"envs": [env.state_dict() for env in self.envs]}

    def load_state_dict(self, state):
        for env, saved in zip(self.envs, state["envs"]):
            env.load_state_dict(saved)


def make_env(render_mode=None):
    """One lander. Raises CommandLineError if Box2D is not installed."""
    need("Box2D")
    return gym.make(ENV_ID, render_mode=render_mode)


def build(c):
    """The trainer that these constants describe."""
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    torch.manual_seed(c.SEED)
    envs = RecordedEnvs([lambda: Recorded(make_env())] * c.NUM_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c))}
    return PPO(ActorCritic(c.HIDDEN).to(device), envs, ppo_config(c), metadata=metadata)


# --- playing ----------------------------------------------------------------------------------------------------------


def greedy(state):
    """Return a function that takes observations (N, 8) and returns a policy's most probable actions (N,)."""
    policy = ActorCritic(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])

    def choose(obs):
        logits, _ = policy(torch.from_numpy(obs))
        return logits.argmax(-1).numpy()

    return choose


def evaluate(state, episodes=30, seed=0, report=None):
    """Play episodes with the most probable actions. Returns the `summary` of their returns. report: see `games_bar`."""
    return summary(episode_returns(make_env, greedy(state), episodes, seed, report))


def frames(state, episodes, seed, human):
    """Yield the frames of episodes with the most probable actions; `human` shows them in a window."""
    env = make_env("human" if human else "rgb_array")
    return episode_frames(env, greedy(state), episodes, seed)


ALGORITHM = Algorithm(
    name="ppo_lunarlander",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    evaluate=evaluate,
    frames=frames,
    frame_ms=20,
    levels={"solved": 200},
    check=check_ppo,
    memory_constants=("BATCH_SIZE", "ROLLOUT_STEPS"),
)


def main(argv=()):
    """Train, play or evaluate. Returns the exit status."""
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.ppo_lunarlander")
