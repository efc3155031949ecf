"""Watch a trained GPT play:  python load_model.py

This plays the best model of the newest run, or the shipped one if there is no run, in the game that it was trained on,
and draws what it reads as a gif. Name a checkpoint or a run directory to play another. --out replay.html writes a page
for the browser, which replays the game with the model's attention and lets you edit what it reads. --evaluate prints
the score: of all 32 possible games of Breakout, or of many games of another.
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

from breakout_ascii import BRICK_COLUMNS, BRICK_ROWS
from evaluation import FIRST_SEED, OTHER_METRICS, SERVES, episodes, exact, greedy, is_breakout, sampled, sampling
from games.game import BREAKOUT, load_game
from games.pages import PageError
from harness.checkpoint import STAGE, SUFFIX, CheckpointError, load_checkpoint
from harness.device import set_threads
from harness.files import replacing
from harness.messages import printable, shortened, shown
from harness.options import CommandLineError, Parser, given_path, within
from harness.runs import imports_foreign_code
from harness.supervise import run_script
from policies import check_game, find_model, game_of, load_policy, policy_of
from viewer.drawing import with_status, write_gif
from viewer.replay.attention import plain_gpt
from viewer.replay.document import COARSE, Stage, replay_html
from viewer.replay.kinds import kind_of
from viewer.replay.pictures import attention_pictures
from viewer.replay.recording import record
from viewer.replay.weights import rounded

HTML_LIMITS = {"steps": 10_000, "episodes": 2}  # more than anybody watches; 10,000 steps of one model take 0.35 MB
STAGE_STEPS = 2000  # are enough to see how an earlier stage of the training plays
MOST_TOLD = 10  # lines about games, which may be short and many
EVAL_EPISODES = 100  # unless the checkpoint says how many games its training evaluated


class Situation(NamedTuple):
    """Holds what a game has come to."""

    page: np.ndarray  # (T,) uint8
    steps: int = 0
    score: float = 0.0  # the sum of the rewards
    lives: int | None = None  # None if the game has none

    def after(self, page, reward, info):
        return Situation(page, self.steps + 1, self.score + reward, lives_in(info))


def lives_in(info):
    """Return the lives that an environment's info tells, or None."""
    lives = info.get("lives")
    return int(lives) if isinstance(lives, int | np.integer) else None


class Step(NamedTuple):
    """Holds one step of a game."""

    before: Situation
    action: int
    after: Situation
    info: dict  # from the environment, after the action
    over: bool  # whether the game ends here
    last: bool  # whether the game or the playing ends here


def play(policy, env, steps=None, episodes=None, seed=0, sample=False):
    """Play in an environment of pages, for a number of steps or of games, whichever ends first. Yields each `Step`."""
    player = sampling(policy, seed) if sample else greedy(policy)
    page, info = env.reset(seed=seed)
    now = Situation(page, lives=lives_in(info))
    games = 0
    for step in itertools.count(1):
        action = int(player(now.page[None])[0])
        page, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        games += over
        done = step == steps or games == episodes
        after = now.after(page, reward, info)
        yield Step(now, action, after, info, over, over or done)
        if done:
            return
        now = after
        if over:
            page, info = env.reset()
            now = Situation(page, lives=lives_in(info))


def write_mp4(path, pictures, frame_ms):
    """Write a video. Raises OSError if it is incomplete, which imageio does not notice."""
    import imageio  # here, because a gif does not need it
    import imageio_ffmpeg

    frames = 0
    as_mp4 = ["-f", "mp4"]  # the file may have another suffix, if a link points to it
    options = dict(format="mp4", output_params=as_mp4, fps=1000 / frame_ms, macro_block_size=2)
    try:
        with imageio.get_writer(path, **options) as writer:
            for picture in pictures:
                height, width, _ = picture.shape
                even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)))  # a video has no odd sizes
                writer.append_data(even)
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
    """Return a `Stage` for the model, after those that its training left beside it, the least trained first.

    The weights of these are rounded, so that they play as the page shows them.
    """
    steps = meta.get("global_step", 0)
    earlier = {}  # {environment steps: policy}
    for file in path.parent.glob(f"{STAGE}*{SUFFIX}"):
        with contextlib.suppress(CheckpointError, ValueError):  # a damaged one is left out
            state = load_checkpoint(file)
            stage = policy_of(state)
            if stage.config == policy.config and state.get("global_step", 0) < steps:
                rounded(stage, COARSE)
                earlier[state.get("global_step", 0)] = stage
    every = [*sorted(earlier.items()), (steps, policy)]
    return [Stage(f"{taken:,} steps" if taken else "start", model) for taken, model in every]


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
    add("--game", metavar="ID", help="play this game, such as games.catch:Catch-v0, not the one it was trained on")
    add("--steps", type=within("[1, 1_000_000_000]"), default=1000, help="steps to play (default 1000)")
    add("--episodes", type=within("[1, 1_000_000]"), help="whole games to play, instead of --steps")
    add("--out", type=given_path, default="gpt.gif", help="a .gif, .mp4 or .html (default gpt.gif)")
    add("--attention", action="store_true", help="draw behind the characters what each head looks at")
    add("--head", type=int, help="draw what this head looks at, from 0")
    add("--seed", type=within("[0, 4_294_967_295]"), default=0, help="for the serves and --sample (default 0)")
    add("--sample", action="store_true", help="draw the actions at random instead of taking the most probable")
    evaluate = (
        f"print a score instead: of all {len(SERVES)} games, or with --sample the mean of --episodes games (1000); in "
        f"other games than Breakout always the mean of --episodes games (as in its training, or {EVAL_EPISODES})"
    )
    add("--evaluate", action="store_true", help=evaluate)
    args = parser.parse_args(argv)
    args.attention |= args.head is not None
    args.suffix = Path(args.out).suffix.lower()
    if args.attention and (args.evaluate or args.suffix == ".html"):
        parser.error("--attention and --head are for a .gif or an .mp4; an .html shows every head in any case")
    if not args.evaluate:
        check_output(args)
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
        check_limit("steps", args)


