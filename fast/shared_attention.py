"""One layer on the CPU: pages share their lines, and lines share their pieces.

The softmax over a page can be computed from parts of the page (Milakov & Gimelshein 2018; Dao et al. 2022,
FlashAttention). Here scores are for powers of 2. A part keeps for each head the maximum m of its scores s, and two
sums over its characters: the denominator, which is the sum of 2^(s - m), and the numerator, which is the sum of
2^(s - m) v with values v. Parts with the same m are combined by adding their sums; others are first rescaled to the
largest m. For example, one part has two characters with scores 3 and 3 and values 5 and 7. Another has one character
with score 1 and value 9:

>>> m = torch.tensor([[3.0], [1.0]])  # (parts, heads)
>>> sums = torch.tensor([[[2.0], [5.0 + 7.0]], [[1.0], [9.0]]])  # (parts, denominator and numerator, heads)
>>> m, sums, factors = rescaled_sums(m, sums, torch.tensor([[0, 1]]))  # one larger part, made of both
>>> m.item(), factors.flatten()  # the second part is rescaled by 2^(1 - 3)
(3.0, tensor([1.0000, 0.2500]))
>>> sums.flatten()  # 2 + 0.25 * 1 and 12 + 0.25 * 9
tensor([ 2.2500, 14.2500])

Attention to all three characters is 14.25 / 2.25. A page is 24 lines of 9 pieces of 9 characters. Most pieces and lines
are on many pages of a minibatch, and each is summed once: 512 pages have about 1,000 distinct pieces and 1,250 distinct
lines.

Maxima are rounded up to whole numbers. Rescaling then multiplies by powers of two, which is exact.

It is fastest to give all parts of a minibatch the same m in each head, because nothing is rescaled then. That is
accurate while the largest scores of the pages are within HEADROOM - LEAST = 176 of each other. Only in heads whose
scores spread further does each part have an m of its own. If it had one in all heads, a gradient step would take 1.7
times as long, and without pieces attention would take 2.7 times as long (docs/performance.md).
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch

from fast.attention_tables import embeddings_of_pairs, features_from_attention, num_embeddings, pair_table
from fast.bags import Bags, bag_sums, make_bags
from fast.line_index import GrowingTable

# An m that all parts have in common is the largest score minus HEADROOM, so each term of a denominator is at most
# 2^HEADROOM. float32 ends at 2^128. The sum of 1944 terms may be 2^11 times as large, so values may reach 2^31.
HEADROOM = 86
# A denominator of at most 2^LEAST needs another m, because terms below 2^-126 may have been flushed to zero. In a
# larger denominator even 1944 such terms would be a fraction of 2^-25, which is less than its rounding.
LEAST = -90


class SharedPages(NamedTuple):
    """The pages of a minibatch, taken apart into distinct lines, pieces and pairs of a character and its position."""

    pairs: torch.Tensor  # (P,) the ids of the distinct pairs
    embeddings: Bags  # the pairs as bags of three embeddings each
    parts: list  # three `Bags`: pieces as bags of pairs, lines as bags of pieces, pages as bags of lines


def share_pages(index, lines):
    """Return the `SharedPages` of pages that a `LineIndex` has encoded as line ids, an int64 array (B, 24)."""
    lines, lines_of_pages = distinct(lines, len(index.lines))
    pieces, pieces_of_lines = distinct(index.line_pieces.rows.numpy()[lines], len(index.pieces))
    config = index.config
    num_pairs = len(config.characters) * config.tokens
    pairs, pairs_of_pieces = distinct(index.piece_pairs.rows.numpy()[pieces], num_pairs)
    parts = [
        make_bags(pairs_of_pieces, len(pairs)),
        make_bags(pieces_of_lines, len(pieces)),
        make_bags(lines_of_pages, len(lines)),
    ]
    embeddings = make_bags(embeddings_of_pairs(pairs, config), num_embeddings(config))
    return SharedPages(torch.from_numpy(pairs), embeddings, parts)


def distinct(ids, n):
    """Do the work of np.unique(ids, return_inverse=True) without sorting, for ids below n."""
    used = np.zeros(n, bool)
    used[ids] = True
    return used.nonzero()[0], (np.cumsum(used) - 1)[ids]


@contextlib.contextmanager
def denormals_flushed(flush=True):
    """Let the CPU treat denormal numbers (below 2^-126) as zero. They are slow, and sharp attention has many."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def pair_sums(table, rstd, embeddings, rescale):
    """Compute m and the sums of P pairs, each of which is a part of one character.

    Args:
        table, rstd: from `pair_table`, but rstd only for these pairs, (P,).
        embeddings: (P, 3), the three rows of the table of each pair.
        rescale: whether each part has an m of its own.

    Returns:
        rows     (P, 1 + D, H)  sums of three rows of the table, that is score and value without the factor rstd
        weights  (P, H)         2^(s - m)
        sums     (P, 1 + D, H)  the denominator, which is the weight, and then the numerator, D numbers
        m        (P, H)         the score, rounded up; or the m (H,) that all parts have in common
    """
    rows = bag_sums(table, embeddings)
    rstd = rstd.unsqueeze(1)
    scores = rows[:, 0] * rstd
    rounded = scores.ceil()
    if rescale:
        m = rounded
    else:
        m = rounded.max(0).values - HEADROOM  # three times as fast as amax(0)
    # This is exp2(scores - m) in two factors, of which the second is exact. So rounding does not depend on m.
    weights = torch.exp2(scores - rounded) * torch.exp2(rounded - m)
    sums = rows * (weights * rstd).unsqueeze(1)
    sums[:, 0] = weights
    return rows, weights, sums, m


