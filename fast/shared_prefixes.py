"""More than one layer: pages that begin alike share the work on their common prefix.

Attention is causal: what a block computes at a position depends only on the text up to there. So each distinct prefix
needs to be computed only once. This is done chunk by chunk. The queries of a prefix's last chunk attend to the keys and
values of all its chunks, as when servers of language models share prompts (Zheng et al. 2024, RadixAttention), here
with gradients.

For example, the ball of a new game moves from row 21 to row 20 in its first step. A page is eight chunks of three
lines. The pages before and after that step share six chunks, and each has a seventh (rows 18 to 20) and an eighth of
its own. So 10 chunks are computed instead of 16:

>>> from breakout_ascii import CHARACTERS, COLUMNS, ROWS, BreakoutAscii
>>> from fast.line_index import LineIndex
>>> from model import GPTConfig
>>> game = BreakoutAscii()
>>> first, _ = game.reset(seed=0)
>>> second, *_ = game.step(0)
>>> index = LineIndex(GPTConfig(ROWS, COLUMNS, CHARACTERS, n_action=3))
>>> tree = prefix_tree(index, index.encode(np.stack([first, second])))
>>> tree.chunks.shape
torch.Size([10, 243])
>>> tree.paths[-1].members  # the chunks of each prefix of eight chunks, that is of each page
tensor([[0, 1, 2, 3, 4, 5, 6, 8],
        [0, 1, 2, 3, 4, 5, 7, 9]])

Every prefix needs a copy of the keys and values of all its chunks, so these take two to three times the memory that
they take without sharing. Everything else takes less. On two CPU cores six layers learn 1.5 to 2.2 times as fast in
this way (docs/performance.md).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fast.bags import bag_sums, make_bags
from fast.cuda_graphs import Compiled
from fast.line_index import nearest_divisor

CHUNK = 243  # characters, about as many as a chunk of whole lines has; they nearly fill two of FlashAttention's blocks


class PrefixTree(NamedTuple):
    """The distinct prefixes of the pages of a minibatch, of one chunk, of two, and so on up to whole pages of eight.

    A prefix adds one chunk to a prefix that is a chunk shorter, so there are as many chunks to compute as prefixes.
    Chunk i is the last chunk of prefix i. Shorter prefixes come first. The path of a prefix is the list of its chunks,
    from the top of the page down.
    """

    chunks: torch.Tensor  # (n, 243) characters of each chunk
    starts: torch.Tensor  # (n, 1) the position on the page at which each chunk starts
    paths: list  # for each length J = 1, 2, ..., 8 the paths of all prefixes of J chunks, as `Bags` of J chunks each
    pages: torch.Tensor  # (B,) the place of each page among the prefixes of eight chunks


def prefix_tree(index, lines, device="cpu"):
    """Return the `PrefixTree` of pages that a `LineIndex` has encoded as line ids, an int64 array (B, 24)."""
    config = index.config
    lines_in_chunk = nearest_divisor(config.rows, CHUNK / config.columns)
    size = lines_in_chunk * config.columns  # of a chunk
    order = np.lexsort(lines.T[::-1])  # pages that begin alike are next to each other
    chunks = lines[order].reshape(len(order), -1, lines_in_chunk).swapaxes(0, 1)  # (8, B, 3)
    # is_new (8, B): whether a page begins with another prefix of this length than the page before it, which it does if
    # any chunk so far differs.
    is_new = np.ones(chunks.shape[:2], bool)
    is_new[:, 1:] = np.logical_or.accumulate((chunks[:, 1:] != chunks[:, :-1]).any(2), axis=0)
    # prefixes (8, B): the id of each page's prefix of each length. Every new prefix gets the next id.
    prefixes = is_new.cumsum().reshape(is_new.shape) - 1
    paths = []
    for length, (new, ids) in enumerate(zip(is_new, prefixes), start=1):
        members = prefixes[:length, new].T  # (number of prefixes of this length, length)
        num_chunks = int(ids[-1]) + 1  # of prefixes up to this length
        paths.append(make_bags(np.ascontiguousarray(members), num_chunks, device))
    pieces = index.line_pieces.rows.numpy()[chunks[is_new]]  # (n, 3, 9)
    characters = index.piece_pairs.rows.numpy()[pieces].reshape(-1, size) // config.tokens
    starts = is_new.nonzero()[0][:, None] * size
    pages = np.empty_like(order)
    pages[order] = prefixes[-1] - prefixes[-1, 0]
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
            # Short paths have only the first chunks.
            total[: len(bags.offsets)] += bag_sums(gradient, bags.order, bags.offsets)
        return total.to(gradients[0].dtype), None


def lower_right_attention(q, kv, n_head):
    """Compute causal attention of the last T of S positions to all S.

    Args: q (B, T, C), the queries, and kv (B, S, 2C), the keys and values.
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

    Args:
        q: (n, T, C), the queries of the prefixes in `paths`.
        kv: (number of chunks, T, 2C), the keys and values of all chunks.
        paths: of a `PrefixTree`, or some of them.

    Returns:
        (n, T, C).
    """
    queries = q.split([len(bags.members) for bags in paths])
    kvs = Paths.apply(kv.flatten(1), paths)
    ys = []
    for query, path_kv in zip(queries, kvs):  # one length after the other
        ys.append(lower_right_attention(query, path_kv.view(len(query), -1, kv.size(2)), n_head))
    return torch.cat(ys)


def before_attention(block, x):
    """Compute the first half of a block. Returns queries (..., C), and keys and values (..., 2C), for x (..., C)."""
    x = block.ln_1(x)
    return [F.linear(x, w) for w in block.attn.c_attn.weight.split([x.size(-1), 2 * x.size(-1)])]


def after_attention(block, x, y):
    """Compute the second half of a block. Returns (..., C) for its input x and attention's output y, both (..., C)."""
    x = x + block.attn.c_proj(y)
    return x + block.mlp(block.ln_2(x))


