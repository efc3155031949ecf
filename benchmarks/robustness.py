"""How well it plays games that it is not scored by:  python benchmarks/robustness.py [CHECKPOINT|RUN] [--games 200]

standard        the game as it is: all 32 games for players without chance, else games drawn at random
random serves   every serve anywhere on its row, the paddle under the ball
random layouts  any share of the bricks, the serves standard
sticky actions  one action in ten is not heard, the one before it is played again

Prints a markdown table. "of possible" is each game's score as a share of all its points; a game that is neither cleared nor
lost is "caught": it is truncated. All players get the same serves and layouts; the tracker and random play are yardsticks.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from breakout_ascii import (  # noqa: E402
    BRICK_POINTS, CLEAR_POINTS, COLS, LIVES, MAX_EPISODE_STEPS, PADDLE, PADDLE_ROW, ROWS, TOKENS, Games, draw_bricks, draw_serves,
    standard_serves,
)  # fmt: skip
from checkpoint import CheckpointError  # noqa: E402
from evaluation import SERVES  # noqa: E402
from load_model import SHIPPED, load_policy  # noqa: E402
from model import set_threads  # noqa: E402
from rollout_buffer import reader_of  # noqa: E402

STICKY = 0.1  # probability that the previous action is repeated
COLUMNS = ["player", "condition", "games", "score", "of possible", "cleared", "lost", "caught", "lives lost"]


def gpt(policy):
    """-> a player: tokens (n, 1944) -> logits (n, 3)."""
    reader = reader_of(policy)
    return lambda tokens: reader(reader.encode(tokens))[0].cpu()


def tracker(tokens):
    """Moves if the ball is more than one column from the paddle's centre."""
    pages = tokens.reshape(-1, ROWS, COLS)
    ball = (pages == ord("O")).any(1).argmax(1)
    centre = (pages[:, PADDLE_ROW] == ord("=")).argmax(1) + len(PADDLE) // 2
    return torch.from_numpy(np.stack([np.full(len(pages), 1.5), centre - ball, ball - centre], axis=1))


def random_play(tokens):
    return torch.zeros(len(tokens), 3)


def conditions(num_games, seed, sample):
    """-> {name: (serves (n, 5, 3), bricks (n, 7, 13), probability that an action is repeated)}"""
    rng = np.random.default_rng(seed)
    serves, whole = draw_serves(rng, num_games), draw_bricks(rng, num_games)
    standard = (serves, whole) if sample else (standard_serves(SERVES), draw_bricks(rng, len(SERVES)))
    return {
        "standard": (*standard, 0.0),
        "random serves": (draw_serves(rng, num_games, 1.0), whole, 0.0),
        "random layouts": (serves, draw_bricks(rng, num_games, 1.0), 0.0),
        "sticky actions": (serves, whole, STICKY),
    }


def play(player, sample, serves, bricks, sticky, seed):
    """Every game once, to its end -> scores, bricks left and lives left, each (n,). sample: actions drawn, else the likeliest."""
    n = len(serves)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng([seed, 1])
    playing, actions, results = np.ones(n, bool), np.zeros(n, int), np.zeros((3, n), int)
    games = Games(n)
    games.begin(np.arange(n), serves, bricks)
    for _ in range(MAX_EPISODE_STEPS):
        logits = player(games.pages.reshape(n, TOKENS)[playing])
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0] if sample else logits.argmax(-1)
        heard = rng.random(n)[playing] >= sticky  # drawn for every game: the same ones for every player
        actions[playing] = np.where(heard, chosen.numpy(), actions[playing])
        _, terminated, _ = games.step(actions)
        results[:, playing] = np.stack([games.score, games.bricks_left, games.lives])[:, playing]
        playing &= ~terminated
        if not playing.any():
            break
    return results


def summary(bricks, scores, bricks_left, lives):
    """The numbers of one row, as text."""
    possible = BRICK_POINTS * bricks.sum((1, 2)) + CLEAR_POINTS
    cleared, lost = bricks_left == 0, lives == 0
    shares = [(scores / possible).mean(), cleared.mean(), lost.mean(), (~cleared & ~lost).mean()]
    return [str(len(scores)), f"{scores.mean():.1f}", *(f"{share:.1%}" for share in shares), f"{(LIVES - lives).mean():.2f}"]


def read_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED, help="a checkpoint or a run (default: the shipped model)")
    parser.add_argument("--games", type=int, default=200, help="games for each row (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.error = lambda message: sys.exit(f"robustness.py: {message}")
    args = parser.parse_args()
    for name, low, high in (("games", 1, 10_000), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    return args


def main():
    args = read_command_line()
    policy, meta = load_policy(args.model)
    set_threads(policy.config.n_layer)
    print(f"{os.path.relpath(args.model)}: trained for {meta.get('global_step', 0):,} steps\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    read = gpt(policy)
    for name, player, sample in [("GPT, greedy", read, False), ("GPT, sampled", read, True),
                                 ("tracker", tracker, False), ("random", random_play, True)]:  # fmt: skip
        for condition, (serves, bricks, sticky) in conditions(args.games, args.seed, sample).items():
            row = summary(bricks, *play(player, sample, serves, bricks, sticky, args.seed))
            print("| " + " | ".join([name, condition, *row]) + " |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"robustness.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
