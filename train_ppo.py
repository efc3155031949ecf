"""Train a GPT to play a game by reading it:  python train_ppo.py

The game is Breakout, which takes some five minutes on a laptop, or any other that is a page of text (games/README.md):
    python train_ppo.py --game games.catch:Catch-v0 --num_steps 300000
Constants are edited at the top of this file, or changed for one run:
    python train_ppo.py --num_steps 200000 --seed 1
To go on with a run that was stopped:
    python train_ppo.py --resume runs/<name>
To share the work among several cores or GPUs, each with its own games:
    torchrun --standalone --nproc_per_node=2 train_ppo.py
"""

import harness.start  # before the slow imports

import contextlib
import functools
import math
import time
from dataclasses import asdict, replace

import torch

from breakout_ascii import BOARD, MOST_POINTS, other_board
from callbacks import (
    Checkpoints,
    Evaluation,
    LearningCurve,
    MetricsCSV,
    ProgressBar,
    RunDirectory,
    TensorBoard,
    WeightsAndBiases,
)
from evaluation import METRICS, OTHER_METRICS, VARIED_GAMES, levels
from games.game import BREAKOUT, load_game
from games.pages import PageError
from harness.device import RANK, RANKS, available_cores, choose_device, joined_ranks, memory_of, set_threads
from harness.lines import in_words
from harness.messages import quoted, say, shortened
from harness.options import CommandLineError, Constants, Values, check_at_most, check_divides, check_multiple
from harness.runs import going_on, load_state, named_again, new_run_dir, program_command, read_run, resume_command
from harness.supervise import check_free_memory, less_memory, memory_advice, run_script, train
from model import GPTConfig
from policies import config_of, evaluate_state, fast, make_gpt
from ppo import PPO, PPOConfig

# ---------------------------------------------------------------------------------------------------------------------
# game
GAME: str = "BreakoutAscii-v0"  # any Gymnasium id whose pages are text, or "module:Name-v0"
# length
NUM_STEPS = 3_000_000  # [1, inf) environment steps in all; the learning rate falls over this length
NUM_ENVS = 128  # [1, inf) games side by side
ASYNC_ENVS: bool = False  # share them among a process for each core, if they are slow; Breakout plays all in one
ROLLOUT_STEPS = 128  # [1, inf) steps of every game between two updates: 128 * 128 = 16384 samples
# PPO
EPOCHS = 2  # [1, inf) passes over each rollout
BATCH_SIZE = 512  # [2, inf) samples in a minibatch; must divide the samples of a rollout
GAMMA = 0.995  # [0.0, 1.0] discount per step; 0.99 undervalues lives: the last bricks lie hundreds of steps apart
LAMBD = 0.8  # [0.0, 1.0] lambda of GAE at the start: 0 trusts the critic alone, 1 the returns alone
LAMBD_END = 0.98  # [0.0, 1.0] lambda rises evenly to this: a bounce hits the brick it aims at some thirty steps later
LAMBD_STEPS = 4_000_000  # [1, inf) steps until lambda is LAMBD_END, whatever NUM_STEPS is: 3 million end at 0.935
EPS_CLIP = 0.2  # (0.0, 1.0] the probability ratio is clipped to 1 +- this
VALUE_LOSS_COEF = 0.5  # [0.0, inf) weight of half the squared error; Stable-Baselines3's vf_coef weighs the whole error
VALUE_CLIP = 0.0  # [0.0, inf) values are clipped to the old one +- this, and the larger error counts; off if 0.0
ENTROPY_COEF = 0.01  # [0.0, inf) weight of the entropy bonus
MOVE_COEF = 0.04  # [0.0, inf) cost of moving, in standard deviations of the advantage; off if 0.0
REWARD_SCALE = 0.1  # (0.0, inf) multiplies rewards, of which a brick has 10; those of other games first become alike
# optimizer (Adam)
LR = 2e-3  # (0.0, 1.0] learning rate of the first update
MIN_LR = 5e-5  # [0.0, 1.0] learning rate at the end of half a cosine; no schedule if equal to LR
MAX_GRAD_NORM = 0.5  # (0.0, inf) gradients with a larger norm are scaled down to it
# what makes it learn
VARIED_STARTS = 0.7  # [0.0, 1.0] share of training serves and walls that are random; evaluation never varies
PREDICTION_COEF = 0.1  # [0.0, inf) weight of predicting which rows and columns change next; off if 0.0
PAIRED_ENVS: bool = True  # pairs of games start each rollout in the same state, each a control variate for the other
# GPT
N_LAYER = 1  # [1, inf) blocks; two or more are thousands of times slower on a CPU and a hundred on an H100
N_HEAD = 16  # [1, inf) attention heads; must divide N_EMBD
N_EMBD = 64  # [1, inf) width of the embeddings, a multiple of 4
MLP_EXPANSION = 4  # [1, inf) width of the MLP's hidden layer, in units of N_EMBD
# run
SEED = 0  # [0, 4_294_967_295] for the initial weights, the games, the actions and the minibatches
DEVICE: str = "auto"  # "cuda" if it works, else "cpu"; or one by name, such as "cuda:1"
RUN_DIR: str = ""  # directory of the run; "" for runs/<date-time>
EVAL_INTERVAL = 8  # [0, inf) updates between two evaluations; never if 0
EVAL_EPISODES = 100  # [2, 100_000] episodes of an evaluation; Breakout's always has all games that greedy play can meet
SAVE_FREQ = 8  # [1, inf) updates between two checkpoints
WANDB: str = ""  # a project of Weights & Biases to log to as well; "" for none
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(globals())
PRINTED = ("cleared", "varied", "error", "min", "max", "length")  # of an evaluation, beside the score
TYPICAL_RETURN = 30  # points: the root mean square of Breakout's discounted returns. Other games' are scaled to it
KEPT = "GAME NUM_ENVS N_LAYER N_HEAD N_EMBD MLP_EXPANSION SEED RUN_DIR".split()  # a resumed run must not change these


