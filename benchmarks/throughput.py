"""How fast it is:  python benchmarks/throughput.py

One table, all of it from one run: the game, the one-layer GPT beside its plain path (every token through the whole
block), and training with the default constants. Speeds of game and GPT are medians of alternating repetitions; the
training is one run, evaluations and observers included.
"""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from breakout_ascii import BreakoutAsciiVec  # noqa: E402
from load_model import SHIPPED, load_policy  # noqa: E402
from model import LineIndex, set_threads  # noqa: E402
from train_ppo import BATCH_SIZE, NUM_ENVS, ROLLOUT_STEPS, VARIED_STARTS  # noqa: E402

PLAIN_PAGES = 4  # the plain path keeps 1944 x 1944 scores per head and page


def game_speed(num_envs=256, steps=1000):
    """Steps per second, frames included, random actions."""
    env, rng = BreakoutAsciiVec(num_envs), np.random.default_rng(0)
    actions = rng.integers(3, size=(steps, num_envs))
    env.reset(seed=0)
    start = time.perf_counter()
    for a in actions:
        env.step(a)
    return steps * num_envs / (time.perf_counter() - start)


def training_pages(policy, level):
    """A minibatch as training sees it, drawn from a rollout of varied games: (BATCH_SIZE, 1944) uint8."""
    env, rng = BreakoutAsciiVec(NUM_ENVS, varied_starts=VARIED_STARTS), np.random.default_rng(0)
    reader, (obs, _), pages = policy.reader(), env.reset(seed=0), []
    for step in range(500 + ROLLOUT_STEPS):  # the first steps spread the games over all their phases
        if step >= 500:
            pages.append(obs)
        actions = reader(reader.encode(obs))[0].argmax(-1).numpy() if level == "expert" else rng.integers(3, size=NUM_ENVS)
        obs, *_ = env.step(actions)
    return rng.permutation(np.concatenate(pages))[:BATCH_SIZE]


def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def model_rows(policy, level, repetitions):
    """Pages per second, shared and plain, and the largest relative error of the shared path; one list per column."""
    pages = training_pages(policy, level)
    tokens, few = torch.from_numpy(pages), torch.from_numpy(pages[:PLAIN_PAGES])
    index = LineIndex()
    numbers = index.encode(pages)

    def backward(features):
        policy.zero_grad()
        features.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    no_grad = torch.no_grad()
    work = {
        "forward from tokens": (no_grad(lambda: policy.features(tokens)), no_grad(lambda: policy.read_every_token(few, plain=True))),
        "forward + backward": (lambda: backward(policy.features(index.tree(numbers))),
                               lambda: backward(policy.read_every_token(few, plain=True))),
    }  # fmt: skip
    with torch.no_grad():
        fast, plain = policy.features(few), policy.read_every_token(few, plain=True)
    errors = [((fast - plain).norm() / plain.norm()).item()]
    fast, plain = backward(policy.features(few)), backward(policy.read_every_token(few, plain=True))
    errors.append(((fast - plain).norm() / plain.norm()).item())
    for (name, (shared, every)), error in zip(work.items(), errors):
        shared(), every()
        pairs = [(BATCH_SIZE / seconds(shared), PLAIN_PAGES / seconds(every)) for _ in range(repetitions)]
        a, b = (statistics.median(x) for x in zip(*pairs))
        yield f"{name}, {level} play", f"{a:,.0f} pages/s", f"{b:.1f} pages/s", f"{statistics.median(x / y for x, y in pairs):,.0f}", f"{error:.0e}"


def training(num_steps):
    """`python train_ppo.py --num_steps ...` -> end-to-end steps per second by its own clock, peak memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_ppo.py", "--num_steps", str(num_steps), "--run_dir", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        header, *_, last = (Path(folder) / "run" / "metrics.csv").read_text().split("\n")[:-1]
        row = dict(zip(header.split(","), last.split(",")))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(row["global_step"]) / float(row["seconds"]), peak / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=500_000, help="of the training (default 500000)")
    args = parser.parse_args()
    policy, _ = load_policy(SHIPPED)
    set_threads(policy.config.n_layer)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, Python {platform.python_version()}\n")
    rows = [("", "ours", "plain", "ratio", "relative error")]
    speed = statistics.median(game_speed() for _ in range(args.repetitions))
    rows.append(("game, 256 games on one core, frames included", f"{speed:,.0f} steps/s", "", "", ""))
    for level in ("random", "expert"):
        rows += model_rows(policy, level, args.repetitions)
    speed, peak = training(args.num_steps)
    rows.append(("training, default constants, evaluations included", f"{speed:,.0f} steps/s", "", "", ""))
    rows.append(("peak memory of that training", f"{peak:.2f} GB", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main()
