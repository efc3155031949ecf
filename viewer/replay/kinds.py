"""Says how a game is replayed: Breakout in a way of its own, any other game as text.

A kind is a module with

    KIND                 the class of the page in the browser
    SCRIPTS              its scripts there
    FRAME_MS             how long a picture is shown in a gif or mp4
    GAP                  pixels between two pages side by side
    drawer(game)         a function from a page to its picture
    things_of(pages)     the `Things` on pages, which a head may look at
    game_data(game)      what the script has to know of the game
    starts(env)          a function that returns what a recording keeps of a game that has just begun
    replay_data(frames)  a recording, a list of `Frame`, as the script needs it
"""

from evaluation import is_breakout
from viewer.replay import breakout, text


def kind_of(game):
    """Return the kind of a `Game`."""
    return breakout if is_breakout(game) else text
