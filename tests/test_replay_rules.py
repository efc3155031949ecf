"""The rules of Breakout in JavaScript, compared with those in Python, page for page and score for score."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from replay_helpers import recorded, text_of, write_replay
from test_boards import BOARDS, edited

from breakout_ascii import BRICK_COLUMNS, BRICK_ROWS, TOKENS, standard_serves
from evaluation import SERVES, greedy
from model import GPT, GPTConfig
from policies import SHIPPED, load_policy

pytestmark = pytest.mark.browser

TOLD = """const told = (state) => [
  state.x, state.y, state.dx, state.dy, state.paddle, state.lives, state.score, state.elapsed,
  state.bricks, isOver(state),
];"""  # a state as a list, as in STATE with the wall and whether the game is over
# Plays a game again. Returns its states and, if they are drawn, its pages. All is one text, because playwright takes
# long to pass on anything else.
PLAY = f"""([serves, bricks, actions, drawn]) => {{
  {TOLD}
  const seen = (state) => [told(state), drawn ? textOf(pageOf(state)) : ""];
  let state = newGame(serves, bricks);
  return JSON.stringify([seen(state), ...actions.map((action) => seen(state = advance(state, action)))]);
}}"""
# Plays one step of many games, from any states.
STEP = f"""([states, serves, actions]) => {{
  {TOLD}
  return JSON.stringify(states.map(([x, y, dx, dy, paddle, lives, score, elapsed, bricks], i) => {{
    const state = advance({{ x, y, dx, dy, paddle, lives, score, elapsed, bricks, serves: serves[i] }}, actions[i]);
    return [told(state), textOf(pageOf(state))];
  }}));
}}"""
STATE = ("ball_x", "ball_y", "dx", "dy", "paddle_x", "lives", "score", "elapsed")
CHOOSE = """(texts) => texts.map((text) => largest(models.at(-1).read(
  Uint8Array.from(text, (character) => game.characters.indexOf(character))).probabilities))"""


class Played(NamedTuple):
    """Holds a game that was played in Python."""

    serves: list  # (lives, 3) int
    bricks: str  # of 0 and 1
    actions: list
    states: list  # as PLAY returns them, before the first step and after each
    pages: list  # of arrays (tokens,) uint8


def played_games(serves, bricks, player, max_steps=None):
    """Play games to their ends, or to the step in which they are truncated, by the rules in Python.

    Args:
        serves, bricks: as `Games.reset` takes them.
        player: a function that takes the `Games` and returns an action for each.

    Returns:
        a list of `Played`.
    """
    from breakout_ascii import MAX_EPISODE_STEPS, Games  # here, because some tests edit the board

    games = Games(len(serves))
    games.reset(np.ones(len(serves), bool), serves, bricks)
    played = [Played(serve.tolist(), wall_of(wall), [], [], []) for serve, wall in zip(serves, bricks)]
    over = np.zeros(len(serves), bool)

    def note(playing):
        states = states_of(games, over)
        for i in np.flatnonzero(playing):
            played[i].states.append(states[i])
            played[i].pages.append(games.pages[i].flatten())

    note(~over)
    while not over.all():
        playing = ~over
        actions = player(games)
        for i in np.flatnonzero(playing):
            played[i].actions.append(int(actions[i]))
        _, terminated, _ = games.step(actions)
        over |= terminated | (games.elapsed >= MAX_EPISODE_STEPS)
        note(playing)
    return played


def states_of(games, over):
    """Return the states of `Games` as TOLD does."""
    states = np.stack([getattr(games, name) for name in STATE], axis=1).tolist()
    return [[*state, wall_of(wall), bool(end)] for state, wall, end in zip(states, games.bricks, over)]


def wall_of(bricks):
    """Return bricks, an array of bool, as text of 0 and 1."""
    return "".join("01"[brick] for brick in bricks.flatten().astype(int))


def assert_plays_the_same(page, played, drawn=True):
    """Let the browser play games again, and compare every step; with `drawn` also the pages."""
    for number, game in enumerate(played):
        found = json.loads(page.evaluate(PLAY, [game.serves, game.bricks, game.actions, drawn]))
        seen = map(text_of, game.pages) if drawn else [""] * len(game.pages)
        expected = [list(both) for both in zip(game.states, seen, strict=True)]
        differing = [step for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs]
        assert not differing, f"game {number}: {found[differing[0]]}, and in Python {expected[differing[0]]}"


def one_step(n, seed=0):
    """Play one step of n games from random states, many of them rare: at the walls, the paddle or the last brick.

    Returns:
        the arguments of STEP, and what it returns.
    """
    import breakout_ascii as board  # here, because some tests edit it

    rng = np.random.default_rng(seed)
    games = board.Games(n)
    games.reset(np.ones(n, bool), *random_starts(n, seed))
    state = games.state_dict()

    def values(low, high):
        """Return n values, half of them one of the three lowest or highest."""
        edge = rng.integers(3, size=n)
        some = rng.integers(low, high + 1, size=n)
        return np.clip(np.choose(rng.integers(4, size=n), [low + edge, high - edge, some, some]), low, high)

    state["ball_x"] = values(0, board.RIGHT_WALL)
    state["ball_y"] = values(0, board.FLOOR - 1)
    state["paddle_x"] = values(1, board.PADDLE_MAX)
    state["lives"] = values(1, board.LIVES)
    state["dx"], state["dy"] = rng.choice([-1, 1], (2, n))
    state["elapsed"] = rng.integers(board.MAX_EPISODE_STEPS, size=n)

    def brick_at(x, y):
        row = y - board.BRICK_TOP
        column = (x - board.BRICK_LEFT) // board.BRICK_WIDTH
        _, rows, columns = state["bricks"].shape
        inside = (row >= 0) & (row < rows) & (x >= board.BRICK_LEFT) & (column < columns)
        return np.flatnonzero(inside), row[inside], column[inside]

    state["bricks"][::3] = False
    state["bricks"][brick_at(state["ball_x"] + state["dx"], state["ball_y"] + state["dy"])] = True
    state["bricks"][brick_at(state["ball_x"], state["ball_y"])] = False  # a ball is never on a brick
    state["bricks_left"] = state["bricks"].sum((1, 2))
    games.load_state_dict(state)
    before = [told[:-1] for told in states_of(games, np.zeros(n, bool))]
    actions = rng.integers(3, size=n)
    _, terminated, _ = games.step(actions)
    after = states_of(games, terminated | (games.elapsed >= board.MAX_EPISODE_STEPS))
    pages = list(map(text_of, games.pages))
    return [before, state["serves"].tolist(), actions.tolist()], [list(both) for both in zip(after, pages)]


def assert_steps_the_same(page, given, expected):
    """Let the browser play the steps of `one_step` again."""
    found = json.loads(page.evaluate(STEP, given))
    differing = [i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs]
    assert not differing, f"{given[0][differing[0]]}: {found[differing[0]]}, and in Python {expected[differing[0]]}"


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """Write a page for the browser."""
    policy, _ = load_policy(SHIPPED)
    return write_replay(tmp_path_factory.mktemp("rules") / "replay.html", policy, recorded(policy, 3))


def random_starts(n, seed=0):
    """Return serves and bricks of n games, varied ones and a few standard ones."""
    from breakout_ascii import draw_numbers, new_games

    numbers = draw_numbers(np.random.default_rng(seed), n)
    varied = new_games(numbers, 1.0)
    standard = new_games(numbers, 0.0)
    return [np.concatenate([some[: n // 4], others[n // 4 :]]) for some, others in zip(standard, varied)]


def random_player(noise, seed=0):
    """Return a player that follows the ball, but with the probability `noise` (N,) moves at random instead."""
    from breakout_ascii import PADDLE_MIDDLE

    rng = np.random.default_rng(seed)

    def player(games):
        off = games.ball_x - games.paddle_x - PADDLE_MIDDLE
        followed = np.where(off < -1, 1, np.where(off > 1, 2, 0))
        return np.where(rng.random(len(off)) < noise, rng.integers(3, size=len(off)), followed)

    return player


def test_random_games_are_the_same_in_the_browser(opened, rules):
    """More than 10,000 random steps in games with varied and standard serves and walls, lost and won."""
    n = 90
    played = played_games(*random_starts(n), random_player(np.where(np.arange(n) % 6, 1.0, 0.5)))
    assert sum(len(game.actions) for i, game in enumerate(played) if i % 6) > 10_000
    ends = [game.states[-1] for game in played]
    assert any("1" not in wall for *_, wall, _ in ends)
    assert any(state[STATE.index("lives")] == 0 for state in ends)
    assert_plays_the_same(opened(rules), played)


def test_a_step_from_any_state_is_the_same_in_the_browser(opened, rules):
    assert_steps_the_same(opened(rules), *one_step(4000))


@pytest.fixture(scope="module")
def greedy_games():
    """Return all 32 games that the shipped model plays greedily, and the pages that it read."""
    policy, _ = load_policy(SHIPPED)
    player = greedy(policy)
    wall = np.ones((len(SERVES), BRICK_ROWS, BRICK_COLUMNS), bool)
    return played_games(standard_serves(SERVES), wall, lambda games: player(games.pages.reshape(-1, TOKENS)))


def test_the_greedy_games_of_the_shipped_model_are_the_same_in_the_browser(opened, rules, greedy_games):
    """All 32 of them, step for step. Pages are drawn only once for the many games that differ only in later serves."""
    assert len(greedy_games) == 32 and {game.states[-1][STATE.index("score")] for game in greedy_games} == {960}
    page = opened(rules)
    assert_plays_the_same(page, greedy_games, drawn=False)
    distinct = {tuple(game.actions): game for game in greedy_games}
    assert_plays_the_same(page, distinct.values())


def test_the_model_in_the_browser_chooses_the_actions_of_the_greedy_games(opened, rules, greedy_games):
    """On 400 of the pages, unless the two best logits are nearly the same."""
    policy, _ = load_policy(SHIPPED)
    every = {page.tobytes(): action for game in greedy_games for page, action in zip(game.pages, game.actions)}
    assert len(every) > 2000
    pages = list(every)[:: len(every) // 400]
    with torch.no_grad():
        logits, _ = policy(torch.from_numpy(np.stack([np.frombuffer(page, np.uint8) for page in pages])))
    _, second, first = logits.sort().values.T
    clear = (first - second > 1e-3).numpy()
    chosen = opened(rules).evaluate(CHOOSE, [page.decode() for page in pages])
    differing = np.array(chosen) != [every[page] for page in pages]
    assert clear.mean() > 0.9 and not differing[clear].any()


@pytest.mark.parametrize("name", BOARDS)
def test_an_edited_board_is_played_by_its_own_rules_in_the_browser(opened, tmp_path, name):
    """Whatever is edited at the top of breakout_ascii.py; a game that is too long is over there, too."""
    with edited(BOARDS[name] | {"MAX_EPISODE_STEPS": 150}):
        import replay_helpers
        from helpers import PAGE

        policy = GPT(GPTConfig(**PAGE, n_head=2, n_embd=8))
        path = replay_helpers.write_replay(tmp_path / "board.html", policy, replay_helpers.recorded(policy, 3))
        played = played_games(*random_starts(12), random_player(np.linspace(0, 1, 12)))
        steps = one_step(500)
    page = opened(path)
    assert_plays_the_same(page, played)
    assert_steps_the_same(page, *steps)
    assert any(state[7] == 150 for game in played for state in game.states)
    assert len({lives for game in played for _, _, _, _, _, lives, *_ in game.states}) > 1
