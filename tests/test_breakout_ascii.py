"""The rules of the game against a slow reference and one by one, then random draws, both environments and their
errors."""

import itertools
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import breakout_ascii
from benchmarks.slow_game import SlowGame
from breakout_ascii import (
    BreakoutAscii,
    BreakoutAsciiVec,
    Games,
    RandomNumbers,
    draw_numbers,
    new_games,
    standard_serves,
    to_text,
)

ALL_SERVES = np.array(list(itertools.product((-1, 1), repeat=5)))  # (32, 5)


def tracker(games, dead_zone):
    """Return actions (N,) that move towards the ball if the paddle's centre is further from it than dead_zone."""
    off = games.ball_x - (games.paddle_x + 3)
    return np.where(np.abs(off) <= dead_zone, 0, np.where(off < 0, 1, 2))


def careless(games, rng, share):
    """Return the tracker's actions, of which this share (N,) is replaced by random ones."""
    return np.where(rng.random(len(share)) < share, rng.integers(3, size=len(share)), tracker(games, 1))


def compare_with_reference(env, policy, steps):
    """Play both side by side and compare every array and every page at each step. Returns counts of what happened."""
    observations, _ = env.reset(seed=7)
    slow = [SlowGame(s, b) for s, b in zip(env.games.serves, env.games.bricks)]
    seen = dict(lost=0, terminated=0, cleared=0, truncated=0, on_wall=0, bricks=0, beside_paddle=0)
    for _ in range(steps):
        if not env.varied_starts:
            assert (env.games.serves[..., 0] == 40).all() and (env.games.serves[..., 2] == 36).all()
        actions = policy(env.games)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        for i, game in enumerate(slow):
            reward, over, lost = game.step(actions[i])
            cut = not over and game.elapsed >= env.max_episode_steps
            assert (rewards[i], terminated[i], truncated[i]) == (reward, over, cut)
            page = observations[i]
            info = infos
            if over or cut:
                page = infos["final_obs"][i]
                info = infos["final_info"]
                slow[i] = SlowGame(env.games.serves[i], env.games.bricks[i])
                assert to_text(observations[i]) == slow[i].page()
            assert to_text(page) == game.page()
            expected = dict(score=game.score, lives=game.lives, bricks=len(game.bricks), life_lost=lost)
            assert {key: info[key][i] for key in expected} == expected
            seen["lost"] += lost
            seen["terminated"] += over
            seen["cleared"] += not game.bricks
            seen["truncated"] += cut
            seen["on_wall"] += game.x in (0, 79)
            seen["bricks"] += reward > 0
            seen["beside_paddle"] += game.y == 22
    return seen


def test_random_play_equals_the_reference():
    rng = np.random.default_rng(0)
    seen = compare_with_reference(BreakoutAsciiVec(8), lambda games: rng.integers(3, size=8), 500)
    assert seen["lost"] > 50 and seen["terminated"] > 10 and seen["bricks"] > 50 and seen["beside_paddle"] > 20


def test_good_play_equals_the_reference_until_the_wall_is_cleared():
    seen = compare_with_reference(BreakoutAsciiVec(2), lambda games: tracker(games, 1), 2000)
    assert seen["cleared"] == 2 and seen["on_wall"] > 20


def test_careless_play_from_varied_starts_with_truncation_equals_the_reference():
    rng = np.random.default_rng(1)
    share = np.repeat([0.25, 1.0], 4)
    env = BreakoutAsciiVec(8, varied_starts=0.7, max_episode_steps=300)
    seen = compare_with_reference(env, lambda games: careless(games, rng, share), 700)
    assert seen["truncated"] and seen["terminated"] and seen["lost"] > 5


@pytest.mark.parametrize(
    "name, value",
    [
        ("PADDLE_MOVES", np.array([0, -1, 1])),
        ("FLOOR", 22),
        ("RIGHT_WALL", 78),
        ("PADDLE_MAX", 71),
        ("BRICK_POINTS", 11),
        ("PADDLE_START", 37),
        ("PADDLE_LINES", breakout_ascii.PADDLE_LINES.copy()[::-1]),
    ],
)
def test_a_wrong_constant_is_noticed(monkeypatch, name, value):
    monkeypatch.setattr(breakout_ascii, name, value)
    with pytest.raises((AssertionError, ValueError)):  # one paddle goes right to the wall and loses balls, one plays
        compare_with_reference(BreakoutAsciiVec(2), lambda games: np.array([2, tracker(games, 1)[1]]), 200)


