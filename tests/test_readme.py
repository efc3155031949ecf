"""The pages say what is true: their links, files, options, messages and programs are tried."""

import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import blocks_of_python, status_in
from PIL import Image, ImageSequence

import load_model
import train_ppo
from breakout_ascii import BRICK_COLOURS
from sweep import TRAININGS, find_training

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OTHER_PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "games" / "README.md",
    ROOT / "algorithms" / "README.md",
    ROOT / "pretrained" / "README.md",
]
PAGES = [README, *OTHER_PAGES, *sorted((ROOT / "docs").glob("*.md"))]
# Options of other programs than ours.
OTHERS = {"no-deps", "logdir", "standalone", "nproc_per_node", "index-url"}
# Values that the original write-up of the idea names.
ORIGINAL = {
    "NUM_STEPS": 4_000_000,
    "ROLLOUT_STEPS": 1024,
    "EPOCHS": 10,
    "GAMMA": 0.99,
    "LAMBD": 0.95,
    "EPS_CLIP": 0.2,
    "LR": 0.001,
}


def test_table_of_the_original_constants():
    """The page gives the original's values. Whoever edits a default here need not edit the page."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \| `.*?`.* \|$", page, re.M)
    assert {name: ast.literal_eval(original) for name, original in rows} == ORIGINAL
    assert ORIGINAL.keys() <= train_ppo.CONSTANTS.keys()


def anchors_of(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """Every link to a file of ours, and to a heading on one of our pages, is right."""
    for page in PAGES:
        for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / name if name else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {name}"
            assert not anchor or anchor in anchors_of(target), f"{page.relative_to(ROOT)}: {name}#{anchor}"


def test_programs_on_the_pages_exist():
    """Every `python FILE` lies at the top, and every `python -m MODULE` is a module of ours that can be run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\bpython ([a-z_/]+\.py)", text):
            assert (ROOT / name).exists() and "/" not in name, f"{page.relative_to(ROOT)}: python {name}"
        for name in re.findall(r"\bpython -m ([a-z_.]*[a-z_])", text):
            file = ROOT / f"{name.replace('.', '/')}.py"
            runs = name == "pytest" or file.exists() and "__main__" in file.read_text(encoding="utf-8")
            assert runs, f"{page.relative_to(ROOT)}: python -m {name}"


def test_files_and_options_on_the_pages_exist():
    """Every file of Python that a page names is somewhere, and every option is one of our programs'."""
    scripts = [
        ROOT / "load_model.py",
        ROOT / "sweep.py",
        ROOT / "viewer" / "terminal.py",
        ROOT / "tests" / "conftest.py",
    ]
    scripts += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "algorithms").rglob("*.py")]
    sources = "".join(script.read_text(encoding="utf-8") for script in scripts)
    constants = {name for program in TRAININGS for name in find_training(program).constants}
    folders = [ROOT / name for name in (".", "fast", "games", "harness", "viewer", "algorithms", "algorithms/parts")]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        ours, heading, table = text.partition("## Coming from\n")  # whose first column has the names of others
        text = ours + heading + re.sub(r"^\|[^|]*\|", "|", table, flags=re.M)
        for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text):
            assert any((folder / name).exists() for folder in folders), f"{page.relative_to(ROOT)}: {name}"
        for option in set(re.findall(r"--([a-z][a-z_0-9]*(?:-[a-z]+)*)", text)) - {"help", "resume", *OTHERS}:
            known = option.upper() in constants or f'"--{option}"' in sources
            assert known, f"{page.relative_to(ROOT)}: --{option}"


def lines_for_a_notebook():
    """Return the first program of the page about runs."""
    return blocks_of_python(ROOT / "docs" / "runs.md")[0]


@pytest.mark.faults
def test_the_lines_for_a_notebook(tmp_path, monkeypatch, capsys):
    """The lines train and play although the command line is a kernel's and the main script fails if it is run again."""
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
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    assert (tmp_path / "first.gif").stat().st_size > 1000


