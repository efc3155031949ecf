"""Turn the constants at the top of a script into options of its command line.

    GAMMA = 0.995  # [0.0, 1.0] discount per step

gives the script `CONSTANTS = Constants(globals())` an option `--gamma`, whose help is the comment. The interval at the start of the
comment says which numbers are allowed, and by its decimal points whether they need to be integers. [ and ] include the bound, ( and )
exclude it. A constant without an interval may have any value of its type.
"""

import argparse
import ast
import difflib
import io
import os
import re
import sys
import tokenize
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from harness.messages import shortened

ROOT = Path(__file__).resolve().parent.parent
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}
INTERVAL = re.compile(r"([\[(])([^,]*),([^,\])]*)([\])])")
LOOKS_LIKE_INTERVAL = re.compile(r"\[|\(\s*[-+]?(\d|\.\d|inf)")


class CommandLineError(ValueError):
    """A mistake of the user, described in one line."""


class MissingConstant(CommandLineError, AttributeError):
    """A script reads a constant that it does not assign."""


class Values(SimpleNamespace):
    """The values of a run's constants as attributes, such as `c.NUM_STEPS`."""

    def __getattr__(self, name):  # Python calls this only for a name that is not there
        raise MissingConstant(f"{name} is missing among the constants at the top of the script; put it back")


class Interval:
    """A range of numbers in mathematical notation: "[0, 1)" includes 0 and excludes 1. "[0.0, inf)" is a range of floats."""

    def __init__(self, text):
        """Reads the interval that a text begins with. Raises ValueError if it begins with none, or with an empty one."""
        match = INTERVAL.match(text)
        if match is None:
            raise ValueError(text)
        left, low, high, right = match.groups()
        self.text = match[0]
        self.kind = float if re.search(r"[.e]", low + high) else int
        self.low, self.high = float(low), float(high)
        self.includes_low, self.includes_high = left == "[", right == "]"
        if not self.low < self.high:
            raise ValueError(text)

    def __contains__(self, x):
        above = x >= self.low if self.includes_low else x > self.low
        below = x <= self.high if self.includes_high else x < self.high
        return above and below


