"""One layer on a GPU: pages share their lines, and between two steps nothing asks the host.

Which lines a minibatch holds is found before an epoch, for all its minibatches at once: there the host waits a few times. Every line has its own running maximum, so scores of any size are exact.
"""

from typing import NamedTuple

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS
from fast.line_index import LineIndex
from fast.one_layer import after_attention, pair_table
from model import GPT


class Lines(NamedTuple):
    """A batch of pages as their lines, or several such batches, each with its own lines (a first axis more)."""

    characters: torch.Tensor  # (L, 81) uint8
    rows: torch.Tensor  # (L,) where on a page each line stands
    pages: torch.Tensor  # (B, 24) numbers of lines


def every_line(characters):
    """(B, 1944) characters -> all their `Lines`, none shared."""
    numbers = torch.arange(len(characters) * ROWS, device=characters.device)
    return Lines(characters.view(-1, COLUMNS), numbers % ROWS, numbers.view(-1, ROWS))


def distinct_lines(characters, room=0):
    """(K, B, 1944) characters of K batches -> the distinct `Lines` of each, told apart as in `LineIndex`.

    All batches get as much room as the one with most lines needs, rounded up to a power of two, and at least `room`.
    """
    K, B, _ = characters.shape
    lines = characters.view(-1, COLUMNS)  # (K * B * 24, 81)
    batch = torch.arange(len(lines), device=lines.device) // (B * ROWS)
    row = torch.arange(len(lines), device=lines.device) % ROWS
    of_row, *of_column = LineIndex.MULTIPLIERS.view(np.int64).tolist()
    keys = row * of_row
    for column, multiplier in zip(lines.unbind(1), of_column):
        keys = keys + column.long() * multiplier
    distinct, key = keys.unique(return_inverse=True)
    # the same line of two batches counts twice: number (batch, key) pairs, ordered by batch
    of_batch, number = (batch * len(distinct) + key).unique(return_inverse=True)
    batch_of = of_batch // len(distinct)
    counts = torch.bincount(batch_of, minlength=K)
    start = counts.cumsum(0) - counts
    room = max(room, 1 << (int(counts.max()) - 1).bit_length())
    first = torch.empty_like(of_batch).scatter_(0, number, torch.arange(len(lines), device=lines.device))
    place = batch_of, torch.arange(len(of_batch), device=lines.device) - start[batch_of]
    shared = Lines(lines.new_zeros(K, room, COLUMNS), row.new_zeros(K, room), (number - start[batch]).view(K, B, ROWS))
    shared.characters[place], shared.rows[place] = lines[first], row[first]
    return shared


def line_attention(table, rstd, lines):
    """`pair_table`'s factors, `Lines` -> attention outputs of the last position (B, D, H)."""
    n_character, device = len(CHARACTERS), rstd.device
    of_character, of_rows, of_column = table.split([n_character, ROWS, COLUMNS])
    chosen = (lines.characters.unsqueeze(2) == torch.arange(n_character, device=device)).to(rstd.dtype)  # (L, 81, 7)
    row = (lines.rows.unsqueeze(1) == torch.arange(ROWS, device=device)).to(rstd.dtype)  # (L, 24)
    of_row = (row @ of_rows.flatten(1)).view(-1, *table.shape[1:])  # (L, 1 + D, H)
    of_positions = row @ rstd.view(n_character, ROWS, COLUMNS).permute(1, 2, 0).flatten(1)  # (L, 81 * 7)
    scale = (chosen * of_positions.view_as(chosen)).sum(2, keepdim=True)  # (L, 81, 1)
    scores = (chosen @ of_character[:, 0] + of_row[:, :1] + of_column[:, 0]) * scale  # (L, 81, H), in bits
    m = scores.detach().amax(1)  # (L, H), the running maximum
    weights = torch.exp2(scores - m.unsqueeze(1))
    scaled = weights * scale
    by_character = torch.einsum("lth,ltc->lch", scaled, chosen)  # the sum of values is linear in the table's rows
    values = torch.einsum("lch,cdh->ldh", by_character, of_character[:, 1:]) + torch.einsum("lth,tdh->ldh", scaled, of_column[:, 1:])
    values = values + scaled.sum(1).unsqueeze(1) * of_row[:, 1:]
    sums = torch.cat([weights.sum(1).unsqueeze(1), values], dim=1)  # denominator and numerator of each line, (L, 1 + D, H)
    numbers = lines.pages.flatten()
    m = m.index_select(0, numbers).unflatten(0, (-1, ROWS))  # (B, 24, H)
    factors = torch.exp2(m - m.amax(1, keepdim=True))
    sums = (sums.index_select(0, numbers).unflatten(0, (-1, ROWS)) * factors.unsqueeze(2)).sum(1)
    return sums[:, 1:] / sums[:, :1]


class DeviceGPT(GPT):
    """A `GPT` of one layer: the same parameters, the same state_dict, the same numbers, for pages that end with a newline, as
    those of the game do; others are not checked."""

    def __init__(self, config):
        super().__init__(config)
        self.table = None  # `pair_table` for as long as the weights stand still
        self.room = 2048  # lines in a minibatch: by default 1,000 to 1,400 are distinct. It only grows: each change costs a CUDA graph

    def encode(self, tokens):
        """(B, 1944) uint8 ASCII codes, a tensor or an array -> numbers of their characters, 0..6. Asks the host nothing."""
        return self.character_of[torch.as_tensor(tokens, device=self.device).int()]

    def features(self, pages):
        """(B, 1944) numbers of characters, or the `Lines` of pages -> (B, C)."""
        lines = pages if isinstance(pages, Lines) else every_line(pages)
        return after_attention(self, line_attention(*pair_table(self), lines))

    def share(self, minibatches):
        """Characters (K, M, 1944) of K minibatches -> their `Lines`."""
        lines = distinct_lines(minibatches, self.room)
        self.room = lines.rows.size(1)
        return lines

    @torch.no_grad()
    def inference_cache(self):
        """-> a function from encoded pages to logits and values, without gradients, for as long as the weights stand still."""
        table = pair_table(self)
        self.table = [kept.copy_(x) for kept, x in zip(self.table or table, table)]  # where a CUDA graph will look for it
        return self.read

    @torch.no_grad()
    def read(self, characters):
        return self.heads(after_attention(self, line_attention(*self.table, every_line(characters))))
