import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: as many tests run side by side as there are cores

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the learning tests too (minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a learning test; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a learning test: run with --slow"))
