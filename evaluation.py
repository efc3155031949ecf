"""Measures how well a policy plays.

In Breakout only the directions of the five serves are random, so a greedy policy plays at most 2^5 = 32 different
games, and `exact` plays them all. (With other LIVES, 2^LIVES.) The score still jumps during a training: half of these
games begin with the same serve, so one changed action can change 16 scores. Therefore an evaluation also plays
VARIED_GAMES others, each with serves or a wall of its own. The share of them that is cleared tells players apart.

In any other game, `episodes` plays a number of them with fixed seeds, and the score is a mean with a standard error.

A player is a function that takes pages, (n, rows * columns) uint8 tokens, and returns actions (n,).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from breakout_ascii import (
    BALL_INTERVAL,
    BOARD,
    BRICK_COLUMNS,
    BRICK_ROWS,
    COLUMNS,
    LIVES,
    MAX_EPISODE_STEPS,
    MOST_POINTS,
    PADDLE_MIDDLE,
    PADDLE_MOVES,
    PADDLE_ROW,
    ROWS,
    SERVE_ROW,
    STANDARD_BOARD,
    TOKENS,
    Games,
    draw_numbers,
    new_games,
    standard_serves,
)
from games.game import BREAKOUT

SERVES = np.array(list(itertools.product((-1, 1), repeat=LIVES)))  # (32, 5), the dx of the serves
RANDOM_SCORE = 82  # random play of the standard game: 81.6 with a standard error of 0.5 in 12,000 games
VARIED_GAMES = 128  # so the standard error of the share cleared is at most 0.044, and 0.03 for a share of 0.9
VARIED_SEED = 0
# What `evaluate` measures, without "games", which is always len(SERVES)
METRICS = ("score", "min", "max", "cleared", "length", "varied", "returned")
OTHER_METRICS = ("score", "error", "min", "max", "length")  # the same for games other than Breakout
GAMES_AT_ONCE = 1024
FIRST_SEED = 1_000_000  # of the episodes of other games, far from the seeds of trainings
EPISODES_AT_ONCE = 25
RANDOM_STEPS = 20_000  # after which random play of another game has been measured, even if episodes are left


class Results(NamedTuple):
    """Holds the results of n games; each array is (n,) int."""

    scores: np.ndarray
    bricks: np.ndarray  # bricks left; 0: the wall is cleared
    lives: np.ndarray  # lives left; 0: the game is lost
    lengths: np.ndarray  # in steps
    returned: np.ndarray  # how often the paddle returned the ball


def is_breakout(game):
    return game is None or game.id == BREAKOUT


def evaluate(policy, game=None, num_episodes=0):
    """Let a policy play a game greedily.

    Args:
        game: a `Game`; None for Breakout.
        num_episodes: how many to play, of any game but Breakout.

    Returns:
        a dict with METRICS or, for other games, OTHER_METRICS, and how many "games" there were. For Breakout that is
        the `summary` of all 32 games, the share of the varied games that are cleared, and the share of all falling
        balls in them that are returned.
    """
    if not is_breakout(game):
        return episodes(policy, game, num_episodes)
    # Played side by side, they take hardly longer than the varied games alone.
    games = [all_games(), varied_games(VARIED_GAMES, VARIED_SEED)]
    results = play_games(greedy(policy), *map(np.concatenate, zip(*games)), deterministic=True)
    standard, varied = (Results(*parts) for parts in zip(*(np.split(x, [len(SERVES)]) for x in results)))
    falling = varied.returned.sum() + (LIVES - varied.lives).sum()
    return {
        **summary(standard),
        "varied": float((varied.bricks == 0).mean()),
        "returned": float(varied.returned.sum() / max(falling, 1)),
    }


def exact(policy, max_episode_steps=MAX_EPISODE_STEPS):
    """Let a policy play all 32 games greedily. Returns their `summary`."""
    return summary(play_all_games(greedy(policy), max_episode_steps))


def play_all_games(player, max_episode_steps=MAX_EPISODE_STEPS):
    """Let a player that always answers a page in the same way play a game with each of SERVES. Returns `Results`."""
    return play_games(player, *all_games(), max_episode_steps, deterministic=True)


def all_games():
    """Return the serves (32, 5, 3) and the bricks (32, 7, 13) of a game with each of SERVES."""
    return standard_serves(SERVES), np.ones((len(SERVES), BRICK_ROWS, BRICK_COLUMNS), bool)


def varied_games(n, seed):
    """Draw n games: half of them with serves from anywhere, the others with a random share of the bricks.

    Returns their serves (n, 5, 3) and bricks (n, 7, 13).
    """
    numbers = draw_numbers(np.random.default_rng(seed), n)
    serves, bricks = new_games(numbers)
    varied_serves, walls = new_games(numbers, 1.0)
    half = n // 2
    return np.concatenate([varied_serves[:half], serves[half:]]), np.concatenate([bricks[:half], walls[half:]])


@functools.cache
def levels(game=None, num_episodes=0):
    """Return scores to compare with, {label: score}. They are measured unless the game is standard Breakout.

    Args:
        game: a `Game`; None for Breakout.
        num_episodes: of random play, in any game but Breakout.
    """
    if not is_breakout(game):
        return {"random play": random_score(game, num_episodes)}
    if BOARD == STANDARD_BOARD:
        return {"the whole wall, as a simple tracker plays it": MOST_POINTS, "random play": RANDOM_SCORE}
    rng = np.random.default_rng(0)
    games = new_games(draw_numbers(rng, GAMES_AT_ONCE))
    at_random = play_games(lambda tokens: rng.integers(len(PADDLE_MOVES), size=len(tokens)), *games)
    tracked = play_all_games(tracker).scores.mean()
    return {
        "the whole wall": MOST_POINTS,
        "random play": round(float(at_random.scores.mean())),
        "a simple tracker": round(float(tracked)),
    }


def sampled(policy, num_games, seed):
    """Play standard games with actions sampled from the policy.

    Returns their `summary`, and as "error" the standard error of the score.
    """
    player = sampling(policy, seed)
    rng = np.random.default_rng(seed)
    parts = []
    for first in range(0, num_games, GAMES_AT_ONCE):
        numbers = draw_numbers(rng, min(GAMES_AT_ONCE, num_games - first))
        parts.append(play_games(player, *new_games(numbers)))
    results = Results(*map(np.concatenate, zip(*parts)))
    return {**summary(results), "error": standard_error(results.scores)}


def episodes(policy, game, num_episodes, seed=FIRST_SEED, sample=False):
    """Let a policy play episodes of any game, greedily or with actions sampled from it.

    Args:
        game: a `Game`.
        seed: of the first episode; the others have the seeds after it.

    Returns:
        the mean return as "score", its standard "error", the lowest and the highest return, how many "games" there
        were, and their mean "length" in steps.
    """
    returns = []
    lengths = []
    for first in range(seed, seed + num_episodes, EPISODES_AT_ONCE):
        seeds = range(first, min(first + EPISODES_AT_ONCE, seed + num_episodes))
        player = sampling(policy, first) if sample else greedy(policy)
        of_these, steps = play_episodes(player, game, seeds)
        returns += of_these
        lengths += steps
    return {
        "score": float(np.mean(returns)),
        "error": standard_error(returns),
        "min": min(returns),
        "max": max(returns),
        "games": num_episodes,
        "length": float(np.mean(lengths)),
    }


def play_episodes(player, game, seeds):
    """Let a player play an episode of a game with each of the seeds. Returns lists of their returns and lengths."""
    envs = environments(game, len(seeds))
    pages = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    returns = [0.0] * len(envs)
    lengths = [0] * len(envs)
    playing = list(range(len(envs)))
    while playing:
        actions = player(pages[playing])
        for i, action in zip(list(playing), actions):
            pages[i], reward, terminated, truncated, _ = envs[i].step(int(action))
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                playing.remove(i)
    return returns, lengths


@functools.cache
def environments(game, number):
    """Return a number of environments of a game, made only once, because that may take long."""
    return [game.make() for _ in range(number)]


def random_score(game, num_episodes):
    """Return the mean return of random play in at most so many episodes and, from the second on, RANDOM_STEPS steps."""
    rng = np.random.default_rng(0)
    returns = []
    steps = 0
    while len(returns) < num_episodes and steps < RANDOM_STEPS:
        seed = FIRST_SEED + len(returns)
        played, lengths = play_episodes(lambda pages: rng.integers(len(game.actions), size=len(pages)), game, [seed])
        returns += played
        steps += sum(lengths)
    return float(f"{np.mean(returns):.3g}")


def standard_error(scores):
    """Return the standard error of the mean of independent scores; 0 for a single score."""
    return float(np.std(scores) / max(len(scores) - 1, 1) ** 0.5)


def summary(results):
    """Return the mean score, the lowest and the highest, how many games cleared the wall, and the mean length."""
    return {
        "score": float(results.scores.mean()),
        "min": int(results.scores.min()),
        "max": int(results.scores.max()),
        "cleared": int((results.bricks == 0).sum()),
        "games": len(results.scores),
        "length": float(results.lengths.mean()),
    }


# Players


def check_logits(logits):
    """Raise FloatingPointError for logits from which no action can be chosen."""
    if not logits.isfinite().all():
        raise FloatingPointError(
            "the logits are not finite, so the weights are far too large; take an earlier checkpoint"
        )


def greedy(policy):
    """Return the player that takes the most probable action.

    Games that share their beginning show the same pages; each distinct page is read once.
    """
    act = policy.inference_function()

    def player(tokens):
        distinct = {}
        which = [distinct.setdefault(page.tobytes(), len(distinct)) for page in tokens]
        pages = np.frombuffer(b"".join(distinct), np.uint8).reshape(len(distinct), -1)
        logits, _ = act(policy.encode(pages.copy()))
        check_logits(logits)
        return logits.argmax(-1).cpu().numpy()[which]

    return player


def sampling(policy, seed):
    """Return the player that samples its actions from the policy."""
    act = policy.inference_function()
    generator = torch.Generator().manual_seed(seed)

    def player(tokens):
        logits, _ = act(policy.encode(tokens))
        check_logits(logits)
        return torch.multinomial(logits.cpu().softmax(-1), 1, generator=generator).squeeze(1).numpy()

    return player


def tracker(tokens):
    """Move whenever the ball is more than one column from the paddle's centre. This function itself is a player."""
    pages = tokens.reshape(-1, ROWS, COLUMNS)
    ball = (pages == ord("O")).any(1).argmax(1)
    centre = (pages[:, PADDLE_ROW] == ord("=")).argmax(1) + PADDLE_MIDDLE
    return np.where(ball < centre - 1, 1, np.where(ball > centre + 1, 2, 0))


