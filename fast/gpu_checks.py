"""Checks that a GPU computes the same as the CPU in an update of PPO.

The CPU computes these again:

A  games       all steps, with NumPy's games, from the same state, actions and random numbers; everything must be equal;
               only if the games are on the GPU
B  policy      log-probabilities and values of 256 samples in float64; the actions; the advantages
C  gradient    the pages of all minibatches; for one, the terms of the loss and their gradient in float64
D  steps       two of Adam's steps from the same weights, the second with half the learning rate, in float64
E  prefixes    for deeper models, instead of A to C: every token of four pages with model.py, and the gradient

How much rounding is allowed depends on the weights. Therefore the CPU also computes B, C and (in bf16) E in the
precision of the GPU, and the GPU's error may be a certain number of times as large as the CPU's. Rounding to the 10
bits of TF32 makes an error about 500 times as large as that of float32.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from breakout_ascii import (
    BRICK_COLUMNS,
    BRICK_LEFT,
    BRICK_ROWS,
    BRICK_TOP,
    BRICK_WIDTH,
    PADDLE_MIDDLE,
    PADDLE_ROW,
    PADDLE_START,
    RIGHT_WALL,
    TOKENS,
    Games,
    RandomNumbers,
    new_games,
)
from fast.fast_gpt import FastGPT
from fast.shared_prefixes import features_of_every_token, prefix_tree
from model import GPT
from ppo import gae_lambda
from rollout_buffer import Minibatch, RolloutBuffer, select

SAMPLES = 256  # of a rollout, which are computed again in float64
ROUNDING = 1e-6  # a few roundings of float32, relative to numbers of order 1
# How many times as large as the CPU's error a GPU's may be. With a trained policy a few checks in a thousand may be
# false alarms, because rounding can carry a sample across the point at which PPO clips, and the gradient jumps there.
VALUES_MARGIN = 20
GRADIENT_MARGIN = 30
BF16_MARGIN = 4


class Check(NamedTuple):
    """The result of one check."""

    name: str
    error: float  # the largest that was seen
    tolerance: float

    @property
    def passed(self):
        return self.error <= self.tolerance  # False for nan

    def __str__(self):
        return f"{self.name}: error {self.error:.2g}, tolerance {self.tolerance:.2g}"


def check_update(ppo, before):
    """Check the update that has just been made, and leave ppo as it was.

    Args: before, the state_dict in which the update began.
    Returns: a list of `Check`.
    """
    if isinstance(ppo.policy, FastGPT):  # with more layers NumPy plays, and `check_prefixes` checks the gradient
        return check_steps(ppo)
    checks = [check_games(ppo, before["env"])] if ppo.env_can.on_device else []
    return [*checks, *check_policy(ppo, before), check_minibatches(ppo), *check_steps(ppo, gradient_on_cpu(ppo))]


# --- games ------------------------------------------------------------------------------------------------------------


def check_games(ppo, state, name="A games, values that differ"):
    """Play the rollout in ppo.buffer again with NumPy's games, and count the values that differ.

    Args: state, a state_dict of the games before the rollout.
    Returns: a `Check`.
    """
    env = ppo.env
    fields = {field: x.cpu().numpy() for field, x in ppo.buffer.fields.items()}
    steps, num_games, _ = fields["obs"].shape
    numbers = [RandomNumbers(*arrays) for arrays in zip(*(x.cpu().numpy() for x in env.numbers))]
    games = Games(num_games)
    games.load_state_dict({field: np.asarray(x) for field, x in state.items() if field in Games.STATE})
    games.reset(games.elapsed >= env.max_episode_steps, *new_games(numbers[steps], env.varied_starts))
    if ppo.config.paired_envs:
        games.pair()
    wrong = int(fields["truncated"].sum())  # games are truncated between rollouts only
    in_sync = True
    for t in range(steps):
        page = games.pages.reshape(num_games, TOKENS).copy()
        expected = {"obs": ppo.policy.character_of.cpu().numpy()[page]}
        if ppo.config.paired_envs:
            in_sync = in_sync & games.in_sync()
            expected["in_sync"] = in_sync
        rewards, terminated, life_lost = games.step(fields["actions"][t])
        games.reset(terminated, *new_games(numbers[t], env.varied_starts))
        expected |= {"rewards": rewards, "terminated": terminated | life_lost, "has_next": ~terminated}
        if ppo.config.prediction_coef:
            next_page = torch.from_numpy(games.pages.reshape(num_games, TOKENS))
            expected["changes"] = ppo.policy.changes(torch.from_numpy(page), next_page).numpy()
        wrong += sum(count_differences(fields[field][t], x) for field, x in expected.items())
    wrong += sum(count_differences(getattr(games, field), x) for field, x in env.games.state_dict().items())
    for x in (ppo.obs, env.observation()):
        wrong += count_differences(games.pages.reshape(num_games, TOKENS), x.cpu().numpy())
    return Check(name, wrong, 0)


def count_differences(x, y):
    return int((x != y).sum())


def set_rare_cases(ppo):
    """Put the games where something rare happens in the next steps, and return their state_dict.

    In turn: the last ball falls; the last brick is hit; an episode has become too long; one is a step shorter than
    that; the ball comes to the left half of the paddle; to its right half; to the left wall; to the top right corner.
    """
    longest = ppo.env.max_episode_steps
    above_paddle = PADDLE_ROW - 1
    under_bricks = BRICK_TOP + BRICK_ROWS  # a ball must not be put on a brick
    middle = BRICK_COLUMNS // 2
    brick_x = BRICK_LEFT + BRICK_WIDTH * middle + BRICK_WIDTH // 2
    cases = (
        dict(lives=1, ball_x=7 * RIGHT_WALL // 8, ball_y=above_paddle, dx=1, dy=1, paddle_x=1),
        dict(bricks=False, bricks_left=1, ball_x=brick_x - 1, ball_y=under_bricks, dx=1, dy=-1),
        dict(elapsed=longest),
        dict(elapsed=longest - 1),
        dict(ball_x=PADDLE_START, ball_y=above_paddle, dx=1, dy=1, paddle_x=PADDLE_START),
        dict(ball_x=PADDLE_START + PADDLE_MIDDLE, ball_y=above_paddle, dx=1, dy=1, paddle_x=PADDLE_START),
        dict(ball_x=1, ball_y=min(under_bricks + 3, above_paddle), dx=-1),
        dict(ball_x=RIGHT_WALL - 1, ball_y=1 if BRICK_TOP > 1 else above_paddle, dx=1, dy=-1),
    )
    state = ppo.env.state_dict()
    num_games = ppo.env.num_envs
    case_of_game = np.arange(num_games) % max(num_games // 2, 1) % len(cases)  # two paired games get the same case
    for case, values in enumerate(cases):
        for name, x in values.items():
            state[name][case_of_game == case] = x
    state["bricks"][case_of_game == 1, BRICK_ROWS - 1, middle] = True
    ppo.env.load_state_dict(state)
    ppo.obs.copy_(ppo.env.observation())
    return state


# --- policy -----------------------------------------------------------------------------------------------------------


def gpt_on_cpu(config, weights, dtype):
    """Return a GPT on the CPU with these weights, a state_dict."""
    gpt = FastGPT(config)
    gpt.load_state_dict(weights)
    return gpt.to(dtype)


def tokens_of(characters, config):
    """Return the tokens (B, 1944), an array, of characters (B, 1944), a tensor of indices of the character set."""
    return np.frombuffer(config.characters.encode(), np.uint8)[characters.cpu().numpy()]


def logits_and_values(gpt, pages):
    return gpt.inference_function()(gpt.encode(pages))


@torch.no_grad()
def check_policy(ppo, before):
    """Check samples of the rollout, from its first step, when nothing was recorded yet, to its last."""
    fields = {name: ppo.buffer.fields[name].flatten(0, 1) for name in ("obs", "actions", "logprobs", "values")}
    rows = torch.linspace(0, len(fields["actions"]) - 1, SAMPLES, device=ppo.device).long().unique()
    fields = {name: x[rows].cpu() for name, x in fields.items()}
    pages = tokens_of(fields["obs"], ppo.policy.config)
    actions = fields["actions"].unsqueeze(1)
    results = []
    for dtype in (torch.float64, torch.float32):
        logits, values = logits_and_values(gpt_on_cpu(ppo.policy.config, before["model"], dtype), pages)
        results.append((F.log_softmax(logits, dim=-1).double(), values.double() + ppo.value_shift))
    (exact, exact_values), (rounded, rounded_values) = results
    logprobs_check = Check(
        "B log-probabilities",
        largest(fields["logprobs"] - exact.gather(1, actions).squeeze(1)),
        VALUES_MARGIN * largest(rounded - exact) + ROUNDING,
    )
    values_check = Check(
        "B values",
        largest(fields["values"] - exact_values),
        VALUES_MARGIN * largest(rounded_values - exact_values) + ROUNDING,
    )
    scores = exact - ppo.noise.flatten(0, 1)[rows].cpu().double().log()  # the action has the largest of these
    gap = scores.amax(1) - scores.gather(1, actions).squeeze(1)
    actions_check = Check("B actions, gap to the best", largest(gap), 2 * logprobs_check.tolerance)
    return [logprobs_check, values_check, actions_check, check_advantages(ppo, before, values_check.tolerance)]


def check_advantages(ppo, before, tolerance):
    """Compute advantages and returns again on the CPU. tolerance: the one for the values after the last step."""
    ours = ppo.buffer
    config = ppo.config
    buffer = RolloutBuffer(ours.rollout_steps, ours.num_envs)
    buffer.fields = {name: x.cpu() for name, x in ours.fields.items()}
    buffer.position.fill_(ours.rollout_steps)
    gpt = gpt_on_cpu(ppo.policy.config, before["model"], torch.float64)
    _, last_values = logits_and_values(gpt, ppo.obs.cpu())
    lambd = gae_lambda(before["global_step"], config)
    last_values = (last_values + ppo.value_shift).float()
    buffer.finish(last_values, config.gamma, lambd, ppo.reward_scale)
    expected = torch.stack([buffer.samples.advantages, buffer.samples.returns])
    found = torch.stack([ours.samples.advantages, ours.samples.returns]).cpu()
    error = largest(found - expected)
    return Check("B advantages and returns", error, tolerance + ROUNDING * (1 + largest(expected)))


# --- gradient ---------------------------------------------------------------------------------------------------------


def check_minibatches(ppo):
    """Check that every sample is in exactly one minibatch, with its own page.

    Advantages are left out, because the minibatches have them normalised, and so are predicted changes.
    """
    samples = ppo.buffer.samples
    minibatches = ppo.buffer.minibatches
    lines = minibatches.obs
    pages = torch.stack([c[numbers].flatten(1) for c, numbers in zip(lines.characters, lines.pages)])  # (K, M, 1944)

    def sorted_samples(pages, x):
        """Return a column for each sample, (6, n) int64, in an order that depends on the samples alone."""
        hashes = np.array([hash(page.tobytes()) for page in pages.flatten(end_dim=-2).cpu().numpy()])
        float_bits = [values.view(torch.int32) for values in (x.old_logprobs, x.old_values, x.returns)]
        rows = [values.flatten().cpu().numpy().astype(np.int64) for values in (x.actions, *float_bits, x.has_next)]
        table = np.stack([hashes, *rows])
        return table[:, np.lexsort(table)]

    wrong = (sorted_samples(samples.obs, samples) != sorted_samples(pages, minibatches)).any(0).sum()
    return Check("C minibatches, samples that differ", int(wrong), 0)


def gradient_on_cpu(ppo):
    """Compute the loss of the first minibatch with the present weights on the CPU.

    Returns the terms of the loss and the clipped gradient in float64, and the relative error of the gradient in
    float32.
    """
    first = select(ppo.buffer.minibatches, torch.zeros_like(ppo.buffer.minibatch_position))
    pages = tokens_of(first.obs.characters[first.obs.pages].flatten(1), ppo.policy.config)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        gpt = gpt_on_cpu(ppo.policy.config, ppo.policy.state_dict(), dtype)
        others = (x.cpu().to(dtype) if x.is_floating_point() else x.cpu() for x in first[1:])
        loss, terms = ppo.loss(Minibatch(gpt.encode(pages), *others), gpt)
        loss.backward()
        of_parameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in gpt.parameters()]
        gradient = torch.cat([x.flatten().double() for x in of_parameters])
        gradient = ppo.average(gradient.to(ppo.device)).cpu()
        gradients.append(gradient * min(ppo.config.max_grad_norm / (gradient.norm().item() + 1e-6), 1.0))
    return terms, gradients[1], relative_error(*gradients)


# --- steps ------------------------------------------------------------------------------------------------------------


def check_steps(ppo, reference=None):
    """Check two training steps on the first minibatch, and return a list of `Check`.

    reference: from `gradient_on_cpu`; without it the gradient is not checked.
    """
    checks = []
    state = ppo.optimizer.state[ppo.weights]
    adam_state = [ppo.weights.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]
    kept = [*adam_state, ppo.lr, ppo.buffer.minibatch_position]
    copies = [x.clone() for x in kept]
    before = [x.cpu().double() for x in copies[:4]]
    steps_before = before[3].item()
    full_lr = ppo.lr.item()
    for lr, label in ((full_lr, ""), (full_lr / 2, ", lr halved")):
        copy_each(kept, copies)
        ppo.lr.fill_(lr)
        ppo.buffer.minibatch_position.zero_()
        ppo.runner.train_step()
        miscounted = abs(state["step"].item() - steps_before - 1) + abs(ppo.buffer.minibatch_position.item() - 1)
        checks.append(Check("D steps counted wrong" + label, miscounted, 0))
        gradient = ppo.weights.grad.cpu().double()
        expected = adam(*before, gradient, lr, ppo.optimizer.param_groups[0])
        # Relative for weights above 1, whose rounding grows with them, and absolute below
        error = (ppo.weights.detach().cpu().double() - expected).abs() / (1 + expected.abs())
        checks.append(Check("D weights" + label, error.max().item(), ROUNDING))
        if reference is not None:
            checks += check_gradient(ppo, gradient, reference, label)
    copy_each(kept, copies)
    return checks


def check_gradient(ppo, gradient, reference, label):
    """Check the gradient of a training step, and the terms of its loss, and return a list of `Check`."""
    terms, exact_gradient, rounding = reference
    error = relative_error(gradient, exact_gradient)
    gradient_check = Check("C gradient" + label, error, GRADIENT_MARGIN * rounding + ROUNDING)
    found = dict(zip(ppo.stat_names, ppo.step_stats[0].tolist()))
    errors = [
        abs(found[name] - x.item()) / (1 + abs(x.item()))
        for name, x in terms.items()
        if name != "clipfrac"  # it counts samples, and one more or less is no error
    ]
    return [gradient_check, Check("C loss, each term" + label, largest(torch.tensor(errors)), 1e-4)]


def copy_each(targets, sources):
    for target, source in zip(targets, sources):
        target.copy_(source)


def adam(weights, exp_avg, exp_avg_sq, step, gradient, lr, options):
    """Return the weights after one step of Adam (Kingma & Ba 2015, algorithm 1). options: an optimizer's group."""
    beta1, beta2 = options["betas"]
    step = step + 1
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    mean = exp_avg / (1 - beta1**step)
    variance = exp_avg_sq / (1 - beta2**step)
    return weights - lr * mean / (variance.sqrt() + options["eps"])


