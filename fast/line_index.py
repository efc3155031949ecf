"""Numbers for the distinct lines of pages, and for the distinct pieces of lines.

From step to step and from game to game few lines of a page change. So pages are kept as 24 line numbers each, and whatever
depends on one line alone is computed once for all pages it stands on.
"""

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS
from model import CHARACTER_OF, UNKNOWN, check_pages

PIECE = 9  # characters in a piece of a line, a divisor of 81; its key, below 13608 * 7**PIECE, fits into 64 bits up to 17


class LineIndex:
    """Numbers lines, and pieces of lines, in the order in which they come; the same text in another row is another line.

    Lines are told apart by their row and characters times random 64-bit numbers, summed: that two of ten thousand lines
    have the same sum has a chance of less than one in a billion.
    """

    MULTIPLIERS = np.random.default_rng(0).integers(2**64, size=1 + COLUMNS, dtype=np.uint64)

    def __init__(self):
        self.lines, self.line_pieces = {}, GrowingTable(COLUMNS // PIECE, dtype=torch.int64)  # key -> number -> its 9 pieces
        self.pieces, self.piece_pairs = {}, GrowingTable(PIECE, dtype=torch.int64)  # key -> number -> its 9 pairs
        self.last = None  # the last batch of pages and its line numbers: from step to step few lines change
        self.pages_end_alike = True  # with a newline, as those of the game do

    def encode(self, tokens):
        """(B, 1944) uint8 array or CPU tensor -> (B, 24) int64 array, the numbers of its lines. ValueError for anything but pages."""
        check_pages(tokens)
        tokens = np.asarray(tokens)
        if self.last is not None and len(self.last[0]) == len(tokens):
            changed, numbers = np.zeros(len(tokens) * ROWS, bool), self.last[1].copy()
            changed[np.flatnonzero(tokens != self.last[0]) // COLUMNS] = True
            changed = changed.nonzero()[0]
        else:
            changed, numbers = np.arange(len(tokens) * ROWS), np.empty((len(tokens), ROWS), np.int64)
        rows, lines = changed % ROWS, tokens.reshape(-1, COLUMNS)[changed]  # (n,), (n, 81)
        keys = (np.column_stack([rows, lines]).astype(np.uint64) @ self.MULTIPLIERS).tolist()
        numbers.reshape(-1)[changed], new = number_keys(self.lines, keys)
        if len(new):
            try:
                self.add(rows[new], lines[new])
            except ValueError:  # not a page: forget its lines again
                for i in new:
                    del self.lines[keys[i]]
                raise
        self.last = tokens.copy(), numbers
        return numbers

    def add(self, rows, lines):
        """New lines: rows (n,), tokens (n, 81)."""
        characters = CHARACTER_OF.numpy()[lines].astype(np.int64).reshape(-1, PIECE)
        if (characters == UNKNOWN).any():
            code = lines.reshape(-1, PIECE)[characters == UNKNOWN][0]
            raise ValueError(f"token {code} ({chr(code)!r}) is not in the character set {CHARACTERS!r}")
        self.pages_end_alike &= bool((lines[rows == ROWS - 1, -1] == ord("\n")).all())
        positions = rows[:, None] * COLUMNS + np.arange(COLUMNS)  # (n, 81)
        pairs = characters * TOKENS + positions.reshape(-1, PIECE)
        # 9 digits in base 7 and the first pair: unequal for unequal pieces
        keys = pairs[:, 0] * len(CHARACTERS) ** PIECE + characters @ len(CHARACTERS) ** np.arange(PIECE)
        pieces, new = number_keys(self.pieces, keys.tolist())
        self.piece_pairs.append(torch.from_numpy(pairs[new]))
        self.line_pieces.append(torch.from_numpy(pieces).view(-1, COLUMNS // PIECE))


def number_keys(table, keys):
    """Numbers (n,) of the keys in `table`, new keys taking the next ones; and where each new key stands first."""
    known = len(table)
    numbers = np.array([table.setdefault(key, len(table)) for key in keys], np.int64)
    highest = np.maximum.accumulate(np.append(known - 1, numbers))  # a new key stands first where the numbers rise above it
    return numbers, (numbers > highest[:-1]).nonzero()[0]


class GrowingTable:
    """A tensor that grows by rows."""

    def __init__(self, *shape, **kwargs):
        self.table, self.n = torch.empty(1024, *shape, **kwargs), 0

    def append(self, rows):
        while self.n + len(rows) > self.table.shape[0]:
            self.table = torch.cat([self.table, torch.empty_like(self.table)])
        self.table[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def __call__(self):
        return self.table[: self.n]
