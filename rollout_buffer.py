"""What a rollout leaves behind: storage (S, N), generalised advantage estimation, minibatches.

S steps of N environments. The tensors keep their addresses from rollout to rollout, and where the next step goes is a tensor
too, so that a CUDA graph can fill the buffer and read minibatches from it.
"""

from typing import NamedTuple

import numpy as np
import torch


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, lambd):
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    rewards, values        (S, N) float
    next_values            (S, N) float: the value of what follows each step; after a truncation, of the final observation
    terminated, truncated  (S, N) bool

    Returns advantages and returns, (S, N). A terminated step has nothing after it. A truncated one does, and its
    next value says what; but the step stored behind it belongs to another episode, so the sum ends at both.
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
    """Takes from each advantage what the paired environment gained -> advantages (S, N), the correlation of pairs.

    advantages (S, N): environments i and N / 2 + i started the rollout in the same state and went on independently of each other.
    in_sync (S, N / 2) bool: true while the two are still in much the same state; where it is false nothing is taken.

    What one gains does not depend on the other's action, so on average no policy gradient changes; but both share what the
    critic does not see of their state. A control variate (Glynn & Szechtman 2002): the share that leaves the least variance is
    the correlation of the pairs, here that of this rollout's own advantages, at least 0.
    """
    a, b = advantages.chunk(2, dim=1)
    a, b = a * in_sync, b * in_sync
    correlation = (2 * (a * b).sum() / (a.square() + b.square()).sum().clamp_min(1e-8)).clamp_min(0.0)
    return advantages - correlation * torch.cat([b, a], dim=1), correlation


def shuffled(obs, group_size, generator):
    """Encoded observations (n, ...) -> (n,) their numbers in random order, on the CPU.

    With group_size > 1, for obs (n, K): groups of that many that begin alike, and so share work, in random order, so that a
    minibatch still draws from all over the rollout.
    """
    n = len(obs)
    if group_size == 1:
        return torch.randperm(n, generator=generator)
    alike = torch.from_numpy(np.lexsort(obs.cpu().numpy().T[::-1]))
    groups = torch.randperm(-(-n // group_size), generator=generator)
    order = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()
    return alike[order[order < n]]


class Minibatch(NamedTuple):
    obs: torch.Tensor  # (M, ...) encoded
    actions: torch.Tensor  # (M,) int64, and from here on (M,) float32
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    changes: torch.Tensor  # (M, ...) bool: what is to be predicted of the next observation, or (M, 0)
    has_next: torch.Tensor  # (M,) bool: the next observation belongs to the same episode


class RolloutBuffer:
    """Filled by S calls of `add`, closed by `finish`, read by `shuffle` and `next_minibatch`."""

    def __init__(self, num_steps, num_envs, device="cpu"):
        self.num_steps, self.num_envs = num_steps, num_envs
        self.columns, self.data, self.minibatches = {}, None, None
        self.step, self.minibatch = torch.zeros(2, 1, dtype=torch.int64, device=device).unbind()  # how many are filled, and read
        self.pair_correlation = torch.tensor(0.0)

    def clear(self):
        self.step.zero_()
        self.data = None

    def add(self, **row):
        """One step of N environments, tensors (N, ...). `finish` reads, beside the columns of a `Minibatch`:

        obs, actions, logprobs, values, has_next; changes, if anything is predicted
        rewards, terminated, truncated  as `compute_gae` wants them
        final_values                    the values of the final observations, read only where truncated
        in_sync                         (N / 2,) as `paired_baseline` wants it, if environments are paired
        """
        for name, x in row.items():
            if name not in self.columns:
                self.columns[name] = x.new_zeros(self.num_steps, *x.shape)
            self.columns[name].index_copy_(0, self.step, x.unsqueeze(0))
        self.step += 1

    def finish(self, last_values, gamma, lambd):
        """Advantages and returns, once S steps are in. last_values (N,): the value of the observation that follows."""
        if int(self.step) != self.num_steps:
            raise RuntimeError(f"the rollout buffer holds {int(self.step)} of {self.num_steps} steps; add the rest first")
        c = self.columns
        next_values = torch.where(c["truncated"], c["final_values"], torch.cat([c["values"][1:], last_values.unsqueeze(0)]))
        advantages, returns = compute_gae(c["rewards"], c["values"], next_values, c["terminated"], c["truncated"], gamma, lambd)
        if "in_sync" in c:
            advantages, self.pair_correlation = paired_baseline(advantages, c["in_sync"])
        changes = c["changes"] if "changes" in c else c["has_next"].new_zeros(*c["has_next"].shape, 0)
        columns = c["obs"], c["actions"], c["logprobs"], c["values"], advantages, returns, changes, c["has_next"]
        self.data = Minibatch(*(x.flatten(0, 1) for x in columns))  # (S * N, ...)

    def shuffle(self, batch_size, generator, group_size=1, share=None):
        """Cut the S * N samples, in random order, into minibatches of batch_size, which must divide them.

        share: what to make of the encoded observations (K, batch_size, ...) of K minibatches.
        -> whether the minibatches have moved to new addresses.
        """
        if self.data is None:
            raise RuntimeError("the rollout buffer is not finished: call finish() after the last add()")
        if len(self.data.actions) % batch_size:
            raise ValueError(f"batch_size {batch_size} does not divide the {len(self.data.actions)} samples of a rollout")
        order = shuffled(self.data.obs, group_size, generator).to(self.step.device)
        minibatches = Minibatch(*(x[order].unflatten(0, (-1, batch_size)) for x in self.data))
        if share is not None:
            minibatches = minibatches._replace(obs=share(minibatches.obs))
        kept = self.minibatches
        self.minibatches = copied_into(kept, minibatches)
        self.minibatch.zero_()
        return kept is not self.minibatches

    @property
    def num_minibatches(self):
        return len(self.minibatches.actions)

    def next_minibatch(self):
        """-> the next `Minibatch`, until all `num_minibatches` are read."""
        minibatch = selected(self.minibatches, self.minibatch)
        self.minibatch += 1
        return minibatch


def copied_into(kept, new):
    """Tensors, or tuples of tensors, copied into `kept` if all shapes are the same -> kept; otherwise -> new."""
    if kept is None or shapes(kept) != shapes(new):
        return new
    for x, y in zip(kept, new):
        x.copy_(y) if isinstance(x, torch.Tensor) else copied_into(x, y)
    return kept


def shapes(x):
    return x.shape if isinstance(x, torch.Tensor) else [shapes(y) for y in x]


def selected(x, i):
    """Element i (1,) of a tensor, or of each tensor of a tuple."""
    if isinstance(x, torch.Tensor):
        return x.index_select(0, i).squeeze(0)
    return type(x)(*(selected(y, i) for y in x))
