"""REINFORCE balances a pole:  python -m algorithms.reinforce_cartpole

The simplest policy gradient (Williams 1992): play whole episodes, then make each action more probable in proportion to
the discounted return that followed it. There is no value function; a return is only compared with the other returns of
the same update, which are normalised to mean 0 and standard deviation 1.

Subtracting a baseline, a number that an episode's actions do not influence, leaves the expected gradient unchanged and
removes much of its variance. The mean of an update's returns is no such baseline, because an episode's own returns are
part of it. So it changes the expected gradient, its direction too. If all episodes have T steps, and an update
M = EPISODES * T of them, an action at step t is made more probable by a reward at step u >= t in proportion to

    gamma^(u - t) - (1 + gamma + ... + gamma^u) / M

instead of gamma^(u - t). Dividing by the standard deviation changes the direction further, and so does dividing by the
number of steps if episodes differ in length. All these changes shrink like 1 / EPISODES; the tests compute them exactly
for games of a few steps. In exchange, the size of a gradient step does not depend on the scale of the returns, and the
same learning rate works for returns of 20 and of 500.

Left out: an entropy bonus, and a baseline that depends on the state. An episode that is cut off after 500 steps counts
as finished.
"""

import harness.start  # before the slow imports

from collections import deque

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.playing import episode_frames, episode_returns, summary
from algorithms.parts.training import Algorithm, check_lr, run_algorithm
from callbacks import Callback
from harness.checkpoint import load_optimizer, load_weights
from harness.device import choose_device, set_threads
from harness.messages import say
from harness.options import Constants
from harness.supervise import run_script
from ppo import entropy_loss, learning_rate
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# length
NUM_STEPS = 150_000  # [1, inf) environment steps in all
EPISODES = 8  # [2, 4096] whole episodes between two updates, played side by side
STOP_AT = 0.0  # [0.0, 500.0] stop once the last 100 episodes have this mean return; never if 0, 475 counts as solved
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
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "HIDDEN SEED RUN_DIR".split()
ENV_ID = "CartPole-v1"  # +1 for every step, 500 at most; an episode is lost when the pole leans by 12 degrees


class PolicyNetwork(nn.Module):
    """Computes action logits (B, 2) from observations (B, 4)."""

    def __init__(self, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))

    def forward(self, obs):
        return self.layers(obs)


def discounted_returns(rewards, ends, gamma):
    """The discounted sum of the rewards from each step to the end of its episode.

    Args:
        rewards: (S, N).
        ends: (S, N) bool, True at the last step of an episode.
        gamma: the discount per step.

    Returns the returns, (S, N).
    """
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])  # the return of the step after this one
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following * ~ends[t]
        returns[t] = following
    return returns


