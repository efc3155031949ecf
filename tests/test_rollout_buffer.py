from typing import NamedTuple

import numpy as np
import pytest
import torch

from rollout_buffer import RolloutBuffer, compute_gae, paired_baseline, random_order


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64).reshape(-1, 1) for row in rows]


def test_gae_by_hand():
    """Three steps, one env, gamma 0.5, lambda 0.5; the third step terminates."""
    rewards, values, next_values = tensors([1, 2, 3], [4, 5, 6], [5, 6, 99])
    terminated = torch.tensor([[False], [False], [True]])
    advantages, returns = compute_gae(rewards, values, next_values, terminated, ~terminated & False, 0.5, 0.5)
    # deltas: 1 + 2.5 - 4 = -0.5;  2 + 3 - 5 = 0;  3 - 6 = -3, for nothing follows
    assert advantages.flatten().tolist() == [-0.5 + 0.25 * -0.75, -0.75, -3.0]
    assert returns.flatten().tolist() == [4 - 0.6875, 4.25, 3.0]


def test_truncation_bootstraps_and_still_ends_the_sum():
    """The first step is truncated, so nothing of the second reaches it."""
    rewards, values, next_values = tensors([1, 1], [0, 0], [10, 20])
    truncated = torch.tensor([[True], [False]])
    advantages, _ = compute_gae(rewards, values, next_values, ~truncated & False, truncated, 0.9, 0.8)
    assert advantages.flatten().tolist() == [1 + 9, 1 + 18]  # the second step's 19 does not reach the first


def slow_gae(rewards, values, next_values, terminated, truncated, gamma, lambd):
    """Compute equation 16 term by term."""
    S, N = rewards.shape
    advantages = torch.zeros(S, N, dtype=rewards.dtype)
    for n in range(N):
        for start in range(S):
            for t in range(start, S):
                follows = 0.0 if terminated[t, n] else next_values[t, n]
                delta = rewards[t, n] + gamma * follows - values[t, n]
                advantages[start, n] += (gamma * lambd) ** (t - start) * delta
                if terminated[t, n] or truncated[t, n]:
                    break
    return advantages


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_gae_against_the_definition(gamma, lambd):
    """The recursion gives the sum of equation 16."""
    g = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 20, 5, generator=g, dtype=torch.float64)
    terminated, truncated = torch.rand(2, 20, 5, generator=g) < 0.15
    arguments = rewards, values, next_values, terminated, truncated & ~terminated, gamma, lambd
    advantages, returns = compute_gae(*arguments)
    torch.testing.assert_close(advantages, slow_gae(*arguments))
    torch.testing.assert_close(returns, advantages + values)


