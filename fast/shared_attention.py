"""One layer on the CPU: pages share their lines, and lines share their pieces.

A softmax splits over parts of a page (Milakov & Gimelshein 2018; Dao et al. 2022, FlashAttention). For each part we
keep, per head, the maximum m of its scores s and two sums over its characters: the denominator, of 2^(s - m), and the
numerator, of 2^(s - m) v for values v. Parts with the same maximum are combined by adding their sums, others are first
rescaled to the larger maximum. For example, two characters with scores of 3 bits and values 5 and 7 have the sums 2 and
12, one with 1 bit and the value 9 has the sums 1 and 9:

>>> m = torch.tensor([[3.0], [1.0]])  # (parts, heads)
>>> sums = torch.tensor([[[2.0], [12.0]], [[1.0], [9.0]]])  # (parts, denominator and numerator, heads)
>>> m, sums, factors = rescaled_sums(m, sums, torch.tensor([[0, 1]]))  # one whole, made of both parts
>>> m.flatten(), sums.flatten(), factors.flatten()
(tensor([3.]), tensor([ 2.2500, 14.2500]), tensor([1.0000, 0.2500]))

and attention is 14.25 / 2.25. A page is 24 lines of 9 pieces of 9 characters. Most pieces and lines are on many pages
of a minibatch, and each is summed once: 512 pages have about 1,000 distinct pieces and 1,250 distinct lines.

Maxima are rounded up to whole numbers, and scores are in bits, so that rescaling multiplies by a power of two, which is
exact. It is fastest to take one maximum per head for the whole minibatch, and that is accurate while the largest scores
of its pages are within HEADROOM - LEAST = 176 bits of each other. Heads whose scores spread further rescale every part.
What this is worth is in docs/performance.md: always rescaling makes a gradient step 1.7 times as long, and sharing
lines without pieces makes attention 2.7 times as long.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch

from fast.attention_tables import NUM_EMBEDDINGS, PAIRS, features_from_attention, pair_table
from fast.bags import Bags, bag_sums, make_bags
from fast.line_index import GrowingTable

# A common maximum is HEADROOM bits below the largest score, so sums rise that far above 1. Of the 128 bits that float32
# has there, the sum of 1944 terms takes 11, which leaves 31 for the values.
HEADROOM = 86
# Denominators of at most 2^LEAST are not trusted: float32 may flush terms below 2^-126 to zero. In a larger denominator
# all 1944 of them would not be more than a share of 2^-25, which is below its precision.
LEAST = -90


class SharedPages(NamedTuple):
    """The pages of a minibatch, taken apart into distinct lines, pieces and pairs of a character and a position."""

    pairs: torch.Tensor  # (P,) numbers of the distinct pairs, character * 1944 + position
    embeddings: Bags  # pairs as bags of three of the NUM_EMBEDDINGS
    parts: list  # `Bags` of pairs, of pieces and of lines: the pieces, the lines, the pages


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
    """Compute the sums of P pairs, each of which is a part of one character.

    Args: table and rstd (P,), as from `pair_table`; embeddings (P, 3); and whether parts will be rescaled.
    Returns:
        rows     (P, 1 + D, H)  the sums of three rows of the table, score and values that still lack the factor rstd
        weights  (P, H)         2^(s - m)
        sums     (P, 1 + D, H)  the denominator, which is the weight, and then the numerators
        m        (P, H)         each score, rounded up; or if parts will not be rescaled, the common maximum (H,)
    """
    rows, rstd = bag_sums(table, embeddings), rstd.unsqueeze(1)
    scores = rows[:, 0] * rstd
    whole = scores.ceil()
    if rescale:
        m = whole
    else:
        m = whole.max(0).values - HEADROOM  # three times as fast as amax(0)
    # There are two factors because then rounding does not depend on m.
    weights = torch.exp2(scores - whole) * torch.exp2(whole - m)
    sums = rows * (weights * rstd).unsqueeze(1)
    sums[:, 0] = weights
    return rows, weights, sums, m


def rescaled_sums(m, sums, members):
    """Combine parts with maxima of their own, m (K, H) and sums (K, 1 + D, H), to n wholes of J `members` each, (n,
    J).

    Returns: m (n, H), the largest of each whole's parts; sums (n, 1 + D, H); and the factors of its parts (n, J, H).
    """
    n, J = members.shape
    flat = members.flatten()
    of_parts = m.index_select(0, flat).view(n, J, -1)
    m = of_parts.amax(1)
    factors = torch.exp2(of_parts - m.unsqueeze(1))
    rows = sums.flatten(1).index_select(0, flat).view(n, J, *sums.shape[1:]).mul_(factors.unsqueeze(2))
    return m, bag_sums(rows.flatten(0, 1), torch.arange(n * J, device=sums.device).view(n, J)), factors


class SharedAttention(torch.autograd.Function):
    """Attention of the last position on `SharedPages`, with one maximum for each head, or (rescale) for each part and
    head.

    Args: table (112, 1 + D, H) and rstd (7 * 1944,), as from `pair_table`.
    Returns: y (B, D, H), and the denominators (B, H), which have no gradient.

    y does not depend on the maxima, so the gradient takes them as constants. The sums are linear in those of the parts,
    so the gradient of a part is the sum of the gradients of the larger parts that have it.
    """

    @staticmethod
    @denormals_flushed()
    def forward(ctx, table, rstd, shared, rescale):
        scale = rstd.index_select(0, shared.pairs)
        rows, weights, of_pairs, m = pair_sums(table, scale, shared.embeddings.members, rescale)
        ctx.shared, ctx.num_pairs, ctx.factors = shared, len(rstd), []
        sums, factors = of_pairs, None
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
        # Flushing always would change what a seed learns by some bits.
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
    """Apply `SharedAttention`, and once more with rescaling to those heads that need it. Returns y (B, D, H)."""
    y, denominator = SharedAttention.apply(table, rstd, shared, False)
    spread = (denominator <= 2.0**LEAST).any(0).nonzero().flatten()
    if len(spread):
        rescaled, _ = SharedAttention.apply(table[:, :, spread], rstd, shared, True)
        y = y.index_copy(2, spread, rescaled)
    return y


class LineCache:
    """Sums every distinct line of a `LineIndex` once, for as long as the weights of a GPT do not change.

    All sums have the maximum of all pairs, also of those that are on no page. Pages whose scores are too far below it
    are read as in training.
    """

    @torch.no_grad()
    def __init__(self, gpt, index):
        self.gpt, self.index = gpt, index
        self.table, self.rstd = pair_table(gpt)
        _, _, self.pairs, _ = pair_sums(self.table, self.rstd, torch.from_numpy(PAIRS), rescale=False)
        self.pieces = GrowingTable(*self.pairs.shape[1:], dtype=self.pairs.dtype)
        self.lines = GrowingTable(*self.pairs.shape[1:], dtype=self.pairs.dtype)

    @torch.no_grad()
    @denormals_flushed()
    def __call__(self, lines):
        """Read pages as line ids (B, 24), on the CPU. Returns action logits (B, A) and values (B,)."""
        if len(self.lines) < len(self.index.lines):
            self.pieces.append(bag_sums(self.pairs, self.index.piece_pairs()[len(self.pieces) :]))
            self.lines.append(bag_sums(self.pieces(), self.index.line_pieces()[len(self.lines) :]))
        sums = bag_sums(self.lines(), lines)
        y = sums[:, 1:] / sums[:, :1]
        low = (sums[:, 0] <= 2.0**LEAST).any(1).nonzero().flatten()
        if len(low):
            y[low] = shared_attention(self.table, self.rstd, share_pages(self.index, lines[low].numpy()))
        return self.gpt.heads(features_from_attention(self.gpt, y))
