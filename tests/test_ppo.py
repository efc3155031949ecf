"""PPO: its losses by hand, environments of which the best value is known, and what an update does and records."""

import importlib
import math
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium.vector import AutoresetMode, VectorEnv
from helpers import PAGE, device_trainer, largest_score, tolerance

from breakout_ascii import BreakoutAsciiVec
from callbacks import Callback
from fast import FastGPT
from harness.supervise import StopTraining
from model import GPTConfig
from policies import SHIPPED, load_policy
from ppo import (
    PPO,
    Policy,
    PPOConfig,
    entropy_loss,
    explained_variance,
    k3,
    learning_rate,
    lost_lives,
    move_loss,
    policy_loss,
    prediction_loss,
    value_loss,
)
from rollout_buffer import Minibatch, paired_baseline, select


class Probe(VectorEnv):
    """Games of `length` steps whose best value is known, and whose only reward, play(state, action), ends them.

    Each game is in one of `states` states, which its observations show.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, play, length=1, states=1, truncates=False):
        self.num_envs = 8
        self.play = play
        self.length, self.states = length, states
        self.truncates = truncates
        self.single_observation_space = gym.spaces.Box(0, 1, (length * states,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = np.zeros(self.num_envs, int)
        self.state = self.np_random.integers(self.states, size=self.num_envs)
        return self.observe(), {}

    def observe(self):
        return np.eye(self.length * self.states, dtype=np.float32)[(self.t % self.length) * self.states + self.state]

    def step(self, actions):
        last = self.t == self.length - 1
        rewards = np.where(last, self.play(self.state, actions), 0.0)
        infos = {"final_obs": np.array([*self.observe(), None], object)[:-1]} if last.any() else {}
        self.t = np.where(last, 0, self.t + 1)
        self.state = np.where(last, self.np_random.integers(self.states, size=self.num_envs), self.state)
        terminated = last & (not self.truncates)
        truncated = last & self.truncates
        return self.observe(), rewards, terminated, truncated, infos


class Table(Policy):
    """A policy with logits and a value for each observation, and nothing shared between them."""

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Linear(size, 3, bias=False)

    def forward(self, obs):
        x = self.table(obs)
        return x[:, :2], x[:, 2]


def config(**changes):
    constants = dict(
        num_steps=10_000,
        rollout_steps=16,
        epochs=4,
        batch_size=32,
        gamma=0.9,
        lambd=0.95,
        lambd_end=0.95,
        lambd_steps=1,
        eps_clip=0.2,
        lr=0.02,
        min_lr=0.0,
        value_loss_coef=0.5,
        entropy_coef=0.0,
        max_grad_norm=10.0,
        seed=0,
    )
    return PPOConfig(**constants | changes)


def train(env, **changes):
    """Train a table on a probe, and return its logits and values for all observations."""
    torch.manual_seed(0)
    observations = env.single_observation_space.shape[0]
    policy = Table(observations)
    PPO(policy, env, config(**dict(num_steps=2_500, lr=0.1) | changes)).learn()
    with torch.no_grad():
        return policy(torch.eye(observations))


def test_an_env_that_resets_a_step_later_is_refused():
    """With another kind of autoreset a step of every game would be a reset, and be learned from."""
    env = Probe(lambda state, action: 1.0)
    env.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="SAME_STEP"):
        PPO(Table(1), env, config())


def test_constant_reward_is_worth_itself():
    """In games of one step the value is the reward."""
    _, values = train(Probe(lambda state, action: 1.0))
    assert values.tolist() == pytest.approx([1.0], abs=0.01)


def test_a_caller_without_gradients_trains_all_the_same():
    """A training inside torch.no_grad() learns, and leaves the caller's setting as it was."""
    with torch.no_grad():
        train(Probe(lambda state, action: 1.0), num_steps=64)
        assert not torch.is_grad_enabled()