@pytest.mark.parametrize("rule", ["move_paddles", "bounce_off_walls", "bounce_off_paddles"])
def test_a_missing_rule_is_noticed(monkeypatch, rule):
    monkeypatch.setattr(Games, rule, lambda self, *args: None)
    with pytest.raises((AssertionError, IndexError)):
        compare_with_reference(BreakoutAsciiVec(2), lambda games: tracker(games, 1), 400)


# Each rule by hand.


def one_game(**values):
    """Return a new game with these values in its arrays."""
    games = Games(1)
    games.reset(np.ones(1, bool), standard_serves(np.ones((1, 5), int)), np.ones((1, 7, 13), bool))
    for name, value in values.items():
        getattr(games, name)[0] = value
    games.bricks_left[0] = games.bricks.sum()
    games.draw(np.ones(1, bool))
    return games


def ball(games):
    return tuple(int(getattr(games, name)[0]) for name in ("ball_x", "ball_y", "dx", "dy"))


def test_the_first_page():
    lines = to_text(one_game().pages[0].flatten()).split("\n")
    assert lines[0] == lines[23] == "#" * 80 and lines[24] == ""
    assert lines[5:12] == ["#" + "|____|" * 13 + "#"] * 7
    assert lines[21] == "#" + " " * 39 + "O" + " " * 38 + "#"
    assert lines[22] == "#" + " " * 35 + "=======" + " " * 36 + "#"


@pytest.mark.parametrize(
    "action, before, after", [(0, 36, 36), (1, 36, 34), (2, 36, 38), (1, 2, 1), (1, 1, 1), (2, 71, 72), (2, 72, 72)]
)
def test_paddle(action, before, after):
    games = one_game(paddle_x=before)
    games.move_paddles([action])
    assert games.paddle_x[0] == after


@pytest.mark.parametrize(
    "before, after",
    [
        ((40, 15, 1, -1), (41, 14, 1, -1)),
        ((1, 15, -1, -1), (0, 14, 1, -1)),
        ((0, 14, 1, -1), (1, 13, 1, -1)),
        ((78, 15, 1, 1), (79, 16, -1, 1)),
        ((79, 16, -1, 1), (78, 17, -1, 1)),
        ((40, 1, 1, -1), (41, 0, 1, 1)),
        ((41, 0, 1, 1), (42, 1, 1, 1)),
        ((1, 1, -1, -1), (0, 0, 1, 1)),
        ((78, 1, 1, -1), (79, 0, -1, 1)),
        ((78, 21, 1, 1), (79, 22, -1, 1)),
    ],
)
def test_flight_and_walls(before, after):
    x, y, dx, dy = before
    games = one_game(ball_x=x, ball_y=y, dx=dx, dy=dy)
    games.step([0])
    assert ball(games) == after
    games.step([0])  # the wall is restored when the ball leaves it
    walls = breakout_ascii.EMPTY_PAGE == ord("#")
    assert ((games.pages[0] == ord("#")) | (games.pages[0] == ord("O")))[walls].all()
    assert (games.pages[0] == ord("O")).sum() == 1


@pytest.mark.parametrize("offset, dx_after", [(0, -1), (1, -1), (2, -1), (3, -1), (4, 1), (5, 1), (6, 1)])
@pytest.mark.parametrize("dx", [-1, 1])
def test_paddle_meets_ball(offset, dx_after, dx):
    games = one_game(ball_x=30 + offset - dx, ball_y=21, dx=dx, dy=1, paddle_x=30)
    games.step([0])
    assert ball(games) == (30 + offset, 21, dx_after, -1)


@pytest.mark.parametrize("offset", [-1, 7])
def test_paddle_misses_ball_and_a_life_is_lost(offset):
    games = one_game(ball_x=29 + offset, ball_y=21, dx=1, dy=1, paddle_x=30)
    games.step([0])
    assert ball(games) == (30 + offset, 22, 1, 1)
    rewards, terminated, life_lost = games.step([0])
    assert (rewards[0], terminated[0], life_lost[0], games.lives[0]) == (0, False, True, 4)
    assert ball(games) == (40, 21, 1, -1) and games.paddle_x[0] == 36


def test_the_last_ball_stays_in_its_cell_over_the_paddle():
    games = one_game(ball_x=37, ball_y=22, dx=1, dy=1, paddle_x=30, lives=1)
    rewards, terminated, life_lost = games.step([2])
    assert (rewards[0], terminated[0], life_lost[0], games.lives[0]) == (0, True, True, 0)
    assert ball(games)[:2] == (37, 22)
    assert bytes(games.pages[0, 22, 32:39]) == b"=====O="


