import numpy as np
import pytest
import torch

from rollout_buffer import RolloutBuffer, advantages_over_twins, changed_rows_and_columns, compute_gae, shuffled


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
    rewards, values, next_values = tensors([1, 1], [0, 0], [10, 20])
    truncated = torch.tensor([[True], [False]])
    advantages, _ = compute_gae(rewards, values, next_values, ~truncated & False, truncated, 0.9, 0.8)
    assert advantages.flatten().tolist() == [1 + 9, 1 + 18]  # the second step's 19 does not reach the first


def slow_gae(rewards, values, next_values, terminated, truncated, gamma, lambd):
    """Equation 16, term by term."""
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
    g = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 20, 5, generator=g, dtype=torch.float64)
    terminated, truncated = torch.rand(2, 20, 5, generator=g) < 0.15
    arguments = rewards, values, next_values, terminated, truncated & ~terminated, gamma, lambd
    advantages, returns = compute_gae(*arguments)
    torch.testing.assert_close(advantages, slow_gae(*arguments))
    torch.testing.assert_close(returns, advantages + values)


def test_advantages_over_twins_by_hand():
    """Two pairs. Games 0 and 2 are together for both steps, games 1 and 3 for the first."""
    advantages = torch.tensor([[1.0, 2.0, 1.0, 0.0], [3.0, 5.0, 1.0, 7.0]])
    together = torch.tensor([[True, True], [True, False]])
    # products 1 + 0 + 3 = 4, squares 1 + 1 + 4 + 0 + 9 + 1 = 16: the correlation is 2 * 4 / 16 = 0.5
    after, correlation = advantages_over_twins(advantages, together)
    assert correlation == 0.5 and after.tolist() == [[0.5, 2.0, 0.5, -1.0], [2.5, 5.0, -0.5, 7.0]]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_twins_take_off_what_they_share_and_no_more(correlation):
    g = torch.Generator().manual_seed(0)
    shared, own, action = torch.randn(100, 20, generator=g), torch.randn(100, 40, generator=g), torch.randn(100, 40, generator=g).sign()
    advantages = correlation**0.5 * shared.repeat(1, 2) + (1 - correlation) ** 0.5 * own  # of variance 1
    after, found = advantages_over_twins(advantages + 0.1 * action, torch.ones(100, 20, dtype=torch.bool))
    assert found.item() == pytest.approx(correlation, abs=0.06)
    assert after.var().item() == pytest.approx(1 - correlation**2, abs=0.06)
    assert (after * action).mean().item() == pytest.approx(0.1, abs=0.04)  # what the action gained is still there
    apart, _ = advantages_over_twins(advantages, torch.zeros(100, 20, dtype=torch.bool))
    torch.testing.assert_close(apart, advantages)


def test_twins_whose_fortunes_oppose_are_left_alone():
    advantages = torch.tensor([[1.0, -1.0]])
    after, correlation = advantages_over_twins(advantages, torch.tensor([[True]]))
    assert correlation == 0 and after.tolist() == [[1.0, -1.0]]


def filled(S=4, N=3):
    """A buffer whose every number says where it comes from."""
    buffer = RolloutBuffer(S, N)
    for t in range(S):
        number = 10 * t + np.arange(N)
        zeros = np.zeros(N, bool)
        buffer.add(np.stack([number, number], 1), number, number + 0.1, number.astype(np.float32), np.zeros(N, np.float32),
                   zeros, zeros, torch.zeros(N))  # fmt: skip
    return buffer


def test_minibatches_hold_every_sample_once_and_whole():
    buffer = filled()
    buffer.finish(torch.zeros(3), np.ones((4, 3), bool), 0.9, 0.9)
    batches = list(buffer.minibatches(5, torch.Generator().manual_seed(0)))
    assert [len(b.actions) for b in batches] == [5, 5, 2]
    actions = torch.cat([b.actions for b in batches])
    assert sorted(actions.tolist()) == sorted(10 * t + n for t in range(4) for n in range(3))
    assert actions.tolist() != sorted(actions.tolist())
    for b in batches:
        np.testing.assert_array_equal(b.obs[:, 1], b.actions)
        torch.testing.assert_close(b.old_logprobs, b.actions + 0.1, check_dtype=False)
        torch.testing.assert_close(b.returns, b.advantages + b.old_values)


@pytest.mark.parametrize("neighbours", [1, 3, 8])
def test_neighbours_stay_together(neighbours):
    """50 samples of 10 kinds, 5 of each: groups of the sorted samples, and the groups in random order."""
    obs = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5))
    obs = np.stack([obs % 4, obs], 1)
    order = shuffled(obs, neighbours, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(50))
    ranks = np.argsort(sorted(range(50), key=lambda i: tuple(obs[i])))[order]  # places in sorted order
    breaks = np.flatnonzero(np.diff(ranks) != 1) + 1
    groups = np.split(ranks, breaks)
    assert all(group[0] % neighbours == 0 and (len(group) % neighbours == 0 or group[-1] == 49) for group in groups)
    assert len(groups) > 50 / neighbours / 2


def test_finish_takes_the_value_of_what_follows():
    """One step, gamma 1, lambda 0: a return is the reward and the value behind it."""
    buffer = RolloutBuffer(1, 3)
    terminated, truncated = np.array([False, True, False]), np.array([False, False, True])
    buffer.add(np.zeros((3, 1)), np.zeros(3, int), torch.zeros(3), torch.zeros(3), torch.ones(3), terminated, truncated,
               torch.tensor([7.0, 7.0, 7.0]))  # fmt: skip
    data = buffer.finish(torch.tensor([4.0, 4.0, 4.0]), ~(terminated | truncated)[None], 1.0, 0.0)
    assert data.returns.tolist() == [5.0, 1.0, 8.0]


def test_misuse_is_an_error():
    buffer = filled()
    with pytest.raises(RuntimeError, match="full"):
        buffer.add(np.zeros((3, 2)), *[np.zeros(3)] * 7)
    with pytest.raises(RuntimeError, match="not finished"):
        next(buffer.minibatches(4, None))
    buffer.clear()
    with pytest.raises(RuntimeError, match="holds 0 of 4"):
        buffer.finish(torch.zeros(3), np.ones((4, 3), bool), 0.9, 0.9)
    with pytest.raises(ValueError, match="3 rows"):
        buffer.add(np.zeros((2, 2)), *[np.zeros(2)] * 7)


def test_changes_of_a_page():
    pages = np.zeros((2, 6), np.uint8)  # 2 rows of 3
    after = pages.copy()
    after[1, 4] = 1  # row 1, column 1
    assert changed_rows_and_columns(pages, after, 3).tolist() == [[False] * 5, [False, True, False, True, False]]
