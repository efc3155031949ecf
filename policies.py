"""Which GPT computes on which device, and how a checkpoint becomes one. Only this file knows whether `fast/` is there."""

import importlib
from dataclasses import asdict
from pathlib import Path

import torch

from evaluation import evaluate
from harness.checkpoint import CheckpointError, check_like, load_checkpoint, load_weights, model_to_play
from model import GPT, GPTConfig

HERE = Path(__file__).parent
SHIPPED = HERE / "pretrained" / "breakout.pt"
fast = importlib.import_module("fast") if (HERE / "fast" / "__init__.py").exists() else None


def make_gpt(config, device):
    """An untrained GPT, with the shortcuts that suit the device if fast/ is there."""
    return (fast.gpt_for(config, device) if fast else GPT(config)).to(device)


def load_policy(path, device="cpu"):
    """A checkpoint, or a run directory -> the GPT in eval mode, and the checkpoint without its weights.

    The GPT maps (B, 1944) uint8 tokens to logits (B, 3) and values (B,). Raises CheckpointError with a message of one line.
    """
    path, _ = find_model(path)
    meta = load_checkpoint(path)
    try:
        policy = policy_of(meta, device)
        del meta["model"]
    except ValueError as error:
        raise CheckpointError(f"{path}: is no model of this program ({error}); train one with train_ppo.py") from error
    return policy, meta


def policy_of(state, device="cpu"):
    """The state of a checkpoint -> the GPT in eval mode. Raises ValueError if it holds none."""
    check_like(state, {"gpt_config": asdict(GPTConfig()), "model": {}})
    # the prefixes of a policy that somebody has wrapped by torch.compile or DistributedDataParallel
    model = {str(name).removeprefix("_orig_mod.").removeprefix("module."): x for name, x in state["model"].items()}
    config = GPTConfig(**{name: state["gpt_config"][name] for name in asdict(GPTConfig())})
    weights = sum(x.numel() for x in model.values() if isinstance(x, torch.Tensor))
    if config.n_action != GPTConfig.n_action:
        raise ValueError(f"it chooses from {config.n_action} actions, the game has {GPTConfig.n_action}")
    if config.num_parameters != weights:  # before a GPT is built that may take minutes
        raise ValueError(f"it has {weights:,} weights, its configuration {config.num_parameters:,}")
    policy = make_gpt(config, torch.device(device))
    load_weights(policy, model)
    return policy.eval()


def evaluate_state(state, device="cpu"):
    """The state of a checkpoint -> what `evaluate` says of its policy."""
    return evaluate(policy_of(state, device))


def find_model(name):
    """The checkpoint or run directory that was named, else the newest run of a GPT, else the shipped model -> its path, and why it is that."""
    return model_to_play(name, SHIPPED, lambda state: "gpt_config" in state)