@pytest.mark.parametrize("x", [1, 6, 7, 78])
@pytest.mark.parametrize("dy", [-1, 1])
def test_a_brick_goes_and_the_ball_turns(x, dy):
    games = one_game(ball_x=x + 1 if x == 1 else x - 1, ball_y=8 - dy, dx=-1 if x == 1 else 1, dy=dy)
    column = (x - 1) // 6
    games.bricks[0, 8 - dy - 5] = False  # where the ball comes from
    games.bricks_left[0] = 78
    games.draw(np.ones(1, bool))
    rewards, terminated, life_lost = games.step([0])
    assert (rewards[0], terminated[0], life_lost[0], games.score[0], games.bricks_left[0]) == (10, False, False, 10, 77)
    assert ball(games)[1::2] == (8, -dy) and not games.bricks[0, 3, column]
    line = bytearray(b"#" + b"|____|" * 13 + b"#\n")
    line[1 + 6 * column : 7 + 6 * column] = b" " * 6
    line[x] = ord("O")
    assert bytes(games.pages[0, 8]) == bytes(line)


def test_the_last_brick_brings_60_and_ends_the_game():
    bricks = np.zeros((7, 13), bool)
    bricks[6, 5] = True
    games = one_game(ball_x=34, ball_y=12, dx=1, dy=-1, bricks=bricks)
    rewards, terminated, life_lost = games.step([0])
    assert (rewards[0], terminated[0], life_lost[0], games.score[0]) == (60, True, False, 60)


def play_all_serves(dead_zone):
    """Play the game of each sequence of serves. Returns final score, steps, truncated, each (32,)."""
    env = BreakoutAsciiVec(32)
    env.reset(options={"serves": ALL_SERVES})
    score = np.zeros(32)
    steps = np.zeros(32)
    cut = np.zeros(32, bool)
    for t in range(1, 5001):
        *_, truncated, infos = env.step(tracker(env.games, dead_zone))
        if "final_info" in infos:
            new = infos["_final_info"] & (steps == 0)
            score[new] = infos["final_info"]["score"][new]
            steps[new] = t
            cut[new] = truncated[new]
        if steps.all():
            return score, steps, cut
    raise AssertionError("a game of more than 5000 steps")


def test_baseline_a_tracker_with_a_dead_zone_clears_the_wall():
    score, steps, cut = play_all_serves(dead_zone=1)
    assert (score == 960).all() and not cut.any() and 1700 < steps.min() <= steps.max() < 1950


def test_baseline_a_ball_chaser_is_caught_in_a_cycle():
    score, steps, cut = play_all_serves(dead_zone=0)
    assert cut.all() and (steps == 5000).all() and set(score) == {680, 740}


def test_baseline_random_play():
    env = BreakoutAsciiVec(256)
    rng = np.random.default_rng(0)
    scores = []
    env.reset(seed=0)
    for _ in range(1500):
        infos = env.step(rng.integers(3, size=256))[-1]
        if "final_info" in infos:
            scores.extend(infos["final_info"]["score"][infos["_final_info"]])
    assert 75 < np.mean(scores) < 89 and 48 < np.std(scores) < 67


def comes_back(x, dx):
    """Return {(x, dx)} of all bounces that a paddle can give to a ball that left row 21 at x, beside one brick in a
    corner."""
    games = Games(72)
    corner = np.tile(np.eye(1, 91, dtype=bool).reshape(7, 13), (72, 1, 1))
    games.reset(np.ones(72, bool), standard_serves(np.ones((72, 5), int)), corner)
    games.ball_x[:] = x
    games.dx[:] = dx
    for _ in range(42):  # up and down again
        games.step(np.zeros(72, int))
    assert (games.ball_y == 21).all() and (games.dy == 1).all() and (games.bricks_left == 1).all()
    games.paddle_x[:] = np.arange(1, 73)
    games.step(np.zeros(72, int))
    hit = games.dy == -1
    return set(zip(games.ball_x[hit].tolist(), games.dx[hit].tolist()))


def test_the_rules_have_a_cycle_that_no_paddle_can_leave_and_two_bounces_that_none_can_return():
    assert comes_back(39, 1) == {(76, 1)} and comes_back(39, -1) == {(4, -1)}
    assert comes_back(76, 1) == comes_back(4, -1) == {(39, 1), (39, -1)}
    assert comes_back(36, 1) == comes_back(43, -1) == set()


# Both environments.


def assert_same(a, b, path="infos"):
    """Compare keys, types, dtypes and values at every level."""
    assert type(a) is type(b), path
    if isinstance(a, tuple):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        if a.dtype == object:
            for i, (x, y) in enumerate(zip(a, b)):
                assert_same(x, y, f"{path}[{i}]")
        else:
            assert (a == b).all(), path
    else:
        assert a == b, path


