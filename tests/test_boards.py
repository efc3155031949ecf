"""Edited constants at the top of breakout_ascii.py: all follows from them, or one line says why there is no game."""

import contextlib
import json
import re
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import breakout_ascii
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.messages import shown
from harness.options import CommandLineError, Values
from harness.runs import Run
from policies import SHIPPED, load_policy
from train_ppo import check_board

ROOT = Path(breakout_ascii.__file__).parent
STANDARD = breakout_ascii.STANDARD_BOARD
BOARDS = {
    "a wider paddle": {"PADDLE": "=" * 9, "LIVES": 3, "BRICK_ROWS": 9, "CLEAR_POINTS": 0},
    "an even paddle": {"PADDLE": "====", "PADDLE_MOVES": (0, -3, 1)},
    "a narrow wall": {"BRICK_ROWS": 2, "BRICK_COLUMNS": 12, "BRICK": "|___|", "BRICK_TOP": 1, "BRICK_POINTS": 7},
    "a slow ball": {"BALL_INTERVAL": 3, "PADDLE": "=" * 12},
    "a small page": {"ROWS": 17, "COLUMNS": 42, "BRICK_COLUMNS": 6, "BRICK_ROWS": 3, "BALL_INTERVAL": 2},
}


def ours():
    """Return the names of the loaded modules of the game and of everything that is built on it."""
    parts = "breakout_ascii games model evaluation fast policies viewer load_model train_ppo helpers".split()
    return [name for name in sys.modules if name.split(".")[0] in (*parts, "replay_helpers")]


def edited_source(changes):
    """Return the source of breakout_ascii.py with other values for some of its constants."""
    source = (ROOT / "breakout_ascii.py").read_text(encoding="utf-8")
    for name, value in changes.items():
        source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", source, flags=re.MULTILINE)
        assert count == 1, f"{name} is not assigned once, in a line of its own"
    return source


@contextlib.contextmanager
def edited(changes):
    """Let the imports inside find an edited game, and new modules that are built on it."""
    kept = {name: sys.modules.pop(name) for name in ours()}
    registered = gym.registry.copy()
    game = types.ModuleType("breakout_ascii")
    game.__file__ = breakout_ascii.__file__
    sys.modules["breakout_ascii"] = game
    try:
        del gym.registry["BreakoutAscii-v0"]
        exec(edited_source(changes), vars(game))
        yield game
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
        gym.registry.clear()
        gym.registry.update(registered)


@pytest.fixture(params=BOARDS)
def board(request):
    """All constants of an edited game, which imports find during the test."""
    with edited(BOARDS[request.param]):
        yield STANDARD | BOARDS[request.param]