def game_of(c):
    """Return the `Game` to learn. Raises CommandLineError if there is none, or if it shows no pages."""
    try:
        return load_game(c.GAME)
    except PageError as error:
        raise CommandLineError(f"GAME: {error}") from error


def check(c):
    """Raise CommandLineError for constants that do not fit together."""
    check_multiple("NUM_ENVS", c.NUM_ENVS, RANKS, "so that all ranks have as many games")
    if c.PAIRED_ENVS and game_of(c).pairs:
        check_multiple("NUM_ENVS", c.NUM_ENVS, 2 * RANKS, "so that games can be paired (off with --paired_envs false)")
    samples = c.NUM_ENVS * c.ROLLOUT_STEPS
    rollout = f"the {samples:,} samples of a rollout (NUM_ENVS * ROLLOUT_STEPS)"
    check_divides("BATCH_SIZE", c.BATCH_SIZE, samples, rollout, unit=RANKS, lowest=2)
    check_at_most("MIN_LR", c.MIN_LR, "LR", c.LR)
    check_multiple("N_EMBD", c.N_EMBD, 4, "because rows and columns share it as sines and cosines")
    check_divides("N_HEAD", c.N_HEAD, c.N_EMBD, f"N_EMBD {c.N_EMBD}")
    gpt_config(c)


def gpt_config(c):
    """Return what the GPT reads, and its sizes. Raises CommandLineError if they do not fit together."""
    sizes = dict(n_layer=c.N_LAYER, n_head=c.N_HEAD, n_embd=c.N_EMBD, mlp_expansion=c.MLP_EXPANSION)
    try:
        return GPTConfig(**game_of(c).page_sizes(), **sizes)
    except ValueError as error:
        raise CommandLineError(error) from None


def check_memory(c, device):
    """Raise CommandLineError if the GPT or a rollout does not fit into memory; announce a GPT that is slow to build."""
    parameters = gpt_config(c).num_parameters
    needed = 16 * parameters  # weights, gradients and Adam's two moments, of 4 bytes each
    available = memory_of(device)
    if needed > available:
        raise CommandLineError(
            f"a GPT of {parameters:,} parameters needs {needed / 1e9:,.0f} GB or more to train, and {device} "
            f"has {available / 1e9:,.0f} GB; try a smaller --n_embd or --n_layer"
        )
    if needed > 1e9 and RANK == 0:
        say(f"Building a GPT of {parameters:,} parameters; training needs {needed / 1e9:,.0f} GB or more.")
    samples = c.NUM_ENVS * c.ROLLOUT_STEPS // RANKS
    needed = 500 * samples  # or more: encoded pages, targets of the prediction, and a shuffled copy of both
    check_free_memory(needed, device, f"a rollout of {samples:,} samples", "lower --num_envs or --rollout_steps")