def test_steps_infos_and_autoresets_are_those_of_gymnasiums_sync_vector_env():
    theirs = SyncVectorEnv([lambda: BreakoutAscii(max_episode_steps=170)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    ours = BreakoutAsciiVec(4, max_episode_steps=170)
    options = {"serves": [1, -1, 1, 1, -1]}
    assert_same(ours.reset(options=options), theirs.reset(options=options))
    rng = np.random.default_rng(0)
    finished = []
    for _ in range(700):
        actions = rng.integers(3, size=4)
        assert_same(a := ours.step(actions), theirs.step(actions))
        finished.append((a[2] | a[3]).sum())
        for i in np.flatnonzero(a[2] | a[3]):  # the serves of the next game are drawn: give both the same
            games = theirs.envs[i].games
            ours.games.serves[i] = games.serves[0]
            ours.games.dx[i] = games.dx[0]
    assert sum(finished) > 15 and 1 in finished
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, space) == getattr(theirs, space)


def test_seeds_for_each_game_and_partial_resets_are_those_of_gymnasiums_sync_vector_env():
    """This includes games that follow by themselves, and does not depend on the number of games."""
    theirs = SyncVectorEnv([lambda: BreakoutAscii(max_episode_steps=130)] * 5, autoreset_mode=AutoresetMode.SAME_STEP)
    ours = BreakoutAsciiVec(5, max_episode_steps=130)
    fewer = BreakoutAsciiVec(2, max_episode_steps=130)
    seeds = [7, 3, 3, 0, 2**40]
    rng = np.random.default_rng(0)
    resets = 0
    ends = 0
    assert_same(ours.reset(seed=seeds), theirs.reset(seed=seeds))
    fewer.reset(seed=np.array(seeds[1:3]))
    for step in range(600):
        actions = rng.integers(3, size=5)
        assert_same(a := ours.step(actions), theirs.step(actions))
        ends += (a[2] | a[3]).sum()
        if step < 300:
            assert (fewer.step(actions[1:3])[0] == a[0][1:3]).all()
        elif rng.random() < 0.1:
            mask = rng.random(5) < 0.5
            before = ours.observation()
            mask[rng.integers(5)] = True
            seeds = [None if rng.random() < 0.5 else int(rng.integers(9)) for _ in range(5)]
            arguments = dict(seed=seeds if rng.random() < 0.7 else None)
            options = {"reset_mask": mask} | ({"serves": [1, -1, 1, 1, 1]} if rng.random() < 0.3 else {})
            assert_same(
                now := ours.reset(**arguments, options=options), theirs.reset(**arguments, options=dict(options))
            )
            assert (now[0][~mask] == before[~mask]).all()
            resets += 1
    assert resets > 15 and ends > 5


def test_a_seed_for_all_ends_those_of_each():
    one = BreakoutAsciiVec(16)
    other = BreakoutAsciiVec(16)
    one.reset(seed=list(range(16)))
    assert (serves_of(one, seed=3) == serves_of(other, seed=3)).all() and (serves_of(one) == serves_of(other)).all()


@pytest.mark.parametrize(
    "seed, plain",
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        ((3, 4), [3, 4]),
        (range(3, 5), [3, 4]),
        (np.array([3, 4], np.uint64), [3, 4]),
        ([np.int32(3), 4], [3, 4]),
    ],
)
def test_seeds_may_be_of_any_integer_type(seed, plain):
    assert (serves_of(BreakoutAsciiVec(2), seed=seed) == serves_of(BreakoutAsciiVec(2), seed=plain)).all()


@pytest.mark.filterwarnings("error")
def test_wrappers_of_vector_environments_see_what_was_reset():
    env = gym.wrappers.vector.RecordEpisodeStatistics(gym.wrappers.vector.NormalizeReward(BreakoutAsciiVec(3)))
    env.reset(seed=np.arange(3))
    for _ in range(50):
        env.step(np.zeros(3, int))
    env.reset(options={"reset_mask": np.array([True, False, True])})
    assert env.episode_lengths.tolist() == [0, 50, 0]


@pytest.mark.filterwarnings("error")
def test_check_env_has_nothing_to_say(capsys):
    check_env(BreakoutAscii(), skip_render_check=True)  # without a spec it cannot build the render modes
    check_env(gym.make("BreakoutAscii-v0").unwrapped)


