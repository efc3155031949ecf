"""The packages that only some of these trainings need."""

import importlib
import sys
from pathlib import Path

from harness.messages import quoted, shown
from harness.options import CommandLineError

ALGORITHMS = Path(__file__).parent.parent


def need(module, install=None):
    """Import a package that only some trainings need.

    Args:
        module: the name of the package.
        install: what to install if it is missing; None for algorithms/requirements.txt.

    Raises:
        CommandLineError: the package is missing; the message has the command that installs it.
    """
    if module == "transformers" and sys.flags.optimize > 1:
        reason = "transformers needs its docstrings, which python -OO leaves out"
        raise CommandLineError(f"{reason}; start python without it")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = f"pip install {install or requirements()}"
        raise CommandLineError(f"needs {error.name or module}: {command}") from None


def requirements():
    """The argument with which `pip install` installs everything that this folder needs."""
    return f"-r {quoted(shown(ALGORITHMS / 'requirements.txt'))}"
