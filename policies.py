"""Makes GPTs from configurations and checkpoints. Only this file knows whether `fast/` is there."""

import importlib
from dataclasses import asdict
from pathlib import Path

import torch

from breakout_ascii import other_board
from evaluation import evaluate
from harness.checkpoint import SUFFIX, CheckpointError, check_like, load_checkpoint, load_weights, model_to_play
from harness.messages import shortened, shown, tell
from model import GPT, GPTConfig

HERE = Path(__file__).parent
SHIPPED = HERE / "pretrained" / f"breakout{SUFFIX}"
# Not "try: import fast", which would hide an error in it.
fast = importlib.import_module("fast") if (HERE / "fast" / "__init__.py").exists() else None


def make_gpt(config, device):
    """Return an untrained GPT on the device, of the class that is fastest there if `fast/` exists."""
    gpt = fast.gpt_for(config, device) if fast else GPT(config)
    return gpt.to(device)


def load_policy(path, device="cpu"):
    """Load the GPT of a checkpoint, or of a run directory.

    Returns the GPT in eval mode, which maps (B, 1944) uint8 tokens to logits (B, 3) and values (B,), and a dict of
    everything else in the checkpoint. Prints a line if it was trained on another board than this game's. Raises
    CheckpointError with a message of one line.
    """
    path, _ = find_model(path)
    meta = load_checkpoint(path)
    trained_with = other_board(meta.get("board"))
    try:
        policy = policy_of(meta, device)
    except ValueError as error:
        reason = f"{error}; trained with {shortened(trained_with)}" if trained_with else error
        raise CheckpointError(f"{path}: is no model of this program ({reason}); train one with train_ppo.py") from error
    if trained_with:
        tell(f"note: {shown(path)} was trained with {shortened(trained_with)}")
    del meta["model"]
    return policy, meta


def policy_of(state, device="cpu"):
    """Return the GPT, in eval mode, in the state of a checkpoint. Raises ValueError if there is none."""
    check_like(state, {"gpt_config": asdict(GPTConfig()), "model": {}})
    config = GPTConfig(**{name: state["gpt_config"][name] for name in asdict(GPTConfig())})
    # Somebody may have wrapped the policy by torch.compile or DistributedDataParallel, which put these before names.
    weights = {str(name).removeprefix("_orig_mod.").removeprefix("module."): x for name, x in state["model"].items()}
    size = sum(x.numel() for x in weights.values() if isinstance(x, torch.Tensor))
    if config.n_action != GPTConfig.n_action:
        raise ValueError(f"it chooses from {config.n_action} actions, the game has {GPTConfig.n_action}")
    if config.num_parameters != size:  # checked before a large GPT is built, which may take minutes
        raise ValueError(f"it has {size:,} weights, its configuration {config.num_parameters:,}")
    policy = make_gpt(config, torch.device(device))
    load_weights(policy, weights)
    return policy.eval()


def evaluate_state(state, device="cpu"):
    """Evaluate the policy in the state of a checkpoint; see `evaluate`."""
    return evaluate(policy_of(state, device))


def find_model(name):
    """Find the checkpoint to play: the one that was named, else the newest run's, else the shipped one.

    Returns its path, and a remark on why it was taken, or "".
    """
    return model_to_play(name, SHIPPED, lambda state: "gpt_config" in state)
