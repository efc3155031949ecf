"""One layer on a GPU: pages share their lines, and no step makes the host wait for the GPU.

Before an epoch, the distinct lines of all its minibatches are found at once. Only there does the host wait, a few
times. Each line has a maximum m of its own (see shared_attention.py), so scores may spread as far as they like.

For example, the ball of a new game moves from row 21 to row 20 in its first step. The pages before and after differ in
these two rows, so they have 26 distinct lines. Room is made for 32, the next power of two. Attention to these gives the
same features as attention to all 48 lines:

>>> from breakout_ascii import CHARACTERS, COLUMNS, ROWS, BreakoutAscii
>>> from model import GPTConfig
>>> game = BreakoutAscii()
>>> first, _ = game.reset(seed=0)
>>> second, *_ = game.step(0)
>>> gpt = DeviceGPT(GPTConfig(ROWS, COLUMNS, CHARACTERS, n_action=3))
>>> pages = gpt.encode(np.stack([first, second]))
>>> batches = distinct_lines(pages.unsqueeze(0), gpt.config)  # one batch of two pages
>>> lines = Lines(batches.characters[0], batches.rows[0], batches.pages[0])
>>> lines.characters.shape
torch.Size([32, 81])
>>> (lines.pages[0] != lines.pages[1]).nonzero().flatten()  # the rows in which the pages have different lines
tensor([20, 21])
>>> torch.allclose(gpt.features(lines), gpt.features(pages), atol=1e-3)
True
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from fast.attention_tables import features_from_attention, pair_table
from model import GPT
from rollout_buffer import copy_into


class Lines(NamedTuple):
    """A batch of B pages as L lines; or K such batches, whose tensors have a further axis K in front."""

    characters: torch.Tensor  # (L, 81) uint8
    rows: torch.Tensor  # (L,) the row of each line on the page
    pages: torch.Tensor  # (B, 24) for each page, which of the L lines its lines are


def every_line(characters, config):
    """Cut the pages of one batch, (B, 1944) characters, into `Lines` without sharing any."""
    i = torch.arange(len(characters) * config.rows, device=characters.device)
    return Lines(characters.view(-1, config.columns), i % config.rows, i.view(-1, config.rows))


def distinct_lines(characters, config, min_capacity=0):
    """Find the distinct lines of each of K batches; the same text in another row is another line.

    All batches get room for the same number of lines: that of the batch with the most lines, rounded up to a power of
    two, or `min_capacity` if that is more. Room that a batch does not need is filled with zeros.

    Args: characters (K, B, 1944).
    Returns: the `Lines` of K batches.
    """
    K, B, _ = characters.shape
    lines = characters.view(-1, config.columns)  # (K * B * 24, 81)
    i = torch.arange(len(lines), device=lines.device)
    batches = i // (B * config.rows)
    rows = i % config.rows
    hashes, hash_ids = line_hashes(rows, lines).unique(return_inverse=True)
    # A line is kept once for every batch that has it. `unique` sorts, so those of the first batch come first.
    kept, kept_ids = (batches * len(hashes) + hash_ids).unique(return_inverse=True)
    kept_batches = kept // len(hashes)
    counts = torch.bincount(kept_batches, minlength=K)
    starts = counts.cumsum(0) - counts  # where the lines of each batch start among the kept lines
    capacity = max(min_capacity, 1 << (int(counts.max()) - 1).bit_length())
    sources = torch.empty_like(kept).scatter_(0, kept_ids, i)  # for each kept line, one of the lines that are equal
    # The batch of each kept line, and its place in the batch:
    targets = kept_batches, torch.arange(len(kept), device=lines.device) - starts[kept_batches]
    kept_characters = lines.new_zeros(K, capacity, config.columns)
    kept_characters[targets] = lines[sources]
    kept_rows = rows.new_zeros(K, capacity)
    kept_rows[targets] = rows[sources]
    return Lines(kept_characters, kept_rows, (kept_ids - starts[batches]).view(K, B, config.rows))


@functools.cache
def multipliers(n):
    """Return n random integers of 64 bits."""
    return np.random.default_rng(0).integers(2**64, size=n, dtype=np.uint64).view(np.int64).tolist()


def line_hashes(rows, lines):
    """Compute a random linear hash of each line, modulo 2^64, from its row (n,) and its characters (n, 81).

    Lines with equal hashes are taken for the same. The chance that ten thousand different lines do not have ten
    thousand hashes is less than one in a billion.
    """
    of_row, *of_columns = multipliers(1 + lines.size(1))
    hashes = rows * of_row
    for column, multiplier in zip(lines.unbind(1), of_columns):  # CUDA cannot multiply matrices of integers
        hashes = hashes + column.long() * multiplier
    return hashes


def line_attention(table, rstd, lines, config):
    """Compute attention of the last position on pages given as `Lines`.

    Args: table (112, 1 + D, H) and rstd (7 * 1944,), as from `pair_table`.
    Returns: (B, D, H).
    """
    m, sums = line_sums(table, rstd, lines, config)
    ids = lines.pages.flatten()
    m = m.index_select(0, ids).unflatten(0, (-1, config.rows))  # (B, 24, H)
    factors = torch.exp2(m - m.amax(1, keepdim=True))
    sums = sums.index_select(0, ids).unflatten(0, (-1, config.rows))  # (B, 24, 1 + D, H)
    sums = (sums * factors.unsqueeze(2)).sum(1)
    return sums[:, 1:] / sums[:, :1]


def line_sums(table, rstd, lines, config):
    """Return each line's largest score m (L, H), and its denominator and numerator for this m, (L, 1 + D, H)."""
    num_characters = len(config.characters)
    device = rstd.device
    of_character, of_rows, of_column = table.split([num_characters, config.rows, config.columns])
    # Products with one-hot vectors replace lookups, because their gradients are products too, not atomic additions.
    chosen = (lines.characters.unsqueeze(2) == torch.arange(num_characters, device=device)).to(rstd.dtype)  # (L, 81, 7)
    row = (lines.rows.unsqueeze(1) == torch.arange(config.rows, device=device)).to(rstd.dtype)  # (L, 24)
    of_row = (row @ of_rows.flatten(1)).view(-1, *table.shape[1:])  # (L, 1 + D, H)
    of_positions = row @ rstd.view(num_characters, config.rows, config.columns).permute(1, 2, 0).flatten(
        1
    )  # (L, 81 * 7)
    scale = (chosen * of_positions.view_as(chosen)).sum(2, keepdim=True)  # (L, 81, 1), rstd of each pair
    scores = (chosen @ of_character[:, 0] + of_row[:, :1] + of_column[:, 0]) * scale  # (L, 81, H), in bits
    m = scores.detach().amax(1)  # (L, H)
    weights = torch.exp2(scores - m.unsqueeze(1))
    # The value of a pair is a sum of three rows of the table, so the three kinds of rows are weighted separately.
    scaled = weights * scale
    by_character = torch.einsum("lth,ltc->lch", scaled, chosen)
    values = torch.einsum("lch,cdh->ldh", by_character, of_character[:, 1:])
    values = values + torch.einsum("lth,tdh->ldh", scaled, of_column[:, 1:])
    values = values + scaled.sum(1).unsqueeze(1) * of_row[:, 1:]
    return m, torch.cat([weights.sum(1).unsqueeze(1), values], dim=1)


