"""Watch a trained GPT play:  python load_model.py

Plays the best model of the newest run, its last if it has none yet, or the shipped one where there is no run, and draws
what it reads as a gif. Name a checkpoint or a run directory to play another; --out replay.html writes a page for the browser
that replays the game with the model's attention, and lets one edit what it reads; --evaluate plays all 32 possible games and
prints the exact score as JSON.
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

from breakout_ascii import BreakoutAscii, to_image
from evaluation import exact, greedy, sampled, sampling
from harness.checkpoint import SUFFIX, CheckpointError
from harness.device import set_threads
from harness.files import replacing
from harness.messages import printable, shown
from harness.options import CommandLineError, Parser, given_path
from harness.supervise import run_script
from policies import find_model, load_policy
from viewer.drawing import write_gif
from viewer.replay import Stage, html, record
from viewer.replay.attention import plain_gpt
from viewer.replay.pictures import pictures as attention_pictures

FRAME_MS = 40  # 25 frames a second


class Step(NamedTuple):
    page: np.ndarray  # (1944,) uint8, what was read
    action: int
    next_page: np.ndarray  # what it led to
    info: dict  # of the game, afterwards
    over: bool  # the game ends here
    last: bool  # the game, or the playing, ends here


def play(policy, steps=1000, episodes=None, seed=0, sample=False):
    """Plays this many steps, or this many whole games (episodes), and starts a new game after each end. Yields a `Step` for each."""
    player, env = sampling(policy, seed) if sample else greedy(policy), BreakoutAscii()
    page, _ = env.reset(seed=seed)
    games = 0
    for step in itertools.count(1):
        action = int(player(page[None])[0])
        next_page, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        games += over
        done = games == episodes if episodes else step == steps
        yield Step(page, action, next_page, info, over, over or done)
        if done:
            return
        page = env.reset()[0] if over else next_page


def write_mp4(path, pictures):
    """Raises OSError if the video is not whole: imageio does not look at how ffmpeg, which writes it, has ended."""
    import imageio  # here, because a gif can do without
    import imageio_ffmpeg

    as_mp4 = ["-f", "mp4"]  # whatever the file is called that a link points to
    try:
        with imageio.get_writer(
            path, format="mp4", output_params=as_mp4, fps=1000 / FRAME_MS, macro_block_size=2
        ) as writer:
            for frames, picture in enumerate(pictures, 1):
                writer.append_data(picture)
    except OSError as error:
        if error.errno is None:  # of imageio, with all that ffmpeg wrote
            raise OSError(errno.EIO, "ffmpeg ended early") from None
        raise
    try:
        found, _ = imageio_ffmpeg.count_frames_and_secs(path)
    except RuntimeError:  # no video at all
        found = 0
    if found < frames:
        raise OSError(errno.EIO, f"ffmpeg wrote {found} of {frames} frames")


def stages(path, policy, meta):
    """The stages of training that lie beside a run's model, its start and a tenth of the way, and the model itself -> a list of `Stage`."""
    steps, earlier = meta.get("global_step", 0), {}
    for file in path.parent.glob(f"checkpoint_*{SUFFIX}"):
        with contextlib.suppress(CheckpointError):
            stage, its_meta = load_policy(file)
            if its_meta.get("global_step", 0) < steps and stage.config == policy.config:
                earlier[its_meta.get("global_step", 0)] = stage
    tenth = min((step for step in earlier if step), key=lambda step: abs(step - steps / 10), default=0)
    shown = {step: stage for step, stage in sorted(earlier.items()) if step in (0, tenth)} | {steps: policy}
    return [Stage(f"{step:,} steps" if step else "start", stage) for step, stage in shown.items()]


