"""Proximal policy optimisation (Schulman et al. 2017): collect, update, evaluate, and the state that a resume needs.

Any policy that maps a batch of observations to logits (B, A) and values (B,), any Gymnasium vector env with SAME_STEP
autoreset and discrete actions. Left out: recurrent policies, continuous actions, observation normalisation.
"""

import copy
import math
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import to_numpy, to_plain
from rollout_buffer import RolloutBuffer, changed_rows_and_columns, reader_of


def policy_loss(new_logprobs, old_logprobs, advantages, eps_clip):
    """Clipped surrogate (equation 7); all (M,). approx_kl is the estimator k3 of http://joschu.net/blog/kl-approx.html."""
    log_ratio = new_logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > eps_clip).float().mean()
    return loss, {"policy_loss": loss.detach(), "approx_kl": approx_kl, "clipfrac": clipfrac}


def value_loss(new_values, old_values, returns, value_clip=0.0):
    """Half the squared error; all (M,). value_clip > 0 holds new values within that distance of the old, in the units
    of the scaled return, and takes the worse of both errors."""
    errors = (new_values - returns) ** 2
    if value_clip > 0:
        clipped = old_values + (new_values - old_values).clamp(-value_clip, value_clip)
        errors = torch.max(errors, (clipped - returns) ** 2)
    loss = 0.5 * errors.mean()
    return loss, {"value_loss": loss.detach()}


def entropy_loss(logprobs):
    """Minus the mean entropy of the action distributions, in nats; logprobs (M, A)."""
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return -entropy, {"entropy": entropy.detach()}


def move_loss(logprobs):
    """The mean probability of any action but the first, which does nothing; logprobs (M, A)."""
    loss = 1 - logprobs[:, 0].exp().mean()
    return loss, {"move_loss": loss.detach()}


