"""A training whose games are tensors has the same games, rollouts and updates as one whose games are NumPy's.

It runs here on the CPU, without CUDA graphs.
"""

import numpy as np
import pytest
import torch
from helpers import device_trainer as trainer
from helpers import largest_score, make_gpt, tolerance

from breakout_ascii import BreakoutAsciiVec, Games, RandomNumbers
from fast import DeviceBreakout, FastGPT
from ppo import PPO

CPU = torch.device("cpu")


def random_numbers_of(env, t):
    """Return a replacement for `BreakoutAsciiVec.random_numbers` that gives the numbers of env's step t."""
    return lambda mask: RandomNumbers(*(x[t].numpy()[mask] for x in env.numbers))


def test_the_games_equal_those_of_numpy_step_by_step():
    env = DeviceBreakout(32, CPU, varied_starts=0.7)
    vec = BreakoutAsciiVec(32, varied_starts=0.7)
    rng = np.random.default_rng(0)
    ended = 0
    env.reset(seed=0)
    env.start_rollout(400)
    vec.load_state_dict(env.state_dict())
    for t in range(400):
        vec.random_numbers = random_numbers_of(env, t)
        chase = 1 + (vec.games.ball_x > vec.games.paddle_x + 3)
        actions = np.where(rng.random(32) < 0.6, rng.integers(3, size=32), chase)
        obs, rewards, terminated, truncated, infos = env.step(torch.from_numpy(actions))
        *expected, expected_infos = vec.step(actions)
        for ours, theirs in zip((obs, rewards, terminated, truncated), expected):
            np.testing.assert_array_equal(ours, theirs)
        lost = expected_infos["life_lost"] | expected_infos.get("final_info", {}).get("life_lost", False)
        np.testing.assert_array_equal(infos["life_lost"], lost)
        for name in [*Games.STATE, "pages"]:
            np.testing.assert_array_equal(getattr(env.games, name), getattr(vec.games, name), err_msg=name)
        np.testing.assert_array_equal(env.in_sync(), vec.in_sync())
        ended += terminated.sum()
    assert ended > 20


def test_a_game_that_has_become_too_long_is_truncated_between_rollouts():
    env = DeviceBreakout(3, CPU, max_episode_steps=9)
    env.reset(seed=0)
    env.games.elapsed.copy_(torch.tensor([9, 8, 0]))
    obs, truncated = env.start_rollout(4)
    assert truncated.tolist() == [True, False, False]
    assert env.games.elapsed.tolist() == [0, 8, 0]
    assert torch.equal(obs, env.games.pages.flatten(1))


def test_a_truncated_game_is_bootstrapped_and_its_return_counts():
    ppo = trainer(max_episode_steps=6, paired_envs=False)
    ppo.collect()
    ppo.return_so_far[:] = 7
    _, values = ppo.act(ppo.policy.encode(ppo.obs))
    returns = ppo.buffer.samples.returns.view(6, 4)[-1]
    last = {name: x[-1] for name, x in ppo.buffer.fields.items()}
    torch.testing.assert_close(returns, 0.1 * last["rewards"] + 0.9 * values * ~last["terminated"])
    ppo.collect()
    assert list(ppo.episode_returns)[:4] == [7] * 4
    assert (ppo.env.games.elapsed == 6).all()


def test_no_random_number_is_used_twice_and_all_follow_from_the_seed():
    first = DeviceBreakout(4, CPU, varied_starts=1.0)
    second = DeviceBreakout(4, CPU, varied_starts=1.0)
    first.reset(seed=3)
    second.reset(seed=3)
    assert torch.equal(first.games.pages, second.games.pages)
    a, b = first.random_numbers(2), first.random_numbers(2)
    for x, y, other in zip(a, b, second.random_numbers(2)):
        assert not torch.equal(x, y)
        assert not torch.equal(x[0], x[1])
        assert torch.equal(x, other)


def test_a_run_may_go_on_with_either_kind_of_games():
    env = DeviceBreakout(4, CPU, varied_starts=1.0)
    vec = BreakoutAsciiVec(4, varied_starts=1.0)
    env.reset(seed=0)
    vec.reset(seed=1)
    address = env.games.pages.data_ptr()
    env.load_state_dict(vec.state_dict())
    np.testing.assert_array_equal(env.games.pages, vec.games.pages)
    assert env.games.pages.data_ptr() == address  # a CUDA graph would look for it there
    other = BreakoutAsciiVec(4)
    other.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(other.games.pages, vec.games.pages)