@pytest.mark.filterwarnings("error")
def test_make():
    env = gym.make("breakout_ascii:BreakoutAscii-v0")
    assert isinstance(env.unwrapped, BreakoutAscii) and env.spec.max_episode_steps == 5000
    vec = gym.make_vec("BreakoutAscii-v0", num_envs=4)
    assert isinstance(vec, BreakoutAsciiVec) and vec.num_envs == 4 and vec.max_episode_steps == 5000
    assert gym.make_vec("BreakoutAscii-v0", num_envs=2, varied_starts=0.5, max_episode_steps=9).varied_starts == 0.5
    assert isinstance(gym.make(env.spec).unwrapped, BreakoutAscii)


def test_a_reload_does_not_warn():
    reload = "import importlib, breakout_ascii; importlib.reload(breakout_ascii)"  # elsewhere: it makes new classes
    subprocess.run(
        [sys.executable, "-W", "error", "-c", reload], check=True, cwd=os.path.dirname(breakout_ascii.__file__)
    )


def steps_until_truncation(env):
    """Return when one game, or the first of several, is truncated: the ball chaser never ends it."""
    env.reset(seed=0)
    for t in itertools.count(1):
        action = tracker(env.unwrapped.games, 0)
        *_, truncated, _ = env.step(action if isinstance(env, gym.vector.VectorEnv) else action[0])
        if np.any(truncated):
            return t


@pytest.mark.parametrize(
    "make, limit", [(gym.make, 100), (gym.make_vec, 100), (gym.make, 5010)]
)  # 5010: no limit of 5000 within
def test_truncation_comes_when_asked(make, limit):
    assert steps_until_truncation(make("BreakoutAscii-v0", max_episode_steps=limit)) == limit


def test_paired_games_start_alike_and_are_in_sync_until_their_balls_part():
    env = BreakoutAsciiVec(12, varied_starts=1.0)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(50):
        env.step(rng.integers(3, size=12))
    first = env.observation()[:6]
    obs = env.pair()
    np.testing.assert_array_equal(obs, np.concatenate([first, first]))
    for name in Games.STATE:
        one, other = np.split(getattr(env.games, name), 2)
        np.testing.assert_array_equal(one, other)
    alike = 0
    moved = 0
    parted = 0
    for _ in range(400):  # one runs left, the other right: the pages differ in the paddle, later in the ball
        in_sync = env.in_sync()
        rows = (env.games.pages[:6] != env.games.pages[6:]).any(2)  # (6,), (6, 24)
        assert in_sync.tolist() == [set(np.flatnonzero(x)) <= {22} for x in rows]
        alike += in_sync.sum()
        moved += (in_sync & rows.any(1)).sum()
        parted += (~in_sync).sum()
        env.step(np.repeat([1, 2], 6))
    assert alike > moved > 0 and parted > 0
    env.pair()
    env.games.pages[6:] = ord("#")  # of its own
    assert (env.observation()[:6] != ord("#")).any()


def test_an_odd_number_of_games_makes_no_pairs():
    env = BreakoutAsciiVec(3)
    with pytest.raises(ResetNeeded):
        env.pair()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="3 games do not make pairs"):
        env.pair()


def test_truncation_comes_when_asked_of_the_environment_itself_or_of_gymnasiums_vector_env():
    assert steps_until_truncation(BreakoutAscii(max_episode_steps=100)) == 100
    sync = gym.make_vec("BreakoutAscii-v0", 1, vectorization_mode="sync", max_episode_steps=100)
    assert steps_until_truncation(sync.envs[0]) == 100


def test_single_env_gives_plain_values_and_stops_at_the_end():
    env = BreakoutAscii(max_episode_steps=3)
    observation, info = env.reset(seed=1)
    assert info == {"score": 0, "lives": 5, "bricks": 91, "life_lost": False}
    assert [type(value) for value in info.values()] == [int, int, int, bool]
    assert env.observation_space.contains(observation)
    for t in range(3):
        observation, reward, terminated, truncated, info = env.step(np.int64(t))
    assert (type(reward), terminated, truncated) == (float, False, True)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(0)
    assert env.reset()[1]["score"] == 0
    env.step(0)


def test_a_game_that_terminates_at_the_limit_is_not_truncated():
    lengths = []
    for limit in (5000, None):
        env = BreakoutAsciiVec(1, max_episode_steps=limit or lengths[0])
        env.reset(options={"serves": [1] * 5})
        for t in itertools.count(1):
            _, _, terminated, truncated, _ = env.step([0])
            if terminated[0] or truncated[0]:
                assert terminated[0] and not truncated[0]
                lengths.append(t)
                break
    assert lengths[0] == lengths[1]


def test_returned_arrays_are_copies():
    env = BreakoutAsciiVec(2)
    observations, infos = env.reset(seed=0)
    before = observations.copy()
    env.step([0, 0])
    assert (observations == before).all() and infos["bricks"] is not env.games.bricks_left
    observations[:] = 0
    infos["score"][:] = 9
    assert env.observation().all() and not env.games.score.any()


