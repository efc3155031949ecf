"""Constants at the top of a script become options of its command line."""

import argparse
import ast
import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from harness.checkpoint import CheckpointError
from harness.messages import shortened

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}


class CommandLineError(ValueError):
    """What a user got wrong, in one line."""


class Constants(Mapping):
    """The constants that a script assigns at its top level, before CONSTANTS: {"NUM_STEPS": 4000000, ...}. What is assigned to one
    later, as in `train_ppo.NUM_STEPS = 1024`, counts from then on. They may have any type: `check_constants` refuses what is wrong."""

    def __init__(self, script):
        """script: its globals()."""
        self.script, self.names = script, []
        file = script.get(
            "__file__"
        )  # none, or that of another script, if this one was pasted into a notebook or run by `exec`
        for statement in ast.parse(Path(file).read_text(encoding="utf-8")).body if file else ():
            if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                stored = [
                    node.id
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                ]
                if "CONSTANTS" in stored:
                    return  # what follows is not for the user to set
                self.names += [name for name in stored if name.isupper() and name in script and name not in self.names]
        sys.exit(
            "the constants are read from the script's own file; import the script, or run it, instead of pasting or executing its text"
        )

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        return self.script[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __or__(self, changes):
        return {**self, **changes}


def kind_of(name, defaults, ranges):
    """bool, int, float or str: of the constant's range, which may be bool or str itself, whatever the default has become."""
    within = ranges.get(name, type(defaults.get(name)))
    return within if isinstance(within, type) else type(within[0])


class Parser(argparse.ArgumentParser):
    """Reads the words of a command line, or what a program gives instead of them: numbers and paths too. What is wrong is raised, as a
    CommandLineError."""

    def __init__(self, prog, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=formatter)

    def parse_known_args(self, args, namespace=None):
        return super().parse_known_args(list(map(str, args)), namespace)

    def error(self, message):
        raise CommandLineError(message)


def read_command_line(argv, prog, doc, defaults, ranges):
    """Arguments -> the run to resume or None, and the constants given: {"NUM_STEPS": 200000}."""
    parser = Parser(prog, doc)
    parser.add_argument(
        "--resume", type=given_path, metavar="RUN", help="a run directory, or a checkpoint in it to resume from"
    )
    for name, value in defaults.items():
        if name in ("HELP", "RESUME"):
            raise CommandLineError(
                f"{name} among the constants at the top of the script would hide --{name.lower()}; give it another name"
            )
        parser.add_argument(
            f"--{name.lower()}", metavar=kind_of(name, defaults, ranges).__name__, help=f"default {value!r}"
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name.lower()}" for name in defaults] + ["--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: text for name in defaults if (text := getattr(args, name.lower())) is not None}
    return args.resume, {name: convert(name, text, kind_of(name, defaults, ranges)) for name, text in given.items()}


def given_path(text):
    """The type of an option that names a file or a directory, for argparse. A leading ~ is the home directory."""
    if (
        not text
    ):  # what an unset variable of the shell leaves; the default would be another file than the one that is meant
        raise argparse.ArgumentTypeError("is empty; name a file or a directory")
    return os.path.expanduser(text)


def expand_home(constants):
    """A copy of the constants, in which a leading ~ is the home directory."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in constants.items()}


def convert(name, text, kind):
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise CommandLineError(f"--{name.lower()} needs {KINDS[kind]}, not {text!r}") from None


def check_constants(constants, defaults, ranges):
    """Raises CommandLineError for a value of the wrong type or out of its range, and for a constant that the script has no more."""
    for name in ranges:
        if name not in defaults:
            raise CommandLineError(f"{name} is missing among the constants at the top of the script; put it back")
    for name, value in constants.items():
        kind, within = kind_of(name, defaults, ranges), ranges.get(name)
        kinds = (int, float) if kind is float else (kind,)  # an integer is a number
        limits = isinstance(within, tuple)
        if kind not in KINDS or type(value) not in kinds or (limits and not within[0] <= value <= within[1]):
            wanted = KINDS.get(kind, "true or false, a number, or text") + (
                f" from {within[0]:,} to {within[1]:,}" if limits else ""
            )
            raise CommandLineError(f"{name} (--{name.lower()}) must be {wanted}, not {shortened(repr(value))}")


def check_constants_of_file(path, constants, defaults, ranges):
    """Raises CheckpointError for constants that no command line could have set, or only that of somebody who trusts a module."""
    try:
        check_constants(constants, defaults, ranges)
    except CommandLineError as error:
        raise CheckpointError(f"{path}: {error}; use another checkpoint") from None
    if ":" in constants.get("ENV_ID", ""):  # Gymnasium would import what stands before it
        raise CheckpointError(
            f"{path}: its ENV_ID {shortened(repr(constants['ENV_ID']))} would run a module's code; name it by --env_id if you trust that"
        )