# Play


def play_games(player, serves, bricks, max_steps=MAX_EPISODE_STEPS, *, sticky=0.0, seed=0, deterministic=False):
    """Play n games to their ends.

    Args:
        serves, bricks: (n, 5, 3) and (n, 7, 13) bool, as `Games.reset` takes them.
        sticky: the probability that a game repeats its previous action, which is "stay" at first.
        seed: of the random numbers for this.
        deterministic: says that the player always answers a page in the same way, and nothing is sticky. A game that
            comes back to an earlier state is then in a cycle. It would keep its score until truncation, so it is not
            played on.

    Returns:
        `Results`
    """
    n = len(serves)
    rng = np.random.default_rng(seed)
    seen = set()
    games = Games(n)
    games.reset(np.ones(n, bool), serves, bricks)
    playing = np.ones(n, bool)
    actions = np.zeros(n, int)
    results = Results(*np.zeros((5, n), int))
    for step in range(1, max_steps + 1):
        # Drawn for all n games, so that no game's numbers depend on how long others last.
        repeated = rng.random(n) < sticky
        chosen = player(games.pages.reshape(n, TOKENS)[playing])
        actions[playing] = np.where(repeated[playing], actions[playing], chosen)
        falling = games.dy == 1
        _, terminated, life_lost = games.step(actions)
        returned = falling & ~life_lost & (games.dy == -1) & (games.ball_y == SERVE_ROW)
        after = games.score, games.bricks_left, games.lives, np.full(n, step), results.returned + returned
        for result, now in zip(results, after):
            result[playing] = now[playing]
        playing &= ~terminated
        if deterministic:
            in_cycle = playing & in_a_state_again(games, seen)
            results.lengths[in_cycle] = max_steps
            playing &= ~in_cycle
        if not playing.any():
            break
    return results


def in_a_state_again(games, seen):
    """Return which games are in a state in which they were before, (n,) bool.

    As long as a game goes on, its wall only loses bricks, so their number stands for the wall. seen: the set of all
    states of these games so far, to which these are added.
    """
    state = {  # each number, and how many values it may have
        "game": (games.index, len(games.index)),
        "lives": (games.lives, LIVES + 1),
        "bricks": (games.bricks_left, BRICK_ROWS * BRICK_COLUMNS + 1),
        "ball": (games.ball_y * COLUMNS + games.ball_x, TOKENS),
        "motion": (3 * games.dy + games.dx + 4, 9),
        "paddle": (games.paddle_x, COLUMNS),
        "waiting": (games.elapsed % BALL_INTERVAL, BALL_INTERVAL),
    }
    # Games that have ended are stepped on by `play_games`, even below zero lives, and do not count.
    states = np.ravel_multi_index(*zip(*state.values()), mode="clip").tolist()
    again = np.array([x in seen for x in states])
    seen.update(states)
    return again
