"""What is printed: one line for each error, and nothing that a terminal would obey."""

import os
import re
import sys
import warnings

import pytest

from harness.checkpoint import CheckpointError
from harness.files import atomic_write
from harness.messages import one_line, say, shortened, shown
from harness.supervise import run_script


def test_a_full_disk_names_the_file(tmp_path):
    """The file that could not be written is named, and its unfinished copy is gone."""
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
    """The line ends with what to check."""
    with pytest.raises(OSError) as error:
        open(tmp_path / "gone" / "x", encoding="utf-8")
    advice = "check the path, its permissions and the space on the disk"
    assert one_line(error.value) == f"{tmp_path / 'gone' / 'x'}: No such file or directory; {advice}"


def test_a_terminal_obeys_nothing_that_a_file_says(monkeypatch, capsys):
    """Control characters are escaped in errors, in a training's lines and in paths."""
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
    assert out.startswith("plan\n\\x1b]0;pwned") and out.count("\n") == 4
    assert not any(ord(c) < 32 and c != "\n" for c in out)
    assert shortened(f"a {evil} b") == r"a \x1b]0;pwned\x07 \u202e b"


def write_warning(message, category, filename, lineno, *_):
    """Write a warning to the standard error, where pytest would collect it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def test_a_warning_is_one_line(monkeypatch, capsys):
    """It leaves out the file and the code that gave it, and most of a compiler's long message."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", write_warning)
        run_script(lambda argv: warnings.warn("no compiler:\n" + "x" * 1000, stacklevel=1), "a.py")
    line = capsys.readouterr().err
    assert re.fullmatch(r"warning: no compiler: x+ \.\.\.\n", line) and len(line) < 320


def test_no_more_threads_is_one_line(capsys):
    """The line says which limit to raise."""

    def main(argv):
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit):
        run_script(main, "a.py")
    advice = "end some, or raise the limit (ulimit -u)"
    assert capsys.readouterr().err == f"a.py: no more processes or threads can be started; {advice}\n"
