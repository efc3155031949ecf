"""Two layers and more: pages share how they begin.

Attention is causal: what a block computes at a position depends only on the text up to there. So pages that begin alike
share all work up to their first difference. Each distinct prefix is computed once, chunk by chunk. The queries of its
last chunk attend to the keys and values of all its chunks, as servers of language models share prompts (Zheng et al.
2024, RadixAttention), here with gradients.

For example, the ball of a new game moves from row 21 to row 20 in its first step. A chunk is three lines, so both pages
share six of their eight chunks, and each has a seventh (rows 18 to 20) and an eighth of its own. Of 16 chunks 10 are
computed:

>>> from breakout_ascii import BreakoutAscii
>>> from fast.line_index import LineIndex
>>> game, index = BreakoutAscii(), LineIndex()
>>> (first, _), (second, *_) = game.reset(seed=0), game.step(0)
>>> tree = prefix_tree(index, index.encode(np.stack([first, second])))
>>> tree.chunks.shape
torch.Size([10, 243])
>>> tree.paths[7].members  # the chunks of each prefix of full length, that is of each page
tensor([[0, 1, 2, 3, 4, 5, 6, 8],
        [0, 1, 2, 3, 4, 5, 7, 9]])

Every prefix needs a copy of the keys and values of all its chunks, which takes two to three times the memory that they
take without sharing; everything else takes less. On two CPU cores six layers learn 1.5 to 2.2 times as fast with it
(docs/performance.md).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from breakout_ascii import COLUMNS, TOKENS
from fast.bags import bag_sums, make_bags
from fast.cuda_graphs import Compiled

LINES = 3  # in a chunk, the unit that is shared: 243 characters nearly fill two of FlashAttention's blocks of 128
CHUNK = LINES * COLUMNS


class PrefixTree(NamedTuple):
    """The distinct prefixes of the pages of a minibatch, of one chunk, of two, and so on up to whole pages of eight.

    A prefix adds one chunk to a prefix that is a chunk shorter, so there are as many chunks to compute as prefixes.
    Both have the same numbers, and those of shorter prefixes come first. The path of a prefix is the list of its
    chunks, from the top of the page down.
    """

    chunks: torch.Tensor  # (n, CHUNK) characters of each chunk
    starts: torch.Tensor  # (n, 1) where on the page each chunk starts
    paths: list  # for each length J = 1, 2, ..., 8 the paths of all prefixes of J chunks, as `Bags` of J chunks each
    pages: torch.Tensor  # (B,) the position of each page among the prefixes of full length


def prefix_tree(index, lines, device="cpu"):
    """Return the `PrefixTree` of pages that a `LineIndex` has encoded as line ids, an int64 array (B, 24)."""
    order = np.lexsort(lines.T[::-1])  # pages that begin alike are next to each other
    chunks = lines[order].reshape(len(order), -1, LINES)  # (B, 8, LINES)
    is_new = np.ones(chunks.shape[:2], bool)  # (B, 8): whether the page before has another prefix of this length
    is_new[1:] = np.logical_or.accumulate((chunks[1:] != chunks[:-1]).any(2), axis=1)
    ends = is_new.sum(0).cumsum()  # how many prefixes there are up to each length
    prefixes = is_new.cumsum(0) - 1 + np.append(0, ends[:-1])  # (B, 8): the number of each page's prefix of each length
    paths = [make_bags(prefixes[is_new[:, i], : i + 1], end, device) for i, end in enumerate(ends)]
    pieces = index.line_pieces().numpy()[chunks.swapaxes(0, 1)[is_new.T]]  # (n, LINES, 9)
    characters = index.piece_pairs().numpy()[pieces].reshape(-1, CHUNK) // TOKENS
    starts = is_new.T.nonzero()[0][:, None] * CHUNK
    pages = np.empty_like(order)
    pages[order] = prefixes[:, -1] - prefixes[0, -1]
    characters, starts, pages = (torch.from_numpy(x).to(device) for x in (characters, starts, pages))
    return PrefixTree(characters, starts, paths, pages)


class Paths(torch.autograd.Function):
    """Copies the rows (n, W) of chunks to all paths that have them.

    For each length J it returns the rows of all paths of that length, one path after the other. The gradient of a row
    is a sum over the paths that have it, computed without atomic additions.
    """

    @staticmethod
    def forward(ctx, rows, paths):
        ctx.num_rows = len(rows)
        ctx.paths = paths
        return tuple(rows.index_select(0, bags.members.flatten()) for bags in paths)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)  # bf16 would round after each length
        total = gradients[0].new_zeros(ctx.num_rows, gradients[0].size(1), dtype=dtype)
        for bags, gradient in zip(ctx.paths, gradients):
            # Short paths have only chunks with low numbers.
            total[: len(bags.offsets)] += bag_sums(gradient, bags.order, bags.offsets)
        return total.to(gradients[0].dtype), None


def lower_right_attention(q, kv, n_head):
    """Compute causal attention of the last T of S positions to all S.

    Args: queries (B, T, C), keys and values (B, S, 2C).
    Returns: (B, T, C).
    """
    mask = None
    if q.size(1) < kv.size(1):
        from torch.nn.attention.bias import causal_lower_right  # here because the import takes a second

        mask = causal_lower_right(q.size(1), kv.size(1))
    k, v = kv.chunk(2, dim=2)
    q, k, v = (x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in (q, k, v))  # (B, nh, T or S, hs)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


def prefix_attention(q, kv, n_head, paths):
    """Compute attention of the last T positions of each prefix to its whole path.

    Args: queries (n, T, C) of the prefixes on `paths`, keys and values (number of chunks, CHUNK, 2C) of all chunks.
    Returns: (n, T, C).
    """
    queries = q.split([len(bags.members) for bags in paths])
    kvs = Paths.apply(kv.flatten(1), paths)
    ys = []
    for q, path_kv in zip(queries, kvs):
        ys.append(lower_right_attention(q, path_kv.view(len(q), -1, kv.size(2)), n_head))
    return torch.cat(ys)


def before_attention(block, x):
    """Compute the first half of a block: from x (..., C) the queries (..., C), and the keys and values (..., 2C)."""
    x = block.ln_1(x)
    return [F.linear(x, w) for w in block.attn.c_attn.weight.split([x.size(-1), 2 * x.size(-1)])]


def after_attention(block, x, y):
    """Compute the second half of a block: from its input x and the output y of attention, both (..., C)."""
    x = x + block.attn.c_proj(y)
    return x + block.mlp(block.ln_2(x))


@functools.cache
def compiled(f):
    """Compile a function once for all blocks, and for any number of chunks, because every minibatch has another."""
    return Compiled(f, dynamic=True)


def halves(compile_blocks):
    """Return the two halves of a block as functions, compiled or not."""
    if compile_blocks:
        return compiled(before_attention), compiled(after_attention)
    return before_attention, after_attention


def prefix_features(gpt, tree, bf16=False, compile_blocks=False):
    """Do the work of `GPT.features` on a `PrefixTree`.

    Args: whether the blocks compute in bf16, and whether they are compiled.
    Returns: features (B, C).
    """
    *blocks, last_block = gpt.blocks
    num_pages = len(tree.paths[-1].members)
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = through_blocks(gpt, tree, blocks, compile_blocks)
        # Only the last position of a page is read, so the last block needs keys and values of all, but one query.
        before, _ = halves(compile_blocks)
        q, kv = before(last_block, x)
        y = prefix_attention(q[-num_pages:, -1:], kv, gpt.config.n_head, tree.paths[-1:])
        x = after_attention(last_block, x[-num_pages:, -1:], y)
    return gpt.ln_f(x.squeeze(1)).index_select(0, tree.pages)


def features_of_every_token(gpt, tree, bf16=False, compile_blocks=False):
    """Compute the features of every position, (B, 1944, C), where `prefix_features` computes those of the last."""
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = gpt.ln_f(through_blocks(gpt, tree, gpt.blocks, compile_blocks))
    return x[tree.paths[-1].members[tree.pages]].flatten(1, 2)


def through_blocks(gpt, tree, blocks, compile_blocks):
    """Send every chunk through `blocks`, and return (n, CHUNK, C)."""
    before, after = halves(compile_blocks)
    positions = tree.starts + torch.arange(CHUNK, device=gpt.device)
    x = gpt.wte(tree.chunks) + gpt.wre(positions // COLUMNS) + gpt.wce(positions % COLUMNS)  # (n, CHUNK, C)
    for block in blocks:
        q, kv = before(block, x)
        x = after(block, x, prefix_attention(q, kv, gpt.config.n_head, tree.paths))
    return x
