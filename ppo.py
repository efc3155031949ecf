"""Proximal policy optimisation (Schulman et al. 2017): collect a rollout, update the policy, repeat.

It trains any policy with discrete actions (see `Policy`) on any Gymnasium vector env with SAME_STEP autoreset. Left
out: recurrent policies, continuous actions and observation normalisation.

The two steps that repeat, `rollout_step` and `train_step`, take no arguments and return nothing. They read and write
tensors that keep their addresses, so that a GPU can record them as CUDA graphs (fast/cuda_graphs.py).
"""

import math
import time
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

# --- losses: each returns a scalar tensor, and statistics as a dict of tensors ---------------------------------------


def k3(log_ratio):
    """Estimate KL(p, q) at each sample of p, from log q - log p (http://joschu.net/blog/kl-approx.html)."""
    return log_ratio.expm1() - log_ratio  # never negative; exp(x) - 1 would be too coarse for a small x


def policy_loss(new_logprobs, old_logprobs, advantages, eps_clip):
    """Return the negative clipped surrogate objective (Schulman et al. 2017, equation 7), and statistics.

    Args:
        new_logprobs, old_logprobs: (M,) log-probabilities of the actions taken.
        advantages: (M,) normalised.
    """
    log_ratio = new_logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        approx_kl = k3(log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > eps_clip).float().mean()
    return loss, {"policy_loss": loss.detach(), "approx_kl": approx_kl, "clipfrac": clipfrac}


def value_loss(new_values, old_values, returns, value_clip=0.0):
    """Return half the mean squared error of the values, and statistics. All arguments are (M,).

    With value_clip > 0, each sample counts with the larger of two errors: its own, and what it would be if the new
    value were at most value_clip away from the old one.
    """
    errors = (new_values - returns) ** 2
    if value_clip > 0:
        clipped = old_values + (new_values - old_values).clamp(-value_clip, value_clip)
        errors = torch.max(errors, (clipped - returns) ** 2)
    loss = 0.5 * errors.mean()
    return loss, {"value_loss": loss.detach()}


def entropy_loss(all_logprobs):
    """Return the negative mean entropy of the action distributions (M, A) in nats, and statistics."""
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
    return -entropy, {"entropy": entropy.detach()}


def move_loss(all_logprobs):
    """Return the mean probability of moving, which is any action except the first, and statistics."""
    loss = 1 - all_logprobs[:, 0].exp().mean()
    return loss, {"move_loss": loss.detach()}


def prediction_loss(logits, changes, has_next):
    """Return the cross-entropy of predicting which parts of the observation change, and statistics.

    It is summed over the parts and averaged over the samples.

    Args:
        logits, changes: (M, P), predicted and true.
        has_next: (M,) bool. A sample whose next observation belongs to another episode counts as 0.
    """
    errors = F.binary_cross_entropy_with_logits(logits, changes.to(logits.dtype), reduction="none").sum(1)
    loss = (errors * has_next).mean()
    return loss, {"prediction_loss": loss.detach()}


# --- schedules and statistics -----------------------------------------------------------------------------------------


def explained_variance(values, returns):
    """Return 1 - Var(returns - values) / Var(returns), or nan if the returns do not vary."""
    variance = returns.var()
    return 1 - (returns - values).var() / variance if variance > 0 else torch.tensor(math.nan)


def learning_rate(progress, lr, min_lr):
    """Return the learning rate of an update: half a cosine that falls from lr to min_lr.

    progress: the share of the training's environment steps that were done before this update; the first one has lr.
    """
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def gae_lambda(global_step, config):
    """Return GAE's lambda, which rises linearly from lambd at the start to lambd_end at step lambd_steps."""
    rise = min(global_step / config.lambd_steps, 1.0)
    return config.lambd + (config.lambd_end - config.lambd) * rise


def discounted_returns(rewards, has_next, gamma):
    """Return the discounted sum of the rewards (S, N) from each step on, to the end of its episode or the rollout's."""
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * has_next[t] * following
        returns[t] = following
    return returns


def lost_lives(infos):
    """Return where this step lost a life, (N,) bool, also if that ended the episode; False if an env has no lives."""
    return infos.get("life_lost", False) | infos.get("final_info", {}).get("life_lost", False)


