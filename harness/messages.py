"""What is printed: one line for each error, paths and texts without what a terminal would obey."""

import contextlib
import os
import shlex
import sys


def tell(line):
    """Print a line, without what a terminal would obey, to the standard error. If nobody can read it there, nothing else ends for that."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, str(line).split("\n"))), file=sys.stderr, flush=True)


def printable(text):
    """-> the text without what a terminal would obey instead of showing it: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text, longest=200):
    """-> one printable line of so many characters at most."""
    line = printable(" ".join(str(text).split())[: longest + 1])  # of megabytes only the beginning
    return line if len(line) <= longest else line[: longest - 4] + " ..."


def first_line(error):
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0])


def one_line(error):
    """An error as one line. One of the system names its file and says what to do."""
    if no_more_processes(error):
        return "no more processes or threads can be started; end some, or raise the limit (ulimit -u)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output'}: {error.strerror}; check the path, its permissions and the space on the disk"
    return shortened(error)


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
