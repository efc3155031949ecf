"""Measure on a GPU what one visit has time for:  python -m benchmarks.on_a_gpu [--minutes 10] [--out DIR]

one layer, cold           the first update, part by part, with an empty cache of compiled code; checks, and speed
one layer, warm           the same with what is in the cache then
one layer, not compiled   the same without torch.compile
training, cold            train_ppo.py with an empty cache: the seconds to each score
training, warm            the same with what is in the cache then, and another seed
six layers, N heads       the first update, checks and speed, with heads of 16, 32 and 48 dimensions
six layers, training      train_ppo.py with the fastest of these heads, for the time that is left

It prints one table, and writes on_a_gpu.json, logs and runs below --out. Started again with the same --out, perhaps on
another machine, it measures what is missing there, and goes on with the training of six layers. So several short visits
make one training. What fails or does not fit into the time has a row that says why.

Other options go to every part, such as --num_steps 1000000. Small sizes try it out without a GPU:
    python -m benchmarks.on_a_gpu --device cpu --num_envs 4 --rollout_steps 8 --batch_size 16 --num_steps 64
"""

import harness.start  # before the slow imports

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.learning import MARKS
from benchmarks.throughput import number
from harness.checkpoint import LAST
from harness.device import DeviceError, available_cores, choose_device, gpu_name
from harness.files import atomic_write
from harness.messages import one_line, say, shown
from harness.metrics_file import read_metrics
from harness.options import CommandLineError, Parser, given_path, within
from harness.runs import ROOT, read_run
from harness.supervise import run_script, start_program, stop_program
from harness.tables import show_table
from train_ppo import CONSTANTS, KEPT
from train_ppo import check as check_constants

RESULTS = "on_a_gpu.json"
UPDATE, TRAINING = ["-m", "benchmarks.first_update"], ["train_ppo.py"]  # the programs that measure
SIX_LAYERS = "--n_layer 6 --n_embd 96 --mlp_expansion 1".split()  # with 6 heads, the size of the public attempt
HEADS = (6, 3, 2)  # of 16, 32 and 48 dimensions
EVALUATIONS = "--eval_interval 16".split()  # of six layers, which train at a third of their speed meanwhile
GRACE = 20  # seconds in which a training that is told to stop has to save
RESERVE = 10  # seconds for the start and the end of this program
TO_A_SCORE = {f"{mark} points, s": mark for mark in MARKS}
COLUMNS = ["first update, s", "steps/s", *TO_A_SCORE, "best", "last", "steps", "process, s"]


class Failed(Exception):
    """A part has not been measured; the message is the reason, in one line."""


class Part(NamedTuple):
    """Something to measure."""

    name: str
    program: list[str]
    options: list[str]
    seconds: int  # it is skipped if less is left, and stopped when it has taken this long; an H100 needs half of it
    cache: str  # the name of its cache of compiled code, which is empty when a visit begins
    after: str = ""  # the part that has to fill this cache in the same visit
    goes_on: bool = False  # a training that every visit continues, for the time that is left

    def place(self, out):
        """Return the path below `out` of its files, without a suffix."""
        return out / re.sub(r"\W+", "_", self.name)


def first_parts():
    """Return all parts except the last."""
    sizes = [*SIX_LAYERS, "--updates", "2"]
    return [
        Part("one layer, cold", UPDATE, [], 100, "updates"),
        Part("one layer, warm", UPDATE, [], 50, "updates", after="one layer, cold"),
        Part("one layer, not compiled", UPDATE, ["--without", "compile"], 50, "updates"),
        Part("training, cold", TRAINING, ["--seed", "0"], 150, "trainings"),
        Part("training, warm", TRAINING, ["--seed", "1"], 100, "trainings", after="training, cold"),
        *(Part(f"six layers, {n} heads", UPDATE, [*sizes, "--n_head", str(n)], 100, "updates") for n in HEADS),
    ]


