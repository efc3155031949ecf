"""Ids for the distinct lines of pages, and for the distinct pieces of lines.

Most lines recur from step to step and across games. So a page is kept as the ids of its 24 lines, and whatever depends on one line
alone is computed once for all pages it stands on.
"""

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS
from model import CHARACTER_OF, UNKNOWN, check_pages

PIECE = 9  # characters in a piece of a line, a divisor of 81; its key, below 13608 * 7**PIECE, fits into 64 bits up to 17


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
        self.piece_pairs = GrowingTable(PIECE, dtype=torch.int64)  # id of a piece -> its 9 pairs, character * 1944 + position
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
        hashes = (np.column_stack([rows, lines]).astype(np.uint64) @ self.MULTIPLIERS).tolist()
        known = list(map(self.lines.get, hashes))  # most are
        if unknown := [i for i, id in enumerate(known) if id is None]:
            check_characters(lines[unknown])
            new = add_new(self.lines, hashes, known, unknown)
            self.add(rows[new], lines[new])
        ids.reshape(-1)[changed] = known
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
        pieces = list(map(self.pieces.get, keys))
        new = add_new(self.pieces, keys, pieces, [i for i, id in enumerate(pieces) if id is None])
        self.piece_pairs.append(torch.from_numpy(pairs[new]))
        self.line_pieces.append(torch.tensor(pieces).view(-1, COLUMNS // PIECE))


def check_characters(tokens):
    """Raises ValueError for a token that is no character of a page."""
    unknown = CHARACTER_OF.numpy()[tokens] == UNKNOWN
    if unknown.any():
        code = tokens[unknown][0]
        raise ValueError(f"token {code} ({chr(code)!r}) is not in the character set {CHARACTERS!r}")


def add_new(table, keys, ids, unknown):
    """Adds the keys at the indices `unknown` to `table`, with the next ids, and fills these in -> where each new key stands first."""
    first = []
    for i in unknown:
        if keys[i] not in table:
            table[keys[i]] = len(table)
            first.append(i)
        ids[i] = table[keys[i]]
    return first


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
