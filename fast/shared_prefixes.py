"""Two layers and more: pages share how they begin.

Attention is causal: what a block computes at a position depends on the text up to there. So pages that begin alike share all
work up to their first difference. Each distinct prefix is computed once, chunk by chunk; the queries of its last chunk attend to
the keys and values of its whole path, as language model servers share prompts (Zheng et al. 2024, RadixAttention), here with
gradients. Each path has a copy of its keys and values, which takes two to three times the memory that they take unshared;
all else takes less. On two CPU cores six layers learn 1.5 to 2.2 times as fast with it (docs/performance.md).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from breakout_ascii import COLUMNS, TOKENS
from fast.cuda_graphs import Compiled
from fast.shared_attention import make_level

LINES = 3  # in a chunk, the unit that is shared: 243 characters nearly fill two of FlashAttention's blocks of 128
CHUNK = LINES * COLUMNS


class PrefixTree(NamedTuple):
    """The pages of a minibatch as the distinct ones of their prefixes: of 1 chunk, of 2, ... of all 8.

    A prefix is its last chunk, behind a shorter prefix that others may share. All are numbered, the shortest first. The children
    of a prefix of J chunks are the J prefixes that its chunks end, the shortest first and itself last: its path. In the `Level` of
    length J `offsets` has one entry for each prefix of up to J chunks.
    """

    chunks: torch.Tensor  # (n, CHUNK) characters
    starts: torch.Tensor  # (n, 1) where on the page each chunk starts
    levels: list  # for each length J a `Level`: children (n of this length, J)
    pages: torch.Tensor  # (B,) each page's position among the prefixes of full length


def prefix_tree(index, lines, device="cpu"):
    """Pages as line ids (B, 24), an int64 array, of a `LineIndex` -> their `PrefixTree`."""
    order = np.lexsort(lines.T[::-1])  # pages that begin alike lie next to each other
    chunks = lines[order].reshape(len(order), -1, LINES)  # (B, 8, LINES)
    new = np.ones(chunks.shape[:2], bool)  # prefixes that the page before does not share
    new[1:] = np.logical_or.accumulate((chunks[1:] != chunks[:-1]).any(2), axis=1)
    ends = new.sum(0).cumsum()  # how many prefixes there are up to each length
    prefixes = new.cumsum(0) - 1 + np.append(0, ends[:-1])  # (B, 8): each page's prefix of each length
    levels = [make_level(prefixes[new[:, i], : i + 1], end, device) for i, end in enumerate(ends)]
    pieces = index.line_pieces().numpy()[chunks.swapaxes(0, 1)[new.T]]  # (n, LINES, 9)
    characters = index.piece_pairs().numpy()[pieces].reshape(-1, CHUNK) // TOKENS
    pages = np.empty_like(order)
    pages[order] = prefixes[:, -1] - prefixes[0, -1]
    tensors = lambda *arrays: (torch.from_numpy(x).to(device) for x in arrays)
    starts = new.T.nonzero()[0][:, None] * CHUNK
    return PrefixTree(*tensors(characters, starts), levels, *tensors(pages))


class Paths(torch.autograd.Function):
    """rows (K, W) -> for each level, the rows of its children, (n * J, W). The gradient is a segment sum, without atomics."""

    @staticmethod
    def forward(ctx, rows, levels):
        ctx.rows, ctx.levels = len(rows), levels
        return tuple(rows.index_select(0, level.children.flatten()) for level in levels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)  # each level would round a sum in bf16 again
        total = gradients[0].new_zeros(ctx.rows, gradients[0].size(1), dtype=dtype)
        for of_length, d in zip(ctx.levels, gradients):
            total[: len(of_length.offsets)] += F.embedding_bag(of_length.order, d, of_length.offsets, mode="sum")
        return total.to(gradients[0].dtype), None


def lower_right_attention(q, kv, n_head):
    """Causal attention of queries (B, T, C), the last T of S positions, to keys and values (B, S, 2C) of all -> (B, T, C)."""
    mask = None
    if q.size(1) < kv.size(1):
        from torch.nn.attention.bias import causal_lower_right  # here: the import takes a second

        mask = causal_lower_right(q.size(1), kv.size(1))
    heads = lambda z: z.unflatten(2, (n_head, -1)).transpose(1, 2)  # (B, nh, T or S, hs)
    k, v = kv.chunk(2, dim=2)
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


def prefix_attention(q, kv, n_head, levels):
    """Queries (n, T, C) of the last T positions of each prefix, keys and values (K, CHUNK, 2C) of all chunks -> (n, T, C)."""
    queries, paths = q.split([len(level.children) for level in levels]), Paths.apply(kv.flatten(1), levels)
    return torch.cat(
        [lower_right_attention(q, path.view(len(q), -1, kv.size(2)), n_head) for q, path in zip(queries, paths)]
    )


def before_attention(block, x):
    """The first half of a block: (..., C) -> queries (..., C), keys and values (..., 2C)."""
    x = block.ln_1(x)
    return [F.linear(x, w) for w in block.attn.c_attn.weight.split([x.size(-1), 2 * x.size(-1)])]


def rest_of_block(block, x, y):
    """The second half: x (..., C), attention outputs y (..., C) -> (..., C)."""
    x = x + block.attn.c_proj(y)
    return x + block.mlp(block.ln_2(x))


@functools.cache
def compiled(f):
    """One compilation for all blocks and for any number of chunks, which differs from minibatch to minibatch."""
    return Compiled(f, dynamic=True)


def halves(compile_blocks):
    """-> the two halves of a block, compiled or as they stand."""
    return [compiled(f) if compile_blocks else f for f in (before_attention, rest_of_block)]


def prefix_features(gpt, tree, bf16=False, compile_blocks=False):
    """`GPT.features` of a `PrefixTree` -> (B, C).

    bf16: in the blocks. compile_blocks: once for all blocks, but for the end of the last.
    """
    *blocks, last_block = gpt.blocks
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = through_blocks(gpt, tree, blocks, compile_blocks)
        ends = lambda z: z[-len(tree.levels[-1].children) :, -1:]  # the last positions of whole pages: all that is read
        before, _ = halves(compile_blocks)
        q, kv = before(last_block, x)
        x = rest_of_block(last_block, ends(x), prefix_attention(ends(q), kv, gpt.config.n_head, tree.levels[-1:]))
    return gpt.ln_f(x.squeeze(1)).index_select(0, tree.pages)


def features_of_every_token(gpt, tree, bf16=False, compile_blocks=False):
    """All positions, where `prefix_features` has the last alone -> (B, 1944, C)."""
    with torch.autocast(gpt.device.type, torch.bfloat16, enabled=bf16):
        x = gpt.ln_f(through_blocks(gpt, tree, gpt.blocks, compile_blocks))
    return x[tree.levels[-1].children[tree.pages]].flatten(1, 2)


def through_blocks(gpt, tree, blocks, compile_blocks):
    """-> (n, CHUNK, C), what the blocks make of every chunk behind its prefix."""
    before, after = halves(compile_blocks)
    positions = tree.starts + torch.arange(CHUNK, device=gpt.device)
    x = gpt.wte(tree.chunks) + gpt.wre(positions // COLUMNS) + gpt.wce(positions % COLUMNS)  # (n, CHUNK, C)
    for block in blocks:
        x = after(block, x, prefix_attention(*before(block, x), gpt.config.n_head, tree.levels))
    return x