def test_a_delayed_reward_is_discounted():
    """One step before a reward of 1 the value is gamma."""
    _, values = train(Probe(lambda state, action: 1.0, length=2))
    assert values.tolist() == pytest.approx([0.9, 1.0], abs=0.02)


def test_truncation_is_not_the_end():
    """The final observation is the state itself, so V = 1 + 0.5 V = 2; if it were a termination, V would be 1."""
    _, values = train(Probe(lambda state, action: 1.0, truncates=True), gamma=0.5)
    assert values.tolist() == pytest.approx([2.0], abs=0.05)


def test_the_right_action_in_each_of_two_states():
    """The policy learns to choose by what it observes."""
    logits, values = train(Probe(lambda state, action: np.where(action == state, 1.0, -1.0), states=2))
    probabilities = logits.softmax(-1)
    assert probabilities[0, 0] > 0.95 and probabilities[1, 1] > 0.95
    assert values.tolist() == pytest.approx([1.0, 1.0], abs=0.1)


def test_reward_scale():
    """Rewards are multiplied by the scale before anything is learned from them."""
    _, values = train(Probe(lambda state, action: 10.0), reward_scale=0.1)
    assert values.tolist() == pytest.approx([1.0], abs=0.01)


def breakout_ppo(seed=0, **changes):
    """A small PPO on Breakout: eight games, minibatches of 32 samples."""
    torch.manual_seed(seed)
    policy = FastGPT(GPTConfig(**PAGE, n_head=4, n_embd=16))
    env = BreakoutAsciiVec(8, varied_starts=0.7)
    constants = dict(prediction_coef=0.1, rollout_steps=8, num_steps=1000, reward_scale=0.1)
    return PPO(policy, env, config(**constants | changes))


def shipped_ppo():
    """A PPO that goes on from trained weights, with attention scores of hundreds of bits that need rescaling."""
    policy, _ = load_policy(SHIPPED)
    env = BreakoutAsciiVec(32, varied_starts=0.7)
    return PPO(policy, env, config(rollout_steps=16, num_steps=512, prediction_coef=0.1))


def deep_ppo():
    """A PPO with two layers, which compute shared prefixes."""
    torch.manual_seed(0)
    policy = FastGPT(GPTConfig(**PAGE, n_layer=2, n_head=2, n_embd=8))
    return PPO(policy, BreakoutAsciiVec(2), config(rollout_steps=8, batch_size=8, epochs=1))


def probe_ppo():
    return PPO(Table(2), Probe(lambda state, action: 1.0, states=2), config())


def minibatches_of(ppo, size=64):
    ppo.buffer.shuffle(size, ppo.generator)
    return [select(ppo.buffer.minibatches, torch.tensor([i])) for i in range(ppo.buffer.num_minibatches)]


@pytest.mark.parametrize("make", [breakout_ppo, shipped_ppo, deep_ppo, probe_ppo])
def test_ratio_is_one_before_the_first_step(make):
    """The policy that acts is the one that learns: the same weights, the same dtype, and on most CPUs the same bits.

    Where a matrix product of another size is rounded differently, the difference stays within what float32 allows.
    """
    ppo = make()
    ppo.collect()
    parameters = ppo.policy.named_parameters()
    heads = [p for name, p in parameters if "head.weight" in name or "table" in name]
    scale = 8 * max(p.norm(dim=1).max().item() for p in heads)
    allowed = scale * tolerance(largest_score(ppo.policy) if hasattr(ppo.policy, "config") else 1)
    for mb in minibatches_of(ppo, ppo.config.batch_size):
        logits, values = ppo.policy.heads(ppo.policy.features(mb.obs))
        new_logprobs = logits.log_softmax(-1).gather(1, mb.actions.unsqueeze(1)).squeeze(1)
        assert (new_logprobs - mb.old_logprobs).abs().max() <= allowed
        assert (values - mb.old_values).abs().max() <= allowed
    first, second, *_ = ppo.epoch()[:, ppo.stat_names.index("approx_kl")].tolist()
    assert first <= allowed**2
    # Once the weights have moved, it is not one.
    assert second > 1e-9 and second > 100 * first