# --- what PPO is given ------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Defines what PPO asks of a policy. A subclass adds `forward(obs)`, which returns logits (B, A) and values (B,).

    To collect, PPO calls `inference_function()(encode(obs))`. The rollout buffer keeps the encoded observations, and
    the loss calls `heads(features(encoded))`. By default `encode` and `features` change nothing, and `heads` is
    `forward`. To predict what changes in the next observation, a policy also has `changes(obs, next_obs)` and
    `change_head(features)`, as in GPT.
    """

    group_size = 1  # how many observations that begin alike should stay together in a minibatch

    def encode(self, obs):
        """Turn observations (N, ...), an array or a tensor, into the tensor (N, ...) that the rollout buffer keeps."""
        return torch.as_tensor(obs, device=next(self.parameters()).device)

    def prepare_minibatches(self, encoded):
        """Prepare the encoded observations (K, M, ...) of K minibatches for `features`; the leading axis K stays."""
        return encoded

    def features(self, encoded):
        return encoded

    def heads(self, features):
        return self(features)

    def inference_function(self):
        """Return a function that maps encoded observations to logits and values, without gradients.

        It is valid until the weights change.
        """
        return torch.no_grad()(self.forward)


class EnvCapabilities:
    """Lists what PPO uses of an env beyond Gymnasium's API, with a default for each thing that the env lacks.

    Attributes:
        on_device: whether `step` takes and returns tensors on the policy's device; by default False.
        can_pair: whether the env has `pair()` and `in_sync()`, which `paired_envs` needs; see BreakoutAsciiVec.
    """

    def __init__(self, env):
        self.env = env
        self.on_device = getattr(env, "on_device", False)
        self.can_pair = hasattr(env, "pair") and hasattr(env, "in_sync")

    def start_rollout(self, steps):
        """Let the env prepare its next steps. Returns observations and where it truncated episodes; by default None."""
        if hasattr(self.env, "start_rollout"):
            return self.env.start_rollout(steps)

    def observation(self, saved):
        """Return the observations after `load_state_dict`; by default those that were saved."""
        return self.env.observation() if hasattr(self.env, "observation") else saved

    def state_dict(self):
        """What `load_state_dict` of the env needs to go on bit for bit; by default None: a resumed run starts anew."""
        if hasattr(self.env, "state_dict"):
            return self.env.state_dict()


class EagerRunner:
    """Calls PPO's functions as they are.

    PPO calls the functions that repeat through its runner, because that of fast/gpu_training.py compiles and records
    them.
    """

    def attach(self, ppo):
        self.ppo = ppo

    def collect_and_update(self):
        self.ppo.collect()
        return self.ppo.update()

    def rollout_step(self):
        self.ppo.rollout_step()

    def train_step(self):
        self.ppo.train_step()

    def loss(self, minibatch):
        return self.ppo.loss(minibatch)


@dataclass
class PPOConfig:
    """Holds the constants of PPO, which train_ppo.py explains. The defaults here are off or neutral."""

    num_steps: int
    rollout_steps: int
    epochs: int
    batch_size: int
    gamma: float
    lambd: float
    lambd_end: float
    lambd_steps: int
    eps_clip: float
    lr: float
    min_lr: float
    value_loss_coef: float
    entropy_coef: float
    max_grad_norm: float
    value_clip: float = 0.0
    move_coef: float = 0.0
    prediction_coef: float = 0.0
    paired_envs: bool = False
    reward_scale: float = 1.0
    normalize_rewards: bool = False
    seed: int = 0


def flatten_parameters(policy):
    """Return one parameter that holds all trained parameters of the policy in a vector.

    The policy's own parameters and gradients become views of it and its gradient. Norm, clipping and optimizer then
    take one kernel each instead of one per parameter. Clear gradients by `weights.grad.zero_()`, because after
    `policy.zero_grad()` a backward pass would write gradients outside the vector.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    weights = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    weights.grad = torch.zeros_like(weights)
    for p, weight, grad in zip(parameters, weights.detach().split(sizes), weights.grad.split(sizes)):
        p.data = weight.view_as(p)
        p.grad = grad.view_as(p)
    return weights


# --- the algorithm ----------------------------------------------------------------------------------------------------


