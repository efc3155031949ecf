"""One layer on the CPU: pages share their lines, and lines share their pieces.

The softmax over a page can be computed from parts of the page (Milakov & Gimelshein 2018; Dao et al. 2022,
FlashAttention). A part has for each head the maximum m of its scores s, and two sums over its characters: the
denominator, which is the sum of 2^(s - m), and the numerator, the sum of 2^(s - m) v with values v. Parts with the same
m are combined by adding their sums; others are first rescaled to the larger m. For example, let the two characters of
one part have the scores 3 and 3 and the values 5 and 7, and the only character of another the score 1 and the value 9:

>>> m = torch.tensor([[3.0], [1.0]])  # (parts, heads)
>>> sums = torch.tensor([[[2.0], [12.0]], [[1.0], [9.0]]])  # (parts, denominator and numerator, heads)
>>> m, sums, factors = rescaled_sums(m, sums, torch.tensor([[0, 1]]))  # one whole, made of both parts
>>> m.flatten(), sums.flatten(), factors.flatten()
(tensor([3.]), tensor([ 2.2500, 14.2500]), tensor([1.0000, 0.2500]))

Attention to all three characters is 14.25 / 2.25. A page is 24 lines of 9 pieces of 9 characters. Most pieces and lines
are on many pages of a minibatch, and each is summed once: 512 pages have about 1,000 distinct pieces and 1,250 distinct
lines.

Maxima are rounded up to whole numbers, and scores are in bits, so that rescaling multiplies by powers of two, which is
exact. It is fastest to take one m per head for the whole minibatch. That is accurate while the largest scores of its
pages are within HEADROOM - LEAST = 176 bits of each other; heads whose scores spread further take an m for each part.
Without this distinction a gradient step takes 1.7 times as long, and without pieces attention takes 2.7 times as long
(docs/performance.md).
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch

from fast.attention_tables import NUM_EMBEDDINGS, PAIRS, features_from_attention, pair_table
from fast.bags import Bags, bag_sums, make_bags
from fast.line_index import GrowingTable

# An m that all parts have in common is the largest score less HEADROOM bits, so each term of a denominator is at most
# 2^HEADROOM. float32 ends at 2^128. Adding 1944 terms takes 11 bits, which leaves 31 for the values.
HEADROOM = 86
# Denominators up to 2^LEAST are too small for that m, because terms below 2^-126 may count as zero. In a larger
# denominator even 1944 such terms would be a fraction of 2^-25, which is less than its rounding.
LEAST = -90


class SharedPages(NamedTuple):
    """The pages of a minibatch, taken apart into distinct lines, pieces and pairs of a character and a position."""

    pairs: torch.Tensor  # (P,) numbers of the distinct pairs, character * 1944 + position
    embeddings: Bags  # pairs as bags of three of the NUM_EMBEDDINGS
    parts: list  # three `Bags`: pieces as bags of pairs, lines as bags of pieces, pages as bags of lines


def share_pages(index, lines):
    """Return the `SharedPages` of pages that a `LineIndex` has encoded as line ids, an int64 array (B, 24)."""
    lines, pages = distinct(lines, len(index.lines))
    pieces, of_pieces = distinct(index.line_pieces().numpy()[lines], len(index.pieces))
    pairs, of_pairs = distinct(index.piece_pairs().numpy()[pieces], len(PAIRS))
    parts = [make_bags(of_pairs, len(pairs)), make_bags(of_pieces, len(pieces)), make_bags(pages, len(lines))]
    return SharedPages(torch.from_numpy(pairs), make_bags(PAIRS[pairs], NUM_EMBEDDINGS), parts)


def distinct(ids, n):
    """Return the distinct ones of some ids below n, in ascending order, and the position of each id among them."""
    used = np.zeros(n, bool)
    used[ids] = True
    return used.nonzero()[0], (np.cumsum(used) - 1)[ids]


@contextlib.contextmanager
def denormals_flushed(flush=True):
    """Let the CPU treat denormal numbers (below 2^-126) as zero: they are slow, and sharp attention has many."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def pair_sums(table, rstd, embeddings, rescale):
    """Compute m and the sums of P pairs, each a part of one character.

    Args: table and rstd (P,), as from `pair_table`; embeddings (P, 3); and whether each part has an m of its own.
    Returns:
        rows     (P, 1 + D, H)  sums of three rows of the table, that is score and value without the factor rstd
        weights  (P, H)         2^(s - m)
        sums     (P, 1 + D, H)  the denominator, which is the weight, and then the numerator, D numbers
        m        (P, H)         the score, rounded up; or the m (H,) that all have in common
    """
    rows = bag_sums(table, embeddings)
    rstd = rstd.unsqueeze(1)
    scores = rows[:, 0] * rstd
    whole = scores.ceil()
    if rescale:
        m = whole
    else:
        m = whole.max(0).values - HEADROOM  # three times as fast as amax(0)
    # In two factors, because rounding then does not depend on m.
    weights = torch.exp2(scores - whole) * torch.exp2(whole - m)
    sums = rows * (weights * rstd).unsqueeze(1)
    sums[:, 0] = weights
    return rows, weights, sums, m


