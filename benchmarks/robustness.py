"""Score models in games that their evaluation does not have:  python -m benchmarks.robustness [MODEL ...] [--games 200]

standard        the game as it is: all 32 games for a greedy player, otherwise games drawn at random
random serves   every serve starts anywhere on its row, with the paddle under the ball; the whole wall
random layouts  a random share of the bricks; standard serves
sticky actions  one action in ten is replaced by the action before it

MODEL is a checkpoint or a run. The program prints a markdown table. Where games are drawn at random, "score" has its
standard error. "of possible" is the score as a share of all points of a game. A game that is neither cleared nor lost
was "caught in a cycle" until it was truncated. All players get the same serves and layouts. To choose among models,
give them all with one --seed, and score the chosen one with another.
"""

import harness.start  # before the slow imports

import functools
import itertools

import numpy as np
from tqdm import tqdm

from breakout_ascii import BRICK_POINTS, CLEAR_POINTS, LIVES, draw_numbers, new_games, standard_serves
from evaluation import GAMES_AT_ONCE, SERVES, Results, greedy, play_games, sampling, standard_error, tracker
from harness.device import set_threads
from harness.messages import shown
from harness.options import Parser, given_path, within
from harness.supervise import run_script
from harness.tables import show_table
from policies import SHIPPED, load_breakout_policy

STICKY = 0.1  # probability that the previous action is repeated
COLUMNS = ("player", "condition", "games", "score", "of possible", "cleared", "lost", "caught in a cycle", "lives lost")


def random_player(seed):
    """Return a player that draws every action with the same probability."""
    rng = np.random.default_rng(seed)
    return lambda tokens: rng.integers(3, size=len(tokens))


def conditions(num_games, seed, deterministic):
    """Draw the games of each condition.

    Returns:
        {name: (serves (n, 5, 3), bricks (n, 7, 13), probability that an action is repeated)}
    """
    numbers = draw_numbers(np.random.default_rng(seed), num_games)
    serves, whole = new_games(numbers)
    varied_serves, layouts = new_games(numbers, 1.0)
    standard_games = serves, whole
    if deterministic:  # then there are no other games than these
        standard_games = standard_serves(SERVES), np.ones((len(SERVES), *whole.shape[1:]), bool)
    return {
        "standard": (*standard_games, 0.0),
        "random serves": (varied_serves, whole, 0.0),
        "random layouts": (serves, layouts, 0.0),
        "sticky actions": (serves, whole, STICKY),
    }


def play(player, serves, bricks, sticky, seed, deterministic):
    """Play every game once, at most GAMES_AT_ONCE of them at a time. Returns `Results`."""
    parts = []
    for first in range(0, len(serves), GAMES_AT_ONCE):
        some = slice(first, first + GAMES_AT_ONCE)
        parts.append(
            play_games(
                player,
                serves[some],
                bricks[some],
                sticky=sticky,
                seed=[seed, first],
                deterministic=deterministic and not sticky,
            )
        )
    return Results(*map(np.concatenate, zip(*parts)))


def cells(bricks, results, drawn):
    """Return the cells of a row as text.

    Args:
        bricks: those that the games began with, (n, 7, 13).
        results: the `Results` of the games.
        drawn: whether the games were drawn at random.
    """
    possible = BRICK_POINTS * bricks.sum((1, 2)) + CLEAR_POINTS
    cleared = results.bricks == 0
    lost = results.lives == 0
    shares = [(results.scores / possible).mean(), cleared.mean(), lost.mean(), (~cleared & ~lost).mean()]
    lives_lost = (LIVES - results.lives).mean()
    score = f"{results.scores.mean():.1f}" + (f" ± {standard_error(results.scores):.1f}" if drawn else "")
    return [str(len(bricks)), score, *(f"{share:.1%}" for share in shares), f"{lives_lost:.2f}"]


def rows_of(name, make_player, deterministic, num_games, seed):
    """Yield a row for each condition. Each gets a new player, because a policy has one valid inference function."""
    for condition, (serves, bricks, sticky) in conditions(num_games, seed, deterministic).items():
        results = play(make_player(), serves, bricks, sticky, seed, deterministic)
        drawn = not (deterministic and condition == "standard")
        yield dict(zip(COLUMNS, [name, condition, *cells(bricks, results, drawn)]))


def read_command_line(argv):
    parser = Parser("-m benchmarks.robustness", __doc__)
    parser.add_argument(
        "models", nargs="*", type=given_path, default=[SHIPPED], help="checkpoints or runs (default: the shipped one)"
    )
    parser.add_argument("--games", type=within("[1, 10_000]"), default=200, help="games for each row (default 200)")
    parser.add_argument("--seed", type=within("[0, 4_294_967_295]"), default=0, help="of all that is drawn (default 0)")
    return parser.parse_args(argv)


def main(argv=()):
    args = read_command_line(argv)
    models = {shown(path): load_breakout_policy(path) for path in args.models}
    set_threads(max(policy.config.n_layer for policy, _ in models.values()))
    for name, (_, meta) in models.items():
        print(f"{name}: trained for {meta.get('global_step', 0):,} steps")
    players = []  # a name, a function that makes the player, and whether it always acts alike
    for name, (policy, _) in models.items():
        players.append((f"{name}, greedy", functools.partial(greedy, policy), True))
        players.append((f"{name}, sampled", functools.partial(sampling, policy, args.seed), False))
    players.append(("tracker", lambda: tracker, True))
    players.append(("random", lambda: random_player(args.seed), False))
    rows = itertools.chain.from_iterable(rows_of(*player, args.games, args.seed) for player in players)
    rows = list(tqdm(rows, total=4 * len(players), unit=" row", leave=False, disable=None))
    print()
    show_table(rows, labels=2)


if __name__ == "__main__":
    run_script(main, "-m benchmarks.robustness")
