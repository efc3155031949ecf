"""Measures how well a policy plays.

In Breakout only the directions of the five serves are random, so a greedy policy plays at most 2^5 = 32 different
games, and `exact` plays them all. (With other LIVES, 2^LIVES.) The score still jumps during a training: half of these
games begin with the same serve, so one changed action can change 16 scores. `returned` varies less.

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
    BreakoutAsciiVec,
    Games,
    draw_numbers,
    new_games,
    standard_serves,
)
from games.game import BREAKOUT

SERVES = np.array(list(itertools.product((-1, 1), repeat=LIVES)))  # (32, 5), the dx of the serves
RANDOM_SCORE = 82  # random play of the standard game: 81.6 with a standard error of 0.5 in 12,000 games
METRICS = ("score", "min", "max", "cleared", "length", "returned")  # of `evaluate`, without "games", always len(SERVES)
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


def is_breakout(game):
    return game is None or game.id == BREAKOUT


def evaluate(policy, game=None, num_episodes=0):
    """Let a policy play a game greedily.

    Args:
        game: a `Game`; None for Breakout.
        num_episodes: how many to play, of any game but Breakout.

    Returns:
        a dict with METRICS or, for other games, OTHER_METRICS, and how many "games" there were.
    """
    if is_breakout(game):
        return {**exact(policy), "returned": returned(policy)}
    return episodes(policy, game, num_episodes)


def exact(policy, max_episode_steps=MAX_EPISODE_STEPS):
    """Let a policy play all 32 games greedily. Returns their `summary`."""
    return summary(play_all_games(greedy(policy), max_episode_steps))


def play_all_games(player, max_episode_steps=MAX_EPISODE_STEPS):
    """Let a player that always answers a page in the same way play a game with each of SERVES. Returns `Results`."""
    bricks = np.ones((len(SERVES), BRICK_ROWS, BRICK_COLUMNS), bool)
    return play_games(player, standard_serves(SERVES), bricks, max_episode_steps, deterministic=True)


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


def returned(policy, starts=256, steps=300 * BALL_INTERVAL):
    """Return the share of falling balls that the paddle returns, 0..1, always from the same varied starts."""
    player = greedy(policy)
    env = BreakoutAsciiVec(starts, varied_starts=1.0)
    obs, _ = env.reset(seed=0)
    hits = misses = 0
    for _ in range(steps):
        falling = env.games.dy == 1
        obs, _, terminated, _, infos = env.step(player(obs))
        lost = infos["life_lost"]
        if terminated.any():
            lost = lost | infos["final_info"]["life_lost"]
        # Where a game terminated there is a new game already, whose ball was served and not returned.
        returned_now = falling & ~lost & ~terminated & (env.games.dy == -1) & (env.games.ball_y == SERVE_ROW)
        misses += int(lost.sum())
        hits += int(returned_now.sum())
    return hits / max(hits + misses, 1)


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
    results = Results(*np.zeros((4, n), int))
    for step in range(1, max_steps + 1):
        # Drawn for all n games, so that no game's numbers depend on how long others last.
        repeated = rng.random(n) < sticky
        chosen = player(games.pages.reshape(n, TOKENS)[playing])
        actions[playing] = np.where(repeated[playing], actions[playing], chosen)
        _, terminated, _ = games.step(actions)
        for result, now in zip(results, (games.score, games.bricks_left, games.lives, np.full(n, step))):
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

    A state is a page, how its ball moves, and how long the ball waits. seen: the set of all states so far, to which
    these are added.
    """
    waiting = games.elapsed % BALL_INTERVAL
    motion = np.column_stack([games.dx + 1, games.dy + 1, games.lives + 1, waiting])
    states = [hash((i, x.tobytes(), page.tobytes())) for i, (x, page) in enumerate(zip(motion, games.pages))]
    again = np.array([state in seen for state in states])
    seen.update(states)
    return again
