"""A language model plays Breakout by reading what the game's RAM says:  python -m algorithms.ppo_llm_breakout

    You play Breakout. ... Ball X: 99, Ball Y: 120, Paddle X: 72, Moving DOWN LEFT, Lives: 5, Score: 12   ->   stay, right or left

The root's PPO trains it, with a penalty on how far its answers move away from those of the model that it started from. Nothing is
generated: one forward pass reads the text and scores all answers. The default is a small model that is made here and knows nothing;
--model smollm2, or any name of Hugging Face's hub such as Qwen/Qwen3-0.6B, takes one that has read the web, and trains an adapter (LoRA).
--model mlp is no language model: a small network that gets the numbers of the text, to compare with.

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
    WIDTH,
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
    load_model,
    load_tokenizer,
    place,
    reference_to,
    refusing,
    tokenizer_from,
    transformer,
    with_lora,
)
from algorithms.parts.language_policy import LanguagePolicy
from algorithms.parts.playing import check_models, summary, training_device
from algorithms.parts.training import Algorithm, check_ppo, ppo_config, run_algorithm
from callbacks import Callback
from harness.background import Background
from harness.checkpoint import load_weights
from harness.device import choose_device
from harness.files import replacing
from harness.options import Constants, Values
from harness.runs import read_run
from harness.supervise import run_script
from ppo import PPO, Policy

# ---------------------------------------------------------------------------------------------------------------------
# model
MODEL: str = "tiny"  # made here, 0.9 million weights; or "smollm2", a name on the Hugging Face hub, a folder, or "mlp"
LORA_RANK = 16  # [1, 4096] rank of the adapters; the tiny model has none and learns with all its weights
# game
STICKY = 0.25  # [0.0, 0.99] probability that a frame repeats the action before instead (Machado et al. 2018)
SKIP = 4  # [1, 100] frames that an action lasts
SHAPING = 1.0  # [0.0, inf) weight of training's hints: paddle near the ball, ball on its way up; off if 0.0
# length
NUM_STEPS = 300_000  # [1, inf) environment steps in all; the learning rate falls over this length
NUM_ENVS = 16  # [1, 4096] games side by side
ROLLOUT_STEPS = 128  # [1, 65536] steps of every game between two updates
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
LR = 1e-3  # (0.0, 1.0] learning rate of the first update
MIN_LR = 1e-5  # [0.0, 1.0] learning rate at the end of half a cosine
MAX_GRAD_NORM = 0.5  # (0.0, inf) gradients with a larger norm are scaled down to it
# run
SEED = 0  # [0, 2_147_483_647] for the initial weights, the games, the actions and the minibatches
DEVICE: str = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/ppo_llm_breakout/<date-time>
EVAL_INTERVAL = 20  # [0, inf) updates between two evaluations; never if 0
VIDEO_FREQ = 60  # [0, inf) updates between two videos of a game; never if 0
SAVE_FREQ = 20  # [1, inf) updates between two checkpoints
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "LORA_RANK STICKY SKIP SHAPING NUM_ENVS KL_COEF SEED RUN_DIR".split()
MLP = "mlp"
OWN = TINY, MLP, SMOLLM2  # these names are no folders
PREFIX = "You play Breakout. Move the paddle under the ball: stay, right or left?\n"  # read once, then kept
SUFFIX = "\nAnswer:"
ANSWERS = [" " + name.lower() for name in ACTIONS]


# --- what learns ------------------------------------------------------------------------------------------------------


class BreakoutReader(LanguagePolicy):
    """Texts as `texts_of` reads them, (N, WIDTH) uint8 -> logits (N, A), values (N,)."""

    def __init__(self, model, tokenizer, reference=None):
        super().__init__(model, tokenizer, PREFIX, ANSWERS, reference)

    def encode(self, obs):
        return self.encode_texts([text + SUFFIX for text in texts_of(obs)], WIDTH + len(SUFFIX))


class NumberReader(Policy):
    """The same outputs, by an MLP on the numbers that the texts have, but for the score: no language, to compare with."""

    def __init__(self, hidden=64):
        super().__init__()
        scales = [160, 160, 160, 1, 1, 5]
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        sizes = [len(scales), hidden, hidden]
        self.body = nn.Sequential(*(layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())))
        self.actor, self.critic = nn.Linear(hidden, len(ACTIONS)), nn.Linear(hidden, 1)
        nn.init.zeros_(self.actor.weight)
        nn.init.zeros_(self.actor.bias)

    def encode(self, obs):
        """-> (N, 6 + A): the numbers, and the log-probabilities of the start, where all actions are alike."""
        numbers = torch.tensor([numbers_of(text) for text in texts_of(obs)], device=self.scales.device) / self.scales
        return torch.cat([numbers, numbers.new_full((len(numbers), len(ACTIONS)), -math.log(len(ACTIONS)))], 1)

    def forward(self, encoded):
        hidden = self.body(encoded[:, : len(self.scales)])
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class LanguagePPO(PPO):
    """PPO, with a penalty on the divergence from the reference, whose weight aims at a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, policy, env, config, kl_coef, kl_target, metadata):
        super().__init__(policy, env, config, metadata=metadata)
        self.kl_coef, self.kl_target = kl_coef, kl_target

    def further_loss(self, mb, all_logprobs):
        if not self.kl_coef:
            return super().further_loss(mb, all_logprobs)
        reference = mb.obs[:, -all_logprobs.shape[1] :]
        kl = (all_logprobs.exp() * (all_logprobs - reference)).sum(-1).mean()
        return self.kl_coef * kl, {"kl_reference": kl.detach()}

    def update(self):
        if any(p.dtype == torch.bfloat16 for p in self.policy.parameters()):
            self.score_again()
        stats = super().update()
        if self.kl_coef:
            stats["kl_coef"] = self.kl_coef
            self.kl_coef *= 1 + 0.1 * float(np.clip(stats["kl_reference"] / self.kl_target - 1, -0.2, 0.2))
        return stats

    @torch.no_grad()
    def score_again(self):
        """The old log-probabilities, anew: bfloat16 rounds otherwise in batches of another size, and the ratio would not be 1 at the start."""
        samples, act = self.buffer.samples, self.policy.inference_cache()
        logits = torch.cat([act(obs)[0] for obs in samples.obs.split(self.config.batch_size)])
        logprobs = F.log_softmax(logits, dim=-1).gather(1, samples.actions[:, None])[:, 0]
        self.buffer.samples = samples._replace(old_logprobs=logprobs)

    def record_episode_returns(self):
        """Scores, in the game's own points: the rewards have hints in them."""
        self.episode_returns.extend(self.env.scores)
        self.env.scores.clear()

    def state_dict(self):
        return super().state_dict() | {"kl_coef": self.kl_coef}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        CONSTANTS.check({"KL_COEF": state["kl_coef"]})
        self.kl_coef = state["kl_coef"]


