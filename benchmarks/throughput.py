"""How fast it is, and beside what:  python benchmarks/throughput.py [--tables 1 2 3 4 5]

1 speed beside the twins   2 training: end to end, and where its time goes
3 cost as games grow       4 cost as layers grow       5 cost as the share of changed characters grows

The game's twin is one Python object per game, its page drawn character by character. The GPT's twin is its plain path: every
token through every block, in float32. Both run by turns; a speed is the median of the repetitions, a ratio the median of
their ratios. Deeper models share how their pages begin; on CUDA they run in bf16 with compiled blocks, and a second twin,
strengthened, has both too. Both read pages of the same minibatch, made of a rollout as training makes it.
"""

import argparse
import contextlib
import copy
import functools
import io
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ppo  # noqa: E402
from breakout_ascii import BreakoutAsciiVec  # noqa: E402
from callbacks import Callback  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from evaluation import greedy  # noqa: E402
from load_model import SHIPPED, load_policy  # noqa: E402
from model import GPT, GPTConfig, PageReader, set_threads  # noqa: E402
from on_device import PPOOnDevice  # noqa: E402
from pages import CHARACTERS, POSITIONS, SECTION, distinct_lines, every_line  # noqa: E402
from rollout_buffer import reader_of, shuffled  # noqa: E402
from test_breakout_ascii import SlowGame  # noqa: E402
from train_ppo import (  # noqa: E402
    BATCH_SIZE, CONSTANTS, EVAL_INTERVAL, NUM_ENVS, NUM_STEPS, ROLLOUT_STEPS, TWINS, VARIED_STARTS, CommandLineError, build, check,
    choose_device,
)  # fmt: skip

RANDOM_ACTIONS = {"random": 1.0, "middling": 0.5, "expert": 0.0}  # their share in each level of play
SPREAD_STEPS = 500  # steps that spread new games over all their phases
SPLIT_STEPS = 400_000  # environment steps in which table 2 finds where the time goes
PEAK_OF = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""  # its own process: a child's peak counts what its parent held