def normalize(x):
    """Shift and scale x to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def reinforce_loss(logprobs, returns):
    """The loss whose gradient is minus an estimate of the policy gradient (Williams 1992); both arguments are (M,).

    The mean is over steps and not over episodes. The factor gamma^t of the exact gradient is left out, as usual.
    """
    return -(logprobs * returns).mean()


class Reinforce(Trainer):
    """Plays whole episodes side by side, and takes one gradient step after them."""

    def __init__(self, c, device, metadata):
        torch.manual_seed(c.SEED)
        super().__init__(PolicyNetwork(c.HIDDEN).to(device), metadata=metadata)
        self.c = c
        self.device = device
        self.num_steps = c.NUM_STEPS
        self.optimizer = torch.optim.Adam(self.policy.parameters(), c.LR)
        self.envs = gym.make_vec(ENV_ID, c.EPISODES, vectorization_mode="sync")
        self.generator = torch.Generator().manual_seed(c.SEED)  # of episodes and actions
        self.episodes = 0
        self.episode_returns = deque(maxlen=100)  # of the last episodes

    @property
    def mean_return(self):
        """Of the last 100 episodes."""
        return float(np.mean(self.episode_returns))

    @property
    def is_solved(self):
        """Whether the last 100 episodes, and not fewer, are as long as STOP_AT asks."""
        enough = len(self.episode_returns) == self.episode_returns.maxlen
        return enough and 0 < self.c.STOP_AT <= self.mean_return

    def collect_and_update(self):
        """One update: play episodes and learn from them. Returns its statistics."""
        self.emit("on_rollout_start")
        obs, actions, rewards, ends, played = self.play()
        self.emit("on_rollout_end")
        return self.update(obs, actions, rewards, ends, played)

    def play(self):
        """Play EPISODES whole episodes; S is the length of the longest.

        Returns:
            obs: (S, N, 4).
            actions, rewards: (S, N).
            ends: (S, N) bool, True at the last step of an episode.
            played: (S, N) bool, False after the end of an episode.
        """
        seed = int(torch.randint(2**31 - 1000, (), generator=self.generator))
        obs, _ = self.envs.reset(seed=seed)  # each environment with a seed of its own: seed, seed + 1, ...
        playing = np.ones(self.envs.num_envs, bool)
        steps = []
        unfinished = 0  # environment steps so far
        while playing.any():
            self.check_stop()
            self.report("playing", int((~playing).sum()), len(playing), unfinished)
            obs = torch.from_numpy(obs)
            with torch.no_grad():
                logits = self.policy(obs.to(self.device)).cpu()
            check_finite(f"in update {self.update_count + 1}", observations=obs, logits=logits)
            actions = torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
            next_obs, rewards, terminated, truncated, _ = self.envs.step(actions.numpy())
            ends = playing & (terminated | truncated)
            rewards = torch.from_numpy(rewards * playing)
            steps.append((obs, actions, rewards, torch.from_numpy(ends), torch.from_numpy(playing)))
            unfinished += int(playing.sum())
            playing = playing & ~ends  # what an environment plays after its first episode is ignored
            obs = next_obs
        return [torch.stack(quantity).to(self.device) for quantity in zip(*steps)]

    def update(self, obs, actions, rewards, ends, played):
        """One gradient step on what `play` returned. Returns statistics; raises FloatingPointError if it diverges."""
        lr = learning_rate(self.global_step / self.num_steps, self.c.LR, self.c.MIN_LR)
        self.optimizer.param_groups[0]["lr"] = lr

        returns = discounted_returns(rewards.float(), ends, self.c.GAMMA)
        all_logprobs = F.log_softmax(self.policy(obs[played]), dim=-1)  # (M, 2)
        logprobs = all_logprobs.gather(1, actions[played].unsqueeze(1)).squeeze(1)  # (M,)
        loss = reinforce_loss(logprobs, normalize(returns[played]))
        _, entropy_stats = entropy_loss(all_logprobs)

        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.policy.parameters()]).item()
        check_finite(f"in update {self.update_count + 1}", rewards=rewards, loss=loss, gradient=grad_norm)
        self.optimizer.step()

        self.update_count += 1
        self.global_step += int(played.sum())
        self.episodes += self.envs.num_envs
        self.episode_returns.extend(rewards.sum(0).tolist())
        if self.is_solved:
            self.num_steps = self.global_step  # this update is the last
        return {
            "loss": loss.item(),
            "entropy": entropy_stats["entropy"].item(),
            "grad_norm": grad_norm,
            "lr": lr,
            "episodes": float(self.episodes),
            "episode_return": self.mean_return,
        }

    def state_dict(self):
        """Everything that a resumed run needs."""
        return self.training_state(
            optimizer=self.optimizer.state_dict(),
            generator=self.generator.get_state(),
            episodes=self.episodes,
            episode_returns=list(self.episode_returns),
        )

    def load_state_dict(self, state):
        """Go on bit for bit where `state_dict` was taken; between two updates no episode is under way."""
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.episodes = state["episodes"]
        self.episode_returns.extend(state["episode_returns"])


class SayWhenSolved(Callback):
    """Says why a training ended before its last step."""

    def on_training_end(self, trainer):
        if trainer.is_solved:
            reached = f"the last 100 episodes have a mean return of {trainer.mean_return:.1f}"
            say(f"solved after {trainer.episodes:,} episodes: {reached}; to train longer, add --stop_at 0")


def build(c):
    """The trainer that these constants describe."""
    device = choose_device(c.DEVICE)
    set_threads(n_layer=1)  # small networks
    return Reinforce(c, device, {"algorithm": ALGORITHM.name, "constants": dict(vars(c))})


# --- playing ----------------------------------------------------------------------------------------------------------


def greedy(state):
    """Return a function that takes observations (N, 4) and returns a policy's most probable actions (N,).

    state: what `Trainer.policy_state` returned, as in all functions below.
    """
    policy = PolicyNetwork(state["constants"]["HIDDEN"])
    load_weights(policy, state["model"])

    def choose(obs):
        return policy(torch.from_numpy(obs)).argmax(-1).numpy()

    return choose


def evaluate(state, episodes=20, seed=0, report=None):
    """Play episodes with the most probable actions. Returns the `summary` of their returns. report: see `games_bar`."""
    return summary(episode_returns(lambda: gym.make(ENV_ID), greedy(state), episodes, seed, report))


def frames(state, episodes, seed, human):
    """Yield the frames of episodes with the most probable actions; `human` shows them in a window."""
    env = gym.make(ENV_ID, render_mode="human" if human else "rgb_array")
    return episode_frames(env, greedy(state), episodes, seed)


ALGORITHM = Algorithm(
    name="reinforce_cartpole",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    evaluate=evaluate,
    frames=frames,
    frame_ms=20,
    levels={"maximum": 500, "solved": 475, "random play": 22},
    check=check_lr,
    callbacks=lambda c, run_dir: [SayWhenSolved()],
    memory_constants=("EPISODES",),
)


def main(argv=()):
    """Train, play or evaluate. Returns the exit status."""
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.reinforce_cartpole")
