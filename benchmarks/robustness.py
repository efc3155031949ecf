"""How well it plays games that it is not scored on:  python -m benchmarks.robustness [CHECKPOINT|RUN ...] [--games 200]

standard        the game as it is: all 32 games if nothing is drawn, else games drawn at random
random serves   every serve anywhere on its row, the paddle under the ball; the whole wall
random layouts  any share of the bricks; the serves standard
sticky actions  one action in ten is not heard, the one before it is played again

Prints a markdown table. Where games are drawn, "score" has its standard error. "of possible" is each game's score as a share of all its
points. A game that is neither cleared nor lost is "caught in a cycle" until it is truncated. All players get the same serves and
layouts. To choose among models, give them all with one --seed, and score the one you choose with another.
"""

import harness.start  # before the slow imports

import numpy as np

from breakout_ascii import BRICK_POINTS, CLEAR_POINTS, LIVES, draw_numbers, new_games, standard_serves
from evaluation import GAMES_AT_ONCE, SERVES, Results, greedy, play_games, sampling, standard_error, tracker
from harness.device import set_threads
from harness.messages import shown
from harness.options import CommandLineError, Parser, given_path
from harness.supervise import run_script
from policies import SHIPPED, load_policy

STICKY = 0.1  # probability that the previous action is repeated
COLUMNS = ("player", "condition", "games", "score", "of possible", "cleared", "lost", "caught in a cycle", "lives lost")


def random_player(seed):
    """The player that draws its actions evenly."""
    rng = np.random.default_rng(seed)
    return lambda tokens: rng.integers(3, size=len(tokens))


def conditions(num_games, seed, deterministic):
    """-> {name: (serves (n, 5, 3), bricks (n, 7, 13) bool, probability that an action is repeated)}"""
    numbers = draw_numbers(np.random.default_rng(seed), num_games)
    (serves, whole), (varied_serves, layouts) = new_games(numbers), new_games(numbers, 1.0)
    standard = (
        (standard_serves(SERVES), np.ones((len(SERVES), *whole.shape[1:]), bool)) if deterministic else (serves, whole)
    )
    return {
        "standard": (*standard, 0.0),
        "random serves": (varied_serves, whole, 0.0),
        "random layouts": (serves, layouts, 0.0),
        "sticky actions": (serves, whole, STICKY),
    }


def play(player, serves, bricks, sticky, seed, deterministic):
    """Every game once, no more than GAMES_AT_ONCE at a time -> `Results`."""
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
    """The bricks (n, 7, 13) that games began with, their `Results`, whether they are drawn at random -> the cells of a row, text."""
    possible = BRICK_POINTS * bricks.sum((1, 2)) + CLEAR_POINTS
    cleared, lost = results.bricks == 0, results.lives == 0
    shares = [(results.scores / possible).mean(), cleared.mean(), lost.mean(), (~cleared & ~lost).mean()]
    lives_lost = (LIVES - results.lives).mean()
    score = f"{results.scores.mean():.1f}" + (f" ± {standard_error(results.scores):.1f}" if drawn else "")
    return [str(len(bricks)), score, *(f"{share:.1%}" for share in shares), f"{lives_lost:.2f}"]


def show_rows(name, make_player, deterministic, num_games, seed):
    """A row for each condition. Each gets a new player: with the seed anew, and because a policy has one inference cache."""
    for condition, (serves, bricks, sticky) in conditions(num_games, seed, deterministic).items():
        results = play(make_player(), serves, bricks, sticky, seed, deterministic)
        drawn = not (deterministic and condition == "standard")
        print("| " + " | ".join([name, condition, *cells(bricks, results, drawn)]) + " |", flush=True)


def read_command_line(argv):
    parser = Parser("-m benchmarks.robustness", __doc__)
    parser.add_argument(
        "models", nargs="*", type=given_path, default=[SHIPPED], help="checkpoints or runs (default: the shipped one)"
    )
    parser.add_argument("--games", type=int, default=200, help="games for each row (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    args = parser.parse_args(argv)
    for name, low, high in (("games", 1, 10_000), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(args, name) <= high:
            raise CommandLineError(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    return args


def main(argv=()):
    args = read_command_line(argv)
    models = {shown(path): load_policy(path) for path in args.models}
    set_threads(max(policy.config.n_layer for policy, _ in models.values()))
    for name, (_, meta) in models.items():
        print(f"{name}: trained for {meta.get('global_step', 0):,} steps")
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name, (policy, _) in models.items():
        show_rows(f"{name}, greedy", lambda: greedy(policy), True, args.games, args.seed)
        show_rows(f"{name}, sampled", lambda: sampling(policy, args.seed), False, args.games, args.seed)
    show_rows("tracker", lambda: tracker, True, args.games, args.seed)
    show_rows("random", lambda: random_player(args.seed), False, args.games, args.seed)


if __name__ == "__main__":
    run_script(main, "-m benchmarks.robustness")