def check_ranks(run, c):
    """Raise CommandLineError if a run was begun with another number of ranks, because only rank 0's games are saved."""
    pages = run.state.get("obs") if run.state else None
    if not isinstance(pages, torch.Tensor) or pages.dim() == 0 or len(pages) == 0:
        return  # a new run, or a damaged state, for which `load_state` has an error
    ranks = c.NUM_ENVS // len(pages)
    if ranks != RANKS:
        raise CommandLineError(
            f"{run.directory} was trained by {ranks} ranks, not {RANKS}; go on with "
            f"{resume_command('train_ppo.py', run.directory, vars(c), ranks)}"
        )


def check_board(run):
    """Raise CommandLineError if a run was begun on another board: its curve and its best score would mix two games."""
    if run.state and "board" in run.state and (begun_with := other_board(run.state["board"])):
        advice = "put that back in breakout_ascii.py, or begin a new run"
        raise CommandLineError(f"{run.directory} was begun with {shortened(begun_with)}; {advice}")


def check_pages(run, c):
    """Raise CommandLineError if the pages or the actions of a run's game have changed since it began."""
    difference = ""
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a damaged state, for which `load_state` has an error
        difference = game_of(c).misfit(config_of(run.state)) if run.state else ""
    if difference:
        advice = "put that back in the game, or begin a new run"
        raise CommandLineError(f"{run.directory} was begun with {shortened(difference)}; {advice}")


def applicable(c):
    """Return the constants with those off that the game has nothing for, and a line that says so, or ""."""
    game = game_of(c)
    asked_in_vain = {
        "VARIED_STARTS": c.VARIED_STARTS and not game.varies,
        "PAIRED_ENVS": c.PAIRED_ENVS and not game.pairs,
        "MOVE_COEF": c.MOVE_COEF and not game.moving_costs,
        "ASYNC_ENVS": c.ASYNC_ENVS and game.has_vec,
    }
    off = [name for name, in_vain in asked_in_vain.items() if in_vain]
    if not off:
        return c, ""
    zeros = {name: type(getattr(c, name))(0) for name in off}
    return Values(**vars(c) | zeros), f"Off, because {game.name} has nothing for them: {', '.join(off)}"


def trains_on_gpu(device):
    """Return whether a training on this device uses the shortcuts of `fast/` for GPUs, and checks itself."""
    return fast is not None and device.type == "cuda"


def ppo_config(c):
    """Return the PPOConfig of these constants."""
    named = {name: getattr(c, name.upper()) for name in PPOConfig.__dataclass_fields__ if name.upper() in vars(c)}
    config = PPOConfig(**named)
    if game_of(c).id == BREAKOUT:
        return config
    # The rewards of other games may have any unit.
    return replace(config, normalize_rewards=True, reward_scale=TYPICAL_RETURN * c.REWARD_SCALE)


