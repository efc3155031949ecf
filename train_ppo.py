"""Train a GPT to play Breakout by reading it:  python train_ppo.py

Edit a constant below, or override it for one run: python train_ppo.py --num_steps 200000 --seed 1
Go on with a run that was stopped:                 python train_ppo.py --resume runs/<name>
Several cores or GPUs, each with its own games:    torchrun --standalone --nproc_per_node=2 train_ppo.py
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C among them leaves without a traceback

import argparse
import contextlib
import difflib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from breakout_ascii import BreakoutAsciiVec
from callbacks import Checkpoints, LearningCurve, MetricsCSV, ProgressBar, TensorBoard
from checkpoint import CheckpointError, atomic_write, find_checkpoint, load_checkpoint, save_checkpoint
from evaluation import Background, evaluate
from model import GPT, GPTConfig, set_threads
from on_device import BreakoutOnDevice, PPOOnDevice
from ppo import PPO, PPOConfig, StopTraining

# ---------------------------------------------------------------------------------------------------------------------
# length
NUM_STEPS = 4_000_000  # environment steps in all; the learning rate falls over this length
NUM_ENVS = 128  # games side by side
ROLLOUT_STEPS = 128  # steps of every game between two updates: 128 * 128 = 16384 samples; 32 games of 256 lose more balls
# PPO
EPOCHS = 2  # passes over each rollout; 3 at LR 1.4e-3, before there were twins, learned no faster per step and took 1.4 times as long
BATCH_SIZE = 512  # samples in a minibatch; 256 learns as fast per step and takes half again as long, 1024 learns more slowly
GAMMA = 0.995  # discount per step; with 0.99 a life is worth too little among the last bricks, which lie hundreds of steps apart
LAMBD = 0.8  # GAE at the start: 0 trusts the critic alone, 1 the returns alone; 0.95 throughout: one seed of three passes 900
LAMBD_END = 0.98  # it rises evenly to this: a brick that a bounce aims at is hit some thirty steps later
LAMBD_STEPS = 4_000_000  # over so many environment steps
EPS_CLIP = 0.2  # how far a probability ratio counts
VALUE_LOSS_COEF = 0.5
VALUE_CLIP = 0.0  # in units of the scaled return; off if 0.0
ENTROPY_COEF = 0.01
MOVE_COEF = 0.04  # cost of moving, in standard deviations of the advantage: with less it circles more, with more it loses balls
TARGET_KL = 0.0  # an update ends after an epoch with a larger mean KL; off if 0.0
REWARD_SCALE = 0.1  # a brick is worth 10 points in the game and 1 in training
# optimizer (Adam)
LR = 2e-3
MIN_LR = 5e-5  # at the end
LR_SCHEDULE = "cosine"  # or "linear": how LR falls to MIN_LR
WARMUP = 0.0  # share of NUM_STEPS over which LR first rises from 0
MAX_GRAD_NORM = 0.5
# what makes it learn
VARIED_STARTS = 0.7  # share of training serves and walls that are random; evaluation never varies
PREDICTION_COEF = 0.1  # weight of predicting which rows and columns change next; off if 0.0
TWINS = 1  # pairs of games begin each rollout in the same state; advantages are taken against the twin's too; off if 0
# GPT
BLOCK_SIZE = 1944  # tokens on a page: 24 lines of 81
N_LAYER = 1  # pages share nearly all their work in one layer; in two or more only how they begin: thousands of times slower
N_HEAD = 16
N_EMBD = 64
MLP_EXPANSION = 4
# run
SEED = 0
DEVICE = "auto"  # "cuda" if it works, else "cpu"
RUN_DIR = ""  # "" for runs/<date-time>
EVAL_INTERVAL = 8  # updates between two evaluations; never if 0
SAVE_FREQ = 8  # updates between two checkpoints
# ---------------------------------------------------------------------------------------------------------------------

CONSTANTS = {name: value for name, value in list(globals().items()) if name.isupper() and not callable(value)}
TEXTS = {"LR_SCHEDULE": ("linear", "cosine"), "DEVICE": None, "RUN_DIR": None}  # the choices, None for any
NUMBERS = {
    "GAMMA": (0, 1), "LAMBD": (0, 1), "LAMBD_END": (0, 1), "VARIED_STARTS": (0, 1), "WARMUP": (0, 0.99), "EPS_CLIP": (1e-9, 1),
    "LR": (1e-9, 1), "MIN_LR": (0, 1), "REWARD_SCALE": (1e-9, 1e9), "MAX_GRAD_NORM": (1e-9, 1e9), "VALUE_LOSS_COEF": (0, 1e9),
    "VALUE_CLIP": (0, 1e9), "ENTROPY_COEF": (0, 1e9), "MOVE_COEF": (0, 1e9), "TARGET_KL": (0, 1e9), "PREDICTION_COEF": (0, 1e9),
}  # fmt: skip
INTEGERS = {name: (1, 8192) for name in CONSTANTS if name not in TEXTS | NUMBERS} | {
    "NUM_STEPS": (1, 10**12), "LAMBD_STEPS": (1, 10**12), "BATCH_SIZE": (1, 10**7), "SEED": (0, 2**32 - 1),
    "EVAL_INTERVAL": (0, 10**9), "SAVE_FREQ": (1, 10**9), "TWINS": (0, 1),
}  # fmt: skip
FIXED = "NUM_ENVS BLOCK_SIZE N_LAYER N_HEAD N_EMBD MLP_EXPANSION SEED RUN_DIR".split()  # a resumed run keeps these

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, RANKS = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if UNDER_TORCHRUN else (0, 1)  # rank 0 alone writes


class CommandLineError(ValueError):
    """What a user got wrong, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        raise CommandLineError(message)


