"""Stores a rollout of S steps of N environments, computes its advantages, and cuts it into minibatches.

The tensors keep their addresses from rollout to rollout, and the position of the next step is a tensor too. So a CUDA
graph can fill the buffer and read minibatches from it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, lambd):
    """Compute advantages and returns by generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    A terminated step does not bootstrap. A truncated step does, from the value of its final observation, but the next
    row belongs to another episode. So the sum over later steps ends at both. A step that is both counts as terminated.

    Args:
        rewards, values: (S, N) float.
        next_values: (S, N) float, the value of the observation after each step, or of the final one if truncated.
        terminated, truncated: (S, N) bool.

    Returns:
        advantages and returns, (S, N) float.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    carry = gamma * lambd * (~(terminated | truncated)).to(rewards.dtype)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + carry[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def paired_baseline(advantages, in_sync):
    """Subtract from each advantage a share of its partner's advantage, as a control variate (Glynn & Szechtman 2002).

    The partner's advantage does not depend on this environment's action, so subtracting a fixed share of it leaves the
    expected policy gradient as it is. But both contain the same error of the critic, which it removes. The share c that
    minimises the sum of (a - c b)^2 + (b - c a)^2 over all pairs a, b is their (uncentred) correlation. It is estimated
    on this rollout, which adds a small bias, and is at least 0.

    Args:
        advantages: (S, N); environments i and N / 2 + i started the rollout in the same state and went on
            independently.
        in_sync: (S, N / 2) bool, true while the two are still in much the same state; elsewhere nothing is subtracted.

    Returns:
        the new advantages (S, N), and the share.
    """
    a, b = advantages.chunk(2, dim=1)
    a = a * in_sync
    b = b * in_sync
    correlation = (2 * (a * b).sum() / (a.square() + b.square()).sum().clamp_min(1e-8)).clamp_min(0.0)
    return advantages - correlation * torch.cat([b, a], dim=1), correlation


def random_order(obs, group_size, generator):
    """Return a random order of n encoded observations, (n,) int64 on the CPU.

    With group_size > 1, observations (n, K) are sorted lexicographically and cut into groups of that size, and the
    order of the groups is random. A group then begins alike and can share work, yet a minibatch comes from all over
    the rollout.
    """
    n = len(obs)
    if group_size == 1:
        return torch.randperm(n, generator=generator)
    by_content = torch.from_numpy(np.lexsort(obs.cpu().numpy().T[::-1]))  # lexsort sorts by its last key first
    groups = torch.randperm(math.ceil(n / group_size), generator=generator)
    order = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()
    return by_content[order[order < n]]


class Minibatch(NamedTuple):
    """Holds M samples: a minibatch, a whole rollout, or K minibatches with a leading axis K."""

    obs: torch.Tensor  # (M, ...) as the policy encoded them, or as its `prepare_minibatches` returned them
    actions: torch.Tensor  # (M,) int64
    old_logprobs: torch.Tensor  # (M,) float32, like the next three
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    changes: torch.Tensor  # (M, P) bool, which of P parts of the next observation change; (M, 0) if not predicted
    has_next: torch.Tensor  # (M,) bool: the next observation belongs to the same episode


class RolloutBuffer:
    """Holds one rollout.

    `add` fills it in S calls, `finish` computes the advantages, `shuffle` cuts it into minibatches, `next_minibatch`
    reads them.
    """

    def __init__(self, rollout_steps, num_envs, device="cpu"):
        self.rollout_steps = rollout_steps
        self.num_envs = num_envs
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the next step
        self.minibatch_position = torch.zeros(1, dtype=torch.int64, device=device)  # of the next minibatch
        self.fields = {}  # {name: tensor (S, N, ...)}
        self.samples = None  # `Minibatch` of all S * N, once finished
        self.minibatches = None  # `Minibatch` of K minibatches, once shuffled
        self.pair_correlation = torch.tensor(0.0)

    def clear(self):
        """Make room for the next rollout."""
        self.position.zero_()
        self.samples = None

    def add(self, **step):
        """Add one step of N environments: tensors (N, ...), with the same names in every step.

        obs, actions, logprobs, values, has_next  as in `Minibatch`
        rewards                                   in the environment's own units
        terminated, truncated                     as in `compute_gae`
        final_values                              the values of the final observations; used only where truncated
        changes                                   only if the next observation is to be predicted
        in_sync                                   (N / 2,) as in `paired_baseline`, only if environments are paired

        Raises IndexError if the buffer is full (on CUDA an assertion of the device).
        """
        for name, x in step.items():
            if name not in self.fields:
                self.fields[name] = x.new_zeros(self.rollout_steps, *x.shape)
            self.fields[name].index_copy_(0, self.position, x.unsqueeze(0))
        self.position += 1

    def finish(self, last_values, gamma, lambd, reward_scale=1.0):
        """Compute the advantages and returns of the rollout, which makes `samples`.

        Args:
            last_values: (N,), the values of the observations after the last step.
            reward_scale: factor for the rewards.

        Raises:
            RuntimeError: there are fewer than S steps.
        """
        filled = int(self.position)
        if filled != self.rollout_steps:
            raise RuntimeError(f"the rollout buffer holds {filled} of {self.rollout_steps} steps; add the rest first")
        f = self.fields
        rewards = (f["rewards"].double() * reward_scale).float()  # rounded once: reward_scale is no float32
        following_values = torch.cat([f["values"][1:], last_values.unsqueeze(0)])
        next_values = torch.where(f["truncated"], f["final_values"], following_values)
        advantages, returns = compute_gae(
            rewards, f["values"], next_values, f["terminated"], f["truncated"], gamma, lambd
        )
        if "in_sync" in f:
            advantages, self.pair_correlation = paired_baseline(advantages, f["in_sync"])
        changes = f["changes"] if "changes" in f else f["has_next"].new_zeros(*f["has_next"].shape, 0)
        samples = f["obs"], f["actions"], f["logprobs"], f["values"], advantages, returns, changes, f["has_next"]
        self.samples = Minibatch(*(x.flatten(0, 1) for x in samples))

    def shuffle(self, batch_size, generator, group_size=1, prepare=None):
        """Cut the S * N samples, in `random_order`, into K minibatches.

        Args:
            batch_size: samples in a minibatch.
            prepare: the policy's `prepare_minibatches`, for the encoded observations (K, batch_size, ...); or None.

        Raises:
            RuntimeError: `finish` has not been called.
            ValueError: batch_size does not divide the samples.
        """
        if self.samples is None:
            raise RuntimeError("the rollout buffer is not finished: call finish() after the last add()")
        num_samples = len(self.samples.actions)
        if num_samples % batch_size:
            raise ValueError(f"batch_size {batch_size} does not divide the {num_samples} samples of a rollout")
        order = random_order(self.samples.obs, group_size, generator).to(self.position.device)
        minibatches = Minibatch(*(x[order].unflatten(0, (-1, batch_size)) for x in self.samples))
        if prepare is not None:
            minibatches = minibatches._replace(obs=prepare(minibatches.obs))
        self.minibatches = copy_into(self.minibatches, minibatches)
        self.minibatch_position.zero_()

    @property
    def num_minibatches(self):
        return len(self.minibatches.actions)

    def next_minibatch(self):
        """Return the next `Minibatch`; there are `num_minibatches`."""
        minibatch = select(self.minibatches, self.minibatch_position)
        self.minibatch_position += 1
        return minibatch


# The following functions take tensors or nested tuples of tensors, because `prepare_minibatches` may return a tuple.


def copy_into(kept, new):
    """Copy `new` into `kept`, whose addresses a CUDA graph knows, and return it; or `new`, if the shapes differ."""
    if kept is None or shapes(kept) != shapes(new):
        return new
    for x, y in zip(kept, new):
        if isinstance(x, torch.Tensor):
            x.copy_(y)
        else:
            copy_into(x, y)
    return kept


def shapes(x):
    """Return the shape of a tensor, or the list of the shapes of a tuple."""
    return x.shape if isinstance(x, torch.Tensor) else [shapes(y) for y in x]


def select(x, i):
    """Return the element with index i, a tensor (1,), along the first axis."""
    if isinstance(x, torch.Tensor):
        return x.index_select(0, i).squeeze(0)
    return type(x)(*(select(y, i) for y in x))