FROM_ELSEWHERE = {
    "a script without a guard": ("script.py", "{lines}"),
    "input": ("-", "{lines}"),
    "a thread": (
        "-",
        """
import threading
thread = threading.Thread(target=exec, args=({lines!r}, globals()))
thread.start()
thread.join()
""",
    ),
    "a process that may have no others": (
        "script.py",
        """
import multiprocessing
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=exec, args=({lines!r}, {{"__name__": "cell"}}), daemon=True)
    process.start()
    process.join()
""",
    ),
    "the same twice": ("-", "for name in ('second', 'first'):\n    exec({lines!r}.replace('first', name))"),
}


@pytest.mark.faults
@pytest.mark.parametrize("place", FROM_ELSEWHERE)
def test_a_training_from(place, tmp_path):
    """The lines for a notebook also work in every other place that a program can come from."""
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
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(results) == (2 if "twice" in place else 1) and len(set(results)) == 1
    assert len(list((tmp_path / "runs").iterdir())) == len(results) and (tmp_path / "first.gif").exists()
    assert done.stdout.count("warning: no evaluation beside") == ("no others" in place)


def test_ci_runs_the_command_of_the_readme():
    """The command that newcomers test with is the one that every change is tested with."""
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", README.read_text(encoding="utf-8"), re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short_and_has_its_command_early():
    """Count the words of everything but the bars of tables and the blocks of output and of Python."""

    def shown(block):
        return block[0] if "train_ppo.py" in block[0] else ""

    text = re.sub(r"^```.*?^```", shown, README.read_text(encoding="utf-8"), flags=re.M | re.S)
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 1000 and any("train_ppo.py" in word for word in words[:150])


def test_the_gif_of_the_readme_is_a_whole_game_that_clears_the_wall():
    """Bricks are left on every frame but the last. The status line says so too."""

    def bricks(frame):
        return (np.array(frame.convert("RGB"))[..., None, :] == np.uint8(BRICK_COLOURS)).all(-1).any()

    with Image.open(ROOT / "images" / "gpt.gif") as gif:
        had_bricks = [
            bricks(frame)
            for i, frame in enumerate(ImageSequence.Iterator(gif))
            if i in (0, gif.n_frames - 2, gif.n_frames - 1)
        ]
        assert status_in(np.array(gif.convert("RGB")))[0].startswith("score 960   lives 5   step ")
    assert had_bricks == [True, True, False]


def test_gifs_on_pages_are_small():
    """A page with them opens quickly."""
    sizes = {path.name: path.stat().st_size for path in (ROOT / "images").rglob("*.gif")}
    assert len(sizes) > 5 and max(sizes.values()) < 1_000_000, sizes


def test_messages_that_troubleshooting_explains_are_provoked():
    """The tests contain the text of every message on the page, apart from the backslashes of regular expressions."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    # These are Python's and pip's.
    others = {"externally-managed-environment", "No module named torch", "No module named harness"}
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")).replace("\\", "")
    leads = re.findall(r"^- \*\*(.*?)\*\*", page, re.M)
    messages = {message for lead in leads for message in re.findall("`([^-`][^`]*)`", lead)} - others
    assert len(messages) > 20
    for part in {part.strip() for message in messages for part in message.split("…")} - {""}:
        assert part in tests, f"no test provokes {part!r}"


def test_pages_name_the_versions_that_are_installed():
    """A version on a page, such as the one of PyTorch, is the one in requirements.txt."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    named = {
        version for page in PAGES for version in re.findall(r"\b[a-z]+==[0-9.]+[0-9]", page.read_text(encoding="utf-8"))
    }
    assert named and named <= set(requirements)


def test_what_a_resumed_run_keeps_is_listed():
    """The page about runs lists exactly the constants that resuming does not let one change."""
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert (
        re.findall("`([A-Z_]+)`", re.search(r"you can change all but (.*?)\. To train", page, re.S)[1])
        == train_ppo.KEPT
    )


def test_what_measures_a_head_runs(monkeypatch, capsys):
    """The lines of heads.md visit every head; a stand-in takes the place of the evaluation, which would take long."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(load_model, "exact", lambda policy: {"score": policy.config.n_head})
    (program,) = blocks_of_python(ROOT / "docs" / "heads.md")
    exec(program, {})
    assert capsys.readouterr().out.splitlines() == [f"{head} 16" for head in range(16)]