def read_command_line(argv, constants):
    """Arguments -> the run to resume or None, and the constants given, checked: {"NUM_STEPS": 200000}."""
    parser = ArgumentParser(prog="train_ppo.py", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--resume", metavar="RUN", help="a run directory, or a checkpoint that train_ppo.py wrote for resuming")
    for name, value in constants.items():
        parser.add_argument(f"--{name.lower()}", metavar=type(value).__name__, help=f"default {value!r}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name.lower()}" for name in constants] + ["--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: getattr(args, name.lower()) for name in constants}
    return args.resume, {name: convert(name, text) for name, text in given.items() if text is not None}


def convert(name, text):
    if name in TEXTS:
        return text
    try:
        return int(text) if name in INTEGERS else float(text)
    except ValueError:
        kind = "an integer" if name in INTEGERS else "a number"
        raise CommandLineError(f"--{name.lower()} needs {kind}, not {text!r}") from None


def check(constants):
    """Raises CommandLineError for a value of the wrong type or out of range, and for values that do not fit together."""
    for name, (low, high) in (INTEGERS | NUMBERS).items():
        value, kinds = constants[name], (int,) if name in INTEGERS else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            kind = "an integer" if name in INTEGERS else "a number"
            raise CommandLineError(f"{name} (--{name.lower()}) must be {kind} from {low:g} to {high:g}, not {value!r}")
    for name, choices in TEXTS.items():
        value = constants[name]
        if not isinstance(value, str) or (choices and value not in choices):
            raise CommandLineError(f"{name} (--{name.lower()}) must be {' or '.join(choices or ['text'])}, not {value!r}")
    if constants["BATCH_SIZE"] > constants["NUM_ENVS"] * constants["ROLLOUT_STEPS"]:
        raise CommandLineError("BATCH_SIZE must not exceed NUM_ENVS * ROLLOUT_STEPS, the samples of a rollout")
    if constants["NUM_ENVS"] % RANKS or constants["BATCH_SIZE"] % RANKS:
        raise CommandLineError(f"NUM_ENVS and BATCH_SIZE are shared by {RANKS} ranks; each must be a multiple of {RANKS}")
    if constants["TWINS"] and constants["NUM_ENVS"] // RANKS % 2:
        raise CommandLineError("TWINS needs an even number of games" + (" on each rank" if RANKS > 1 else "") + "; change NUM_ENVS")
    if constants["MIN_LR"] > constants["LR"]:
        raise CommandLineError(f"MIN_LR {constants['MIN_LR']} must not exceed LR {constants['LR']}")
    gpt_config(constants)


def gpt_config(constants):
    names = "BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "MLP_EXPANSION"
    try:
        return GPTConfig(**{name.lower(): constants[name] for name in names})
    except ValueError as error:
        raise CommandLineError(error) from None


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1" -> torch.device. "auto" takes CUDA if a small product runs on it."""
    try:
        own = f"cuda:{os.environ['LOCAL_RANK']}" if RANKS > 1 else "cuda"
        if name == "auto" and RANKS > 1 and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
            own = "cpu"  # all ranks of a machine alike
        device = torch.device(own if name in ("auto", "cuda") else name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and collectives ask for the current one
        (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()
        return device
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch was built without CUDA
        if name == "auto":
            return torch.device("cpu")
        raise CommandLineError(f"--device {name} does not work here ({str(error).splitlines()[0]}); try --device cpu") from None


def new_run_dir(name):
    """Makes the directory of a new run; two that start in the same second get two."""
    stem = name or time.strftime("runs/%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        run_dir = Path(stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            run_dir.mkdir(parents=True, exist_ok=bool(name))
            if not any(run_dir.iterdir()):
                return run_dir
        except FileExistsError:
            pass
        except OSError as error:
            raise CommandLineError(f"{run_dir} cannot be made ({error.strerror}); name another --run_dir") from None
        if name:
            break
    raise CommandLineError(f"{run_dir} is in use already; name another --run_dir, or --resume {run_dir}")


def build(c, run_dir, device):
    """Constants -> the PPO that trains, with its game, its GPT and its observers."""
    torch.manual_seed(c.SEED)
    config = gpt_config(vars(c))
    policy = GPT(config).to(device)
    policy.speed_up()
    ppo_config = PPOConfig(**{name: getattr(c, name.upper()) for name in PPOConfig.__dataclass_fields__})
    if lives_on_device(c, device):
        trainer, env = PPOOnDevice, BreakoutOnDevice(c.NUM_ENVS // RANKS, device, varied_starts=c.VARIED_STARTS)
    else:
        trainer, env = PPO, BreakoutAsciiVec(c.NUM_ENVS // RANKS, varied_starts=c.VARIED_STARTS)
    if RANK > 0:
        return trainer(policy, env, ppo_config)
    csv = run_dir / "metrics.csv"
    observers = [ProgressBar(plan(c, policy, device, run_dir)), MetricsCSV(csv), TensorBoard(run_dir),
                 LearningCurve(run_dir / "learning_curve.png", csv), Checkpoints(run_dir, c.SAVE_FREQ)]  # fmt: skip
    evaluator = None
    if c.EVAL_INTERVAL:
        processes = min(max(os.cpu_count() - 1, 1), 8) if trainer is PPOOnDevice else 1  # several, should a training take seconds
        evaluator = Background(evaluate, "cpu" if c.N_LAYER == 1 else device, processes)  # small kernels suit the CPU
    return trainer(policy, env, ppo_config, evaluator, observers, {"gpt_config": asdict(config), "constants": dict(vars(c))})


def lives_on_device(c, device):
    """Are games, sampling and update to stay on the GPU? For one layer, and minibatches of one size."""
    return device.type == "cuda" and c.N_LAYER == 1 and c.NUM_ENVS * c.ROLLOUT_STEPS % c.BATCH_SIZE == 0


def plan(c, policy, device, run_dir):
    """What is about to happen, in two lines."""
    parameters = sum(p.numel() for p in policy.parameters())
    layers = "one layer" if c.N_LAYER == 1 else f"{c.N_LAYER} layers"
    return (
        f"A GPT of {layers} and {parameters:,} parameters learns Breakout on {device}: {c.NUM_STEPS:,} steps of "
        f"{c.NUM_ENVS} games.\nCurve, metrics and checkpoints: {run_dir}. Ctrl-C saves and stops."
    )


def learn(ppo, run_dir):
    """Train to the end; Ctrl-C and SIGTERM end it soon, saved and resumable. Returns the exit status."""
    received = []

    def stop(signum, frame):
        received.append(signum)
        if RANKS == 1:  # torchrun passes on what the terminal has sent already
            signal.signal(signum, signal.SIG_DFL)  # a second one leaves at once
        ppo.request_stop()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        ppo.learn()
        return 0
    except StopTraining:
        reason, status, change = "stopped", 128 + (received or [signal.SIGTERM])[0], ""  # none: another rank was told to stop
    except ChildProcessError as error:
        reason, status, change = error, 1, ""
        if received:  # a signal to the whole group ended it too
            reason, status = "stopped", 128 + received[0]
    except FloatingPointError as error:
        reason, status, change = error, 1, f" --lr {ppo.config.lr / 2:g}"
    except (MemoryError, RuntimeError) as error:
        reason, status = one_line(error) or "out of memory", 1
        if out_of_memory(error):
            change = f" --batch_size {max(ppo.config.batch_size // 2 // RANKS, 1) * RANKS}"
        elif RANKS > 1:  # another rank has failed, and said why
            change = ""
        else:
            raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if RANK == 0:
        save_checkpoint(run_dir / "last.pt", ppo.snapshot)
        command = f"{launcher(RANKS)} train_ppo.py --resume {shlex.quote(str(run_dir))}{change}"
        print(f"\n{reason}; go on with: {command}", file=sys.stderr)
    return status


def out_of_memory(error):
    """torch has an error of its own for the GPU, and on the CPU a RuntimeError that only its text tells apart."""
    return isinstance(error, MemoryError) or "memory" in str(error)


def launcher(ranks):
    return "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"


def read_resumed(name, given):
    """A run or a checkpoint of one, and the constants given -> its directory, its state, its constants with the given."""
    path = find_checkpoint(name)
    state = load_checkpoint(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: holds a model to play, not a run to resume; resume from its run's last.pt")
    if not (path.parent / "config.json").exists():
        raise CheckpointError(f"{path}: lies outside its run (there is no config.json beside it); resume it in its run directory")
    constants = state.get("constants")
    if not isinstance(constants, dict) or constants.keys() != CONSTANTS.keys():
        raise CheckpointError(f"{path}: has other constants than this program; resume another run")
    for constant in FIXED:
        if given.get(constant, constants[constant]) != constants[constant]:
            raise CommandLineError(f"--{constant.lower()} cannot change in a resumed run; leave it out")
    constants = constants | given | {"RUN_DIR": str(path.parent)}
    ranks = constants["NUM_ENVS"] // len(state["obs"])
    if ranks != RANKS:
        raise CommandLineError(f"{path} was trained by {ranks} ranks, not {RANKS}; use {launcher(ranks)} train_ppo.py")
    if constants["NUM_STEPS"] <= state["global_step"] and not state.get("evaluations"):
        raise CommandLineError(f"{path} has done {state['global_step']:,} steps already; to go on, give a larger --num_steps")
    return path.parent, state, constants


def load(ppo, state, run_dir):
    """Puts the state of a run into its PPO. Raises CheckpointError if it does not fit."""
    try:
        ppo.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run_dir}: does not fit this program ({one_line(error)}); resume another run") from None
    try:
        ppo.best_score = load_checkpoint(run_dir / "best_model.pt")["evaluation"]["score"]
    except CheckpointError:  # none, or spoiled: the next evaluation leaves another
        ppo.best_score = -math.inf


def one_line(error):
    return " ".join(str(error).split())[:200]


def main(argv=None):
    resume, given = read_command_line(argv, CONSTANTS)
    if resume is None:
        state, constants = None, CONSTANTS | given
    else:
        run_dir, state, constants = read_resumed(resume, given)
    check(constants)
    device = choose_device(constants["DEVICE"])
    set_threads(constants["N_LAYER"])
    if state is None:
        run_dir = new_run_dir(constants["RUN_DIR"]) if RANK == 0 else None
        constants["RUN_DIR"] = str(run_dir)
    with joined_ranks(device):
        try:
            ppo = build(SimpleNamespace(**constants), run_dir, device)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise CommandLineError(f"the model does not fit into the memory of {device}; try a smaller --n_embd or --n_layer") from None
        if state is not None:
            load(ppo, state, run_dir)
        if RANK == 0:
            atomic_write(run_dir / "config.json", (json.dumps(constants, indent=2) + "\n").encode())
        return learn(ppo, run_dir)


@contextlib.contextmanager
def joined_ranks(device):
    """Under torchrun the ranks find each other; without it nothing happens."""
    if RANKS == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except (CommandLineError, CheckpointError, OSError) as error:
        sys.exit(f"train_ppo.py: {error}" if RANK == 0 else 1)
    except KeyboardInterrupt:
        sys.exit(130)
