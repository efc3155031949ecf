"""Measure speed beside a plain baseline:  python -m benchmarks.throughput [--tables 1 2 3 4 5]

Table 1  speed of the game and of the GPT beside plain baselines
Table 2  speed of a training from end to end, and where its time goes
Table 3  speed of rollouts, for more and more games
Table 4  speed of the GPT, for more and more layers
Table 5  speed of the GPT, for pages with more and more random characters

The game's plain baseline is one Python object for each game, which draws its page character by character. The GPT's
is `model.GPT` with the same weights, with every token in every block, in float32. Ours and the baseline run by turns.
A speed is the median of the repetitions, and a ratio the median of their ratios. On CUDA ours is compiled. Deeper
models run in bf16 there too, and have a second baseline that is compiled and runs in bf16. All GPTs read the pages of
one minibatch, which is made from a rollout as in training.
"""

import harness.start  # before the slow imports

import contextlib
import copy
import functools
import io
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from benchmarks.slow_game import SlowGame
from breakout_ascii import CHARACTERS, BreakoutAsciiVec
from evaluation import sampling
from fast.cuda_graphs import ShortcutFailed
from fast.line_index import LineIndex
from harness.checkpoint import load_checkpoint
from harness.device import choose_device, set_threads
from harness.options import CommandLineError, Parser, within
from harness.runs import ROOT
from harness.supervise import StopTraining, begin, run_script
from harness.tables import show_table
from model import GPT, GPTConfig
from policies import SHIPPED, load_policy, make_gpt
from rollout_buffer import random_order, select
from train_ppo import CONSTANTS, build, check, evaluation_of, watch

C = SimpleNamespace(**CONSTANTS)
RANDOM_ACTIONS = {"random": 1.0, "middling": 0.5, "expert": 0.0}  # their share in each level of play
SPREAD_STEPS = 500  # steps that spread new games over all their phases
SPLIT_STEPS = 400_000  # environment steps in which table 2 finds where the time goes
GAMES = (2, 8, 32, 128, 512, 2048)  # in table 3
DEEP = {"n_layer": 6, "n_embd": 96, "n_head": 6, "mlp_expansion": 1}  # the size of the public attempt
SPEED = "what", "ours", "plain baseline", "ratio", "relative error"  # the columns of most tables
# This program prints the peak memory of its children. It is a process of its own, because a child's peak includes the
# memory that its parent held when it started.
PEAK_OF = """import resource, signal, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: process.terminate())
if status := process.wait():
    sys.exit(status)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""

# --- timing -----------------------------------------------------------------------------------------------------------


def timed(f, *args, **kwargs):
    """Call f(*args, **kwargs). Returns its result, and the seconds it took."""
    wait_for_gpu()
    start = time.perf_counter()
    result = f(*args, **kwargs)
    wait_for_gpu()
    return result, time.perf_counter() - start


def wait_for_gpu():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def race(repetitions, *contenders):
    """Run contenders by turns. Each is a pair of a function and the number of samples that a call takes.

    Returns samples per second, (contenders, repetitions).
    """
    for f, _ in contenders:
        f()  # warm up
    return np.array([[samples / timed(f)[1] for f, samples in contenders] for _ in range(repetitions)]).T


def speed(speeds, unit):
    """Return the median of speeds (repetitions,) as text."""
    return f"{number(np.median(speeds))} {unit}"


def compared(ours, plain, unit):
    """Return the cells "ours", "plain baseline" and "ratio" for the speeds (repetitions,) of both."""
    return speed(ours, unit), speed(plain, unit), number(np.median(ours / plain))


def number(x):
    """Return a number as text, with three significant digits or all before the point."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:,.1f}" if x >= 10 else f"{x:,.2f}"


