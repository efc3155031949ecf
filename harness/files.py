"""Files that are written whole or not at all."""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

WINDOWS = sys.platform == "win32"


def atomic_write(path, data):
    """Replaces the file `path` by the bytes `data`, all or nothing. Raises OSError and then leaves no trace."""
    path = Path(path)
    # A fixed name in the same directory: os.replace is atomic only within one file system, and what a killed
    # process leaves behind is overwritten by the next save instead of piling up.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # makes the new name itself survive a power cut; not every OS can
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def replace(source, target):
    """Call os.replace, on Windows for up to a second: while a program reads a file, it cannot be replaced there."""
    for pause in (0.05, 0.1, 0.2, 0.3, 0.4) if WINDOWS else ():
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(pause)
    os.replace(source, target)


@contextlib.contextmanager
def replacing(path):
    """Gives a path to write to; at the end of the block that file replaces `path`, or the file that a link points to.

    A block that is interrupted leaves the old file. Raises OSError with one line: file, what is wrong, what to do.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: is no ordinary file; name another")
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            yield Path(folder, target.name)
            replace(Path(folder, target.name), target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            f"{path}: not written ({error.strerror}); free some disk space or check the permissions"
        ) from error
