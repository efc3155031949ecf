"""NetHack and MiniHack as pages: what their terminal shows, seeds that decide all, the time limit, names of actions."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from games import nethack

ROOM = "MiniHack-Room-5x5-v0"  # from the northwestern corner to the southeastern one
RANDOM_ROOM = "MiniHack-Room-Random-5x5-v0"
MISSING = [name for name in ("nle", "minihack", "pkg_resources") if find_spec(name) is None]
needs_nethack = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: {nethack.INSTALL}")


@pytest.fixture
def make():
    """Make environments, and close them after the test."""
    envs = []

    def make(game_id, **kwargs):
        envs.append(nethack.make(game_id, **kwargs))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def lines_of(page):
    """Return the lines of a page, without the newlines at their ends."""
    return page.tobytes().decode("ascii").removesuffix("\n").split("\n")


def play(env, steps, seed=None):
    """Play at random, always the same actions. Returns all pages, first ones among them, and all that was returned."""
    rng = np.random.default_rng(0)
    pages = [env.reset(seed=seed)[0]]
    results = []
    for _ in range(steps):
        page, *result = env.step(int(rng.integers(env.action_space.n)))
        pages.append(page)
        results.append(result)
        if result[1] or result[2]:
            pages.append(env.reset()[0])
    return np.array(pages), results


def test_which_games_are_nethack():
    assert nethack.is_nethack("MiniHack-River-v0") and nethack.is_nethack("minihack:MiniHack-River-v0")
    assert nethack.is_nethack("NetHackScore-v0") and nethack.is_nethack("nle:NetHack-v0")
    assert not nethack.is_nethack("BreakoutAscii-v0") and not nethack.is_nethack("games.catch:Catch-v0")


@pytest.mark.parametrize("game_id, package", [(RANDOM_ROOM, "minihack"), ("NetHackScore-v0", "nle")])
def test_a_missing_package_is_one_line(monkeypatch, game_id, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        nethack.make(game_id)
    assert str(error.value) == f"{game_id} needs {package}: pip install --no-deps -r games/requirements.txt"
    assert (Path(__file__).parent.parent / "games/requirements.txt").is_file()


@needs_nethack
@pytest.mark.parametrize("game_id", [RANDOM_ROOM, "minihack:MiniHack-River-v0", "NetHackScore-v0"])
def test_pages(make, game_id):
    env = make(game_id)
    assert (env.rows, env.columns) == (24, 81)
    pages, _ = play(env, 300, seed=0)
    assert pages.dtype == np.uint8 and pages.shape[1:] == (24 * 81,) == env.observation_space.shape
    grids = pages.reshape(-1, 24, 81)
    assert (grids[:, :, 80] == ord("\n")).all()
    assert not (grids[:, :, :80] == ord("\n")).any()
    assert {chr(code) for code in np.unique(pages)} <= set(env.characters)
    assert set(env.colours) <= set(env.characters)
    lines = lines_of(pages[0])
    assert lines[0].startswith("Hello Agent, welcome to NetHack!")
    assert lines[23].startswith("Dlvl:1 $:0 HP:")
    assert any("@" in line for line in lines[1:22])


@needs_nethack
@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_check_env(make):
    env = make(RANDOM_ROOM)
    env.unwrapped.spec = None  # check_env would make it again from its id, without this wrapper.
    check_env(env, skip_render_check=True)


@needs_nethack
@pytest.mark.parametrize("game_id", ["MiniHack-MazeWalk-9x9-v0", "NetHackScore-v0"])
def test_a_seed_decides_this_episode_and_the_next_ones(make, game_id):
    env = make(game_id)
    pages, results = play(env, 500, seed=3)
    play(env, 50, seed=4)
    for other in (env, make(game_id)):
        same_pages, same_results = play(other, 500, seed=3)
        assert np.array_equal(pages, same_pages) and results == same_results
    assert not np.array_equal(pages[0], env.reset(seed=4)[0])
    first, _ = env.reset(seed=3)
    assert not np.array_equal(first, env.reset()[0])


@needs_nethack
@pytest.mark.parametrize("game_id", ["MiniHack-Room-Monster-5x5-v0", "MiniHack-KeyRoom-S5-v0", "NetHackScore-v0"])
def test_nothing_differs_from_nle_before_an_episode_ends(make, game_id):
    env = make(game_id)
    page, _ = env.reset(seed=5)
    core, display = np.random.default_rng(5).integers(2**31, size=2)
    nle = gymnasium.make(game_id, disable_env_checker=True, observation_keys=("tty_chars",), fix_moon_phase=True)
    nle.unwrapped.seed(int(core), int(display), reseed=False)
    obs, _ = nle.reset()
    rng = np.random.default_rng(0)
    over = False
    while not over:
        assert np.array_equal(page.reshape(24, 81)[:, :80], obs["tty_chars"])
        action = int(rng.integers(env.action_space.n))
        page, reward, terminated, truncated, _ = env.step(action)
        obs, nle_reward, over, _, _ = nle.step(action)
        assert reward == nle_reward and (terminated or truncated) == over
    nle.close()


@needs_nethack
def test_the_stairs_are_a_success(make):
    env = make(ROOM)
    env.reset(seed=0)
    southeast = env.actions.index("southeast")
    for _ in range(3):
        _, *result = env.step(southeast)
        assert result == [0.0, False, False, {}]
    _, *result = env.step(southeast)
    assert result == [1.0, True, False, {"success": True}]


@needs_nethack
def test_the_time_limit_truncates_and_shows_the_game(make):
    env = make(ROOM)
    assert env.max_episode_steps == 100
    env.reset(seed=0)
    north = env.actions.index("north")
    for _ in range(99):
        _, _, *result = env.step(north)
        assert result == [False, False, {}]
    page, _, *result = env.step(north)
    assert result == [False, True, {"success": False}]
    lines = lines_of(page)
    assert "@" in lines[10] and ">" in lines[14] and lines[23].startswith("Dlvl:1")
    assert lines_of(env.reset()[0])[0].startswith("Hello")


@needs_nethack
def test_the_names_of_actions(make):
    compass = ("north", "east", "south", "west", "northeast", "southeast", "southwest", "northwest")
    assert make(ROOM).actions == compass
    actions = make("NetHackScore-v0").actions
    assert actions[:9] == ("more", *compass)
    assert actions[9:17] == tuple(f"far {direction}" for direction in compass)
    assert actions[17:] == ("up", "down", "wait", "kick", "eat", "search")
    assert len(set(make("NetHack-v0").actions)) == 86


class Seeds:
    """Draws these pairs of seeds, as `np_random` would."""

    def __init__(self, *pairs):
        self.pairs = iter(pairs)

    def integers(self, high, size):
        return next(self.pairs)


@needs_nethack
def test_a_game_that_nle_cannot_start_is_skipped(make):
    """This Monk stands on a scroll that turns to dust when he picks it up, and is asked what to call it."""
    env = make("NetHackScore-v0")
    env.np_random = Seeds((1288245594, 1959840679), (1, 2))
    page, _ = env.reset()
    env.np_random = Seeds((1, 2))
    assert np.array_equal(page, env.reset()[0])
    assert lines_of(page)[0].startswith("Hello Agent")


@needs_nethack
def test_no_logs_are_written(make):
    env = make(ROOM)
    for seed in range(3):
        env.reset(seed=seed)
    folder = Path(env.unwrapped.nethack._vardir)
    assert all((folder / name).stat().st_size == 0 for name in ("logfile", "xlogfile"))


@needs_nethack
def test_what_cannot_work_is_refused(monkeypatch):
    import minihack

    with pytest.raises(gymnasium.error.Error, match="it refuses seeds"):
        nethack.make("NetHackChallenge-v0")
    monkeypatch.setattr(minihack, "__file__", "/home/me/my games/minihack/__init__.py")
    with pytest.raises(gymnasium.error.Error, match="a folder with a space in its path, /home/me/my games"):
        nethack.make(ROOM)


@needs_nethack
def test_it_makes_no_noise():
    """The imports of both packages, a game and the end of the process print nothing, not even warnings."""
    program = f"from games import nethack; env = nethack.make('{ROOM}'); env.reset(); env.step(0); env.reset()"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
