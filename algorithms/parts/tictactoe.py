"""The game of tic-tac-toe: its rules for N boards at once, all of its games, a Gymnasium environment, and its pictures.

A board is an array (9,) of int8, row by row, with X, O or 0 in each cell. X starts.
"""

import functools

import gymnasium as gym
import numpy as np

X = 1
O = -1  # noqa: E741
LINES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])

# --- the rules --------------------------------------------------------------------------------------------------------


def wins(boards, player):
    """Whether a player has three in a row on each of these boards.

    Args:
        boards: (N, 9).
        player: X or O, or an array of them for each board, (N,).

    Returns an array (N,) of bool.
    """
    return (boards[:, LINES] == np.reshape(player, (-1, 1, 1))).all(2).any(1)


def results(boards, player):
    """How each of these boards (N, 9) counts for a player: 1.0 if the player has won, -1.0 if the other has, else 0.0.

    player: as in `wins`.
    """
    return 1.0 * wins(boards, player) - wins(boards, -player)


def over(boards):
    """Whether the game has ended on each of these boards (N, 9): an array (N,) of bool."""
    return wins(boards, X) | wins(boards, O) | (boards != 0).all(1)


def observations(boards, player):
    """The boards (N, 9) as a player sees them, (N, 18) float32: the player's own marks first, then the other's.

    player: X or O, or an array of them for each board, (N,).
    """
    player = np.reshape(player, (-1, 1))
    return np.concatenate([boards == player, boards == -player], axis=1).astype(np.float32)


# --- all games --------------------------------------------------------------------------------------------------------


def every_game(choose, player):
    """Play all games in which one side moves as `choose` says and the other makes every possible move.

    Args:
        choose: takes boards (N, 9) and the player, and returns moves (N,).
        player: X or O, the side that `choose` moves.

    Returns the final boards (L, 9), and the probability (L,) of each game against an opponent who moves at random.
    """
    boards = np.zeros((1, 9), np.int8)
    probabilities = np.ones(1)
    turn = X
    final_boards = []
    final_probabilities = []
    while len(boards):
        if turn == player:
            boards[np.arange(len(boards)), choose(boards, player)] = player
        else:
            parents, cells = np.nonzero(boards == 0)  # one row for each possible move
            probabilities = (probabilities / (boards == 0).sum(1))[parents]
            boards = boards[parents]
            boards[np.arange(len(boards)), cells] = turn
        ended = over(boards)
        final_boards.append(boards[ended])
        final_probabilities.append(probabilities[ended])
        boards = boards[~ended]
        probabilities = probabilities[~ended]
        turn = -turn
    return np.concatenate(final_boards), np.concatenate(final_probabilities)


@functools.cache
def optimal_score(board, player, turn):
    """The highest expected result for `player` against an opponent who moves at random: 1 is a win, -1 a loss.

    Args:
        board: a tuple of nine cells.
        player: X or O.
        turn: whose move it is, X or O.
    """
    boards = np.array([board], np.int8)
    if over(boards)[0]:
        return float(results(boards, player)[0])
    scores = []
    for cell in range(9):
        if board[cell] == 0:
            scores.append(optimal_score((*board[:cell], turn, *board[cell + 1 :]), player, -turn))
    return max(scores) if turn == player else sum(scores) / len(scores)


# --- the environment --------------------------------------------------------------------------------------------------