def test_a_lost_life_ends_the_sum_but_not_the_game():
    """A lost life counts as terminal for GAE: the return is the reward alone. Yet the next page is still predicted."""
    ppo = breakout_ppo(rollout_steps=40, seed=1)
    # All balls fall in the first step.
    games = ppo.env.games
    games.lives[:], games.ball_y[:], games.dy[:] = 3, 22, 1
    games.draw(np.ones(8, bool))
    ppo.obs.copy_(torch.from_numpy(ppo.env.observation()))
    ppo.collect()
    samples = ppo.buffer.samples
    terminated, rewards = (ppo.buffer.fields[name].flatten() for name in ("terminated", "rewards"))
    assert terminated[:8].all() and (games.lives < 5).any()
    assert samples.has_next[:8].all() and samples.changes[:8].any(1).all()
    torch.testing.assert_close(samples.returns[terminated], 0.1 * rewards[terminated], rtol=0, atol=1e-6)


def test_a_life_lost_in_a_truncated_step_is_lost():
    """Gymnasium reports it in final_info alone, because the new game has not lost any."""
    infos = {"life_lost": np.array([False, True, False]), "final_info": {"life_lost": np.array([True, False, False])}}
    assert lost_lives(infos).tolist() == [True, True, False]
    assert lost_lives({"life_lost": np.array([True])}).tolist() == [True] and not lost_lives({})

    # The same in a game that is truncated in the very step that loses a life.
    env = BreakoutAsciiVec(4)
    env.reset(seed=0)
    steps, lost = 0, False
    while not lost:
        *_, infos = env.step(np.zeros(4, int))
        steps += 1
        lost = lost_lives(infos).any()
    env = BreakoutAsciiVec(4, max_episode_steps=steps)
    env.reset(seed=0)
    for _ in range(steps):
        *_, truncated, infos = env.step(np.zeros(4, int))
    assert truncated.all() and not infos["life_lost"].any() and lost_lives(infos).any()


def test_nothing_is_predicted_across_the_end_of_an_episode():
    """The page after an episode belongs to another one, so it neither counts nor passes gradients."""
    ppo = breakout_ppo(rollout_steps=12)
    ppo.env.max_episode_steps = 5
    ppo.collect()
    has_next = ppo.buffer.fields["has_next"]
    assert (~has_next).all(1).nonzero().flatten().tolist() == [4, 9]
    logits, changes = torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3, dtype=torch.bool)
    loss, _ = prediction_loss(logits, changes, torch.tensor([True, False, True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2) / 2)
    assert logits.grad[[1, 3]].eq(0).all() and logits.grad[[0, 2]].ne(0).all()


def test_k3_is_never_negative_and_right_for_tiny_differences():
    """In float32 the plain formula, exp(x) - 1 - x, is negative for many of these; ours is compared with float64."""
    x = torch.cat([sign * torch.logspace(-12, 1, 10_001) for sign in (1, -1)])
    assert (k3(x) >= 0).all() and (x.exp() - 1 - x < 0).float().mean() > 0.05
    small = x[x.abs() < 0.01].double()
    exact = small**2 / 2 + small**3 / 6 + small**4 / 24
    rounding = torch.finfo(torch.float32).eps * small.abs()  # of expm1 and of x
    assert ((k3(small.float()) - exact).abs() <= rounding).all()
    x = x[x.abs() > 1e-3].requires_grad_()
    k3(x).sum().backward()
    torch.testing.assert_close(x.grad, x.exp() - 1)


def test_policy_loss_by_hand():
    """Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1 and eps 0.2: terms 1.2, -2, 0.5, -0.8."""
    new = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    loss, stats = policy_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8) / 4)
    assert stats["clipfrac"] == 1
    kl = (2 * (1 - math.log(2)) + 2 * (-0.5 + math.log(2))) / 4
    assert stats["approx_kl"].item() == pytest.approx(kl)


