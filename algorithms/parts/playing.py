"""Plays what a training of this folder has learned: --play draws games, --evaluate scores them."""

import argparse
import itertools
import json
import os
import secrets
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import SyncVectorEnv
from tqdm import tqdm

from algorithms.parts.packages import ALGORITHMS, check_installed
from algorithms.parts.progress import games_bar
from evaluation import standard_error
from harness.checkpoint import SUFFIX, CheckpointError, check_like, load_checkpoint, model_to_play
from harness.device import DeviceError, choose_device
from harness.files import replacing
from harness.messages import printable, shortened, shown, tell
from harness.options import CommandLineError, Parser, given_path, within
from harness.runs import constants_of
from harness.supervise import memory_advice
from trainer import check_finite

SEED = 1_000_000  # far from the seeds of trainings

# --- the command line -------------------------------------------------------------------------------------------------


def play_or_evaluate(algorithm, argv):
    """Do what a command line with --play or --evaluate asks for. Returns the exit status."""
    args = read_arguments(algorithm, argv)
    named = {constant: getattr(args, constant.lower(), None) for constant in (*algorithm.model_constants, "ENV_ID")}
    given = {constant: name for constant, name in named.items() if name}
    state, path, why = load_policy_state(algorithm, args.checkpoint, given)
    tell(f"{shown(path)}: trained for {state['global_step']:,} steps{why}")
    try:
        with memory_advice("does not fit into memory; try fewer --episodes"):
            if not args.playing:
                with games_bar(args.episodes, algorithm.units) as report:
                    result = algorithm.evaluate(state, args.episodes, args.seed, report)
                print(json.dumps(result))
            elif args.in_terminal:
                algorithm.play_in_terminal(state, args.seed)
            else:
                show(algorithm, state, args)
    except DependencyNotInstalled as error:
        check_installed("pygame")
        raise CommandLineError(error) from None
    except CommandLineError:  # it is a ValueError too, and says what to do
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit this program ({error}); train one anew") from None
    return 0


def read_arguments(algorithm, argv):
    """Parse and check a command line with --play or --evaluate.

    Returns the options, to which it adds `playing`, `in_terminal`, and `checkpoint`, which is None if none was named.
    """
    args = make_parser(algorithm).parse_args(argv)
    args.playing = args.play is not None
    named = args.play if args.playing else args.evaluate
    args.checkpoint = None if named is True else named
    args.in_terminal = bool(args.playing and algorithm.play_in_terminal and (args.human or not algorithm.frames))
    check_arguments(args, bool(algorithm.frames))
    args.out = args.out or f"{algorithm.name}.gif"
    check_out(args.out)
    if args.episodes is None:
        args.episodes = 1 if args.playing else algorithm.episodes
    if args.seed is None:
        with_a_person = args.in_terminal and algorithm.frames
        args.seed = secrets.randbelow(2**31) if with_a_person else SEED  # a person wants other games each time
    return args


def make_parser(algorithm):
    """The parser of a command line with --play or --evaluate."""
    parser = Parser(f"-m algorithms.{algorithm.name}", algorithm.doc)
    modes = parser.add_mutually_exclusive_group()
    model = dict(type=given_path, nargs="?", const=True, metavar="MODEL")
    shows = "draw games as a gif" if algorithm.frames else "print answers"
    which = "by a run or a checkpoint (default: the newest run, else the shipped model)"
    modes.add_argument("--play", **model, help=f"{shows}, played {which}" if algorithm.frames else f"{shows} {which}")
    units, _ = algorithm.units
    modes.add_argument("--evaluate", **model, help=f"print the score of fresh {units}, as JSON")
    default = f"1 to play, {algorithm.episodes} to evaluate" if algorithm.frames else algorithm.episodes
    many = f"how many {units} (default {default})"
    parser.add_argument("--episodes", type=within("[1, 1_000_000]"), metavar="N", help=many)
    seed_help = f"of the {units} (default {SEED}, far from the seeds of trainings; with a person drawn at random)"
    parser.add_argument("--seed", type=within("[0, 2_147_483_647]"), metavar="N", help=seed_help)
    out_help = f"the gif to write (default {algorithm.name}.gif)"
    human_help = "play against you in the terminal" if algorithm.play_in_terminal else "play in a window instead"
    drawn = bool(algorithm.frames)
    parser.add_argument("--out", type=given_path, metavar="FILE", help=out_help if drawn else argparse.SUPPRESS)
    parser.add_argument("--human", action="store_true", help=human_help if drawn else argparse.SUPPRESS)
    for constant in algorithm.model_constants:
        moved = "the folder that this model of the run has moved to, or its module:function once more"
        parser.add_argument(f"--{constant.lower()}", type=given_path, metavar="FOLDER", help=moved)
    if "ENV_ID" in algorithm.constants:
        again = "the game of the run once more, if it is in a module of yours"
        parser.add_argument("--env_id", metavar="ID", help=again)
    return parser


def check_arguments(args, drawn):
    """Raises CommandLineError for options that do not go together.

    drawn: whether games can be drawn.
    """
    if not args.playing and (args.human or args.out):
        raise CommandLineError("--human and --out belong to --play; leave them out")
    if args.out and (args.human or args.in_terminal):
        raise CommandLineError("--out belongs to a gif; leave it out")
    if args.episodes is not None and args.in_terminal:
        raise CommandLineError(f"--episodes belongs to {'a gif' if drawn else '--evaluate'}; leave it out")


