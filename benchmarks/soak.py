"""Test whether a long training keeps its pace and leaks nothing:  python -m benchmarks.soak [--minutes 30]

A training with the constants of train_ppo.py runs in a process of its own, with its evaluations beside it. Once a
second this program reads how much memory and how many open files the training has. It prints these, and the steps per
second, for the second tenth of the time and for the last. The exit status is 1 if memory grew by more than 2 %, if
files stayed open, or if the pace fell by more than 10 %. This works on Linux only, because it reads /proc.
"""

import harness.start  # before the slow imports

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, within
from harness.runs import ROOT
from harness.supervise import run_script, start_program


def memory_and_files(pid):
    """Return how many megabytes a process has in memory, and how many files it has open."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def soak(minutes, arguments):
    """Train for so many minutes. Returns a list of (megabytes, open files), and the steps per second of each update."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_ppo.py", *arguments]
        command += ["--num_steps", 10**12, "--run_dir", f"{folder}/run"]
        process = start_program(command, stdout=subprocess.DEVNULL)
        samples = []
        end = time.monotonic() + 60 * minutes
        try:
            while time.monotonic() < end:
                time.sleep(1)
                if process.poll() is not None:
                    raise CommandLineError(
                        f"the training has ended with status {process.returncode}; its reason stands above"
                    )
                samples.append(memory_and_files(process.pid))
        finally:
            process.terminate()
            process.wait()
        return samples, [row["steps_per_second"] for row in read_metrics(f"{folder}/run/metrics.csv")]


def ends(values):
    """Return the medians of the second tenth of the values and of the last."""
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[tenth : 2 * tenth] or values), statistics.median(values[-tenth:])


def main(argv=()):
    parser = Parser("-m benchmarks.soak", __doc__)
    parser.add_argument("--minutes", type=within("[0.01, 10_000.0]"), default=30.0, help="default 30")
    args, arguments = parser.parse_known_args(argv)
    samples, speeds = soak(args.minutes, arguments)
    if len(samples) < 2 or len(speeds) < 2:
        raise CommandLineError("too short to tell; give more --minutes")
    memory = ends([megabytes for megabytes, _ in samples])
    files = ends([open_files for _, open_files in samples])
    speed = ends(speeds)
    for name, (first, last), unit in (("memory", memory, "MB"), ("open files", files, ""), ("speed", speed, "steps/s")):
        print(f"{name:<10} {first:>12,.0f} -> {last:>12,.0f} {unit}")
    return int(memory[1] > 1.02 * memory[0] or files[1] > files[0] or speed[1] < 0.9 * speed[0])


if __name__ == "__main__":
    run_script(main, "-m benchmarks.soak")