def rescaled_sums(m, sums, members):
    """Combine K parts, each with an m of its own, to n wholes of J parts.

    Args: m (K, H) and sums (K, 1 + D, H) of the parts; members (n, J), the parts of each whole.
    Returns: m (n, H) and sums (n, 1 + D, H) of the wholes, and the factors by which their parts were rescaled, (n, J,
    H).
    """
    n, J = members.shape
    flat = members.flatten()
    of_parts = m.index_select(0, flat).view(n, J, -1)
    m = of_parts.amax(1)
    factors = torch.exp2(of_parts - m.unsqueeze(1))
    rows = sums.flatten(1).index_select(0, flat).view(n, J, *sums.shape[1:]).mul_(factors.unsqueeze(2))
    return m, bag_sums(rows.flatten(0, 1), torch.arange(n * J, device=sums.device).view(n, J)), factors


class SharedAttention(torch.autograd.Function):
    """Attention of the last position, computed on `SharedPages`.

    Args: table (112, 1 + D, H) and rstd (7 * 1944,), as from `pair_table`; rescale, whether each part has an m of its
    own.
    Returns: y (B, D, H), and the denominators (B, H), which have no gradient.

    y does not depend on m, so m is a constant to the gradient. Sums are linear in the sums of smaller parts, so the
    gradient of a part is the sum of the gradients of the larger parts that have it.
    """

    @staticmethod
    @denormals_flushed()
    def forward(ctx, table, rstd, shared, rescale):
        scale = rstd.index_select(0, shared.pairs)
        rows, weights, of_pairs, m = pair_sums(table, scale, shared.embeddings.members, rescale)
        ctx.shared = shared
        ctx.num_pairs = len(rstd)
        ctx.factors = []
        sums = of_pairs
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
        ctx.save_for_backward(scale.unsqueeze(1), rows[:, 0], weights, of_pairs, denominator, y)
        ctx.mark_non_differentiable(denominator)
        return y, denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        # Only then, because a training with a given seed would otherwise differ from earlier ones in some bits.
        with denormals_flushed(ctx.has_denormals):
            return SharedAttention.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx, dy):
        scale, row_scores, weights, of_pairs, denominator, y = ctx.saved_tensors
        dsums = torch.cat([-(dy * y).sum(1, keepdim=True), dy], dim=1) / denominator.unsqueeze(1)
        for bags, factors in zip(reversed(ctx.shared.parts), reversed(ctx.factors)):
            if factors is None:
                dsums = bag_sums(dsums, bags.bag_of, bags.offsets)
            else:
                dsums = (dsums.unsqueeze(1) * factors.unsqueeze(2)).flatten(0, 1)  # (n * J, 1 + D, H)
                dsums = bag_sums(dsums, bags.order, bags.offsets)
        # Of a pair, the sums are w = 2^(row_scores * scale - m) and row_values * scale * w.
        of_values = sum((dsums[:, 1:] * of_pairs[:, 1:]).unbind(1))  # (P, H), three times as fast as sum(1)
        dscores = math.log(2) * (of_values + dsums[:, 0] * weights)
        dscale = (dscores * row_scores + of_values / scale).sum(1)
        drows = dsums.mul_((weights * scale).unsqueeze(1))
        drows[:, 0] = dscores * scale
        embeddings = ctx.shared.embeddings
        dtable = bag_sums(drows, embeddings.bag_of, embeddings.offsets)
        drstd = dscale.new_zeros(ctx.num_pairs).index_copy_(0, ctx.shared.pairs, dscale)
        return dtable, drstd, None, None


def shared_attention(table, rstd, shared):
    """Compute attention with one m per head, and again with rescaling for heads that need it. Returns y (B, D, H)."""
    y, denominator = SharedAttention.apply(table, rstd, shared, False)
    spread = (denominator <= 2.0**LEAST).any(0).nonzero().flatten()
    if len(spread):
        rescaled, _ = SharedAttention.apply(table[:, :, spread], rstd, shared, True)
        y = y.index_copy(2, spread, rescaled)
    return y


class LineCache:
    """Reads pages with fixed weights, and computes the sums of every distinct line of a `LineIndex` once.

    All lines have the same m, from the largest score of all pairs, even of those that are on no page. Pages whose
    scores are too far below it are read as in training, by `shared_attention`.
    """

    @torch.no_grad()
    def __init__(self, gpt, index):
        self.gpt = gpt
        self.index = index
        self.table, self.rstd = pair_table(gpt)
        _, _, self.pairs, _ = pair_sums(self.table, self.rstd, torch.from_numpy(PAIRS), rescale=False)
        self.pieces = GrowingTable(*self.pairs.shape[1:], dtype=self.pairs.dtype)
        self.lines = GrowingTable(*self.pairs.shape[1:], dtype=self.pairs.dtype)

    @torch.no_grad()
    @denormals_flushed()
    def __call__(self, lines):
        """Return action logits (B, A) and values (B,) of pages, given as line ids (B, 24) on the CPU."""
        if len(self.lines) < len(self.index.lines):
            self.pieces.append(bag_sums(self.pairs, self.index.piece_pairs()[len(self.pieces) :]))
            self.lines.append(bag_sums(self.pieces(), self.index.line_pieces()[len(self.lines) :]))
        sums = bag_sums(self.lines(), lines)
        y = sums[:, 1:] / sums[:, :1]
        low = (sums[:, 0] <= 2.0**LEAST).any(1).nonzero().flatten()
        if len(low):
            y[low] = shared_attention(self.table, self.rstd, share_pages(self.index, lines[low].numpy()))
        return self.gpt.heads(features_from_attention(self.gpt, y))
