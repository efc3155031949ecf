"""pyproject.toml agrees with the files and options that exist, and what pip installs works from any directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from helpers import blocks_of_python

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUP = PROJECT["tool"]["setuptools"]


def test_every_module_is_packaged():
    """After an editable install, all modules at the top can be imported from any directory."""
    assert sorted(SETUP["py-modules"]) == sorted(file.stem for file in ROOT.glob("*.py"))


def test_test_tools_are_no_requirements_of_the_programs():
    """Whoever only trains does not install pytest."""
    programs = (ROOT / "requirements.txt").read_text() + (ROOT / "algorithms" / "requirements.txt").read_text()
    assert not any(tool in programs for tool in ("pytest", "hypothesis", "ruff"))


def test_every_marker_has_an_option(pytestconfig):
    """A marked test is skipped unless the option of the same name is given."""
    for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        assert pytestconfig.getoption(f"--{marker.split(':')[0]}") in (True, False)


class Installation:
    """A copy of the project in a fresh environment, which has the libraries of this one."""

    def __init__(self, folder, *options):
        pytest.importorskip("pip", reason="installs with pip")
        project = folder / "project"
        project.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "tests/requirements.txt"):
            (project / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, project / name)
        for name in SETUP["py-modules"]:
            shutil.copy(ROOT / f"{name}.py", project)
        for name in SETUP["packages"]["find"]["include"]:
            package = name.removesuffix("*")
            shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
        venv.create(folder / "fresh", symlinks=os.name != "nt")
        paths = sysconfig.get_paths("venv", {"base": folder / "fresh", "platbase": folder / "fresh"})
        self.packages = Path(paths["purelib"])
        libraries = [path for path in sys.path if path.endswith("-packages")]
        (self.packages / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
        self.python = Path(paths["scripts"], Path(sys.executable).name)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        # Among the libraries is setuptools, because PyTorch requires it.
        pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        self.run(*pip, *options, str(project))

    def run(self, *words):
        """Run Python in a directory outside of the project, and return what it prints."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [self.python, *words]
        done = subprocess.run(command, cwd=self.elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("editable"), "-e")


@pytest.mark.faults
def test_the_lines_of_the_readme_run_in_any_directory(editable):
    """Once the project is installed, the game and the shipped model play a whole game."""
    (program,) = blocks_of_python(ROOT / "README.md")
    assert len([line for line in program.splitlines() if line]) <= 16
    page, score = editable.run("-c", program).rsplit(maxsplit=1)
    assert score == "960" and len(page.splitlines()) == 24 and "|" not in page


def test_another_library_trains_on_the_game(editable):
    """The lines of the page about runs train an agent of Stable-Baselines3, which then scores points."""
    pytest.importorskip("stable_baselines3")
    _, program = blocks_of_python(ROOT / "docs" / "runs.md")
    assert len([line for line in program.splitlines() if line]) <= 12
    actions, points = editable.run("-c", program).split("]")
    assert len(actions.split()) == 8 and "(" in points


@pytest.mark.faults
def test_a_plain_install_copies_everything_that_is_read(tmp_path):
    """Beside its modules, an installed package needs the shipped models and the parts of the page for the browser."""
    packages = Installation(tmp_path).packages
    project = tmp_path / "project"
    files = [file.relative_to(project) for file in project.rglob("*.*") if file.suffix not in (".md", ".pyc")]
    no_packages = ("build", "breakout_gpt.egg-info", "tests")  # setuptools has made the first two
    needed = {file for file in files if file.parts[0] not in no_packages}
    needed -= {Path("pyproject.toml"), Path("requirements.txt")}
    assert len(needed) > 80 and not [file for file in needed if not (packages / file).exists()]