def check_limit(option, args):
    """Raise CommandLineError if the value of an option is too large for an .html."""
    value = getattr(args, option)
    most = HTML_LIMITS[option]
    if value is not None and value > most:
        raise CommandLineError(f"--{option} must be at most {most} for an .html, not {value}")


def check_breakout(args):
    """Raise CommandLineError for options that fit other games, but not Breakout."""
    if args.evaluate and args.episodes and not args.sample:
        every = f"--evaluate plays all {len(SERVES)} games of Breakout that greedy play can meet"
        raise CommandLineError(f"{every}; --episodes goes with --sample")
    if not args.evaluate and args.suffix == ".html":
        check_limit("episodes", args)  # in other games, which may be short, the number of steps is limited instead


def game_to_play(args, path, policy, meta):
    """Return the `Game` to play. Raises CommandLineError or CheckpointError if there is none that fits the model."""
    if not args.game and imports_foreign_code(game_of(meta)):
        problem = f"its game {shortened(repr(game_of(meta)))} would run a module's code"
        raise CheckpointError(f"{shown(path)}: {problem}; name it by --game if you trust that")
    try:
        game = load_game(args.game or game_of(meta))
    except PageError as error:
        raise CommandLineError(str(error) if args.game else f"{shown(path)}: {error}") from None
    check_game(path, policy, meta, game)
    if is_breakout(game):
        check_breakout(args)
    return game


def print_score(args, policy, meta, game):
    """Print the score as a line of JSON: exact, or the mean of several games with its standard error."""
    if is_breakout(game):
        result = sampled(policy, args.episodes or 1000, args.seed) if args.sample else exact(policy)
        names = ("score", "error", "min", "max", "cleared", "games")
    else:
        number = args.episodes or meta.get("constants", {}).get("EVAL_EPISODES", EVAL_EPISODES)
        seed = FIRST_SEED + 1_000_000 * args.seed  # without an episode that another seed has
        result = episodes(policy, game, number, seed, args.sample)
        names = (*OTHER_METRICS, "games")
    print(json.dumps({name: result[name] for name in names if name in result}))


def watched(steps, total, ended):
    """Yield the steps while a progress bar shows them. Appends every game's last step to `ended`."""
    for step in tqdm(steps, total=total, unit=" frames", disable=None):  # None: no bar unless on a terminal
        if step.last:
            ended.append(step)
        yield step


def situations_of(steps):
    """Yield the situation before each of the steps, and that after the last one of a game."""
    for step in steps:
        yield step.before
        if step.last:
            yield step.after


def status_line(situation, game):
    """Return what the picture of a situation says under the page: `score 560   lives 5   step 1,000`.

    Each number has room to grow, so that nothing jumps when it gains a digit.
    """
    score = f"score {situation.score:<5.6g} " if is_breakout(game) else f"return {situation.score:<8.6g} "
    lives = "" if situation.lives is None else f"lives {situation.lives:<3} "
    return f"{score}{lives}step {situation.steps:<11,}"


