import math
from concurrent.futures import Future

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from gymnasium.vector import AutoresetMode, VectorEnv

from breakout_ascii import BreakoutAsciiVec
from callbacks import Callback
from load_model import SHIPPED, load_policy
from model import GPT, GPTConfig
from ppo import PPO, PPOConfig, StopTraining, entropy_loss, explained_variance, learning_rate, lost_lives, move_loss, policy_loss, prediction_loss, value_loss
from rollout_buffer import advantages_over_twins


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


class Table(nn.Module):
    """Logits and a value for each observation, nothing shared."""

    def __init__(self, size):
        super().__init__()
        self.table = nn.Linear(size, 3, bias=False)

    def forward(self, obs):
        x = self.table(obs)
        return x[:, :2], x[:, 2]


def done(result):
    future = Future()
    future.set_result(result)
    return future


def config(**changes):
    return PPOConfig(**{**dict(
        num_steps=10_000, rollout_steps=16, epochs=4, batch_size=32, gamma=0.9, lambd=0.95, lambd_end=0.95, lambd_steps=1, eps_clip=0.2, lr=0.02, min_lr=0.0,
        value_loss_coef=0.5, entropy_coef=0.0, max_grad_norm=10.0, seed=0), **changes})  # fmt: skip


def train(env, **changes):
    torch.manual_seed(0)
    policy = Table(env.single_observation_space.shape[0])
    PPO(policy, env, config(**changes)).learn()
    with torch.no_grad():
        return policy(torch.eye(env.single_observation_space.shape[0]))


def test_constant_reward_is_worth_itself():
    _, values = train(Probe(lambda state, action: 1.0))
    assert values.tolist() == pytest.approx([1.0], abs=0.01)


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
    policy = GPT(GPTConfig(n_head=4, n_embd=16))
    env = BreakoutAsciiVec(8, varied_starts=0.7)
    return PPO(policy, env, config(**{**dict(prediction_coef=0.1, rollout_steps=8, num_steps=1000, reward_scale=0.1), **changes}))


def shipped_ppo():
    """Trained weights: scores of hundreds of bits, heads that need rescaling."""
    policy, _ = load_policy(SHIPPED)
    return PPO(policy, BreakoutAsciiVec(32, varied_starts=0.7), config(rollout_steps=16, num_steps=512, prediction_coef=0.1))


@pytest.mark.parametrize("make", [breakout_ppo, shipped_ppo, lambda: PPO(Table(2), Probe(lambda s, a: 1.0, states=2), config())])
def test_ratio_is_exactly_one_before_the_first_step(make):
    ppo = make()
    ppo.collect()
    for mb in ppo.buffer.minibatches(64, ppo.generator):
        logits, values = ppo.policy(ppo.reader.batch(mb.obs))
        new_logprobs = logits.log_softmax(-1).gather(1, mb.actions.unsqueeze(1)).squeeze(1)
        assert ((new_logprobs - mb.old_logprobs).exp() == 1).all()
        assert torch.equal(values, mb.old_values)
    stats = ppo.gradient_step(ppo.reader.batch(mb.obs), mb)
    assert stats["approx_kl"] == 0 and stats["clipfrac"] == 0
    assert ppo.gradient_step(ppo.reader.batch(mb.obs), mb)["approx_kl"] > 1e-9  # and it is not, once the weights have moved


def test_a_lost_life_ends_the_sum_but_not_the_game():
    ppo = breakout_ppo(rollout_steps=40, seed=1)
    ppo.collect()
    data, lives = ppo.buffer.data, ppo.env.games.lives
    terminated = torch.stack([step[5] for step in ppo.buffer.steps]).flatten()
    assert terminated.any() and (lives < 5).any()
    assert data.has_next[terminated].all() and data.changes[terminated].any(1).all()
    rewards = torch.stack([step[4] for step in ppo.buffer.steps]).flatten()
    torch.testing.assert_close(data.returns[terminated], rewards[terminated], rtol=0, atol=1e-6)


