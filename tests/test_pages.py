"""Pages of text from Gymnasium environments of every kind, and from vector environments that can be saved."""

import contextlib
import itertools
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import VectorEnv

import breakout_ascii  # noqa: F401, registers Breakout
from games import pages, vector
from games.game import BREAKOUT, load_game
from games.pages import PageError
from ppo import lost_lives

TEXT = "ab\ncd\n"
NUMBERS = itertools.count()  # because what is known of a game is kept


class Shown(gymnasium.Env):
    """Shows whatever a test wants: `observed` as an observation, `frames` as renderings, one after the other."""

    metadata = {"render_modes": []}
    observed = None
    frames = ()
    action_space = Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = space_of(self.observed)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return self.observed, {}

    def step(self, action):
        self.step_count += 1
        self.action = action
        return self.observed, 1, False, False, {}

    def render(self):
        return self.frames[min(self.step_count, len(self.frames) - 1)]


def space_of(observed):
    if isinstance(observed, dict):
        return Dict({key: space_of(x) for key, x in observed.items()})
    if isinstance(observed, np.ndarray):
        low, high = (0, 255) if observed.dtype == np.uint8 else (-1, 1)
        return Box(low, high, observed.shape, observed.dtype)
    return Discrete(5)


@pytest.fixture
def register():
    """Register environments that show something, and forget them after the test."""
    registered = []

    def register(observed=0, frames=(), **attributes):
        if frames:
            attributes["metadata"] = {"render_modes": ["ansi"]}
        kind = type("Kind", (Shown,), {"observed": observed, "frames": frames, **attributes})
        registered.append(f"Shown{next(NUMBERS)}-v0")
        gymnasium.register(registered[-1], entry_point=kind)
        return registered[-1]

    yield register
    for name in registered:
        del gymnasium.registry[name]


def codes(text):
    return np.frombuffer(text.encode(), np.uint8)


def text_of(page):
    return page.tobytes().decode()


GRID = codes("abcd").reshape(2, 2)


@pytest.mark.parametrize(
    "observed",
    [
        codes("ab\ncd\n"),
        codes("ab\ncd"),
        GRID,
        codes("ab\ncd\n").reshape(2, 3),
        {"page": GRID},
        {"tty_chars": GRID, "chars": codes("xy\n")},
        {"page": GRID, "inventory": np.uint8([7, 200]), "health": np.float32([0.5])},
    ],
    ids=["flat", "without the last newline", "grid", "grid with newlines", "dict", "tty_chars first", "one of several"],
)
def test_observations_that_are_pages(register, observed):
    env = pages.make(register(observed))
    page, _ = env.reset(seed=0)
    assert text_of(page) == TEXT and page.dtype == np.uint8 and env.observation_space.contains(page)
    assert (env.rows, env.columns, env.characters) == (2, 3, pages.PRINTABLE)
    assert text_of(env.step(1)[0]) == TEXT


def test_a_page_of_one_line(register):
    env = pages.make(register(codes("abcdefg\n")))
    assert (env.rows, env.columns) == (1, 8)


@pytest.mark.parametrize(
    "observed, reason",
    [
        (3, "of the space Discrete(5)"),
        (np.float32([0.5]), "of the space Box"),
        (np.zeros((2, 2, 3), np.uint8), "of the space Box"),
        (codes("abcdef"), "their lines must be of one length, with a newline at the end of each"),
        (codes("ab\ncde\n"), "their lines must be of one length"),
        (np.uint8([[97, 0]]), "the character '\\x00' (code 0)"),
        (np.uint8([[97, 200]]), "the character '\u00c8' (code 200)"),
        ({"a": GRID, "b": GRID}, "one should be a page, not a and b"),
        ({"a": np.float32([0.5])}, "one should be a page, not none"),
    ],
)
def test_anything_else_is_refused_by_a_line_that_says_what_a_page_is(register, observed, reason):
    with pytest.raises(PageError) as error:
        pages.make(register(observed))
    assert reason in str(error.value) and pages.A_PAGE in str(error.value) and "\n" not in str(error.value)


def test_actions_that_are_not_discrete_are_refused(register):
    with pytest.raises(PageError, match="MultiDiscrete actions; only Discrete ones"):
        pages.make(register(GRID, action_space=MultiDiscrete([2, 2])))