def write(out, steps, args, path, policy, meta, game, env):
    """Write the steps of `play` in an environment to a file, as a page for the browser, a gif or an mp4."""
    if args.suffix == ".html":
        about = f"{path.name}, {trained(meta)}"
        *earlier, stage = stages(path, policy, meta)
        frames = list(record(steps, kind_of(game).starts(env)))
        steps = min(STAGE_STEPS, sum(frame.action >= 0 for frame in frames))
        limits = steps, args.episodes, args.seed, args.sample
        played = [*play_stages(earlier, game, *limits), (stage, frames)]
        out.write_bytes(replay_html(played, game, path.name, about).encode())
        return
    kind = kind_of(game)
    if is_breakout(game) and not args.attention:
        situations = (step.after for step in steps)
    else:  # with the first page of each game, because a game may be short
        situations = situations_of(steps)
    situations, drawn = itertools.tee(situations)
    if args.attention:
        pictures = attention_pictures(plain_gpt(policy), drawn, game, args.head)
    else:
        pictures = map(kind.drawer(game), (situation.page for situation in drawn))
    pictures = with_status(pictures, (status_line(situation, game) for situation in situations))
    if args.suffix == ".gif":
        write_gif(out, pictures, kind.FRAME_MS)
    else:
        write_mp4(str(out), pictures, kind.FRAME_MS)


def play_stages(stages, game, *limits):
    """Let stages of a training play, each for itself, for `replay_html`. limits: what `play` takes."""
    played = []
    for stage in stages:
        with contextlib.closing(game.make()) as env:
            played.append((stage, list(record(play(stage.policy, env, *limits), kind_of(game).starts(env)))))
    return played


def trained(meta):
    """Return how long a model has been trained, and on which game unless it is Breakout."""
    game_id = game_of(meta)
    on = "" if game_id == BREAKOUT else f" on {shortened(game_id)}"
    return f"trained for {meta.get('global_step', 0):,} steps{on}"


def outcome(step, game):
    """Return what came of a game, given its last step: its score, and what is left in Breakout."""
    if not is_breakout(game):
        return f"return {step.after.score:.6g} after {step.after.steps:,} steps"
    info = step.info
    bricks = BRICK_ROWS * BRICK_COLUMNS
    left = f"{info['bricks']} of {bricks} bricks left" if info["bricks"] else "the wall is cleared"
    return f"{info['score']} points, {left}, lives left: {info['lives']}"


def tell(ended, args, game):
    """Print what came of each game, given their last steps. Only the last game may have been cut off."""
    told = len(ended) if is_breakout(game) or len(ended) <= MOST_TOLD else MOST_TOLD - 1
    for number, step in enumerate(ended, 1):
        if number <= told or not step.over:
            cut = "" if step.over else cut_off(number, args, game)
            print(f"game {number}: {outcome(step, game)}{cut}")
        elif number == told + 1:
            rest = [step.after.score for step in ended[told:] if step.over]
            print(f"{len(rest)} further game{'s' * (len(rest) > 1)}: mean return {np.mean(rest):.6g}")


def cut_off(number, args, game):
    """Return what to say of the game of this number, which the playing has cut off: where, and how to see its end."""
    html = args.suffix == ".html"
    most = HTML_LIMITS["steps"]
    steps = most if args.episodes else args.steps
    if html and steps == most:
        further = ", the most in an .html"
    elif html and is_breakout(game) and number > HTML_LIMITS["episodes"]:
        further = f"; --steps {most} plays on"
    else:
        further = f"; --episodes {number} plays to the end"
        further += f" or to {most} steps" if html and not is_breakout(game) else ""  # Breakout ends before that
    return f"; cut off after {steps} steps{' in all' if number > 1 else ''}{further}"


def main(argv=()):
    """Play as this command line asks, and return the exit status. Raises CommandLineError or CheckpointError."""
    args = read_command_line(argv)
    path, why = find_model(args.model)
    policy, meta = load_policy(path)
    set_threads(policy.config.n_layer)
    game = game_to_play(args, path, policy, meta)
    print(f"{shown(path)}: {trained(meta)}{why}")
    if args.head is not None and not 0 <= args.head < policy.config.n_head:
        raise CommandLineError(f"--head must be from 0 to {policy.config.n_head - 1}, not {args.head}")
    if args.evaluate:
        print_score(args, policy, meta, game)
    else:
        draw(args, path, policy, meta, game)
    return 0


def draw(args, path, policy, meta, game):
    """Let the policy play, write the file, and print what came of each game."""
    limit = args.steps
    if args.episodes:
        limit = HTML_LIMITS["steps"] if args.suffix == ".html" else None
    ended = []
    with contextlib.closing(game.make()) as env, replacing(args.out) as unfinished:
        # An older file stays until the new one is complete.
        played = play(policy, env, limit, args.episodes, args.seed, args.sample)
        steps = watched(played, None if args.episodes else args.steps, ended)
        write(unfinished, steps, args, path, policy, meta, game, env)
    tell(ended, args, game)
    print(f"wrote {printable(args.out)} ({os.path.getsize(args.out) / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_script(main, "load_model.py")