def read_command_line(argv):
    parser = Parser("load_model.py", __doc__)
    parser.add_argument(
        "model",
        nargs="?",
        type=given_path,
        help="a checkpoint or a run directory (default: the newest run, else the shipped model)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps to play (default 1000)")
    parser.add_argument("--episodes", type=int, help="whole games to play, instead of --steps")
    parser.add_argument(
        "--out",
        default="gpt.gif",
        type=given_path,
        help="a .gif, an .html to look into the model, or an .mp4 if imageio-ffmpeg is installed (default gpt.gif)",
    )
    parser.add_argument("--attention", action="store_true", help="draw behind the characters what each head looks at")
    parser.add_argument("--head", type=int, help="the same for one head")
    parser.add_argument("--seed", type=int, default=0, help="of the serves and of --sample (default 0)")
    parser.add_argument("--sample", action="store_true", help="draw the actions instead of taking the most probable")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="no picture: the exact score over all 32 games; with --sample, the mean of --episodes games (1000) and its standard error",
    )
    args = parser.parse_args(argv)
    suffix = Path(args.out).suffix.lower()
    attention = args.attention or args.head is not None
    # a page of 10,000 steps has 0.7 MB: enough to watch
    short = suffix == ".html" and not args.evaluate
    kind = " for an .html" if short else ""
    steps, episodes = (10_000, 2) if short else (10**9, 10**6)
    for name, low, high in (("steps", 1, steps), ("episodes", 1, episodes), ("seed", 0, 2**32 - 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(
                f"--{name} must be from {low} to {high}{kind if name != 'seed' and value > high else ''}, not {value}"
            )
    if attention and (args.evaluate or suffix == ".html"):
        parser.error("--attention and --head are for a .gif or an .mp4; an .html shows every head in any case")
    if args.evaluate and args.episodes and not args.sample:
        parser.error("--evaluate plays all 32 games that greedy play can meet; --episodes goes with --sample")
    if suffix not in (".gif", ".html", ".mp4"):
        parser.error(f"--out must end in .gif, .html or .mp4, not {args.out!r}")
    if suffix == ".mp4" and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        parser.error("an .mp4 needs one more package: pip install imageio imageio-ffmpeg; or write a .gif")
    if Path(args.out).is_dir():
        parser.error(f"--out: {args.out} is a directory")
    if not Path(args.out).parent.is_dir():
        parser.error(f"--out: there is no directory {Path(args.out).parent}")
    return args


def write(out, steps, args, path, policy, meta):
    """The steps of `play`, as a page, a gif or an mp4."""
    suffix, attention = Path(args.out).suffix.lower(), args.attention or args.head is not None
    if suffix == ".html":
        about = f"{path.name}, trained for {meta.get('global_step', 0):,} steps"
        out.write_bytes(html(list(record(steps)), stages(path, policy, meta), path.name, about).encode())
        return
    pictures = (
        attention_pictures(plain_gpt(policy), record(steps), args.head)
        if attention
        else (to_image(step.next_page) for step in steps)
    )
    if suffix == ".gif":
        write_gif(out, pictures, FRAME_MS)
    else:
        write_mp4(str(out), pictures)


def main(argv=()):
    args = read_command_line(argv)
    path, why = find_model(args.model)
    policy, meta = load_policy(path)
    set_threads(policy.config.n_layer)
    print(f"{shown(path)}: trained for {meta.get('global_step', 0):,} steps{why}")
    if args.evaluate:
        result = sampled(policy, args.episodes or 1000, args.seed) if args.sample else exact(policy)
        print(
            json.dumps(
                {name: result[name] for name in ("score", "error", "min", "max", "cleared", "games") if name in result}
            )
        )
        return 0
    if args.head is not None and not 0 <= args.head < policy.config.n_head:
        raise CommandLineError(f"--head must be from 0 to {policy.config.n_head - 1}, not {args.head}")
    games = []

    def steps():
        played = play(policy, args.steps, args.episodes, args.seed, args.sample)
        for step in tqdm(
            played, total=None if args.episodes else args.steps, unit=" frames", disable=None
        ):  # no bar but on a terminal
            if step.last:
                games.append(step.info)
            yield step

    with replacing(args.out) as unfinished:  # an old picture stays whole until the new one is
        write(unfinished, steps(), args, path, policy, meta)
    for i, info in enumerate(games, 1):
        left = f"{info['bricks']} of 91 bricks left" if info["bricks"] else "the wall is cleared"
        print(f"game {i}: {info['score']} points, {left}, {info['lives']} lives left")
    print(f"wrote {printable(args.out)} ({os.path.getsize(args.out) / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    run_script(main, "load_model.py")