def test_actions_that_do_not_start_at_zero_are_shifted(register):
    env = pages.make(register(GRID, action_space=Discrete(3, start=5)))
    env.reset()
    env.step(2)
    assert env.action_space == Discrete(3) and env.unwrapped.action == 7


@pytest.mark.parametrize("game_id", ["Nothing-v0", "nomodule:Nothing-v0", "games.catch:Nothing-v0", "no id"])
def test_games_that_are_not_there(game_id):
    with pytest.raises(PageError, match="cannot be made: .") as error:
        pages.make(game_id)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nle", None)  # as if it were not installed
    with pytest.raises(PageError) as error:
        pages.make("NetHackScore-v0")
    assert str(error.value).endswith(f"needs nle: {pages.nethack.INSTALL}")


def test_what_an_environment_names(register):
    """Its alphabet, its actions and its colours are taken; what does not fit is refused."""
    named = dict(characters="abcd\n", actions=("noop", "push"), colours={"a": (1, 2, 3)})
    game = load_game(register(GRID, **named))
    assert (game.characters, game.actions, game.colours, game.moving_costs) == (*named.values(), False)
    assert load_game(register(GRID, moving_costs=True)).moving_costs
    assert load_game(register(GRID)).actions == ("action 0", "action 1")
    meanings = load_game(register(GRID, get_action_meanings=lambda self: ["NOOP", "FIRE"]))
    assert meanings.actions == ("noop", "fire")
    for wrong in ({"characters": "abcd"}, {"characters": "aab\n"}, {"characters": 7}, {"actions": ("one",)}):
        with pytest.raises(PageError, match=next(iter(wrong))):
            pages.make(register(GRID, **wrong))


@pytest.mark.parametrize("actions", [2, [0, 1], None])
def test_actions_that_are_no_names_get_some(register, actions):
    assert load_game(register(GRID, actions=actions)).actions == ("action 0", "action 1")


@pytest.mark.parametrize(
    "colours", [{"ball": (1, 2, 3)}, {"o": (1, 2)}, {"o": (0.5, 1, 1)}, {"o": (0, 0, 256)}, {"o": 7}, "red"]
)
def test_colours_that_nothing_can_draw_are_refused_before_a_training(register, colours):
    with pytest.raises(pages.PageError, match="colours must be like"):
        pages.make(register(GRID, colours=colours))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("import gymnasium\ngymnasium.register('Mine-v0', 'broken_game:Renamed')\n", "AttributeError: .*Renamed"),
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(broken_game.py, line 1\)"),
        (
            "import gymnasium\nclass Mine(gymnasium.Env):\n    def __init__(self, size):\n        pass\n"
            "gymnasium.register('Mine-v0', 'broken_game:Mine')\n",
            "TypeError: .*size",
        ),
    ],
)
def test_a_game_that_fails_is_one_line_that_says_where(tmp_path, monkeypatch, text, reason):
    (tmp_path / "broken_game.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_game", raising=False)
    with pytest.raises(pages.PageError, match=f"^broken_game:Mine-v0 cannot be made: {reason}") as error:
        load_game("broken_game:Mine-v0")
    assert "\n" not in str(error.value)


def test_a_rendering_that_is_no_text_is_refused(register):
    with pytest.raises(pages.PageError, match="renders no text, but None; let its `render` return some"):
        pages.make(register(frames=[None]))


class Drawing(gymnasium.Env):
    """Draws each page into the same array."""

    observation_space = Box(0, 127, (2, 2), np.uint8)
    action_space = Discrete(2)
    page = np.full((2, 2), ord("a"), np.uint8)

    def reset(self, seed=None, options=None):
        self.page[:] = ord("a")
        return self.page, {"text": "abc"}

    def step(self, action):
        self.page[:] = ord("b")
        self.steps = getattr(self, "steps", 0) + 1
        return self.page, 0.0, False, True, {"seen": np.zeros(self.steps), "life_lost": np.bool_(self.steps == 2)}


def test_pages_are_copies_and_infos_are_of_any_kind():
    """The last page of a game that was cut off is valued when the next one has begun."""
    gymnasium.register("Drawing-v0", Drawing)
    try:
        env = vector.make_vec("Drawing-v0", 2)
        env.reset(seed=0)
        for lost in False, True:
            obs, *_, infos = env.step(np.zeros(2, int))
            assert set(obs.ravel()) == {ord("a"), ord("\n")}
            assert all(set(page) == {ord("b"), ord("\n")} for page in infos["final_obs"])
            assert lost_lives(infos).tolist() == [lost, lost]
    finally:
        del gymnasium.registry["Drawing-v0"]


