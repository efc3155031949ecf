import ast
import re
from pathlib import Path

import train_ppo
from algorithms.grid_search import TRAININGS, training
from command_line import kind_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "algorithms" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"no-deps", "logdir", "index", "standalone", "nproc_per_node", "index-url"}  # options of other programs
ORIGINAL = {"NUM_STEPS": 4_000_000, "ROLLOUT_STEPS": 1024, "EPOCHS": 10, "GAMMA": 0.99, "LAMBD": 0.95, "EPS_CLIP": 0.2, "LR": 0.001}


def test_table_of_constants():
    """Names, and the original's values. Somebody who edits a default need not edit the page."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \| (?:`(.*?)`)? *\|", (ROOT / "docs" / "constants.md").read_text(), re.M)
    assert [name for name, _, _ in rows] == list(train_ppo.CONSTANTS)
    assert all(type(ast.literal_eval(value)) is kind_of(name, train_ppo.CONSTANTS, train_ppo.RANGES) for name, value, _ in rows)
    assert {name: ast.literal_eval(original) for name, _, original in rows if original} == ORIGINAL


def test_what_the_pages_name_exists():
    """Links, files, and the options of our programs."""
    scripts = [ROOT / "load_model.py", ROOT / "play_in_terminal.py", ROOT / "tests" / "conftest.py", *(ROOT / "benchmarks").glob("*.py")]
    scripts += (ROOT / "algorithms").glob("*.py")
    constants = {name for program in TRAININGS for name in training(program).constants}
    sources = "".join(script.read_text() for script in scripts)
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text):
            assert any((ROOT / folder / name).exists() for folder in (".", "fast", "algorithms")), f"{page.name}: {name}"
        for option in set(re.findall(r"--([a-z][a-z_0-9]*(?:-[a-z]+)*)", text)) - {"resume", *OTHERS}:
            assert option.upper() in constants or f'"--{option}"' in sources, f"{page.name}: --{option}"


def test_ci_runs_the_command_of_the_readme():
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", PAGES[0].read_text(), re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short_and_has_its_command_early():
    words = re.sub(r"^```.*?^```", lambda block: block[0] if "train_ppo.py" in block[0] else "", PAGES[0].read_text(), flags=re.M | re.S).split()
    assert len(words) <= 1000 and any("train_ppo.py" in word for word in words[:150])