def test_a_life_lost_in_a_truncated_step_is_lost(monkeypatch):
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
    has_next = ppo.buffer.data.has_next.view(12, 8)
    assert (~has_next).all(1).nonzero().flatten().tolist() == [4, 9]
    logits, changes = torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3, dtype=torch.bool)
    loss, _ = prediction_loss(logits, changes, torch.tensor([True, False, True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2) / 2)
    assert logits.grad[[1, 3]].eq(0).all() and logits.grad[[0, 2]].ne(0).all()


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
    linear = [learning_rate(x, 1.0, 0.2, 0.0, "linear") for x in (0, 0.5, 1, 1.1)]
    assert linear == pytest.approx([1, 0.6, 0.2, 0.2])
    cosine = [learning_rate(x, 1.0, 0.2, 0.2, "cosine") for x in (0, 0.1, 0.2, 0.4, 0.6, 1)]
    assert cosine == pytest.approx([0, 0.5, 1, 1 - 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.6, 0.2])


def test_lambda_rises_over_its_steps():
    ppo, seen = breakout_ppo(lambd=0.5, lambd_end=0.9, lambd_steps=128), []
    ppo.buffer.finish = lambda *arguments: seen.append(arguments[3])
    for _ in range(4):
        ppo.collect()
    assert seen == pytest.approx([0.5, 0.7, 0.9, 0.9])


def test_advantages_are_normalized_even_if_they_hardly_differ():
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.data.advantages[:] = 5 + 1e-3 * (torch.arange(64) % 2)
    (mb,) = ppo.normalize_advantages(list(ppo.buffer.minibatches(64, ppo.generator)))
    torch.testing.assert_close(mb.advantages.abs(), torch.ones(64), rtol=1e-2, atol=0)


def test_gradient_norm_is_clipped():
    ppo = breakout_ppo(max_grad_norm=1e-3)
    ppo.collect()
    mb = next(ppo.buffer.minibatches(32, ppo.generator))
    stats = ppo.gradient_step(ppo.reader.batch(mb.obs), mb)
    norm = torch.stack([p.grad.norm() for p in ppo.policy.parameters()]).norm()
    assert stats["grad_norm"] > 1e-2 and norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_spoiled():
    ppo = breakout_ppo()
    ppo.collect()
    ppo.buffer.data.returns[:] = math.nan
    before = [p.clone() for p in ppo.policy.parameters()]
    with pytest.raises(FloatingPointError, match="not finite in update 1"):
        ppo.update()
    assert all(torch.equal(p, q) for p, q in zip(ppo.policy.parameters(), before))


def test_target_kl_ends_an_update_after_its_epoch():
    def minibatches(**changes):
        ppo = breakout_ppo(lr=0.05, epochs=6, **changes)
        ppo.collect()
        steps, step = [], ppo.gradient_step
        ppo.gradient_step = lambda *args: steps.append(0) or step(*args)
        ppo.update()
        return len(steps)

    assert minibatches() == 12 and minibatches(target_kl=1e-6) == 2


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
        "policy_loss", "value_loss", "entropy", "move_loss", "prediction_loss", "approx_kl", "approx_kl_max", "clipfrac",
        "explained_variance", "twin_correlation", "grad_norm", "lr", "train_score",
    }  # fmt: skip
    assert all(type(value) is float for value in stats.values())
    assert stats["approx_kl_max"] >= stats["approx_kl"] and ppo.global_step == 64


def test_stop_goes_back_to_the_beginning_of_the_update():
    ppo = breakout_ppo()
    step, count = ppo.gradient_step, []

    def third_step_of_the_third_update(*args):
        count.append(0)
        if len(count) == 2 * 8 + 3:
            ppo.request_stop()
        return step(*args)

    ppo.gradient_step = third_step_of_the_third_update
    with pytest.raises(StopTraining):
        ppo.learn()
    assert ppo.snapshot["update_count"] == 2 and ppo.snapshot["global_step"] == 128
    fresh, straight = breakout_ppo(seed=5), breakout_ppo()
    fresh.load_state_dict(ppo.snapshot)
    for other, updates in ((fresh, 1), (straight, 3)):
        for _ in range(updates):
            other.collect()
            other.update()
    for p, q in zip(fresh.policy.parameters(), straight.policy.parameters()):
        assert torch.equal(p, q)


