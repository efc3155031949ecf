import functools
import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from algorithms_helpers import evaluated, run, same, states_of_a_straight_and_a_resumed_run
from gymnasium.utils.env_checker import check_env
from PIL import Image

from algorithms import actor_critic_tictactoe as ttt
from algorithms.actor_critic_tictactoe import ALGORITHM, greedy, policy_of
from algorithms.parts.playing import load_policy_state
from algorithms.parts.tictactoe import LINES, O, TicTacToe, X, every_game, optimal_score, over, wins

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = "--games 8 --hidden 8 --pool 2 --pool_interval 2 --eval_interval 2 --lr 0.003 --min_lr 0.003 --save_freq 1"
EMPTY = (0,) * 9


def board(text):
    """ "XO. .X. ..O" -> (1, 9)"""
    return np.array([[{"X": X, "O": O, ".": 0}[c] for c in text.replace(" ", "")]], np.int8)


@pytest.mark.parametrize(
    "text, x, o, ended",
    [
        ("... ... ...", False, False, False),
        ("XXX OO. ...", True, False, True),
        ("XX. OOO X..", False, True, True),
        ("XO. XO. .O.", False, True, True),
        ("XO. OX. ..X", True, False, True),
        ("..X OX. X..", True, False, True),
        ("XOX XOO OXX", False, False, True),
        ("XXO O.. ...", False, False, False),
    ],
)
def test_who_has_won(text, x, o, ended):
    b = board(text)
    assert (wins(b, X)[0], wins(b, O)[0], over(b)[0]) == (x, o, ended)


def test_there_are_eight_lines():
    cells = np.arange(9).reshape(3, 3)
    expected = [*cells, *cells.T, cells.diagonal(), cells[:, ::-1].diagonal()]
    assert sorted(map(tuple, map(sorted, LINES))) == sorted(map(tuple, map(sorted, expected)))


def test_the_environment_keeps_gymnasiums_contract():
    env = TicTacToe(opponent=lambda board, player: np.flatnonzero(board == 0)[-1])
    obs, info = env.reset(seed=0, options={"first": True})
    assert obs.sum() == 0 and info["action_mask"].tolist() == [1] * 9
    obs, reward, terminated, truncated, info = env.step(4)
    assert obs.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0] + [0] * 8 + [1]
    with pytest.raises(ValueError, match="cell 4 is taken; the empty ones are 0, 1"):
        env.step(4)
    for nowhere in (-1, 9):
        with pytest.raises(ValueError, match="a move is a cell, 0 to 8"):
            env.step(nowhere)
    check_env(MaskedForCheck(), skip_render_check=True)


class MaskedForCheck(TicTacToe):
    """check_env plays at random: here whatever it chooses becomes an empty cell."""

    def step(self, action):
        if over(self.board[None])[0]:
            self.reset()
        empty = np.flatnonzero(self.board == 0)
        return super().step(empty[action % len(empty)])


def test_rewards_are_the_learners():
    env = TicTacToe(opponent=lambda board, player: np.flatnonzero(board == 0)[0])
    env.reset(options={"first": True})
    assert [env.step(cell)[1:3] for cell in (2, 4, 6)] == [(0.0, False), (0.0, False), (1.0, True)]
    with pytest.raises(ValueError, match="the game is over"):
        env.step(8)
    env.reset(options={"first": False})  # the other takes 0, 1, 2
    assert [env.step(cell)[1:3] for cell in (8, 4)] == [(0.0, False), (-1.0, True)]


def random_moves(boards, player):
    return (np.random.default_rng(0).random(boards.shape) * (boards == 0)).argmax(1)


def test_every_game_is_walked():
    """Against a player who always takes the first empty cell, as many games as a recursion finds, with a sum of 1."""

    def first(boards, player):
        return (boards == 0).argmax(1)

    for player in (X, O):
        boards, chances = every_game(first, player)
        assert over(boards).all() and chances.sum() == pytest.approx(1) and len(boards) > 50
        # the same by recursion, game by game
        assert len(boards) == count_lines(EMPTY, player, X)


def count_lines(b, player, turn):
    array = np.array([b], np.int8)
    if over(array)[0]:
        return 1
    cells = [b.index(0)] if turn == player else [i for i in range(9) if b[i] == 0]
    return sum(count_lines((*b[:i], turn, *b[i + 1 :]), player, -turn) for i in cells)


def test_the_optimum_against_random_play():
    """It is right one move before a win, where four replies differ, and for the known results of random play."""
    assert optimal_score(tuple(board("XX. OO. ...")[0]), X, X) == 1
    assert optimal_score(tuple(board("XX. OO. X..")[0]), X, O) == pytest.approx((-1 + 0 + 1 + 1) / 4)
    assert 0.99 < optimal_score(EMPTY, X, X) < 1 and 0.9 < optimal_score(EMPTY, O, X) < 0.95
    rng, results = np.random.default_rng(0), []
    for _ in range(2000):
        b, turn = np.zeros((1, 9), np.int8), X
        while not over(b)[0]:
            b[0, rng.choice(np.flatnonzero(b[0] == 0))] = turn
            turn = -turn
        results.append((wins(b, X)[0], wins(b, O)[0]))
    x, o = np.mean(results, axis=0)
    assert x == pytest.approx(0.585, abs=0.05) and o == pytest.approx(0.288, abs=0.05)