class DeviceGPT(GPT):
    """A `GPT` of one layer with the same parameters, the same state_dict and, except for rounding, the same outputs.

    Its pages must be pages of a game, which end with a newline. They are not checked, because the host would have to
    wait for the result.
    """

    def __init__(self, config):
        super().__init__(config)
        self.newline = config.characters.index("\n")
        self.table = None  # the `pair_table` of the latest `inference_function`, for `act`
        # Room for the lines of a minibatch, of which 512 pages had 1,043 to 1,402. It only grows, because every change
        # costs a compilation and a graph.
        self.capacity = 2048

    def encode(self, tokens):
        """Look up the characters of pages without any check.

        Args: tokens (B, 1944) uint8, a tensor or an array.
        Returns: (B, 1944) uint8.
        """
        return self.character_of[torch.as_tensor(tokens, device=self.device).int()]

    def features(self, pages):
        """Do the work of `GPT.features` on characters (B, 1944), or on the `Lines` of B pages. Returns (B, C)."""
        lines = pages if isinstance(pages, Lines) else every_line(pages, self.config)
        return self.read(pair_table(self, self.newline), lines)

    def prepare_minibatches(self, minibatches):
        """Find the distinct `Lines` of each of K minibatches, (K, M, 1944) characters."""
        lines = distinct_lines(minibatches, self.config, self.capacity)
        self.capacity = lines.rows.size(1)
        return lines

    @torch.no_grad()
    def inference_function(self):
        """Do the work of `GPT.inference_function`, with `pair_table` computed once, which older functions use too."""
        self.table = copy_into(
            self.table, pair_table(self, self.newline)
        )  # a CUDA graph reads the table at its address
        return self.act

    @torch.no_grad()
    def act(self, characters):
        """Return logits (B, A) and values (B,) of characters (B, 1944), from the latest `inference_function`."""
        return self.heads(self.read(self.table, every_line(characters, self.config)))

    def read(self, table, lines):
        """Return features (B, C) of the pages of `Lines`. table: from `pair_table`."""
        return features_from_attention(self, line_attention(*table, lines, self.config), self.newline)
