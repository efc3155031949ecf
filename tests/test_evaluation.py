import numpy as np
import pytest
import torch

import evaluation
from breakout_ascii import BreakoutAscii, Games, draw_numbers, new_games, standard_serves
from evaluation import (
    METRICS,
    RANDOM_SCORE,
    SERVES,
    VARIED_SEED,
    evaluate,
    exact,
    greedy,
    play_games,
    sampled,
    sampling,
    standard_error,
    tracker,
    varied_games,
)
from ppo import Policy


class Tracker(Policy):
    """A policy that chases the ball with the paddle's centre, and stays while it is within `slack` columns."""

    def __init__(self, slack):
        super().__init__()
        self.slack = torch.nn.Parameter(torch.tensor(float(slack)))

    def forward(self, tokens):
        pages = tokens.view(-1, 24, 81)
        ball = (pages == ord("O")).any(1).int().argmax(1)
        offset = ball - ((pages[:, 22] == ord("=")).int().argmax(1) + 3)
        logits = torch.stack([self.slack + 0.5 - offset.abs(), -offset * 1.0, offset * 1.0], dim=1)
        logits[:, 1:][offset.abs() <= self.slack] = -100
        return logits * 1.0, torch.zeros(len(tokens))


class Still(Tracker):
    def forward(self, tokens):
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(tokens), 3), torch.zeros(len(tokens))


def play_one(policy, serves, limit):
    """Play every step of one game. Returns score, length, bricks left."""
    env = BreakoutAscii(max_episode_steps=limit)
    obs, _ = env.reset(options={"serves": serves})
    for step in range(1, limit + 1):
        obs, _, terminated, truncated, info = env.step(int(policy(torch.from_numpy(obs[None]))[0].argmax()))
        if terminated or truncated:
            return info["score"], step, info["bricks"]


@pytest.mark.parametrize("slack, limit", [(1, 5000), (0, 1700)])
def test_exact_equals_games_played_one_by_one(slack, limit):
    """The dead-zone tracker clears every wall; the one that chases the centre is caught in a cycle."""
    with torch.no_grad():
        result = exact(Tracker(slack), limit)
        chosen = [0, 13]
        slow = np.array([play_one(Tracker(slack), SERVES[i], limit) for i in chosen])
    assert result["games"] == 32
    if slack:
        assert result["score"] == result["min"] == 960 and result["cleared"] == 32
        assert (slow[:, 0] == 960).all() and 1700 < result["length"] < 1950
    else:
        assert result["length"] == limit and result["cleared"] == 0
        assert {result["min"], result["max"]} == {680, 740} >= set(slow[:, 0])


def test_a_cycle_is_noticed_before_truncation(monkeypatch):
    """The games count as 5000 steps long, though they are not played that far."""
    step = Games.step
    steps = 0

    def counted(*args):
        nonlocal steps
        steps += 1
        return step(*args)

    monkeypatch.setattr(Games, "step", counted)
    assert exact(Tracker(0))["length"] == 5000 and steps < 4500


def test_a_paddle_that_stands_still():
    """It misses almost every ball, so the 32 games are short enough to be compared with games played one by one."""
    result = evaluate(Still(0))
    scores = [play_one(Still(0), serves, 5000)[0] for serves in SERVES]
    assert result["score"] == np.mean(scores) and (result["min"], result["max"]) == (min(scores), max(scores))
    assert result["returned"] < 0.2 and result["varied"] < 0.05
    assert set(METRICS) < set(result)


def test_varied_games_are_played_beside_the_32(monkeypatch):
    """All results are as if each kind of games were played alone. The tracker returns all balls that can be reached."""
    monkeypatch.setattr(evaluation, "VARIED_GAMES", 16)
    monkeypatch.setattr(evaluation, "greedy", lambda policy: tracker)
    result = evaluate(None)
    assert {name: result[name] for name in exact(None)} == exact(None)
    varied = play_games(tracker, *varied_games(16, VARIED_SEED), deterministic=True)
    assert result["varied"] == (varied.bricks == 0).mean() and 0.5 < result["varied"] <= 1
    misses = (5 - varied.lives).sum()
    assert result["returned"] == varied.returned.sum() / (varied.returned.sum() + misses) > 0.9


def test_half_of_the_varied_games_have_other_serves_and_half_other_walls():
    serves, bricks = varied_games(100, seed=1)
    whole = bricks.all((1, 2))
    standard = (serves[:, :, 0] == 40).all(1)
    assert whole[:50].all() and not standard[:50].any()
    assert standard[50:].all() and whole[50:].sum() < 5 and 0.3 < bricks[50:].mean() < 0.7
    assert all((a == b).all() for a, b in zip(varied_games(100, seed=1), (serves, bricks)))


