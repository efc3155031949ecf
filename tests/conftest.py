import os
import signal

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: as many tests run side by side as there are cores

import pytest
import torch

if (
    "ATEN_CPU_CAPABILITY" in os.environ
):  # on a CPU with AMX, torch 2.13's flash attention in bfloat16 does not work with older kernels
    torch.backends.cuda.enable_flash_sdp(False)  # which is meant for CPUs too

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # what runs in the background, or under nohup, ignores some signals, and so
for name in ("SIGHUP", "SIGQUIT"):  # would all that the tests start
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the learning tests too (minutes)")
    parser.addoption(
        "--browser", action="store_true", help="run the tests that need Chromium and pip install playwright too"
    )
    parser.addoption(
        "--faults", action="store_true", help="run the long tests of kills, damaged files and torchrun too (minutes)"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a learning test; runs with --slow")
    config.addinivalue_line("markers", "browser: opens a page in Chromium; runs with --browser")
    config.addinivalue_line("markers", "faults: many kills or damaged files, or torchrun; runs with --faults")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in ("slow", "browser", "faults"):
            if mark in item.keywords and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"run with --{mark}"))


@pytest.fixture
def without_processes(monkeypatch):
    """Evaluations take place in this process, at once."""
    from algorithms_helpers import NoProcess

    import callbacks

    monkeypatch.setattr(callbacks, "Background", NoProcess)
