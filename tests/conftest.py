"""Settings that all tests share."""

import os
import signal

# The processes that a test starts share the cores, so each takes one. This has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# On a CPU with AMX, torch 2.13's flash attention in bfloat16 fails with the older kernels that this variable selects.
if "ATEN_CPU_CAPABILITY" in os.environ:
    torch.backends.cuda.enable_flash_sdp(False)  # In spite of its name this is the switch for CPUs too.

# A process in the background or under nohup ignores some signals. Processes that the tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
for signal_name in ("SIGHUP", "SIGQUIT"):
    if hasattr(signal, signal_name):
        signal.signal(getattr(signal, signal_name), signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the learning tests too (minutes)")
    parser.addoption("--browser", action="store_true", help="run the tests that need Chromium and playwright too")
    parser.addoption(
        "--faults",
        action="store_true",
        help="run the tests of kills, damaged files, installs and benchmarks too (minutes)",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        for name in ("slow", "browser", "faults"):
            if name in item.keywords and not config.getoption(f"--{name}"):
                item.add_marker(pytest.mark.skip(reason=f"run with --{name}"))


@pytest.fixture
def without_processes(monkeypatch):
    """Evaluate in this process and at once, instead of in a background process."""
    from algorithms_helpers import NoProcess

    import callbacks

    monkeypatch.setattr(callbacks, "Background", NoProcess)


@pytest.fixture
def short_runs(monkeypatch):
    """Leave out two parts of a training that take longer than its few steps, and that other tests try."""
    from algorithms.parts import training
    from callbacks import Callback
    from harness.options import Constants

    monkeypatch.setattr(training, "LearningCurve", lambda *args: Callback())
    monkeypatch.setattr(Constants, "unread", lambda constants: [])