def test_value_loss_by_hand():
    """It is half the mean squared error; with clipping, each sample counts with the larger of its two errors."""
    new, old, returns = torch.tensor([3.0, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([4.0, 1.0])
    assert value_loss(new, old, returns)[0].item() == pytest.approx(0.5 * (1 + 0.25) / 2)
    # Held within 1 of the old value, the first value is 1, and its error (1 - 4)^2 = 9 is the larger one.
    assert value_loss(new, old, returns, value_clip=1.0)[0].item() == pytest.approx(0.5 * (9 + 0.25) / 2)


def test_entropy_by_hand():
    """Three equal probabilities have log 3, and (2/3, 1/3, 0) has what the formula says."""
    loss, stats = entropy_loss(torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -1e9]]).log_softmax(-1))
    two_thirds = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert stats["entropy"].item() == pytest.approx((math.log(3) + two_thirds) / 2)
    assert loss.item() == -stats["entropy"].item()


def test_move_loss_by_hand():
    """The two distributions move with probabilities 2/3 and 1/3."""
    loss, stats = move_loss(torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -1e9]]).log_softmax(-1))
    assert loss.item() == stats["move_loss"].item() == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_moving_less_if_it_costs():
    """A small reward for moving is taken, unless moving costs more."""

    def staying(coef):
        logits, _ = train(Probe(lambda state, action: 0.02 * action), move_coef=coef, entropy_coef=0.1)
        return logits.softmax(-1)[0, 0].item()

    assert staying(0.0) < 0.5 < staying(5.0)


def test_explained_variance():
    """It is 1 for perfect values, 0 for their mean, negative for worse ones, and NaN where nothing varies."""
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 2.0), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.ones(3)).isnan()


def test_learning_rate():
    """It falls along half a cosine and stays at its minimum afterwards."""
    cosine = [learning_rate(x, 1.0, 0.2) for x in (0, 0.25, 0.5, 1, 1.1)]
    assert cosine == pytest.approx([1, 1 - 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.6, 0.2, 0.2])
    assert {learning_rate(x, 0.3, 0.3) for x in (0, 0.4, 1)} == {0.3}  # no schedule if both are equal


def record_lambdas(monkeypatch, ppo):
    """Return the list to which each rollout of a PPO will add its lambda."""
    finish, lambdas = ppo.buffer.finish, []

    def recording(last_values, gamma, lambd, reward_scale):
        lambdas.append(lambd)
        return finish(last_values, gamma, lambd, reward_scale)

    monkeypatch.setattr(ppo.buffer, "finish", recording)
    return lambdas


def test_lambda_rises_over_its_steps(monkeypatch):
    """It rises evenly for LAMBD_STEPS, whatever the length of the training is, and stays there."""
    ppo = breakout_ppo(lambd=0.5, lambd_end=0.9, lambd_steps=128)
    lambdas = record_lambdas(monkeypatch, ppo)
    for global_step in (0, 64, 128, 192):
        ppo.global_step = global_step
        ppo.collect()
    assert lambdas == pytest.approx([0.5, 0.7, 0.9, 0.9])


def test_advantages_are_normalized_even_if_they_hardly_differ():
    """A small difference on top of a large mean is scaled up to standard deviations of 1."""
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.samples.advantages[:] = 5 + 1e-3 * (torch.arange(64) % 2)
    ppo.buffer.shuffle(64, ppo.generator)
    ppo.normalize_advantages()
    torch.testing.assert_close(ppo.buffer.minibatches.advantages.abs(), torch.ones(1, 64), rtol=1e-2, atol=0)


def test_advantages_of_each_minibatch_are_normalized():
    """Mean 0 and variance 1 hold in every minibatch, not only in the whole rollout."""
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.shuffle(16, ppo.generator)
    ppo.normalize_advantages()
    variance, mean = torch.var_mean(ppo.buffer.minibatches.advantages, 1, correction=0)
    torch.testing.assert_close((mean, variance), (torch.zeros(4), torch.ones(4)), rtol=1e-5, atol=1e-5)