class PPO(Trainer):
    """Trains a policy on a vector env, by `learn()`.

    Args:
        policy: has what `Policy` has.
        env: a Gymnasium vector env with SAME_STEP autoreset; what else it may have, `EnvCapabilities` lists.
        config: a `PPOConfig`.
        callbacks, metadata: as in `Trainer`.
        runner: by default an `EagerRunner`.
    """

    def __init__(self, policy, env, config, callbacks=(), metadata=None, runner=None):
        super().__init__(policy, callbacks, metadata)
        self.env = env
        self.config = config
        self.env_can = EnvCapabilities(env)
        if not self.env_can.on_device and env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(
                "PPO needs a vector env that resets in the step that ends an episode: AutoresetMode.SAME_STEP"
            )
        if config.paired_envs and not self.env_can.can_pair:
            raise ValueError("paired_envs needs an env with the methods pair() and in_sync(); set it to False")
        self.device = next(policy.parameters()).device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.seed = config.seed + 100_003 * self.rank  # every rank plays its own games
        self.weights = flatten_parameters(policy)
        if self.ranks > 1:
            dist.broadcast(self.weights.detach(), 0)
        # The learning rate is a tensor, so that a CUDA graph sees it change. Adam on CUDA needs float32.
        dtype = torch.float32 if self.device.type == "cuda" else torch.float64
        self.lr = torch.tensor(config.lr, dtype=dtype, device=self.device)
        self.optimizer = torch.optim.Adam([self.weights], lr=self.lr, eps=1e-5, fused=True)
        self.generator = torch.Generator()  # for actions and minibatches
        self.buffer = RolloutBuffer(config.rollout_steps, env.num_envs, self.device)
        self.reset(self.seed)
        self.noise = torch.zeros(config.rollout_steps, env.num_envs, env.single_action_space.n, device=self.device)
        self.in_sync = torch.zeros(env.num_envs // 2, dtype=torch.bool, device=self.device)
        self.stat_names = []
        self.step_stats = None  # (gradient steps of an epoch, statistics), at a fixed address for CUDA graphs
        self.reward_scale = config.reward_scale
        self.anew = 0  # how many games had to begin anew when a state was loaded
        self.value_shift = 0.0
        self.mean_square = 0.0  # of the discounted returns so far, if rewards are normalized
        self.episode_returns = deque(maxlen=100)  # of the last episodes that ended
        self.playing_share = 0.5  # how much of an update's time it plays; in the rest it learns
        self.started_at = time.perf_counter()  # this update
        self.collected_at = self.started_at  # when its rollout was complete
        self.runner = runner or EagerRunner()
        self.runner.attach(self)

    def reset(self, seed):
        """Start new episodes, and seed the random numbers."""
        self.generator.manual_seed(seed)
        obs, _ = self.env.reset(seed=seed)
        self.obs = torch.as_tensor(obs, device=self.device).clone()
        self.return_so_far = np.zeros(self.env.num_envs)

    @property
    def num_steps(self):
        return self.config.num_steps

    @property
    def samples_per_update(self):
        """The environment steps of an update, of all ranks together."""
        return self.config.rollout_steps * self.env.num_envs * self.ranks

    @property
    def total_steps(self):
        return math.ceil(self.num_steps / self.samples_per_update) * self.samples_per_update

    def collect_and_update(self):
        """Collect a rollout and learn from it. Returns the statistics of the update."""
        return self.runner.collect_and_update()

    # Collecting

    def collect(self):
        """Put S steps of every environment into the buffer, then compute advantages and returns.

        Raises FloatingPointError.
        """
        self.started_at = time.perf_counter()
        self.emit("on_rollout_start")
        self.start_rollout()
        total = self.config.rollout_steps
        for done in range(total):
            self.check_stop()
            self.report("playing", done, total, self.samples_per_update * self.playing_share * done / total)
            self.runner.rollout_step()
        last_obs = self.policy.encode(self.obs)
        self.check_rollout(last_obs)
        _, last_values = self.act(last_obs)
        lambd = gae_lambda(self.global_step, self.config)
        if self.config.normalize_rewards:
            self.measure_returns()
            last_values = last_values + self.value_shift
        self.buffer.finish(last_values, self.config.gamma, lambd, self.reward_scale)
        self.record_episode_returns()
        self.emit("on_rollout_end")
        self.collected_at = time.perf_counter()

    def measure_returns(self):
        """Let rewards be divided by the root mean square of the discounted returns in the last rollouts.

        So a game may count in thousandths or in millions. The mean forgets: who falls off every cliff at first has
        returns that are a hundred times as large as later.

        In the first update the critic is also shifted to the mean return. Otherwise it believes that everything is
        worth more than it is where all rewards are negative, and to end an episode, even in the goal, seems a loss.
        `value_shift` says by how much all values have been shifted after the rollout.
        """
        fields = self.buffer.fields
        returns = discounted_returns(fields["rewards"].double(), fields["has_next"], self.config.gamma)
        mean_square = self.average(returns.square().mean()).item()
        self.mean_square += (mean_square - self.mean_square) * max(1 / (self.update_count + 1), 0.1)
        self.reward_scale = self.config.reward_scale / (math.sqrt(self.mean_square) or 1.0)
        self.value_shift = 0.0
        if self.update_count == 0:
            self.value_shift = self.average(
                returns.mean() * self.reward_scale - fields["values"].double().mean()
            ).item()
            for x in (self.policy.value_head.bias.detach(), fields["values"], fields["final_values"]):
                x += self.value_shift

    def start_rollout(self):
        """Draw the noise of the whole rollout, let the env prepare it, and pair environments."""
        self.act = self.policy.inference_function()  # maps encoded observations to logits and values
        self.buffer.clear()
        S, N, A = self.noise.shape
        # Drawn step by step, so that a seed gives the same actions as torch.multinomial would
        self.noise.copy_(torch.stack([torch.empty(N, A).exponential_(generator=self.generator) for _ in range(S)]))
        prepared = self.env_can.start_rollout(S)
        if prepared is not None:
            obs, truncated = prepared
            self.obs.copy_(obs)
            self.end_episodes(truncated.cpu().numpy())
        if self.config.paired_envs:
            self.obs.copy_(torch.as_tensor(self.env.pair()))
            half = self.env.num_envs // 2
            self.return_so_far[half:] = self.return_so_far[:half]
            self.in_sync.fill_(True)

    @torch.no_grad()
    def rollout_step(self):
        """Put one step of every environment into the buffer."""
        optional = {}
        if self.config.paired_envs:
            self.in_sync &= self.tensor(self.env.in_sync())
            optional["in_sync"] = self.in_sync
        encoded = self.policy.encode(self.obs)
        logits, values = self.act(encoded)
        all_logprobs = F.log_softmax(logits, dim=-1)  # (N, A)
        # If E ~ Exp(1), argmax(p / E) is a sample from p. torch.multinomial does the same, but draws E when called.
        actions = (all_logprobs.exp() / self.noise.index_select(0, self.buffer.position)[0]).argmax(-1)
        env_actions = actions if self.env_can.on_device else actions.cpu().numpy()
        next_obs, rewards, terminated, truncated, infos = self.env.step(env_actions)
        final_values = torch.zeros_like(values)
        # An env on the device has no final_obs, so any() never makes the host wait for the GPU.
        if "final_obs" in infos and truncated.any():
            final_obs = np.stack(infos["final_obs"][truncated])
            check_finite(f"in update {self.update_count + 1}", observations=final_obs)
            final_values[self.tensor(truncated)] = self.act(self.policy.encode(final_obs))[1]
        next_obs = self.tensor(next_obs)
        terminated = self.tensor(terminated)
        truncated = self.tensor(truncated)
        if self.config.prediction_coef:
            optional["changes"] = self.policy.changes(self.obs, next_obs)
        self.buffer.add(
            obs=encoded,
            actions=actions,
            logprobs=all_logprobs.gather(1, actions.unsqueeze(1)).squeeze(1),
            values=values,
            rewards=self.tensor(rewards).float(),
            # A lost life ends the return as the end of an episode does, yet the next observation follows from this one.
            terminated=terminated | self.tensor(lost_lives(infos)),
            truncated=truncated,
            final_values=final_values,
            has_next=~(terminated | truncated),
            **optional,
        )
        self.obs.copy_(next_obs)

    def tensor(self, x):
        return torch.as_tensor(x, device=self.device)

    def check_rollout(self, last_obs):
        """Raise FloatingPointError unless everything in the rollout is finite. If one rank raises it, all do."""
        fields = self.buffer.fields
        quantities = {"rewards": fields["rewards"]}
        if last_obs.is_floating_point():  # encoded text is integers
            quantities["observations"] = torch.cat([*fields["obs"], last_obs])
        quantities |= {"logits": fields["logprobs"], "values": fields["values"]}
        for name, x in quantities.items():
            # A mean is finite only if every number is. With the mean over all ranks, no rank goes on alone and waits.
            check_finite(f"in update {self.update_count + 1}", **{name: self.average(x.double().mean())})

    def record_episode_returns(self):
        """Record the undiscounted, unscaled returns of the episodes that ended in the rollout."""
        rewards_of_steps = self.buffer.fields["rewards"].cpu().numpy()
        has_next_of_steps = self.buffer.fields["has_next"].cpu().numpy()
        for rewards, has_next in zip(rewards_of_steps, has_next_of_steps):
            self.return_so_far += rewards
            self.end_episodes(~has_next)

    def end_episodes(self, mask):
        self.episode_returns.extend(self.return_so_far[mask].tolist())
        self.return_so_far[mask] = 0

    # Updating

    def update(self):
        """Train on the rollout for `epochs` passes. Raises FloatingPointError.

        Returns a dict of floats: means over all gradient steps and ranks, the largest KL divergence of a step, and
        statistics of this rank's rollout and episodes.
        """
        config = self.config
        self.lr.fill_(learning_rate(self.global_step / config.num_steps, config.lr, config.min_lr))
        step_stats = torch.cat([self.epoch(i) for i in range(config.epochs)])  # (gradient steps, statistics)
        self.average(step_stats)
        self.check_step_stats(step_stats)
        # These advance only now, because learning rate and lambda depend on the steps before this update.
        self.update_count += 1
        self.global_step += self.samples_per_update
        stats = dict(zip(self.stat_names, step_stats.mean(0).tolist()))
        stats["approx_kl_max"] = step_stats[:, self.stat_names.index("approx_kl")].max().item()
        samples = self.buffer.samples
        stats["explained_variance"] = explained_variance(samples.old_values, samples.returns).item()
        if config.paired_envs:
            stats["pair_correlation"] = self.buffer.pair_correlation.item()
        stats["lr"] = self.lr.item()
        self.playing_share = (self.collected_at - self.started_at) / (time.perf_counter() - self.started_at)
        stats["episode_return"] = float(np.mean(self.episode_returns)) if self.episode_returns else math.nan
        return stats

    def check_step_stats(self, step_stats):
        """Raise FloatingPointError unless all statistics are finite."""
        # The first bad step names the cause, because it spoils the weights for the steps after it.
        first_bad = step_stats[~step_stats.isfinite().all(1)][:1]
        losses = [name != "grad_norm" for name in self.stat_names]  # if all of these are finite, the gradient is not
        check_finite(f"in update {self.update_count + 1}", loss=first_bad[:, losses], gradient=first_bad)

    def epoch(self, number=0):
        """Train on every sample once, in the update's epoch with this number.

        Returns statistics (gradient steps, statistics).
        """
        batch_size = self.config.batch_size // self.ranks
        self.buffer.shuffle(batch_size, self.generator, self.policy.group_size, self.policy.prepare_minibatches)
        self.normalize_advantages()
        total = self.config.epochs * self.buffer.num_minibatches
        for done in range(number * self.buffer.num_minibatches, (number + 1) * self.buffer.num_minibatches):
            self.check_stop()
            share = self.playing_share + (1 - self.playing_share) * done / total
            self.report("learning", done, total, self.samples_per_update * share)
            self.runner.train_step()
        return self.step_stats.clone()

    def normalize_advantages(self):
        """Normalise to mean 0 and standard deviation 1 in each minibatch, over the samples of all ranks."""
        advantages = self.buffer.minibatches.advantages  # (minibatches, M)
        variances, means = torch.var_mean(advantages, 1, correction=0, keepdim=True)
        centres = self.average(means.clone())
        advantages -= centres
        advantages /= self.average(variances + (means - centres) ** 2).sqrt() + 1e-8

    def train_step(self):
        """Take one gradient step on the next minibatch."""
        loss, stats = self.runner.loss(self.buffer.next_minibatch())
        grad = self.weights.grad
        grad.zero_()  # this and the clipping below take a third of a millisecond less than torch's functions
        loss.backward()
        self.average(grad)
        stats["grad_norm"] = grad.norm()
        grad *= (self.config.max_grad_norm / (stats["grad_norm"] + 1e-6)).clamp_max(1.0)
        self.optimizer.step()
        self.keep_stats(stats)

    def keep_stats(self, stats):
        if self.step_stats is None or len(self.step_stats) != self.buffer.num_minibatches:
            self.stat_names = list(stats)
            self.step_stats = torch.zeros(self.buffer.num_minibatches, len(stats), device=self.device)
        row = torch.stack(list(stats.values())).unsqueeze(0)
        self.step_stats.index_copy_(0, self.buffer.minibatch_position - 1, row)

    def loss(self, mb, policy=None):
        """Return the loss of a `Minibatch`, and a dict of statistics; by default for the policy that is trained."""
        config = self.config
        policy = self.policy if policy is None else policy
        features = policy.features(mb.obs)
        logits, new_values = policy.heads(features)
        all_logprobs = F.log_softmax(logits, dim=-1)  # (M, A)
        new_logprobs = all_logprobs.gather(1, mb.actions.unsqueeze(1)).squeeze(1)

        prediction = 0.0
        prediction_stats = {}
        if config.prediction_coef:
            prediction, prediction_stats = prediction_loss(policy.change_head(features), mb.changes, mb.has_next)
        surrogate, policy_stats = policy_loss(new_logprobs, mb.old_logprobs, mb.advantages, config.eps_clip)
        error, value_stats = value_loss(new_values, mb.old_values, mb.returns, config.value_clip)
        negative_entropy, entropy_stats = entropy_loss(all_logprobs)
        moves, move_stats = move_loss(all_logprobs)
        further, further_stats = self.further_loss(mb, all_logprobs)
        loss = (
            config.prediction_coef * prediction
            + surrogate
            + config.value_loss_coef * error
            + config.entropy_coef * negative_entropy
            + config.move_coef * moves
            + further
        )
        return loss, prediction_stats | policy_stats | value_stats | entropy_stats | move_stats | further_stats

    def further_loss(self, mb, all_logprobs):
        """Return a term that a subclass adds to the loss, and its statistics. all_logprobs: (M, A)."""
        return 0.0, {}

    # Several ranks: under torchrun each plays its own games, and all learn from the mean of their gradients.

    def average(self, tensor):
        """Replace the tensor by its mean over all ranks, and return it."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
            tensor /= self.ranks
        return tensor

    def stop_together(self):
        """Stop all ranks between two updates if one was asked to, so that none waits for another's gradient.

        A single rank stops sooner, at the next step or minibatch.
        """
        if self.average(torch.tensor(float(self.stop_requested), device=self.device)) > 0:
            raise StopTraining

    def check_stop(self):
        if self.ranks == 1:
            super().check_stop()

    # The state that a resumed run needs

    def state_dict(self):
        """Return everything that `learn` needs to go on. These are no copies: `learn` changes the tensors."""
        return self.training_state(
            optimizer=self.optimizer.state_dict(),
            generator=self.generator.get_state(),
            env=self.env_can.state_dict(),
            obs=self.obs,
            return_so_far=self.return_so_far,
            episode_returns=list(self.episode_returns),
            **({"mean_square": self.mean_square} if self.config.normalize_rewards else {}),
        )

    def load_state_dict(self, state):
        """Go on from a state_dict, on the CPU bit for bit if the env has a state_dict too.

        The state is rank 0's. Other ranks start new games. `anew` says how many games could not go on.
        """
        self.anew = 0
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.lr  # the tensor that `update` fills
        self.generator.set_state(state["generator"])
        if self.rank > 0:
            self.reset(self.seed + state["global_step"])
        elif state["env"] is not None:
            self.env.load_state_dict(to_numpy(state["env"]))
            self.obs.copy_(state["obs"])
            self.return_so_far = to_numpy(state["return_so_far"])
            self.policy.encode(self.obs)  # raises ValueError unless these are observations
            self.begin_anew_where(self.tensor(self.env_can.observation(self.obs)))
        else:
            self.anew = self.env.num_envs
        self.episode_returns = deque(state["episode_returns"], maxlen=100)
        self.mean_square = state["mean_square"] if self.config.normalize_rewards else 0.0

    def begin_anew_where(self, obs):
        """Take over the observations (N, ...) of a loaded env where they are not those that were saved.

        A game that does not repeat itself has begun a new episode there.
        """
        anew = (obs != self.obs).flatten(1).any(1)
        self.obs.copy_(obs)
        self.return_so_far[anew.cpu().numpy()] = 0
        self.anew = int(anew.sum())