def check_out(out):
    """Raises CommandLineError for a path that no gif can be written to."""
    if not out.lower().endswith(".gif"):
        raise CommandLineError(f"--out must end in .gif, not {out!r}")
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        raise CommandLineError(f"--out: {out} is a directory, or its directory does not exist")


def show(algorithm, state, args):
    """Show games in a window, or draw them as a gif."""
    # SDL, which draws and makes the windows, complains about screens and sound cards that are not there.
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not args.human:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if args.human and sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        raise CommandLineError("--human needs a screen, and there is none; leave it out for a gif")
    frames = algorithm.frames(state, args.episodes, args.seed, args.human)
    if args.human:
        for _ in frames:
            pass  # the window shows them
        return
    from viewer.drawing import write_gif  # imported here, because training works without it

    with replacing(args.out) as unfinished:  # an old gif stays whole until the new one is
        write_gif(unfinished, tqdm(frames, unit=" frames", leave=False, disable=None), algorithm.frame_ms)
    print(f"wrote {printable(args.out)} ({os.path.getsize(args.out) / 1e6:.2f} MB)")


# --- loading a model --------------------------------------------------------------------------------------------------


def load_policy_state(algorithm, name, given=()):
    """Load the run or checkpoint of this name. If it is None, load the newest run, or else the shipped model.

    given: {name: value} of constants that replace those of the run.

    Returns what `Trainer.policy_state` returned, the path, and a remark that says why it was taken. Raises
    CheckpointError.
    """
    shipped = ALGORITHMS / "pretrained" / f"{algorithm.name}{SUFFIX}"
    path, why = model_to_play(name, shipped, lambda state: state.get("algorithm") == algorithm.name)
    state = load_checkpoint(path)
    check_algorithm(algorithm.name, state, path)
    try:
        check_like(state, {"constants": {}, "global_step": 0, "model": {}})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; train one anew") from None
    given = dict(given)
    game = state["constants"].get("ENV_ID")
    if given.get("ENV_ID", game) != game:
        other = f"its game is {shortened(repr(game))}, not {given['ENV_ID']!r}"
        raise CheckpointError(f"{path}: {other}; leave out --env_id")
    constants = constants_of(path, state["constants"], algorithm.constants, given) | given
    # The shipped models are in float16, so that they take little room.
    model = {name: x.float() if getattr(x, "dtype", None) == torch.float16 else x for name, x in state["model"].items()}
    return state | {"constants": constants, "model": model}, path, why


def check_algorithm(name, state, path):
    """Raises CheckpointError for a model of another training."""
    if state.get("algorithm") != name:
        trained_by = shortened(state.get("algorithm", "another program"))
        raise CheckpointError(f"{path}: is no model of {name}; it was trained by {trained_by}")


def check_models(state, models):
    """Check that a run is continued or played with the pretrained models that it began with.

    Args:
        state: the checkpoint of the run.
        models: {constant: [name, fingerprint]} of the pretrained models that are loaded now.

    Raises:
        CommandLineError: another model was named. A model that has changed under the same name is only warned of,
            because a later version of transformers may read the same files differently.
    """
    try:
        check_like(state, {"models": models})
    except ValueError as error:
        raise CheckpointError(f"the models of the checkpoint: {error}; use another checkpoint") from None
    for constant, (name, fingerprint) in models.items():
        saved_name, saved_fingerprint = state["models"][constant]
        if fingerprint == saved_fingerprint:
            continue
        if name != saved_name:
            reason = f"--{constant.lower()} {name} is not the model that the run began with"
            raise CommandLineError(f"{reason}; name that one, which was {shortened(saved_name)}")
        warnings.warn(f"{name} has changed since the run began, or is now read differently", stacklevel=1)


def training_device(c):
    """The device that a training with these constants ran on, or the CPU if this machine lacks it."""
    try:
        return choose_device(c.DEVICE)
    except DeviceError:
        return torch.device("cpu")


# --- playing games ----------------------------------------------------------------------------------------------------


def episode_returns(make_env, choose, episodes, seed, report=None):
    """Play whole episodes, up to 100 side by side, and return the return of each.

    Args:
        make_env: makes one environment.
        choose: takes observations (N, ...) and returns actions (N,), both NumPy arrays.
        report: called after every step, as `games_bar` says.
    """
    returns = []
    for first in range(0, episodes, 100):
        envs = SyncVectorEnv([make_env] * min(100, episodes - first))
        obs, _ = envs.reset(seed=seed + first)
        playing = np.ones(envs.num_envs, bool)
        scores = np.zeros(envs.num_envs)
        for step in itertools.count(1):
            if not playing.any():
                break
            obs, rewards, terminated, truncated, _ = envs.step(choose(obs))
            scores += rewards * playing
            playing &= ~(terminated | truncated)
            if report is not None:
                report(first + int((~playing).sum()), step)
        envs.close()
        returns += scores.tolist()
    return returns


def episode_frames(env, choose, episodes, seed):
    """Play whole episodes and yield each of their frames; `choose` is as in `episode_returns`."""
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        over = False
        while not over:
            obs, _, terminated, truncated, _ = env.step(int(choose(obs[None])[0]))
            over = terminated or truncated
            yield env.render()
    env.close()


def summary(scores):
    """The statistics of the scores of some games. Raises FloatingPointError for a score that is not finite."""
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
