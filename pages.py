"""What the pages of a batch have in common: each distinct part once, and numbers that say where it stands.

A page is 24 lines of 81 characters, 1944 tokens. One layer reads pages as a `Tree` of lines and of pieces of lines, or as
`Lines` alone where asking the host costs more; deeper models read how they begin, as a `PrefixTree`. Left out: attention
over these parts, which is model.py's.
"""

from typing import NamedTuple

import numpy as np
import torch

ROWS, COLUMNS = 24, 81
POSITIONS = ROWS * COLUMNS
CHARACTERS = " #|_=O\n"
NEWLINE = CHARACTERS.index("\n")
EMBEDDINGS = 0, len(CHARACTERS), len(CHARACTERS) + ROWS, len(CHARACTERS) + ROWS + COLUMNS  # characters, rows, columns
PIECE = 9  # characters in a piece of a line; 3 was as fast, and the keys of more than 20 would overflow 64 bits
LINES = 3  # in a section, the unit that deeper models share: 243 characters nearly fill two blocks of 128, as GPUs attend in
SECTION = LINES * COLUMNS

CODES = torch.full((256,), len(CHARACTERS), dtype=torch.int32)  # token -> character; len(CHARACTERS) marks a stranger
CODES[[ord(c) for c in CHARACTERS]] = torch.arange(len(CHARACTERS), dtype=torch.int32)
# (7 * 1944, 3): the embeddings, as EMBEDDINGS counts them, of each pair character * 1944 + position
PAIRS = np.stack([x.ravel() for x in np.indices((len(CHARACTERS), ROWS, COLUMNS))], 1) + np.array(EMBEDDINGS[:-1])


def check_pages(tokens):
    """Raises ValueError unless tokens, an array or a tensor, are (B, 1944) uint8 with B at least 1."""
    if tokens.ndim != 2 or tokens.shape[1] != POSITIONS or len(tokens) == 0 or tokens.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"pages must be (B, {POSITIONS}) uint8 tokens, B at least 1, not {tuple(tokens.shape)} {tokens.dtype}")


def encode_characters(tokens):
    """uint8 tensor of ASCII codes -> character numbers 0..6, int32, in the same shape. Other tokens: ValueError."""
    characters = CODES.to(tokens.device)[tokens.int()]
    if (strangers := characters == len(CHARACTERS)).any():
        code = int(tokens[strangers][0])
        raise ValueError(f"token {code} ({chr(code)!r}) is not in the character set {CHARACTERS!r}")
    return characters


class Level(NamedTuple):
    """One level of a `Tree`: n parts, each made of J parts of the level below."""

    children: torch.Tensor  # (n, J) numbers of parts below
    order: torch.Tensor  # (n * J,) positions in children.flatten(), sorted by child: the way of the gradient
    parents: torch.Tensor  # (n * J,) order // J
    offsets: torch.Tensor  # (parts below,) where each child's run in `order` begins


class Tree(NamedTuple):
    """A batch of pages as its distinct parts."""

    pairs: torch.Tensor  # (P,) distinct character * 1944 + position
    embeddings: Level  # pairs of character, row and column, as EMBEDDINGS has them
    levels: list  # pieces of pairs, lines of pieces, pages of lines


class PrefixTree(NamedTuple):
    """A batch of pages as the distinct ones of their beginnings: of 1 section, of 2, ... of all 8.

    A beginning is its last section, behind a shorter beginning that others may share. All are numbered, the shortest first. The
    children of a beginning of J sections are the J beginnings that end with one of these, itself included; `offsets` counts all
    beginnings up to this length, `parents` is of no use here.
    """

    sections: torch.Tensor  # (n, SECTION) characters
    starts: torch.Tensor  # (n, 1) where on the page each section begins
    levels: list  # for each length J a `Level`: children (n of this length, J)
    pages: torch.Tensor  # (B,) each page's place among the beginnings of full length


class Lines(NamedTuple):
    """A batch of pages as their lines. No size has to depend on how many of them are distinct, so a CUDA graph can hold it."""

    characters: torch.Tensor  # (L, 81) int8
    rows: torch.Tensor  # (L,) where on a page each line stands
    pages: torch.Tensor  # (B, 24) numbers of lines


def every_line(tokens):
    """(B, 1944) uint8 tokens, unchecked -> all their `Lines`, none shared."""
    characters = sum(i * (tokens == ord(c)).to(torch.int8) for i, c in enumerate(CHARACTERS))
    numbers = torch.arange(len(tokens) * ROWS, device=tokens.device)
    return Lines(characters.view(-1, COLUMNS), numbers % ROWS, numbers.view(-1, ROWS))


def distinct_lines(tokens):
    """(B, 1944) uint8 tokens, unchecked -> their distinct `Lines`, told apart as in `LineIndex`. Waits for how many."""
    characters, rows, pages = every_line(tokens)
    of_row, *of_column = LineIndex.MULTIPLIERS.view(np.int64).tolist()
    keys = rows * of_row
    for column, multiplier in zip(characters.unbind(1), of_column):
        keys = keys + column.long() * multiplier
    distinct, numbers = keys.unique(return_inverse=True)
    first = torch.empty_like(distinct).scatter_(0, numbers, pages.flatten())
    return Lines(characters[first], rows[first], numbers.view_as(pages))


