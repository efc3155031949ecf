import ast
import re
from pathlib import Path

from train_ppo import CONSTANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OTHERS = {"logdir", "index", "standalone", "nproc_per_node"}  # options of other programs
ORIGINAL = {"NUM_STEPS": 4_000_000, "ROLLOUT_STEPS": 1024, "EPOCHS": 10, "GAMMA": 0.99, "LAMBD": 0.95, "EPS_CLIP": 0.2,
            "LR": 0.001, "BLOCK_SIZE": 1944}  # fmt: skip


def test_table_of_constants():
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \| (?:`(.*?)`)? *\|$", README, re.M)
    assert {name: ast.literal_eval(value) for name, value, _ in rows} == CONSTANTS
    assert {name: ast.literal_eval(original) for name, _, original in rows if original} == ORIGINAL


def test_files_and_options_that_the_readme_names_exist():
    for name in re.findall(r"`([a-z_]+\.py)`", README) + re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / name).exists(), name
    scripts = [ROOT / "load_model.py", ROOT / "tests" / "conftest.py", *(ROOT / "benchmarks").glob("*.py")]
    sources = "".join(script.read_text() for script in scripts)
    for option in set(re.findall(r"--([a-z_]+)", README)) - {"resume", *OTHERS}:
        assert option.upper() in CONSTANTS or f'"--{option}"' in sources, option


def test_ci_runs_the_command_of_the_readme():
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", README, re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