def test_evaluations_decide_what_is_best():
    class Events:
        def __init__(self):
            self.seen = []

        def __getattr__(self, event):
            return lambda ppo: self.seen.append((event.removeprefix("on_"), ppo.update_count, ppo.is_best))

    ppo, scores, events = breakout_ppo(num_steps=64 * 5), iter([5.0, 3.0, 8.0]), Events()
    ppo.config.eval_interval, ppo.callbacks = 2, [events]
    ppo.evaluate = lambda policy: done({"score": next(scores)})
    ppo.learn()
    assert [e[1:] for e in events.seen if e[0] == "evaluation_end"] == [(2, True), (4, False), (5, True)]
    assert ppo.best_score == 8
    assert [e[0] for e in events.seen[:4]] == ["training_start", "rollout_start", "rollout_end", "update_end"]
    assert [e[0] for e in events.seen[-5:]] == ["rollout_start", "rollout_end", "update_end", "evaluation_end", "training_end"]


def test_training_goes_on_while_it_is_evaluated(monkeypatch):
    """A result is waited for when the next evaluation is due; a run resumed before that evaluates the same weights again."""

    class Slow:
        def __init__(self, policy):
            weights.append(policy.state_dict())
            self.slept = []
            monkeypatch.setattr("ppo.time.sleep", self.slept.append)  # it is done when it was waited for

        def done(self):
            return bool(self.slept)

        def result(self):
            return {"score": 1.0}

    class Watch(Callback):
        def on_rollout_end(self, ppo):
            snapshots.append(ppo.snapshot)

        def on_evaluation_end(self, ppo):
            ends.append((ppo.update_count, ppo.evaluated["update_count"], ppo.evaluated["evaluation"]["score"]))

    weights, ends, snapshots = [], [], []
    ppo, resumed = breakout_ppo(num_steps=64 * 5, eval_interval=2), breakout_ppo(num_steps=64 * 5, eval_interval=2)
    ppo.evaluate, ppo.callbacks, resumed.evaluate = Slow, [Watch()], Slow
    ppo.learn()
    assert ends == [(4, 2, 1.0), (5, 4, 1.0), (5, 5, 1.0)] and len(weights) == 3
    assert [[state["update_count"] for state in s["evaluations"]] for s in snapshots] == [[], [], [2], [2], [4]]
    resumed.load_state_dict(snapshots[3])  # after update 3
    resumed.learn()
    for before, after in zip(weights[:3], weights[3:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(weights[0]["wte.weight"], weights[1]["wte.weight"])


def test_several_evaluations_at_once_end_in_order(monkeypatch):
    class Evaluator:
        processes = 2

        def __call__(self, policy):
            futures.append(Future())
            return futures[-1]

    class Watch(Callback):
        def on_update_end(self, ppo):
            under_way.append([state["update_count"] for state, _ in ppo.evaluations])
            if ppo.update_count == 3:
                futures[1].set_result({"score": 2.0})  # before the first

        def on_evaluation_end(self, ppo):
            ends.append((ppo.update_count, ppo.evaluated["update_count"], ppo.evaluated["evaluation"]["score"]))

    def give(seconds):  # what is waited for comes
        next(future for future in futures if not future.done()).set_result({"score": 1.0})

    monkeypatch.setattr("ppo.time.sleep", give)
    futures, under_way, ends = [], [], []
    ppo = breakout_ppo(num_steps=64 * 5)
    ppo = PPO(ppo.policy, ppo.env, ppo.config, Evaluator(), [Watch()])
    ppo.config.eval_interval = 1
    ppo.learn()
    assert under_way == [[1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert ends == [(3, 1, 1.0), (3, 2, 2.0), (5, 3, 1.0), (5, 4, 1.0), (5, 5, 1.0)]
    resumed, ppo.config.num_steps = PPO(ppo.policy, ppo.env, ppo.config, lambda policy: done({"score": 3.0})), 64 * 6
    resumed.load_state_dict(ppo.state_dict() | {"evaluations": [ppo.policy_state(), ppo.policy_state()]})
    resumed.callbacks = [Watch()]
    ends.clear()
    resumed.learn()
    assert ends == [(5, 5, 3.0), (6, 5, 3.0), (6, 6, 3.0)]


def test_training_that_goes_on_after_a_stop_waits_for_the_evaluation_under_way():
    class Stop(Callback):
        def on_update_end(self, ppo):
            ppo.request_stop()

    ppo, futures = breakout_ppo(num_steps=64 * 3, eval_interval=1), []
    ppo.evaluate, ppo.callbacks = lambda policy: futures.append(Future()) or futures[-1], [Stop()]
    with pytest.raises(StopTraining):
        ppo.learn()
    ppo.stop_requested, ppo.callbacks = False, []
    futures[0].set_result({"score": 1.0})
    ppo.evaluate = lambda policy: done({"score": 2.0})
    ppo.learn()
    assert len(futures) == 1 and ppo.evaluated["update_count"] == 3 and ppo.best_score == 2


def test_training_scores_are_whole_games_in_points():
    ppo = breakout_ppo()
    ppo.count_scores(np.array([10.0] + [0.0] * 7), np.zeros(8, bool))
    done = np.array([True] + [False] * 7)
    ppo.count_scores(np.array([50.0] + [0.0] * 7), done)
    ppo.count_scores(np.array([10.0] + [0.0] * 7), done)
    assert list(ppo.train_scores) == [60.0, 10.0]


def test_deeper_models_learn_from_pages_that_begin_alike():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8))
    ppo = PPO(gpt, BreakoutAsciiVec(2), config(rollout_steps=8, batch_size=8, epochs=1))
    ppo.collect()
    before, given, minibatches = ppo.weights.detach().clone(), [], ppo.buffer.minibatches
    ppo.buffer.minibatches = lambda *args: given.extend(minibatches(*args)) or given
    stats = ppo.epoch()
    assert stats["approx_kl"][0] < 1e-9 and stats["clipfrac"][0] == 0  # what acted is what learns
    assert not torch.equal(ppo.weights, before)
    alike = sorted(map(tuple, ppo.buffer.data.obs))  # 16 pages: each minibatch of 8 is one group of neighbours
    assert sorted(sorted(map(tuple, mb.obs)) for mb in given) == [alike[:8], alike[8:]]


def rank_of_two(rank, folder):
    """One update alone on all samples, and one as a rank of two, each of which has every other sample of each minibatch."""
    torch.set_num_threads(1)
    alone = breakout_ppo(max_grad_norm=0.5, target_kl=1e9)
    alone.collect()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    together = breakout_ppo(seed=rank, max_grad_norm=0.5, target_kl=1e9)  # rank 0's weights count
    together.reader, together.buffer.data, together.global_step = alone.reader, alone.buffer.data, alone.global_step

    def minibatches(part):
        def chosen(*args):
            for i in range(2):
                yield type(alone.buffer.data)(*(x[i * 32 : i * 32 + 32][part] for x in alone.buffer.data))

        return chosen

    alone.buffer.minibatches, together.buffer.minibatches = minibatches(slice(None)), minibatches(slice(rank, None, 2))
    first, second = alone.update(), together.update()
    torch.testing.assert_close(together.weights, alone.weights, rtol=1e-4, atol=1e-5)  # eight steps of 0.02
    for name in ("policy_loss", "value_loss", "prediction_loss", "entropy", "approx_kl", "clipfrac", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    together.collect()
    assert together.global_step == 64 + 2 * 64  # both ranks' steps
    played = [torch.empty(64) for _ in range(2)]
    dist.all_gather(played, together.buffer.data.old_logprobs)
    assert not torch.equal(*played)  # each rank has its own games
    if rank == 1:
        together.request_stop()
    with pytest.raises(StopTraining):
        together.learn()  # rank 1's stop is rank 0's too
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_learns_from_the_samples_of_both(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, args=(tmp_path,), nprocs=2)


def test_twins_begin_each_rollout_alike_and_their_shared_luck_is_taken_off():
    ppo = breakout_ppo(twins=1, rollout_steps=32)
    for _ in range(2):
        start, together = ppo.env.twin(), []
        agree = ppo.env.twins_agree
        ppo.env.twins_agree = lambda: together.append(agree()) or together[-1]
        ppo.collect()
        ppo.env.twins_agree = agree
        obs = np.array([step[0] for step in ppo.buffer.steps])  # (32, 8, lines)
        np.testing.assert_array_equal(obs[0, :4], obs[0, 4:])
        np.testing.assert_array_equal(obs[0], ppo.reader.encode(start))
        together = torch.from_numpy(np.logical_and.accumulate(together))
        plain = (ppo.buffer.data.returns - ppo.buffer.data.old_values).view(32, 8)
        torch.testing.assert_close(ppo.buffer.data.advantages.view(32, 8), advantages_over_twins(plain, together)[0], rtol=1e-4, atol=1e-5)
        assert together.any() and not torch.equal(ppo.buffer.data.advantages.view(32, 8), plain)
