"""Shows on a terminal how far something is that takes a while, outside of a training's own progress bar."""

import contextlib
import threading

from tqdm import tqdm


@contextlib.contextmanager
def games_bar(games, units):
    """A context that shows on a terminal how far an evaluation is.

    It is a function that `Algorithm.evaluate` calls as report(ended, steps): how many of the games have ended, and how
    many steps have been played in those that go on side by side.

    units: what games and a step are called, as in `Algorithm`.
    """
    many, one = units
    shape = {"bar_format": "{percentage:3.0f}%|{bar}| {desc}[{elapsed}]", "miniters": 0, "dynamic_ncols": True}
    with tqdm(total=games, leave=False, disable=None, **shape) as bar:  # None: only on a terminal

        def report(ended, steps):
            bar.set_description_str(f"{ended:,}/{games:,} {many}, {one} {steps:,} ", refresh=False)
            bar.update(ended - bar.n)

        yield report


@contextlib.contextmanager
def waiting(for_what):
    """A context that shows on a terminal how long something already takes that cannot say how far it is."""
    with tqdm(bar_format="{desc} [{elapsed}]", desc=for_what, leave=False, disable=None) as line:
        if line.disable:
            yield
            return
        over = threading.Event()

        def tick():
            while not over.wait(0.5):
                line.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            over.set()
            ticking.join()
