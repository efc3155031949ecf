"""A language model plays Breakout by reading what the game's RAM says:  python -m algorithms.ppo_llm_breakout

    You play Breakout. ... Ball X: 99, Ball Y: 120, Paddle X: 72, Moving DOWN LEFT, Lives: 5, Score: 12

It answers stay, right or left. The root's PPO trains it, with a penalty on the divergence of its answers from those of
the model that it started from. Nothing is generated: one forward pass reads the text and scores all answers.

By default the model is a small one that is made here and knows nothing, except which numbers are near each other.
--model smollm2, or any name on the Hugging Face hub such as Qwen/Qwen3-0.6B, takes one that has been trained on text,
and trains an adapter (LoRA). --model mlp is no language model, but a small network that gets the numbers in the text,
to compare with.

--verify plays a few random steps, and prints texts, actions and rewards.
"""

import harness.start  # before the slow imports

import math
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.parts.breakout_text import (
    ACTIONS,
    TEXT_LENGTH,
    BreakoutTexts,
    ShapedReward,
    TextAsBytes,
    make_env,
    numbers_of,
    texts_of,
)
from algorithms.parts.language_model import (
    SMOLLM2,
    TINY,
    UNUSABLE,
    absolute_name,
    base_model,
    load_model,
    load_tokenizer,
    packages_of,
    reference_of,
    refuse_on_error,
    tokenizer_from,
    with_lora,
)
from algorithms.parts.language_policy import LanguagePolicy
from algorithms.parts.packages import check_installed
from algorithms.parts.playing import check_models, summary, training_device
from algorithms.parts.training import Algorithm, check_ppo, ppo_config, run_algorithm
from callbacks import Callback
from harness.background import Background
from harness.checkpoint import load_weights
from harness.device import choose_device
from harness.files import replacing
from harness.messages import say, shortened
from harness.options import CommandLineError, Constants, Values
from harness.runs import read_run
from harness.supervise import run_script
from ppo import PPO, Policy

# ---------------------------------------------------------------------------------------------------------------------
# model
MODEL: str = "tiny"  # made here, 0.2 million weights; or "smollm2", a name on the Hugging Face hub, a folder, or "mlp"
LORA_RANK = 16  # [1, 4096] rank of the adapters; the tiny model has none and learns with all its weights
WIDTH = 64  # [1, 4096] of the tiny model's hidden states
LAYERS = 2  # [1, 64] of the tiny model
NUMBERS: str = "ordered"  # tiny model: near numbers begin alike; "random": they do not; "digits": each digit is a token
# game
STICKY = 0.25  # [0.0, 0.99] probability that a frame repeats the action before instead (Machado et al. 2018)
SKIP = 4  # [1, 100] frames that an action lasts
SHAPING = 1.0  # [0.0, inf) weight of training's hints: paddle near the ball, ball on its way up; off if 0.0
# length
NUM_STEPS = 300_000  # [1, inf) environment steps in all; the learning rate falls over this length
NUM_ENVS = 64  # [1, 4096] games side by side
ROLLOUT_STEPS = 32  # [1, 65536] steps of every game between two updates
# PPO
EPOCHS = 2  # [1, inf) passes over each rollout
BATCH_SIZE = 256  # [2, inf) samples in a minibatch; must divide NUM_ENVS * ROLLOUT_STEPS
GAMMA = 0.9  # [0.0, 1.0] discount per step; short-sighted, because the hints come soon
LAMBD = 0.7  # [0.0, 1.0] lambda of GAE: 0 trusts the critic alone, 1 the returns alone
EPS_CLIP = 0.2  # (0.0, 1.0] the probability ratio is clipped to 1 +- this
VALUE_LOSS_COEF = 0.5  # [0.0, inf) weight of half the squared error of the value
ENTROPY_COEF = 0.0  # [0.0, inf) weight of the entropy bonus; the KL penalty below does its work
REWARD_SCALE = 0.2  # (0.0, inf) keeps values small: their errors must not drown the policy's gradient in shared weights
# distance from the start
KL_COEF = 0.01  # [0.0, inf) initial weight of the KL divergence from the untrained model; 0.0 saves a forward pass
KL_TARGET = 0.8  # (0.0, inf) nats: the weight rises while the divergence is above this, and falls while it is below
# optimizer (Adam)
LR = 5e-4  # (0.0, 1.0] learning rate of the first update
MIN_LR = 1e-5  # [0.0, 1.0] learning rate at the end of half a cosine
MAX_GRAD_NORM = 0.5  # (0.0, inf) gradients with a larger norm are scaled down to it
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the games, the actions and the minibatches
DEVICE: str = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/ppo_llm_breakout/<date-time>
EVAL_INTERVAL = 20  # [0, inf) updates between two evaluations; never if 0
VIDEO_FREQ = 60  # [0, inf) updates between two videos of a game; never if 0
SAVE_FREQ = 20  # [1, inf) updates between two checkpoints
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "LORA_RANK WIDTH LAYERS NUMBERS STICKY SKIP SHAPING NUM_ENVS KL_COEF SEED RUN_DIR".split()
MLP = "mlp"
NUMBERS_AS = ("ordered", "random", "digits")
NOT_FOLDERS = (TINY, MLP, SMOLLM2)  # these values of MODEL never mean a folder
PREFIX = "You play Breakout. Move the paddle under the ball: stay, right or left?\n"  # read once, then cached
SUFFIX = "\nAnswer:"
ANSWERS = [" " + name.lower() for name in ACTIONS]


