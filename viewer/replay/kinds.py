"""Says how a game is replayed: Breakout in a way of its own, any other game as text.

A kind is a module with

    KIND                       the name of its script, which shows the game in the browser
    FRAME_MS                   how long a picture is shown in a gif or mp4
    GAP                        pixels between two pages side by side
    drawer(game)               a function from a page to its picture
    things_of(pages)           the `Things` on pages, which a head may look at
    replay_data(frames, game)  what the script needs
"""

from evaluation import is_breakout
from viewer.replay import breakout, text


def kind_of(game):
    """Return the kind of a `Game`."""
    return breakout if is_breakout(game) else text