@functools.cache
def minimax(b, turn):
    """The result for X if both sides play perfectly, and a best move."""
    array = np.array([b], np.int8)
    if over(array)[0]:
        return int(wins(array, X)[0]) - int(wins(array, O)[0]), None
    results = [(minimax((*b[:i], turn, *b[i + 1 :]), -turn)[0], i) for i in range(9) if b[i] == 0]
    return max(results) if turn == X else min(results)


def test_the_shipped_model_never_loses_and_minimax_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = evaluated(ALGORITHM, None, capsys)
    assert result["lost"] == 0 and result["lines"] > 500
    for side in "XO":
        assert result[f"as_{side}"] >= 0.99 * result[f"optimum_as_{side}"]
    state, _, _ = load_policy_state(ALGORITHM, None)
    moves = greedy(policy_of(state))
    for player in (X, O):
        b, turn = EMPTY, X
        while not over(np.array([b], np.int8))[0]:
            i = int(moves(np.array([b], np.int8), turn)[0]) if turn == player else minimax(b, turn)[1]
            b, turn = (*b[:i], turn, *b[i + 1 :]), -turn
        assert not wins(np.array([b]), X)[0] and not wins(np.array([b]), O)[0]


def trainer(**changes):
    c = SimpleNamespace(**{**ALGORITHM.constants, "GAMES": 64, "HIDDEN": 8, **changes})
    return ALGORITHM.build(c)


def test_what_a_batch_of_games_holds():
    selfplay = trainer(OPENINGS=0.0)
    obs, actions, rewards, values, ends, played = selfplay.play()
    assert (
        obs.shape == (5, 64, 18) and (ends.sum(0) == 1).all()
    )  # every game ends once, after a move of the learner or the reply to it
    assert (played[0]).all() and (played[1:] <= played[:-1]).all() and (rewards[~ends] == 0).all()
    own, other = obs.view(5, 64, 2, 9).unbind(2)
    taken = (own + other).gather(2, actions.unsqueeze(2)).squeeze(2)
    assert (taken[played] == 0).all()  # no move into a taken cell
    assert ((own.sum(2) - other.sum(2))[played].abs() <= 1).all()
    assert set(rewards[ends].tolist()) <= {-1.0, 0.0, 1.0} and len(set(rewards[ends].tolist())) == 3


def test_openings_are_positions_of_the_game():
    selfplay = trainer(GAMES=400, OPENINGS=1.0)
    boards, turn = selfplay.openings()
    marks = (boards != 0).sum(1)
    assert set(marks) == set(range(7)) and (boards.sum(1) == marks % 2).all() and not over(boards).any()
    assert (turn == np.where(marks % 2 == 0, X, O)).all()


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, SMALL, tmp_path, 200, 100)
    assert same(straight, resumed) and straight[0]["update_count"] > 4


def test_a_person_plays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = iter(["5", "5", "x", "1", "2", "3", "4", "6", "7", "8", "9", *"123456789" * 3, "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers, "q"))
    assert run(ALGORITHM, "--play", "--human") == 0
    out = capsys.readouterr().out
    assert (
        "It expects" in out and "'5' is no empty cell" in out and "'x' is no empty cell" in out and "You win" not in out
    )


def starts(monkeypatch, capsys, *words):
    """Who starts the games that a person plays with these options, up to the hundredth move: "X" is the person."""
    answers = iter("123456789" * 12)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers, "q"))
    assert run(ALGORITHM, "--play", "--human", *words) == 0
    return re.findall(r"You are ([XO])", capsys.readouterr().out)


def test_who_starts_is_drawn(tmp_path, monkeypatch, capsys):
    """In the terminal by a new seed each time, unless one is given; in a gif by the seed; in training for each game."""
    monkeypatch.chdir(tmp_path)
    first = starts(monkeypatch, capsys, "--seed", 3)
    assert set(first) == {"X", "O"} and len(first) > 5
    assert starts(monkeypatch, capsys, "--seed", 3) == first != starts(monkeypatch, capsys, "--seed", 4)
    monkeypatch.setattr("secrets.randbelow", lambda n: 3)
    assert starts(monkeypatch, capsys) == first
    state, _, _ = load_policy_state(ALGORITHM, None)
    monkeypatch.setattr(ttt, "picture", lambda board, *_: np.count_nonzero(board))
    assert {next(ALGORITHM.frames(state, 1, seed, False)) for seed in range(8)} == {0, 1}  # marks in the first picture
    selfplay = trainer(GAMES=400, OPENINGS=0.0)
    first_moves = selfplay.play()[0][0].sum(1)  # marks on the board at the learner's first move
    assert set(first_moves.tolist()) == {0, 1} and first_moves.mean() == pytest.approx(0.5, abs=0.1)


def test_a_person_who_has_closed_the_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for error in (EOFError(), RuntimeError("input(): lost sys.stdin")):  # </dev/null and <&-
        monkeypatch.setattr("builtins.input", Mock(side_effect=error))
        assert run(ALGORITHM, "--play", "--human") == 0


def test_play(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(ALGORITHM, "--play", "--episodes", 2) == 0
    with Image.open("actor_critic_tictactoe.gif") as gif:
        assert gif.n_frames >= 8 and gif.size == (300, 330)


def test_a_critic_expects_from_minus_one_to_one():
    assert ttt.Critic(4)(torch.ones(3, 18) * 100).abs().max() <= 1