# --- what learns ------------------------------------------------------------------------------------------------------


class BreakoutReader(LanguagePolicy):
    """Computes logits (N, A) and values (N,) from the codes of texts (N, TEXT_LENGTH) uint8, with a language model."""

    def __init__(self, model, tokenizer, reference=None):
        super().__init__(model, tokenizer, PREFIX, ANSWERS, reference)

    def encode(self, obs):
        texts = [text + SUFFIX for text in texts_of(obs)]
        return self.encode_texts(texts, TEXT_LENGTH + len(SUFFIX))  # a token has at least one character


class NumberReader(Policy):
    """An MLP that gets the numbers in the texts, without the score, to compare with the language model."""

    def __init__(self, hidden=64):
        super().__init__()
        scales = [160, 160, 160, 1, 1, 5]  # the largest values of `numbers_of`
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        self.body = nn.Sequential(nn.Linear(len(scales), hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.actor = nn.Linear(hidden, len(ACTIONS))
        self.critic = nn.Linear(hidden, 1)
        nn.init.zeros_(self.actor.weight)
        nn.init.zeros_(self.actor.bias)

    def encode(self, obs):
        """Return the numbers (N, 6), and log-probabilities (N, A) of a reference that chooses at random, side by side.

        `BreakoutReader` has the log-probabilities of its reference in the same place.
        """
        numbers = [numbers_of(text) for text in texts_of(obs)]
        numbers = torch.tensor(numbers, device=self.scales.device) / self.scales
        reference = numbers.new_full((len(numbers), len(ACTIONS)), -math.log(len(ACTIONS)))
        return torch.cat([numbers, reference], 1)

    def forward(self, encoded):
        hidden = self.body(encoded[:, : len(self.scales)])
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class LanguagePPO(PPO):
    """PPO with a penalty on the divergence from a reference (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, policy, env, config, kl_coef, kl_target, metadata):
        super().__init__(policy, env, config, metadata=metadata)
        self.kl_coef = kl_coef
        self.kl_target = kl_target

    def further_loss(self, mb, all_logprobs):
        """The penalty. `encode` has put the reference's log-probabilities into the last A columns of an observation."""
        if not self.kl_coef:
            return super().further_loss(mb, all_logprobs)
        reference = mb.obs[:, -all_logprobs.shape[1] :]
        kl = (all_logprobs.exp() * (all_logprobs - reference)).sum(-1).mean()
        return self.kl_coef * kl, {"kl_reference": kl.detach()}

    def update(self):
        if any(p.dtype == torch.bfloat16 for p in self.policy.parameters()):
            self.recompute_logprobs()
        stats = super().update()
        if self.kl_coef:
            stats["kl_coef"] = self.kl_coef
            # The weight rises while the divergence is above its target, and falls while it is below, by 2 % at most.
            error = stats["kl_reference"] / self.kl_target - 1
            self.kl_coef *= 1 + 0.1 * float(np.clip(error, -0.2, 0.2))
        return stats

    @torch.no_grad()
    def recompute_logprobs(self):
        """Compute the old log-probabilities again, in batches as large as a minibatch.

        In bfloat16, a batch of another size is rounded differently, and the ratio would not start at 1.
        """
        samples = self.buffer.samples
        act = self.policy.inference_function()
        logits = torch.cat([act(obs)[0] for obs in samples.obs.split(self.config.batch_size)])
        all_logprobs = F.log_softmax(logits, dim=-1)
        logprobs = all_logprobs.gather(1, samples.actions[:, None])[:, 0]
        self.buffer.samples = samples._replace(old_logprobs=logprobs)

    def record_episode_returns(self):
        """Record scores in the game's points, because the rewards contain hints."""
        self.episode_returns.extend(self.env.scores)
        self.env.scores.clear()

    def state_dict(self):
        return super().state_dict() | {"kl_coef": self.kl_coef}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        CONSTANTS.check({"KL_COEF": state["kl_coef"]})
        self.kl_coef = state["kl_coef"]


def build(c):
    """The trainer that these constants describe. Raises CommandLineError for a model that cannot be used."""
    device = choose_device(c.DEVICE)
    torch.manual_seed(c.SEED)
    c.MODEL = absolute_name(c.MODEL, NOT_FOLDERS)
    policy = make_policy(c, device)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c)), "models": models_of(c, policy)}
    if c.MODEL == TINY:
        metadata["tokenizer"] = policy.tokenizer.backend_tokenizer.to_str()
    envs = BreakoutTexts(c.NUM_ENVS, c.STICKY, c.SKIP, c.SHAPING)
    return LanguagePPO(policy, envs, ppo_config(c), c.KL_COEF, c.KL_TARGET, metadata)


