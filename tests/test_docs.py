"""The pages in docs/: the glossary has every name that a training writes, and their pictures can be drawn again."""

import ast
import re
from pathlib import Path

import numpy as np
from PIL import Image

import breakout_ascii
import train_ppo
from breakout_ascii import BreakoutAscii
from callbacks import TENSORBOARD_NAMES
from docs import architecture
from policies import SHIPPED, load_policy

ROOT = Path(__file__).parent.parent


def test_the_architecture_can_be_drawn_again(tmp_path):
    """The picture shows the page that it is given, and has the shape of the one in the repository."""
    policy, _ = load_policy(SHIPPED)
    page, _ = BreakoutAscii().reset(seed=0)
    figure = architecture.draw(policy, page)
    words = {text.get_text() for text in figure.texts}
    assert {"row 21", "column 40", "right"} <= words
    figure.savefig(tmp_path / "drawn.png", dpi=40)
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(architecture.OUT) as kept:
        assert np.allclose(np.divide(kept.size, drawn.size), 5)
        assert len(np.unique(drawn.convert("L"))) > 100


def test_every_page_is_in_the_index():
    """The index of docs/ links to every page there."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"[{page.name}]({page.name})" in index, page.name


def test_the_glossary_has_the_words_on_the_screen_and_in_tensorboard():
    """It names what the trainings say that they do within an update, and each curve that is not called by its column.

    What a run logs and evaluates is compared with it where a run is tested: see `explained` in helpers.py.
    """
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    in_tensorboard = re.findall(r"^\| `([a-z]+/\w+)` \| `(\w+)` \|$", glossary, re.M)
    assert {column: name for name, column in in_tensorboard} == TENSORBOARD_NAMES
    sources = [file.read_text(encoding="utf-8") for file in (*ROOT.glob("*.py"), *(ROOT / "algorithms").rglob("*.py"))]
    doing = {words for source in sources for words in re.findall(r'self\.report\(\s*"([^"]+)"', source)}
    assert {"playing", "learning"} <= doing
    for words in doing:
        assert f"`{words} " in glossary, words


def test_the_ten_things_are_constants_that_there_are():
    """A heading of the page gives a constant of the training or of the game another value than it has here."""
    page = (ROOT / "docs" / "ten_things.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (?:\d+|And).*$", page, re.M)
    assert [heading.split(".")[0] for heading in headings[:-2]] == [f"## {i}" for i in range(1, 11)]
    edits = re.findall(r"\b([A-Z_]+) = ([^`=]+|\"=+\")(?=`)", "\n".join(headings))
    assert len(edits) >= 9
    for name, value in edits:
        now = train_ppo.CONSTANTS[name] if name in train_ppo.CONSTANTS else getattr(breakout_ascii, name)
        assert type(now) is type(ast.literal_eval(value)) or isinstance(now, float), name
        assert now != ast.literal_eval(value), name
