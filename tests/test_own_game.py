"""The walk through the template in games/README.md is followed literally."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from helpers import blocks_of_python

import games

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "games" / "README.md"


def edited(program, diff):
    """Return a program after the edits of a diff, each of which must fit in exactly one place."""
    for edit in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = edit.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert program.count(before) == 1, before
        program = program.replace(before, after)
    return program


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Make games/mine.py as the page says, in another directory, and return its module."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    template = (ROOT / "games" / "catch.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(edited(template, diff), encoding="utf-8")
    monkeypatch.setattr(games, "__path__", [str(tmp_path), *games.__path__])
    yield importlib.import_module("games.mine")
    del sys.modules["games.mine"], games.mine, gymnasium.registry["Mine-v0"]


def test_the_steps_name_the_same_game():
    """The commands copy, train and check what the diff registers."""
    page = PAGE.read_text(encoding="utf-8")
    assert "\ncp games/catch.py games/mine.py\n" in page
    assert set(re.findall(r"games\.mine:[\w-]+", page)) == {"games.mine:Mine-v0", "games.mine:Mine"}


def test_the_own_game_passes_its_check(mine, capsys):
    (program,) = blocks_of_python(PAGE)
    exec(program, {})
    pages = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    assert [page.count("\n") + 1 for page in pages] == [mine.ROWS] * 3


def test_every_ball_of_the_own_game_can_be_caught(mine):
    """A paddle that follows the ball catches all, and the page shows which way the ball falls."""
    env = gymnasium.make("games.mine:Mine-v0").unwrapped
    starts = set()
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        starts.add((int(env.ball_x), int(env.ball_dx)))
        terminated = False
        while not terminated:
            ball = observation[np.isin(observation, list(b"/\\"))].item()
            assert chr(ball) == ("/" if env.ball_dx < 0 else "\\")
            offset = env.ball_x + env.ball_dx - (env.paddle_x + 1)
            observation, reward, terminated, _, _ = env.step(0 if abs(offset) <= 1 else 1 if offset < 0 else 2)
        assert reward == 1
    assert len(starts) == 2 * mine.COLUMNS


@pytest.mark.slow
def test_the_walk_from_the_first_command_to_the_last(tmp_path):
    """In a copy of the project, all commands run, and the game that was made is learned."""
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
    folder = shutil.copytree(ROOT, tmp_path / "project", ignore=leave_out)
    page = PAGE.read_text(encoding="utf-8").split("## Your own game")[1].split("\n### ")[0]
    printed = ""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S):
        if kind == "diff":
            mine = folder / "games" / "mine.py"
            mine.write_text(edited(mine.read_text(encoding="utf-8"), block), encoding="utf-8")
        elif kind == "python":
            subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)
        for command in re.findall(r"^(?:cp|python) .*$", block, re.M) if not kind else ():
            program, *words = command.split()
            if program == "cp":
                shutil.copy(*(folder / word for word in words))
            else:
                done = subprocess.run(
                    [sys.executable, *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
                )
                printed = done.stdout
    assert json.loads(printed.splitlines()[-1])["score"] >= 0.95
    assert (folder / "gpt.gif").exists() and (folder / "replay.html").exists()