def rescaled_sums(m, sums, members):
    """Combine K parts, each with an m of its own, into n larger parts of J parts each.

    Args:
        m: (K, H), of the parts.
        sums: (K, 1 + D, H), of the parts.
        members: (n, J), the parts in each larger part.

    Returns:
        m        (n, H)         of the larger parts
        sums     (n, 1 + D, H)  of the larger parts
        factors  (n, J, H)      by which the parts in each were rescaled
    """
    n, J = members.shape
    flat = members.flatten()
    m_of_members = m.index_select(0, flat).view(n, J, -1)
    m = m_of_members.amax(1)
    factors = torch.exp2(m_of_members - m.unsqueeze(1))
    rescaled = sums.flatten(1).index_select(0, flat).view(n, J, *sums.shape[1:]).mul_(factors.unsqueeze(2))
    each = torch.arange(n * J, device=sums.device).view(n, J)  # every row of `rescaled` is in one bag
    return m, bag_sums(rescaled.flatten(0, 1), each), factors


class SharedAttention(torch.autograd.Function):
    """Attention of the last position, computed on `SharedPages`, and its gradient.

    y does not depend on m, so the gradient takes m for a constant. The sums of a part are linear in the sums of the
    smaller parts in it, so the gradient of a part is the sum of the gradients of the larger parts that have it.

    Args:
        table, rstd: from `pair_table`.
        shared: the `SharedPages`.
        rescale: whether each part has an m of its own.

    Returns:
        y (B, D, H), and the denominators (B, H), which have no gradient.
    """

    @staticmethod
    @denormals_flushed()
    def forward(ctx, table, rstd, shared, rescale):
        scale = rstd.index_select(0, shared.pairs)
        rows, weights, sums_of_pairs, m = pair_sums(table, scale, shared.embeddings.members, rescale)
        ctx.shared = shared
        ctx.num_pairs = len(rstd)
        ctx.factors = []  # of each level of parts, None where nothing was rescaled
        sums = sums_of_pairs
        factors = None
        for bags in shared.parts:
            if rescale:
                m, sums, factors = rescaled_sums(m, sums, bags.members)
            else:
                sums = bag_sums(sums, bags.members)
            ctx.factors.append(factors)
        denominator = sums[:, 0].clamp_min(2.0**LEAST)
        y = sums[:, 1:] / denominator.unsqueeze(1)
        ctx.has_denormals = rescale or bool((denominator <= 2.0**LEAST).any())
        ctx.save_for_backward(scale.unsqueeze(1), rows[:, 0], weights, sums_of_pairs, denominator, y)
        ctx.mark_non_differentiable(denominator)
        return y, denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        # Flushing always would be as right, but would change some bits of what a seed learns.
        with denormals_flushed(ctx.has_denormals):
            return SharedAttention.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx, dy):
        scale, row_scores, weights, sums_of_pairs, denominator, y = ctx.saved_tensors
        dsums = torch.cat([-(dy * y).sum(1, keepdim=True), dy], dim=1) / denominator.unsqueeze(1)
        for bags, factors in zip(reversed(ctx.shared.parts), reversed(ctx.factors)):
            if factors is None:
                dsums = bag_sums(dsums, bags.bag_of, bags.offsets)
            else:
                dsums = (dsums.unsqueeze(1) * factors.unsqueeze(2)).flatten(0, 1)  # (n * J, 1 + D, H)
                dsums = bag_sums(dsums, bags.order, bags.offsets)
        # The sums of a pair are w = 2^(row_scores * scale - m) and row_values * scale * w. Both depend on the score
        # through w, and the numerator depends on scale once more.
        through_values = sum((dsums[:, 1:] * sums_of_pairs[:, 1:]).unbind(1))  # (P, H), three times as fast as sum(1)
        dscores = math.log(2) * (through_values + dsums[:, 0] * weights)
        dscale = (dscores * row_scores + through_values / scale).sum(1)
        drows = dsums.mul_((weights * scale).unsqueeze(1))
        drows[:, 0] = dscores * scale
        embeddings = ctx.shared.embeddings
        dtable = bag_sums(drows, embeddings.bag_of, embeddings.offsets)
        drstd = dscale.new_zeros(ctx.num_pairs).index_copy_(0, ctx.shared.pairs, dscale)
        return dtable, drstd, None, None


