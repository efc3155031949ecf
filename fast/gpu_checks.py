"""Is what a GPU computes right? An update checks itself against the CPU.

A  games       NumPy's games, from the same state with the same actions and random numbers: all that they gave is equal
B  policy      log-probabilities and values of 256 samples, in float64; actions; advantages
C  gradient    the pages of all minibatches; of one, the terms of the loss and their gradient, in float64
D  steps       two of Adam's from the same weights, the second with half the learning rate, in float64
E  prefixes    deeper models, instead of A to C: what every token of four pages becomes, and the gradient, as model.py computes them

How far rounding may go depends on the weights. So the CPU computes B, C and, in bf16, E in the same precision too, and a GPU may be off by
some times as much. Rounding to the 10 bits of TF32 is off by about 500 times as much as float32.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from breakout_ascii import (
    BRICK_ROWS,
    BRICK_TOP,
    CHARACTERS,
    PADDLE_ROW,
    RIGHT_WALL,
    TOKENS,
    BreakoutAsciiVec,
    Games,
    RandomNumbers,
    new_games,
)
from fast.fast_gpt import FastGPT
from fast.shared_prefixes import features_of_every_token, prefix_tree
from model import CHARACTER_OF, GPT
from rollout_buffer import Minibatch, RolloutBuffer, select

SAMPLES = 256  # of a rollout, read again in float64
ROUNDING = 1e-6  # some roundings of float32, relative to numbers of order 1
# Times the CPU's own error. Of a trained policy's checks a few in a thousand could be false alarms: rounding may carry a sample across the
# point where PPO clips, and the gradient jumps there.
VALUES_MARGIN, GRADIENT_MARGIN, BF16_MARGIN = 20, 30, 4


class Check(NamedTuple):
    name: str
    error: float  # the largest that was seen
    tolerance: float

    @property
    def passed(self):
        return self.error <= self.tolerance  # nan is not

    def __str__(self):
        return f"{self.name}: error {self.error:.2g}, tolerance {self.tolerance:.2g}"


def check_update(ppo, before):
    """What `ppo.collect_and_update()` has just made of the state_dict `before` -> a list of `Check`. Leaves ppo as it was."""
    if isinstance(
        ppo.policy, FastGPT
    ):  # more layers: NumPy plays, and bf16 has a tolerance of its own, in `check_prefixes`
        return check_steps(ppo)
    return [
        check_games(ppo, before["env"]),
        *check_policy(ppo, before),
        check_minibatches(ppo),
        *check_steps(ppo, gradient_on_cpu(ppo)),
    ]


# Games


def check_games(ppo, state, name="A games, values that differ"):
    """The rollout in ppo.buffer, played again by NumPy's games from their state before it."""
    env, fields = ppo.env, {name: x.cpu().numpy() for name, x in ppo.buffer.fields.items()}
    steps, num_games, _ = fields["obs"].shape
    numbers = [RandomNumbers(*arrays) for arrays in zip(*(x.cpu().numpy() for x in env.numbers))]
    games = Games(num_games)
    games.load_state_dict({name: np.asarray(x) for name, x in state.items() if name in Games.STATE})
    games.reset(games.elapsed >= env.max_episode_steps, *new_games(numbers[steps], env.varied_starts))
    if ppo.config.paired_envs:
        games.pair()
    wrong, in_sync = 0, True
    for t in range(steps):
        page = games.pages.reshape(num_games, TOKENS).copy()
        found = {"obs": CHARACTER_OF.numpy()[page]}
        if ppo.config.paired_envs:
            found["in_sync"] = in_sync = in_sync & games.in_sync()
        rewards, terminated, life_lost = games.step(fields["actions"][t])
        games.reset(terminated, *new_games(numbers[t], env.varied_starts))
        found |= {"rewards": rewards, "terminated": terminated | life_lost, "has_next": ~terminated}
        if ppo.config.prediction_coef:
            pages = torch.from_numpy(page), torch.from_numpy(games.pages.reshape(num_games, TOKENS))
            found["changes"] = ppo.policy.changes(*pages).numpy()
        wrong += sum(int((fields[name][t] != x).sum()) for name, x in found.items()) + int(
            fields["truncated"][t].sum()
        )  # only between rollouts
    wrong += sum(int((getattr(games, name) != x).sum()) for name, x in env.games.state_dict().items())
    wrong += sum(
        int((games.pages.reshape(num_games, TOKENS) != x.cpu().numpy()).sum()) for x in (ppo.obs, env.observation())
    )
    return Check(name, wrong, 0)