def build(c, device):
    """Return the PPO that trains, without callbacks."""
    torch.manual_seed(c.SEED)
    game = game_of(c)
    config = gpt_config(c)
    policy = make_gpt(config, device)
    num_envs = c.NUM_ENVS // RANKS
    if trains_on_gpu(device) and c.N_LAYER == 1 and game.id == BREAKOUT:
        env = fast.DeviceBreakout(num_envs, device, varied_starts=c.VARIED_STARTS)
    else:
        processes = max(available_cores() // RANKS, 1) if c.ASYNC_ENVS else 1
        env = game.make_vec(num_envs, c.VARIED_STARTS, processes)
    runner = fast.GPURunner() if trains_on_gpu(device) else None
    metadata = {"gpt_config": asdict(config), "constants": dict(vars(c)), "game": game.id}
    if game.id == BREAKOUT:
        metadata["board"] = BOARD
    return PPO(policy, env, ppo_config(c), metadata=metadata, runner=runner)


def plan(c, ppo, run_dir, off=""):
    """Return the lines that say what is about to happen. off: from `applicable`."""
    game = game_of(c)
    parameters = sum(p.numel() for p in ppo.policy.parameters())
    layers = "one layer" if c.N_LAYER == 1 else f"{c.N_LAYER} layers"
    lines = [
        f"A GPT of {layers} and {parameters:,} parameters learns {'Breakout' if game.id == BREAKOUT else game.name} on "
        f"{ppo.device}: {ppo.total_steps:,} steps, in {c.NUM_ENVS} games at once.",
        f"Curve, metrics, checkpoints: {run_dir}. Ctrl-C saves and stops.",
    ]
    if game.id != BREAKOUT:
        size = f"{game.rows} lines of {game.columns - 1} characters"
        if game.rows == 1:
            size = f"one line of {game.columns - 1} characters (for more, end each with a newline)"
        lines.append(f"A page of {game.made_by} has {size}.")
    lines += filter(None, [game.note, off])
    if c.EVAL_INTERVAL:
        at_random = levels(game, c.EVAL_EPISODES)["random play"]
    if c.EVAL_INTERVAL and game.id == BREAKOUT:
        lines.append(f"See it play in a second terminal: {program_command('breakout_ascii.py')} --watch")
        lines.append(
            f"score: mean points of greedy play; random play has {at_random}, a cleared wall "
            f"{MOST_POINTS}. cleared: how many of these games clear the wall. varied: the share cleared of "
            f"{VARIED_GAMES} games with random serves or walls. in training: mean points of the last 100 training "
            "games."
        )
    elif c.EVAL_INTERVAL:
        lines.append(
            f"score: mean return of greedy play in {c.EVAL_EPISODES} episodes; random play has "
            f"{at_random:g}. error: standard error of the score. in training: mean "
            "return of the last 100 training episodes."
        )
    if trains_on_gpu(ppo.device):
        compiles = "compiles, and " if RANKS == 1 else ""
        lines.append(f"The first update {compiles}checks itself against the CPU.")
    return "\n".join(lines)


def estimate(c, ppo):
    """Return a line on how long the training will take; "" if it is soon over, or measured only by its updates."""
    updates = (ppo.total_steps - ppo.global_step) // ppo.samples_per_update
    soon_over = c.N_LAYER == 1 and updates < 10
    if soon_over or RANKS > 1 or ppo.device.type != "cpu":
        return ""
    seconds, ppo.playing_share = measured_update(c)
    line = f"This will take {in_words(seconds * updates)} on this machine"
    if c.N_LAYER > 1:
        threads = torch.get_num_threads()
        set_threads(1)
        with_one, _ = measured_update(Values(**vars(c) | {"N_LAYER": 1}))
        torch.set_num_threads(threads)
        line += f"; one layer takes {in_words(with_one * updates)}"
    return f"{line}."


def measured_update(c):
    """Measure a short update of a training like this on the CPU, which is thrown away.

    With more than one layer the time grows with the samples, so it plays and learns from eight. With one layer an
    update has few distinct lines, whose number hardly grows with the samples, so minibatches are as large as they will
    be. The games have just begun and other programs may disturb, so this may be wrong by a factor of two or three.

    Returns the seconds of an update, and the share of them in which it plays.
    """
    samples = c.NUM_ENVS * c.ROLLOUT_STEPS
    short = {"NUM_ENVS": 8, "ROLLOUT_STEPS": 1, "BATCH_SIZE": 8}
    if c.N_LAYER == 1:
        steps = range(min(16, c.ROLLOUT_STEPS), c.ROLLOUT_STEPS + 1)
        short = {"ROLLOUT_STEPS": next(n for n in steps if c.NUM_ENVS * n % c.BATCH_SIZE == 0)}
    with torch.random.fork_rng(devices=[]):  # the training's own random numbers stay as they are
        trial = build(Values(**vars(c) | short | {"EPOCHS": 1}), torch.device("cpu"))
    quickest = math.inf
    with contextlib.closing(trial.env):
        for _ in range(4 if c.N_LAYER == 1 else 1):  # the first time is slow, and other programs may disturb any
            start = time.perf_counter()
            trial.collect()
            playing = time.perf_counter() - start
            trial.update()
            learning = c.EPOCHS * (time.perf_counter() - start - playing)
            if playing + learning < quickest:
                quickest = playing + learning
                playing_share = playing / quickest
    return quickest * samples / trial.samples_per_update, playing_share


def evaluation_of(c, device):
    """Return the callback that evaluates the policy in other processes while training goes on, or None."""
    if c.EVAL_INTERVAL == 0:
        return None
    one_layer = c.N_LAYER == 1
    evaluate = functools.partial(evaluate_state, device="cpu" if one_layer else str(device))
    processes = 1
    if one_layer and device.type == "cuda":  # this trains faster than one process evaluates
        processes = min(max(available_cores() - 1, 1), 8)
    return Evaluation(evaluate, c.EVAL_INTERVAL, processes)


def watch(ppo, c, run_dir, evaluation, off=""):
    """Return the callbacks of rank 0, in the order in which they are called. off: from `applicable`."""
    csv = run_dir / "metrics.csv"
    game = game_of(c)
    metrics = METRICS if game.id == BREAKOUT else OTHER_METRICS
    callbacks = [
        RunDirectory(run_dir),
        evaluation,
        ProgressBar(
            plan(c, ppo, run_dir, off),
            estimate=lambda: estimate(c, ppo),
            metrics=[name for name in PRINTED if name in metrics],
            endings={
                "watch it play": " ".join([program_command("load_model.py"), quoted(run_dir), *named_again(vars(c))]),
                **going_on("train_ppo.py", run_dir, vars(c), RANKS),
            },
            first_is_slow=trains_on_gpu(ppo.device),
        ),
        MetricsCSV(csv, metrics),
        TensorBoard(run_dir),
        LearningCurve(run_dir / "learning_curve.png", csv, levels(game, c.EVAL_EPISODES)),
        Checkpoints(run_dir, c.SAVE_FREQ, keep_stages=True),
        WeightsAndBiases(c.WANDB, run_dir) if c.WANDB else None,
    ]
    return [callback for callback in callbacks if callback is not None]


def advice(c, constants):
    """Return {exception: options that may help a run that ended with it}."""
    # A minibatch that is smaller than one step of all games is not what filled the memory.
    largest_first = ["BATCH_SIZE", "ROLLOUT_STEPS"] if c.BATCH_SIZE > c.NUM_ENVS else ["ROLLOUT_STEPS", "BATCH_SIZE"]
    return {
        MemoryError: less_memory(constants, largest_first, CONSTANTS, check),
        PageError: "",  # a page that no earlier one has prepared us for
        FloatingPointError: f" --lr {c.LR / 2:g} --min_lr {min(c.MIN_LR, c.LR / 2):g}",
    }


def main(argv=()):
    """Train as this command line asks, and return the exit status.

    Raises CommandLineError, DeviceError or CheckpointError.
    """
    run = read_run(argv, "train_ppo.py", __doc__, CONSTANTS, KEPT, check)
    c, off = applicable(Values(**run.constants))
    check_ranks(run, c)
    check_board(run)
    check_pages(run, c)
    device = choose_device(c.DEVICE)
    set_threads(c.N_LAYER)
    check_memory(c, device)
    with joined_ranks(device):
        with memory_advice(f"the model does not fit into the memory of {device}; try a smaller --n_embd or --n_layer"):
            ppo = build(c, device)
        if run.state:
            load_state(ppo, run)
            if RANK == 0 and ppo.anew:
                say(f"{ppo.anew} of {c.NUM_ENVS} games start anew, because their state cannot be saved")
        run_dir = None
        if RANK == 0:
            run_dir = run.directory or new_run_dir(c.RUN_DIR)
            ppo.callbacks = watch(ppo, c, run_dir, evaluation_of(c, device), off)
        return train(ppo, run_dir, "train_ppo.py", advice(c, run.constants))


if __name__ == "__main__":
    run_script(main, "train_ppo.py")
