"""Train an ordinary agent on the same games:  python -m benchmarks.baseline [--seed 0] [--out runs/baseline]

The agent is Stable-Baselines3's PPO with its MlpPolicy (pip install stable-baselines3). From train_ppo.py it takes
the number of steps, the size of rollouts and minibatches, the discount, GAE's lambda at the start, the clipping of
ratio and gradient, the weights of the entropy bonus and of the value loss, the reward scale, and that a lost life
ends a return. All else is Stable-Baselines3's default: Adam's eps and the normalised advantages are as in
train_ppo.py, but it takes 10 passes over a rollout at a learning rate of 3e-4. What belongs to the GPT's training is
left out: predicting the next frame, the cost of moving, a falling learning rate, a rising lambda, and paired games.
"""

import harness.start  # before the slow imports

import csv
import sys
import time
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv
except ImportError:
    sys.exit("-m benchmarks.baseline: needs Stable-Baselines3: pip install stable-baselines3")


from breakout_ascii import TOKENS, BreakoutAsciiVec
from evaluation import exact
from harness.device import set_threads
from harness.options import CommandLineError, Parser, given_path
from harness.supervise import run_script
from ppo import Policy, lost_lives
from train_ppo import (
    BATCH_SIZE,
    CONSTANTS,
    ENTROPY_COEF,
    EPS_CLIP,
    EVAL_INTERVAL,
    GAMMA,
    LAMBD,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_STEPS,
    REWARD_SCALE,
    ROLLOUT_STEPS,
    VALUE_LOSS_COEF,
    VARIED_STARTS,
)


class Games(VecEnv):
    """BreakoutAsciiVec as an environment of Stable-Baselines3: (N, 1944) float32 of order one, scaled rewards."""

    def __init__(self, env):
        self.env = env
        self.actions = None
        super().__init__(env.num_envs, Box(0, 1, (TOKENS,), np.float32), env.single_action_space)

    def reset(self):
        obs, _ = self.env.reset(seed=self._seeds[0])
        return scaled(obs)

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, rewards, terminated, truncated, infos = self.env.step(self.actions)
        terminated = terminated | lost_lives(infos)
        each = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(truncated & ~terminated):
            each[i] = {"terminal_observation": scaled(infos["final_obs"][i]), "TimeLimit.truncated": True}
        return scaled(obs), (rewards * REWARD_SCALE).astype(np.float32), terminated | truncated, each

    def get_attr(self, attr_name, indices=None):
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    set_attr = env_method = env_is_wrapped = close = None  # VecEnv demands them, PPO calls none


class Player(Policy):
    """A policy of Stable-Baselines3 that `exact` can play: tokens (B, 1944) to logits (B, 3) and values (B,)."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, tokens):
        obs = scaled(tokens)
        return self.policy.get_distribution(obs).distribution.logits, self.policy.predict_values(obs).squeeze(1)


def scaled(tokens):
    """Return an array or a tensor of characters as float32 of order one."""
    return tokens / np.float32(127)


def train(seed, num_steps):
    """Train, and yield (update, steps, seconds, score, cleared) as often as train_ppo.py evaluates."""
    model = PPO(
        "MlpPolicy",
        Games(BreakoutAsciiVec(NUM_ENVS, varied_starts=VARIED_STARTS)),
        n_steps=ROLLOUT_STEPS,
        batch_size=BATCH_SIZE,
        gamma=GAMMA,
        gae_lambda=LAMBD,
        clip_range=EPS_CLIP,
        max_grad_norm=MAX_GRAD_NORM,
        ent_coef=ENTROPY_COEF,
        seed=seed,
        device="cpu",
        vf_coef=VALUE_LOSS_COEF / 2,  # of the whole squared error; ours is half of it
    )
    model.set_logger(Logger(folder=None, output_formats=[]))  # its own leaves a directory behind at every learn()
    samples = NUM_ENVS * ROLLOUT_STEPS
    start = time.perf_counter()
    while (left := num_steps - model.num_timesteps) > 0:
        model.learn(min(EVAL_INTERVAL * samples, left), reset_num_timesteps=False)  # goes on where it was
        result = exact(Player(model.policy))
        seconds = round(time.perf_counter() - start, 1)
        yield model.num_timesteps // samples, model.num_timesteps, seconds, result["score"], result["cleared"]


def main(argv=()):
    parser = Parser("-m benchmarks.baseline", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--num_steps", type=int, default=NUM_STEPS, help=f"environment steps in all (default {NUM_STEPS})"
    )
    parser.add_argument("--out", type=given_path, default="runs/baseline", help="default runs/baseline")
    args = parser.parse_args(argv)
    CONSTANTS.check({"SEED": args.seed, "NUM_STEPS": args.num_steps})
    path = Path(args.out, f"seed{args.seed}.csv")
    scores = []
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "x", encoding="utf-8", newline="")
    except FileExistsError:
        raise CommandLineError(f"{path} exists already; name another --out") from None
    set_threads(n_layer=1)  # as few as train_ppo.py takes
    with file:
        writer = csv.writer(file)
        writer.writerow(("update", "steps", "seconds", "score", "cleared"))
        for row in train(args.seed, args.num_steps):
            writer.writerow(row)
            file.flush()
            scores.append(row[3])
            print("update {}: {:,} steps, {:.1f} s, score {:.2f}, {} of 32 games cleared".format(*row), flush=True)
    print(f"best {max(scores):.2f}, last {scores[-1]:.2f}: {path}")


if __name__ == "__main__":
    run_script(main, "-m benchmarks.baseline")
