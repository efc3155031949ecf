"""The rules of Catch one by one, and that it is what the page about own games says: short, clean and playable."""

import importlib
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import games.catch
from games.catch import COLUMNS, PADDLE, ROWS, Catch

STAY, LEFT, RIGHT = range(3)


def new_game(column):
    """Return a game whose ball falls in this column."""
    env = Catch()
    seed = next(seed for seed in range(10_000) if env.reset(seed=seed) and env.ball_x == column)
    env.reset(seed=seed)
    return env


def lines_of(observation):
    """Return the lines of a page, without the newlines at their ends."""
    return observation.tobytes().decode("ascii").removesuffix("\n").split("\n")


def towards_the_ball(observation):
    """Return the action of a perfect player, who sees the page alone."""
    lines = lines_of(observation)
    ball = next(line.index("o") for line in lines if "o" in line)
    middle = lines[-1].index(PADDLE) + len(PADDLE) // 2
    return STAY if ball == middle else LEFT if ball < middle else RIGHT


def play(env, observation, policy):
    """Play a game to its end. Returns the pages after each step and the rewards."""
    pages, rewards, terminated = [], [], False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(policy(observation))
        assert not truncated and info == {}
        pages.append(observation)
        rewards.append(reward)
    return pages, rewards


def test_the_template_is_short():
    """The issue with which it was built promises rules, page and class in at most 60 lines."""
    assert len(Path(games.catch.__file__).read_text(encoding="utf-8").splitlines()) <= 60


def test_gymnasium_has_nothing_to_say_about_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("games.catch:Catch-v0").unwrapped)
        importlib.reload(games.catch)
    assert gymnasium.make("Catch-v0", render_mode="ansi").unwrapped.render_mode == "ansi"


def test_a_new_game():
    """The ball is in the top row, and the paddle at the bottom in the middle."""
    env = new_game(column=4)
    observation, _ = env.reset()
    env.ball_x = 4
    lines = lines_of(env.observation())
    assert (len(lines), {len(line) for line in lines}) == (ROWS, {COLUMNS}) == (16, {26})
    assert lines[0] == "    o".ljust(26) and lines[-1] == " " * 11 + "===" + " " * 12
    assert set(lines[1:-1]) == {" " * 26}
    assert observation.shape == (16 * 27,) and observation.dtype == np.uint8


def test_every_column_is_as_likely_as_the_others():
    env = Catch()
    env.reset(seed=0)
    counts = np.bincount([env.reset() and env.ball_x for _ in range(2600)], minlength=COLUMNS)
    assert len(counts) == COLUMNS and counts.min() > 50 and counts.max() < 150


def test_the_ball_falls_by_one_row_a_step_in_its_column():
    env = new_game(column=2)
    pages, _ = play(env, env.observation(), lambda page: STAY)
    places = [[(row, line.index("o")) for row, line in enumerate(lines_of(page)) if "o" in line] for page in pages]
    assert places == [[(row, 2)] for row in range(1, ROWS)]


@pytest.mark.parametrize("action, columns", [(STAY, [11, 11]), (LEFT, [9, 7]), (RIGHT, [13, 15])])
def test_the_paddle_moves_by_two_columns(action, columns):
    env = new_game(column=0)
    assert [lines_of(env.step(action)[0])[-1].index(PADDLE) for _ in range(2)] == columns


@pytest.mark.parametrize("action, column", [(LEFT, 0), (RIGHT, COLUMNS - len(PADDLE))])
def test_the_paddle_stays_on_the_page(action, column):
    env = new_game(column=12)
    pages, _ = play(env, env.observation(), lambda page: action)
    assert lines_of(pages[-1])[-1].index(PADDLE) == column


@pytest.mark.parametrize("column, reward", [(10, 0.0), (11, 1.0), (12, 1.0), (13, 1.0), (14, 0.0)])
def test_a_ball_on_the_paddle_is_caught(column, reward):
    """The paddle that stays covers columns 11 to 13. The last page shows the ball in the paddle's row."""
    env = new_game(column)
    pages, rewards = play(env, env.observation(), lambda page: STAY)
    assert rewards == [0.0] * (ROWS - 2) + [reward]
    assert lines_of(pages[-1])[-1][column] == "o"
    assert lines_of(pages[-1])[-1].count("=") == len(PADDLE) - int(reward)


@pytest.mark.parametrize("column", range(COLUMNS))
def test_every_ball_can_be_caught(column):
    env = new_game(column)
    _, rewards = play(env, env.observation(), towards_the_ball)
    assert sum(rewards) == 1


def test_pages_have_only_the_characters_that_it_names_and_lines_end_in_newlines():
    env = Catch(render_mode="ansi")
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(50):
        observation, _ = env.reset(seed=seed)
        for page in [observation, *play(env, observation, lambda page: rng.integers(3))[0]]:
            seen |= set(page.tobytes().decode("ascii"))
            assert (page.reshape(ROWS, COLUMNS + 1)[:, -1] == ord("\n")).all()
        assert env.render() == page.tobytes().decode("ascii")
    assert seen == set(Catch.characters)
    assert set(Catch.colours) <= seen and len(Catch.actions) == env.action_space.n


def test_a_seed_repeats_its_games():
    def columns(seed):
        env = Catch()
        return [env.reset(seed=seed)[0].tobytes(), *(env.reset()[0].tobytes() for _ in range(9))]

    assert columns(5) == columns(5) != columns(6)