def set_rare_cases(ppo):
    """Put the games where something rare happens in the next steps -> their state_dict.

    In turn: the last ball falls; the last brick is hit; an episode has become too long; it is one step shorter; the ball comes to the
    left and to the right half of the paddle, to the left wall, and to the corner at the top right.
    """
    longest = ppo.env.max_episode_steps
    cases = (
        dict(lives=1, ball_x=70, ball_y=PADDLE_ROW - 1, dx=1, dy=1, paddle_x=1),
        dict(bricks=False, bricks_left=1, ball_x=39, ball_y=BRICK_TOP + BRICK_ROWS, dx=1, dy=-1),
        dict(elapsed=longest),
        dict(elapsed=longest - 1),
        dict(ball_x=36, ball_y=PADDLE_ROW - 1, dx=1, dy=1, paddle_x=36),
        dict(ball_x=40, ball_y=PADDLE_ROW - 1, dx=1, dy=1, paddle_x=36),
        dict(ball_x=1, ball_y=15, dx=-1),
        dict(ball_x=RIGHT_WALL - 1, ball_y=1, dx=1, dy=-1),
    )
    state, num_games = ppo.env.state_dict(), ppo.env.num_envs
    case = np.arange(num_games) % max(num_games // 2, 1) % len(cases)  # paired games have the same
    for i, values in enumerate(cases):
        for name, x in values.items():
            state[name][case == i] = x
    state["bricks"][case == 1, BRICK_ROWS - 1, 6] = True
    ppo.env.load_state_dict(state)
    ppo.obs.copy_(ppo.env.observation())
    return state


# Policy and gradient


def on_cpu(config, weights, dtype):
    """-> a GPT on the CPU with these weights, a state_dict."""
    gpt = FastGPT(config)
    gpt.load_state_dict(weights)
    return gpt.to(dtype)


def text_of(characters):
    """(B, 1944) characters -> tokens, an array."""
    return np.frombuffer(CHARACTERS.encode(), np.uint8)[characters.cpu().numpy()]


def read(gpt, pages):
    """-> logits, values"""
    return gpt.inference_cache()(gpt.encode(pages))


@torch.no_grad()
def check_policy(ppo, before):
    """Some samples of the rollout, from its first step, before anything was recorded, to its last."""
    fields = {name: ppo.buffer.fields[name].flatten(0, 1) for name in ("obs", "actions", "logprobs", "values")}
    rows = torch.linspace(0, len(fields["actions"]) - 1, SAMPLES, device=ppo.device).long().unique()
    fields = {name: x[rows].cpu() for name, x in fields.items()}
    pages, actions, results = text_of(fields["obs"]), fields["actions"].unsqueeze(1), []
    for dtype in (torch.float64, torch.float32):
        logits, values = read(on_cpu(ppo.policy.config, before["model"], dtype), pages)
        results.append((F.log_softmax(logits, dim=-1).double(), values.double()))
    (exact, exact_values), (rounded, rounded_values) = results
    logprobs = Check(
        "B log-probabilities",
        largest(fields["logprobs"] - exact.gather(1, actions).squeeze(1)),
        VALUES_MARGIN * largest(rounded - exact) + ROUNDING,
    )
    values = Check(
        "B values",
        largest(fields["values"] - exact_values),
        VALUES_MARGIN * largest(rounded_values - exact_values) + ROUNDING,
    )
    scores = exact - ppo.noise.flatten(0, 1)[rows].cpu().double().log()  # the action is where this is largest
    gap = scores.amax(1) - scores.gather(1, actions).squeeze(1)
    actions = Check("B actions, gap to the best", largest(gap), 2 * logprobs.tolerance)
    return [logprobs, values, actions, check_advantages(ppo, before, values.tolerance)]


def check_advantages(ppo, before, tolerance):
    """tolerance: what the last values may be off by."""
    ours, config = ppo.buffer, ppo.config
    buffer = RolloutBuffer(ours.rollout_steps, ours.num_envs)
    buffer.fields = {name: x.cpu() for name, x in ours.fields.items()}
    buffer.position.fill_(ours.rollout_steps)
    _, last_values = read(on_cpu(ppo.policy.config, before["model"], torch.float64), ppo.obs.cpu())
    lambd = type(ppo).lambd(SimpleNamespace(config=config, global_step=before["global_step"]))
    buffer.finish(last_values.float(), config.gamma, lambd, config.reward_scale)
    expected = torch.stack([buffer.samples.advantages, buffer.samples.returns])
    found = torch.stack([ours.samples.advantages, ours.samples.returns]).cpu()
    return Check("B advantages and returns", largest(found - expected), tolerance + ROUNDING * (1 + largest(expected)))


def check_minibatches(ppo):
    """Every sample is in one minibatch, with its own page. (Advantages are normalised there, and what changes is not compared.)"""
    samples, minibatches = ppo.buffer.samples, ppo.buffer.minibatches
    lines = minibatches.obs
    pages = torch.stack([c[numbers].flatten(1) for c, numbers in zip(lines.characters, lines.pages)])  # (K, M, 1944)
    hashes = np.random.default_rng(0).integers(2**62, size=TOKENS)

    def sorted_samples(pages, x):
        """-> (6, n) int64: a column for each sample, in an order of their own."""
        numbers = [
            x.actions,
            x.old_logprobs.view(torch.int32),
            x.old_values.view(torch.int32),
            x.returns.view(torch.int32),
            x.has_next,
        ]
        columns = [pages.flatten(end_dim=-2).cpu().numpy().astype(np.int64) @ hashes]
        table = np.stack(columns + [column.flatten().cpu().numpy().astype(np.int64) for column in numbers])
        return table[:, np.lexsort(table)]

    wrong = (sorted_samples(samples.obs, samples) != sorted_samples(pages, minibatches)).any(0).sum()
    return Check("C minibatches, samples that differ", int(wrong), 0)


def gradient_on_cpu(ppo):
    """The first minibatch at the present weights -> terms of the loss and clipped gradient in float64, and the relative error of the
    gradient in float32."""
    first = select(ppo.buffer.minibatches, torch.zeros_like(ppo.buffer.minibatch_position))
    pages, gradients = text_of(first.obs.characters[first.obs.pages].flatten(1)), []
    for dtype in (torch.float32, torch.float64):
        gpt = on_cpu(ppo.policy.config, ppo.policy.state_dict(), dtype)
        others = (x.cpu().to(dtype) if x.is_floating_point() else x.cpu() for x in first[1:])
        loss, terms = type(ppo).loss(
            SimpleNamespace(policy=gpt, config=ppo.config, further_loss=ppo.further_loss),
            Minibatch(gpt.encode(pages), *others),
        )
        loss.backward()
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in gpt.parameters()]
        )
        gradient = ppo.average(gradient.to(ppo.device)).cpu()
        gradients.append(gradient * min(ppo.config.max_grad_norm / (gradient.norm().item() + 1e-6), 1.0))
    return terms, gradients[1], relative_error(*gradients)