@refuse_on_error(UNUSABLE)
def make_policy(c, device, saved_tokenizer=None):
    """The policy before training, with a reference if the training has a penalty.

    saved_tokenizer: of the tiny model, from a checkpoint; None to train one.
    """
    if c.MODEL == MLP:
        check_installed("ale_py")
        return NumberReader().to(device)
    check_installed("ale_py", *packages_of(c.MODEL), *(["peft"] if c.MODEL != TINY else []))
    texts = invented_texts()
    if saved_tokenizer:
        tokenizer = tokenizer_from(saved_tokenizer)
    else:
        tokenizer = load_tokenizer(c.MODEL, texts, digits=c.NUMBERS == "digits")
    model = load_model(c.MODEL, tokenizer, device, width=c.WIDTH, layers=c.LAYERS, ordered=c.NUMBERS == "ordered")
    if c.MODEL != TINY:
        model = with_lora(model, c.LORA_RANK)
    reference = reference_of(model) if c.KL_COEF else None
    policy = BreakoutReader(model, tokenizer, reference).to(device)
    policy.check([min(texts, key=len), max(texts, key=len)])
    return policy


def models_of(c, policy):
    """The name and the fingerprint of the model, as `check_models` takes them. A model made here needs only a name."""
    if c.MODEL in (TINY, MLP):
        return {"MODEL": [c.MODEL, c.MODEL]}
    return {"MODEL": [c.MODEL, base_model(policy.model).fingerprint]}


def invented_texts():
    """Texts like the game's, the prefix and the answers, to train the tiny model's tokenizer on."""
    rng = random.Random(0)
    directions = ["UP LEFT", "UP RIGHT", "UP", "DOWN LEFT", "DOWN RIGHT", "DOWN", "LEFT", "RIGHT", "NOWHERE"]
    texts = []
    for _ in range(2000):
        texts.append(
            f"Ball X: {rng.randrange(256)}, Ball Y: {rng.randrange(256)}, Paddle X: {rng.randrange(256)}, "
            f"Moving {rng.choice(directions)}, Lives: {rng.randrange(6)}, Score: {rng.randrange(865)}{SUFFIX}"
        )
    return texts + [PREFIX, *ANSWERS] * 200


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state):
    """The policy in what `Trainer.policy_state` returned, on its training's device if this machine has it.

    Also returns the constants of the training.
    """
    c = Values(**state["constants"])
    c.KL_COEF = 0.0  # playing needs no reference
    c.MODEL = absolute_name(c.MODEL, NOT_FOLDERS)
    policy = make_policy(c, training_device(c), state.get("tokenizer"))
    check_models(state, models_of(c, policy))
    load_weights(policy, state["model"])
    return policy, c


def greedy(policy):
    """Return a function that takes observations (N, TEXT_LENGTH) and returns the most probable actions (N,)."""
    act = policy.inference_function()

    def choose(obs):
        logits, _ = act(policy.encode(obs))
        return logits.argmax(-1).cpu().numpy()

    return choose


def evaluate(state, episodes=10, seed=0, report=None):
    """Play games with the most probable answers, up to 100 side by side. Returns the `summary` of their scores.

    report: as `games_bar` says.
    """
    policy, c = policy_of(state)
    choose = greedy(policy)
    scores = []
    for first in range(0, episodes, 100):
        part = None if report is None else lambda ended, steps, first=first: report(first + ended, steps)
        scores += scores_of(choose, c, min(100, episodes - first), seed + first, part)
    return summary(scores)


