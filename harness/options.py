"""Turn the constants at the top of a script into options of its command line.

    GAMMA = 0.995  # [0.0, 1.0] discount per step
    CONSTANTS = Constants(globals())

gives the script an option `--gamma`, whose help is the comment. The interval at the start of the comment says which
numbers are allowed: "[" and "]" include the bound, "(" and ")" exclude it, and a decimal point allows fractions. The
type of a constant without an interval is that of its annotation, or else that of its default.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import io
import math
import os
import re
import sys
import tokenize
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from harness.help import HelpFormatter
from harness.lines import UNBROKEN_SPACE
from harness.messages import shortened

ROOT = Path(__file__).resolve().parent.parent
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}
INTERVAL = re.compile(r"([\[(])([^,]*),([^,\])]*)([\])])")
NOT_FROM_ITS_FILE = "the constants are read from the script's own file; import or run it instead of executing its text"
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
    """A range in mathematical notation, of integers such as "[0, 10)" or of any numbers such as "[0.0, inf)"."""

    def __init__(self, text):
        """Read the interval that a text begins with. Raises ValueError if there is none, or if it is empty."""
        match = INTERVAL.match(text)
        if match is None:
            raise ValueError(text)
        left, low, high, right = match.groups()
        self.text = match[0]
        self.kind = float if re.search(r"[.e]", low + high) else int
        self.bounds = low.strip(), high.strip()
        self.low = float(low)
        self.high = float(high)
        self.includes_low = left == "["
        self.includes_high = right == "]"
        if not self.low < self.high:
            raise ValueError(text)

    def in_words(self):
        """The interval as --help shows it: "at least 1", "0 to 1", "above 0, at most 1"."""
        low, high = (bound if self.kind is int else f"{float(bound):g}" for bound in self.bounds)
        if self.includes_low and self.includes_high and math.isfinite(self.low) and math.isfinite(self.high):
            return f"{low} to {high}"
        words = []
        if math.isfinite(self.low):
            words.append(f"{'at least' if self.includes_low else 'above'} {low}")
        if math.isfinite(self.high):
            words.append(f"{'at most' if self.includes_high else 'below'} {high}")
        return ", ".join(words)

    def __contains__(self, x):
        above = x >= self.low if self.includes_low else x > self.low
        below = x <= self.high if self.includes_high else x < self.high
        return above and below


class Constants(Mapping):
    """The constants that a script assigns at its top level, above the line `CONSTANTS = Constants(globals())`.

    This maps names to their values of now, so that `train_ppo.NUM_STEPS = 1024` in another program counts.

    Attributes:
        comments: {name: the comment of its assignment}
        groups: {name: the comment on lines of its own above it, such as "PPO", or ""}
        ranges: {name: the `Interval` at the start of the comment}, for names that have one
        annotated: {name: its annotated type}, for names that have one
    """

    def __init__(self, script):
        """Read the constants of a script. Its globals() hold their values, its source their comments."""
        self.script = script
        self.comments = {}
        self.groups = {}
        self.ranges = {}
        self.annotated = {}
        self.words = set()  # what the script mentions, to find constants that nothing reads
        text = source_of(script)
        comments = comments_of(text)
        group = ""
        end = 0  # the last line of the statement before
        for statement in ast.parse(text).body:
            names = assigned_names(statement)
            if "CONSTANTS" in names:
                self.words |= words_of("\n".join(text.splitlines()[statement.end_lineno :]))
                return
            self.words |= {node.id for node in ast.walk(statement) if is_name(node, ast.Load)}
            lines = range(statement.lineno, statement.end_lineno + 1)
            comment = " ".join(comments[line] for line in lines if line in comments)
            # A ruled line is a comment too, of dashes.
            above = [comments[line] for line in range(end + 1, statement.lineno) if comments.get(line, "").strip("-")]
            group = " ".join(above) or group
            end = statement.end_lineno
            for name in names:
                if name.isupper() and name in script and name not in self.comments:
                    self.groups[name] = group
                    self.add(name, statement, comment)
        sys.exit(NOT_FROM_ITS_FILE)  # this text is another script's

    def add(self, name, statement, comment):
        """Note what the first assignment to a constant says: a comment, an interval in it, an annotated type."""
        self.comments[name] = comment
        if LOOKS_LIKE_INTERVAL.match(comment):
            try:
                self.ranges[name] = Interval(comment)
            except ValueError:
                place = f"{Path(self.script['__file__']).name}, line {statement.lineno}"
                wanted = "should begin with an interval such as [0, 10] or (0.0, inf)"
                sys.exit(f"{place}: the comment of {name} {wanted}, not {shortened(comment, 40)!r}")
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.annotation, ast.Name):
            kinds = {kind.__name__: kind for kind in KINDS}
            if statement.annotation.id in kinds:
                self.annotated[name] = kinds[statement.annotation.id]

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

    def explanation(self, name):
        """What --help says of a constant: its comment, the interval in words, and the default."""
        comment = self.comments[name]
        interval = self.ranges.get(name)
        default = self[name]
        if isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, int):
            default = f"{default:_}" if abs(default) >= 10_000 else default
        elif isinstance(default, str):
            default = f'"{default}"'
        words = ["true or false"] if self.kind(name) is bool else []
        if interval is not None:
            comment = comment.removeprefix(interval.text).strip()
            words = [interval.in_words()]
        remark = "; ".join([*words, f"default {default}"]).replace(" ", UNBROKEN_SPACE)
        return f"{comment} ({remark})".strip()

    def convert(self, name, text):
        """The value that a text on the command line stands for. Raises CommandLineError if it is of another type."""
        kind = self.kind(name)
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, TypeError, ValueError):
            wanted = KINDS.get(kind, "another default in the script")
            written_out = f"; write {number}" if kind is int and (number := whole_number(text)) is not None else ""
            problem = f"--{name.lower()} needs {wanted}, not {shortened(repr(text))}{written_out}"
            raise CommandLineError(problem) from None

    def check(self, values):
        """Raises CommandLineError if one of these values {name: value} has the wrong type, or is outside its range."""
        for name, value in values.items():
            if problem := self.problem(name, value):
                raise CommandLineError(f"{name} (--{name.lower()}) {problem}")

    def problem(self, name, value):
        """What is wrong with this value for a constant, as the end of a sentence; "" if nothing is."""
        kind = self.kind(name)
        interval = self.ranges.get(name)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in KINDS and fits and (interval is None or value in interval):
            return ""
        wanted = KINDS.get(kind, "true or false, a number, or text")
        if interval is not None:
            wanted += f" in {interval.text}"
        return f"must be {wanted}, not {shortened(repr(value))}"

    def unread(self):
        """The names that neither the script nor any other loaded file of this project mentions, so they have no effect.

        Only words are compared. A name in lower case counts as a mention, because it may be a field of `PPOConfig`.
        """
        if "site-packages" in ROOT.parts:  # beside all other packages, in a copy that nobody edits
            return []
        words = set(self.words)
        try:
            for file in project_files() - {Path(self.script["__file__"]).resolve()}:
                words |= words_of(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return []  # what cannot be read may mention them
        return [name for name in self if not {name, name.lower()} & words]


def whole_number(text):
    """The integer that a text such as "1e6" or "5.0" stands for, or None if it stands for none."""
    with contextlib.suppress(ValueError):
        if float(text).is_integer() and abs(float(text)) < 1e15:
            return int(float(text))
    return None


# --- constants that must fit together ---------------------------------------------------------------------------------


def check_divides(name, value, whole, what, unit=1, lowest=1):
    """Raise CommandLineError, which names the nearest values that fit, unless a constant divides a number.

    Args:
        name, value: the constant.
        whole, what: the number, and the words for it.
        unit, lowest: the constant must also be a multiple of this, and at least this.
    """
    if whole % value or value % unit:
        fitting = [x for x in divisors(whole) if x % unit == 0 and x >= lowest]
        shares = f" and be a multiple of {unit}" if unit > 1 else ""
        raise CommandLineError(f"{name} {value} must divide {what}{shares}{nearest(value, fitting)}")


def check_multiple(name, value, unit, why):
    """Raise CommandLineError, which names the nearest values that fit, unless a constant is a multiple of a number.

    why: the reason, as the end of a sentence.
    """
    if value % unit:
        below = value // unit * unit
        fitting = [x for x in (below, below + unit) if x > 0]
        raise CommandLineError(f"{name} {value} must be a multiple of {unit}, {why}{nearest(value, fitting)}")


def check_at_most(name, value, limit_name, limit):
    """Raise CommandLineError if a constant exceeds another."""
    if value > limit:
        advice = f"lower {name} to {limit}, or raise {limit_name} to {value}"
        raise CommandLineError(f"{name} {value} must not exceed {limit_name} {limit}; {advice}")


@functools.lru_cache(maxsize=8)
def divisors(n):
    """All divisors of an integer, in ascending order, except those between a million and a millionth of it."""
    low = [x for x in range(1, min(math.isqrt(n), 10**6) + 1) if n % x == 0]
    return sorted({*low, *(n // x for x in low)})


def nearest(value, fitting):
    """The end of a message: the nearest numbers below and above a value among those that fit, if there are any."""
    below = [x for x in fitting if x < value][-1:]
    above = [x for x in fitting if x > value][:1]
    found = " and ".join(map(str, below + above))
    return f"; the nearest that fit: {found}" if found else ""


# --- the source of a script -------------------------------------------------------------------------------------------


def source_of(script):
    """The text of a script, whose globals() these are, in the encoding that it declares."""
    if "__file__" not in script:  # its text was pasted into a notebook, or run by `exec`
        sys.exit(NOT_FROM_ITS_FILE)
    with tokenize.open(script["__file__"]) as source:
        return source.read()


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
    """The source files of this project that are loaded now, without packages that are installed below its directory."""
    paths = [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
    files = {Path(path).resolve() for path in paths if path and "site-packages" not in path}
    return {file for file in files if ROOT in file.parents and file.is_file()}


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that raises CommandLineError, and accepts numbers and paths from a program that calls it."""

    def __init__(self, prog, doc, usage=None):
        super().__init__(f"python {prog}", usage, doc, allow_abbrev=False, formatter_class=HelpFormatter)

    def parse_known_args(self, args, namespace=None):
        return super().parse_known_args(list(map(str, args)), namespace)

    def parse_args(self, args):
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            word = unknown[0].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.7)
            if word == "--learning_rate" and "--lr" in self._option_string_actions:
                near = ["--lr"]
            elif not word.startswith("-") and "--resume" in self._option_string_actions:
                near = [f"--resume {word}"]
            raise CommandLineError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return parsed

    def error(self, message):
        if "arguments are required" in message:
            message += "; --help explains them"
        raise CommandLineError(message)