# Steps


def check_steps(ppo, reference=None):
    """Two training steps on the first minibatch. reference: of `gradient_on_cpu`."""
    weights, checks = ppo.weights, []
    state, betas, eps = (
        ppo.optimizer.state[weights],
        ppo.optimizer.param_groups[0]["betas"],
        ppo.optimizer.param_groups[0]["eps"],
    )
    kept = [
        weights.detach(),
        *(state[name] for name in ("exp_avg", "exp_avg_sq", "step")),
        ppo.lr,
        ppo.buffer.minibatch_position,
    ]
    copies = [x.clone() for x in kept]
    exact = [x.cpu().double() for x in copies[:5]]
    for lr, label in ((exact[4].item(), ""), (exact[4].item() / 2, ", lr halved")):
        restore(kept, copies)
        ppo.lr.fill_(lr)
        ppo.buffer.minibatch_position.zero_()
        ppo.train_step()
        miscounted = abs(state["step"].item() - exact[3].item() - 1) + abs(ppo.buffer.minibatch_position.item() - 1)
        gradient = weights.grad.cpu().double()
        expected = adam(*exact[:4], gradient, lr, betas, eps)
        checks.append(Check("D steps counted wrong" + label, miscounted, 0))
        # relative to the weight, which rounds, or to the step, which is lr at most
        error = (weights.detach().cpu().double() - expected).abs() / (1 + expected.abs())
        checks.append(Check("D weights" + label, error.max().item(), ROUNDING))
        if reference is not None:
            terms, exact_gradient, rounding = reference
            checks.append(
                Check(
                    "C gradient" + label,
                    relative_error(gradient, exact_gradient),
                    GRADIENT_MARGIN * rounding + ROUNDING,
                )
            )
            found = dict(zip(ppo.stat_names, ppo.step_stats[0].tolist()))
            # of clipfrac, a count, one sample more or less is no error
            errors = [
                abs(found[name] - x.item()) / (1 + abs(x.item())) for name, x in terms.items() if name != "clipfrac"
            ]
            checks.append(Check("C loss, each term" + label, largest(torch.tensor(errors)), 1e-4))
    restore(kept, copies)
    return checks