def scores_of(choose, c, episodes, seed, report=None):
    """Play games side by side, and return the score of each in the game's points.

    Only the games that are still going on are read, which saves time with a large language model.

    Args:
        choose: takes observations (N, TEXT_LENGTH) and returns actions (N,).
        report: as `games_bar` says.
    """
    games = [TextAsBytes(make_env(c.STICKY, c.SKIP)) for _ in range(episodes)]
    obs = [game.reset(seed=seed + i)[0] for i, game in enumerate(games)]
    scores = [0] * episodes
    playing = list(range(episodes))
    steps = 0
    while playing:
        actions = choose(np.stack([obs[i] for i in playing]))
        still_playing = []
        for i, action in zip(playing, actions):
            obs[i], _, terminated, truncated, info = games[i].step(action)
            scores[i] = info["score"]
            if terminated or truncated:
                games[i].close()
            else:
                still_playing.append(i)
        playing = still_playing
        steps += 1
        if report is not None:
            report(episodes - len(playing), steps)
    return scores


def frames(state, episodes, seed, human):
    """Yield every other frame that the agent sees, of games with the most probable answers."""
    policy, c = policy_of(state)
    choose = greedy(policy)
    env = TextAsBytes(make_env(c.STICKY, c.SKIP, "human" if human else "rgb_array"))
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        over = False
        steps = 0
        while not over:
            obs, _, terminated, truncated, _ = env.step(choose(obs[None])[0])
            over = terminated or truncated
            steps += 1
            if steps % 2 == 1:
                yield env.render()
    env.close()


class Video(Callback):
    """Draws a game of the policy as a gif every `interval` updates, in another process while training goes on.

    An update at which the previous gif is still being drawn is left out.
    """

    def __init__(self, directory, interval):
        self.directory = directory
        self.interval = interval
        self.background = None
        self.under_way = None  # the future of the gif that is being drawn
        self.cost = f"{directory}: no video"

    def on_training_start(self, trainer):
        self.background = Background(draw_video)

    def on_update_end(self, trainer):
        free = self.under_way is None or self.under_way.done()
        if free and trainer.update_count % self.interval == 0:
            self.finish()
            self.directory.mkdir(exist_ok=True)
            path = self.directory / f"update_{trainer.update_count}.gif"
            self.under_way = self.background.submit((trainer.policy_state(), str(path)))

    def on_training_end(self, trainer):
        self.finish()

    def finish(self):
        """Wait for the gif that is being drawn. Raises what its process raised."""
        future = self.under_way
        self.under_way = None
        if future is not None:
            future.result()

    def close(self):
        if self.background:
            self.background.close()


def draw_video(state_and_path):
    """Draw a game of a policy state; this runs in a process of its own."""
    from viewer.drawing import write_gif  # imported here, because training works without it

    state, path = state_and_path
    with replacing(path) as unfinished:
        write_gif(unfinished, frames(state, 1, state["update_count"], human=False), ALGORITHM.frame_ms)


def callbacks_of(c, run_dir):
    """The callback that draws videos, if they are wanted."""
    return [Video(run_dir / "videos", c.VIDEO_FREQ)] if c.VIDEO_FREQ else []


def check(c):
    """Raises CommandLineError for constants that do not fit together."""
    check_ppo(c)
    if c.NUMBERS not in NUMBERS_AS:
        allowed = ", ".join(NUMBERS_AS)
        raise CommandLineError(f"NUMBERS (--numbers) must be one of {allowed}, not {shortened(repr(c.NUMBERS))}")


def verify(argv, steps=20):
    """Play random steps of one game, and print texts, actions, points, and the rewards that training would get."""
    run = read_run(argv, "-m algorithms.ppo_llm_breakout --verify", __doc__, CONSTANTS, KEPT, check)
    c = Values(**run.constants)
    env = ShapedReward(make_env(c.STICKY, c.SKIP), c.SHAPING)
    rng = np.random.default_rng(c.SEED)
    text, _ = env.reset(seed=c.SEED)
    for _ in range(steps):
        action = int(rng.integers(len(ACTIONS)))
        score_before = env.get_wrapper_attr("score")
        say(f"{text}{SUFFIX}{ANSWERS[action]}".replace("\n", " "))
        text, reward, terminated, truncated, info = env.step(action)
        life = ", a life is lost" if info["life_lost"] else ""
        say(f"    points {info['score'] - score_before}, reward {reward:+.3f}{life}")
        if terminated or truncated:
            text, _ = env.reset()
    return 0


ALGORITHM = Algorithm(
    name="ppo_llm_breakout",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    evaluate=evaluate,
    frames=frames,
    episodes=30,
    frame_ms=60,
    levels={"following the ball": 62, "random play": 1.7},
    check=check,
    callbacks=callbacks_of,
    model_constants=("MODEL",),
    memory_constants=("BATCH_SIZE", "ROLLOUT_STEPS"),
)


def main(argv=()):
    """Train, play, evaluate or verify. Returns the exit status."""
    if "--verify" in argv:
        return verify([word for word in argv if word != "--verify"])
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.ppo_llm_breakout")