class Constants(Mapping):
    """The constants that a script assigns at its top level, by name; a later `script.NUM_STEPS = 1024` counts too.

    The script calls `CONSTANTS = Constants(globals())` below them. What it assigns after that line is no option.

    Attributes:
        comments: {name: the comment after its assignment}
        ranges: {name: the `Interval` at the start of its comment}, for names that have one
    """

    def __init__(self, script):
        self.script = script
        self.comments, self.ranges, self.annotated, self.used = {}, {}, {}, set()
        file = script.get(
            "__file__"
        )  # missing, or another script's, in text that was pasted into a notebook or run by `exec`
        if file:
            with tokenize.open(file) as source:
                text = source.read()
            comments = comments_of(text)
            for statement in ast.parse(text).body:
                names = assigned_names(statement)
                if "CONSTANTS" in names:
                    self.used |= words_of("\n".join(text.splitlines()[statement.end_lineno :]))
                    return
                self.used |= {node.id for node in ast.walk(statement) if is_name(node, ast.Load)}
                lines = range(statement.lineno, statement.end_lineno + 1)
                comment = " ".join(comments[line] for line in lines if line in comments)
                for name in names:
                    if name.isupper() and name in script:
                        self.add(name, statement, comment)
        sys.exit(
            "the constants are read from the script's own file; import or run it instead of pasting or executing its text"
        )

    def add(self, name, statement, comment):
        """Note what an assignment says about a constant: its comment, the interval in it, and the annotated type."""
        if name in self.comments:  # the first assignment describes the constant
            return
        self.comments[name] = comment
        if LOOKS_LIKE_INTERVAL.match(comment):
            try:
                self.ranges[name] = Interval(comment)
            except ValueError:
                sys.exit(
                    f"{Path(self.script['__file__']).name}, line {statement.lineno}: the comment of {name} should begin with an "
                    f"interval such as [0, 10] or (0.0, inf), not {shortened(comment, 40)!r}"
                )
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.annotation, ast.Name):
            kind = {kind.__name__: kind for kind in KINDS}.get(statement.annotation.id)
            if kind is not None:
                self.annotated[name] = kind

    def __getitem__(self, name):
        if name not in self.comments:
            raise KeyError(name)
        return self.script[name]

    def __iter__(self):
        return iter(self.comments)

    def __len__(self):
        return len(self.comments)

    def __or__(self, changes):
        return {**self, **changes}

    def kind(self, name):
        """The type of a constant: as annotated, or else of its interval, or else of its default."""
        if name in self.annotated:
            return self.annotated[name]
        return self.ranges[name].kind if name in self.ranges else type(self[name])

    def convert(self, name, text):
        """The value that a text on the command line stands for. Raises CommandLineError if it is of another type."""
        kind = self.kind(name)
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, TypeError, ValueError):
            wanted = KINDS.get(kind, "another default in the script")
            raise CommandLineError(f"--{name.lower()} needs {wanted}, not {shortened(repr(text))}") from None

    def check(self, values):
        """Raises CommandLineError if one of these values {name: value} has the wrong type, or is outside its range."""
        for name, value in values.items():
            if problem := self.problem(name, value):
                raise CommandLineError(f"{name} (--{name.lower()}) {problem}")

    def problem(self, name, value):
        """What is wrong with this value for a constant, as the end of a sentence; "" if nothing is."""
        kind, interval = self.kind(name), self.ranges.get(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in KINDS and fits and (interval is None or value in interval):
            return ""
        wanted = KINDS.get(kind, "true or false, a number, or text")
        if interval is not None:
            wanted += f" in {interval.text}"
        return f"must be {wanted}, not {shortened(repr(value))}"

    def unread(self):
        """The names that neither the script nor any other loaded file of this project mentions, so that they have no effect.

        Only words are compared. A name in lower case counts as a mention, because it may be a field of `PPOConfig`.
        """
        words = set(self.used)
        for file in project_files() - {Path(self.script["__file__"]).resolve()}:
            words |= words_of(file.read_text(encoding="utf-8", errors="replace"))
        return [name for name in self if not {name, name.lower()} & words]


def words_of(text):
    return set(re.findall(r"\w+", text))


def comments_of(text):
    """{line number: comment} of a program's text, without the #."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT}


def assigned_names(statement):
    """The names that a statement assigns to: of `LOW, HIGH = 1, 2` both; [] if it is no assignment."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return []
    return [node.id for node in ast.walk(statement) if is_name(node, ast.Store)]


def is_name(node, context):
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def project_files():
    """The source files of this project that are loaded now; packages installed below its directory are not among them."""
    files = {Path(file).resolve() for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))}
    return {file for file in files if ROOT in file.parents and "site-packages" not in file.parts and file.is_file()}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises CommandLineError for what is wrong, and also takes numbers and paths, from a program that calls it."""

    def __init__(self, prog, doc, usage=None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, usage, doc, allow_abbrev=False, formatter_class=formatter)

    def parse_known_args(self, args, namespace=None):
        return super().parse_known_args(list(map(str, args)), namespace)

    def error(self, message):
        raise CommandLineError(message)


def read_command_line(argv, prog, doc, constants):
    """Read the options of a training.

    Returns:
        the run to resume, or None
        {name: value} of the constants given, such as {"NUM_STEPS": 200000}, not checked yet
    """
    parser = Parser(prog, doc, f"python {prog} [--resume RUN] [--constant value ...]")
    parser.add_argument("--resume", type=given_path, metavar="RUN", help="go on with this run directory or checkpoint")
    for name, default in constants.items():
        if name in ("HELP", "RESUME"):
            raise CommandLineError(
                f"{name} among the constants at the top of the script would hide --{name.lower()}; give it another name"
            )
        text = f"{constants.comments[name]} (default {default!r})".strip().replace("%", "%%")
        parser.add_argument(f"--{name.lower()}", metavar=constants.kind(name).__name__, help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name.lower()}" for name in constants] + ["--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    given = {name: text for name in constants if (text := getattr(args, name.lower())) is not None}
    return args.resume, {name: constants.convert(name, text) for name, text in given.items()}


def given_path(text):
    """The `type` of an option that names a file or a directory. A leading ~ becomes the home directory."""
    if (
        not text
    ):  # an unset variable of the shell leaves this; the default would be another file than the one that is meant
        raise argparse.ArgumentTypeError("is empty; name a file or a directory")
    return os.path.expanduser(text)


def expand_home(constants):
    """A copy of the constants in which a leading ~ of a text is the home directory."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in constants.items()}