def last_part(results):
    """Return the training of six layers, with the heads that were fastest."""
    heads = max(HEADS, key=lambda n: results[f"six layers, {n} heads"].get("steps/s", 0))
    options = [*SIX_LAYERS, *EVALUATIONS, "--n_head", str(heads)]
    return Part("six layers, training", TRAINING, options, 60, "updates", goes_on=True)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """Measures parts, one after the other, until the time is over."""

    out: Path  # a directory for all that is kept
    caches: Path  # a directory for the caches of compiled code
    device: torch.device
    arguments: list[str]  # further options for every program
    end: float  # the time.monotonic() at which the last program is told to stop
    results: dict  # {name of a part: its figures}; "not measured" among them says why others are missing

    def measure_all(self):
        parts = first_parts()
        missing = [part for part in parts if "not measured" in self.results.get(part.name, {"not measured": ""})]
        before_them = [part.after for part in missing]
        for part in parts:
            if part in missing or part.name in before_them:
                self.measure(part)
        self.measure(last_part(self.results))

    def measure(self, part):
        """Measure a part and write what is known now. Only an interrupt stops the parts after it."""
        say(f"{part.name} ...")
        more = {"not measured": "interrupted"}
        try:
            more = self.run(part)
        except (Failed, OSError) as error:
            more = {"not measured": one_line(error)}
            say(f"  not measured: {more['not measured']}")
        finally:
            figures = of_training if part.program == TRAINING else of_update
            device = {"device": gpu_name(self.device), "CUDA": torch.version.cuda, "cores": available_cores()}
            self.results[part.name] = device | figures(part.place(self.out)) | more
            atomic_write(self.out / RESULTS, (json.dumps(self.results, indent=2) + "\n").encode())

    def run(self, part):
        """Run the program of a part. Returns what is known of the process. Raises Failed."""
        left = self.end - time.monotonic()
        if part.after and "not measured" in self.results[part.after]:
            raise Failed(f"its cache is not filled, because '{part.after}' was not measured")
        if left < part.seconds:
            raise Failed(f"needs {part.seconds} s and {max(left, 0):.0f} s are left; start again with this --out")
        limit = left if part.goes_on else part.seconds
        log = part.place(self.out).with_suffix(".log")
        seconds, status = self.run_program(self.command(part), log, limit, self.caches / part.cache)
        printed = log.read_text(encoding="utf-8", errors="replace")
        if part.goes_on and re.search(r"has done .* steps already", printed):
            return {"complete": reason_in(printed)}
        if status:
            raise Failed(reason_in(printed))
        if part.program == UPDATE:
            if status is None:
                raise Failed(f"took longer than {limit:.0f} s")
            say(printed)
        stopped = {} if status is not None or part.goes_on else {"stopped": f"after {limit:.0f} s"}
        return {"process, s": seconds, "warnings": re.findall(r"^.*\bgoing on with.*$", printed, re.M)} | stopped

    def command(self, part):
        """Return the words after `python` that run a part. What an earlier visit has left of it is deleted."""
        place = part.place(self.out)
        options = part.options
        if part.program == UPDATE:
            place.with_suffix(".json").unlink(missing_ok=True)
            where = ["--json", place.with_suffix(".json")]
        elif part.goes_on and (place / LAST).exists():
            where = ["--resume", place]
            options = []  # the run knows its own
        else:
            shutil.rmtree(place, ignore_errors=True)
            where = ["--run_dir", place]
        return [*part.program, *where, *options, "--device", self.device, *self.arguments]

    def run_program(self, command, log, limit, cache):
        """Run a program of ours until it ends, or for `limit` seconds.

        Returns the seconds, and its exit status, or None if it was stopped.
        """
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        start = time.monotonic()
        with open(log, "w", encoding="utf-8") as file:
            command = [sys.executable, *command]
            process = start_program(command, environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                stop(process)
        return time.monotonic() - start, status


def stop(process):
    """Let a program save and stop, if it is running, and kill it if that takes too long."""
    if process.poll() is None:
        stop_program(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        process.wait()


def reason_in(printed):
    """Return the line of a program's output that says why it has failed."""
    errors = re.findall(r"^Traceback.*\n(?:\s.*\n)*(\S.*)", printed, re.M)
    return [*errors[-1:], *reversed(printed.splitlines()), "it printed nothing"][0]


# --- figures ----------------------------------------------------------------------------------------------------------


def read_results(path):
    """Return the results that an earlier visit has written, or an empty dict. Raises CommandLineError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise CommandLineError(f"{path}: is damaged; move it away, or name another --out") from None


def of_update(place):
    """Return what benchmarks/first_update.py has written, or an empty dict."""
    file = place.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def of_training(place):
    """Return the figures of a run of train_ppo.py, or an empty dict before the end of its first update.

    A score counts from the end of the update whose model reached it, though its evaluation ended later.
    """
    rows = read_metrics(place / "metrics.csv")
    if not rows:
        return {}
    evaluated = [row for row in rows if math.isfinite(row["eval_score"])]
    figures = {"first update, s": rows[0]["seconds"]}
    for column, mark in TO_A_SCORE.items():
        figures[column] = next((row["seconds"] for row in evaluated if row["eval_score"] >= mark), None)
    if evaluated:
        figures |= {"best": max(row["eval_score"] for row in evaluated), "last": evaluated[-1]["eval_score"]}
    speed = statistics.median(row["steps_per_second"] for row in rows[1:] or rows)
    return figures | {"steps/s": speed, "steps": rows[-1]["global_step"], "seconds": rows[-1]["seconds"]}


def table_row(name, figures):
    """Return the row of a part. The JSON has more."""
    checks = [check["passed"] for check in figures.get("checks", [])]
    numbers = {column: figures.get(column) for column in COLUMNS}
    row = {column: f"{x:,}" if isinstance(x, int) else x and number(x) for column, x in numbers.items()}
    row["checks"] = f"{sum(checks)} of {len(checks)}" if checks else None
    ends = [f"{what}: {figures[what]}" for what in ("stopped", "complete", "not measured") if what in figures]
    remarks = [*figures.get("warnings", []), *ends]
    return {"part": name} | row | {"remarks": "; ".join(remarks) or None}


def main(argv=()):
    parser = Parser("-m benchmarks.on_a_gpu", __doc__)
    minutes = within("[0.1, 10_000.0]")
    parser.add_argument("--minutes", type=minutes, default=10.0, help="for all parts together (default 10)")
    parser.add_argument("--out", type=given_path, default="runs/on_a_gpu", help="default runs/on_a_gpu")
    parser.add_argument("--device", default="cuda", help="default cuda; cpu only with small sizes, to try it out")
    args, arguments = parser.parse_known_args(argv)
    end = time.monotonic() + 60 * args.minutes - GRACE - RESERVE
    # Wrong options are refused here, once, and not by every program.
    given = read_run(arguments, "-m benchmarks.on_a_gpu", __doc__, CONSTANTS, KEPT, check_constants)
    if given.directory or given.constants["RUN_DIR"]:
        raise CommandLineError("--resume and --run_dir are chosen by this program; give it --out")
    try:
        device = choose_device(args.device)
    except DeviceError as error:
        raise CommandLineError(f"{error} and small sizes, to try this program out") from None
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as caches:
        visit = Visit(out, Path(caches), device, arguments, end, read_results(out / RESULTS))
        try:
            visit.measure_all()
        finally:
            say(f"\n{gpu_name(device)}, CUDA {torch.version.cuda}\n")
            show_table([table_row(name, figures) for name, figures in visit.results.items()])
            say(f"\nall figures: {shown(out / RESULTS)}")
    return int(any("not measured" in figures for figures in visit.results.values()))


if __name__ == "__main__":
    run_script(main, "-m benchmarks.on_a_gpu")