class LineIndex:
    """Numbers the distinct lines of the pages it is shown, and the distinct pieces of those lines.

    Lines are told apart by their row and characters times random 64-bit numbers, summed: that two of ten thousand lines
    have the same sum has a chance of less than one in a billion.
    """

    MULTIPLIERS = np.random.default_rng(0).integers(2**64, size=1 + COLUMNS, dtype=np.uint64)

    def __init__(self):
        self.lines, self.line_pieces = {}, Rows(COLUMNS // PIECE, dtype=torch.int64)  # row and text -> number -> pieces
        self.pieces, self.piece_pairs = {}, Rows(PIECE, dtype=torch.int64)  # place and text -> number -> pairs
        self.last = None  # the batch of pages shown last, and its lines: from frame to frame few lines change

    def encode(self, tokens):
        """(B, 1944) uint8 tokens -> (B, 24) int64 numbers of their lines. ValueError for other shapes and characters."""
        tokens = np.asarray(tokens)
        check_pages(tokens)
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
            except ValueError:  # a character that is none: forget these lines again
                for i in new:
                    del self.lines[keys[i]]
                raise
        self.last = tokens.copy(), numbers
        return numbers

    def add(self, rows, lines):
        """New lines: rows (n,), tokens (n, 81)."""
        characters = encode_characters(torch.from_numpy(lines)).numpy().astype(np.int64).reshape(-1, PIECE)
        places = rows[:, None] * COLUMNS + np.arange(COLUMNS)  # (n, 81)
        pairs = characters * POSITIONS + places.reshape(-1, PIECE)
        # 9 digits in base 7 and the first pair: unequal for unequal pieces
        keys = pairs[:, 0] * len(CHARACTERS) ** PIECE + characters @ len(CHARACTERS) ** np.arange(PIECE)
        pieces, new = number_keys(self.pieces, keys.tolist())
        self.piece_pairs.append(torch.from_numpy(pairs[new]))
        self.line_pieces.append(torch.from_numpy(pieces).view(-1, COLUMNS // PIECE))

    def tree(self, numbers, device="cpu"):
        """(B, 24) numbers of lines -> the `Tree` of these pages."""
        tensors = lambda *arrays: (torch.from_numpy(x).to(device) for x in arrays)
        lines, pages = distinct(numbers, len(self.lines))
        pieces, lines_of = distinct(self.line_pieces().numpy()[lines], len(self.pieces))
        pairs, pieces_of = distinct(self.piece_pairs().numpy()[pieces], len(PAIRS))
        sizes = zip((PAIRS[pairs], pieces_of, lines_of, pages), (EMBEDDINGS[-1], len(pairs), len(pieces), len(lines)))
        embeddings, *levels = (Level(*tensors(*level(children, n))) for children, n in sizes)
        return Tree(*tensors(pairs), embeddings, levels)

    def prefix_tree(self, numbers, device="cpu"):
        """(B, 24) numbers of lines -> the `PrefixTree` of these pages."""
        order = np.lexsort(numbers.T[::-1])  # pages that begin alike lie next to each other
        sections = numbers[order].reshape(len(order), -1, LINES)  # (B, 8, LINES)
        new = np.ones(sections.shape[:2], bool)  # beginnings that the page before does not share
        new[1:] = np.logical_or.accumulate((sections[1:] != sections[:-1]).any(2), axis=1)
        ends = new.sum(0).cumsum()  # of the numbers for each length
        beginnings = new.cumsum(0) - 1 + np.append(0, ends[:-1])  # (B, 8)
        levels = [level(beginnings[new[:, i], : i + 1], end) for i, end in enumerate(ends)]
        pieces = self.line_pieces().numpy()[sections.swapaxes(0, 1)[new.T]]  # (n, LINES, 9)
        characters = self.piece_pairs().numpy()[pieces].reshape(-1, SECTION) // POSITIONS
        pages = np.empty_like(order)
        pages[order] = beginnings[:, -1] - beginnings[0, -1]
        tensors = lambda *arrays: (torch.from_numpy(x).to(device) for x in arrays)
        starts = new.T.nonzero()[0][:, None] * SECTION
        return PrefixTree(*tensors(characters, starts), [Level(*tensors(*x)) for x in levels], *tensors(pages))


def number_keys(table, keys):
    """Numbers (n,) of the keys in `table`, new keys taking the next ones; and where each new key stands first."""
    known = len(table)
    numbers = np.array([table.setdefault(key, len(table)) for key in keys], np.int64)
    highest = np.maximum.accumulate(np.append(known - 1, numbers))  # a new key stands first where the numbers rise above it
    return numbers, (numbers > highest[:-1]).nonzero()[0]


def distinct(children, n):
    """(..., J) numbers below n -> the distinct ones, and children renumbered into them."""
    used = np.zeros(n, bool)
    used[children] = True
    return used.nonzero()[0], (np.cumsum(used) - 1)[children]


def level(children, n):
    """(..., J) numbers below n -> the arrays of a `Level`."""
    flat = children.ravel().astype(np.uint8 if n < 2**8 else np.uint16 if n < 2**16 else np.int32)  # up to 16 bits: a radix sort
    counts, order = np.bincount(flat, minlength=n), np.argsort(flat, kind="stable")
    return children, order, order // children.shape[-1], np.cumsum(counts) - counts


class Rows:
    """A table that grows by rows."""

    def __init__(self, *shape, **kwargs):
        self.table, self.n = torch.empty(1024, *shape, **kwargs), 0

    def append(self, rows):
        while self.n + len(rows) > self.table.shape[0]:
            self.table = torch.cat([self.table, torch.empty_like(self.table)])
        self.table[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def __call__(self):
        return self.table[: self.n]