def test_a_character_that_appears_later_is_an_error_that_names_it(register):
    observed = GRID.copy()
    env = pages.make(register(observed, characters="abcd\n"))
    env.reset()
    observed[1, 1] = ord("~")
    with pytest.raises(PageError, match=r"shows the character '~' \(code 126\), none of its characters 'abcd"):
        env.step(0)


def test_a_page_that_changes_its_size_is_an_error(register):
    env = pages.make(register(codes("ab\ncd\n")))
    env.reset()
    env.unwrapped.observed = codes("ab\ncd\ne")
    with pytest.raises(PageError, match="a page of 7 characters, newlines among them, and the first one had 6"):
        env.step(0)


def test_renderings_are_pages_of_the_largest_size():
    """CliffWalking's four lines, and the newline at the end of each."""
    env = pages.make("CliffWalking-v1")
    page, _ = env.reset(seed=0)
    cliff = "x  " + "C  " * 10 + "T\n"
    assert text_of(page) == ("  ".join("o" * 12) + "\n") * 3 + cliff
    page, reward, *_ = env.step(1)  # into the cliff
    assert text_of(page).endswith(cliff) and reward == -100
    assert env.note == ""


def test_renderings_lose_their_colours_and_are_padded(register):
    frames = ["\x1b[31ma\x1b[0mbc\nd\n", "ab", "ab\ncdef\n\n"]
    env = pages.make(register(frames=frames))
    page, _ = env.reset()
    shown = [text_of(page), *(text_of(env.step(0)[0]) for _ in range(2))]
    assert shown == ["abc \nd   \n", "ab  \n    \n", "ab  \ncdef\n"] and env.note == ""


def test_what_colour_alone_tells_is_said():
    taxi = max(name for name in gymnasium.registry if name.startswith("Taxi-v"))  # not all versions have v4
    for game_id in ("FrozenLake-v1", taxi):
        assert "by colour alone" in pages.make(game_id).note


def test_renderings_that_do_not_fit(register):
    """A frame may outgrow those of random play, unless the environment names its size; other text is no page."""
    frames = ["a"] * 600 + ["ab"]
    for attributes, fits in (({}, False), ({"rows": 1, "columns": 3}, True)):
        env = pages.make(register(frames=frames, **attributes))
        env.reset()
        env.unwrapped.step_count = 599
        if fits:
            assert text_of(env.step(0)[0]) == "ab\n"
        else:
            with pytest.raises(PageError, match="1 lines of up to 2 characters, and the page has room for 1 of 1"):
                env.step(0)
    with pytest.raises(PageError, match="'\u2588'"):
        pages.make(register(frames=["\u2588"])).reset()


# --- many games -------------------------------------------------------------------------------------------------------

GAMES = ["games.catch:Catch-v0", "games.snake:Snake-v0", "CliffWalking-v1", "FrozenLake-v1"]


@pytest.mark.parametrize("game_id", GAMES)
def test_saved_games_go_on_bit_for_bit(game_id):
    """A state, written as a checkpoint writes it, continues in new environments, also through the ends of episodes."""
    game = load_game(game_id)
    rng = np.random.default_rng(0)
    env = game.make_vec(3)
    obs, _ = env.reset(seed=5)
    for _ in range(40):
        obs, *_ = env.step(rng.integers(len(game.actions), size=3))
    other = game.make_vec(3)
    other.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(other.observation(), obs)
    for _ in range(40):
        actions = rng.integers(len(game.actions), size=3)
        for ours, theirs in zip(env.step(actions)[:4], other.step(actions)[:4]):
            np.testing.assert_array_equal(ours, theirs)


