"""The game of tic-tac-toe: rules for N boards at once, its whole tree, a Gymnasium environment, boards as pictures and in the terminal."""

import functools

import gymnasium as gym
import numpy as np

X, O = 1, -1  # on a board (9,) of int8, row by row; 0 is an empty cell. X starts
LINES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])


def wins(boards, player):
    """Boards (N, 9) -> (N,) bool: has the player, or have the players (N,), three in a row?"""
    return (boards[:, LINES] == np.reshape(player, (-1, 1, 1))).all(2).any(1)


def over(boards):
    """Boards (N, 9) -> (N,) bool."""
    return wins(boards, X) | wins(boards, O) | (boards != 0).all(1)


def observations(boards, player):
    """Boards as the player sees them, or the players (N,): its own marks, then the other's -> (N, 18) float32."""
    player = np.reshape(player, (-1, 1))
    return np.concatenate([boards == player, boards == -player], axis=1).astype(np.float32)


def every_line(moves, player):
    """All games in which this player takes `moves` and the other whatever it likes -> final boards (L, 9), and the probability of each
    against an opponent who moves at random, (L,)."""
    boards, chances, turn, ended = np.zeros((1, 9), np.int8), np.ones(1), X, []
    while len(boards):
        if turn == player:
            boards[np.arange(len(boards)), moves(boards, player)] = player
        else:
            which, cells = np.nonzero(boards == 0)
            chances = (chances / (boards == 0).sum(1))[which]
            boards = boards[which]
            boards[np.arange(len(boards)), cells] = turn
        done = over(boards)
        ended.append((boards[done], chances[done]))
        boards, chances, turn = boards[~done], chances[~done], -turn
    return [np.concatenate(x) for x in zip(*ended)]


@functools.cache
def best_score(board, player, turn):
    """The most that `player` can expect of a board, a tuple, against an opponent who moves at random: wins less losses."""
    boards = np.array([board], np.int8)
    if over(boards)[0]:
        return float(wins(boards, player)[0]) - float(wins(boards, -player)[0])
    after = [best_score((*board[:i], turn, *board[i + 1 :]), player, -turn) for i in range(9) if board[i] == 0]
    return max(after) if turn == player else sum(after) / len(after)


class TicTacToe(gym.Env):
    """One side of the game; `opponent`, a function of (board, player), plays the other. Reward: 1 for a win, -1 for a loss.

    reset(options={"first": True}) says who starts, by default chance. infos have "action_mask", the empty cells. Raises ValueError for
    a move into a cell that is taken.
    """

    def __init__(self, opponent=None):
        self.observation_space, self.action_space = gym.spaces.Box(0, 1, (18,), np.float32), gym.spaces.Discrete(9)
        self.opponent = opponent or self.random_move

    def random_move(self, board, player):
        return self.np_random.choice(np.flatnonzero(board == 0))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        first = (options or {}).get("first")
        self.player = X if (self.np_random.random() < 0.5 if first is None else first) else O
        self.board = np.zeros(9, np.int8)
        if self.player == O:
            self.board[self.opponent(self.board, X)] = X
        return self.result()

    def step(self, action):
        if over(self.board[None])[0]:
            raise ValueError("the game is over; call reset()")
        if not self.action_space.contains(action):
            raise ValueError(f"a move is a cell, 0 to 8, not {action!r}")
        if self.board[action] != 0:
            raise ValueError(
                f"cell {action} is taken; the empty ones are {', '.join(map(str, np.flatnonzero(self.board == 0)))}"
            )
        self.board[action] = self.player
        if not over(self.board[None])[0]:
            self.board[self.opponent(self.board, -self.player)] = -self.player
        obs, info = self.result()
        reward = float(wins(self.board[None], self.player)[0]) - float(wins(self.board[None], -self.player)[0])
        return obs, reward, bool(over(self.board[None])[0]), False, info

    def result(self):
        return observations(self.board[None], self.player)[0], {"action_mask": (self.board == 0).astype(np.int8)}


# Showing boards


def picture(board, probabilities, value):
    """The board (9,), with what the agent thinks of each empty cell -> an RGB array."""
    from PIL import Image, ImageDraw  # here, because the training can do without

    image = Image.new("RGB", (300, 330), "white")
    draw = ImageDraw.Draw(image)
    for i in range(9):
        x, y = i % 3 * 100, i // 3 * 100
        shade = 255 - int(150 * probabilities[i])
        draw.rectangle(
            (x, y, x + 100, y + 100), fill=(shade, 255, shade) if board[i] == 0 else "white", outline="black", width=2
        )
        if board[i] == X:
            draw.line((x + 20, y + 20, x + 80, y + 80), fill="black", width=6)
            draw.line((x + 80, y + 20, x + 20, y + 80), fill="black", width=6)
        elif board[i] == O:
            draw.ellipse((x + 20, y + 20, x + 80, y + 80), outline="black", width=6)
        elif probabilities.any():
            draw.text((x + 50, y + 50), f"{probabilities[i]:.0%}", fill="black", anchor="mm", font_size=22)
    draw.text(
        (150, 315), f"expects {value:+.2f}" if probabilities.any() else "", fill="black", anchor="mm", font_size=18
    )
    return np.asarray(image)


def ask(board):
    """-> the cell that a person wants, or None to leave."""
    while True:
        try:
            text = input("Your cell: ").strip()
        except (EOFError, RuntimeError):  # the input has ended, or was closed from the start
            return None
        if text.lower() == "q":
            return None
        if text in "123456789" and len(text) == 1 and board[int(text) - 1] == 0:
            return int(text) - 1
        print(f"{text!r} is no empty cell: {', '.join(str(i + 1) for i in np.flatnonzero(board == 0))}, or q to leave")


def print_board(board, probabilities=None):
    """Empty cells show their number, or how probable the agent finds them."""
    empty = [f"{i + 1}" for i in range(9)] if probabilities is None else [f"{p:.0%}" for p in probabilities]
    cells = [{X: "X", O: "O", 0: empty[i]}[int(mark)] for i, mark in enumerate(board)]
    rows = ["|".join(f"{cell:^6}" for cell in cells[i : i + 3]) for i in (0, 3, 6)]
    print("\n" + "\n------+------+------\n".join(rows) + "\n")
