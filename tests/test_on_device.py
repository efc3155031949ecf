"""The loop on one device, here on the CPU: the same games, the same losses, the same state as ppo.py's. CUDA graphs need CUDA."""

import math

import numpy as np
import pytest
import torch

from breakout_ascii import BreakoutAsciiVec, Games, draw_bricks, draw_serves
from model import GPT, GPTConfig
from on_device import BreakoutOnDevice, PPOOnDevice
from pages import CHARACTERS, Lines
from ppo import PPO, PPOConfig
from rollout_buffer import Minibatch, compute_gae, reader_of

CPU = torch.device("cpu")
TEXT = np.frombuffer(CHARACTERS.encode(), np.uint8)


def config(**changes):
    constants = dict(
        num_steps=96, rollout_steps=6, epochs=1, batch_size=12, gamma=0.9, lambd=0.5, lambd_end=0.5, lambd_steps=1, eps_clip=0.2, lr=1e-3,
        min_lr=1e-4, value_loss_coef=0.5, entropy_coef=0.01, max_grad_norm=0.5, prediction_coef=0.1, move_coef=0.04, twins=1, reward_scale=0.1,
    )  # fmt: skip
    return PPOConfig(**constants | changes)


def trainer(max_episode_steps=5000, seed=0, **changes):
    torch.manual_seed(seed)
    env = BreakoutOnDevice(4, CPU, varied_starts=0.7, max_episode_steps=max_episode_steps)
    return PPOOnDevice(GPT(GPTConfig(n_head=4, n_embd=16)), env, config(**changes))


def test_the_games_equal_those_of_numpy_step_by_step():
    env, games, rng, ended = BreakoutOnDevice(32, CPU, varied_starts=0.7, max_episode_steps=200), Games(32), np.random.default_rng(0), 0
    env.reset(seed=0)
    games.load_state_dict(env.state_dict())
    for _ in range(400):
        chase = 1 + (games.ball_x > games.paddle_x + 3)
        actions = np.where(rng.random(32) < 0.4, rng.integers(3, size=32), chase)
        *rewards, terminated, truncated, life_lost, scores, pages = env.play(torch.from_numpy(actions), env.draw_chance(1)[0])
        expected = games.step(actions)
        for ours, theirs in zip((*rewards, terminated, life_lost, scores, pages), (*expected, games.score, games.pages.reshape(32, -1))):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(truncated, (games.elapsed >= 200) & ~expected[1])
        done = (terminated | truncated).numpy()
        games.begin(done, env.serves.numpy()[done], env.bricks.numpy()[done])
        for name in [*games.STATE, "pages"]:
            np.testing.assert_array_equal(getattr(env, name), getattr(games, name), err_msg=name)
        ended += done.sum()
    assert ended > 40


def test_new_games_are_drawn_as_those_of_numpy():
    env, rng, n = BreakoutOnDevice(6_000, CPU, varied_starts=0.7), np.random.default_rng(0), 6_000
    env.reset(seed=1)
    for ours, theirs in ((env.serves.numpy(), draw_serves(rng, n, 0.7)), (env.bricks.numpy(), draw_bricks(rng, n, 0.7))):
        assert ours.shape == theirs.shape and ours.min() == theirs.min() and ours.max() == theirs.max()
        spread = theirs.std(0) / math.sqrt(n) + 1e-9
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 7 * spread).all() and np.abs(ours.std(0) / (theirs.std(0) + 1e-9) - 1).max() < 0.1
    assert (env.bricks_left == env.bricks.sum((1, 2))).all() and env.bricks_left.min() == 1
    assert abs((env.bricks_left == 91).float().mean() - 0.3) < 0.03


def test_no_chance_is_used_twice_and_all_of_it_follows_from_the_seed():
    first, second = (BreakoutOnDevice(4, CPU, varied_starts=1.0) for _ in range(2))
    for env in (first, second):
        env.reset(seed=3)
    assert torch.equal(first.pages, second.pages)
    a, b = first.draw_chance(2), first.draw_chance(2)
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1]) and torch.equal(a, second.draw_chance(2))