def test_gradient_norm_is_clipped():
    """The norm that is logged is the one before clipping."""
    ppo = breakout_ppo(max_grad_norm=1e-3)
    ppo.collect()
    ppo.epoch()
    norm = torch.stack([p.grad.norm() for p in ppo.policy.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert (ppo.step_stats[:, ppo.stat_names.index("grad_norm")] > 1e-2).all()


def test_numbers_that_are_not_finite_end_the_training():
    """The update in which they occur is lost, and nothing before it."""
    ppo = breakout_ppo()
    collect = ppo.collect

    def spoiled():
        collect()
        if ppo.update_count == 1:
            ppo.buffer.samples.returns[:] = math.nan

    ppo.collect = spoiled
    with pytest.raises(FloatingPointError, match="the loss is not finite in update 2; try a lower learning rate"):
        ppo.learn()
    assert ppo.snapshot["update_count"] == 1 and all(x.isfinite().all() for x in ppo.snapshot["model"].values())
    with pytest.raises(FloatingPointError, match="the logits are not finite in update 2; try a lower learning rate"):
        collect()


def test_a_gradient_that_is_not_finite_is_named_though_the_next_loss_is_not_either():
    """The error names what failed first."""
    ppo = breakout_ppo()
    ppo.stat_names = ["policy_loss", "approx_kl", "grad_norm"]
    ppo.epoch = lambda number: torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, math.inf], [math.nan, math.nan, math.nan]])
    with pytest.raises(FloatingPointError, match="the gradient is not finite in update 1"):
        ppo.update()


class Watch(Callback):
    """Appends look(trainer) to `seen` after every update."""

    def __init__(self, look):
        self.look = look
        self.seen = []

    def on_update_end(self, trainer):
        self.seen.append(self.look(trainer))


@pytest.mark.parametrize("make", [breakout_ppo, device_trainer])
@pytest.mark.parametrize("updates", [1, 4])
def test_the_learning_rate_falls_and_lambda_rises_from_the_first_update(monkeypatch, make, updates):
    """The first update takes LR and LAMBD, even if it is the only one.

    The one after the last would take MIN_LR and LAMBD_END.
    """
    ppo = make(lr=0.02, min_lr=0.01, lambd=0.5, lambd_end=0.9)
    ppo.config.num_steps = ppo.config.lambd_steps = updates * ppo.samples_per_update
    lambdas = record_lambdas(monkeypatch, ppo)
    watch = Watch(lambda ppo: (ppo.stats["lr"], ppo.lr.item()))
    ppo.callbacks = [watch]
    ppo.learn()
    logged, used = zip(*watch.seen)
    cosine = [0.01 + 0.01 * math.cos(math.pi * i / updates / 2) ** 2 for i in range(updates)]
    assert logged == used and logged == pytest.approx(cosine)
    assert lambdas == pytest.approx([0.5 + 0.4 * i / updates for i in range(updates)])
    # The optimizer has the tensor itself, which a CUDA graph reads.
    assert ppo.optimizer.param_groups[0]["lr"] is ppo.lr


SMALL_TRAININGS = {
    "reinforce_cartpole": dict(EPISODES=2, HIDDEN=4, NUM_STEPS=150),
    "ppo_lunarlander": dict(NUM_ENVS=2, ROLLOUT_STEPS=8, BATCH_SIZE=8, EPOCHS=1, HIDDEN=4, NUM_STEPS=48),
    "actor_critic_tictactoe": dict(GAMES=8, HIDDEN=4, NUM_STEPS=100),
    "ppo_llm_breakout": dict(MODEL="mlp", NUM_ENVS=2, ROLLOUT_STEPS=8, BATCH_SIZE=8, EPOCHS=1, NUM_STEPS=48),
    # This one has a constant learning rate.
    "dqn_space_invaders": dict(NUM_ENVS=2, UPDATE_STEPS=8, REPLAY_SIZE=100, BURN_IN=20, BATCH_SIZE=2, NUM_STEPS=24),
}