class TicTacToe(gym.Env):
    """One side of the game as a Gymnasium environment. The reward is 1 for a win and -1 for a loss.

    `reset(options={"first": True})` says whether the agent starts, which is random by default. The "action_mask" of an
    info has a 1 for each empty cell.
    """

    def __init__(self, opponent=None):
        """opponent: takes a board and a player and returns a cell; by default it moves at random."""
        self.observation_space = gym.spaces.Box(0, 1, (18,), np.float32)
        self.action_space = gym.spaces.Discrete(9)
        self.opponent = opponent or self.random_move

    def random_move(self, board, player):
        return self.np_random.choice(np.flatnonzero(board == 0))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        first = (options or {}).get("first")
        if first is None:
            first = self.np_random.random() < 0.5
        self.player = X if first else O
        self.board = np.zeros(9, np.int8)
        if self.player == O:
            self.board[self.opponent(self.board, X)] = X
        return self.observation(), self.info()

    def step(self, action):
        """Make a move and let the opponent reply. Raises ValueError for a cell that is taken."""
        self.check_move(action)
        self.board[action] = self.player
        if not over(self.board[None])[0]:
            self.board[self.opponent(self.board, -self.player)] = -self.player
        reward = float(results(self.board[None], self.player)[0])
        terminated = bool(over(self.board[None])[0])
        return self.observation(), reward, terminated, False, self.info()

    def check_move(self, action):
        if over(self.board[None])[0]:
            raise ValueError("the game is over; call reset()")
        if not self.action_space.contains(action):
            raise ValueError(f"a move is a cell, 0 to 8, not {action!r}")
        if self.board[action] != 0:
            empty = ", ".join(str(cell) for cell in np.flatnonzero(self.board == 0))
            raise ValueError(f"cell {action} is taken; the empty ones are {empty}")

    def observation(self):
        return observations(self.board[None], self.player)[0]

    def info(self):
        return {"action_mask": (self.board == 0).astype(np.int8)}


# --- pictures and the terminal ----------------------------------------------------------------------------------------


def picture(board, probabilities=None, value=None):
    """The board (9,) as an RGB array, with the probability of each move and the expected result if they are given."""
    from PIL import Image, ImageDraw  # imported here, because training works without it

    image = Image.new("RGB", (300, 330), "white")
    draw = ImageDraw.Draw(image)
    for i in range(9):
        x = i % 3 * 100
        y = i // 3 * 100
        colour = "white"
        if board[i] == 0 and probabilities is not None:
            shade = 255 - int(150 * probabilities[i])
            colour = (shade, 255, shade)
        draw.rectangle((x, y, x + 100, y + 100), fill=colour, outline="black", width=2)
        if board[i] == X:
            draw.line((x + 20, y + 20, x + 80, y + 80), fill="black", width=6)
            draw.line((x + 80, y + 20, x + 20, y + 80), fill="black", width=6)
        elif board[i] == O:
            draw.ellipse((x + 20, y + 20, x + 80, y + 80), outline="black", width=6)
        elif probabilities is not None:
            draw.text((x + 50, y + 50), f"{probabilities[i]:.0%}", fill="black", anchor="mm", font_size=22)
    if value is not None:
        draw.text((150, 315), f"expects {value:+.2f}", fill="black", anchor="mm", font_size=18)
    return np.asarray(image)


def print_board(board, probabilities=None):
    """Print a board; its empty cells show their number, or the probability of the agent's move if these are given."""
    cells = []
    for i in range(9):
        if board[i] == X:
            cells.append("X")
        elif board[i] == O:
            cells.append("O")
        elif probabilities is None:
            cells.append(f"{i + 1}")
        else:
            cells.append(f"{probabilities[i]:.0%}")
    rows = ["|".join(f"{cell:^6}" for cell in cells[first : first + 3]) for first in (0, 3, 6)]
    print("\n" + "\n------+------+------\n".join(rows) + "\n")


def ask_for_move(board):
    """Ask a person for a move until it is possible. Returns the cell, 0 to 8, or None if the person wants to leave."""
    while True:
        try:
            text = input("Your cell: ").strip()
        except (EOFError, RuntimeError):  # the input has ended, or was closed from the start
            return None
        if text.lower() == "q":
            return None
        if text in list("123456789") and board[int(text) - 1] == 0:
            return int(text) - 1
        empty = ", ".join(str(cell + 1) for cell in np.flatnonzero(board == 0))
        print(f"{text!r} is no empty cell: {empty}, or q to leave")