def test_a_run_may_go_on_with_either_kind_of_games():
    env, vec = BreakoutOnDevice(4, CPU, varied_starts=1.0), BreakoutAsciiVec(4, varied_starts=1.0)
    env.reset(seed=0)
    vec.reset(seed=1)
    place = env.pages.data_ptr()
    env.load_state_dict(vec.state_dict())
    np.testing.assert_array_equal(env.pages, vec.games.pages)
    assert env.pages.data_ptr() == place  # a CUDA graph would look for it there
    other = BreakoutAsciiVec(4)
    other.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(other.games.pages, vec.games.pages)


def test_a_rollout_is_what_the_games_and_the_policy_gave():
    ppo = trainer(max_episode_steps=4)
    played, play = [], ppo.env.play
    before = {name: getattr(ppo.env, name).clone() for name in Games.STATE}
    ppo.env.play = lambda actions, chance: played.append(play(actions, chance)) or played[-1]
    ppo.collect()
    r, data = ppo.rollout, ppo.buffer.data
    rewards, terminated, truncated, life_lost, scores, pages = map(torch.stack, zip(*played))
    assert (before["bricks_left"][2:] != ppo.env.bricks_left[2:]).any()  # these have become twins of the first two
    assert truncated[3].all() and truncated.sum() == 4
    np.testing.assert_array_equal(r.next_obs, pages)
    goes_on = ~(terminated | truncated)
    assert torch.equal(r.obs[1:][goes_on[:-1]], r.next_obs[:-1][goes_on[:-1]]) and torch.equal(r.has_next, goes_on)
    assert torch.equal(r.terminated, terminated | life_lost) and torch.equal(r.rewards, rewards * 0.1)
    with torch.no_grad():
        logits, values = ppo.policy(r.obs.flatten(0, 1))
        final_values = ppo.policy(r.next_obs.flatten(0, 1))[1].view(6, 4)
        last = ppo.policy(ppo.env.pages.flatten(1))[1]
    torch.testing.assert_close(r.logprobs, logits.log_softmax(-1).gather(1, r.actions.view(-1, 1)).view(6, 4))
    torch.testing.assert_close(r.values, values.view(6, 4))
    next_values = torch.where(truncated, final_values, torch.cat([r.values[1:], last.unsqueeze(0)]))
    _, returns = compute_gae(r.rewards, r.values, next_values, r.terminated, truncated, 0.9, 0.5)
    torch.testing.assert_close(data.returns.view(6, 4), returns)
    assert sorted(ppo.train_scores) == sorted(scores[~goes_on].tolist()) and ppo.global_step == 24


def test_actions_are_drawn_from_the_policy():
    ppo = trainer(rollout_steps=200, batch_size=4)
    ppo.policy.policy_head.weight.data.zero_()
    ppo.policy.policy_head.bias.data = torch.tensor([0.2, 0.3, 0.5]).log()
    ppo.collect()
    shares = torch.bincount(ppo.rollout.actions.flatten()) / 800
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.08, rtol=0)  # five standard deviations