# --- prefixes ---------------------------------------------------------------------------------------------------------


def check_prefixes(gpt, pages):
    """Compare a `FastGPT` of more than one layer, with its shortcuts, with model.py on some pages that begin alike."""
    plain = GPT(gpt.config)
    plain.load_state_dict({name: x.cpu() for name, x in gpt.state_dict().items()})
    exact = plain.ln_f(plain.hidden(plain.encode(pages)))
    exact_gradients = gradients(plain, exact)

    def errors(model, features):
        """Return the largest error of the features, and of the gradient of any parameter, which is 1 - cosine."""
        pairs = zip(gradients(model, features), exact_gradients, strict=True)
        cosines = torch.stack([F.cosine_similarity(*pair, dim=0) for pair in pairs])
        return largest(features.cpu() - exact), largest(1 - cosines)

    with torch.autocast("cpu", torch.bfloat16, enabled=gpt.bf16):
        rounding, rounding_of_gradient = errors(plain, plain.ln_f(plain.hidden(plain.encode(pages))))
    tree = prefix_tree(gpt.index, gpt.encode(pages).cpu().numpy(), gpt.device)
    error, error_of_gradient = errors(gpt, features_of_every_token(gpt, tree, gpt.bf16, gpt.compile_blocks))
    with torch.no_grad():
        last = gpt.features(gpt.encode(pages)).cpu()
    tolerance = BF16_MARGIN * rounding + 1e-3  # without bf16, far above float32's rounding and below TF32's
    gradient_tolerance = BF16_MARGIN**2 * rounding_of_gradient + 1e-5  # a cosine is quadratic in the error
    return [
        Check("E every token", error, tolerance),
        Check("E last position, without gradients", largest(last - exact[:, -1]), tolerance),
        Check("E gradient of each parameter, 1 - cosine", error_of_gradient, gradient_tolerance),
    ]


def gradients(gpt, features):
    """Return the gradient of a weighted sum of features (B, T, C) by each parameter outside the heads, as vectors."""
    weights = torch.linspace(-1, 1, features.numel(), device=features.device).view_as(features)
    of_parameters = torch.autograd.grad((features * weights).sum(), list(gpt.parameters()), allow_unused=True)
    return [gradient.float().cpu().flatten() for gradient in of_parameters if gradient is not None]


# --- errors -----------------------------------------------------------------------------------------------------------


def largest(x):
    return x.detach().abs().max().item()


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()
