"""Time the first update of a training on a GPU, part by part:  python -m benchmarks.first_update

The first update of every training on a GPU compiles, records CUDA graphs and compares its results with the CPU's. This
program makes it, and some updates more. It prints the seconds of each part, without those of the parts within it and
in the order in which they begin, then the results of the checks, and the speed of the later updates. It takes the
constants of train_ppo.py, such as --n_layer 6. With --device cpu the CPU does what a GPU would do, slowly, so add
--num_envs 16 --rollout_steps 16 --batch_size 64.

The first calls of both steps stand by themselves. With all shortcuts and one layer, the rollout's step is compiled in
its second call and recorded after its third, and the gradient's step is compiled in its first call and recorded after
its third.
"""

import harness.start  # before the slow imports

import contextlib
import json
import statistics
import time
import warnings
from types import SimpleNamespace

import torch

from benchmarks.gpu_checks import gpu_training
from benchmarks.throughput import wait_for_gpu
from fast.cuda_graphs import BF16, COMPILE, GRAPHS, GraphRunner
from fast.gpu_training import GPURunner
from harness.device import choose_device, gpu_name, set_threads
from harness.files import atomic_write
from harness.options import CommandLineError, Parser, given_path, within
from harness.runs import read_run
from harness.supervise import memory_advice, run_script
from harness.tables import show_table
from ppo import PPO
from train_ppo import CONSTANTS, KEPT, check

SHORTCUTS = {"compile": COMPILE, "graphs": GRAPHS, "bf16": BF16}


class Stopwatch:
    """Adds up the seconds of parts, each without those of the parts within it."""

    def __init__(self):
        self.seconds = {}
        self.inner = [0.0]  # for each part that is running, the seconds of the parts within it

    @contextlib.contextmanager
    def part(self, name):
        wait_for_gpu()
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        self.inner.append(0.0)
        try:
            yield
        finally:
            wait_for_gpu()
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self.inner.pop()
            self.inner[-1] += elapsed


class TimedRunner(GPURunner):
    """Times the parts of an update: the checks, and the first calls of both steps."""

    CALLS = GraphRunner.WARM_UP + 1  # that stand by themselves; in the last of them a graph is first replayed

    def __init__(self, shortcuts=None, without=()):
        """
        Args:
            shortcuts: as in `GPURunner`.
            without: those that are not taken nevertheless.
        """
        super().__init__(shortcuts)
        self.watch = Stopwatch()
        self.without = without

    def attach(self, ppo):
        super().attach(ppo)
        self.shortcuts = [shortcut for shortcut in self.shortcuts if shortcut not in self.without]
        self.wrap_functions()

    def wrap_functions(self):
        super().wrap_functions()
        self.rollout_step = self.timed("step of the rollout", self.rollout_step)
        self.train_step = self.timed("step of the gradient", self.train_step)

    def timed(self, name, step):
        calls = 0

        def call():
            nonlocal calls
            calls += 1
            if calls > self.CALLS:  # the many replays are not waited for one by one
                return step()
            with self.watch.part(f"{name}, call {calls}"):
                step()

        return call

    def check_before(self):
        with self.watch.part("checks before"):
            super().check_before()

    def checked_update(self):
        with self.watch.part("checks after"):
            return super().checked_update()


class TimedPPO(PPO):
    """Times the two halves of an update."""

    def collect(self):
        with self.runner.watch.part("rest of the rollouts"):
            super().collect()

    def update(self):
        with self.runner.watch.part("rest of the gradient steps"):
            return super().update()


def measure(ppo, updates):
    """Make the first update and some more. Returns what `main` writes, except for what it knows itself."""
    runner = ppo.runner
    first = runner.watch
    ppo.keep_snapshot()
    with warnings.catch_warnings(record=True) as caught:
        ppo.collect_and_update()
    speeds = []
    runner.watch = Stopwatch()
    for _ in range(updates):
        ppo.keep_snapshot()
        start = time.perf_counter()
        ppo.collect_and_update()
        wait_for_gpu()
        speeds.append(ppo.samples_per_update / (time.perf_counter() - start))
    return {
        "shortcuts": runner.shortcuts,
        "warnings": [str(warning.message) for warning in caught],
        "first update, s": sum(first.seconds.values()),
        "parts of it, s": first.seconds,
        "compiling": compile_times(),
        "checks": [result._asdict() | {"passed": result.passed} for result in runner.checks],
        "steps/s": statistics.median(speeds),
        "parts of a later update, s": {name: x / updates for name, x in runner.watch.seconds.items()},
        "memory, GB": torch.cuda.max_memory_reserved() / 1e9 if ppo.device.type == "cuda" else None,
    }


def compile_times():
    """Return the seconds that torch.compile has noted for its own parts, which contain each other, as a dict."""
    names, seconds = torch._dynamo.utils.compile_times(repr="csv", aggregate=True)
    return {name: float(x) for name, x in zip(names, seconds) if float(x) >= 0.01}


def show(result):
    """Print the tables of what `main` writes."""
    for title in ("before the first update, s", "parts of it, s", "parts of a later update, s"):
        show_table([{title: name, "seconds": round(x, 3)} for name, x in result[title].items()])
        print()
    show_table([{**check, "passed": "yes" if check["passed"] else "NO"} for check in result["checks"]])
    for line in result["warnings"]:
        print(f"\n{line}")
    print(f"\n{result['steps/s']:,.0f} steps/s in later updates, {result['device']}")


def main(argv=()):
    parser = Parser("-m benchmarks.first_update", __doc__)
    names = ", ".join(SHORTCUTS)
    parser.add_argument(
        "--without", nargs="+", choices=SHORTCUTS, default=[], metavar="NAME", help=f"shortcuts not to take: {names}"
    )
    parser.add_argument("--updates", type=within("[1, inf)"), default=3, help="after the first (default 3)")
    parser.add_argument("--json", type=given_path, help="a file to which all figures are written")
    args, rest = parser.parse_known_args(argv)
    run = read_run(rest, "-m benchmarks.first_update", __doc__, CONSTANTS, KEPT, check)
    if run.state:
        raise CommandLineError("measures a new training; leave out --resume")
    c = SimpleNamespace(**run.constants)
    before = Stopwatch()
    with before.part("start of the device"):
        device = choose_device(c.DEVICE)
    set_threads(c.N_LAYER)
    with memory_advice(f"this does not fit into the memory of {device}; try a smaller --batch_size or --n_embd"):
        with before.part("model, games and optimizer"):
            runner = TimedRunner(None if device.type == "cuda" else [], [SHORTCUTS[name] for name in args.without])
            ppo = gpu_training(c, device, runner, TimedPPO)
        result = {"device": gpu_name(device), "before the first update, s": before.seconds} | measure(ppo, args.updates)
    show(result)
    if args.json:
        atomic_write(args.json, json.dumps(result, indent=2).encode())


if __name__ == "__main__":
    run_script(main, "-m benchmarks.first_update")
