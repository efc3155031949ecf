"""What is printed: one line for each error, and nothing that a terminal would obey."""

import os
import re
import sys
import warnings

import pytest

from harness.checkpoint import CheckpointError
from harness.files import atomic_write
from harness.messages import one_line, say, shortened, shown
from harness.supervise import (
    run_script,
)


def test_a_full_disk_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError) as error:
            atomic_write(tmp_path / "config.json", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error.value).startswith(f"{tmp_path}/config.json: File too large; ") and not os.listdir(tmp_path)


def test_errors_of_the_system_name_their_file(tmp_path):
    with pytest.raises(OSError) as error:
        open(tmp_path / "gone" / "x")
    assert (
        one_line(error.value)
        == f"{tmp_path}/gone/x: No such file or directory; check the path, its permissions and the space on the disk"
    )


def test_a_terminal_obeys_nothing_that_a_file_says(monkeypatch, capsys):
    """An error, a warning, a line of a training, a path."""
    evil = "\x1b]0;pwned\x07\n\u202e"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(words):
        say(f"plan\n{evil}")
        print(shown(f"/{evil}"))
        raise CheckpointError(f"{evil}.safetensors: has other constants ({evil})")

    with pytest.raises(SystemExit):
        run_script(main, "a.py")
    out, err = capsys.readouterr()
    assert err == r"a.py: \x1b]0;pwned\x07\n\u202e.safetensors: has other constants (\x1b]0;pwned\x07\n\u202e)" + "\n"
    assert (
        out.startswith("plan\n\\x1b]0;pwned")
        and out.count("\n") == 4
        and not any(ord(c) < 32 and c != "\n" for c in out)
    )
    assert shortened(f"a {evil} b") == r"a \x1b]0;pwned\x07 \u202e b"


def test_a_warning_is_one_line(monkeypatch, capsys):
    """Without the file and the code that gave it, and however long a compiler's message is."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(
            warnings, "showwarning", lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4]))
        )  # pytest's keeps them
        run_script(lambda argv: warnings.warn("no compiler:\n" + "x" * 1000), "a.py")
    line = capsys.readouterr().err
    assert re.fullmatch(r"warning: no compiler: x+ \.\.\.\n", line) and len(line) < 320


def test_no_more_threads_is_one_line(capsys):
    def main(argv):
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit):
        run_script(main, "a.py")
    assert (
        capsys.readouterr().err
        == "a.py: no more processes or threads can be started; end some, or raise the limit (ulimit -u)\n"
    )