def shared_attention(table, rstd, shared):
    """Compute attention with one m per head, and again with rescaling in heads that need it. Returns y (B, D, H)."""
    y, denominator = SharedAttention.apply(table, rstd, shared, False)
    spread = (denominator <= 2.0**LEAST).any(0).nonzero().flatten()
    if len(spread):
        rescaled, _ = SharedAttention.apply(table[:, :, spread], rstd, shared, True)
        y = y.index_copy(2, spread, rescaled)
    return y


class LineCache:
    """Reads pages with fixed weights, and computes the sums of every distinct line of a `LineIndex` only once.

    All lines have the same m in each head. It comes from the largest score of all pairs in `pairs`, and if that
    grows, what has been computed is rescaled. Pages whose scores are too far below it are read as in training, by
    `shared_attention`.
    """

    @torch.no_grad()
    def __init__(self, gpt, index):
        self.gpt = gpt
        self.index = index
        self.last_character = index.last_character
        self.table, self.rstd = pair_table(gpt, self.last_character)
        self.m = self.table.new_full(self.table.shape[2:], -torch.inf)  # (H,)
        # For each character in each row of a page, where the sums of its pairs begin in `pairs`; -1 until it is read.
        # The id of a pair is that of its character and row, times columns, plus its column.
        self.starts = np.full(len(index.config.characters) * index.config.rows, -1)
        # The sums of the pairs, pieces and lines that have been read so far:
        self.pairs, self.pieces, self.lines = (
            GrowingTable(*self.table.shape[1:], dtype=self.table.dtype) for _ in range(3)
        )

    @torch.no_grad()
    @denormals_flushed()
    def __call__(self, lines):
        """Return action logits (B, A) and values (B,) of pages, given as line ids (B, 24) on the CPU."""
        if len(self.lines) < len(self.index.lines):
            self.add_lines()
        sums = bag_sums(self.lines.rows, lines)
        y = sums[:, 1:] / sums[:, :1]
        low = (sums[:, 0] <= 2.0**LEAST).any(1).nonzero().flatten()
        if len(low):
            y[low] = shared_attention(self.table, self.rstd, share_pages(self.index, lines[low].numpy()))
        return self.gpt.heads(features_from_attention(self.gpt, y, self.last_character))

    def add_lines(self):
        """Compute the sums of the lines that are new in the index, and of their pieces and pairs."""
        new_pieces = self.index.piece_pairs.rows[len(self.pieces) :].numpy()
        characters_in_rows, columns = np.divmod(new_pieces, self.index.config.columns)
        new = characters_in_rows[self.starts[characters_in_rows] < 0]
        if len(new):
            self.add_pairs(np.unique(new))
        pairs = torch.from_numpy(self.starts[characters_in_rows] + columns)
        self.pieces.append(bag_sums(self.pairs.rows, pairs))
        new_lines = self.index.line_pieces.rows[len(self.lines) :]
        self.lines.append(bag_sums(self.pieces.rows, new_lines))

    def add_pairs(self, characters_in_rows):
        """Compute the sums of characters in rows, at all columns, which takes little longer than at those that occur.

        If they have larger scores than all others, the sums of these are rescaled.
        """
        config = self.index.config
        self.starts[characters_in_rows] = len(self.pairs) + config.columns * np.arange(len(characters_in_rows))
        pairs = (characters_in_rows[:, None] * config.columns + np.arange(config.columns)).flatten()
        # In a tensor of another size torch computes the last few powers in another way, and rounds them differently.
        # With this size a pair has the same sums, whichever pairs are computed with it.
        padded = np.resize(pairs, math.ceil(len(pairs) / 32) * 32)
        embeddings = torch.from_numpy(embeddings_of_pairs(padded, config))
        _, _, sums, m = pair_sums(self.table, self.rstd[padded], embeddings, rescale=False)
        largest = torch.maximum(self.m, m)
        if (largest > self.m).any():
            for table in (self.pairs, self.pieces, self.lines):
                table.rows.mul_(torch.exp2(self.m - largest))
            self.m = largest
        self.pairs.append(sums[: len(pairs)] * torch.exp2(m - largest))