class PlainGame:
    """The rules again, for any board: everything is a character on a page, and nothing is computed in advance."""

    def __init__(self, board, serves):
        self.board = board
        self.serves = [tuple(map(int, serve)) for serve in serves]
        self.lives = board["LIVES"]
        self.score = 0
        self.steps = 0
        self.columns = range(1, board["COLUMNS"] - 2)  # between the walls
        left = self.columns[(len(self.columns) - board["BRICK_COLUMNS"] * len(board["BRICK"])) // 2]
        self.bricks = [
            (board["BRICK_TOP"] + i, left + j * len(board["BRICK"]))
            for i in range(board["BRICK_ROWS"])
            for j in range(board["BRICK_COLUMNS"])
        ]
        self.serve()

    def serve(self):
        self.x, self.dx, self.paddle = self.serves[self.board["LIVES"] - self.lives]
        self.y = self.board["ROWS"] - 3
        self.dy = -1

    def step(self, action):
        """Play one step. Returns reward, terminated and life_lost."""
        self.steps += 1
        for _ in range(abs(self.board["PADDLE_MOVES"][action])):
            moved = self.paddle + (1 if self.board["PADDLE_MOVES"][action] > 0 else -1)
            if moved in self.columns and moved + len(self.board["PADDLE"]) - 1 in self.columns:
                self.paddle = moved
        if self.steps % self.board["BALL_INTERVAL"]:
            return self.paddle_returns(), False, False
        before = self.x, self.y
        self.x += self.dx
        self.y += self.dy
        if self.x not in self.columns:
            self.dx *= -1
        if self.y == 0:
            self.dy *= -1
        if self.y == self.board["ROWS"] - 1:
            self.lives -= 1
            if self.lives == 0:
                self.x, self.y = before
                return 0, True, True
            self.serve()
            return 0, False, True
        self.paddle_returns()
        return self.break_brick(), not self.bricks, False

    def paddle_returns(self):
        under = self.x - self.paddle  # the ball is over this cell of the paddle
        width = len(self.board["PADDLE"])
        if self.y == self.board["ROWS"] - 2 and under in range(width):
            self.y -= 1
            self.dy = -1
            self.dx = -1 if under < width - width // 2 else 1
        return 0

    def break_brick(self):
        for brick in self.bricks:
            if self.y == brick[0] and self.x in range(brick[1], brick[1] + len(self.board["BRICK"])):
                self.bricks.remove(brick)
                self.dy *= -1
                reward = self.board["BRICK_POINTS"] + (0 if self.bricks else self.board["CLEAR_POINTS"])
                self.score += reward
                return reward
        return 0

    def page(self):
        rows = self.board["ROWS"]
        width = self.board["COLUMNS"] - 1
        page = [["#"] * width] + [["#"] + [" "] * (width - 2) + ["#"] for _ in range(rows - 2)] + [["#"] * width]
        for row, column in self.bricks:
            page[row][column : column + len(self.board["BRICK"])] = self.board["BRICK"]
        page[-2][self.paddle : self.paddle + len(self.board["PADDLE"])] = self.board["PADDLE"]
        page[self.y][self.x] = "O"
        return "".join("".join(line) + "\n" for line in page)


def actions_of(games, middle, rng):
    """Return actions (N,) that follow the balls, the first game's almost always, the last game's never."""
    off = games.ball_x - games.paddle_x - middle
    followed = np.where(off < -1, 1, np.where(off > 1, 2, 0))
    return np.where(rng.random(len(off)) < np.linspace(0.1, 1, len(off)), rng.integers(3, size=len(off)), followed)


def test_an_edited_game_equals_a_plain_reference_in_numpy_and_as_tensors(board):
    """Every page, reward and life is the same, the pages can be drawn anew, and the games go on after they ended."""
    from breakout_ascii import PADDLE_MIDDLE, BreakoutAsciiVec, to_text
    from fast.gpu_games import TensorGames

    env = BreakoutAsciiVec(4)
    env.reset(seed=1)
    tensors = TensorGames(4, torch.device("cpu"))
    slow = [PlainGame(board, serves) for serves in env.games.serves]
    rng = np.random.default_rng(0)
    lost = 0
    broken = 0
    for _ in range(120 * board["BALL_INTERVAL"]):
        tensors.load_state_dict(env.games.state_dict())
        actions = actions_of(env.games, PADDLE_MIDDLE, rng)
        observations, rewards, terminated, _, infos = env.step(actions)
        tensors.step(torch.from_numpy(actions))
        pages = tensors.pages.flatten(1).numpy()
        for i, game in enumerate(slow):
            assert (rewards[i], terminated[i]) == (result := game.step(actions[i]))[:2]
            page = infos["final_obs"][i] if terminated[i] else observations[i]
            info = infos["final_info"] if terminated[i] else infos
            assert to_text(page) == to_text(pages[i]) == game.page()
            assert (info["score"][i], info["lives"][i], info["life_lost"][i]) == (game.score, game.lives, result[2])
            if terminated[i]:
                slow[i] = PlainGame(board, env.games.serves[i])
                assert to_text(observations[i]) == slow[i].page()
            lost += result[2]
            broken += rewards[i] > 0
        kept = env.games.pages.copy()
        env.games.draw(np.ones(4, bool))
        np.testing.assert_array_equal(env.games.pages, kept)
    assert lost and broken
    check_env(gym.make("BreakoutAscii-v0").unwrapped, skip_render_check=True)


def test_evaluation_plays_every_game_of_an_edited_board(board):
    """Of all sequences of serves, two are compared with a tracker that plays the plain reference."""
    from breakout_ascii import MOST_POINTS, standard_serves
    from evaluation import SERVES, play_all_games, tracker

    assert len(SERVES) == 2 ** board["LIVES"] == len(set(map(tuple, SERVES)))
    steps = 900 * board["BALL_INTERVAL"]
    results = play_all_games(tracker, steps)
    for number in (1, len(SERVES) - 2):
        game = PlainGame(board, standard_serves(SERVES[number]))
        start = game.paddle - 1, board["COLUMNS"] - 2 - game.paddle - len(board["PADDLE"])
        assert 0 <= start[1] - start[0] <= 1  # the paddle starts in the middle
        over = False
        while not over and game.steps < steps:
            off = game.x - game.paddle - (len(board["PADDLE"]) - 1) // 2
            over = game.step(1 if off < -1 else 2 if off > 1 else 0)[1]
        assert (results.scores[number], results.bricks[number]) == (game.score, len(game.bricks))
        assert results.lives[number] == game.lives and results.lengths[number] == game.steps
    bricks = board["BRICK_ROWS"] * board["BRICK_COLUMNS"]
    assert MOST_POINTS == bricks * board["BRICK_POINTS"] + board["CLEAR_POINTS"] >= results.scores.max()


def test_the_levels_of_an_edited_game_are_measured():
    """With one brick and one life they can be told beforehand, and those of the standard game are the known ones."""
    with edited({"LIVES": 1, "BRICK_ROWS": 1, "BRICK_COLUMNS": 1, "BRICK": "|" * 78, "PADDLE": "=" * 78}):
        from evaluation import levels

        assert levels() == {"the whole wall": 60, "random play": 60, "a simple tracker": 60}
    from evaluation import RANDOM_SCORE, levels

    assert levels() == {"the whole wall, as a simple tracker plays it": 960, "random play": RANDOM_SCORE}


def test_pictures_and_recordings_show_an_edited_game(board):
    """What the viewer sees on a page is the state of the game, and its pictures have the size of the page."""
    from helpers import PAGE

    from breakout_ascii import BreakoutAsciiVec, to_image
    from games.game import BREAKOUT, load_game
    from model import GPT, GPTConfig
    from viewer.replay.breakout import NAMES, things_of
    from viewer.replay.pictures import attention_pictures
    from viewer.replay.recording import Frame

    env = BreakoutAsciiVec(1, varied_starts=1.0)
    page = env.reset(seed=0)[0][0]
    rng = np.random.default_rng(0)
    for _ in range(60):
        games = env.games
        things = np.array(NAMES)[things_of(page[None]).on(page[None])[0]].reshape(board["ROWS"], board["COLUMNS"])
        assert np.argwhere(things == "ball").tolist() == [[games.ball_y[0], games.ball_x[0]]]
        left = np.argwhere(things == "paddle's left end").tolist()
        assert left == [[board["ROWS"] - 2, games.paddle_x[0]]] and (things == "paddle's right end").sum() == 1
        assert (things == "paddle's middle").sum() == len(board["PADDLE"]) - 2
        assert (things == "bricks").sum() == len(board["BRICK"]) * games.bricks_left[0]
        page = env.step(rng.integers(3, size=1))[0][0]
    assert to_image(page).shape == (11 * board["ROWS"], 6 * (board["COLUMNS"] - 1), 3)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**PAGE, n_head=2, n_embd=8))
    picture = next(attention_pictures(gpt, [Frame(page, 0, 0, 1)], load_game(BREAKOUT)))
    assert picture.shape == (14 + 11 * board["ROWS"] // 2, max(300, 6 * (board["COLUMNS"] - 1)), 3)


def test_a_recording_holds_an_edited_game(board):
    """The page in the browser is told every constant, and a recording has the serves of each game and its actions."""
    from helpers import PAGE
    from replay_helpers import GAME, recorded

    from breakout_ascii import BOARD, Games
    from model import GPTConfig
    from policies import make_gpt
    from viewer.replay.breakout import game_data, replay_data

    known = json.loads(json.dumps(game_data(GAME) | vars(GPTConfig(**PAGE))))
    assert {name: known[name.lower()] for name in BOARD} == BOARD
    torch.manual_seed(0)
    frames = recorded(make_gpt(GPTConfig(**PAGE, n_head=2, n_embd=8), torch.device("cpu")), 200, sample=True)
    pages = iter(frame.page for frame in frames)
    for game in replay_data(frames)["games"]:
        assert np.shape(game["serves"]) == (board["LIVES"], 3)
        one = Games(1)
        one.reset(np.array([True]), np.array([game["serves"]]), np.ones_like(one.bricks))
        assert one.pages.tobytes() == next(pages).tobytes()
        for action in map(int, game["actions"]):
            one.step(np.array([action]))
            assert one.pages.tobytes() == next(pages).tobytes()
    assert next(pages, None) is None


def test_a_gpt_learns_an_edited_game(board, tmp_path, capsys):
    """Its sizes fit the page, fast/ computes what model.py does, and its checkpoint records the board."""
    import train_ppo
    from breakout_ascii import BOARD
    from model import GPT
    from policies import load_policy

    small = {"NUM_ENVS": 4, "ROLLOUT_STEPS": 16, "BATCH_SIZE": 32, "N_EMBD": 16, "N_HEAD": 2, "NUM_STEPS": 64}
    ppo = train_ppo.build(Values(**dict(train_ppo.CONSTANTS) | small), torch.device("cpu"))
    ppo.learn()
    save_checkpoint(tmp_path / "model.safetensors", ppo.policy_state())
    policy, meta = load_policy(tmp_path / "model.safetensors")
    plain = GPT(policy.config)
    plain.load_state_dict(policy.state_dict())
    pages = ppo.env.observation()
    torch.testing.assert_close(policy(pages)[0], plain(torch.from_numpy(pages))[0], rtol=1e-3, atol=1e-5)
    assert meta["board"] == BOARD != STANDARD and capsys.readouterr().err == ""


def test_the_checks_of_a_gpu_pass_in_an_edited_game(board):
    """They put balls where something rare happens, and compare tensors with NumPy."""
    from helpers import device_trainer

    from fast.gpu_checks import check_games, set_rare_cases

    ppo = device_trainer(num_envs=16, rollout_steps=12 * board["BALL_INTERVAL"])
    state = set_rare_cases(ppo)
    ppo.collect()
    assert check_games(ppo, state).passed
    if board["BALL_INTERVAL"] == 1:
        assert (ppo.buffer.fields["rewards"][0, 1::8] == board["BRICK_POINTS"] + board["CLEAR_POINTS"]).all()


# A model or a run of another board.


@pytest.mark.parametrize(
    "recorded, said",
    [
        (None, ""),
        (STANDARD, ""),
        ("damaged", ""),
        (STANDARD | {"PADDLE": "=========", "LIVES": 3}, "PADDLE '=========' (here '======='), LIVES 3 (here 5)"),
        ({"PADDLE": "\x1b[2J"}, r"PADDLE '\x1b[2J' (here '=======')"),
        ({"LIVES": torch.zeros(2)}, "LIVES tensor([0., 0.]) (here 5)"),
    ],
)
def test_a_model_of_another_board_is_played_and_a_line_says_so(recorded, said, tmp_path, capsys):
    """A checkpoint that records no board is of the standard game. To go on training on another board is refused."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, load_checkpoint(SHIPPED) | ({"board": recorded} if recorded else {}))
    load_policy(path)
    assert capsys.readouterr().err == (f"note: {shown(path)} was trained with {said}\n" if said else "")
    run = Run({}, tmp_path, {"board": recorded})
    if said:
        with pytest.raises(CommandLineError, match="was begun with .*; put that back in breakout_ascii.py") as error:
            check_board(run)
        assert said in str(error.value)
    else:
        check_board(run)


def test_a_model_of_a_page_of_another_size_is_refused():
    """The line names the size that it reads."""
    with edited({"ROWS": 20}):
        import policies

        with pytest.raises(
            CheckpointError, match=r"reads pages of 24 x 81 characters, of another Breakout .*: ROWS 24 \(here 20\)"
        ):
            policies.load_policy(SHIPPED)


# Constants that make no game.


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"PADDLE": "+++++"}, "PADDLE must be two or more of the character =, not '+++++'"),
        ({"PADDLE": "="}, "PADDLE must be two or more of the character =, not '='"),
        ({"PADDLE": 9}, "PADDLE must be two or more of the character =, not 9"),
        ({"PADDLE": "=" * 79}, "PADDLE has 79 characters, and between the walls there are 78 columns; shorten it"),
        ({"BRICK": "[__]"}, "BRICK must be one or more of the characters | and _, not '[__]'"),
        (
            {"BRICK_COLUMNS": 14},
            "14 bricks of 6 characters do not fit between the walls, where there are 78 columns; "
            "lower BRICK_COLUMNS or shorten BRICK",
        ),
        (
            {"BRICK_ROWS": 18},
            "18 rows of bricks from row 5 on leave no room for the ball above the paddle; "
            "lower BRICK_ROWS or BRICK_TOP by 2",
        ),
        ({"BRICK_TOP": 0}, "BRICK_TOP must be an integer from 1 up, not 0"),
        ({"BALL_INTERVAL": 0.5}, "BALL_INTERVAL must be an integer from 1 up, not 0.5"),
        ({"BRICK_POINTS": -1}, "BRICK_POINTS must be an integer from 0 up, not -1"),
        ({"LIVES": 9}, "LIVES must be at most 8, because an evaluation plays all 2^LIVES games; it is 9"),
        (
            {"PADDLE_MOVES": (0, 2, -2)},
            "PADDLE_MOVES must be 0, an integer below 0 and one above 0, not (0, 2, -2)",
        ),
    ],
)
def test_constants_that_make_no_game_are_refused_in_one_line(changes, said):
    """The import ends the program."""
    with pytest.raises(SystemExit) as ending, edited(changes):
        pass
    assert ending.value.code == f"breakout_ascii.py: {said}"


def test_constants_at_their_limits_make_a_game():
    """No ball has less room than this, and no paddle less or more."""
    for changes in ({"BRICK_ROWS": 16}, {"PADDLE": "=" * 78}, {"PADDLE": "=="}, {"BRICK": "|", "BRICK_COLUMNS": 78}):
        with edited(changes) as game:
            env = game.BreakoutAsciiVec(8, varied_starts=0.5)
            env.reset(seed=0)
            rng = np.random.default_rng(0)
            for _ in range(200):
                env.step(rng.integers(3, size=8))
            kept = env.games.pages.copy()
            env.games.draw(np.ones(8, bool))
            np.testing.assert_array_equal(env.games.pages, kept)