# Random draws: what becomes of random numbers, seeds, serves, varied starts.


def one_new_game(varied_starts=0.0, **chosen):
    """Return serves (5, 3) and bricks (91,) of a game whose random numbers are average, except the chosen ones."""
    half = np.full((1, 5), 0.5)
    numbers = RandomNumbers(
        np.ones((1, 5), int), half, np.full((1, 5), 30), half[:, 0], half[:, 0], np.full((1, 91), 0.5)
    )
    serves, bricks = new_games(numbers._replace(**{name: np.array([x]) for name, x in chosen.items()}), varied_starts)
    return serves[0], bricks.reshape(91)


def test_what_becomes_of_random_numbers():
    below_one = np.nextafter(1, 0)
    serves, bricks = one_new_game(right=[0, 0, 1, 1, 1], varied=[0.0] * 5, wall=0.0, share=0.0, brick=[below_one] * 91)
    assert (serves == [[40, dx, 36] for dx in (-1, -1, 1, 1, 1)]).all() and bricks.all()  # nothing varies unless asked
    serves, bricks = one_new_game(0.5, varied=[0, 0.25, 0.49, 0.5, below_one], x=[1, 78, 20, 20, 20])
    assert (
        serves[:, 0].tolist() == [1, 78, 20, 40, 40] and serves[:, 2].tolist() == [1, 72, 17, 36, 36] and bricks.all()
    )

    brick = np.linspace(below_one, 0, 91)
    brick[45] = 0.25  # not below the share
    _, bricks = one_new_game(0.5, wall=0.49, share=0.25, brick=brick)
    assert (bricks == (brick < 0.25)).all() and 0 < bricks.sum() < 91 and not bricks[0]
    assert one_new_game(0.5, wall=0.5, share=0.25, brick=brick)[1].all()
    _, bricks = one_new_game(0.5, wall=0.0, share=0.0)  # no brick is left, and a game needs one
    assert np.flatnonzero(bricks).tolist() == [0]


def test_numpy_and_torch_make_the_same_games():
    numbers = draw_numbers(np.random.default_rng(0), 5000)
    ours = new_games(numbers, 0.7)
    theirs = new_games(RandomNumbers(*map(torch.from_numpy, numbers)), 0.7, torch)
    assert [x.shape for x in ours] == [(5000, 5, 3), (5000, 7, 13)]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other.numpy(), strict=True)  # shapes and types too


def serves_of(env, **kwargs):
    env.reset(**kwargs)
    return env.games.serves.copy()


def test_seeds():
    first = BreakoutAsciiVec(16)
    second = BreakoutAsciiVec(16)
    assert (serves_of(first, seed=3) == serves_of(second, seed=3)).all()
    assert (serves_of(first) == serves_of(second)).all()  # and so on, without a seed
    assert (serves_of(first, seed=4) != serves_of(second, seed=3)).any()
    dx = serves_of(BreakoutAsciiVec(2000), seed=0)[..., 1]
    assert set(dx.flat) == {-1, 1} and abs(dx.mean()) < 0.05  # 5 standard deviations


def test_serves_can_be_fixed_and_are_random_again_after_an_autoreset():
    env = BreakoutAsciiVec(32, varied_starts=1.0, max_episode_steps=2)
    serves = serves_of(env, seed=0, options={"serves": ALL_SERVES})
    assert (serves[..., 0] == 40).all() and (serves[..., 1] == ALL_SERVES).all() and (serves[..., 2] == 36).all()
    env.step(np.zeros(32, int))
    env.step(np.zeros(32, int))
    assert (env.games.serves[..., 1] != ALL_SERVES).any() and (env.games.serves[..., 0] != 40).any()
    assert (serves_of(env, options={"serves": [1, -1, 1, -1, -1]})[..., 1] == [1, -1, 1, -1, -1]).all()
    single = BreakoutAscii()
    assert (serves_of(single, options={"serves": [1, -1, 1, -1, -1]})[0, :, 1] == [1, -1, 1, -1, -1]).all()


