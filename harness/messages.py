"""What is printed: one line for each error, paths and texts without what a terminal would obey."""

import contextlib
import os
import shlex
import sys

from tqdm import tqdm


def tell(line):
    """Print a line, without what a terminal would obey, to the standard error. If nobody can read it there, nothing
    else ends for that."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, str(line).split("\n"))), file=sys.stderr, flush=True)


def say(line):
    """Print a line to the standard output without tearing a progress bar. If nobody can read it there, nothing else
    ends for that."""
    with contextlib.suppress(Exception):
        tqdm.write("\n".join(map(printable, line.splitlines())))
        sys.stdout.flush()


def printable(text):
    """-> the text without what a terminal would obey instead of showing it: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text, longest=200):
    """-> one printable line of so many characters at most."""
    line = printable(" ".join(str(text).split())[: longest + 1])  # of megabytes only the beginning
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
    return (
        isinstance(error, BlockingIOError) or isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    )


def shown(path):
    """A path as it is printed: from the working directory, or as it stands where no way leads there from it."""
    try:
        return printable(os.path.relpath(path))
    except (ValueError, OSError):  # it is on another drive of Windows; the working directory has been removed
        return printable(path)


def quoted(path):
    """A path as one word of a shell's command, which is no option even if it begins with a dash."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