def test_returned_balls_are_counted():
    """As many balls come back up from the paddle's row as a game played step by step says."""
    env = BreakoutAscii()
    obs, _ = env.reset(options={"serves": SERVES[0]})
    returned = 0
    for _ in range(300):
        falling = env.games.dy[0] == 1
        obs, _, _, _, info = env.step(int(tracker(obs[None])[0]))
        returned += int(falling and env.games.dy[0] == -1 and env.games.ball_y[0] == 21 and not info["life_lost"])
    results = play_games(tracker, standard_serves(SERVES[:1]), np.ones((1, 7, 13), bool), 300, deterministic=True)
    assert results.returned[0] == returned > 5


def test_sampled_games_follow_their_seed():
    """The same seed gives the same results, and another seed others."""
    results = [sampled(Still(0), 4, seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert results[0]["games"] == 4 and results[0]["min"] <= results[0]["score"] <= results[0]["max"]
    assert 0 < results[0]["error"] <= (results[0]["max"] - results[0]["min"]) / 2 and "error" not in exact(Still(0))


def test_the_score_of_random_play():
    """The constant that figures and tables quote is right."""
    rng = np.random.default_rng(0)
    numbers = draw_numbers(np.random.default_rng(1), 2000)
    scores = play_games(lambda tokens: rng.integers(3, size=len(tokens)), *new_games(numbers)).scores
    assert scores.mean() == pytest.approx(RANDOM_SCORE, abs=4 * standard_error(scores)) and standard_error(scores) < 1.5


def test_the_standard_error_is_how_much_means_differ():
    """Means of five scores spread as much as it says."""
    scores = np.random.default_rng(0).exponential(55, (4000, 5))
    expected = scores.mean(1).std()
    assert np.mean([standard_error(few) ** 2 for few in scores]) == pytest.approx(expected**2, rel=0.1)
    assert standard_error([1, 3]) == 1 and standard_error([7]) == 0


def test_many_games_are_played_a_few_at_a_time(monkeypatch):
    """Memory does not grow with the number of games."""
    sizes = []
    monkeypatch.setattr(evaluation, "GAMES_AT_ONCE", 3)

    def short_games(player, serves, bricks):
        sizes.append(len(serves))
        return play_games(player, serves, bricks, 20)

    monkeypatch.setattr(evaluation, "play_games", short_games)
    assert sampled(Still(0), 8, seed=0)["games"] == 8 and sizes == [3, 3, 2]


def test_players():
    """Two of three pages are the same, so the policy reads two. Sampling follows the probabilities."""
    pages = np.stack([BreakoutAscii().reset(seed=0)[0]] * 3)
    pages[1, 21 * 81 + 40] = 32
    pages[1, 21 * 81 + 10] = ord("O")
    asked = []

    class Asked(Tracker):
        def forward(self, tokens):
            asked.append(len(tokens))
            return super().forward(tokens)

    assert greedy(Asked(1))(pages).tolist() == tracker(pages).tolist() == [0, 1, 0] and asked == [2]
    drawn = sampling(Still(0), seed=0)(np.repeat(pages, 200, 0))
    shares = np.bincount(drawn, minlength=3) / 600
    assert np.abs(shares - np.array([np.e, 1, 1]) / (np.e + 2)).max() < 0.1  # five standard deviations


def test_sticky_actions_repeat_the_one_before():
    """The player always wants left. The paddle goes left at once without stickiness, and never if every action is
    repeated."""
    bricks = np.ones((2, 7, 13), bool)
    serves = standard_serves(np.ones((2, 5), int))
    seen = []

    def left(tokens):
        seen.append((tokens.reshape(-1, 24, 81)[:, 22] == ord("=")).argmax(1).tolist())
        return np.ones(len(tokens), int)

    for sticky, expected in ((0.0, [36, 34, 32]), (1.0, [36, 36, 36])):
        seen.clear()
        play_games(left, serves, bricks, 3, sticky=sticky)
        assert seen == [[x, x] for x in expected]
    seen.clear()
    play_games(left, serves.repeat(500, 0), bricks.repeat(500, 0), 2, sticky=0.3)
    assert 0.3 == pytest.approx((np.array(seen[1]) == 36).mean(), abs=0.075)  # five standard deviations


def test_a_cycle_is_one_game_alone_in_a_state_again():
    """Of 1024 games side by side in the same states, none is taken for another one that was there before."""
    bricks = np.ones((1024, 7, 13), bool)
    serves = standard_serves(np.ones((1024, 5), int))
    results = play_games(tracker, serves, bricks, 60, deterministic=True)
    assert (results.lengths == 60).all() and len(np.unique(results.scores)) == 1


def test_results_of_a_game_stay_when_others_go_on():
    """Of two games with one brick, one is cleared at once, and the other is lost later."""
    bricks = np.zeros((2, 7, 13), bool)
    # The first ball rises from (40, 21) to the right and meets the first brick.
    bricks[0, 6, 8] = bricks[1, 0, 0] = True
    results = play_games(lambda tokens: np.zeros(len(tokens), int), standard_serves(np.ones((2, 5), int)), bricks)
    assert (results.scores[0], results.bricks[0], results.lives[0], results.lengths[0]) == (60, 0, 5, 10)
    assert results.lives[1] == 0 and results.bricks[1] == 1 and results.lengths[1] > 10