def timed(f, *args, **kwargs):
    """-> f(*args, **kwargs), and the seconds it took."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = f(*args, **kwargs)
    synchronize()
    return result, time.perf_counter() - start


def race(repetitions, *contenders):
    """Contenders (function, its samples), run by turns -> samples per second (len(contenders), repetitions)."""
    for f, _ in contenders:
        f()  # warm up
    return np.array([[samples / timed(f)[1] for f, samples in contenders] for _ in range(repetitions)]).T


def speed(speeds, unit):
    return f"{number(np.median(speeds))} {unit}"


def compared(ours, twin, unit):
    """Speeds (repetitions,) of both -> the cells ours, twin, ratio."""
    return speed(ours, unit), speed(twin, unit), number(np.median(ours / twin))


def number(x):
    return f"{x:,.{0 if x >= 100 else 1 if x >= 10 else 2}f}"


@functools.cache
def training_pages(policy, level, neighbours=1):
    """A minibatch as training makes it of a rollout of varied games, played by policy: (BATCH_SIZE, 1944) uint8."""
    env, rng = BreakoutAsciiVec(NUM_ENVS, varied_starts=VARIED_STARTS), np.random.default_rng(0)
    reader, (obs, _), pages, share = reader_of(policy), env.reset(seed=0), [], RANDOM_ACTIONS[level]
    generator = torch.Generator().manual_seed(0)
    for step in range(SPREAD_STEPS + ROLLOUT_STEPS):
        if step == SPREAD_STEPS and TWINS:
            obs = env.twin()
        if step >= SPREAD_STEPS:
            pages.append(obs)
        actions = rng.integers(3, size=NUM_ENVS)
        if share < 1:
            drawn = torch.multinomial(reader(reader.encode(obs))[0].cpu().softmax(1), 1, generator=generator)
            actions = np.where(rng.random(NUM_ENVS) < share, actions, drawn.squeeze(1).numpy())
        obs, *_ = env.step(actions)
    pages, numbers = np.concatenate(pages), np.concatenate([reader.encode(obs) for obs in pages])
    return pages[shuffled(numbers, neighbours, generator)[:BATCH_SIZE]]


def deep_policy(n_layer, device):
    """The size of the public attempt, untrained."""
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=n_layer, n_embd=96, n_head=6, mlp_expansion=1)).to(device)


def sped_up(policy):
    policy = copy.deepcopy(policy)
    policy.speed_up()
    return policy


def batch_sizes(policy):
    """Pages that ours and the twin read at a time."""
    cuda = policy.device.type == "cuda"
    if policy.config.n_layer == 1:
        return BATCH_SIZE, 32 if cuda else 2
    return (BATCH_SIZE, BATCH_SIZE) if cuda else (32, 2)  # more at a time are slower on a CPU


def work(policy, pages, plain=False):
    """-> the functions forward, from tokens to (logits,), and forward + backward, from what a rollout keeps of the pages to
    the gradients of a loss of all logits and values."""
    tokens, reader = torch.from_numpy(pages), reader_of(policy)
    if plain:
        read = read_kept = lambda: policy.heads(policy.read_every_token(tokens))
    elif policy.config.n_layer == 1 and policy.device.type == "cuda":  # as PPOOnDevice has it
        tokens, on_device = tokens.to(policy.device), torch.compile(policy.features, fullgraph=True)
        lines = distinct_lines(tokens)
        read, read_kept = lambda: policy.heads(on_device(every_line(tokens))), lambda: policy.heads(on_device(lines))
    else:
        kept = reader.encode(pages)
        read, read_kept = lambda: policy(tokens), lambda: policy(reader.batch(kept))

    @torch.no_grad()
    def forward():
        return read()[:1]

    def forward_backward():
        logits, values = read_kept()
        return torch.autograd.grad(logits.square().sum() + values.square().sum(), list(policy.parameters()), allow_unused=True)

    return forward, forward_backward


def speed_table(policy, args):
    rows, deep = [game_row(args.repetitions)], deep_policy(6, policy.device)
    for level in RANDOM_ACTIONS:
        rows += model_rows("one layer", policy, training_pages(policy, level), level, args.repetitions)
        rows += model_rows("six layers", deep, training_pages(policy, level, PageReader.neighbours), level, args.repetitions)
    return "speed", ("what", "ours", "twin", "ratio", "relative error"), rows


def game_row(repetitions, num_envs=256, num_twins=4, steps=500):
    """Random actions; the twins play the first few games, and all pages of these are compared."""
    env, rng, speeds, differing = BreakoutAsciiVec(num_envs), np.random.default_rng(0), [], 0
    env.reset(seed=0)
    wall = env.games.bricks[0].copy()
    twins = [SlowGame(serves, wall) for serves in env.games.serves[:num_twins]]

    def play(actions):
        return [(env.step(a)[0][:num_twins].copy(), env.games.serves[:num_twins].copy()) for a in actions]

    def play_twins(actions, played):
        for a, (_, serves) in zip(actions, played):
            for i in range(num_twins):
                _, over, _ = twins[i].step(a[i])
                if over:
                    twins[i] = SlowGame(serves[i], wall)
                yield twins[i].page()

    for actions in rng.integers(3, size=(repetitions, steps, num_envs)):
        played, ours = timed(play, actions)
        text, twin = timed("".join, play_twins(actions, played))
        speeds.append((num_envs * steps / ours, num_twins * steps / twin))
        pages = np.stack([pages for pages, _ in played]).tobytes()
        differing += sum(a != b for a, b in zip(pages, text.encode(), strict=True))
    error = f"{differing:,} characters" if differing else "equal"
    return f"game, {num_envs} games on one core, frames included", *compared(*np.array(speeds).T, "steps/s"), error


def model_rows(name, policy, pages, level, repetitions):
    """Forward, and forward + backward, beside each twin."""
    ours, (size, few) = sped_up(policy), batch_sizes(policy)
    twins = {"": policy} | ({", twin strengthened": ours} if ours.bf16 else {})
    contenders = [work(ours, pages[:size])] + [work(twin, pages[:few], plain=True) for twin in twins.values()]
    tasks = ("forward", "pages/s"), ("forward + backward", "samples/s")
    for (task, unit), own, check, *plain in zip(tasks, contenders[0], work(ours, pages[:few]), *contenders[1:]):
        error = f"{relative_error(check(), plain[0]()):.0e}"
        own_speeds, *speeds = race(repetitions, (own, size), *[(f, few) for f in plain])
        for twin, twin_speeds in zip(twins, speeds):
            yield f"{task}, {name}, {level} play{twin}", *compared(own_speeds, twin_speeds, unit), error
            if policy.config.n_layer > 1:
                own_scores, twin_scores = attention_scores(policy, pages[:size])
                share = np.median(own_speeds) * own_scores * (1 if task == "forward" else 2) / exponentials(policy.device)
                billions = compared(own_speeds * own_scores / 1e9, twin_speeds * twin_scores / 1e9, "G/s")
                yield "  in attention scores computed", *billions, f"{share:.0%} of limit" if share else ""


def attention_scores(policy, pages):
    """How many a forward pass computes per page, ours and the plain one."""
    reader, config = reader_of(policy), policy.config
    levels = reader.batch(reader.encode(pages)).levels
    of_level = lambda n, sections: n * SECTION * (SECTION * (sections - 1) + (SECTION + 1) / 2)
    ours = (config.n_layer - 1) * sum(of_level(*level.children.shape) for level in levels) + len(levels[-1].children) * POSITIONS
    return config.n_head * ours / len(pages), config.n_layer * config.n_head * POSITIONS * (POSITIONS + 1) / 2


def exponentials(device):
    """How many a GPU can compute in a second, which bounds a softmax whose heads are small: 16 per clock and multiprocessor (CUDA
    C++ Programming Guide, throughput of native arithmetic instructions). Infinite where no such limit is known.

    A backward pass computes the exponentials of the forward pass once more.
    """
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return properties.multi_processor_count * 16 * properties.clock_rate * 1e3 if hasattr(properties, "clock_rate") else np.inf


def relative_error(ours, plain):
    """The largest norm of a difference of two tensors, by the norm of the plain one."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, plain) if b is not None)


