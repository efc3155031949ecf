"""One layer on a GPU: pages share their lines, and in no step does the host wait for the GPU.

Which lines a minibatch holds is found before an epoch, for all its minibatches at once: there the host waits a few times. Every
line has a maximum of its own, so scores of any size do no harm (see shared_attention.py).
"""

from typing import NamedTuple

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS
from fast.attention_tables import after_attention, pair_table
from fast.line_index import LineIndex
from model import GPT


class Lines(NamedTuple):
    """A batch of B pages as L lines; or K batches, each with lines of its own, with a leading axis K."""

    characters: torch.Tensor  # (L, 81) uint8
    rows: torch.Tensor  # (L,) where on a page each line stands
    pages: torch.Tensor  # (B, 24) positions among the L lines


def every_line(characters):
    """(B, 1944) characters -> all their `Lines`, none shared."""
    ids = torch.arange(len(characters) * ROWS, device=characters.device)
    return Lines(characters.view(-1, COLUMNS), ids % ROWS, ids.view(-1, ROWS))


def distinct_lines(characters, capacity=0):
    """(K, B, 1944) characters of K batches -> the distinct `Lines` of each, told apart by a hash as in `LineIndex`.

    All batches get the same capacity: that of the one with most lines, rounded up to a power of two, and at least `capacity`.
    What a batch does not need is filled with zeros, and computed in vain.
    """
    K, B, _ = characters.shape
    lines = characters.view(-1, COLUMNS)  # (K * B * 24, 81)
    i = torch.arange(len(lines), device=lines.device)
    batch, row = i // (B * ROWS), i % ROWS
    of_row, *of_column = LineIndex.MULTIPLIERS.view(np.int64).tolist()
    line_hash = row * of_row
    for column, multiplier in zip(lines.unbind(1), of_column):  # CUDA multiplies no matrices of integers
        line_hash = line_hash + column.long() * multiplier
    hashes, hash_id = line_hash.unique(return_inverse=True)
    # Distinct (batch, hash) pairs are the lines to keep; they come out sorted by batch.
    kept, kept_id = (batch * len(hashes) + hash_id).unique(return_inverse=True)
    kept_batch = kept // len(hashes)
    counts = torch.bincount(kept_batch, minlength=K)
    start = counts.cumsum(0) - counts  # of each batch's lines among the kept
    capacity = max(capacity, 1 << (int(counts.max()) - 1).bit_length())
    an_occurrence = torch.empty_like(kept).scatter_(0, kept_id, i)
    slot = kept_batch, torch.arange(len(kept), device=lines.device) - start[kept_batch]
    shared = Lines(
        lines.new_zeros(K, capacity, COLUMNS), row.new_zeros(K, capacity), (kept_id - start[batch]).view(K, B, ROWS)
    )
    shared.characters[slot] = lines[an_occurrence]
    shared.rows[slot] = row[an_occurrence]
    return shared


def line_attention(table, rstd, lines):
    """`pair_table`'s factors, `Lines` -> attention outputs of the last position (B, D, H)."""
    n_character, device = len(CHARACTERS), rstd.device
    of_character, of_rows, of_column = table.split([n_character, ROWS, COLUMNS])
    # One-hot products instead of lookups in the table: their gradients are products too, not atomic additions.
    chosen = (lines.characters.unsqueeze(2) == torch.arange(n_character, device=device)).to(rstd.dtype)  # (L, 81, 7)
    row = (lines.rows.unsqueeze(1) == torch.arange(ROWS, device=device)).to(rstd.dtype)  # (L, 24)
    of_row = (row @ of_rows.flatten(1)).view(-1, *table.shape[1:])  # (L, 1 + D, H)
    of_positions = row @ rstd.view(n_character, ROWS, COLUMNS).permute(1, 2, 0).flatten(1)  # (L, 81 * 7)
    scale = (chosen * of_positions.view_as(chosen)).sum(2, keepdim=True)  # (L, 81, 1)
    scores = (chosen @ of_character[:, 0] + of_row[:, :1] + of_column[:, 0]) * scale  # (L, 81, H), in bits
    m = scores.detach().amax(1)  # (L, H)
    weights = torch.exp2(scores - m.unsqueeze(1))
    scaled = weights * scale
    by_character = torch.einsum("lth,ltc->lch", scaled, chosen)  # the sum of values is linear in the table's rows
    values = torch.einsum("lch,cdh->ldh", by_character, of_character[:, 1:]) + torch.einsum(
        "lth,tdh->ldh", scaled, of_column[:, 1:]
    )
    values = values + scaled.sum(1).unsqueeze(1) * of_row[:, 1:]
    sums = torch.cat(
        [weights.sum(1).unsqueeze(1), values], dim=1
    )  # denominator and numerator of each line, (L, 1 + D, H)
    numbers = lines.pages.flatten()
    m = m.index_select(0, numbers).unflatten(0, (-1, ROWS))  # (B, 24, H)
    factors = torch.exp2(m - m.amax(1, keepdim=True))
    sums = (sums.index_select(0, numbers).unflatten(0, (-1, ROWS)) * factors.unsqueeze(2)).sum(1)
    return sums[:, 1:] / sums[:, :1]


class DeviceGPT(GPT):
    """A `GPT` of one layer: the same parameters, the same state_dict, and but for rounding the same numbers. It takes for granted
    what it is shown: pages of the game, which end with a newline."""

    def __init__(self, config):
        super().__init__(config)
        self.table = None  # `pair_table` for as long as the weights stand still
        # Lines in a minibatch of 512 pages: 1,043 to 1,402 were seen. It only grows, for each change costs a compilation and a graph
        self.capacity = 2048

    def encode(self, tokens):
        """(B, 1944) uint8 tokens, a tensor or an array -> their characters, 0..6. Does not check them: the host would wait."""
        return self.character_of[torch.as_tensor(tokens, device=self.device).int()]

    def features(self, pages):
        """(B, 1944) characters, or the `Lines` of pages -> (B, C)."""
        lines = pages if isinstance(pages, Lines) else every_line(pages)
        return after_attention(self, line_attention(*pair_table(self), lines))

    def prepare_minibatches(self, minibatches):
        """Characters (K, M, 1944) of K minibatches -> their `Lines`."""
        lines = distinct_lines(minibatches, self.capacity)
        self.capacity = lines.rows.size(1)
        return lines

    @torch.no_grad()
    def inference_cache(self):
        """As in `GPT`, with the table of pairs computed once; it overwrites the table of an older cache."""
        table = pair_table(self)
        if self.table is None:
            self.table = table
        for kept, x in zip(self.table, table):
            kept.copy_(x)  # where a CUDA graph will look for it
        return self.act

    @torch.no_grad()
    def act(self, characters):
        return self.heads(after_attention(self, line_attention(*self.table, every_line(characters))))