def test_varied_starts():
    env = BreakoutAsciiVec(4000, varied_starts=0.7)
    x, dx, paddle = np.moveaxis(serves_of(env, seed=0), -1, 0)
    assert (env.games.ball_x == x[:, 0]).all() and (env.games.paddle_x == paddle[:, 0]).all()
    varied = x != 40
    share = env.games.bricks.mean((1, 2))
    assert x.min() == 1 and x.max() == 78 and (env.games.ball_y == 21).all()
    assert (paddle[varied] == np.clip(x[varied] - 3, 1, 72)).all() and np.isin(paddle[~varied], (36, 37)).all()
    # Within 5 standard deviations of what is expected: of 78 columns one looks standard, of 92 numbers of bricks one is
    # all.
    assert abs(varied.mean() - 0.7 * 77 / 78) < 0.017 and abs(dx.mean()) < 0.036
    assert abs((share < 1).mean() - 0.7 * 91 / 92) < 0.037 and abs(share[share < 1].mean() - 45 / 91) < 0.028
    assert 0 < share.min() < 0.02 and (env.games.bricks_left == env.games.bricks.sum((1, 2))).all()


def test_no_varied_starts_never_varies():
    env = BreakoutAsciiVec(16, max_episode_steps=100)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(500):
        infos = env.step(rng.integers(3, size=16))[-1]
        assert (env.games.serves[..., 0] == 40).all() and (env.games.serves[..., 2] == 36).all()
        if "_final_info" in infos:
            assert env.games.bricks[infos["_final_info"]].all()


@pytest.mark.parametrize("saved_at, seed", [(0, 0), (137, 0), (137, [5, None, 2, 2, None, 1, 0, 9])])
def test_a_run_goes_on_bit_for_bit(saved_at, seed):
    rng = np.random.default_rng(0)
    actions = rng.integers(3, size=(600, 8))
    one, other = (BreakoutAsciiVec(8, varied_starts=0.5, max_episode_steps=200) for _ in range(2))
    one.reset(seed=seed)
    for a in actions[:saved_at]:
        one.step(a)
    state = one.state_dict()
    other.load_state_dict(state)
    assert (one.observation() == other.observation()).all()
    for a in actions[saved_at:]:
        assert_same(one.step(a), other.step(a))
    other.load_state_dict(state)  # the state was not written to
    assert_same(state, other.state_dict())


# Errors: one line that says what is wrong, before anything has changed.

BAD_SERVES = [[1, 1, 1, 1], [[1] * 5] * 3, [1, 1, 0, 1, 1], [1, 1, 2, 1, 1], "left", [[1], [1, 1]], [None] * 5, 1]


@pytest.mark.parametrize(
    "options", [{"serves": bad} for bad in BAD_SERVES] + [{"serve": [1] * 5}, 5, "serves", [], True]
)
def test_bad_reset_options(options):
    for env in (BreakoutAsciiVec(2), BreakoutAscii()):
        with pytest.raises(ValueError, match="serves") as error:
            env.reset(options=options)
        assert "\n" not in str(error.value)
        with pytest.raises(ResetNeeded):
            env.step(0)


BAD_MASKS = [
    [True, False],
    np.array([1, 0]),
    np.array([0]),
    np.ones(3, bool),
    np.ones((2, 1), bool),
    np.zeros(2, bool),
    True,
]


@pytest.mark.parametrize(
    "arguments, said",
    [(dict(options={"reset_mask": mask}), "reset_mask") for mask in BAD_MASKS]
    + [
        (dict(seed=seeds), "a list of 2")
        for seeds in (
            [1],
            [1, 2, 3],
            [],
            [1, -1],
            [1, 1.0],
            [1, True],
            ["1", 2],
            [[1, 2], [3, 4]],
            np.array([0.0, 1.0]),
            np.array(3),
            -1,
            1.0,
            True,
            "12",
        )
    ],
)
def test_bad_partial_resets_and_seeds(arguments, said):
    env = BreakoutAsciiVec(2)
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=said) as error:
        env.reset(**arguments)
    assert "\n" not in str(error.value)
    assert_same(before, env.state_dict())
    with pytest.raises(ResetNeeded):
        BreakoutAsciiVec(2).reset(options={"reset_mask": np.array([True, False])})


@pytest.mark.parametrize(
    "actions, said",
    [
        ([0, 3], "got 3 for game 1"),
        ([-1, 0], "got -1 for game 0"),
        ([np.nan, 1], "float64"),
        ([0], r"shape \(1,\)"),
        ([[0, 1]], "shape"),
        (1, "shape"),
        ([0.0, 1.0], "float64"),
        ([True, False], "bool"),
        (["0", "1"], "integers"),
        ([0, None], "object"),
    ],
)
def test_bad_actions(actions, said):
    env = BreakoutAsciiVec(2)
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=said) as error:
        env.step(actions)
    assert "\n" not in str(error.value)
    assert_same(before, env.state_dict())