def test_paired_baseline_by_hand():
    """Two pairs. Games 0 and 2 are in sync for both steps, games 1 and 3 for the first."""
    advantages = torch.tensor([[1.0, 2.0, 1.0, 0.0], [3.0, 5.0, 1.0, 7.0]])
    in_sync = torch.tensor([[True, True], [True, False]])
    # products 1 + 0 + 3 = 4, squares 1 + 1 + 4 + 0 + 9 + 1 = 16: the correlation is 2 * 4 / 16 = 0.5
    after, correlation = paired_baseline(advantages, in_sync)
    assert correlation == 0.5 and after.tolist() == [[0.5, 2.0, 0.5, -1.0], [2.5, 5.0, -0.5, 7.0]]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_pairs_take_off_what_they_share_and_no_more(correlation):
    """The variance falls, while what an action gains stays."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(100, 20, generator=g)
    own = torch.randn(100, 40, generator=g)
    action = torch.randn(100, 40, generator=g).sign()
    advantages = correlation**0.5 * shared.repeat(1, 2) + (1 - correlation) ** 0.5 * own  # of variance 1
    after, found = paired_baseline(advantages + 0.1 * action, torch.ones(100, 20, dtype=torch.bool))
    assert found.item() == pytest.approx(correlation, abs=0.06)
    assert after.var().item() == pytest.approx(1 - correlation**2, abs=0.06)
    assert (after * action).mean().item() == pytest.approx(0.1, abs=0.04)  # what the action gained is still there
    apart, _ = paired_baseline(advantages, torch.zeros(100, 20, dtype=torch.bool))
    torch.testing.assert_close(apart, advantages)


def test_pairs_whose_fortunes_oppose_are_left_alone():
    """A negative correlation counts as none."""
    advantages = torch.tensor([[1.0, -1.0]])
    after, correlation = paired_baseline(advantages, torch.tensor([[True]]))
    assert correlation == 0 and after.tolist() == [[1.0, -1.0]]


class Shared(NamedTuple):
    obs: torch.Tensor
    more: torch.Tensor


def row(N, number, **columns):
    """Return one step of N environments, all of whose numbers follow from `number` (N,)."""
    none = torch.zeros(N, dtype=torch.bool)
    zeros = torch.zeros(N)
    return {
        **dict(
            obs=torch.stack([number, number], 1),
            actions=number,
            logprobs=number + 0.1,
            values=number.float(),
            rewards=zeros,
            terminated=none,
            truncated=none,
            final_values=zeros,
            has_next=~none,
        ),
        **columns,
    }


def filled(S=4, N=3):
    buffer = RolloutBuffer(S, N)
    for t in range(S):
        buffer.add(**row(N, 10 * t + torch.arange(N)))
    return buffer


def read(buffer):
    return [buffer.next_minibatch() for _ in range(buffer.num_minibatches)]


def test_minibatches_hold_every_sample_once_and_whole():
    """Shuffling moves all fields of a sample together."""
    buffer = filled()
    buffer.finish(torch.zeros(3), 0.9, 0.9)
    buffer.shuffle(4, torch.Generator().manual_seed(0))
    batches = read(buffer)
    actions = torch.cat([b.actions for b in batches])
    assert [len(b.actions) for b in batches] == [4, 4, 4]
    assert sorted(actions.tolist()) == sorted(10 * t + n for t in range(4) for n in range(3))
    assert actions.tolist() != sorted(actions.tolist())
    for b in batches:
        assert torch.equal(b.obs[:, 1], b.actions) and b.changes.shape == (4, 0) and b.has_next.all()
        torch.testing.assert_close(b.old_logprobs, b.actions + 0.1)
        torch.testing.assert_close(b.returns, b.advantages + b.old_values)


def test_tensors_keep_their_addresses():
    """CUDA graphs need the same addresses in every rollout and epoch; only a minibatch of other shapes gets new
    ones."""

    def places(prepare):
        buffer.shuffle(4, generator, prepare=prepare)
        return [
            x.data_ptr()
            for x in (
                *buffer.fields.values(),
                *buffer.minibatches.obs,
                *buffer.minibatches[1:],
                buffer.position,
                buffer.minibatch_position,
            )
        ]

    def prepare(obs):
        return Shared(obs, obs + 1)

    def prepare_larger(obs):
        return Shared(obs, torch.cat([obs, obs], 1))

    generator = torch.Generator().manual_seed(0)
    buffer = filled()
    buffer.finish(torch.zeros(3), 0.9, 0.9)
    first = places(prepare)
    minibatches = buffer.minibatches
    order = torch.cat([mb.actions for mb in read(buffer)])
    buffer.clear()
    for t in range(4):
        buffer.add(**row(3, 10 * t + torch.arange(3)))
    buffer.finish(torch.zeros(3), 0.9, 0.9)
    assert places(prepare) == first and buffer.minibatches is minibatches
    mb = buffer.next_minibatch()
    assert torch.equal(mb.obs[0][:, 0], mb.actions) and torch.equal(mb.obs[1], mb.obs[0] + 1)
    assert not torch.equal(buffer.minibatches.actions.flatten(), order)
    assert places(prepare_larger) != first and buffer.minibatches is not minibatches


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_groups_stay_together(group_size):
    """There are 5 samples of each of 10 kinds; the sorted samples are cut into groups, which come in random order."""
    obs = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5))
    obs = np.stack([obs % 4, obs], 1)
    order = random_order(torch.from_numpy(obs), group_size, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(50))
    if group_size > 1:
        ranks = np.argsort(np.lexsort(obs.T[::-1]))[order]  # positions in sorted order
        groups = np.split(ranks, np.flatnonzero(np.diff(ranks) != 1) + 1)
        assert all(group[0] % group_size == 0 and (len(group) % group_size == 0 or group[-1] == 49) for group in groups)
        assert len(groups) > 50 / group_size / 2


def test_finish_takes_the_value_of_what_follows():
    """With gamma 1 and lambda 0, a return is the reward plus the next value."""
    buffer = RolloutBuffer(1, 3)
    terminated, truncated = torch.tensor([[False, True, False], [False, False, True]])
    buffer.add(
        **row(
            3,
            torch.zeros(3, dtype=torch.int64),
            rewards=torch.ones(3),
            terminated=terminated,
            truncated=truncated,
            final_values=torch.full((3,), 7.0),
        )
    )
    buffer.finish(torch.full((3,), 4.0), 1.0, 0.0)
    assert buffer.samples.returns.tolist() == [5.0, 1.0, 8.0]


def test_pairs_in_sync_are_compared():
    """`finish` subtracts the baseline where `in_sync` says so."""
    buffer = RolloutBuffer(1, 4)
    in_sync = torch.tensor([True, False])
    buffer.add(**row(4, torch.zeros(4, dtype=torch.int64), rewards=torch.tensor([1.0, 2.0, 1.0, 5.0]), in_sync=in_sync))
    buffer.finish(torch.zeros(4), 1.0, 0.0)
    assert buffer.samples.advantages.tolist() == [0.0, 2.0, 0.0, 5.0] and buffer.pair_correlation == 1


def test_misuse_is_an_error():
    """Calls in the wrong order, and sizes that do not fit, are refused."""
    buffer = filled()
    with pytest.raises(IndexError):  # it is full
        buffer.add(**row(3, torch.arange(3)))
    buffer.clear()
    with pytest.raises(RuntimeError, match="not finished"):
        buffer.shuffle(4, None)
    with pytest.raises(RuntimeError, match="holds 0 of 4"):
        buffer.finish(torch.zeros(3), 0.9, 0.9)
    buffer = filled()
    buffer.finish(torch.zeros(3), 0.9, 0.9)
    with pytest.raises(ValueError, match="batch_size 5 does not divide the 12 samples"):
        buffer.shuffle(5, None)
