"""Watch a trained GPT play:  python load_model.py

This plays the best model of the newest run, or the shipped one if there is no run, and draws what it reads as a gif.
Name a checkpoint or a run directory to play another. --out replay.html writes a page for the browser, which replays the
game with the model's attention and lets you edit what it reads. --evaluate plays all 32 possible games and prints the
score.
"""

import harness.start  # before the slow imports

import contextlib
import errno
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from breakout_ascii import BRICK_COLUMNS, BRICK_ROWS, BreakoutAscii, to_image
from evaluation import SERVES, exact, greedy, sampled, sampling
from harness.checkpoint import SUFFIX, CheckpointError, load_checkpoint
from harness.device import set_threads
from harness.files import replacing
from harness.messages import printable, shown
from harness.options import CommandLineError, Parser, given_path, within
from harness.supervise import run_script
from policies import find_model, load_policy, policy_of
from viewer.drawing import write_gif
from viewer.replay.attention import plain_gpt
from viewer.replay.document import Stage, replay_html
from viewer.replay.pictures import attention_pictures
from viewer.replay.recording import record

FRAME_MS = 40  # 25 frames a second
HTML_LIMITS = {"steps": 10_000, "episodes": 2}  # more than anybody watches; 10,000 steps make a page of 0.7 MB


class Step(NamedTuple):
    """Holds one step of a game."""

    page: np.ndarray  # (1944,) uint8, the page before the action
    action: int
    next_page: np.ndarray  # (1944,) uint8, the page after the action
    info: dict  # from the environment, after the action
    over: bool  # whether the game ends here
    last: bool  # whether the game or the playing ends here


def play(policy, steps=1000, episodes=None, seed=0, sample=False):
    """Play a number of steps, or with `episodes` a number of whole games instead. Yields each `Step`."""
    player = sampling(policy, seed) if sample else greedy(policy)
    env = BreakoutAscii()
    page, _ = env.reset(seed=seed)
    games = 0
    for step in itertools.count(1):
        action = int(player(page[None])[0])
        next_page, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        games += over
        if episodes:
            done = games == episodes
        else:
            done = step == steps
        yield Step(page, action, next_page, info, over, over or done)
        if done:
            return
        page = env.reset()[0] if over else next_page


def write_mp4(path, pictures):
    """Write a video. Raises OSError if it is incomplete, which imageio does not notice."""
    import imageio  # here, because a gif does not need it
    import imageio_ffmpeg

    frames = 0
    as_mp4 = ["-f", "mp4"]  # the file may have another suffix, if a link points to it
    options = dict(format="mp4", output_params=as_mp4, fps=1000 / FRAME_MS, macro_block_size=2)
    try:
        with imageio.get_writer(path, **options) as writer:
            for picture in pictures:
                writer.append_data(picture)
                frames += 1
    except OSError as error:
        if error.errno is None:  # from imageio, with everything that ffmpeg printed
            raise OSError(errno.EIO, "ffmpeg ended early") from None
        raise
    try:
        found, _ = imageio_ffmpeg.count_frames_and_secs(path)
    except RuntimeError:  # no video at all
        found = 0
    if found < frames:
        raise OSError(errno.EIO, f"ffmpeg wrote {found} of {frames} frames")


def stages(path, policy, meta):
    """Return a `Stage` for the start of the training and for a tenth of it, if the run has them, and for the model."""
    steps = meta.get("global_step", 0)
    earlier = {}  # {environment steps: policy}
    for file in path.parent.glob(f"checkpoint_*{SUFFIX}"):
        with contextlib.suppress(CheckpointError, ValueError):
            state = load_checkpoint(file)
            earlier_policy = policy_of(state)
            earlier_steps = state.get("global_step", 0)
            if earlier_steps < steps and earlier_policy.config == policy.config:
                earlier[earlier_steps] = earlier_policy
    chosen = []
    untrained = earlier.pop(0, None)
    if untrained is not None:
        chosen.append(Stage("start", untrained))
    if earlier:
        nearest = min(earlier, key=lambda step: abs(step - steps / 10))
        chosen.append(Stage(f"{nearest:,} steps", earlier[nearest]))
    return [*chosen, Stage(f"{steps:,} steps" if steps else "start", policy)]


