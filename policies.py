"""Makes GPTs from configurations and checkpoints. Only this file knows whether `fast/` is there."""

import importlib
from dataclasses import fields
from pathlib import Path

import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, STANDARD_BOARD, other_board
from evaluation import evaluate
from games.game import BREAKOUT, load_game
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

    Returns the GPT in eval mode, which maps (B, rows * columns) uint8 tokens to logits (B, A) and values (B,), and a
    dict of everything else in the checkpoint. Prints a line if it was trained on another board of Breakout than this
    program's. Raises CheckpointError with a message of one line.
    """
    path, _ = find_model(path)
    meta = load_checkpoint(path)
    try:
        policy = policy_of(meta, device)
    except ValueError as error:
        raise CheckpointError(f"{path}: is no model of this program ({error}); train one with train_ppo.py") from error
    if game_of(meta) == BREAKOUT and (trained_with := other_board(meta.get("board"))):
        if (policy.config.rows, policy.config.columns) != (ROWS, COLUMNS):
            reads = f"reads pages of {policy.config.rows} x {policy.config.columns} characters"
            raise CheckpointError(f"{path}: {reads}, of another Breakout than this one: {shortened(trained_with)}")
        tell(f"note: {shown(path)} was trained with {shortened(trained_with)}")
    del meta["model"]
    return policy, meta


def load_breakout_policy(path):
    """Do the work of `load_policy`, and raise CheckpointError for a model that cannot play Breakout too."""
    policy, meta = load_policy(path)
    check_game(path, policy, meta, load_game(BREAKOUT))
    return policy, meta


def game_of(state):
    """Return the id of the game that a checkpoint was trained on. Older ones record none, and were of Breakout."""
    game_id = state.get("game")
    return game_id if isinstance(game_id, str) else BREAKOUT


def check_game(path, policy, meta, game):
    """Raise CheckpointError if a policy, of a checkpoint at this path, cannot play a `Game`."""
    if misfit := game.misfit(policy.config):
        trained_on = f"was trained on {game_of(meta)} and cannot play {game.id}"
        raise CheckpointError(f"{shown(path)}: {trained_on}, because it has {shortened(misfit)}")


def policy_of(state, device="cpu"):
    """Return the GPT, in eval mode, in the state of a checkpoint. Raises ValueError if there is none."""
    check_like(state, {"gpt_config": {}, "model": {}})
    config = config_of(state)
    weights = {}
    for name, x in state["model"].items():
        # Somebody may have wrapped the policy by torch.compile or DistributedDataParallel, which put these first.
        name = str(name).removeprefix("_orig_mod.").removeprefix("module.")
        # The stages of a training are in float16, so that they take little room.
        weights[name] = x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float16 else x
    size = sum(x.numel() for x in weights.values() if isinstance(x, torch.Tensor))
    if config.num_parameters != size:  # checked before a large GPT is built, which may take minutes
        raise ValueError(f"it has {size:,} weights, its configuration {config.num_parameters:,}")
    policy = make_gpt(config, torch.device(device))
    load_weights(policy, weights)
    return policy.eval()


def config_of(state):
    """Return the GPTConfig in the state of a checkpoint. Raises ValueError if it is none."""
    # Older checkpoints record no page. They read Breakout's, whose size is that of their board.
    board = state.get("board") if isinstance(state.get("board"), dict) else STANDARD_BOARD
    sizes = {name.lower(): board.get(name, STANDARD_BOARD[name]) for name in ("ROWS", "COLUMNS")}
    config = sizes | {"characters": CHARACTERS} | state["gpt_config"]
    names = [field.name for field in fields(GPTConfig)]
    if missing := [name for name in names if name not in config]:
        raise ValueError(f"state['gpt_config'] lacks {missing[0]!r}")
    return GPTConfig(**{name: config[name] for name in names})


def evaluate_state(state, device="cpu"):
    """Evaluate the policy in the state of a checkpoint on its own game; see `evaluate`."""
    num_episodes = state.get("constants", {}).get("EVAL_EPISODES")
    return evaluate(policy_of(state, device), load_game(game_of(state)), num_episodes)


def find_model(name):
    """Find the checkpoint to play: the one that was named, else the newest run's, else the shipped one.

    Returns its path, and a remark on why it was taken, or "".
    """
    return model_to_play(name, SHIPPED, lambda state: "gpt_config" in state)