def prediction_loss(logits, changes, has_next):
    """Cross-entropy of "this row or column changes", summed over rows and columns (M, R + C), averaged over M.

    Where has_next (M,) is False the next frame belongs to another game, and nothing is predicted.
    """
    errors = F.binary_cross_entropy_with_logits(logits, changes.to(logits.dtype), reduction="none").sum(1)
    loss = (errors * has_next).mean()
    return loss, {"prediction_loss": loss.detach()}


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns); nan where the returns do not vary."""
    variance = returns.var()
    return 1 - (returns - values).var() / variance if variance > 0 else torch.tensor(math.nan)


def learning_rate(progress, lr, min_lr, warmup, schedule):
    """progress 0..1 of the training: linear warm-up over its first part, then "cosine" or "linear" down to min_lr."""
    if progress < warmup:
        return lr * progress / warmup
    x = min((progress - warmup) / (1 - warmup), 1.0)
    fall = x if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * x))
    return lr + (min_lr - lr) * fall


def lost_lives(infos):
    """(N,) bool, or False where the env knows no lives: which games lost one in this step, games that it ended included."""
    return infos.get("life_lost", False) | infos.get("final_info", {}).get("life_lost", False)


def flatten_parameters(policy):
    """Moves the parameters of `policy`, and their gradients, into one vector -> that vector, a parameter with its gradient.

    Norm, clipping and optimizer then take one kernel each instead of one per parameter. Gradients are cleared there:
    `policy.zero_grad()` would cut the parameters off.
    """
    parameters = list(policy.parameters())
    weights = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    weights.grad = torch.zeros_like(weights)
    pieces = zip(parameters, *(x.split([p.numel() for p in parameters]) for x in (weights.detach(), weights.grad)))
    for p, weight, grad in pieces:
        p.data, p.grad = weight.view_as(p), grad.view_as(p)
    return weights


class StopTraining(Exception):
    """Raised inside `learn` at the next minibatch or step after `request_stop`, with several ranks at the next update."""


@dataclass
class PPOConfig:
    num_steps: int  # environment steps in all
    rollout_steps: int  # steps per environment between updates
    epochs: int
    batch_size: int
    gamma: float
    lambd: float  # at the start
    lambd_end: float  # from step lambd_steps on
    lambd_steps: int
    eps_clip: float
    lr: float
    min_lr: float
    value_loss_coef: float
    entropy_coef: float
    max_grad_norm: float
    warmup: float = 0.0  # share of the training
    lr_schedule: str = "cosine"  # or "linear"
    value_clip: float = 0.0  # 0: off
    target_kl: float = 0.0  # 0: off
    move_coef: float = 0.0  # 0: off
    prediction_coef: float = 0.0  # 0: off
    twins: int = 0  # 1: pairs of games begin each rollout in the same state; for an env with twin() and twins_agree()
    reward_scale: float = 1.0
    eval_interval: int = 0  # updates; 0: never
    seed: int = 0


class PPO:
    """`learn()` trains `policy` on `env`; callbacks observe; `metadata` goes into every checkpoint.

    `evaluate(policy)` decides what is best. It is given a copy, and returns a future (`done()`, `result()`) of a dict with
    a "score": training goes on meanwhile, with up to `evaluate.processes` evaluations under way, one if it does not say.
    """

    def __init__(self, policy, env, config, evaluate=None, callbacks=(), metadata=None):
        self.policy, self.env, self.config = policy, env, config
        self.evaluate, self.callbacks, self.metadata = evaluate, callbacks, metadata or {}
        self.device = next(policy.parameters()).device
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.weights = flatten_parameters(policy)
        if self.ranks > 1:
            dist.broadcast(self.weights.detach(), 0)
        self.optimizer = torch.optim.Adam([self.weights], lr=config.lr, eps=1e-5, fused=True)
        self.generator = torch.Generator()  # actions and shuffles
        self.buffer = RolloutBuffer(config.rollout_steps, env.num_envs)
        self.begin(config.seed + 100_003 * self.rank)  # every rank plays its own games
        self.update_count = self.global_step = 0
        self.seconds = 0.0
        self.train_scores = deque(maxlen=100)  # of the games that ended last
        self.evaluations = deque()  # copies of policy_state() while they are evaluated, and the futures of what comes of it
        self.evaluations_at_once = getattr(evaluate, "processes", 1)
        self.evaluated, self.best_score, self.is_best = None, -math.inf, False  # the last such copy, with its "evaluation"
        self.stats = {}
        self.stop_requested, self.snapshot = False, None

    def begin(self, seed):
        """New games and new chance."""
        self.generator.manual_seed(seed)
        self.obs, _ = self.env.reset(seed=seed)
        self.score_so_far = np.zeros(self.env.num_envs)

    # The loop

    @property
    def num_steps(self):
        return self.config.num_steps

    def learn(self):
        self.clock = time.perf_counter()
        self.emit("on_training_start")
        self.snapshot = self.state_dict()  # what an interrupted update goes back to
        resumed = [state for state, future in self.evaluations if future is None]
        self.evaluations = deque(e for e in self.evaluations if e[1] is not None)
        for state in resumed:
            self.finish_evaluations(leave=self.evaluations_at_once - 1)
            self.begin_evaluation(state)
        while self.global_step < self.config.num_steps:
            self.stop_together()
            start = time.perf_counter()
            self.emit("on_rollout_start")
            self.collect()
            self.emit("on_rollout_end")
            self.stats = self.update()
            samples = self.config.rollout_steps * self.env.num_envs * self.ranks
            self.stats["steps_per_second"] = samples / (time.perf_counter() - start)
            last, every = self.global_step >= self.config.num_steps, self.config.eval_interval
            self.tick()
            if self.evaluate and every and (last or self.update_count % every == 0):
                self.finish_evaluations(leave=self.evaluations_at_once - 1)
                self.begin_evaluation(copy.deepcopy(self.policy_state()))
            self.emit("on_update_end")
            self.finish_evaluations(leave=self.evaluations_at_once)
            self.snapshot = self.state_dict()
        self.finish_evaluations(leave=0)
        self.tick()
        self.emit("on_training_end")

    def begin_evaluation(self, state):
        policy = copy.deepcopy(self.policy)
        policy.load_state_dict(state["model"])
        self.evaluations.append((state, self.evaluate(policy)))

    def finish_evaluations(self, leave):
        """Takes the results that are there, in order, and waits for more until only `leave` evaluations are under way."""
        while self.evaluations:
            state, future = self.evaluations[0]
            while not future.done():
                if len(self.evaluations) <= leave:
                    return
                self.check_stop()
                time.sleep(0.02)
            self.evaluations.popleft()
            self.evaluated = state | {"evaluation": future.result()}
            score = self.evaluated["evaluation"]["score"]
            self.is_best = score > self.best_score
            self.best_score = max(self.best_score, score)
            self.emit("on_evaluation_end")

    def tick(self):
        """Everything since `learn` began counts: observers, snapshots and what is waited for too."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def collect(self):
        """S steps of every environment into the buffer."""
        config, S, N = self.config, self.config.rollout_steps, self.env.num_envs
        self.reader = reader_of(self.policy)
        self.buffer.clear()
        has_next, together = np.zeros((S, N), bool), np.zeros((S, N // 2), bool)
        if config.twins:
            self.obs = self.env.twin()
            self.score_so_far[N // 2 :] = self.score_so_far[: N // 2]
        for step in range(S):
            self.check_stop()
            if config.twins:
                together[step] = self.env.twins_agree() & (step == 0 or together[step - 1])
            obs = self.reader.encode(self.obs)
            logits, values = (x.cpu() for x in self.reader(obs))
            if not logits.isfinite().all():
                raise FloatingPointError(f"the logits are not finite in update {self.update_count + 1}; try a lower learning rate")
            logprobs = F.log_softmax(logits, dim=-1)
            actions = torch.multinomial(logprobs.exp(), 1, generator=self.generator)  # (N, 1)
            next_obs, rewards, terminated, truncated, infos = self.env.step(actions.squeeze(1).numpy())
            final_values = torch.zeros(N)
            if truncated.any():
                final_obs = np.stack(list(infos["final_obs"][truncated]))
                final_values[torch.from_numpy(truncated)] = self.reader(self.reader.encode(final_obs))[1].cpu()
            done = terminated | truncated
            self.count_scores(rewards, done)
            has_next[step] = ~done
            changes = changed_rows_and_columns(self.obs, next_obs, self.policy.page_columns) if config.prediction_coef else None
            self.buffer.add(
                obs, actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), values,
                (rewards * config.reward_scale).astype(np.float32),
                terminated | lost_lives(infos), truncated, final_values, changes,
            )  # fmt: skip
            self.obs = next_obs
        last_values = self.reader(self.reader.encode(self.obs))[1].cpu()
        self.buffer.finish(last_values, has_next, config.gamma, self.lambd(), together if config.twins else None)
        self.global_step += S * N * self.ranks

    def lambd(self):
        config, rise = self.config, min(self.global_step / self.config.lambd_steps, 1.0)
        return config.lambd + (config.lambd_end - config.lambd) * rise

    def count_scores(self, rewards, done):
        self.score_so_far += rewards
        self.train_scores.extend(self.score_so_far[done].tolist())
        self.score_so_far[done] = 0

    def update(self):
        """Epochs of minibatches over the buffer -> the statistics of the update, floats."""
        config, epochs = self.config, []
        lr = learning_rate(self.global_step / config.num_steps, config.lr, config.min_lr, config.warmup, config.lr_schedule)
        self.set_lr(lr)
        for _ in range(config.epochs):
            epochs.append(self.epoch())
            if config.target_kl and self.average(epochs[-1]["approx_kl"].mean()) > config.target_kl:
                break
        self.update_count += 1
        stats = self.average(torch.stack([torch.cat([epoch[name] for epoch in epochs]) for name in epochs[0]]))  # (names, steps)
        stats = dict(zip(epochs[0], stats))
        kl_max = stats["approx_kl"].max()
        stats = {name: x.mean() for name, x in stats.items()}
        stats["approx_kl_max"] = kl_max
        stats["explained_variance"] = explained_variance(self.buffer.data.old_values, self.buffer.data.returns)
        stats["twin_correlation"] = self.buffer.twin_correlation
        stats = {name: x.item() for name, x in stats.items()}
        stats["lr"] = lr
        stats["train_score"] = float(np.mean(self.train_scores)) if self.train_scores else math.nan
        return stats

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def epoch(self):
        """Every sample once -> the statistics of the gradient steps, {name: (steps,)}."""
        steps, size = [], self.config.batch_size // self.ranks
        minibatches = self.buffer.minibatches(size, self.generator, self.device, self.reader.neighbours)
        for mb in self.normalize_advantages(list(minibatches)):
            self.check_stop()
            steps.append(self.gradient_step(self.reader.batch(mb.obs), mb))
        return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    def gradient_step(self, batch, mb):
        """One gradient step on one minibatch; batch: what the policy takes of mb.obs -> its statistics, tensors."""
        loss, stats = self.loss(batch, mb)
        grad = self.weights.grad
        grad.zero_()  # this, and the clipping in two lines, a third of a millisecond faster than torch's functions
        loss.backward()
        self.average(grad)
        stats["grad_norm"] = grad.norm()
        self.check_gradient(stats["grad_norm"])
        grad *= (self.config.max_grad_norm / (stats["grad_norm"] + 1e-6)).clamp_max(1.0)
        self.optimizer.step()
        return stats

    def check_gradient(self, norm):
        if not norm.isfinite().all():
            raise FloatingPointError(f"the gradient is not finite in update {self.update_count + 1}; try a lower learning rate")

    def loss(self, batch, mb):
        """-> the loss of a minibatch, and its terms and what else is worth knowing of it; tensors."""
        config = self.config
        if config.prediction_coef:
            features = self.policy.features(batch)
            logits, new_values = self.policy.heads(features)
            loss, stats = prediction_loss(self.policy.change_head(features), mb.changes, mb.has_next)
            loss = config.prediction_coef * loss
        else:
            (logits, new_values), loss, stats = self.policy(batch), 0.0, {}
        logprobs = F.log_softmax(logits, dim=-1)
        new_logprobs = logprobs.gather(1, mb.actions.unsqueeze(1)).squeeze(1)
        for coef, (term, info) in (
            (1.0, policy_loss(new_logprobs, mb.old_logprobs, mb.advantages, config.eps_clip)),
            (config.value_loss_coef, value_loss(new_values, mb.old_values, mb.returns, config.value_clip)),
            (config.entropy_coef, entropy_loss(logprobs)),
            (config.move_coef, move_loss(logprobs)),
        ):
            loss = loss + coef * term
            stats |= info
        return loss, stats

    # Several ranks: with torchrun each plays its own games, and what is learned is averaged

    def average(self, tensor):
        """The mean over all ranks, in place -> tensor."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
            tensor /= self.ranks
        return tensor

    def normalize_advantages(self, minibatches):
        """To mean 0 and standard deviation 1 in each minibatch, all ranks' samples together."""
        variances, means = zip(*(torch.var_mean(mb.advantages, correction=0) for mb in minibatches))
        means, variances = torch.stack(means), torch.stack(variances)
        centres = self.average(means.clone())
        scales = self.average(variances + (means - centres) ** 2).sqrt() + 1e-8
        for mb, centre, scale in zip(minibatches, centres, scales):
            yield mb._replace(advantages=(mb.advantages - centre) / scale)

    def stop_together(self):
        """Between two updates: a stop requested of any rank stops all, so that none waits for another's gradient."""
        if self.average(torch.tensor(float(self.stop_requested), device=self.device)) > 0:
            raise StopTraining

    # Stopping, saving, going on

    def emit(self, event):
        for callback in self.callbacks:
            getattr(callback, event)(self)

    def request_stop(self):
        self.stop_requested = True

    def check_stop(self):
        if self.stop_requested and self.ranks == 1:
            raise StopTraining

    def policy_state(self):
        """What playing needs: weights and metadata."""
        counters = {"update_count": self.update_count, "global_step": self.global_step, "seconds": self.seconds}
        return {**self.metadata, **counters, "model": self.policy.state_dict()}

    def state_dict(self):
        """A copy of everything that `learn` goes on from, plain types and tensors."""
        state = {
            **self.policy_state(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict() if hasattr(self.env, "state_dict") else None,
            "obs": self.obs,
            "score_so_far": self.score_so_far,
            "train_scores": list(self.train_scores),
            "evaluations": [state for state, _ in self.evaluations],
            "best_score": self.best_score,
        }
        return copy.deepcopy(to_plain(state))

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit on the CPU if the env has a state_dict of its own.

        The state is that of rank 0; other ranks begin new games.
        """
        self.policy.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # this run's own: they differ from device to device
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.generator.set_state(state["generator"])
        if self.rank > 0:
            self.begin(self.config.seed + 100_003 * self.rank + state["global_step"])
        elif state["env"] is not None:
            self.env.load_state_dict(to_numpy(state["env"]))
            self.obs, self.score_so_far = to_numpy(state["obs"]), to_numpy(state["score_so_far"])
        self.train_scores.extend(state["train_scores"])
        self.evaluations = deque((evaluated, None) for evaluated in state.get("evaluations", []) if self.evaluate)  # older states have none
        for name in ("update_count", "global_step", "seconds", "best_score"):
            setattr(self, name, state[name])
