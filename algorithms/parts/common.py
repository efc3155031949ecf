"""What the trainings in this folder share: their command line, and what plays their models.

    python -m algorithms.NAME [--constant value] [--resume RUN]                 trains
    python -m algorithms.NAME --play [MODEL] [--episodes 1] [--out NAME.gif]    shows games; --human opens a window instead
    python -m algorithms.NAME --evaluate [MODEL] [--episodes 100]               prints the score of fresh games as JSON

MODEL is a run or a checkpoint; without one it is the newest run, or else the model that algorithms/pretrained/ ships.
"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import SyncVectorEnv

from callbacks import Checkpoints, Evaluation, LearningCurve, MetricsCSV, ProgressBar, RunDirectory, TensorBoard
from evaluation import standard_error
from harness.checkpoint import SUFFIX, CheckpointError, check_like, load_checkpoint, model_to_play
from harness.device import RANKS, DeviceError, choose_device
from harness.files import replacing
from harness.messages import printable, quoted, shortened, shown, tell
from harness.options import CommandLineError, Constants, Parser, Values, given_path
from harness.runs import constants_of, load_state, new_run_dir, read_run
from harness.supervise import less_memory, memory_advice, train
from ppo import PPOConfig
from trainer import check_finite

HERE = Path(__file__).parent.parent


class Algorithm(NamedTuple):
    """What a file of this folder tells `run_algorithm` of itself."""

    name: str  # of its module, without the package
    doc: str
    constants: Constants
    kept: tuple  # constants that a resumed run must not change
    build: Callable[[Values], Any]  # constants -> a Trainer without callbacks, its metadata {"algorithm", "constants"}
    evaluate: Callable[..., dict]  # policy state, episodes, seed -> a dict with a "score"
    # policy state, episodes, seed, human -> yields RGB arrays, or None where a window shows the game; may return a dict. None: `human` shows
    frames: Callable | None
    episodes: int = 100  # of an evaluation
    frame_ms: int = 40  # between two frames of a gif, as `write_gif` wants it
    levels: dict = {}  # {label: score} for the learning curve
    check: Callable = lambda c: None  # raises CommandLineError for constants that do not fit together
    callbacks: Callable = lambda constants, run_dir: []  # more of them
    memory: tuple = ()  # constants that a run which ran out of memory may lower, the first of them first
    models: tuple = ()  # constants that name a stranger's model: it may have moved when a run is resumed or played
    human: Callable | None = None  # policy state, seed: shows or plays in the terminal; None: `frames` opens a window


def need(module, install=None):
    """-> an imported module. Raises CommandLineError, which names the command that installs it, or all that this folder needs."""
    if module == "transformers" and sys.flags.optimize > 1:
        raise CommandLineError(
            "transformers needs its docstrings, which python -OO leaves out; start python without it"
        )
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandLineError(f"needs {error.name or module}: pip install {install or requirements()}") from None


def requirements():
    return f"-r {quoted(shown(HERE / 'requirements.txt'))}"


def device_of(c):
    """-> the device that a training with these constants had, if it is here, and otherwise the CPU."""
    try:
        return choose_device(c.DEVICE)
    except DeviceError:
        return torch.device("cpu")


def run_algorithm(algorithm, argv):
    """Train, play or evaluate, as these words of a command line ask -> exit status."""
    if RANKS > 1:
        raise CommandLineError("runs in one process, without torchrun")
    argv = list(map(str, argv))
    if any(argument.split("=")[0] in ("--play", "--evaluate") for argument in argv):
        return play_or_evaluate(algorithm, argv)
    program = f"-m algorithms.{algorithm.name}"
    doc = (algorithm.doc or "") + f"\nTo watch or to score: python {program} --play --help"
    run = read_run(argv, program, doc, algorithm.constants, algorithm.kept, algorithm.check)
    c = Values(**run.constants)
    if run.state:
        check_algorithm(algorithm.name, run.state, run.directory)
    with memory_advice("does not fit into memory; try a smaller model, or fewer games at once"):
        trainer = algorithm.build(c)
    if run.state:
        check_models(run.state, trainer.metadata.get("models", {}))
        load_state(trainer, run)
    run_dir = run.directory or new_run_dir(c.RUN_DIR, f"runs/{algorithm.name}")
    trainer.callbacks = watch(algorithm, c, run_dir)
    memory = less_memory(run.constants, algorithm.memory, algorithm.constants, algorithm.check)
    lower = f" --lr {c.LR / 2:g}" + (f" --min_lr {min(c.MIN_LR, c.LR / 2):g}" if hasattr(c, "MIN_LR") else "")
    return train(trainer, run_dir, program, {FloatingPointError: lower, MemoryError: memory})


def check_lr(c):
    """Raises CommandLineError for a learning rate that would rise."""
    if c.MIN_LR > c.LR:
        raise CommandLineError(f"MIN_LR {c.MIN_LR} must not exceed LR {c.LR}")


def check_ppo(c):
    """Raises CommandLineError for constants of PPO that do not fit together."""
    check_lr(c)
    samples = c.NUM_ENVS * c.ROLLOUT_STEPS
    if samples % c.BATCH_SIZE:
        raise CommandLineError(f"BATCH_SIZE must divide NUM_ENVS * ROLLOUT_STEPS, the {samples:,} samples of a rollout")


def ppo_config(c):
    """The constants of a training -> `PPOConfig`; lambda does not change, and what the training has no constant for keeps its default."""
    given = {name: getattr(c, name.upper()) for name in PPOConfig.__dataclass_fields__ if hasattr(c, name.upper())}
    return PPOConfig(**given, lambd_end=c.LAMBD, lambd_steps=1)


def watch(algorithm, c, run_dir):
    csv = run_dir / "metrics.csv"
    plan = f"{algorithm.name}: {c.NUM_STEPS:,} steps in all. Curve, metrics and checkpoints: {run_dir}. Ctrl-C saves and stops."
    return [
        RunDirectory(run_dir),
        *([Evaluation(algorithm.evaluate, c.EVAL_INTERVAL)] if c.EVAL_INTERVAL else []),
        ProgressBar(plan),
        MetricsCSV(csv),
        TensorBoard(run_dir),
        LearningCurve(run_dir / "learning_curve.png", csv, algorithm.levels),
        Checkpoints(run_dir, c.SAVE_FREQ),
        *algorithm.callbacks(c, run_dir),
    ]


def check_algorithm(name, state, path):
    """Raises CheckpointError for the model of another training."""
    if state.get("algorithm") != name:
        raise CheckpointError(
            f"{path}: is no model of {name}; it was trained by {shortened(state.get('algorithm', 'another program'))}"
        )


def check_models(state, found):
    """Raises CommandLineError for another model under a new name; warns if an old name has come to mean another.

    state: of the run that goes on. found: {constant: (name, fingerprint)} of the models that it would go on with; with
    the fingerprint "" the name alone counts.
    """
    saved = state.get("models")
    for constant, (name, fingerprint) in found.items():
        old = saved.get(constant) if isinstance(saved, dict) else None  # runs of older versions have no fingerprints
        if not (isinstance(old, tuple) and len(old) == 2):
            old = state["constants"][constant], fingerprint
        old_name, old_fingerprint = old
        same = fingerprint == old_fingerprint
        if name == old_name and not same:
            warnings.warn(f"{name} has changed since the run began, or is read otherwise than it was", stacklevel=1)
        elif name != old_name and not (same and fingerprint):
            reason = f"--{constant.lower()} {name} is not the model that the run began with"
            raise CommandLineError(f"{reason}; name that one, which was {shortened(old_name)}")


def load_model(algorithm, name):
    """The model that `checkpoint.model_to_play` finds for this name -> its policy state, its path, and why it is that. Raises CheckpointError."""
    shipped = HERE / "pretrained" / f"{algorithm.name}{SUFFIX}"
    path, why = model_to_play(name, shipped, lambda state: state.get("algorithm") == algorithm.name)
    state = load_checkpoint(path)
    check_algorithm(algorithm.name, state, path)
    try:
        check_like(state, {"constants": {}, "global_step": 0, "model": {}})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; train one anew") from None
    return state | {"constants": constants_of(path, state["constants"], algorithm.constants)}, path, why


def play_or_evaluate(algorithm, argv):
    parser = Parser(f"-m algorithms.{algorithm.name}", algorithm.doc)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--play",
        type=given_path,
        nargs="?",
        const=True,
        metavar="MODEL",
        help="draw games (default: of the newest run, else of the shipped model)",
    )
    what.add_argument("--evaluate", type=given_path, nargs="?", const=True, metavar="MODEL", help="score fresh games")
    parser.add_argument("--episodes", type=int, help=f"default 1 to play, {algorithm.episodes} to evaluate")
    parser.add_argument(
        "--seed", type=int, default=1_000_000, help="of the games (default 1000000, far from those of trainings)"
    )
    parser.add_argument("--out", type=given_path, help=f"default {algorithm.name}.gif")
    for constant in algorithm.models:
        parser.add_argument(
            f"--{constant.lower()}",
            type=given_path,
            metavar="FOLDER",
            help="where this model of the run is now, if it has moved",
        )
    parser.add_argument("--human", action="store_true", help="play in a window, or against you in the terminal")
    args = parser.parse_args(argv)
    playing = args.play is not None
    in_terminal = playing and algorithm.human and (args.human or not algorithm.frames)
    if not playing and (args.human or args.out):
        raise CommandLineError("--human and --out belong to --play; leave them out")
    if in_terminal and args.episodes is not None or (in_terminal or args.human) and args.out:
        raise CommandLineError("--episodes and --out belong to a gif; leave them out")
    args.out = args.out or f"{algorithm.name}.gif"
    if not args.out.lower().endswith(".gif"):
        raise CommandLineError(f"--out must end in .gif, not {args.out!r}")
    if not Path(args.out).parent.is_dir() or Path(args.out).is_dir():
        raise CommandLineError(f"--out: {args.out} is a directory, or lies in none")
    episodes = (1 if playing else algorithm.episodes) if args.episodes is None else args.episodes
    for name, value, high in (("episodes", episodes, 10**6), ("seed", args.seed, 2**31 - 1)):
        if not (name == "episodes") <= value <= high:
            raise CommandLineError(f"--{name} must be from {int(name == 'episodes')} to {high:,}, not {value}")
    named = args.play if playing else args.evaluate
    state, path, why = load_model(algorithm, None if named is True else named)
    try:
        places = {constant: name for constant in algorithm.models if (name := getattr(args, constant.lower()))}
        state = {**state, "constants": {**state["constants"], **places}}
        tell(f"{shown(path)}: trained for {state['global_step']:,} steps{why}")
        with memory_advice("does not fit into memory; try fewer --episodes"):
            if not playing:
                print(json.dumps(algorithm.evaluate(state, episodes, args.seed)))
            elif in_terminal:
                algorithm.human(state, args.seed)
            else:
                show(algorithm, state, episodes, args)
    except DependencyNotInstalled as error:
        raise CommandLineError(f"{error}; pip install {requirements()}") from None
    except CommandLineError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit this program ({error}); train one anew") from None
    return 0


def greedy_returns(make_env, choose, episodes, seed):
    """Whole episodes, up to 100 side by side -> their returns. choose: observations, an array (N, ...) -> actions (N,)."""
    returns = []
    for first in range(0, episodes, 100):
        envs = SyncVectorEnv([make_env] * min(100, episodes - first))
        obs, _ = envs.reset(seed=seed + first)
        playing, scores = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs)
        while playing.any():
            obs, rewards, terminated, truncated, _ = envs.step(choose(obs))
            scores += rewards * playing
            playing &= ~(terminated | truncated)
        envs.close()
        returns += scores.tolist()
    return returns


def greedy_frames(env, choose, episodes, seed):
    """Yields each frame of whole episodes."""
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        over = False
        while not over:
            obs, _, terminated, truncated, _ = env.step(int(choose(obs[None])[0]))
            over = terminated or truncated
            yield env.render()
    env.close()


def summary(scores):
    """Scores of games -> their mean and its standard error, their standard deviation, lowest and highest. Raises FloatingPointError."""
    scores = np.asarray(scores, float)
    check_finite("in an evaluation", rewards=scores)
    return {
        "score": float(scores.mean()),
        "error": standard_error(scores),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
        "games": len(scores),
    }


def show(algorithm, state, episodes, args):
    """In a window or as a gif, and what `frames` has to say of the games."""
    if args.human and sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        raise CommandLineError("--human needs a screen, and there is none; leave it out for a gif")
    found = None

    def frames():
        nonlocal found
        found = yield from algorithm.frames(state, episodes, args.seed, args.human)

    if args.human:
        for _ in frames():
            pass  # the window shows them
    else:
        from viewer.drawing import write_gif  # here, because the training can do without

        with replacing(args.out) as unfinished:  # an old picture stays whole until the new one is
            write_gif(unfinished, frames(), algorithm.frame_ms)
        print(f"wrote {printable(args.out)} ({os.path.getsize(args.out) / 1e6:.2f} MB)")
    if found:
        print(json.dumps(found))