@pytest.mark.parametrize("name", SMALL_TRAININGS)
def test_every_training_has_the_same_schedule(name):
    """Where MIN_LR exists, the learning rate falls to it along half a cosine, as train_ppo.py's does."""
    algorithm = importlib.import_module(f"algorithms.{name}").ALGORITHM
    c = SimpleNamespace(**algorithm.constants | SMALL_TRAININGS[name] | {"DEVICE": "cpu", "LR": 1e-3})
    trainer = algorithm.build(c)
    watch = Watch(lambda trainer: (trainer.global_step, trainer.stats["lr"]))
    trainer.callbacks = [watch]
    trainer.learn()
    steps, rates = zip(*watch.seen)
    assert len(steps) > 2 and steps[-1] >= c.NUM_STEPS
    min_lr = getattr(c, "MIN_LR", c.LR)
    cosine = [math.cos(math.pi * step / c.NUM_STEPS / 2) ** 2 for step in (0, *steps[:-1])]
    assert rates == pytest.approx([min_lr + (c.LR - min_lr) * x for x in cosine])


def test_actions_are_drawn_from_the_policy():
    """Their shares are the policy's probabilities, within five standard deviations, and so are the stored ones."""
    ppo = breakout_ppo(rollout_steps=200, batch_size=1600)
    probabilities = torch.tensor([0.2, 0.3, 0.5])
    with torch.no_grad():
        ppo.policy.policy_head.weight.zero_()
        ppo.policy.policy_head.bias.copy_(probabilities.log())
    ppo.collect()
    actions = ppo.buffer.samples.actions
    torch.testing.assert_close(torch.bincount(actions) / 1600, probabilities, atol=0.063, rtol=0)
    torch.testing.assert_close(ppo.buffer.samples.old_logprobs.exp(), probabilities[actions])


def test_prediction_weight_zero_leaves_its_head_alone():
    """Without a weight the prediction is neither trained nor logged."""

    def head_moves(coef):
        ppo = breakout_ppo(prediction_coef=coef)
        before = ppo.policy.change_head.weight.clone()
        ppo.collect()
        stats = ppo.update()
        assert ("prediction_loss" in stats) == (coef > 0)
        return not torch.equal(before, ppo.policy.change_head.weight)

    assert head_moves(0.1) and not head_moves(0.0)


def test_statistics_of_an_update():
    """They are plain floats, and these names become columns of metrics.csv."""
    ppo = breakout_ppo()
    ppo.collect()
    stats = ppo.update()
    losses = {"policy_loss", "value_loss", "entropy", "move_loss", "prediction_loss"}
    others = {"approx_kl", "approx_kl_max", "clipfrac", "explained_variance", "grad_norm", "lr", "episode_return"}
    assert set(stats) == losses | others
    assert all(type(value) is float for value in stats.values())
    assert stats["approx_kl_max"] >= stats["approx_kl"] and ppo.global_step == 64
    paired = breakout_ppo(paired_envs=True)
    paired.collect()
    assert set(paired.update()) - set(stats) == {"pair_correlation"}