def relative_error(ours, plain):
    """Return the largest relative error of our tensors: the norm of the difference by the norm of the plain tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, plain) if b is not None)


# --- pages and models -------------------------------------------------------------------------------------------------


@functools.cache
def training_pages(policy, level, group_size=1):
    """Return a minibatch (BATCH_SIZE, 1944) as training draws it from a rollout in which the policy plays."""
    env = BreakoutAsciiVec(C.NUM_ENVS, varied_starts=C.VARIED_STARTS)
    rng = np.random.default_rng(0)
    index = LineIndex(policy.config)
    player = sampling(policy, seed=0)
    obs, _ = env.reset(seed=0)
    pages = []
    lines = []
    for step in range(SPREAD_STEPS + C.ROLLOUT_STEPS):
        if step == SPREAD_STEPS and C.PAIRED_ENVS:
            obs = env.pair()
        if step >= SPREAD_STEPS:
            pages.append(obs)
            lines.append(index.encode(obs))
        actions = rng.integers(3, size=C.NUM_ENVS)
        at_random = rng.random(C.NUM_ENVS) < RANDOM_ACTIONS[level]
        obs, *_ = env.step(actions if at_random.all() else np.where(at_random, actions, player(obs)))
    order = random_order(torch.from_numpy(np.concatenate(lines)), group_size, torch.Generator().manual_seed(0))
    return np.concatenate(pages)[order[: C.BATCH_SIZE]]


def as_trained(policy):
    """Return a copy of a policy, which on CUDA is compiled as in training."""
    policy = copy.deepcopy(policy)
    if policy.device.type == "cuda" and policy.config.n_layer == 1:
        policy.features = torch.compile(policy.features, fullgraph=True)
    elif policy.device.type == "cuda":
        policy.compile_blocks = True
        policy.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return policy


def plain_gpt(policy, strengthened=False):
    """Return a GPT that puts every token through every block. strengthened: whether it is compiled and in bf16."""
    gpt = GPT(policy.config).to(policy.device)
    gpt.load_state_dict(policy.state_dict())
    if strengthened:
        gpt.features = torch.autocast(gpt.device.type, torch.bfloat16)(torch.compile(gpt.features))
    return gpt


def batch_sizes(policy):
    """Return how many pages ours and the plain baseline read at a time."""
    cuda = policy.device.type == "cuda"
    ours = C.BATCH_SIZE if cuda or policy.config.n_layer == 1 else 32
    return ours, 32 if cuda else 2  # more are slower on a CPU


def functions_to_time(gpt, pages):
    """Return two functions without arguments.

    Returns:
        forward: reads the pages, and returns (logits,).
        forward_backward: starts from the encoded pages, as an update does, and returns the gradients of a loss.
    """
    tokens = torch.from_numpy(pages).to(gpt.device)
    minibatches = gpt.prepare_minibatches(gpt.encode(pages).unsqueeze(0))
    kept = select(minibatches, torch.tensor([0], device=gpt.device))

    @torch.no_grad()
    def forward():
        return gpt(tokens)[:1]

    def forward_backward():
        logits, values = gpt.heads(gpt.features(kept))
        loss = logits.square().sum() + values.square().sum()
        return torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True)

    return forward, forward_backward


# --- the tables -------------------------------------------------------------------------------------------------------

# Each of these functions returns a title, the header and the rows.


def speed_table(policy, args):
    rows = [game_row(args.repetitions)]
    deep = make_gpt(GPTConfig(**asdict(policy.config) | DEEP), policy.device)
    for level in RANDOM_ACTIONS:
        rows += model_rows(f"one layer, {level} play", policy, training_pages(policy, level), args.repetitions)
        deep_pages = training_pages(policy, level, deep.group_size)
        rows += model_rows(f"six layers, {level} play", deep, deep_pages, args.repetitions)
    return "speed", SPEED, rows


def game_row(repetitions, num_envs=256, num_plain=4, steps=500):
    """Return the row of the game, with random actions.

    The plain baseline plays the first few games too, and all of its pages are compared.
    """
    env = BreakoutAsciiVec(num_envs)
    rng = np.random.default_rng(0)
    speeds = []
    differing = 0
    env.reset(seed=0)
    wall = env.games.bricks[0].copy()
    games = [SlowGame(serves, wall) for serves in env.games.serves[:num_plain]]

    def play(actions):
        return [(env.step(a)[0][:num_plain].copy(), env.games.serves[:num_plain].copy()) for a in actions]

    def play_plain(actions, played):
        for a, (_, serves) in zip(actions, played):
            for i in range(num_plain):
                _, over, _ = games[i].step(a[i])
                if over:
                    games[i] = SlowGame(serves[i], wall)
                yield games[i].page()

    for actions in rng.integers(3, size=(repetitions, steps, num_envs)):
        played, ours = timed(play, actions)
        text, plain = timed("".join, play_plain(actions, played))
        speeds.append((num_envs * steps / ours, num_plain * steps / plain))
        pages = np.stack([pages for pages, _ in played]).tobytes()
        differing += sum(a != b for a, b in zip(pages, text.encode(), strict=True))
    error = f"{differing:,} characters" if differing else "equal"
    return f"game, {num_envs} games on one core, pages included", *compared(*np.array(speeds).T, "steps/s"), error


def model_rows(label, policy, pages, repetitions):
    """Yield the rows of the GPT: forward, and forward + backward, beside each baseline."""
    if policy.device.type == "cuda":
        torch.compiler.reset()  # because torch compiles a function at most eight times
    size, few = batch_sizes(policy)
    ours = as_trained(policy)
    baselines = {"": plain_gpt(policy)}
    if policy.device.type == "cuda" and policy.config.n_layer > 1:
        baselines[", baseline in bf16, compiled"] = plain_gpt(policy, strengthened=True)
    tasks = ("forward", "pages/s"), ("forward + backward", "samples/s")
    own_functions = functions_to_time(ours, pages[:size])
    own_on_few_pages = functions_to_time(ours, pages[:few])
    plain_functions = [functions_to_time(gpt, pages[:few]) for gpt in baselines.values()]
    for (task, unit), own, own_few, *plain in zip(tasks, own_functions, own_on_few_pages, *plain_functions):
        error = f"{relative_error(own_few(), plain[0]()):.0e}"
        own_speeds, *speeds = race(repetitions, (own, size), *[(f, few) for f in plain])
        for baseline, plain_speeds in zip(baselines, speeds):
            yield f"{task}, {label}{baseline}", *compared(own_speeds, plain_speeds, unit), error


def training_table(policy, args):
    steps_per_second, peak = training(args.num_steps, policy.device)
    steps, seconds, parts = seconds_of_parts(policy, SPLIT_STEPS)
    rows = [
        (f"end to end, a whole training of {args.num_steps:,} steps", speed(steps_per_second, "steps/s")),
        ("peak memory of its larger process", f"{peak:.2f} GB"),
        (f"end to end, {steps:,} steps of learned play", speed(steps / seconds, "steps/s")),
        *((f"  {part}", f"{100 * share / seconds:.1f} %") for part, share in parts.items()),
    ]
    return "training, default constants, evaluations and callbacks included", ("what", ""), rows


def training(num_steps, device):
    """Run train_ppo.py.

    Returns:
        its steps per second by its own clock, the last evaluation included
        the peak memory of the larger of its processes, in GB
    """
    with tempfile.TemporaryDirectory() as folder:
        options = "--num_steps", str(num_steps), "--device", str(device), "--run_dir", f"{folder}/run"
        command = sys.executable, "-c", PEAK_OF, sys.executable, ROOT / "train_ppo.py", *options
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            printed, _ = process.communicate()
        finally:
            process.terminate()
            process.wait()  # after Ctrl-C until the training, which saves, has ended
        if process.returncode:
            raise CommandLineError(f"the training has ended with status {process.returncode}; its reason stands above")
        peak = int(printed) * (1 if sys.platform == "darwin" else 1024)
        last = load_checkpoint(Path(folder) / "run")
    return last["global_step"] / last["seconds"], peak / 1e9


def endless_trainer(policy, **constants):
    """Return a trainer of train_ppo.py that leaves the policy's weights as they are, and its constants.

    The learning rate is nearly 0, and num_steps is never reached.
    """
    size = {name: getattr(policy.config, name.lower()) for name in ("N_LAYER", "N_HEAD", "N_EMBD", "MLP_EXPANSION")}
    c = SimpleNamespace(**vars(C) | size | {"NUM_STEPS": 10**12, "LR": 1e-9, "MIN_LR": 1e-9} | constants)
    trainer = build(c, policy.device)
    trainer.policy.load_state_dict(policy.state_dict())
    return trainer, c


def seconds_of_parts(policy, num_steps):
    """Train a trained policy for about num_steps, and time the parts of the training.

    It trains for whole intervals between evaluations, without the last evaluation.

    Returns:
        the steps, the seconds, and the seconds of each part as a dict
    """
    interval = C.EVAL_INTERVAL * C.ROLLOUT_STEPS * C.NUM_ENVS
    silence = io.StringIO()
    trainer, c = endless_trainer(policy)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        evaluation = evaluation_of(c, policy.device)
        trainer.callbacks = watch(trainer, c, Path(folder), evaluation)
        begin(trainer, Path(folder))
        learn_until(trainer, interval)  # warm up
        with clocks(trainer, evaluation) as parts:
            _, seconds = timed(learn_until, trainer, interval + max(num_steps // interval, 1) * interval)
        for callback in trainer.callbacks:
            callback.close()
    return trainer.global_step - interval, seconds, parts | {"rest": seconds - sum(parts.values())}


def learn_until(trainer, step):
    """Train until the trainer has done this many environment steps."""

    def stop_together():  # which `learn` calls before every update
        if trainer.global_step >= step:
            raise StopTraining

    with mock.patch.object(trainer, "stop_together", stop_together), contextlib.suppress(StopTraining):
        trainer.learn()


@contextlib.contextmanager
def clocks(trainer, evaluation):
    """Yield a dict that counts the seconds of each part of a training, without those of other parts that it calls."""
    policy = trainer.policy
    env = trainer.env
    buffer = trainer.buffer
    if trainer.env_can.on_device:
        rollout = [("rollout", trainer, "collect")]  # its steps may be one CUDA graph, whose parts no clock can see
    else:
        rollout = [
            ("game", env, "step"),
            ("game", env, "pair"),
            ("game", env, "in_sync"),
            ("forward", policy, "encode"),
            ("forward", policy, "inference_function"),
            ("prediction targets", policy, "changes"),
            ("buffer.add", buffer, "add"),
            ("GAE", buffer, "finish"),
        ]
    rest = (
        ("update", trainer, "update"),
        ("evaluations", evaluation, "on_update_end"),
        ("other callbacks", trainer, "emit"),
    )
    methods = (*rollout, *rest)
    parts = {part: 0.0 for part, *_ in methods}
    inner = []  # for each part that is running, the seconds of the parts that it has called

    def clocked(part, f):
        def run(*args, **kwargs):
            inner.append(0.0)
            result, seconds = timed(f, *args, **kwargs)
            parts[part] += seconds - inner.pop()
            if inner:
                inner[-1] += seconds
            # The function that `inference_function` returns is a part of the forward pass too.
            return clocked(part, result) if callable(result) else result

        return run

    with contextlib.ExitStack() as stack:
        for part, owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, clocked(part, getattr(owner, name))))
        yield parts


def games_table(policy, args):
    rows = []
    for num_envs in GAMES:
        trainer, _ = endless_trainer(policy, NUM_ENVS=num_envs)
        for _ in range(-(-SPREAD_STEPS // C.ROLLOUT_STEPS)):
            trainer.collect()
        seconds = np.array([timed(trainer.collect)[1] for _ in range(args.repetitions)])
        rows.append((f"{num_envs:,}", speed(num_envs * C.ROLLOUT_STEPS / seconds, "steps/s")))
    return "speed of rollouts for more and more games: learned play", ("games", "speed"), rows


def layers_table(policy, args):
    rows = []
    for n in range(1, 7):
        gpt = make_gpt(GPTConfig(**asdict(policy.config) | DEEP | {"n_layer": n}), policy.device)
        pages = training_pages(policy, "random", gpt.group_size)
        rows += model_rows(f"{n} layers", gpt, pages, args.repetitions)
    return "speed for more and more layers: C = 96, 6 heads, random play", SPEED, rows


def changes_table(policy, args):
    rng = np.random.default_rng(0)
    rows = []
    for share in (0, 0.001, 0.01, 0.1, 1):
        pages = training_pages(policy, "middling").copy()
        changed = rng.random(pages.shape) < share
        changed[:, -1] = False  # the last character stays the newline
        pages[changed] = rng.choice(list(CHARACTERS.encode()), size=changed.sum())
        rows += model_rows(f"{100 * share:g} % changed", policy, pages, args.repetitions)
    return "speed for more and more random characters: middling play", SPEED, rows


TABLES = {1: speed_table, 2: training_table, 3: games_table, 4: layers_table, 5: changes_table}


def show(table, title, header, rows):
    print(f"\nTable {table}: {title}\n")
    if sys.stdout.isatty():
        show_table([dict(zip(header, row)) for row in rows])
        return
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip(), flush=True)


def main(argv=()):
    parser = Parser("-m benchmarks.throughput", __doc__)
    parser.add_argument(
        "--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES), metavar="N", help="default all"
    )
    parser.add_argument(
        "--repetitions", type=within("[1, inf)"), default=5, help="timings of each row, except in table 2 (default 5)"
    )
    parser.add_argument(
        "--num_steps", type=int, default=C.NUM_STEPS, help=f"of the training in table 2 (default {C.NUM_STEPS})"
    )
    parser.add_argument("--device", default="auto", help="default auto: CUDA if it works, else the CPU")
    args = parser.parse_args(argv)
    CONSTANTS.check({"NUM_STEPS": args.num_steps})
    check(C)
    device = choose_device(args.device)
    policy, _ = load_policy(SHIPPED, device)
    torch.manual_seed(0)  # of the deeper GPTs, which are untrained
    set_threads(policy.config.n_layer)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__} on {where}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    for table in sorted(set(args.tables)):
        try:
            show(table, *TABLES[table](policy, args))
        except ShortcutFailed as error:
            raise CommandLineError(f"table {table}: {error}") from None


if __name__ == "__main__":
    run_script(main, "-m benchmarks.throughput")