def read_command_line(argv):
    """Return the options, checked. Raises CommandLineError."""
    parser = Parser("load_model.py", __doc__)
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        type=given_path,
        help="a checkpoint or run (default: the newest run, else the shipped model)",
    )
    add("--steps", type=within("[1, 1_000_000_000]"), default=1000, help="steps to play (default 1000)")
    add("--episodes", type=within("[1, 1_000_000]"), help="whole games to play, instead of --steps")
    add("--out", type=given_path, default="gpt.gif", help="a .gif, .mp4 or .html (default gpt.gif)")
    add("--attention", action="store_true", help="draw behind the characters what each head looks at")
    add("--head", type=int, help="draw what this head looks at, from 0")
    add("--seed", type=within("[0, 4_294_967_295]"), default=0, help="for the serves and --sample (default 0)")
    add("--sample", action="store_true", help="draw the actions at random instead of taking the most probable")
    evaluate = (
        f"print a score instead: of all {len(SERVES)} games, or with --sample the mean of --episodes games (1000)"
    )
    add("--evaluate", action="store_true", help=evaluate)
    args = parser.parse_args(argv)
    args.attention |= args.head is not None
    args.suffix = Path(args.out).suffix.lower()
    if args.attention and (args.evaluate or args.suffix == ".html"):
        parser.error("--attention and --head are for a .gif or an .mp4; an .html shows every head in any case")
    if not args.evaluate:
        check_output(args)
    elif args.episodes and not args.sample:
        every = f"--evaluate plays all {len(SERVES)} games that greedy play can meet"
        parser.error(f"{every}; --episodes goes with --sample")
    return args


def check_output(args):
    """Raise CommandLineError for an output that cannot be written."""
    out = Path(args.out)
    if args.suffix not in (".gif", ".html", ".mp4"):
        raise CommandLineError(f"--out must end in .gif, .html or .mp4, not {args.out!r}")
    if out.is_dir():
        raise CommandLineError(f"--out: {out} is a directory")
    if not out.parent.is_dir():
        raise CommandLineError(f"--out: there is no directory {out.parent}")
    if args.suffix == ".mp4" and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        raise CommandLineError("an .mp4 needs one more package: pip install imageio-ffmpeg; or write a .gif")
    if args.suffix == ".html":
        for option, most in HTML_LIMITS.items():
            value = getattr(args, option)
            if value is not None and value > most:
                raise CommandLineError(f"--{option} must be at most {most} for an .html, not {value}")


def print_score(args, policy):
    """Print the score as a line of JSON: exact, or the mean of sampled games with its standard error."""
    result = sampled(policy, args.episodes or 1000, args.seed) if args.sample else exact(policy)
    names = ("score", "error", "min", "max", "cleared", "games")
    print(json.dumps({name: result[name] for name in names if name in result}))


def watched(steps, total, ended):
    """Yield the steps while a progress bar shows them. Appends every game's last step to `ended`."""
    for step in tqdm(steps, total=total, unit=" frames", disable=None):  # None: no bar unless on a terminal
        if step.last:
            ended.append(step)
        yield step


def write(out, steps, args, path, policy, meta):
    """Write the steps of `play` to a file, as a page for the browser, a gif or an mp4."""
    if args.suffix == ".html":
        about = f"{path.name}, trained for {meta.get('global_step', 0):,} steps"
        text = replay_html(list(record(steps)), stages(path, policy, meta), path.name, about)
        out.write_bytes(text.encode())
        return
    if args.attention:
        pictures = attention_pictures(plain_gpt(policy), record(steps), args.head)
    else:
        pictures = (to_image(step.next_page) for step in steps)
    if args.suffix == ".gif":
        write_gif(out, pictures, FRAME_MS)
    else:
        write_mp4(str(out), pictures)


def main(argv=()):
    """Play as this command line asks, and return the exit status. Raises CommandLineError or CheckpointError."""
    args = read_command_line(argv)
    path, why = find_model(args.model)
    policy, meta = load_policy(path)
    set_threads(policy.config.n_layer)
    print(f"{shown(path)}: trained for {meta.get('global_step', 0):,} steps{why}")
    if args.evaluate:
        print_score(args, policy)
        return 0
    if args.head is not None and not 0 <= args.head < policy.config.n_head:
        raise CommandLineError(f"--head must be from 0 to {policy.config.n_head - 1}, not {args.head}")
    ended = []
    played = play(policy, args.steps, args.episodes, args.seed, args.sample)
    steps = watched(played, None if args.episodes else args.steps, ended)
    with replacing(args.out) as unfinished:  # an older file stays until the new one is complete
        write(unfinished, steps, args, path, policy, meta)
    bricks = BRICK_ROWS * BRICK_COLUMNS
    for number, step in enumerate(ended, 1):
        info = step.info
        left = f"{info['bricks']} of {bricks} bricks left" if info["bricks"] else "the wall is cleared"
        cut = "" if step.over else "; not over, but the drawing ends here"
        print(f"game {number}: {info['score']} points, {left}, lives left: {info['lives']}{cut}")
    print(f"wrote {printable(args.out)} ({os.path.getsize(args.out) / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    run_script(main, "load_model.py")