def build(c):
    device = choose_device(c.DEVICE)
    torch.manual_seed(c.SEED)
    c.MODEL = place(c.MODEL, OWN)
    policy = make_policy(c, device)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c)), "models": models_of(c, policy)}
    if c.MODEL == TINY:
        metadata["tokenizer"] = policy.tokenizer.backend_tokenizer.to_str()
    envs = BreakoutTexts(c.NUM_ENVS, c.STICKY, c.SKIP, c.SHAPING)
    return LanguagePPO(policy, envs, ppo_config(c), c.KL_COEF, c.KL_TARGET, metadata)


@refusing(UNUSABLE)
def make_policy(c, device, saved_tokenizer=None):
    """With a reference, if the training wants one."""
    if c.MODEL == MLP:
        return NumberReader().to(device)
    tokenizer = tokenizer_from(saved_tokenizer) if saved_tokenizer else load_tokenizer(c.MODEL, invented_texts())
    model = load_model(c.MODEL, tokenizer, device)
    if c.MODEL != TINY:
        model = with_lora(model, c.LORA_RANK)
    policy = BreakoutReader(model, tokenizer, reference_to(model) if c.KL_COEF else None).to(device)
    policy.check([min(invented_texts(), key=len), max(invented_texts(), key=len)])
    return policy


def models_of(c, policy):
    """-> {constant: (name, fingerprint)}, as `check_models` wants them."""
    fingerprint = c.MODEL if c.MODEL in (TINY, MLP) else transformer(policy.model).fingerprint
    return {"MODEL": [c.MODEL, fingerprint]}


def invented_texts():
    """What the tiny model's tokenizer is trained on: texts as the game writes them, and the answers."""
    rng = random.Random(0)
    directions = [f"{a} {b}".strip() for a in ("UP", "DOWN", "") for b in ("LEFT", "RIGHT", "")][:-1] + ["NOWHERE"]
    texts = [
        f"Ball X: {rng.randrange(256)}, Ball Y: {rng.randrange(256)}, Paddle X: {rng.randrange(256)}, Moving {rng.choice(directions)}, "
        f"Lives: {rng.randrange(6)}, Score: {rng.randrange(865)}{SUFFIX}"
        for _ in range(2000)
    ]
    return texts + [PREFIX, *ANSWERS] * 200


# --- playing ----------------------------------------------------------------------------------------------------------


def policy_of(state):
    """A policy state -> its policy, on the device of its training if that is here, and the constants of the training."""
    c = Values(**{**state["constants"], "KL_COEF": 0.0})
    c.MODEL = place(c.MODEL, OWN)
    policy = make_policy(c, training_device(c), state.get("tokenizer"))
    check_models(state, models_of(c, policy), "the model")
    load_weights(policy, state["model"])
    return policy, c


