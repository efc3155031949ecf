"""Ids for the distinct lines of pages, and for the distinct pieces of lines.

Most lines recur from step to step and from game to game. So a page is kept as the ids of its 24 lines, and whatever
depends only on a line is computed once for all pages that have the line. Lines that differ still have most of their
text in common, so they are divided further, into pieces.

For example, the ball of a new game moves from row 21 to row 20 in its first step. The second page has only two new
lines: row 20, now with the ball, and row 21, now without it.

>>> from breakout_ascii import CHARACTERS, COLUMNS, ROWS, BreakoutAscii
>>> from model import GPTConfig
>>> game = BreakoutAscii()
>>> first, _ = game.reset(seed=0)
>>> second, *_ = game.step(0)
>>> index = LineIndex(GPTConfig(ROWS, COLUMNS, CHARACTERS, n_action=3))
>>> index.encode(np.stack([first, second]))[:, 18:]  # the last six lines of both pages
array([[18, 19, 20, 21, 22, 23],
       [18, 19, 24, 25, 22, 23]])

A line is 9 pieces of 9 characters. Each of the new lines has one new piece, where the ball is or was:

>>> index.line_pieces.rows[[20, 24]]  # the pieces of row 20 without the ball, and with it
tensor([[180, 181, 182, 183, 184, 185, 186, 187, 188],
        [180, 181, 182, 183, 216, 185, 186, 187, 188]])

A piece is 9 pairs of a character and its position on the page. The id of a pair is character * 1944 + position.
"""

import math

import numpy as np
import torch

from model import character_indices, check_pages, unknown_character

SEVERAL = -1  # in place of the character that ends all pages


def nearest_divisor(n, size):
    """Return the divisor of n that is nearest to a size, as a ratio."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / size)))


class LineIndex:
    """Gives ids to lines, and to pieces of lines, in the order in which they first appear.

    The same text in another row is another line, because what a GPT makes of a character depends on where it is. The
    tables grow with every new line.
    """

    def __init__(self, config):
        self.config = config
        self.character_of = character_indices(config.characters).numpy()
        piece = nearest_divisor(config.columns, 9)  # characters in a piece
        self.lines = {}  # {bytes of a line, its row and its characters: id of the line}
        self.line_pieces = GrowingTable(config.columns // piece, dtype=torch.int64)  # row i: the ids of line i's pieces
        self.pieces = {}  # {bytes of a piece, its pairs: id of the piece}
        self.piece_pairs = GrowingTable(piece, dtype=torch.int64)  # row i: the ids of piece i's pairs
        self.last_pages = None  # the argument of the last `encode`
        self.last_ids = None  # what it returned
        self.last_character = None  # the index of the character that ended every page so far, or SEVERAL

    def encode(self, tokens):
        """Replace the lines of pages by their ids.

        Args: tokens (B, 1944) uint8, an array or a CPU tensor.
        Returns: (B, 24) int64 array.
        Raises: ValueError for anything but pages.
        """
        check_pages(tokens, self.config)
        tokens = np.asarray(tokens)
        changed, ids = self.changed_lines(tokens)
        rows = changed % self.config.rows  # (n,)
        lines = tokens.reshape(-1, self.config.columns)[changed]  # (n, 81)
        keys = row_bytes(np.column_stack([rows.astype(np.uint32)[:, None].view(np.uint8), lines]))
        if not set(keys) <= self.lines.keys():  # some lines are new
            check_characters(lines, self.config)
            new = add_new(self.lines, keys)
            self.add_pieces(rows[new], lines[new])
        ids.reshape(-1)[changed] = ids_of(self.lines, keys)
        self.last_pages = tokens.copy()
        self.last_ids = ids.copy()
        return ids

    def changed_lines(self, tokens):
        """Find the lines that are not the same as in the last call of `encode`. From step to step they are few.

        If the last call had another number of pages, all lines count as changed.

        Returns: the positions of these lines among all B * 24, (n,), and an array (B, 24) that has the ids of the
        other lines already.
        """
        rows = self.config.rows
        if self.last_pages is None or len(self.last_pages) != len(tokens):
            return np.arange(len(tokens) * rows), np.empty((len(tokens), rows), np.int64)
        changed = np.zeros(len(tokens) * rows, bool)
        changed[np.flatnonzero(tokens != self.last_pages) // self.config.columns] = True
        return changed.nonzero()[0], self.last_ids.copy()

    def add_pieces(self, rows, lines):
        """Enter the pieces of new lines: rows (n,), and their tokens (n, 81)."""
        config = self.config
        characters = self.character_of[lines].astype(np.int64)
        ends = set(characters[rows == config.rows - 1, -1].tolist()) | {self.last_character} - {None}
        if ends:
            self.last_character = ends.pop() if len(ends) == 1 else SEVERAL
        positions = rows[:, None] * config.columns + np.arange(config.columns)  # (n, 81)
        pairs = characters * config.tokens + positions
        pairs = pairs.reshape(-1, self.piece_pairs.storage.size(1))  # (n * 9, 9)
        keys = row_bytes(pairs.astype(np.uint32))
        new = add_new(self.pieces, keys)
        self.piece_pairs.append(torch.from_numpy(pairs[new]))
        pieces = torch.from_numpy(ids_of(self.pieces, keys))
        self.line_pieces.append(pieces.view(len(lines), -1))

    @property
    def pages_end_alike(self):
        """Whether all pages so far ended with the same character, as those of a game do, with a newline."""
        return self.last_character != SEVERAL


def check_characters(tokens, config):
    """Raise ValueError for a token that is no character of a page."""
    if others := tokens.tobytes().translate(None, delete=config.characters.encode()):
        raise ValueError(unknown_character(others[0], config))


def row_bytes(array):
    """Return the rows of an array (n, k) as a list of `bytes`, which can be keys of a dict."""
    whole_rows = array.view(f"V{array.itemsize * array.shape[1]}")  # NumPy's type of uninterpreted bytes
    return whole_rows.ravel().tolist()


def add_new(ids, keys):
    """Give the next ids to the keys that have none. Return the positions in `keys` where these first appear."""
    positions = []
    for i, key in enumerate(keys):
        if key not in ids:
            ids[key] = len(ids)
            positions.append(i)
    return positions


def ids_of(ids, keys):
    """Look up the ids of keys, and return an array (n,) int64."""
    return np.fromiter(map(ids.get, keys), np.int64, len(keys))


class GrowingTable:
    """A tensor that grows by rows at its end, without being copied each time."""

    def __init__(self, *shape, dtype):
        self.storage = torch.empty(1024, *shape, dtype=dtype)
        self.n = 0

    def __len__(self):
        return self.n

    @property
    def rows(self):
        """The rows that have been appended so far, as a view."""
        return self.storage[: self.n]

    def append(self, rows):
        while self.n + len(rows) > len(self.storage):
            self.storage = torch.cat([self.storage, torch.empty_like(self.storage)])  # twice as long
        self.storage[self.n : self.n + len(rows)] = rows
        self.n += len(rows)