@functools.cache
def compiled(f):
    """Compile a function once for all blocks, and for any number of chunks, because it differs in every minibatch."""
    return Compiled(f, dynamic=True)


def halves(compile_blocks):
    """Return the two halves of a block as functions, compiled or not."""
    if compile_blocks:
        return compiled(before_attention), compiled(after_attention)
    return before_attention, after_attention


def prefix_features(gpt, tree, bf16=False, compile_blocks=False):
    """Do the work of `GPT.features` on a `PrefixTree`.

    Args:
        bf16: whether the blocks compute in bf16.
        compile_blocks: whether they are compiled.

    Returns:
        features (B, C).
    """
    *blocks, last_block = gpt.blocks
    num_pages = len(tree.paths[-1].members)
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = through_blocks(gpt, tree, blocks, compile_blocks)
        # Only the last position of a page is read. So the last block needs one query, and keys and values of all.
        before, _ = halves(compile_blocks)
        q, kv = before(last_block, x)
        y = prefix_attention(q[-num_pages:, -1:], kv, gpt.config.n_head, tree.paths[-1:])
        x = after_attention(last_block, x[-num_pages:, -1:], y)
    return gpt.ln_f(x.squeeze(1)).index_select(0, tree.pages)


def features_of_every_token(gpt, tree, bf16=False, compile_blocks=False):
    """Return the features of every position, (B, 1944, C), not only of the last, so that they can be checked."""
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = gpt.ln_f(through_blocks(gpt, tree, gpt.blocks, compile_blocks))
    return x[tree.paths[-1].members[tree.pages]].flatten(1, 2)


def through_blocks(gpt, tree, blocks, compile_blocks):
    """Send every chunk through `blocks`, and return (n, 243, C)."""
    before, after = halves(compile_blocks)
    positions = tree.starts + torch.arange(tree.chunks.size(1), device=gpt.device)
    columns = gpt.config.columns
    x = gpt.wte(tree.chunks) + gpt.wre(positions // columns) + gpt.wce(positions % columns)  # (n, 243, C)
    for block in blocks:
        q, kv = before(block, x)
        x = after(block, x, prefix_attention(q, kv, gpt.config.n_head, tree.paths))
    return x
