"""REINFORCE balances a pole:  python -m algorithms.reinforce_cartpole

The simplest policy gradient (Williams 1992): play whole episodes, then make each action more probable in proportion to the discounted
return that followed it. There is no value function; a return is only compared with the other returns of the update.

Those are normalised to mean 0 and standard deviation 1. Subtracting a baseline, a number on which an episode's actions have no influence,
leaves the expected gradient as it is and removes much of its variance. The mean of the update is not quite one: an episode's own returns
and its length are part of it, so the expected gradient is bent, as it is by dividing by the deviation and by the number of steps. All
three biases shrink like 1 / EPISODES. Dividing by the deviation makes the step independent of the scale of the returns, so the learning
rate need not know whether they are 20 or 500.

Left out: entropy bonus, a baseline that depends on the state. An episode that reaches 500 steps is cut off and counts as finished.
"""

import harness.start  # before the slow imports

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.common import Algorithm, check_lr, greedy_frames, greedy_returns, run_algorithm, summary
from harness.checkpoint import load_optimizer, load_weights
from harness.device import choose_device, set_threads
from harness.options import Constants
from harness.supervise import run_script
from ppo import entropy_loss, learning_rate
from rollout_buffer import compute_gae
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# length
NUM_STEPS = 150_000  # [1, inf) environment steps in all
EPISODES = 8  # [2, 4096] whole episodes between two updates, played side by side
# REINFORCE
GAMMA = 0.99  # [0.0, 1.0] discount per step
# optimizer (Adam)
LR = 1e-2  # (0.0, 1.0] learning rate of the first update
MIN_LR = 1e-3  # [0.0, 1.0] learning rate at the end of half a cosine
# policy
HIDDEN = 64  # [1, 8192] units in its one hidden layer
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the episodes and the actions
DEVICE: str = "cpu"  # a GPU is slower with a network this small
RUN_DIR: str = ""  # directory of the run; "" for runs/reinforce_cartpole/<date-time>
EVAL_INTERVAL = 5  # [0, inf) updates between two evaluations; never if 0
SAVE_FREQ = 20  # [1, inf) updates between two checkpoints
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "HIDDEN SEED RUN_DIR".split()
ENV_ID = "CartPole-v1"  # +1 for every step, 500 at most; an episode is lost when the pole leans by 12 degrees


def returns(rewards, ends, gamma):
    """Discounted returns (S, N) of rewards (S, N), each episode to its end (S, N) bool.

    The root's GAE says the same with lambda = 1 and a critic that expects nothing.
    """
    nothing = torch.zeros_like(rewards)
    return compute_gae(rewards, nothing, nothing, ends, torch.zeros_like(ends), gamma, 1.0)[0]


def normalize(x):
    """To mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def reinforce_loss(logprobs, returns):
    """Its gradient is minus an estimate of the policy gradient (Williams 1992), per step and not per episode; both (M,). The factor gamma^t
    is left out, as usual."""
    return -(logprobs * returns).mean()


class PolicyNetwork(nn.Module):
    """Observations (B, 4) -> action logits (B, 2)."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))

    def forward(self, obs):
        return self.layers(obs)


class Reinforce(Trainer):
    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        super().__init__(PolicyNetwork(c.HIDDEN).to(device), metadata=metadata)
        self.c, self.device, self.num_steps = c, device, c.NUM_STEPS
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR)
        self.envs = gym.make_vec(ENV_ID, c.EPISODES, vectorization_mode="sync")
        self.generator = torch.Generator().manual_seed(c.SEED)  # of episodes and actions
        self.episodes = 0

    def collect_and_update(self):
        return self.update(*self.play())

    def play(self):
        """EPISODES whole episodes -> obs (S, N, 4), actions, rewards, ends and which steps were played, each (S, N)."""
        obs, _ = self.envs.reset(seed=int(torch.randint(2**31 - 1000, (), generator=self.generator)))
        playing, steps = np.ones(self.envs.num_envs, bool), []
        while playing.any():
            self.check_stop()
            obs = torch.from_numpy(obs)
            with torch.no_grad():
                logits = self.policy(obs.to(self.device)).cpu()
            check_finite(f"in update {self.update_count + 1}", observations=obs, logits=logits)
            actions = torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
            next_obs, rewards, terminated, truncated, _ = self.envs.step(actions.numpy())
            ends = playing & (terminated | truncated)
            steps.append((obs, actions, *map(torch.from_numpy, (rewards * playing, ends, playing.copy()))))
            playing &= ~ends  # whatever an env plays after its end is not looked at
            obs = next_obs
        return [torch.stack(x).to(self.device) for x in zip(*steps)]

    def update(self, obs, actions, rewards, ends, played):
        """One gradient step -> statistics."""
        lr = learning_rate(self.global_step / self.num_steps, self.c.LR, self.c.MIN_LR)
        self.optimizer.param_groups[0]["lr"] = lr
        logprobs = F.log_softmax(self.policy(obs[played]), dim=-1)
        loss = reinforce_loss(
            logprobs.gather(1, actions[played].unsqueeze(1)).squeeze(1),
            normalize(returns(rewards.float(), ends, self.c.GAMMA)[played]),
        )
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.policy.parameters()]).item()
        check_finite(f"in update {self.update_count + 1}", rewards=rewards, loss=loss, gradient=grad_norm)
        self.optimizer.step()
        self.update_count += 1
        self.global_step += int(played.sum())
        self.episodes += self.envs.num_envs
        _, stats = entropy_loss(logprobs)
        return {
            "loss": loss.item(),
            "entropy": stats["entropy"].item(),
            "grad_norm": grad_norm,
            "lr": lr,
            "episodes": float(self.episodes),
            "episode_return": rewards.sum(0).mean().item(),
        }

    def state_dict(self):
        return self.training_state(
            optimizer=self.optimizer.state_dict(), generator=self.generator.get_state(), episodes=self.episodes
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit: between two updates no episode is under way."""
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.episodes = state["episodes"]


def greedy(state):
    """A policy state -> the player that takes the most probable action: observations (N, 4) -> actions (N,)."""
    policy = PolicyNetwork(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])
    return lambda obs: policy(torch.from_numpy(obs)).argmax(-1).numpy()


def evaluate(state, episodes=20, seed=0):
    """Episodes of the most probable actions -> the `summary` of their returns."""
    return summary(greedy_returns(lambda: gym.make(ENV_ID), greedy(state), episodes, seed))


def frames(state, episodes, seed, human):
    return greedy_frames(gym.make(ENV_ID, render_mode="human" if human else "rgb_array"), greedy(state), episodes, seed)


def build(c):
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    return Reinforce(c, device, {"algorithm": ALGORITHM.name, "constants": dict(vars(c))})


LEVELS = {"maximum": 500, "solved": 475, "random play": 22}
ALGORITHM = Algorithm(
    "reinforce_cartpole",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    frames,
    levels=LEVELS,
    frame_ms=20,
    check=check_lr,
    memory=("EPISODES",),
)


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.reinforce_cartpole")