def training_table(policy, args):
    steps_per_second, peak = training(args.num_steps, policy.device)
    steps, seconds, parts = split(policy, SPLIT_STEPS)
    rows = [
        (f"end to end, a whole training of {args.num_steps:,} steps", speed(steps_per_second, "steps/s")),
        ("peak memory of its larger process", f"{peak:.2f} GB"),
        (f"end to end, {steps:,} steps of learned play", speed(steps / seconds, "steps/s")),
        *((f"  {part}", f"{100 * share / seconds:.1f} %") for part, share in parts.items()),
    ]
    return "training, default constants, evaluations and observers included", ("what", ""), rows


def training(num_steps, device):
    """`python train_ppo.py --num_steps ...` -> end-to-end steps per second by its own clock, the last evaluation included, and
    the peak memory of the larger of its two processes in GB."""
    with tempfile.TemporaryDirectory() as folder:
        options = "--num_steps", str(num_steps), "--device", str(device), "--run_dir", f"{folder}/run"
        command = sys.executable, "-c", PEAK_OF, sys.executable, ROOT / "train_ppo.py", *options
        peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) * (1 if sys.platform == "darwin" else 1024)
        last = load_checkpoint(Path(folder) / "run")
    return last["global_step"] / last["seconds"], peak / 1e9


def split(policy, num_steps):
    """The long middle of a training: the trained policy goes on at a learning rate that leaves it as it is, for whole intervals
    between evaluations, about num_steps -> steps, seconds, and the seconds of each part. There is no last evaluation to wait for."""
    interval, silence = EVAL_INTERVAL * ROLLOUT_STEPS * NUM_ENVS, io.StringIO()
    constants = SimpleNamespace(**CONSTANTS | {"NUM_STEPS": 10**12, "LR": 1e-9, "MIN_LR": 1e-9})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        trainer = build(constants, Path(folder), policy.device)
        trainer.policy.load_state_dict(policy.state_dict())
        learn_until(trainer, interval)  # warm up
        with clocks(trainer) as parts:
            _, seconds = timed(learn_until, trainer, interval + max(num_steps // interval, 1) * interval)
    return trainer.global_step - interval, seconds, parts | {"rest": seconds - sum(parts.values())}


def learn_until(trainer, step):
    class Stop(Callback):
        def on_update_end(self, ppo):
            if ppo.global_step >= step:
                ppo.request_stop()

    trainer.stop_requested = False
    trainer.callbacks.append(Stop())
    with contextlib.suppress(ppo.StopTraining):
        trainer.learn()
    trainer.callbacks.pop()


@contextlib.contextmanager
def clocks(trainer):
    """Gives a dict of the seconds that each part of the loop takes. Of calls within calls the outermost counts."""
    reader, running = type(reader_of(trainer.policy)), []
    if isinstance(trainer, PPOOnDevice):
        rollout = (("rollout, with GAE", trainer, "collect"),)
    else:
        rollout = (
            ("game", trainer.env, "step"),
            ("game", trainer.env, "twin"),
            ("game", trainer.env, "twins_agree"),
            ("forward", ppo, "reader_of"),
            ("forward", reader, "encode"),
            ("forward", reader, "__call__"),
            ("prediction targets", ppo, "changed_rows_and_columns"),
            ("buffer.add", trainer.buffer, "add"),
            ("GAE", trainer.buffer, "finish"),
        )
    methods = (
        *rollout,
        ("update", trainer, "update"),
        ("evaluations: waiting, files", trainer, "finish_evaluations"),
        ("observers", trainer, "emit"),
    )
    parts = {part: 0.0 for part, *_ in methods}

    def clocked(part, f):
        def run(*args, **kwargs):
            if running:
                return f(*args, **kwargs)
            running.append(part)
            result, seconds = timed(f, *args, **kwargs)
            parts[running.pop()] += seconds
            return result

        return run

    with contextlib.ExitStack() as stack:
        for part, owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, clocked(part, getattr(owner, name))))
        yield parts


