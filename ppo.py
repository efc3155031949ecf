"""Proximal policy optimisation (Schulman et al. 2017): collect a rollout, update the policy, repeat.

Any policy with discrete actions (see `Policy`), any Gymnasium vector env with SAME_STEP autoreset. Left out: recurrent policies,
continuous actions, observation normalisation.

The two steps that repeat, `rollout_step` and `train_step`, take no arguments: they read and write tensors that keep their
addresses. So they run as they stand here on any device, and fast/cuda_graphs.py can record them as CUDA graphs.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode

from harness.checkpoint import load_optimizer, to_numpy
from harness.supervise import StopTraining
from rollout_buffer import RolloutBuffer
from trainer import Trainer, check_finite


def k3(log_ratio):
    """An estimate of KL(p, q) at each sample of p, from log q - log p; never negative (http://joschu.net/blog/kl-approx.html).

    For a small x, exp(x) - 1 is rounded to a multiple of float32's 6e-8, of which x^2 / 2 may be less; expm1(x) is not.
    """
    return log_ratio.expm1() - log_ratio


def policy_loss(new_logprobs, old_logprobs, advantages, eps_clip):
    """Minus the clipped surrogate (Schulman et al. 2017, equation 7); all (M,), advantages normalised -> loss, statistics."""
    log_ratio = new_logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        approx_kl = k3(log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > eps_clip).float().mean()
    return loss, {"policy_loss": loss.detach(), "approx_kl": approx_kl, "clipfrac": clipfrac}


def value_loss(new_values, old_values, returns, value_clip=0.0):
    """Half the mean squared error; all (M,). With value_clip > 0 the error of each sample is the larger of two: that of the new value, and
    that of the new value held within this distance of the old one, in units of the scaled return."""
    errors = (new_values - returns) ** 2
    if value_clip > 0:
        clipped = old_values + (new_values - old_values).clamp(-value_clip, value_clip)
        errors = torch.max(errors, (clipped - returns) ** 2)
    loss = 0.5 * errors.mean()
    return loss, {"value_loss": loss.detach()}


def entropy_loss(all_logprobs):
    """Minus the mean entropy of the action distributions, in nats; all_logprobs (M, A)."""
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    return -entropy, {"entropy": entropy.detach()}


def move_loss(all_logprobs):
    """The mean probability of any action but the first, which does nothing; all_logprobs (M, A)."""
    loss = 1 - all_logprobs[:, 0].exp().mean()
    return loss, {"move_loss": loss.detach()}


def prediction_loss(logits, changes, has_next):
    """Cross-entropy of "this part of the observation changes", logits and changes (M, P), summed over the parts, averaged over M.

    Where has_next (M,) is False the next observation belongs to another episode, and the error counts as 0.
    """
    errors = F.binary_cross_entropy_with_logits(logits, changes.to(logits.dtype), reduction="none").sum(1)
    loss = (errors * has_next).mean()
    return loss, {"prediction_loss": loss.detach()}


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns); nan where the returns do not vary."""
    variance = returns.var()
    return 1 - (returns - values).var() / variance if variance > 0 else torch.tensor(math.nan)


def learning_rate(progress, lr, min_lr):
    """Half a cosine from lr, at progress 0, down to min_lr, at progress 1.

    progress: the share of the training's environment steps that came before this update. So the first update has lr, even if it is the
    only one, and min_lr would be that of one more after the last. Where K updates of equal length fill the training, the last has
    min_lr + (lr - min_lr) * sin(pi / 2K)^2.
    """
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def lost_lives(infos):
    """(N,) bool: where a life was lost in this step, also if that ended the episode; False if the env reports no lives."""
    return infos.get("life_lost", False) | infos.get("final_info", {}).get("life_lost", False)


def flatten_parameters(policy):
    """Moves the parameters of `policy` that are trained, and their gradients, into one vector -> that vector, a parameter with its gradient.

    Norm, clipping and optimizer then take one kernel each instead of one per parameter. Clear gradients by `weights.grad.zero_()`:
    after `policy.zero_grad()` backward would write gradients that `weights.grad` does not see.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    weights = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    weights.grad = torch.zeros_like(weights)
    for p, weight, grad in zip(parameters, weights.detach().split(sizes), weights.grad.split(sizes)):
        p.data, p.grad = weight.view_as(p), grad.view_as(p)
    return weights


class Policy(nn.Module):
    """What PPO asks of a policy. A subclass defines `forward(obs) -> logits (B, A), values (B,)`; GPT has methods of its own.

    The buffer stores `encode(obs)`. Collecting calls `inference_cache()(encoded)`, learning calls `heads(features(encoded))`; here
    `features` passes on what it gets and `heads` is the whole policy. A policy may also have
    share(minibatches)                   (K, M, ...) encoded observations of K minibatches -> what `features` takes of each
    group_size                           how many observations that begin alike should stay together in minibatches
    change_head, changes(obs, next_obs)  for predicting what changes in the next observation
    """

    def encode(self, obs):
        """Observations (N, ...), an array or a tensor -> a tensor (N, ...)."""
        return torch.as_tensor(obs, device=next(self.parameters()).device)

    def features(self, obs):
        return obs

    def heads(self, obs):
        return self(obs)

    def inference_cache(self):
        """-> a function from encoded observations to logits and values, while the weights stand still."""
        return torch.no_grad()(self.forward)


@dataclass
class PPOConfig:
    num_steps: int  # environment steps in all, of all ranks together
    rollout_steps: int  # steps per environment between updates
    epochs: int  # passes over each rollout
    batch_size: int  # samples of a gradient step, of all ranks together; must divide those of a rollout
    gamma: float  # discount
    lambd: float  # of GAE, at the start of the training
    lambd_end: float  # from environment step lambd_steps on
    lambd_steps: int
    eps_clip: float  # the probability ratio is clipped to 1 +- this
    lr: float  # at the start
    min_lr: float  # at the end
    value_loss_coef: float
    entropy_coef: float
    max_grad_norm: float
    value_clip: float = 0.0  # 0: off
    move_coef: float = 0.0  # cost of any action but the first, for an env in which that one does nothing; 0: off
    prediction_coef: float = 0.0  # 0: off
    paired_envs: bool = False  # pairs start each rollout in the same state; for an env with pair() and in_sync()
    reward_scale: float = 1.0
    seed: int = 0


class PPO(Trainer):
    """`learn()` trains `policy` on `env`; callbacks watch (callbacks.py); `metadata` goes into every checkpoint.

    The env may also have
    state_dict() load_state_dict()  for a run to be resumed bit for bit
    pair() in_sync()                for paired_envs: as in BreakoutAsciiVec
    on_device, start_rollout(S)     it takes and gives tensors, and truncates episodes between rollouts: as in DeviceBreakout
    """

    def __init__(self, policy, env, config, callbacks=(), metadata=None):
        super().__init__(policy, callbacks, metadata)
        self.env, self.config = env, config
        self.env_on_device = getattr(env, "on_device", False)
        if not self.env_on_device and env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(
                "PPO needs a vector env that resets in the step that ends an episode: AutoresetMode.SAME_STEP"
            )
        self.device = device = next(policy.parameters()).device
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.weights = flatten_parameters(policy)
        if self.ranks > 1:
            dist.broadcast(self.weights.detach(), 0)
        # a tensor, so that a CUDA graph sees it change; CUDA's kernel wants float32
        self.lr = torch.tensor(
            config.lr, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device
        )
        self.optimizer = torch.optim.Adam([self.weights], lr=self.lr, eps=1e-5, fused=True)
        self.generator = torch.Generator()  # of actions and minibatches
        self.buffer = RolloutBuffer(config.rollout_steps, env.num_envs, device)
        self.reset(config.seed + 100_003 * self.rank)  # every rank plays its own games
        self.noise = torch.zeros(config.rollout_steps, env.num_envs, env.single_action_space.n, device=device)
        self.in_sync = torch.zeros(env.num_envs // 2, dtype=torch.bool, device=device)
        self.step_stats = (
            None  # (gradient steps of an epoch, statistics), a tensor that keeps its address, for CUDA graphs
        )
        self.stat_names = []
        self.episode_returns = deque(maxlen=100)  # of the episodes that ended last

    def reset(self, seed):
        """New episodes and new random numbers."""
        self.generator.manual_seed(seed)
        obs, _ = self.env.reset(seed=seed)
        self.obs = torch.as_tensor(obs, device=self.device).clone()
        self.return_so_far = np.zeros(self.env.num_envs)

    @property
    def num_steps(self):
        return self.config.num_steps

    @property
    def samples_per_update(self):
        """Of all ranks."""
        return self.config.rollout_steps * self.env.num_envs * self.ranks

    def collect_and_update(self):
        """What `learn` repeats -> the statistics of the update. On a GPU fast/ puts another in its place, which also checks itself."""
        self.collect()
        return self.update()

    def collect(self):
        """A rollout: S steps of every environment into the buffer, then advantages and returns. Raises FloatingPointError."""
        self.start_rollout()
        for _ in range(self.config.rollout_steps):
            self.check_stop()
            self.rollout_step()
        last_obs = self.policy.encode(self.obs)
        self.check_rollout(last_obs)
        _, last_values = self.act(last_obs)
        self.buffer.finish(last_values, self.config.gamma, self.lambd(), self.config.reward_scale)
        self.record_episode_returns()

    def check_rollout(self, last_obs):
        """Raises FloatingPointError, in all ranks if in one. Observations that are numbers of tokens or of lines always are finite."""
        fields = self.buffer.fields
        given = {"rewards": fields["rewards"]}
        if last_obs.is_floating_point():
            given["observations"] = torch.cat([*fields["obs"], last_obs])
        for name, x in {**given, "logits": fields["logprobs"], "values": fields["values"]}.items():
            # A mean is finite only if every number is, and a rank's own would leave the others waiting
            check_finite(f"in update {self.update_count + 1}", **{name: self.average(x.double().mean())})

    def start_rollout(self):
        """Draw the noise of the rollout ahead, let an env on the device draw its random numbers, and pair environments."""
        self.act = self.policy.inference_cache()  # encoded observations -> logits, values
        self.buffer.clear()
        S, N, A = self.noise.shape
        # drawn step by step, so that a seed gives the actions that torch.multinomial would
        self.noise.copy_(torch.stack([torch.empty(N, A).exponential_(generator=self.generator) for _ in range(S)]))
        if hasattr(self.env, "start_rollout"):
            obs, truncated = self.env.start_rollout(self.config.rollout_steps)
            self.obs.copy_(obs)
            self.end_episodes(truncated.cpu().numpy())
        if self.config.paired_envs:
            self.obs.copy_(torch.as_tensor(self.env.pair()))
            half = self.env.num_envs // 2
            self.return_so_far[half:] = self.return_so_far[:half]
            self.in_sync.fill_(True)

    @torch.no_grad()
    def rollout_step(self):
        """One step of every environment into the buffer."""
        optional = {}
        if self.config.paired_envs:
            self.in_sync &= self.tensor(self.env.in_sync())
            optional["in_sync"] = self.in_sync
        encoded = self.policy.encode(self.obs)
        logits, values = self.act(encoded)
        all_logprobs = F.log_softmax(logits, dim=-1)  # (N, A)
        # With noise E ~ Exp(1) the argmax of p / E is a sample from p, as in torch.multinomial. Here E was drawn ahead.
        actions = (all_logprobs.exp() / self.noise.index_select(0, self.buffer.position)[0]).argmax(-1)
        next_obs, rewards, terminated, truncated, infos = self.env.step(
            actions if self.env_on_device else actions.cpu().numpy()
        )
        final_values = torch.zeros_like(values)
        if (
            "final_obs" in infos and truncated.any()
        ):  # an env on the device has none, so any() never makes the host wait
            final_obs = np.stack(infos["final_obs"][truncated])
            check_finite(f"in update {self.update_count + 1}", observations=final_obs)
            final_values[self.tensor(truncated)] = self.act(self.policy.encode(final_obs))[1]
        next_obs, terminated, truncated = self.tensor(next_obs), self.tensor(terminated), self.tensor(truncated)
        if self.config.prediction_coef:
            optional["changes"] = self.policy.changes(self.obs, next_obs)
        # A lost life ends a return like the end of an episode, but the next observation still follows from this one.
        self.buffer.add(
            obs=encoded,
            actions=actions,
            logprobs=all_logprobs.gather(1, actions.unsqueeze(1)).squeeze(1),
            values=values,
            rewards=self.tensor(rewards).float(),
            terminated=terminated | self.tensor(lost_lives(infos)),
            truncated=truncated,
            final_values=final_values,
            has_next=~(terminated | truncated),
            **optional,
        )
        self.obs.copy_(next_obs)

    def tensor(self, x):
        return torch.as_tensor(x, device=self.device)

    def lambd(self):
        config, rise = self.config, min(self.global_step / self.config.lambd_steps, 1.0)
        return config.lambd + (config.lambd_end - config.lambd) * rise

    def record_episode_returns(self):
        """Of the episodes that ended in the rollout, undiscounted, in the environment's own rewards."""
        for rewards, has_next in zip(
            self.buffer.fields["rewards"].cpu().numpy(), self.buffer.fields["has_next"].cpu().numpy()
        ):
            self.return_so_far += rewards
            self.end_episodes(~has_next)

    def end_episodes(self, mask):
        self.episode_returns.extend(self.return_so_far[mask].tolist())
        self.return_so_far[mask] = 0

    def update(self):
        """Epochs of minibatches over the rollout -> the statistics of the update, floats. Raises FloatingPointError.

        Those of the gradient steps are means over steps and ranks, but for the largest KL; those of the rollout and its
        episodes are this rank's.
        """
        config = self.config
        self.lr.fill_(learning_rate(self.global_step / config.num_steps, config.lr, config.min_lr))
        step_stats = self.average(
            torch.cat([self.epoch() for _ in range(config.epochs)])
        )  # (gradient steps, statistics)
        spoiled = step_stats[~step_stats.isfinite().all(1)][
            :1
        ]  # the first such step: the loss of the next follows from its gradient
        losses = [name != "grad_norm" for name in self.stat_names]
        check_finite(f"in update {self.update_count + 1}", loss=spoiled[:, losses], gradient=spoiled)
        self.update_count += 1
        self.global_step += (
            self.samples_per_update
        )  # only now: learning rate and lambda are those of the steps before this update
        stats = dict(zip(self.stat_names, step_stats.mean(0).tolist()))
        stats["approx_kl_max"] = step_stats[:, self.stat_names.index("approx_kl")].max().item()
        stats["explained_variance"] = explained_variance(
            self.buffer.samples.old_values, self.buffer.samples.returns
        ).item()
        if config.paired_envs:
            stats["pair_correlation"] = self.buffer.pair_correlation.item()
        stats["lr"] = self.lr.item()
        stats["episode_return"] = float(np.mean(self.episode_returns)) if self.episode_returns else math.nan
        return stats

    def epoch(self):
        """Every sample once -> the statistics of the gradient steps, (gradient steps, statistics)."""
        share, group_size = getattr(self.policy, "share", None), getattr(self.policy, "group_size", 1)
        self.buffer.shuffle(self.config.batch_size // self.ranks, self.generator, group_size, share)
        self.normalize_advantages()
        for _ in range(self.buffer.num_minibatches):
            self.check_stop()
            self.train_step()
        return self.step_stats.clone()

    def normalize_advantages(self):
        """To mean 0 and standard deviation 1 in each minibatch, all ranks' samples together."""
        advantages = self.buffer.minibatches.advantages  # (minibatches, M)
        variances, means = torch.var_mean(advantages, 1, correction=0, keepdim=True)
        centres = self.average(means.clone())
        advantages -= centres
        advantages /= self.average(variances + (means - centres) ** 2).sqrt() + 1e-8

    def train_step(self):
        """One gradient step on the next minibatch."""
        loss, stats = self.loss(self.buffer.next_minibatch())
        grad = self.weights.grad
        grad.zero_()  # this and the clipping below save a third of a millisecond against torch's functions
        loss.backward()
        self.average(grad)
        stats["grad_norm"] = grad.norm()
        grad *= (self.config.max_grad_norm / (stats["grad_norm"] + 1e-6)).clamp_max(1.0)
        self.optimizer.step()
        self.keep_stats(stats)

    def keep_stats(self, stats):
        if self.step_stats is None or len(self.step_stats) != self.buffer.num_minibatches:
            self.stat_names, shape = list(stats), (self.buffer.num_minibatches, len(stats))
            self.step_stats = torch.zeros(shape, device=self.device)
        self.step_stats.index_copy_(
            0, self.buffer.minibatch_position - 1, torch.stack(list(stats.values())).unsqueeze(0)
        )

    def loss(self, mb):
        """A `Minibatch` -> the loss, and its terms and what else is worth knowing of it; tensors."""
        config = self.config
        features = self.policy.features(mb.obs)
        logits, new_values = self.policy.heads(features)
        all_logprobs = F.log_softmax(logits, dim=-1)  # (M, A)
        new_logprobs = all_logprobs.gather(1, mb.actions.unsqueeze(1)).squeeze(1)

        loss, stats = 0.0, {}
        if config.prediction_coef:
            term, info = prediction_loss(self.policy.change_head(features), mb.changes, mb.has_next)
            loss, stats = loss + config.prediction_coef * term, stats | info
        term, info = policy_loss(new_logprobs, mb.old_logprobs, mb.advantages, config.eps_clip)
        loss, stats = loss + term, stats | info
        term, info = value_loss(new_values, mb.old_values, mb.returns, config.value_clip)
        loss, stats = loss + config.value_loss_coef * term, stats | info
        term, info = entropy_loss(all_logprobs)
        loss, stats = loss + config.entropy_coef * term, stats | info
        term, info = move_loss(all_logprobs)
        loss, stats = loss + config.move_coef * term, stats | info
        term, info = self.further_loss(mb, all_logprobs)
        return loss + term, stats | info

    def further_loss(self, mb, all_logprobs):
        """A `Minibatch`, log-probabilities (M, A) -> what a subclass adds to the loss, and its statistics."""
        return 0.0, {}

    # Several ranks: with torchrun each plays its own games, and what is learned is averaged

    def average(self, tensor):
        """The mean over all ranks, in place -> tensor."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
            tensor /= self.ranks
        return tensor

    def stop_together(self):
        """Between two updates: a stop requested of any rank stops all, so that none waits for another's gradient.

        With one rank a stop takes effect sooner, at the next step or minibatch.
        """
        if self.average(torch.tensor(float(self.stop_requested), device=self.device)) > 0:
            raise StopTraining

    def check_stop(self):
        if self.ranks == 1:
            super().check_stop()

    # The state that a resume needs

    def state_dict(self):
        """A copy of everything that `learn` goes on from, plain types and tensors on the CPU."""
        return self.training_state(
            optimizer=self.optimizer.state_dict(),
            generator=self.generator.get_state(),
            env=self.env.state_dict() if hasattr(self.env, "state_dict") else None,
            obs=self.obs,
            return_so_far=self.return_so_far,
            episode_returns=list(self.episode_returns),
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit on the CPU if the env has a state_dict of its own.

        The state is that of rank 0; other ranks start new games.
        """
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.lr  # and not a copy
        self.generator.set_state(state["generator"])
        if self.rank > 0:
            self.reset(self.config.seed + 100_003 * self.rank + state["global_step"])
        elif state["env"] is not None:
            self.env.load_state_dict(to_numpy(state["env"]))
            self.obs.copy_(state["obs"])
            self.return_so_far = to_numpy(state["return_so_far"])
            self.policy.encode(self.obs)  # raises ValueError for observations that are none
        self.episode_returns = deque(state["episode_returns"], maxlen=100)