def read_command_line(argv, prog, doc, constants):
    """Read the options of a training.

    Returns:
        the run to resume, or None
        {name: value} of the constants given, such as {"NUM_STEPS": 200000}, not checked yet
    """
    parser = Parser(prog, doc, f"python {prog} [--resume RUN] [--constant value ...]")
    parser.add_argument("--resume", type=given_path, metavar="RUN", help="go on with this run directory or checkpoint")
    groups = {}
    for name in constants:
        if name in ("HELP", "RESUME"):
            problem = f"{name} among the constants at the top of the script would hide --{name.lower()}"
            raise CommandLineError(f"{problem}; give it another name")
        title = constants.groups[name] or "constants"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        metavar = METAVARS.get(constants.kind(name), "VALUE")
        explanation = constants.explanation(name).replace("%", "%%")
        groups[title].add_argument(f"--{name.lower()}", metavar=metavar, help=explanation)
    args = parser.parse_args(argv)
    given = {name: text for name in constants if (text := getattr(args, name.lower())) is not None}
    return args.resume, {name: constants.convert(name, text) for name, text in given.items()}


def given_path(text):
    """The `type` of an option that names a file or a directory. A leading ~ becomes the home directory."""
    if not text:  # from an unset variable of the shell; the default would be another file than the one that is meant
        raise argparse.ArgumentTypeError("is empty; name a file or a directory")
    return os.path.expanduser(text)


def within(text):
    """The `type` of an option that takes a number in an interval, such as within("[1, inf)")."""
    interval = Interval(text)

    def number(word):
        with contextlib.suppress(ValueError):
            value = interval.kind(word)
            if value in interval:
                return value
        raise argparse.ArgumentTypeError(f"must be {KINDS[interval.kind]} in {text}, not {shortened(repr(word))}")

    return number


def expand_home(constants):
    """A copy of the constants in which a leading ~ of a text is the home directory."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in constants.items()}