@pytest.mark.parametrize("action", [3, -1, 1.0, True, None, [1]])
def test_bad_action(action):
    env = BreakoutAscii()
    env.reset()
    with pytest.raises(ValueError, match="actions must be"):
        env.step(action)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(num_envs=True), "num_envs"),
        (dict(max_episode_steps=True), "max_episode_steps"),
        (dict(varied_starts="a"), "varied_starts"),
        (dict(varied_starts=None), "varied_starts"),
        (dict(num_envs=0), "num_envs"),
        (dict(num_envs=2.0), "num_envs"),
        (dict(varied_starts=1.1), "varied_starts"),
        (dict(varied_starts=float("nan")), "varied_starts"),
        (dict(max_episode_steps=0), "max_episode_steps"),
        (dict(max_episode_steps=1.5), "max_episode_steps"),
        (dict(render_mode="human"), "render_mode"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        BreakoutAsciiVec(**{"num_envs": 2} | arguments)
    with pytest.raises(ValueError):
        BreakoutAscii(max_episode_steps=-1)
    with pytest.raises(ValueError):
        BreakoutAscii(render_mode="png")


@pytest.mark.parametrize("which", [np.arange(4), np.array([1, 0, 1, 0]), np.ones(3, bool), np.ones((4, 1), bool)])
def test_new_games_take_a_boolean_mask(which):
    env = BreakoutAsciiVec(4)
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match="mask must be bool") as error:
        env.games.reset(which, standard_serves(np.ones((4, 5), int)), np.zeros((4, 7, 13), bool))
    assert "\n" not in str(error.value)
    assert_same(before, env.state_dict())


def test_nothing_works_before_reset():
    env = BreakoutAsciiVec(2)
    for use in (lambda: env.step([0, 0]), env.observation, env.state_dict, lambda: BreakoutAscii().step(0)):
        with pytest.raises(ResetNeeded, match="reset"):
            use()


def test_bad_states():
    env = BreakoutAsciiVec(2)
    env.reset(seed=0)
    state = env.state_dict()
    for bad in (BreakoutAsciiVec(3), {key: state[key] for key in state if key != "lives"}):
        if isinstance(bad, BreakoutAsciiVec):
            bad.reset()
            bad = bad.state_dict()
        with pytest.raises(ValueError, match="state"):
            env.load_state_dict(bad)
    with pytest.raises(ValueError, match="np_random"):
        env.load_state_dict({key: state[key] for key in state if key != "np_random"})
    bad_values = {
        "lives": np.array([5, 9]),
        "ball_x": np.array([0, 10**6]),
        "ball_y": np.array([-1, 1]),
        "dx": np.array([0.5, 1]),
        "bricks": state["bricks"].astype(int),
        "serves": state["serves"].astype(object),
        "paddle_x": np.array(["a", "b"]),
        "score": None,
        "np_random": {"bit_generator": "PCG64", "state": "x"},
    }
    for seeded in (5, {"0": {}}, {"a": state["np_random"]}):
        with pytest.raises(ValueError, match="np_random"):
            env.load_state_dict({**state, "seeded": seeded})
    for key, value in bad_values.items():
        with pytest.raises(ValueError, match=key) as error:
            env.load_state_dict({**state, "score": state["score"] + 10, key: value})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="np_random"):
        env.load_state_dict(5)
    assert_same(state, env.state_dict())  # nothing was applied


# Text and render modes.


def test_to_text_is_the_page_and_refuses_anything_else():
    tokens = BreakoutAscii().reset()[0]
    text = to_text(tokens)
    assert text.encode() == tokens.tobytes() and text.count("\n") == 24 and to_text(tokens.astype(np.int64)) == text
    for bad in (tokens[:-1], tokens[None], tokens.astype(float), np.full(1944, 65, np.uint8), np.full(1944, -1)):
        with pytest.raises(ValueError, match="tokens must"):
            to_text(bad)


def test_recording_a_video_names_the_package_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(gym.error.DependencyNotInstalled, match="moviepy"):
        gym.wrappers.RecordVideo(BreakoutAscii(render_mode="rgb_array"), str(tmp_path))


def test_render_modes(capsys):
    for mode, kind in (("ansi", str), ("rgb_array", np.ndarray), (None, type(None))):
        single = BreakoutAscii(render_mode=mode)
        vec = BreakoutAsciiVec(2, render_mode=mode)
        tokens, _ = single.reset(seed=0)
        vec.reset(seed=0)
        assert isinstance(single.render(), kind)
        if mode:
            frames = vec.render()
            assert isinstance(frames, tuple) and len(frames) == 2 and isinstance(frames[0], kind)
    human = BreakoutAscii(render_mode="human")
    for show in (human.reset, lambda: human.step(0)):  # both draw by themselves
        page = to_text(show()[0])
        assert page in capsys.readouterr().out
        assert human.render() is None and page in capsys.readouterr().out
