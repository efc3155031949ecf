"""What a rollout leaves behind: storage (S, N), generalised advantage estimation, minibatches.

S steps of N environments. The tensors keep their addresses from rollout to rollout, and the position to be filled next is a
tensor too, so that a CUDA graph can fill the buffer and read minibatches from it.
"""

from typing import NamedTuple

import numpy as np
import torch


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, lambd):
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    rewards, values        (S, N) float
    next_values            (S, N) float: the value of what follows each step; after a truncation, of the final observation
    terminated, truncated  (S, N) bool

    Returns advantages and returns, (S, N). A terminated step has nothing after it. A truncated one does, and its next value
    says what; but the next row belongs to another episode, so the sum ends at both. A step that is both is terminated.
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
    """Subtracts from each advantage a share of its partner's -> advantages (S, N), that share.

    advantages (S, N): environments i and N / 2 + i started the rollout in the same state and went on independently.
    in_sync (S, N / 2) bool: true while the two are still in much the same state; where it is false nothing is subtracted.

    A control variate (Glynn & Szechtman 2002): the partner's advantage does not depend on this environment's action, so with a
    fixed share the expected policy gradient is unchanged, but both contain the same error of the critic. The share that leaves
    the least mean square is the (uncentred) correlation of the pairs, each taken in both orders. It is estimated on this rollout,
    which adds a small bias, and held at 0 or more.
    """
    a, b = advantages.chunk(2, dim=1)
    a, b = a * in_sync, b * in_sync
    correlation = (2 * (a * b).sum() / (a.square() + b.square()).sum().clamp_min(1e-8)).clamp_min(0.0)
    return advantages - correlation * torch.cat([b, a], dim=1), correlation


def random_order(obs, group_size, generator):
    """Encoded observations (n, ...) -> a random order of them, (n,) int64 on the CPU.

    With group_size > 1, for obs (n, K): sorted lexicographically, cut into groups of that size, and the groups in random order.
    Neighbours in the order then begin alike and can share work, yet a minibatch still comes from all over the rollout.
    """
    n = len(obs)
    if group_size == 1:
        return torch.randperm(n, generator=generator)
    alike = torch.from_numpy(np.lexsort(obs.cpu().numpy().T[::-1]))
    groups = torch.randperm(-(-n // group_size), generator=generator)
    order = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()
    return alike[order[order < n]]


class Minibatch(NamedTuple):
    """M samples; or all samples of a rollout; or K minibatches, with a leading axis K."""

    obs: torch.Tensor  # (M, ...) as the policy encoded them, or what it made of a minibatch of these
    actions: torch.Tensor  # (M,) int64
    old_logprobs: torch.Tensor  # (M,) float32, like the next three
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    changes: (
        torch.Tensor
    )  # (M, P) bool, which of P parts of the next observation change; (M, 0) if that is not predicted
    has_next: torch.Tensor  # (M,) bool: the next observation belongs to the same episode


class RolloutBuffer:
    """Filled by S calls of `add`, closed by `finish`; `shuffle` cuts it into minibatches, `next_minibatch` reads them."""

    def __init__(self, rollout_steps, num_envs, device="cpu"):
        self.rollout_steps, self.num_envs = rollout_steps, num_envs
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the step to be added next
        self.minibatch_position = torch.zeros(1, dtype=torch.int64, device=device)  # of the minibatch to be read next
        self.fields = {}  # name: (S, N, ...)
        self.samples = None  # `Minibatch` of all S * N, once finished
        self.minibatches = None  # `Minibatch` of K minibatches, once shuffled
        self.pair_correlation = torch.tensor(0.0)

    def clear(self):
        self.position.zero_()
        self.samples = None

    def add(self, **step):
        """One step of N environments, tensors (N, ...), the same names in every step:

        obs, actions, logprobs, values, has_next  as in `Minibatch`
        rewards                                   in the environment's own units
        terminated, truncated                     as `compute_gae` wants them
        final_values                              the values of the final observations, read only where truncated
        changes                                   if the next observation is to be predicted
        in_sync                                   (N / 2,) as `paired_baseline` wants it, if environments are paired

        Raises IndexError if the buffer is full (on CUDA an assertion of the device).
        """
        for name, x in step.items():
            if name not in self.fields:
                self.fields[name] = x.new_zeros(self.rollout_steps, *x.shape)
            self.fields[name].index_copy_(0, self.position, x.unsqueeze(0))
        self.position += 1

    def finish(self, last_values, gamma, lambd, reward_scale=1.0):
        """Advantages and returns. last_values (N,): the values of the observations that follow. Raises RuntimeError before S steps
        are in."""
        if int(self.position) != self.rollout_steps:
            raise RuntimeError(
                f"the rollout buffer holds {int(self.position)} of {self.rollout_steps} steps; add the rest first"
            )
        f = self.fields
        rewards = (f["rewards"].double() * reward_scale).float()
        next_values = torch.where(
            f["truncated"], f["final_values"], torch.cat([f["values"][1:], last_values.unsqueeze(0)])
        )
        advantages, returns = compute_gae(
            rewards, f["values"], next_values, f["terminated"], f["truncated"], gamma, lambd
        )
        if "in_sync" in f:
            advantages, self.pair_correlation = paired_baseline(advantages, f["in_sync"])
        changes = f["changes"] if "changes" in f else f["has_next"].new_zeros(*f["has_next"].shape, 0)
        samples = f["obs"], f["actions"], f["logprobs"], f["values"], advantages, returns, changes, f["has_next"]
        self.samples = Minibatch(*(x.flatten(0, 1) for x in samples))

    def shuffle(self, batch_size, generator, group_size=1, prepare=None):
        """Cut the S * N samples, in `random_order`, into minibatches of batch_size.

        prepare: the policy's `prepare_minibatches`; it is applied to the encoded observations (K, batch_size, ...).
        Raises RuntimeError before `finish`, ValueError if batch_size does not divide the samples.
        """
        if self.samples is None:
            raise RuntimeError("the rollout buffer is not finished: call finish() after the last add()")
        if len(self.samples.actions) % batch_size:
            raise ValueError(
                f"batch_size {batch_size} does not divide the {len(self.samples.actions)} samples of a rollout"
            )
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
        """-> the next `Minibatch`, until all `num_minibatches` are read."""
        minibatch = select(self.minibatches, self.minibatch_position)
        self.minibatch_position += 1
        return minibatch


# Tensors, or tuples of tensors


def copy_into(kept, new):
    """Copy `new` into `kept`, whose addresses a CUDA graph knows -> kept; or, if a shape has changed or kept is None, -> new."""
    if kept is None or shapes(kept) != shapes(new):
        return new
    for x, y in zip(kept, new):
        if isinstance(x, torch.Tensor):
            x.copy_(y)
        else:
            copy_into(x, y)
    return kept


def shapes(x):
    return x.shape if isinstance(x, torch.Tensor) else [shapes(y) for y in x]


def select(x, i):
    """Element i, a tensor (1,), along the first axis."""
    if isinstance(x, torch.Tensor):
        return x.index_select(0, i).squeeze(0)
    return type(x)(*(select(y, i) for y in x))