def greedy(policy):
    """-> a function from observations (N, WIDTH) to the most probable actions (N,)."""
    act = policy.inference_cache()
    return lambda obs: act(policy.encode(obs))[0].argmax(-1).cpu().numpy()


def evaluate(state, episodes=10, seed=0):
    """Whole games of the most probable answers, side by side -> the `summary` of their scores, in the game's own points."""
    policy, c = policy_of(state)
    choose = greedy(policy)
    return summary(
        [
            score
            for first in range(0, episodes, 100)
            for score in scores_of(choose, c, min(100, episodes - first), seed + first)
        ]
    )


def scores_of(choose, c, episodes, seed):
    """choose: observations (N, WIDTH) -> actions (N,). A game that is over takes no more time."""
    games = [TextAsBytes(make_env(c.STICKY, c.SKIP)) for _ in range(episodes)]
    obs, playing, scores = (
        [game.reset(seed=seed + i)[0] for i, game in enumerate(games)],
        list(range(episodes)),
        [0] * episodes,
    )
    while playing:
        for i, action in zip(playing, choose(np.stack([obs[i] for i in playing]))):
            obs[i], _, terminated, truncated, info = games[i].step(action)
            scores[i] = info["score"]
            if terminated or truncated:
                playing = [j for j in playing if j != i]
                games[i].close()
    return scores


def frames(state, episodes, seed, human):
    """Yield every other frame that the agent sees."""
    policy, c = policy_of(state)
    choose, env = greedy(policy), TextAsBytes(make_env(c.STICKY, c.SKIP, "human" if human else "rgb_array"))
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        over, steps = False, 0
        while not over:
            obs, _, terminated, truncated, info = env.step(choose(obs[None])[0])
            over, steps = terminated or truncated, steps + 1
            if steps % 2:
                yield env.render()
    env.close()


class Video(Callback):
    """Every so many updates a game of the policy as a gif, drawn in another process while training goes on."""

    def __init__(self, directory, interval):
        self.directory, self.interval, self.background, self.under_way = directory, interval, None, None
        self.cost = f"{directory}: no video"

    def on_training_start(self, trainer):
        self.background = Background(draw_video)

    def on_update_end(self, trainer):
        due = self.background and trainer.update_count % self.interval == 0
        if due and (self.under_way is None or self.under_way.done()):
            self.finish()
            self.directory.mkdir(exist_ok=True)
            path = self.directory / f"update_{trainer.update_count}.gif"
            self.under_way = self.background.submit((trainer.policy_state(), str(path)))

    def on_training_end(self, trainer):
        self.finish()

    def finish(self):
        if self.under_way is not None:
            future, self.under_way = self.under_way, None
            future.result()

    def close(self):
        if self.background:
            self.background.close()


def draw_video(state_and_path):
    from viewer.drawing import write_gif  # here, because the training can do without

    state, path = state_and_path
    with replacing(path) as unfinished:
        write_gif(unfinished, frames(state, 1, state["update_count"], human=False), ALGORITHM.frame_ms)


def verify(argv, steps=20):
    """Random steps of one game: the text, the action, its points, and the reward that training would get of it."""
    c = Values(
        **read_run(argv, "-m algorithms.ppo_llm_breakout --verify", __doc__, CONSTANTS, KEPT, check_ppo).constants
    )
    env, rng = ShapedReward(make_env(c.STICKY, c.SKIP), c.SHAPING), np.random.default_rng(c.SEED)
    text, _ = env.reset(seed=c.SEED)
    for _ in range(steps):
        action, before = int(rng.integers(len(ACTIONS))), env.get_wrapper_attr("score")
        print(f"{text}{SUFFIX}{ANSWERS[action]}".replace("\n", " "))
        text, reward, terminated, truncated, info = env.step(action)
        print(
            f"    points {info['score'] - before}, reward {reward:+.3f}"
            + (", a life is lost" if info["life_lost"] else "")
        )
        if terminated or truncated:
            text, _ = env.reset()
    return 0


def callbacks_of(c, run_dir):
    return [Video(run_dir / "videos", c.VIDEO_FREQ)] if c.VIDEO_FREQ else []


LEVELS = {"following the ball": 62, "random play": 1.7}
ALGORITHM = Algorithm(
    "ppo_llm_breakout",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    frames,
    episodes=30,
    frame_ms=60,
    levels=LEVELS,
    check=check_ppo,
    callbacks=callbacks_of,
    models=("MODEL",),
    memory=("BATCH_SIZE", "ROLLOUT_STEPS"),
)


def main(argv=()):
    if "--verify" in argv:
        return verify([word for word in argv if word != "--verify"])
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.ppo_llm_breakout")
