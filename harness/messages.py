"""What programs print: errors of one line, and texts without characters that a terminal would obey."""

import contextlib
import os
import re
import shlex
import sys

from tqdm import tqdm

from harness.files import WINDOWS
from harness.lines import columns, wrapped_lines


def tell(line):
    """Print lines to the standard error. It is no error if nobody can read them."""
    with contextlib.suppress(OSError):
        print(wrapped_lines(printable_lines(line), columns(sys.stderr)), file=sys.stderr, flush=True)


def say(line):
    """Print lines to the standard output without tearing a progress bar. It is no error if nobody can read them."""
    with contextlib.suppress(Exception):
        tqdm.write(wrapped_lines(printable_lines(line), columns(sys.stdout)))
        sys.stdout.flush()


def printable_lines(text):
    """The text with its line breaks, and with all other control characters escaped."""
    return "\n".join(map(printable, str(text).split("\n")))


def printable(text):
    """The text with its control characters escaped, because a terminal would obey them instead of showing them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text, longest=200):
    """The text as one printable line of at most so many characters."""
    line = printable(" ".join(str(text).split())[: longest + 1])  # escaping megabytes would take long
    return line if len(line) <= longest else line[: longest - 4] + " ..."


def one_line(error):
    """Return an error as one line: its first line, and what to do where that is known."""
    if no_more_processes(error):
        return "no more processes or threads can be started; end some, or raise the limit (ulimit -u)"
    if isinstance(error, OSError) and error.strerror:
        advice = "check the path, its permissions and the space on the disk"
        return f"{error.filename or 'the output'}: {error.strerror}; {advice}"
    lines = str(error).strip().splitlines()
    if not lines:
        return "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{shortened(lines[0])}; install it with pip"
    return shortened(lines[0])


def no_more_processes(error):
    """Whether an error says that the system starts no further processes or threads."""
    if isinstance(error, BlockingIOError):
        return True
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def shown(path):
    """A path as it is printed: relative to the working directory, or as it is if that is impossible."""
    try:
        return printable(os.path.relpath(path))
    except (ValueError, OSError):  # it is on another drive of Windows, or the working directory has been removed
        return printable(path)


def quoted(path):
    """A path as one word of a shell's command, which is no option even if it begins with a dash."""
    word = f"./{path}" if str(path).startswith("-") else str(path)
    if WINDOWS:  # its two shells agree on double quotes only; one of them splits a word at a comma
        return word if re.fullmatch(r"[\w.:~\\/-]+", word) else f'"{word}"'
    return shlex.quote(word)
