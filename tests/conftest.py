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


@pytest.fixture(scope="session")
def markup():
    """Return the `Game` of a game that is hard to show."""
    import gymnasium as gym
    from replay_helpers import Markup

    from games.game import load_game

    gym.register("Markup-v0", Markup)
    yield load_game("Markup-v0")
    del gym.registry["Markup-v0"]


@pytest.fixture(scope="session")
def chromium():
    """Return a browser."""
    import shutil

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Return a function that opens a page in a new tab. Any error, dialog or request fails the test at the end."""
    problems = []
    pages = []

    def open_page(path, place="#frame=0", width=1280, height=900, **options):
        page = chromium.new_page(viewport={"width": width, "height": height}, **options)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: problems.extend([] if request.url.startswith("file:") else [request.url]))
        page.goto(path.as_uri() + place)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not problems


@pytest.fixture(scope="session")
def replay(tmp_path_factory):
    """Write the page of the shipped model."""
    from replay_helpers import write_shipped

    return write_shipped(tmp_path_factory.mktemp("replay") / "replay.html")