def test_a_training_on_tensors_equals_one_on_numpy_arrays():
    """From the same weights, games and random numbers follow equal rollouts and, except for rounding, equal updates."""
    ours = trainer(num_envs=8, rollout_steps=24, batch_size=48)
    theirs = PPO(make_gpt(0, FastGPT, n_head=4, n_embd=16), BreakoutAsciiVec(8, varied_starts=0.7), ours.config)
    near = tolerance(largest_score(ours.policy)) * 4  # |features| = 4
    for _ in range(2):
        theirs.env.load_state_dict(ours.env.state_dict())
        theirs.obs.copy_(ours.obs)
        ours.collect()
        theirs.env.random_numbers = lambda mask: random_numbers_of(ours.env, int(theirs.buffer.position))(mask)
        theirs.collect()
        for name in ("actions", "rewards", "terminated", "truncated", "has_next", "changes", "in_sync"):
            assert torch.equal(ours.buffer.fields[name], theirs.buffer.fields[name]), name
        for name in ("logprobs", "values"):
            torch.testing.assert_close(ours.buffer.fields[name], theirs.buffer.fields[name], rtol=1e-3, atol=near)
        torch.testing.assert_close(
            ours.buffer.samples.advantages, theirs.buffer.samples.advantages, rtol=1e-3, atol=10 * near
        )
        np.testing.assert_array_equal(ours.return_so_far, theirs.return_so_far)
        expected = theirs.update()
        for name, x in ours.update().items():
            assert x == pytest.approx(expected[name], rel=1e-2, abs=100 * near, nan_ok=True), name
        assert (ours.weights - theirs.weights).norm() < 1e-4 * ours.weights.norm()
        with torch.no_grad():
            theirs.weights.copy_(ours.weights)


def test_a_shared_minibatch_holds_the_pages_of_its_samples():
    ppo = trainer()
    seen = []
    ppo.collect()
    ppo.buffer.samples.old_logprobs.copy_(-torch.arange(24) / 100)  # different for each sample
    ppo.epoch()
    ppo.buffer.minibatch_position.zero_()
    for _ in range(ppo.buffer.num_minibatches):
        mb = ppo.buffer.next_minibatch()
        pages = mb.obs.characters[mb.obs.pages].flatten(1)  # (M, 1944)
        samples = [ppo.buffer.samples.old_logprobs.tolist().index(x) for x in mb.old_logprobs.tolist()]
        assert torch.equal(pages, ppo.buffer.samples.obs[samples])
        seen += samples
    assert sorted(seen) == list(range(24))


def test_what_a_graph_reads_and_writes_keeps_its_address():
    def addresses():
        tensors = [
            *ppo.policy.parameters(),
            *ppo.policy.table,
            *ppo.buffer.fields.values(),
            *ppo.buffer.minibatches.obs,
            *ppo.buffer.minibatches[1:],
            *ppo.env.games.buffers.values(),
            *ppo.env.numbers,
            *(ppo.env.played, ppo.noise, ppo.obs, ppo.in_sync, ppo.step_stats),
            *(ppo.buffer.position, ppo.buffer.minibatch_position, ppo.weights, ppo.weights.grad, ppo.lr),
        ]
        return [x.data_ptr() for x in tensors]

    ppo = trainer(num_steps=24)
    ppo.learn()
    before = addresses()
    ppo.config.num_steps = 72
    ppo.learn()
    assert ppo.update_count == 3
    assert addresses() == before


def test_a_resumed_run_goes_on_bit_for_bit_and_either_kind_of_loop_goes_on():
    # A constant learning rate, because it would otherwise depend on num_steps, which changes below.
    whole, stopped, resumed = (trainer(seed=seed, min_lr=1e-3) for seed in (0, 0, 1))
    whole.learn()
    stopped.config.num_steps = 48
    stopped.learn()
    stopped.config.num_steps = 96
    resumed.load_state_dict(stopped.state_dict())
    resumed.learn()
    assert resumed.update_count == 4
    assert torch.equal(resumed.weights, whole.weights)
    assert torch.equal(resumed.obs, whole.obs)
    other = PPO(make_gpt(0, FastGPT, n_head=4, n_embd=16), BreakoutAsciiVec(4, varied_starts=0.7), whole.config)
    other.load_state_dict(stopped.state_dict())
    np.testing.assert_array_equal(other.return_so_far, stopped.return_so_far)
    other.learn()
    assert other.global_step == 96