def test_a_statistic_is_the_mean_of_its_gradient_steps(monkeypatch):
    """What is logged for an update is the mean over the minibatches of all its epochs."""
    ppo = breakout_ppo(epochs=3)
    loss, seen = ppo.loss, []

    def recording(mb):
        value, stats = loss(mb)
        seen.append(stats)
        return value, stats

    monkeypatch.setattr(ppo, "loss", recording)
    ppo.collect()
    stats = ppo.update()
    assert len(seen) == 3 * 2
    for name in seen[0]:
        mean = np.mean([of_step[name].item() for of_step in seen])
        assert stats[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name


def test_stop_goes_back_to_the_beginning_of_the_update():
    """A stop ends the training after the minibatch at hand; the snapshot goes on as if there had been no stop."""
    ppo = breakout_ppo()
    train_step, steps = ppo.train_step, 0

    def stopping():
        nonlocal steps
        steps += 1
        if steps == 2 * 8 + 3:  # the third step of the third update
            ppo.request_stop()
        train_step()

    ppo.train_step = stopping
    with pytest.raises(StopTraining):
        ppo.learn()
    assert steps == 2 * 8 + 3 and ppo.snapshot["update_count"] == 2 and ppo.snapshot["global_step"] == 128
    resumed, straight = breakout_ppo(seed=5), breakout_ppo()
    resumed.load_state_dict(ppo.snapshot)
    for other, updates in ((resumed, 1), (straight, 3)):
        for _ in range(updates):
            other.collect()
            other.update()
    assert torch.equal(resumed.weights, straight.weights)


def test_events_come_in_order_and_evaluations_decide_what_is_best():
    """Callbacks hear of the best model only when an evaluation exceeds all before it."""
    scores, seen = {1: 5.0, 3: 3.0, 4: 8.0}, []

    class Events(Callback):
        def on_training_start(self, ppo):
            seen.append("start")

        def on_update_end(self, ppo):
            seen.append(ppo.update_count)
            if ppo.update_count in scores:
                ppo.evaluation_end(ppo.policy_state(), {"score": scores[ppo.update_count]})

        def on_evaluation_end(self, ppo):
            best = "is best" if ppo.is_best else "is not"
            seen.append((ppo.evaluated["update_count"], best))

        def on_training_end(self, ppo):
            seen.append("end")

    ppo = breakout_ppo(num_steps=64 * 4)
    ppo.callbacks = [Events()]
    ppo.learn()
    assert seen == ["start", 1, (1, "is best"), 2, 3, (3, "is not"), 4, (4, "is best"), "end"]
    assert ppo.best_score == 8


def test_among_equal_scores_the_share_of_varied_games_cleared_decides():
    ppo = breakout_ppo(num_steps=64)
    better = []
    for score, varied in ((900.0, 0.9), (960.0, 0.5), (960.0, 0.4), (960.0, 0.7), (945.0, 0.8), (960.0, 0.7)):
        ppo.evaluation_end(ppo.policy_state(), {"score": score, "varied": varied})
        better.append(ppo.is_best)
    assert better == [True, True, False, True, False, False] and ppo.best == {"score": 960.0, "varied": 0.7}


def test_returns_of_episodes_are_in_points():
    """They are sums of unscaled rewards, and go on across rollouts until the episode ends."""
    ppo = breakout_ppo(rollout_steps=2)
    rewards = torch.tensor([[10.0] + [0.0] * 7, [50.0] + [10.0] * 7])
    has_next = torch.ones(2, 8, dtype=torch.bool)
    ppo.buffer.fields = {"rewards": rewards, "has_next": has_next}
    has_next[1, 0] = False
    ppo.record_episode_returns()
    has_next[:] = True
    has_next[0, 1] = False
    ppo.record_episode_returns()
    assert list(ppo.episode_returns) == pytest.approx([60.0, 10.0]) and ppo.episode_returns.maxlen == 100
    assert ppo.return_so_far.tolist() == pytest.approx([60.0, 10.0] + [20.0] * 6)


def test_deeper_models_learn_from_pages_that_begin_alike():
    """Two layers share prefixes, so each minibatch is a group of pages that are neighbours in their order."""
    ppo = deep_ppo()
    ppo.collect()
    before = ppo.weights.detach().clone()
    ppo.epoch()
    assert not torch.equal(ppo.weights, before)
    # Of these 16 pages each minibatch of 8 is one group.
    alike = sorted(map(tuple, ppo.buffer.samples.obs.tolist()))
    assert sorted(sorted(map(tuple, obs)) for obs in ppo.buffer.minibatches.obs.tolist()) == [alike[:8], alike[8:]]


def fix_minibatches(buffer, part):
    """Let the two minibatches be this part of each half of the buffer's samples, in their order."""

    def shuffle(*_):
        buffer.minibatches = Minibatch(*(x.unflatten(0, (2, 32))[:, part].clone() for x in buffer.samples))
        buffer.minibatch_position.zero_()

    buffer.shuffle = shuffle


def rank_of_two(rank, folder):
    """Check one of two ranks, each of which trains with every other sample of each minibatch.

    Both together learn what one PPO learns alone from all samples. What a rank logs of its own games is its own, as
    docs/runs.md says, and a stop of one rank stops both.
    """
    torch.set_num_threads(1)
    alone = breakout_ppo(max_grad_norm=0.5)
    alone.collect()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    both = breakout_ppo(seed=rank, max_grad_norm=0.5)  # rank 0's weights count
    both.policy.index, both.buffer.samples = alone.policy.index, alone.buffer.samples
    fix_minibatches(alone.buffer, slice(None))
    fix_minibatches(both.buffer, slice(rank, None, 2))
    first, second = alone.update(), both.update()
    torch.testing.assert_close(both.weights, alone.weights, rtol=1e-4, atol=1e-4)  # after eight steps of 0.02
    for name in ("policy_loss", "value_loss", "prediction_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    assert alone.global_step == 64 and both.global_step == 2 * 64  # the steps of both ranks

    # Each rank plays its own games.
    both.collect()
    played = [torch.empty(64) for _ in range(2)]
    dist.all_gather(played, both.buffer.samples.old_logprobs)
    assert not torch.equal(*played)

    both.config.paired_envs = True
    both.collect()
    both.episode_returns.append(10.0 * rank)
    third, samples = both.update(), both.buffer.samples
    own = [third[name] for name in ("episode_return", "explained_variance", "pair_correlation")]
    explained = explained_variance(samples.old_values, samples.returns).item()
    assert own == [10.0 * rank, explained, both.buffer.pair_correlation.item()]
    of_ranks = [None, None]
    dist.all_gather_object(of_ranks, own)
    assert all(x != y for x, y in zip(*of_ranks))

    if rank == 1:
        both.request_stop()
    with pytest.raises(StopTraining):
        both.learn()
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_learns_from_the_samples_of_both(tmp_path):
    """See `rank_of_two`. A fork spares both ranks the imports, which take longer than the test, but not with CUDA."""
    fork = sys.platform == "linux" and not torch.cuda.is_available()
    torch.multiprocessing.start_processes(
        rank_of_two, args=(tmp_path,), nprocs=2, start_method="fork" if fork else "spawn"
    )


def test_pairs_start_each_rollout_alike_and_what_they_share_is_taken_off(monkeypatch):
    """Both games of a pair start on the same page, and their advantages are those of `paired_baseline`."""
    ppo = breakout_ppo(paired_envs=True, rollout_steps=32)
    agree, answers = ppo.env.in_sync, []

    def recording():
        answers.append(agree())
        return answers[-1]

    monkeypatch.setattr(ppo.env, "in_sync", recording)
    for _ in range(2):
        answers.clear()
        ppo.collect()
        obs = ppo.buffer.fields["obs"]  # (32, 8, lines)
        assert torch.equal(obs[0, :4], obs[0, 4:])
        in_sync = torch.from_numpy(np.logical_and.accumulate(answers))
        assert torch.equal(ppo.buffer.fields["in_sync"], in_sync)
        samples = ppo.buffer.samples
        advantages = samples.advantages.view(32, 8)
        plain = (samples.returns - samples.old_values).view(32, 8)
        torch.testing.assert_close(advantages, paired_baseline(plain, in_sync)[0], rtol=1e-4, atol=1e-5)
        assert in_sync.any() and not torch.equal(advantages, plain)