def test_games_in_other_processes_are_the_same_games():
    """Pages, rewards, ends, infos and states are equal, also if the games are shared out unevenly."""
    envs = [vector.make_vec(GAMES[0], 5, processes) for processes in (1, 2)]
    rng = np.random.default_rng(0)
    with contextlib.closing(envs[0]), contextlib.closing(envs[1]):
        np.testing.assert_equal(*(env.reset(seed=1) for env in envs))
        for _ in range(30):
            actions = rng.integers(3, size=5)
            ours, theirs = (env.step(actions) for env in envs)
            np.testing.assert_equal(theirs[:4], ours[:4])
            assert theirs[4].keys() == ours[4].keys()
            assert theirs[4].get("final_info", {}).keys() == ours[4].get("final_info", {}).keys()
            ended = ours[2] | ours[3]
            if ended.any():
                np.testing.assert_array_equal(theirs[4]["_final_obs"], ended)
                np.testing.assert_equal(*(list(infos["final_obs"][ended]) for infos in (theirs[4], ours[4])))
        states = [env.state_dict() for env in envs]
        np.testing.assert_equal(*states)
        for env in envs:
            env.load_state_dict(states[0])
        np.testing.assert_array_equal(*(env.observation() for env in envs))


def test_infos_of_two_processes_are_joined():
    """One of them has an ended game, which has lost a life; the other's games have no infos."""
    page = np.empty(2, object)
    page[1] = np.uint8([65, 10])
    ended = np.array([False, True])
    infos = {"final_info": {"life_lost": ended, "_life_lost": ended}, "final_obs": page, "_final_obs": ended}
    for joined, at in (
        (vector.joined_infos([infos, {}], [2, 1]), 1),
        (vector.joined_infos([{}, infos], [1, 2]), 2),
    ):
        assert list(joined["_final_obs"].nonzero()[0]) == list(lost_lives(joined).nonzero()[0]) == [at]
        assert joined["final_obs"][at].tolist() == [65, 10]


class Unreadable(gymnasium.Wrapper):
    """Shows a character in its third step that Catch does not have."""

    def step(self, action):
        page, *rest = self.env.step(action)
        self.steps = getattr(self, "steps", 0) + 1
        page[0] = ord("%") if self.steps == 3 else page[0]
        return page, *rest


def make_unreadable():
    return vector.Repeatable(pages.pages_in_observations(Unreadable(gymnasium.make(GAMES[0]))))


def test_a_page_that_cannot_be_read_in_another_process():
    """The error is the one that this process would raise."""
    with contextlib.closing(vector.SharedVec(make_unreadable, 2, 2)) as env:
        env.reset(seed=0)
        with pytest.raises(PageError, match="shows the character '%'"):
            for _ in range(3):
                env.step(np.zeros(2, int))


def test_each_episode_has_a_seed_of_its_own():
    """Otherwise every game would be the same; and the first has the seed that was given."""
    env = vector.Repeatable(pages.make(GAMES[0]))
    first = [env.reset(seed=3)[0].tobytes()] + [env.reset()[0].tobytes() for _ in range(20)]
    again = [env.reset(seed=3)[0].tobytes()] + [env.reset()[0].tobytes() for _ in range(20)]
    assert first == again and len(set(first)) > 5
    assert first[0] == pages.make(GAMES[0]).reset(seed=3)[0].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [1]},
        {"lengths": [1, -1]},
        {"lengths": [10**6, 0]},
        {"actions": np.int32([7, 0]).view(np.uint8), "lengths": [1, 1]},
    ],
)
def test_a_damaged_state_is_refused(change):
    env = load_game(GAMES[0]).make_vec(2)
    env.reset(seed=0)
    with pytest.raises(ValueError):
        env.load_state_dict(env.state_dict() | change)


def test_what_breakout_can():
    """It has its own vector environment, varied starts, pairs and a cost of moving; Catch has none of them."""
    breakout, catch = load_game(BREAKOUT), load_game(GAMES[0])
    assert (breakout.has_vec, breakout.varies, breakout.pairs, breakout.moving_costs) == (True, True, True, True)
    assert (catch.has_vec, catch.varies, catch.pairs, catch.moving_costs) == (False, False, False, False)
    env = load_game("breakout_ascii:BreakoutAscii-v0").make_vec(2, varied_starts=0.5)
    assert isinstance(env, VectorEnv) and env.varied_starts == 0.5


def test_a_vector_environment_that_shows_no_pages_is_not_used(register):
    """CartPole's shows numbers, and resets in the step after the end of an episode."""
    spec = gymnasium.spec("CartPole-v1")
    game_id = register(GRID)
    gymnasium.registry[game_id].vector_entry_point = spec.vector_entry_point
    game = load_game(game_id)
    assert not game.has_vec and isinstance(game.make_vec(1), vector.RepeatableVec)