def test_an_epoch_is_that_of_ppo_py():
    ppo = trainer()
    ppo.set_lr(1e-3)
    other = PPO(GPT(ppo.policy.config), BreakoutAsciiVec(4), ppo.config)
    ppo.collect()
    other.policy.load_state_dict(ppo.policy.state_dict())
    stats, reader, theirs = ppo.epoch(), reader_of(other.policy), []
    order = ppo.shuffled.returns.flatten().sort().values
    assert torch.equal(order, ppo.buffer.data.returns.sort().values)  # each sample once
    for mb, lines in zip(map(Minibatch._make, zip(*ppo.shuffled)), map(Lines._make, zip(*ppo.lines))):
        pages = TEXT[lines.characters[lines.pages].flatten(1)]
        samples = [ppo.buffer.data.old_logprobs.tolist().index(x) for x in mb.old_logprobs]
        np.testing.assert_array_equal(pages, ppo.rollout.obs.flatten(0, 1)[samples])
        torch.testing.assert_close(torch.stack(torch.std_mean(mb.advantages, correction=0)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=1e-5)
        theirs.append(other.gradient_step(reader.batch(reader.encode(pages)), mb))
    assert stats.keys() == theirs[0].keys() and ppo.minibatch == len(theirs) == 2
    for name, x in stats.items():
        torch.testing.assert_close(x, torch.stack([step[name] for step in theirs]), rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(ppo.weights, other.weights, rtol=1e-3, atol=1e-5)


def test_what_a_graph_reads_and_writes_keeps_its_place():
    def places():
        tensors = [*ppo.table, *ppo.rollout, *ppo.shuffled, *ppo.lines, *ppo.step_stats.values(), *ppo.env.places.values()]
        return [x.data_ptr() for x in (*tensors, ppo.chance, ppo.gumbel, ppo.row, ppo.minibatch, ppo.together, ppo.weights, ppo.weights.grad)]

    ppo = trainer(num_steps=24)
    ppo.learn()
    before = places()
    ppo.config.num_steps = 72
    ppo.learn()
    assert ppo.update_count == 3 and places() == before


def test_lines_get_the_room_they_need():
    ppo = trainer()
    ppo.collect()
    ppo.epoch()
    lines, capacity = ppo.lines, ppo.lines.rows.size(1)
    ppo.epoch()
    assert ppo.lines is lines and ppo.descend_replayed.calls == 4  # the same places, which a CUDA graph reads
    ppo.lines = lines._make(x[:, :1].clone() for x in lines)
    ppo.epoch()
    assert ppo.lines.rows.size(1) == capacity and ppo.descend_replayed.calls == 2  # other places: recorded anew
    numbers = ppo.lines.pages[0].unique()
    assert torch.equal(numbers, torch.arange(len(numbers)))


def test_a_resumed_run_goes_on_bit_for_bit_and_so_does_ppo_py():
    whole, stopped, resumed = (trainer(seed=seed, min_lr=1e-3) for seed in (0, 0, 1))  # the learning rate does not fall
    whole.learn()
    stopped.config.num_steps = 48
    stopped.learn()
    stopped.config.num_steps = 96
    resumed.load_state_dict(stopped.state_dict())
    resumed.learn()
    assert resumed.update_count == 4 and torch.equal(resumed.weights, whole.weights) and torch.equal(resumed.obs, whole.obs)
    other = PPO(GPT(whole.policy.config), BreakoutAsciiVec(4, varied_starts=0.7), whole.config)
    other.load_state_dict(stopped.state_dict())
    np.testing.assert_array_equal(other.score_so_far, stopped.env.score)
    other.learn()
    assert other.global_step == 96


def test_numbers_that_are_not_finite_end_the_update():
    ppo = trainer()
    ppo.collect()
    ppo.buffer.data.returns[:] = math.nan
    with pytest.raises(FloatingPointError, match="gradient is not finite in update 1"):
        ppo.update()
    ppo.policy.policy_head.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        ppo.collect()


def test_what_cannot_be_compiled_runs_as_it_is():
    def broken(*args):
        raise RuntimeError("no compiler\nat all")

    ppo, plain = trainer(), trainer()
    ppo.loss = ppo.play = broken
    with pytest.warns(UserWarning, match="torch.compile does not work here, going on without: no compiler$"):
        ppo.learn()
    plain.learn()
    assert torch.equal(ppo.weights, plain.weights)
    ppo.loss = broken
    with pytest.raises(RuntimeError, match="no compiler"):  # what worked once is not to be tried another way
        ppo.epoch()


def test_an_odd_number_of_games_without_twins():
    torch.manual_seed(0)
    ppo = PPOOnDevice(GPT(GPTConfig(n_head=4, n_embd=16)), BreakoutOnDevice(3, CPU), config(twins=0, batch_size=9, num_steps=18))
    ppo.learn()
    assert ppo.global_step == 18 and ppo.stats["twin_correlation"] == 0


@pytest.mark.slow
def test_both_steps_can_be_traced_whole():
    """What torch.compile needs before it generates code: no break in the graph, and the same results."""
    ppo = trainer()
    ppo.collect()
    ppo.epoch()
    ppo.row.zero_()
    start = ppo.env.state_dict()
    expected = ppo.play()
    ppo.env.load_state_dict(start)
    for ours, theirs in zip(torch.compile(ppo.play, fullgraph=True, backend="aot_eager")(), expected):
        torch.testing.assert_close(ours, theirs)
    assert (torch.from_numpy(start["ball_y"]) != ppo.env.ball_y).all()  # played, in the places that the graph reads
    mb, gradients = Minibatch._make(x[0] for x in ppo.shuffled), []
    for loss in (ppo.loss, torch.compile(ppo.loss, fullgraph=True, backend="aot_eager")):
        ppo.weights.grad.zero_()
        loss(Lines._make(x[0] for x in ppo.lines), mb)[0].backward()
        gradients.append(ppo.weights.grad.clone())
    torch.testing.assert_close(*gradients)
