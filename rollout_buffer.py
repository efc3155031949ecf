"""What a rollout leaves behind: storage (S, N), generalised advantage estimation, minibatches.

S steps of N environments. Observations are kept as a reader encodes them: a GPT's keeps 24 line numbers per page, that of
anything else the observation itself.
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


def advantages_over_twins(advantages, together):
    """Takes from each advantage what the game's twin gained from the same state -> advantages (S, N), correlation of twins.

    advantages (S, N): games i and N / 2 + i began the rollout in the same state and went on independently of each other.
    together (S, N / 2) bool: true while the two are still in much the same state; where it is false nothing is taken.

    What a twin gains does not depend on the other's action, so on average no policy gradient changes; but twins share what
    the critic does not see of their state. A control variate (Glynn & Szechtman 2002): the share that leaves the least
    variance is the correlation of twins, here that of this rollout's own advantages, at least 0.
    """
    a, b = advantages.chunk(2, dim=1)
    a, b = a * together, b * together
    correlation = (2 * (a * b).sum() / (a.square() + b.square()).sum().clamp_min(1e-8)).clamp_min(0.0)
    return advantages - correlation * torch.cat([b, a], dim=1), correlation


def changed_rows_and_columns(pages, next_pages, columns):
    """Two batches of pages (B, rows * columns) -> (B, rows + columns) bool: where in each page a character changes."""
    length = pages.shape[1]
    rows = length // columns
    page, place = np.divmod(np.flatnonzero(pages != next_pages), length)
    changes = np.zeros((len(pages), rows + columns), bool)
    changes[page, place // columns] = changes[page, rows + place % columns] = True
    return changes


def shuffled(obs, neighbours, generator):
    """Observations (n, ...) -> (n,) their numbers in random order. With neighbours > 1, for obs (n, K): groups of that many
    that begin alike, and so share work, in random order, so that a minibatch still draws from all over the rollout."""
    n = len(obs)
    alike = torch.arange(n) if neighbours == 1 else torch.from_numpy(np.lexsort(obs.T[::-1]))
    groups = torch.randperm(-(-n // neighbours), generator=generator)
    places = (groups.unsqueeze(1) * neighbours + torch.arange(neighbours)).flatten()
    return alike[places[places < n]]


class Minibatch(NamedTuple):
    obs: np.ndarray  # (M, ...) as encoded
    actions: torch.Tensor  # (M,) int64, and from here on (M,) float32
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    changes: torch.Tensor  # (M, rows + columns) bool, or (M, 0) where nothing is predicted
    has_next: torch.Tensor  # (M,) bool: the next frame belongs to the same episode


class RolloutBuffer:
    """Filled by S calls of `add`, closed by `finish`, read by `minibatches`, emptied by `clear`."""

    def __init__(self, num_steps, num_envs):
        self.num_steps, self.num_envs = num_steps, num_envs
        self.clear()

    def clear(self):
        self.steps, self.data, self.twin_correlation = [], None, torch.tensor(0.0)

    def add(self, obs, actions, logprobs, values, rewards, terminated, truncated, final_values, changes=None):
        """One step of N environments, each argument (N, ...).

        terminated, truncated: as compute_gae wants them. final_values: values of the final observations, read only
        where truncated. changes: `changed_rows_and_columns`, if the next frame is to be predicted.
        """
        if len(self.steps) == self.num_steps:
            raise RuntimeError(f"the rollout buffer is full: it holds {self.num_steps} steps; call clear() first")
        if changes is None:
            changes = np.zeros((self.num_envs, 0), bool)
        step = [np.array(obs)] + [torch.as_tensor(x) for x in (actions, logprobs, values, rewards, terminated, truncated, final_values, changes)]
        for x in step:
            if len(x) != self.num_envs:
                raise ValueError(f"each argument needs {self.num_envs} rows, one per environment, not {len(x)}")
        self.steps.append(step)

    def finish(self, last_values, has_next, gamma, lambd, together=None):
        """Advantages and returns, once S steps are in. last_values (N,): the value of the observation that follows.

        has_next (S, N) bool: False at the last step of an episode. together: as `advantages_over_twins` wants it, if
        the games have twins.
        """
        if len(self.steps) < self.num_steps:
            raise RuntimeError(f"the rollout buffer holds {len(self.steps)} of {self.num_steps} steps; add the rest first")
        obs, *rest = zip(*self.steps)
        return self.close(np.concatenate(obs), *map(torch.stack, rest), last_values, torch.as_tensor(has_next), gamma, lambd,
                          None if together is None else torch.as_tensor(together))  # fmt: skip

    def close(self, obs, actions, logprobs, values, rewards, terminated, truncated, final_values, changes, last_values, has_next, gamma,
              lambd, together):
        """`finish` for steps that were stored elsewhere: obs (S * N, ...), all from actions to changes (S, N, ...), tensors."""
        next_values = torch.where(truncated, final_values, torch.cat([values[1:], last_values.unsqueeze(0)]))
        advantages, returns = compute_gae(rewards, values, next_values, terminated, truncated, gamma, lambd)
        if together is not None:
            advantages, self.twin_correlation = advantages_over_twins(advantages, together)
        columns = (actions, logprobs, values, advantages, returns, changes, has_next)
        self.data = Minibatch(obs, *(x.flatten(0, 1) for x in columns))  # (S * N, ...)
        return self.data

    def minibatches(self, batch_size, generator, device="cpu", neighbours=1):
        """The S * N samples, `shuffled`, in minibatches of batch_size (the last may be smaller)."""
        if self.data is None:
            raise RuntimeError("the rollout buffer is not finished: call finish() after the last add()")
        obs, *rest = self.data
        order = shuffled(obs, neighbours, generator)
        rest = [x[order].to(device).split(batch_size) for x in rest]
        for i, chosen in enumerate(order.split(batch_size)):
            yield Minibatch(obs[chosen.numpy()], *(x[i] for x in rest))


class Reader:
    """How observations reach a policy whose weights stand still; the default for a policy without a `reader()`.

    encode: (N, ...) observations -> the array that the buffer keeps of them
    call:   what encode gave -> logits (N, A), values (N,), without gradients
    batch:  any rows of what encode gave -> what the policy takes
    neighbours: how many observations that begin alike `shuffled` keeps together in minibatches
    """

    neighbours = 1

    def __init__(self, policy):
        self.policy = policy
        self.device = next(policy.parameters()).device

    def encode(self, obs):
        return np.asarray(obs)

    def batch(self, obs):
        return torch.from_numpy(obs).to(self.device)

    @torch.no_grad()
    def __call__(self, obs):
        return self.policy(self.batch(obs))


def reader_of(policy):
    return policy.reader() if hasattr(policy, "reader") else Reader(policy)
