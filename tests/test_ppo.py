import importlib
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gymnasium.vector import AutoresetMode, VectorEnv
from helpers import device_trainer, largest_score, tolerance

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
    """Games of `length` steps over `states` states, with a known best value. `play(state, action)` -> reward."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, play, length=1, states=1, truncates=False):
        self.num_envs, self.play, self.length, self.states, self.truncates = 8, play, length, states, truncates
        self.single_observation_space = gym.spaces.Box(0, 1, (length * states,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = np.zeros(self.num_envs, int), self.np_random.integers(self.states, size=self.num_envs)
        return self.observe(), {}

    def observe(self):
        return np.eye(self.length * self.states, dtype=np.float32)[(self.t % self.length) * self.states + self.state]

    def step(self, actions):
        last = self.t == self.length - 1
        rewards = np.where(last, self.play(self.state, actions), 0.0)
        infos = {"final_obs": np.array([*self.observe(), None], object)[:-1]} if last.any() else {}
        self.t = np.where(last, 0, self.t + 1)
        self.state = np.where(last, self.np_random.integers(self.states, size=self.num_envs), self.state)
        none = np.zeros_like(last)
        return self.observe(), rewards, *((none, last) if self.truncates else (last, none)), infos


class Table(Policy):
    """Logits and a value for each observation, nothing shared."""

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Linear(size, 3, bias=False)

    def forward(self, obs):
        x = self.table(obs)
        return x[:, :2], x[:, 2]


def config(**changes):
    return PPOConfig(
        **{
            **dict(
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
            ),
            **changes,
        }
    )


def train(env, **changes):
    torch.manual_seed(0)
    policy = Table(env.single_observation_space.shape[0])
    PPO(policy, env, config(**changes)).learn()
    with torch.no_grad():
        return policy(torch.eye(env.single_observation_space.shape[0]))


def test_an_env_that_resets_a_step_later_is_refused():
    env = Probe(lambda state, action: 1.0)
    env.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="SAME_STEP"):
        PPO(Table(1), env, config())


def test_constant_reward_is_worth_itself():
    _, values = train(Probe(lambda state, action: 1.0))
    assert values.tolist() == pytest.approx([1.0], abs=0.01)


def test_a_caller_without_gradients_trains_all_the_same():
    with torch.no_grad():
        train(Probe(lambda state, action: 1.0), num_steps=64)
        assert not torch.is_grad_enabled()


def test_a_delayed_reward_is_discounted():
    _, values = train(Probe(lambda state, action: 1.0, length=2))
    assert values.tolist() == pytest.approx([0.9, 1.0], abs=0.02)


def test_truncation_is_not_the_end():
    """The final observation is the state itself, so V = 1 + 0.5 V = 2; as a termination it would be 1."""
    _, values = train(Probe(lambda state, action: 1.0, truncates=True), gamma=0.5)
    assert values.tolist() == pytest.approx([2.0], abs=0.05)


def test_the_right_action_in_each_of_two_states():
    logits, values = train(Probe(lambda state, action: np.where(action == state, 1.0, -1.0), states=2))
    probabilities = logits.softmax(-1)
    assert probabilities[0, 0] > 0.95 and probabilities[1, 1] > 0.95
    assert values.tolist() == pytest.approx([1.0, 1.0], abs=0.1)


def test_reward_scale():
    _, values = train(Probe(lambda state, action: 10.0), reward_scale=0.1)
    assert values.tolist() == pytest.approx([1.0], abs=0.01)


def breakout_ppo(seed=0, **changes):
    torch.manual_seed(seed)
    policy = FastGPT(GPTConfig(n_head=4, n_embd=16))
    env = BreakoutAsciiVec(8, varied_starts=0.7)
    return PPO(
        policy,
        env,
        config(**{**dict(prediction_coef=0.1, rollout_steps=8, num_steps=1000, reward_scale=0.1), **changes}),
    )


def shipped_ppo():
    """Trained weights: scores of hundreds of bits, heads that need rescaling."""
    policy, _ = load_policy(SHIPPED)
    return PPO(
        policy, BreakoutAsciiVec(32, varied_starts=0.7), config(rollout_steps=16, num_steps=512, prediction_coef=0.1)
    )


def minibatches_of(ppo, size=64):
    ppo.buffer.shuffle(size, ppo.generator)
    return [select(ppo.buffer.minibatches, torch.tensor([i])) for i in range(ppo.buffer.num_minibatches)]


def deep_ppo():
    torch.manual_seed(0)
    return PPO(
        FastGPT(GPTConfig(n_layer=2, n_head=2, n_embd=8)),
        BreakoutAsciiVec(2),
        config(rollout_steps=8, batch_size=8, epochs=1),
    )


@pytest.mark.parametrize(
    "make", [breakout_ppo, shipped_ppo, deep_ppo, lambda: PPO(Table(2), Probe(lambda s, a: 1.0, states=2), config())]
)
def test_ratio_is_one_before_the_first_step(make):
    """What acts is what learns: the same weights, the same dtype, and on most CPUs the same bits. Where a matrix product of another
    size rounds otherwise, the difference stays what float32 allows."""
    ppo = make()
    ppo.collect()
    near = tolerance(largest_score(ppo.policy) if hasattr(ppo.policy, "config") else 1)
    scale = (
        max(
            p.norm(dim=1).max().item()
            for name, p in ppo.policy.named_parameters()
            if "head.weight" in name or "table" in name
        )
        * 8
    )
    for mb in minibatches_of(ppo, ppo.config.batch_size):
        logits, values = ppo.policy.heads(ppo.policy.features(mb.obs))
        new_logprobs = logits.log_softmax(-1).gather(1, mb.actions.unsqueeze(1)).squeeze(1)
        assert (new_logprobs - mb.old_logprobs).abs().max() <= near * scale and (
            values - mb.old_values
        ).abs().max() <= near * scale
    first, second, *_ = ppo.epoch()[:, ppo.stat_names.index("approx_kl")].tolist()
    assert (
        first <= (near * scale) ** 2 and second > 1e-9 and second > 100 * first
    )  # it is not one, once the weights have moved


def test_a_lost_life_ends_the_sum_but_not_the_game():
    ppo = breakout_ppo(rollout_steps=40, seed=1)
    ppo.env.games.lives[:], ppo.env.games.ball_y[:], ppo.env.games.dy[:] = 3, 22, 1  # all balls fall in the first step
    ppo.env.games.draw(np.ones(8, bool))
    ppo.obs.copy_(torch.from_numpy(ppo.env.observation()))
    ppo.collect()
    data, terminated = ppo.buffer.samples, ppo.buffer.fields["terminated"].flatten()
    assert terminated[:8].all() and (ppo.env.games.lives < 5).any()
    assert data.has_next[:8].all() and data.changes[:8].any(1).all()
    torch.testing.assert_close(
        data.returns[terminated], 0.1 * ppo.buffer.fields["rewards"].flatten()[terminated], rtol=0, atol=1e-6
    )


def test_a_life_lost_in_a_truncated_step_is_lost():
    """Gymnasium tells of it in final_info alone: the new game has lost none."""
    infos = {"life_lost": np.array([False, True, False]), "final_info": {"life_lost": np.array([True, False, False])}}
    assert lost_lives(infos).tolist() == [True, True, False]
    assert lost_lives({"life_lost": np.array([True])}).tolist() == [True] and not lost_lives({})
    env = BreakoutAsciiVec(4)
    env.reset(seed=0)
    for step in range(1, 200):
        *_, terminated, truncated, infos = env.step(np.zeros(4, int))
        if lost_lives(infos).any() and not truncated.any():
            break
    env = BreakoutAsciiVec(4, max_episode_steps=step)
    env.reset(seed=0)
    for _ in range(step):
        *_, truncated, infos = env.step(np.zeros(4, int))
    assert truncated.all() and not infos["life_lost"].any() and lost_lives(infos).any()


def test_nothing_is_predicted_across_the_end_of_an_episode():
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
    """In float32, where exp(x) - 1 - x is negative for a fifth of these, and against float64."""
    x = torch.cat([sign * torch.logspace(-12, 1, 10_001) for sign in (1, -1)])
    assert (k3(x) >= 0).all() and (x.exp() - 1 - x < 0).float().mean() > 0.05
    small = x[x.abs() < 0.01].double()
    exact = small**2 / 2 + small**3 / 6 + small**4 / 24
    rounding = torch.finfo(torch.float32).eps * small.abs()  # of expm1, and of x
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
    new, old, returns = torch.tensor([3.0, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([4.0, 1.0])
    assert value_loss(new, old, returns)[0].item() == pytest.approx(0.5 * (1 + 0.25) / 2)
    # held within 1 of the old value the first error is (1 - 4)^2 = 9, the worse one
    assert value_loss(new, old, returns, value_clip=1.0)[0].item() == pytest.approx(0.5 * (9 + 0.25) / 2)


def test_entropy_by_hand():
    loss, stats = entropy_loss(torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -1e9]]).log_softmax(-1))
    two_thirds = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert stats["entropy"].item() == pytest.approx((math.log(3) + two_thirds) / 2)
    assert loss.item() == -stats["entropy"].item()


def test_move_loss_by_hand():
    loss, stats = move_loss(torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -1e9]]).log_softmax(-1))
    assert loss.item() == stats["move_loss"].item() == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_moving_less_if_it_costs():
    def staying(coef):
        logits, _ = train(Probe(lambda state, action: 0.02 * action), move_coef=coef, entropy_coef=0.1)
        return logits.softmax(-1)[0, 0].item()

    assert staying(0.0) < 0.5 < staying(5.0)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 2.0), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.ones(3)).isnan()


def test_learning_rate():
    cosine = [learning_rate(x, 1.0, 0.2) for x in (0, 0.25, 0.5, 1, 1.1)]
    assert cosine == pytest.approx([1, 1 - 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.6, 0.2, 0.2])
    assert {learning_rate(x, 0.3, 0.3) for x in (0, 0.4, 1)} == {0.3}  # equal: no schedule


def test_lambda_rises_over_its_steps():
    ppo, seen = breakout_ppo(lambd=0.5, lambd_end=0.9, lambd_steps=128), []
    ppo.buffer.finish = lambda last_values, gamma, lambd, reward_scale: seen.append(lambd)
    for global_step in (0, 64, 128, 192):
        ppo.global_step = global_step
        ppo.collect()
    assert seen == pytest.approx([0.5, 0.7, 0.9, 0.9])


def test_advantages_are_normalized_even_if_they_hardly_differ():
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.samples.advantages[:] = 5 + 1e-3 * (torch.arange(64) % 2)
    ppo.buffer.shuffle(64, ppo.generator)
    ppo.normalize_advantages()
    torch.testing.assert_close(ppo.buffer.minibatches.advantages.abs(), torch.ones(1, 64), rtol=1e-2, atol=0)


def test_advantages_of_each_minibatch_are_normalized():
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.shuffle(16, ppo.generator)
    ppo.normalize_advantages()
    variance, mean = torch.var_mean(ppo.buffer.minibatches.advantages, 1, correction=0)
    torch.testing.assert_close((mean, variance), (torch.zeros(4), torch.ones(4)), rtol=1e-5, atol=1e-5)


def test_gradient_norm_is_clipped():
    ppo = breakout_ppo(max_grad_norm=1e-3)
    ppo.collect()
    ppo.epoch()
    norm = torch.stack([p.grad.norm() for p in ppo.policy.parameters()]).norm()
    assert (ppo.step_stats[:, ppo.stat_names.index("grad_norm")] > 1e-2).all() and norm.item() == pytest.approx(
        1e-3, rel=1e-3
    )


def test_numbers_that_are_not_finite_end_the_training_before_it():
    """The update is lost, what was before it is not."""
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
    ppo = breakout_ppo()
    ppo.stat_names = ["policy_loss", "approx_kl", "grad_norm"]
    ppo.epoch = lambda: torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, math.inf], [math.nan, math.nan, math.nan]])
    with pytest.raises(FloatingPointError, match="the gradient is not finite in update 1"):
        ppo.update()


@pytest.mark.parametrize("make", [breakout_ppo, device_trainer])
@pytest.mark.parametrize("updates", [1, 4])
def test_the_learning_rate_falls_and_lambda_rises_from_the_first_update(make, updates):
    """The first update takes LR and LAMBD, even if it is the only one; the one after the last would take MIN_LR and LAMBD_END."""
    ppo = make(lr=0.02, min_lr=0.01, lambd=0.5, lambd_end=0.9)
    ppo.config.num_steps = ppo.config.lambd_steps = updates * ppo.samples_per_update
    finish, rates, lambdas = ppo.buffer.finish, [], []
    ppo.buffer.finish = lambda *args: lambdas.append(args[2]) or finish(*args)
    ppo.callbacks = [
        type(
            "Watch", (Callback,), {"on_update_end": lambda self, ppo: rates.append((ppo.stats["lr"], ppo.lr.item()))}
        )()
    ]
    ppo.learn()
    assert [lr for lr, _ in rates] == pytest.approx(
        [0.01 + 0.01 * math.cos(math.pi * i / updates / 2) ** 2 for i in range(updates)]
    )
    assert lambdas == pytest.approx([0.5 + 0.4 * i / updates for i in range(updates)])
    assert all(x == y for x, y in rates) and ppo.optimizer.param_groups[0]["lr"] is ppo.lr  # which a CUDA graph reads


SMALL_TRAININGS = {
    "reinforce_cartpole": dict(EPISODES=2, HIDDEN=4, NUM_STEPS=150),
    "ppo_lunarlander": dict(NUM_ENVS=2, ROLLOUT_STEPS=8, BATCH_SIZE=8, EPOCHS=1, HIDDEN=4, NUM_STEPS=48),
    "actor_critic_tictactoe": dict(GAMES=8, HIDDEN=4, NUM_STEPS=100),
    "ppo_llm_breakout": dict(MODEL="mlp", NUM_ENVS=2, ROLLOUT_STEPS=8, BATCH_SIZE=8, EPOCHS=1, NUM_STEPS=48),
    "dqn_space_invaders": dict(
        NUM_ENVS=2, UPDATE_STEPS=8, REPLAY_SIZE=100, BURN_IN=20, BATCH_SIZE=2, NUM_STEPS=24
    ),  # no schedule
}


@pytest.mark.parametrize("name", SMALL_TRAININGS)
def test_every_training_has_the_same_schedule(name):
    algorithm, seen = importlib.import_module(f"algorithms.{name}").ALGORITHM, []
    c = SimpleNamespace(**algorithm.constants | SMALL_TRAININGS[name] | {"DEVICE": "cpu", "LR": 1e-3})
    trainer = algorithm.build(c)
    watch = {"on_update_end": lambda self, trainer: seen.append((trainer.global_step, trainer.stats["lr"]))}
    trainer.callbacks = [type("Watch", (Callback,), watch)()]
    trainer.learn()
    before = [0, *(step for step, _ in seen[:-1])]
    assert len(seen) > 2 and seen[-1][0] >= c.NUM_STEPS
    min_lr = getattr(c, "MIN_LR", c.LR)
    assert [lr for _, lr in seen] == pytest.approx(
        [min_lr + (c.LR - min_lr) * math.cos(math.pi * x / c.NUM_STEPS / 2) ** 2 for x in before]
    )


def test_actions_are_drawn_from_the_policy():
    ppo = breakout_ppo(rollout_steps=200, batch_size=1600)
    with torch.no_grad():
        ppo.policy.policy_head.weight.zero_()
        ppo.policy.policy_head.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    ppo.collect()
    shares = torch.bincount(ppo.buffer.samples.actions) / 1600
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.063, rtol=0)  # five standard deviations
    torch.testing.assert_close(
        ppo.buffer.samples.old_logprobs.exp(), torch.tensor([0.2, 0.3, 0.5])[ppo.buffer.samples.actions]
    )


def test_prediction_weight_zero_leaves_its_head_alone():
    def head_moves(coef):
        ppo = breakout_ppo(prediction_coef=coef)
        before = ppo.policy.change_head.weight.clone()
        ppo.collect()
        stats = ppo.update()
        assert ("prediction_loss" in stats) == (coef > 0)
        return not torch.equal(before, ppo.policy.change_head.weight)

    assert head_moves(0.1) and not head_moves(0.0)


def test_statistics_of_an_update():
    ppo = breakout_ppo()
    ppo.collect()
    stats = ppo.update()
    assert set(stats) == {
        "policy_loss",
        "value_loss",
        "entropy",
        "move_loss",
        "prediction_loss",
        "approx_kl",
        "approx_kl_max",
        "clipfrac",
        "explained_variance",
        "grad_norm",
        "lr",
        "episode_return",
    }
    assert all(type(value) is float for value in stats.values())
    assert stats["approx_kl_max"] >= stats["approx_kl"] and ppo.global_step == 64
    paired = breakout_ppo(paired_envs=True)
    paired.collect()
    assert set(paired.update()) - set(stats) == {"pair_correlation"}


def test_a_statistic_is_the_mean_of_its_gradient_steps():
    ppo, seen = breakout_ppo(epochs=3), []
    loss = ppo.loss
    ppo.loss = lambda mb: seen.append(loss(mb)) or seen[-1]
    ppo.collect()
    stats = ppo.update()
    assert len(seen) == 3 * 2
    for name in seen[0][1]:
        assert stats[name] == pytest.approx(np.mean([info[name].item() for _, info in seen]), rel=1e-5, abs=1e-7), name


def test_stop_goes_back_to_the_beginning_of_the_update():
    ppo = breakout_ppo()
    step, count = ppo.train_step, []

    def third_step_of_the_third_update():
        count.append(0)
        if len(count) == 2 * 8 + 3:
            ppo.request_stop()
        step()

    ppo.train_step = third_step_of_the_third_update
    with pytest.raises(StopTraining):
        ppo.learn()
    assert len(count) == 2 * 8 + 3 and ppo.snapshot["update_count"] == 2 and ppo.snapshot["global_step"] == 128
    fresh, straight = breakout_ppo(seed=5), breakout_ppo()
    fresh.load_state_dict(ppo.snapshot)
    for other, updates in ((fresh, 1), (straight, 3)):
        for _ in range(updates):
            other.collect()
            other.update()
    for p, q in zip(fresh.policy.parameters(), straight.policy.parameters()):
        assert torch.equal(p, q)


def test_events_come_in_order_and_evaluations_decide_what_is_best():
    class Events(Callback):
        def on_update_end(self, ppo):
            seen.append(("update", ppo.update_count))
            if ppo.update_count in scores:
                ppo.evaluation_end(ppo.policy_state(), {"score": scores[ppo.update_count]})

        def on_evaluation_end(self, ppo):
            seen.append(("evaluation", ppo.evaluated["update_count"], ppo.is_best))

        def on_training_start(self, ppo):
            seen.append("start")

        def on_training_end(self, ppo):
            seen.append("end")

    scores, seen, ppo = {1: 5.0, 3: 3.0, 4: 8.0}, [], breakout_ppo(num_steps=64 * 4)
    ppo.callbacks = [Events()]
    ppo.learn()
    assert seen == [
        "start",
        ("update", 1),
        ("evaluation", 1, True),
        ("update", 2),
        ("update", 3),
        ("evaluation", 3, False),
        ("update", 4),
        ("evaluation", 4, True),
        "end",
    ]
    assert ppo.best_score == 8


def test_returns_of_episodes_are_in_points():
    ppo = breakout_ppo(rollout_steps=2)
    ppo.buffer.fields = {
        "rewards": torch.tensor([[10.0] + [0.0] * 7, [50.0] + [10.0] * 7]),
        "has_next": torch.ones(2, 8, dtype=torch.bool),
    }
    ppo.buffer.fields["has_next"][1, 0] = False
    ppo.record_episode_returns()
    ppo.buffer.fields["has_next"][:] = True
    ppo.buffer.fields["has_next"][0, 1] = False
    ppo.record_episode_returns()
    assert list(ppo.episode_returns) == pytest.approx([60.0, 10.0]) and ppo.episode_returns.maxlen == 100
    assert ppo.return_so_far.tolist() == pytest.approx([60.0, 10.0] + [20.0] * 6)


def test_deeper_models_learn_from_pages_that_begin_alike():
    ppo = deep_ppo()
    ppo.collect()
    before = ppo.weights.detach().clone()
    ppo.epoch()
    assert not torch.equal(ppo.weights, before)
    alike = sorted(map(tuple, ppo.buffer.samples.obs.tolist()))  # 16 pages: each minibatch of 8 is one group
    assert sorted(sorted(map(tuple, obs)) for obs in ppo.buffer.minibatches.obs.tolist()) == [alike[:8], alike[8:]]


def rank_of_two(rank, folder):
    """One update alone on all samples, and one as a rank of two, each of which has every other sample of each minibatch."""
    torch.set_num_threads(1)
    alone = breakout_ppo(max_grad_norm=0.5)
    alone.collect()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    both = breakout_ppo(seed=rank, max_grad_norm=0.5)  # rank 0's weights count
    both.policy.index, both.buffer.samples = alone.policy.index, alone.buffer.samples

    def shuffle(buffer, part):
        def cut(*_):
            buffer.minibatches = Minibatch(*(x.unflatten(0, (2, 32))[:, part].clone() for x in buffer.samples))
            buffer.minibatch_position.zero_()

        return cut

    alone.buffer.shuffle, both.buffer.shuffle = (
        shuffle(alone.buffer, slice(None)),
        shuffle(both.buffer, slice(rank, None, 2)),
    )
    first, second = alone.update(), both.update()
    torch.testing.assert_close(both.weights, alone.weights, rtol=1e-4, atol=1e-4)  # eight steps of 0.02
    for name in ("policy_loss", "value_loss", "prediction_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    assert alone.global_step == 64 and both.global_step == 2 * 64  # both ranks' steps
    both.collect()
    played = [torch.empty(64) for _ in range(2)]
    dist.all_gather(played, both.buffer.samples.old_logprobs)
    assert not torch.equal(*played)  # each rank has its own games
    both.config.paired_envs = True
    both.collect()
    both.episode_returns.append(10.0 * rank)
    third, samples = both.update(), both.buffer.samples
    own = [third[name] for name in ("episode_return", "explained_variance", "pair_correlation")]
    assert own == [
        10.0 * rank,
        explained_variance(samples.old_values, samples.returns).item(),
        both.buffer.pair_correlation.item(),
    ]
    of_ranks = [None, None]
    dist.all_gather_object(of_ranks, own)
    assert all(x != y for x, y in zip(*of_ranks))  # rank 0 logs its own, as docs/runs.md says
    if rank == 1:
        both.request_stop()
    with pytest.raises(StopTraining):
        both.learn()  # rank 1's stop is rank 0's too
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_learns_from_the_samples_of_both(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, args=(tmp_path,), nprocs=2)


def test_pairs_start_each_rollout_alike_and_what_they_share_is_taken_off():
    ppo = breakout_ppo(paired_envs=True, rollout_steps=32)
    for _ in range(2):
        in_sync, agree = [], ppo.env.in_sync
        ppo.env.in_sync = lambda: in_sync.append(agree()) or in_sync[-1]
        ppo.collect()
        ppo.env.in_sync = agree
        obs = ppo.buffer.fields["obs"]  # (32, 8, lines)
        assert torch.equal(obs[0, :4], obs[0, 4:])
        in_sync = torch.from_numpy(np.logical_and.accumulate(in_sync))
        assert torch.equal(ppo.buffer.fields["in_sync"], in_sync)
        plain = (ppo.buffer.samples.returns - ppo.buffer.samples.old_values).view(32, 8)
        torch.testing.assert_close(
            ppo.buffer.samples.advantages.view(32, 8), paired_baseline(plain, in_sync)[0], rtol=1e-4, atol=1e-5
        )
        assert in_sync.any() and not torch.equal(ppo.buffer.samples.advantages.view(32, 8), plain)
