"""Write the page of the shipped model, which anybody can open in a browser:  python -m docs.index

It writes docs/index.html. The shipped model plays a whole game there, and so does each earlier stage of its training.
"""

import harness.start  # before the slow imports

import re
from pathlib import Path

from games.game import BREAKOUT, load_game
from harness.device import set_threads
from harness.messages import shown
from harness.options import Parser
from harness.supervise import run_script
from load_model import play_stages, stages
from policies import SHIPPED, load_policy
from viewer.replay.document import replay_html

HERE = Path(__file__).parent
OUT = HERE / "index.html"
NAME = "a GPT that learned Breakout by reading it"
ABOUT = "A GPT with 64 thousand parameters that learned Breakout by reading it. Stop it, drag the ball, and see."
NOTE = "Stages before the last are from a repetition of the training."
GAME = load_game(BREAKOUT)


def whole_games(policy, meta):
    """Return what `replay_html` takes: each stage of the shipped model, with the game that it plays."""
    return play_stages(stages(SHIPPED, policy, meta), GAME, None, 1)


def scores_without():
    """Return {head: the score without it}, from the table in heads.md."""
    page = (HERE / "heads.md").read_text(encoding="utf-8")
    return {int(head): int(score) for head, score in re.findall(r"^\| (\d+) \|.*\| (\d+) \|$", page, re.M)}


def page_of(played):
    """Return the text of the page. played: see `whole_games`."""
    return replay_html(played, GAME, NAME, ABOUT, scores_without(), NOTE)


def main(argv=()):
    Parser("-m docs.index", __doc__).parse_args(argv)
    policy, meta = load_policy(SHIPPED)
    set_threads(policy.config.n_layer)
    OUT.write_bytes(page_of(whole_games(policy, meta)).encode())
    print(f"wrote {shown(OUT)} ({OUT.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    run_script(main, "-m docs.index")
