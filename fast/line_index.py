"""Ids for the distinct lines of pages, and for the distinct pieces of lines.

Most lines recur from step to step and across games. So a page is kept as the ids of its 24 lines, and whatever depends on one line
alone is computed once for all pages it stands on.
"""

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS
from model import CHARACTER_OF, check_pages

PIECE = (
    9  # characters in a piece of a line, a divisor of 81; its key, below 13608 * 7**PIECE, fits into 64 bits up to 17
)


class LineIndex:
    """Gives lines, and pieces of lines, ids in the order in which they come; the same text in another row is another line.

    Lines are told apart by a random linear hash of their row and characters, modulo 2^64. Two of ten thousand lines have the same
    hash, and would be taken for one, with a chance of less than one in a billion. The tables grow with every new line.
    """

    MULTIPLIERS = np.random.default_rng(0).integers(2**64, size=1 + COLUMNS, dtype=np.uint64)

    def __init__(self):
        self.lines = {}  # hash of a line: its id
        self.line_pieces = GrowingTable(COLUMNS // PIECE, dtype=torch.int64)  # id of a line -> ids of its 9 pieces
        self.pieces = {}  # key of a piece: its id
        self.piece_pairs = GrowingTable(
            PIECE, dtype=torch.int64
        )  # id of a piece -> its 9 pairs, character * 1944 + position
        self.last = None  # the last batch of pages and its ids: from step to step few lines change
        self.pages_end_alike = True  # with a newline, as those of the game do; once false it stays so

    def encode(self, tokens):
        """(B, 1944) uint8 array or CPU tensor -> (B, 24) int64 array, the ids of its lines. Raises ValueError if it is no page."""
        check_pages(tokens)
        tokens = np.asarray(tokens)
        if self.last is not None and len(self.last[0]) == len(tokens):
            changed = np.zeros(len(tokens) * ROWS, bool)
            changed[np.flatnonzero(tokens != self.last[0]) // COLUMNS] = True  # few characters change
            changed = changed.nonzero()[0]
            ids = self.last[1].copy()
        else:
            changed = np.arange(len(tokens) * ROWS)
            ids = np.empty((len(tokens), ROWS), np.int64)
        rows, lines = changed % ROWS, tokens.reshape(-1, COLUMNS)[changed]  # (n,), (n, 81)
        hashes = (np.column_stack([rows, lines]).view(np.uint64) @ self.MULTIPLIERS).tolist()
        if first := first_unknown(self.lines, hashes):
            new = list(first.values())
            check_characters(lines[new])
            add_keys(self.lines, first)
            self.add(rows[new], lines[new])
        ids.reshape(-1)[changed] = ids_of(self.lines, hashes)
        self.last = tokens.copy(), ids.copy()
        return ids

    def add(self, rows, lines):
        """New lines: rows (n,), tokens (n, 81)."""
        self.pages_end_alike &= bool((lines[rows == ROWS - 1, -1] == ord("\n")).all())
        characters = CHARACTER_OF.numpy()[lines].astype(np.int64).reshape(-1, PIECE)
        positions = rows[:, None] * COLUMNS + np.arange(COLUMNS)  # (n, 81)
        pairs = characters * TOKENS + positions.reshape(-1, PIECE)
        # the piece's first pair, which knows its position, and its characters as digits in base 7
        keys = pairs[:, 0] * len(CHARACTERS) ** PIECE + characters @ len(CHARACTERS) ** np.arange(PIECE)
        keys = keys.tolist()
        first = first_unknown(self.pieces, keys)
        add_keys(self.pieces, first)
        pieces = ids_of(self.pieces, keys)
        self.piece_pairs.append(torch.from_numpy(pairs[list(first.values())]))
        self.line_pieces.append(torch.from_numpy(pieces).view(-1, COLUMNS // PIECE))


def check_characters(tokens):
    """Raises ValueError for a token that is no character of a page."""
    if others := tokens.tobytes().translate(None, delete=CHARACTERS.encode()):
        raise ValueError(f"token {others[0]} ({chr(others[0])!r}) is not in the character set {CHARACTERS!r}")


def first_unknown(table, keys):
    """-> {key: the index at which it stands first} for the keys that `table` lacks, in the order in which they come."""
    first = {}
    for i, known in enumerate(map(table.get, keys)):
        if known is None:
            first.setdefault(keys[i], i)
    return first


def add_keys(table, keys):
    """Gives keys that `table` lacks the next ids."""
    table.update(zip(keys, range(len(table), len(table) + len(keys))))


def ids_of(table, keys):
    """-> (n,) int64"""
    return np.fromiter(map(table.get, keys), np.int64, len(keys))


class GrowingTable:
    """A tensor that grows by rows: `table()` is what it holds now."""

    def __init__(self, *shape, **kwargs):
        self.table, self.n = torch.empty(1024, *shape, **kwargs), 0

    def append(self, rows):
        while self.n + len(rows) > self.table.shape[0]:
            self.table = torch.cat([self.table, torch.empty_like(self.table)])
        self.table[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def __call__(self):
        return self.table[: self.n]
