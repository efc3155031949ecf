"""pyproject.toml agrees with the files and options that exist."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_module_is_packaged():
    """After an editable install, all modules at the top can be imported from any directory."""
    assert sorted(PROJECT["tool"]["setuptools"]["py-modules"]) == sorted(file.stem for file in ROOT.glob("*.py"))


def test_test_tools_are_no_requirements_of_the_programs():
    """Whoever only trains does not install pytest."""
    programs = (ROOT / "requirements.txt").read_text() + (ROOT / "algorithms" / "requirements.txt").read_text()
    assert not any(tool in programs for tool in ("pytest", "hypothesis", "ruff"))


def test_every_marker_has_an_option(pytestconfig):
    """A marked test is skipped unless the option of the same name is given."""
    for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        assert pytestconfig.getoption(f"--{marker.split(':')[0]}") in (True, False)