def restore(tensors, copies):
    for x, copy in zip(tensors, copies):
        x.copy_(copy)


def adam(weights, exp_avg, exp_avg_sq, step, gradient, lr, betas, eps):
    """One step of Adam (Kingma & Ba 2015, algorithm 1) -> weights."""
    step = step + 1
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradient
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient**2
    return weights - lr * exp_avg / (1 - betas[0] ** step) / ((exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps)


# Prefixes


def check_prefixes(gpt):
    """Four pages of one game through a `FastGPT` of more than one layer, as it is set up, against model.py."""
    env = BreakoutAsciiVec(1)
    pages = np.concatenate([env.reset(seed=0)[0], *(env.step(np.array([1]))[0] for _ in range(3))])
    plain = GPT(gpt.config)
    plain.load_state_dict({name: x.cpu() for name, x in gpt.state_dict().items()})
    exact = plain.ln_f(plain.hidden(plain.encode(pages)))
    exact_gradients = gradients(plain, exact)

    def errors(model, features):
        pairs = zip(gradients(model, features), exact_gradients, strict=True)
        return largest(features.cpu() - exact), largest(
            1 - torch.stack([F.cosine_similarity(*pair, dim=0) for pair in pairs])
        )

    with torch.autocast("cpu", torch.bfloat16, enabled=gpt.bf16):
        rounding, of_gradient = errors(plain, plain.ln_f(plain.hidden(plain.encode(pages))))
    tree = prefix_tree(gpt.index, gpt.encode(pages).cpu().numpy(), gpt.device)
    error, error_of_gradient = errors(gpt, features_of_every_token(gpt, tree, gpt.bf16, gpt.compile_blocks))
    with torch.no_grad():
        last = gpt.features(gpt.encode(pages)).cpu()
    tolerance = BF16_MARGIN * rounding + 1e-3  # 1e-3: without bf16, far above float32's rounding, and below TF32's
    return [
        Check("E every token", error, tolerance),
        Check("E last position, without gradients", largest(last - exact[:, -1]), tolerance),
        # quadratic in the error
        Check("E gradient of each parameter, 1 - cosine", error_of_gradient, BF16_MARGIN**2 * of_gradient + 1e-5),
    ]


def gradients(gpt, features):
    """The gradient of a weighted sum of features (B, T, C) by each parameter but the heads', vectors on the CPU."""
    loss = (features * torch.linspace(-1, 1, features.numel(), device=features.device).view_as(features)).sum()
    return [
        g.float().cpu().flatten()
        for g in torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True)
        if g is not None
    ]


# Errors


def largest(x):
    return x.detach().abs().max().item()


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()
