import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import load_model
import train_ppo
from algorithms.grid_search import TRAININGS, training
from breakout_ascii import BRICK_COLOURS
from harness.options import kind_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "algorithms" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"no-deps", "logdir", "index", "standalone", "nproc_per_node", "index-url"}  # options of other programs
ORIGINAL = {
    "NUM_STEPS": 4_000_000,
    "ROLLOUT_STEPS": 1024,
    "EPOCHS": 10,
    "GAMMA": 0.99,
    "LAMBD": 0.95,
    "EPS_CLIP": 0.2,
    "LR": 0.001,
}


def test_table_of_constants():
    """Names, and the original's values. Somebody who edits a default need not edit the page."""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| `(.*?)` \| (?:`(.*?)`)? *\|", (ROOT / "docs" / "constants.md").read_text(), re.M
    )
    assert [name for name, _, _ in rows] == list(train_ppo.CONSTANTS)
    assert all(
        type(ast.literal_eval(value)) is kind_of(name, train_ppo.CONSTANTS, train_ppo.RANGES) for name, value, _ in rows
    )
    assert {name: ast.literal_eval(original) for name, _, original in rows if original} == ORIGINAL


def test_what_the_pages_name_exists():
    """Links, files, and the options of our programs."""
    scripts = [
        ROOT / "load_model.py",
        ROOT / "viewer" / "terminal.py",
        ROOT / "tests" / "conftest.py",
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    scripts += (ROOT / "algorithms").rglob("*.py")
    constants = {name for program in TRAININGS for name in training(program).constants}
    sources = "".join(script.read_text() for script in scripts)
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text):
            assert any(
                (ROOT / folder / name).exists()
                for folder in (".", "fast", "harness", "viewer", "algorithms", "algorithms/parts")
            ), f"{page.name}: {name}"
        for option in set(re.findall(r"--([a-z][a-z_0-9]*(?:-[a-z]+)*)", text)) - {"resume", *OTHERS}:
            assert option.upper() in constants or f'"--{option}"' in sources, f"{page.name}: --{option}"


def lines_for_a_notebook():
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "runs.md").read_text(), re.M | re.S)
    return lines


def test_the_lines_for_a_notebook(tmp_path, monkeypatch, capsys):
    """The command line is the kernel's, and the main script has no guard: a process that ran it again would fail."""
    (tmp_path / "cell.py").write_text("raise RuntimeError('run again')")
    cell = types.ModuleType("__main__")
    cell.__file__ = str(tmp_path / "cell.py")
    monkeypatch.setitem(sys.modules, "__main__", cell)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(train_ppo, "NUM_STEPS", train_ppo.NUM_STEPS)  # restored at the end
    monkeypatch.chdir(tmp_path)
    exec(lines_for_a_notebook(), vars(cell))
    score = cell.exact(cell.policy)["score"]
    out = capsys.readouterr().out
    assert f"\n0 16384 {score}\n" in out and f"score {score:.1f}" in out and "warning" not in out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"] and (
        tmp_path / "first.gif"
    ).stat().st_size > 1000


FROM_ELSEWHERE = {
    "a script without a guard": ("script.py", "{lines}"),
    "input": ("-", "{lines}"),
    "a thread": (
        "-",
        "import threading\nthread = threading.Thread(target=exec, args=({lines!r}, globals()))\nthread.start()\nthread.join()",
    ),
    "a process that may have no others": (
        "script.py",
        """
import multiprocessing
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=exec, args=({lines!r}, {{"__name__": "cell"}}), daemon=True)
    process.start()
    process.join()
""",
    ),
    "the same twice": ("-", "for name in ('second', 'first'):\n    exec({lines!r}.replace('first', name))"),
}


@pytest.mark.faults
@pytest.mark.parametrize("place", FROM_ELSEWHERE)
def test_a_training_from(place, tmp_path):
    script, program = FROM_ELSEWHERE[place]
    program = program.format(lines=lines_for_a_notebook())
    (tmp_path / "script.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, "-f", "kernel.json"],
        input=program,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    results = re.findall(r"^0 16384 (.*)$", done.stdout, re.M)
    assert done.returncode == 0 and len(results) == (2 if "twice" in place else 1) and len(set(results)) == 1, (
        done.stderr
    )
    assert len(list((tmp_path / "runs").iterdir())) == len(results) and (tmp_path / "first.gif").exists()
    assert (
        done.stdout.count("warning: no evaluation beside") == ("no others" in place) and "Traceback" not in done.stderr
    )


def test_ci_runs_the_command_of_the_readme():
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", PAGES[0].read_text(), re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short_and_has_its_command_early():
    words = re.sub(
        r"^```.*?^```",
        lambda block: block[0] if "train_ppo.py" in block[0] else "",
        PAGES[0].read_text(),
        flags=re.M | re.S,
    ).split()
    assert len(words) <= 1000 and any("train_ppo.py" in word for word in words[:150])


def test_the_gif_of_the_readme_is_a_whole_game_that_clears_the_wall():
    def bricks(frame):
        return (np.array(frame.convert("RGB"))[..., None, :] == np.uint8(BRICK_COLOURS)).all(-1).any()

    with Image.open(ROOT / "images" / "gpt.gif") as gif:
        had_bricks = [
            bricks(frame)
            for i, frame in enumerate(ImageSequence.Iterator(gif))
            if i in (0, gif.n_frames - 2, gif.n_frames - 1)
        ]
    assert had_bricks == [True, True, False]


def test_messages_that_troubleshooting_explains_are_provoked():
    """A test expects each of them, up to the backslashes of regular expressions."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    others = {"externally-managed-environment", "No module named torch"}  # what Python and pip say
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")).replace("\\", "")
    leads = re.findall(r"^- \*\*(.*?)\*\*", page, re.M)
    messages = {message for lead in leads for message in re.findall("`([^-`][^`]*)`", lead)} - others
    assert len(messages) > 20
    for part in {part.strip() for message in messages for part in message.split("…")} - {""}:
        assert part in tests, f"no test provokes {part!r}"


def test_pages_name_the_versions_that_are_installed():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    named = {
        version for page in PAGES for version in re.findall(r"\b[a-z]+==[0-9.]+[0-9]", page.read_text(encoding="utf-8"))
    }
    assert named and named <= set(requirements)


def test_what_a_resumed_run_keeps_is_listed():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert (
        re.findall("`([A-Z_]+)`", re.search(r"you can change all but (.*?)\. To train", page, re.S)[1])
        == train_ppo.KEPT
    )


def test_what_measures_a_head_runs(monkeypatch, capsys):
    """With an evaluation that costs nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(load_model, "exact", lambda policy: {"score": policy.config.n_head})
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "heads.md").read_text(encoding="utf-8"), re.S)[1], {})
    assert capsys.readouterr().out.splitlines() == [f"{head} 16" for head in range(16)]
