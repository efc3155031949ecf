"""One layer on the CPU: pages share their lines, and lines share their pieces.

A softmax splits over parts of a page (Milakov & Gimelshein 2018, and FlashAttention, Dao et al. 2022). For a part we keep, per
head, the maximum m of its scores and the sums of 2^(s - m) and of 2^(s - m) v, the denominator and numerator; parts with the
same maximum combine by adding their sums. A page is 24 lines of 9 pieces of 9 characters. Most lines and pieces stand
on many pages of a minibatch, and each distinct one is summed once: a minibatch of 512 pages has about 3,000 distinct pairs,
1,000 pieces and 1,250 lines.

Maxima are rounded up to whole numbers and scores are in bits, so that rescaling to another maximum multiplies by a power of two,
which is exact. One maximum per head for the whole minibatch is fastest, and good while the largest scores of its pages lie within
HEADROOM - LEAST = 176 bits of each other. Heads whose scores spread further rescale every part.

What each of this is worth (docs/performance.md): always rescaling makes a gradient step 1.7 times as long; sharing lines without
pieces makes attention 2.7 times as long.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fast.attention_tables import NUM_EMBEDDINGS, PAIRS, after_attention, pair_table
from fast.line_index import GrowingTable

HEADROOM = 86  # bits that the sums may rise above 1: float32 ends at 2^128, 1944 terms take 11 bits, 31 are left for the values
LEAST = (
    -90
)  # float32 may flush terms below 2^-126 to zero: 1944 of them are 2^-25 of a sum of 2^-90, and no less matters


class Level(NamedTuple):
    """One level of a `Tree`: n parts, each made of J parts of the level below."""

    children: torch.Tensor  # (n, J) indices of parts of the level below
    order: torch.Tensor  # (n * J,) positions in children.flatten(), sorted by child, for the gradient
    parents: torch.Tensor  # (n * J,) order // J
    offsets: torch.Tensor  # (parts of the level below,) where each child's run in `order` starts


class Tree(NamedTuple):
    """The pages of a minibatch as their distinct parts."""

    pairs: torch.Tensor  # (P,) distinct character * 1944 + position
    embeddings: Level  # pairs of character, row and column, among the NUM_EMBEDDINGS
    levels: list  # pieces of pairs, lines of pieces, pages of lines


def tree_of(index, lines):
    """Pages as line ids (B, 24), an int64 array, of a `LineIndex` -> their `Tree`, on the CPU."""
    lines, lines_of_pages = distinct(lines, len(index.lines))
    pieces, pieces_of_lines = distinct(index.line_pieces().numpy()[lines], len(index.pieces))
    pairs, pairs_of_pieces = distinct(index.piece_pairs().numpy()[pieces], len(PAIRS))
    levels = [
        make_level(pairs_of_pieces, len(pairs)),
        make_level(pieces_of_lines, len(pieces)),
        make_level(lines_of_pages, len(lines)),
    ]
    return Tree(torch.from_numpy(pairs), make_level(PAIRS[pairs], NUM_EMBEDDINGS), levels)


def distinct(children, n):
    """Indices (..., J), each < n -> the distinct ones in ascending order, and children as positions among them."""
    used = np.zeros(n, bool)
    used[children] = True
    return used.nonzero()[0], (np.cumsum(used) - 1)[children]


def make_level(children, num_below, device="cpu"):
    """Children (n, J), indices < num_below -> their `Level`."""
    dtype = np.uint8 if num_below < 2**8 else np.uint16 if num_below < 2**16 else np.int32
    flat = children.ravel().astype(dtype)  # up to 16 bits NumPy sorts by radix
    counts, order = np.bincount(flat, minlength=num_below), np.argsort(flat, kind="stable")
    arrays = children, order, order // children.shape[-1], np.cumsum(counts) - counts
    return Level(*(torch.from_numpy(x).to(device) for x in arrays))


@contextlib.contextmanager
def flushed(needed=True):
    """Numbers below 2^-126 count as 0 within: sharp attention is full of them, and a CPU is slow with what it cannot normalise."""
    torch.set_flush_denormal(needed)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def bag_sums(rows, index, offsets=None):
    """Sums rows (K, 1 + D, H) over bags of them -> (n, 1 + D, H).

    Bag i is index[i] of an index (n, J), or index[offsets[i] : offsets[i + 1]].
    """
    return F.embedding_bag(index, rows.flatten(1), offsets, mode="sum").view(-1, *rows.shape[1:])


def pair_sums(table, rstd, embeddings, rescale):
    """Pairs as parts: `pair_table`'s factors of P pairs, embeddings (P, 3) ->

    rows     (P, 1 + D, H)  their sums of the table, not yet times rstd
    weights  (P, H)         2^(s - m)
    sums     (P, 1 + D, H)  denominator first, then the numerator
    m        (H,) the rounded-up maximum of all pairs less HEADROOM; with rescale (P, H), that of each pair
    """
    rows, rstd = bag_sums(table, embeddings), rstd.unsqueeze(1)
    scores = rows[:, 0] * rstd
    whole = scores.ceil()
    m = whole if rescale else whole.max(0).values - HEADROOM  # three times as fast as amax(0)
    weights = torch.exp2(scores - whole) * torch.exp2(
        whole - m
    )  # in two factors, so that what is rounded does not depend on m
    sums = rows * (weights * rstd).unsqueeze(1)
    sums[:, 0] = weights
    return rows, weights, sums, m


def rescaled_sums(m, sums, children):
    """Parts with maxima m (K, H), sums (K, 1 + D, H) -> the wholes of `children` (n, J), each with the largest maximum of its
    parts: m (n, H), sums (n, 1 + D, H), and the factors that rescaled the parts, (n, J, H)."""
    n, J = children.shape
    flat = children.flatten()
    parts = m.index_select(0, flat).view(n, J, -1)
    m = parts.amax(1)
    factors = torch.exp2(parts - m.unsqueeze(1))
    rows = sums.flatten(1).index_select(0, flat).view(n, J, *sums.shape[1:]).mul_(factors.unsqueeze(2))
    return m, bag_sums(rows.flatten(0, 1), torch.arange(n * J, device=sums.device).view(n, J)), factors


class SharedAttention(torch.autograd.Function):
    """Softmax attention of the last position on each page of a `Tree`, with one maximum for all or rescaling every part.

    table (112, 1 + D, H), rstd (7 * 1944,) as `pair_table` has them -> y (B, D, H), and the denominators (B, H). y does not
    depend on the maxima, so they are constants to the gradient; the sums are linear in the parts, and the gradient walks down
    the same tree.
    """

    @staticmethod
    @flushed()
    def forward(ctx, table, rstd, tree, rescale):
        scale = rstd.index_select(0, tree.pairs)
        rows, weights, of_pairs, m = pair_sums(table, scale, tree.embeddings.children, rescale)
        ctx.tree, ctx.factors, ctx.num_pairs, sums = tree, [], len(rstd), of_pairs
        for part in tree.levels:
            if rescale:
                m, sums, factors = rescaled_sums(m, sums, part.children)
            else:
                sums, factors = bag_sums(sums, part.children), None
            ctx.factors.append(factors)
        denominator = sums[:, 0].clamp_min(2.0**LEAST)
        y = sums[:, 1:] / denominator.unsqueeze(1)
        ctx.sharp = rescale or bool((denominator <= 2.0**LEAST).any())
        ctx.save_for_backward(scale.unsqueeze(1), rows[:, 0], weights, of_pairs, denominator, y)
        ctx.mark_non_differentiable(denominator)
        return y, denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        with flushed(ctx.sharp):  # only then: what a seed gives in an ordinary training stays the same bit for bit
            return SharedAttention.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx, dy):
        scale, row_scores, weights, of_pairs, denominator, y = ctx.saved_tensors
        dsums = torch.cat([-(dy * y).sum(1, keepdim=True), dy], dim=1) / denominator.unsqueeze(1)
        for part, factors in zip(reversed(ctx.tree.levels), reversed(ctx.factors)):
            if factors is None:
                dsums = bag_sums(dsums, part.parents, part.offsets)
            else:
                dsums = bag_sums((dsums.unsqueeze(1) * factors.unsqueeze(2)).flatten(0, 1), part.order, part.offsets)
        # of_pairs = (w, rows * w * scale), w = 2^(row_scores * scale - m)
        of_values = sum((dsums[:, 1:] * of_pairs[:, 1:]).unbind(1))  # (P, H), three times as fast as sum(1)
        dscores = math.log(2) * (of_values + dsums[:, 0] * weights)
        dscale = (dscores * row_scores + of_values / scale).sum(1)
        drows = dsums.mul_((weights * scale).unsqueeze(1))
        drows[:, 0] = dscores * scale
        embeddings = ctx.tree.embeddings
        drstd = dscale.new_zeros(ctx.num_pairs).index_copy_(0, ctx.tree.pairs, dscale)
        return bag_sums(drows, embeddings.parents, embeddings.offsets), drstd, None, None


def shared_attention(table, rstd, tree):
    """`SharedAttention`, rescaled for the heads that need it -> (B, D, H)."""
    y, denominator = SharedAttention.apply(table, rstd, tree, False)
    spread = (denominator <= 2.0**LEAST).any(0).nonzero().flatten()  # they were clamped to this
    if len(spread):
        y = y.index_copy(2, spread, SharedAttention.apply(table[:, :, spread], rstd, tree, True)[0])
    return y


class LineCache:
    """Sums every distinct line of a `LineIndex` once, for as long as the weights stand still.

    Lines are kept twice: with a maximum each, and with one for all, which saves 4 % of a training's time. Pages whose scores lie
    too far below that one are summed with a maximum for each line.
    """

    @torch.no_grad()
    def __init__(self, gpt, index):
        self.gpt, self.index = gpt, index
        table, rstd = pair_table(gpt)
        _, _, sums, m = pair_sums(table, rstd, torch.from_numpy(PAIRS), rescale=True)
        tables = lambda: [GrowingTable(*x.shape[1:], dtype=x.dtype) for x in (m, sums)]
        self.pairs, self.pieces, self.lines = (m, sums), tables(), tables()
        self.common = GrowingTable(*sums.shape[1:], dtype=sums.dtype)  # sums of the lines, with the maximum
        self.maximum = None  # (H,)

    @torch.no_grad()
    @flushed()
    def __call__(self, lines):
        """Pages as line ids (B, 24), on the CPU -> action logits (B, A), values (B,)."""
        if len(self.index.lines) > self.common.n:
            self.sum_new_lines()
        sums = bag_sums(self.common(), lines)
        below = (sums[:, 0] <= 2.0**LEAST).any(1).nonzero().flatten()
        if len(below):
            sums[below] = rescaled_sums(*[table() for table in self.lines], lines[below])[1]
        return self.gpt.heads(after_attention(self.gpt, sums[:, 1:] / sums[:, :1]))

    def sum_new_lines(self):
        self.extend(self.pieces, self.pairs, self.index.piece_pairs())
        self.extend(self.lines, [table() for table in self.pieces], self.index.line_pieces())
        m, sums = (table() for table in self.lines)
        n = self.common.n
        maximum = m[n:].max(0).values - HEADROOM
        if self.maximum is None:
            self.maximum = maximum
        elif (maximum > self.maximum).any():  # all lines with the new one
            self.maximum, n, self.common.n = torch.maximum(maximum, self.maximum), 0, 0
        self.common.append(sums[n:] * torch.exp2(m[n:] - self.maximum).unsqueeze(1))

    def extend(self, parts, below, children):
        """Sums the parts that `children` has gained since the last call."""
        maxima, sums = parts
        new = children[maxima.n :]
        if len(new):
            m, s, _ = rescaled_sums(*below, new)
            maxima.append(m)
            sums.append(s)