def games_table(policy, args):
    rows = []
    for num_envs in (1, 4, 16, 64, 256, 1024, 4096):
        env, rng = BreakoutAsciiVec(num_envs, varied_starts=VARIED_STARTS), np.random.default_rng(0)
        env.reset(seed=0)
        for actions in rng.integers(3, size=(SPREAD_STEPS, num_envs)):
            env.step(actions)
        game, forward = zip(*(rollout_speeds(policy, env) for _ in range(args.repetitions)))
        rows.append((f"{num_envs:,}", speed(game, "steps/s"), speed(forward, "pages/s")))
    return "cost as games grow, greedy play, one layer", ("games", "game", "forward"), rows


def rollout_speeds(policy, env):
    """A greedy rollout, its reader made anew as `collect` does -> steps/s of the game, pages/s from tokens to actions."""
    (reader, reading), playing, obs = timed(reader_of, policy), 0.0, env.observation()
    for _ in range(ROLLOUT_STEPS):
        actions, seconds = timed(greedy, reader, obs)
        reading += seconds
        (obs, *_), seconds = timed(env.step, actions)
        playing += seconds
    return ROLLOUT_STEPS * env.num_envs / playing, ROLLOUT_STEPS * env.num_envs / reading


def layers_table(policy, args):
    policies = [deep_policy(n, policy.device) for n in range(1, 7)]
    pages = [training_pages(policy, "random", reader_of(deep).neighbours) for deep in policies]
    rows = [(str(n), *backward_cells(*case, args.repetitions)) for n, case in enumerate(zip(policies, pages), start=1)]
    return "cost as layers grow: forward + backward, C = 96, 6 heads, random play", ("layers", "ours", "twin", "ratio"), rows


def backward_cells(policy, pages, repetitions):
    size, few = batch_sizes(policy)
    (_, ours), (_, plain) = work(sped_up(policy), pages[:size]), work(policy, pages[:few], plain=True)
    return compared(*race(repetitions, (ours, size), (plain, few)), "samples/s")


def changes_table(policy, args):
    rng, rows = np.random.default_rng(0), []
    for share in (0, 0.001, 0.01, 0.1, 1):
        pages = training_pages(policy, "middling").copy()
        changed = rng.random(pages.shape) < share
        changed[:, -1] = False  # the last character stays the newline
        pages[changed] = rng.choice(list(CHARACTERS.encode()), size=changed.sum())
        rows.append((f"{100 * share:g} %", *backward_cells(policy, pages, args.repetitions)))
    title = "cost as the share of changed characters grows: forward + backward, one layer, middling play"
    return title, ("changed", "ours", "twin", "ratio"), rows


TABLES = {1: speed_table, 2: training_table, 3: games_table, 4: layers_table, 5: changes_table}


def show(table, title, header, rows):
    print(f"\nTable {table}: {title}\n")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip(), flush=True)


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES), help="default all")
    parser.add_argument("--repetitions", type=positive, default=5, help="of every timing but those of table 2 (default 5)")
    parser.add_argument("--num_steps", type=positive, default=NUM_STEPS, help=f"of the training in table 2 (default {NUM_STEPS})")
    parser.add_argument("--device", default="auto", help="default auto: CUDA if it works, else the CPU")
    args = parser.parse_args()
    try:
        check(CONSTANTS | {"NUM_STEPS": args.num_steps})
        device = choose_device(args.device)
    except CommandLineError as error:
        parser.error(str(error))
    policy, _ = load_policy(SHIPPED, device)
    set_threads(policy.config.n_layer)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__} on {where}, {torch.get_num_threads()} threads, Python {platform.python_version()}")
    for table in sorted(set(args.tables)):
        show(table, *TABLES[table](policy, args))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
