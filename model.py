"""A small GPT that reads a page of text and answers from its last position.

The blocks are nanoGPT's: pre-LayerNorm, causal self-attention, GELU MLP. Three things differ. Only the last position is
read, so the last block computes a single query. A position is a row plus a column, so what is learned about a column
holds in every row. And the weights start large enough for attention to find one character among 1944.

The pages of a batch share work, exactly: with one layer nearly all of it, with more what they have in common up to the first
difference. pages.py says what is shared, the second half of this file how attention uses it. Left out on purpose: dropout,
biases inside the blocks, weight tying, generation of text.
"""

import functools
import itertools
import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from pages import (
    CHARACTERS, COLUMNS, EMBEDDINGS, NEWLINE, PAIRS, POSITIONS, ROWS, SECTION, LineIndex, Lines, PrefixTree, Rows, Tree, check_pages,
    encode_characters,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The GPT


@dataclass
class GPTConfig:
    block_size: int = POSITIONS  # tokens on a page
    n_layer: int = 1
    n_head: int = 16
    n_embd: int = 64
    mlp_expansion: int = 4
    n_action: int = 3

    def __post_init__(self):
        if self.block_size != POSITIONS:
            raise ValueError(f"block_size must be {POSITIONS}, {ROWS} rows of {COLUMNS} characters, not {self.block_size}")
        if min(self.n_layer, self.n_head, self.n_embd, self.mlp_expansion, self.n_action) < 1:
            raise ValueError(f"layers, heads, embedding, expansion and actions must be at least 1: {self}")
        if self.n_embd % self.n_head or self.n_embd % 4:
            raise ValueError(f"n_embd must be a multiple of n_head and of 4; n_embd {self.n_embd}, n_head {self.n_head}")


class CausalSelfAttention(nn.Module):
    """The projections; between them goes `causal_attention`, or `prefix_attention` where pages share their beginnings."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)


def causal_attention(q, kv, n_head):
    """Queries (B, T, C) of the last T of S positions, keys and values (B, S, 2C) of all -> (B, T, C)."""
    mask = None
    if q.size(1) < kv.size(1):
        from torch.nn.attention.bias import causal_lower_right  # here, for it takes a second that one layer need not wait

        mask = causal_lower_right(q.size(1), kv.size(1))
    heads = lambda z: z.unflatten(2, (n_head, -1)).transpose(1, 2)  # (B, nh, T or S, hs)
    k, v = kv.chunk(2, dim=2)
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_expansion * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.mlp_expansion * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x, attend, compiled=False):
        """(B, T, C) -> (B, T, C). attend: queries (B, T, C), keys and values (B, T, 2C) -> (B, T, C)."""
        before, after = (compiled_once(f) if compiled else f for f in (Block.before, Block.after))
        return after(self, x, attend(*before(self, x)))

    def before(self, x):
        """(..., C) -> queries (..., C), keys and values (..., 2C)."""
        x = self.ln_1(x)
        return [F.linear(x, w) for w in self.attn.c_attn.weight.split([x.size(-1), 2 * x.size(-1)])]

    def after(self, x, y):
        """x (..., C), attention outputs y (..., C) -> (..., C)."""
        x = x + self.attn.c_proj(y)
        return x + self.mlp(self.ln_2(x))


@functools.cache
def compiled_once(f):
    """Shared by all blocks, their copies included, and for any number of sections: no two batches have the same."""
    return torch.compile(f, dynamic=True)


class GPT(nn.Module):
    """Pages of text in, action logits and values out: `logits, values = gpt(tokens)`."""

    page_columns = COLUMNS

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(len(CHARACTERS), C)
        self.wre = nn.Embedding(ROWS, C)
        self.wce = nn.Embedding(COLUMNS, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=False)
        self.policy_head = nn.Linear(C, config.n_action)
        self.value_head = nn.Linear(C, 1)
        self.change_head = nn.Linear(C, ROWS + COLUMNS)  # which rows and columns differ in the next frame
        self.bf16 = self.compiled = False  # see speed_up
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Large enough to see: with std 0.02 everywhere attention is uniform and the ball weighs 1 in 1944."""
        C = self.config.n_embd
        nn.init.normal_(self.wte.weight)
        self.wre.weight.copy_(sinusoids(ROWS, C))
        self.wce.weight.copy_(sinusoids(COLUMNS, C).roll(C // 2, dims=1))
        for block in self.blocks:
            nn.init.normal_(block.attn.c_attn.weight[: 2 * C], std=3 / math.sqrt(C))
            for weight in (block.attn.c_attn.weight[2 * C :], block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight):
                nn.init.normal_(weight, std=1 / math.sqrt(weight.size(1)))
        for head, gain in ((self.policy_head, 0.01), (self.value_head, 1.0), (self.change_head, 0.1)):
            nn.init.normal_(head.weight, std=gain / math.sqrt(C))
            nn.init.zeros_(head.bias)

    def embed(self, characters, positions):
        """Character numbers and positions 0..1943, of shapes that broadcast -> (..., C)."""
        return self.wte(characters) + self.wre(positions // COLUMNS) + self.wce(positions % COLUMNS)

    def features(self, pages):
        """(B, 1944) uint8 tokens, or their `Tree`, `PrefixTree` or `Lines` -> (B, C), the last position after the final LayerNorm."""
        if isinstance(pages, Tree):
            return self.after_attention(shared_attention(*self.pair_table(), pages))
        if isinstance(pages, PrefixTree):
            return self.read_prefix_tree(pages)
        if isinstance(pages, Lines):
            return self.after_attention(line_attention(*self.pair_table(), pages))
        check_pages(pages)
        index = LineIndex()
        numbers = index.encode(pages.cpu())
        if self.config.n_layer == 1 and (pages[:, -1] == ord("\n")).all():  # the lines share one query: the newline's
            return self.features(index.tree(numbers, self.device))
        return self.features(index.prefix_tree(numbers, self.device))

    def read_prefix_tree(self, tree):
        """`features` of a `PrefixTree`."""
        x = self.embed(tree.sections, tree.starts + torch.arange(SECTION, device=self.device))  # (n, SECTION, C)
        attend = lambda q, kv: prefix_attention(q, kv, self.config.n_head, tree.levels)
        *blocks, last_block = self.blocks
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for block in blocks:
                x = block(x, attend, self.compiled)
            ends = lambda z: z[-len(tree.levels[-1].children) :, -1:]  # the last positions of whole pages
            before = compiled_once(Block.before) if self.compiled else Block.before
            q, kv = before(last_block, x)
            x = last_block.after(ends(x), prefix_attention(ends(q), kv, self.config.n_head, tree.levels[-1:]))
        return self.ln_f(x.squeeze(1)).index_select(0, tree.pages)

    def read_every_token(self, tokens):
        """`features` of (B, 1944) tokens without sharing and without skipping anything: every token through every block."""
        check_pages(tokens)
        x = self.embed(encode_characters(tokens.to(self.device)), torch.arange(POSITIONS, device=self.device))  # (B, T, C)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                x = block(x, lambda q, kv: causal_attention(q, kv, self.config.n_head), self.compiled)
        return self.ln_f(x[:, -1])

    def speed_up(self):
        """For deeper models on CUDA: bf16 and compiled blocks, where they work. The path of one layer needs neither."""
        if self.config.n_layer > 1 and self.device.type == "cuda":
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.compile_blocks()

    def __getstate__(self):
        return super().__getstate__() | {"compiled": False}  # a copy may find itself in a process that cannot compile

    def compile_blocks(self):
        self.compiled = True
        try:
            self.features(torch.full((2, POSITIONS), ord("\n"), dtype=torch.uint8)).sum().backward()
        except Exception as error:  # no compiler, no Triton: whatever it is, the plain blocks work
            self.compiled = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"torch.compile does not work here, going on without: {reason}", stacklevel=2)
        self.zero_grad()

    def heads(self, features):
        """(B, C) -> action logits (B, A) and values (B,)."""
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def forward(self, pages):
        """Pages, as `features` takes them -> action logits (B, A), values (B,), float32."""
        return self.heads(self.features(pages))

    def reader(self):
        """How a rollout is read while the weights stand still."""
        return LineReader(self) if self.config.n_layer == 1 else PageReader(self)

    @property
    def device(self):
        return self.wte.weight.device

    # What the one-layer path needs, with H heads of size D.

    def pair_table(self):
        """Attention scores of the last position's query, and values, of every pair (character, position), in factors:
        table (112, 1 + D, H) of the 7 characters, 24 rows and 81 columns, and rstd (7 * 1944,).

        LayerNorm takes off a mean, which is linear, and divides by sigma. So a pair's score, in bits, and its values are
        the sum of its three rows of the table, times its rstd, 1 / sigma; and sigma follows from inner products.
        """
        x = torch.cat([self.wte.weight, self.wre.weight, self.wce.weight])
        x = x - x.mean(1, keepdim=True)
        dots = x @ x.T / self.config.n_embd
        c, r, k = (slice(*ends) for ends in itertools.pairwise(EMBEDDINGS))
        squares = dots.diagonal()
        of_row = squares[r] + 2 * dots[c, r]  # (7, 24)
        of_column = squares[c, None] + 2 * dots[c, k]  # (7, 81)
        variance = of_row.unsqueeze(2) + of_column.unsqueeze(1) + (squares[k] + 2 * dots[r, k])  # (7, 24, 81)
        return self.project(x), self.rstd(variance)

    def project(self, x):
        """Embeddings (n, C) without their mean -> (n, 1 + D, H), what they add to score and values, before LayerNorm's 1 / sigma."""
        block, C, H = self.blocks[0], self.config.n_embd, self.config.n_head
        w_q, w_k, w_v = block.attn.c_attn.weight.view(3, H, C // H, C)
        q = w_q @ block.ln_1(self.last_embedding()) * (math.log2(math.e) / math.sqrt(C // H))  # (H, D)
        scores = (q.unsqueeze(1) @ w_k).transpose(0, 1)  # (1, H, C): q.(W_k x) = (W_k' q).x, no keys needed
        weights = torch.cat([scores, w_v.transpose(0, 1)]).flatten(0, 1) * block.ln_1.weight  # ((1 + D) * H, C)
        return (x @ weights.T).view(len(x), -1, H)

    def rstd(self, variance):
        return (variance + self.blocks[0].ln_1.eps).rsqrt().flatten()

    def last_embedding(self):
        return self.wte.weight[NEWLINE] + self.wre.weight[-1] + self.wce.weight[-1]

    def after_attention(self, y):
        """Attention outputs of the last position, (B, D, H) -> (B, C): the rest of the block and the final LayerNorm."""
        block = self.blocks[0]
        x = self.last_embedding() + block.attn.c_proj(y.transpose(1, 2).flatten(1))
        return self.ln_f(x + block.mlp(block.ln_2(x)))


def set_threads(n_layer):
    """One thread for one layer on the CPU: its kernels are small. A second gained 25 % alone, and lost 70 % beside one other
    busy process. OMP_NUM_THREADS overrules."""
    if n_layer == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def sinusoids(n, C):
    """(n, C): sines and cosines of wavelengths from 2 pi to 4 n, spaced geometrically."""
    rates = torch.logspace(0, math.log10(2 * math.pi / (4 * n)), C // 4)
    angles = torch.arange(n).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(n, C // 2)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# One layer: pages share their lines
#
# The last position reads the page with one query, the same for every page, so keys and values depend on (character,
# position) alone. And a softmax splits over parts of a page: a part has, per head, a reference m and the sums
# Z = (sum of 2^(s-m), sum of 2^(s-m) v), and parts with one reference combine by adding their Z. A page is 24 lines of 9
# pieces of 9 characters. Most lines and pieces stand on many pages of a batch; each distinct one is computed once.
#
# References are whole numbers and scores are in bits, so that changing a reference multiplies Z by a power of two, which
# rounds nothing. One reference for the whole batch is fastest, and good while the largest scores of its pages lie within
# HEADROOM - LEAST = 176 bits. Heads that spread further give every part its own, as flash attention does (Dao et al. 2022).

HEADROOM = 86  # bits that the sums may rise above 1: float32 ends at 2^128, and values and 1944 terms need room too
LEAST = -90  # below 2^-90 a page's sum could miss what float32 rounded to zero, below 2^-126


def bag_sums(rows, index, offsets=None):
    """Sums rows (K, 1 + D, H) over each row of index (n, J), or over each run of index that begins at offsets (n,)."""
    return F.embedding_bag(index, rows.flatten(1), offsets, mode="sum").view(-1, *rows.shape[1:])


def leaves(table, rstd, embeddings, far):
    """Pairs as parts: `pair_table`'s factors of P pairs, embeddings (P, 3) -> rows (P, 1 + D, H), their sums of the table;
    weights 2^(s - m) (P, H); Z (P, 1 + D, H); and references m, one for all or, where they lie far apart, for each."""
    rows, rstd = bag_sums(table, embeddings), rstd.unsqueeze(1)
    scores = rows[:, 0] * rstd
    whole = scores.ceil()
    m = whole if far else whole.max(0).values - HEADROOM  # three times as fast as amax(0)
    weights = torch.exp2(scores - whole) * torch.exp2(whole - m)  # in two factors m rounds nothing
    Z = rows * (weights * rstd).unsqueeze(1)
    Z[:, 0] = weights
    return rows, weights, Z, m


def rescaled_sums(m, Z, children):
    """Parts m (K, H), Z (K, 1 + D, H) -> the wholes of `children` (n, J), each with the largest reference of its parts:
    m (n, H), Z (n, 1 + D, H), and the powers of two that took the parts there (n, J, H)."""
    n, J = children.shape
    flat = children.flatten()
    parts = m.index_select(0, flat).view(n, J, -1)
    m = parts.amax(1)
    powers = torch.exp2(parts - m.unsqueeze(1))
    rows = Z.flatten(1).index_select(0, flat).view(n, J, *Z.shape[1:]).mul_(powers.unsqueeze(2))
    return m, bag_sums(rows.flatten(0, 1), torch.arange(n * J, device=Z.device).view(n, J)), powers


class SharedAttention(torch.autograd.Function):
    """Softmax attention of the last position on each page of a `Tree`, with one reference or rescaling every part.

    table (112, 1 + D, H), rstd (7 * 1944,) as `GPT.pair_table` has them -> y (B, D, H), and the sums (B, H) that divided
    it. y does not depend on the references, so they are constants to the gradient; Z is linear in the parts, and the
    gradient walks down the same tree.
    """

    @staticmethod
    def forward(ctx, table, rstd, tree, far):
        scale = rstd.index_select(0, tree.pairs)
        rows, weights, leaf, m = leaves(table, scale, tree.embeddings.children, far)
        ctx.tree, ctx.powers, ctx.pairs, Z = tree, [], len(rstd), leaf
        for part in tree.levels:
            if far:
                m, Z, powers = rescaled_sums(m, Z, part.children)
            else:
                Z, powers = bag_sums(Z, part.children), None
            ctx.powers.append(powers)
        sums = Z[:, 0].clamp_min(2.0**LEAST)
        y = Z[:, 1:] / sums.unsqueeze(1)
        ctx.save_for_backward(scale.unsqueeze(1), rows[:, 0], weights, leaf, sums, y)
        ctx.mark_non_differentiable(sums)
        return y, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        scale, row_scores, weights, leaf, sums, y = ctx.saved_tensors
        dZ = torch.cat([-(dy * y).sum(1, keepdim=True), dy], dim=1) / sums.unsqueeze(1)
        for part, powers in zip(reversed(ctx.tree.levels), reversed(ctx.powers)):
            if powers is None:
                dZ = bag_sums(dZ, part.parents, part.offsets)
            else:
                dZ = bag_sums((dZ.unsqueeze(1) * powers.unsqueeze(2)).flatten(0, 1), part.order, part.offsets)
        # leaf = (w, rows * w * scale), w = 2^(row_scores * scale - m)
        of_values = sum((dZ[:, 1:] * leaf[:, 1:]).unbind(1))  # (P, H), three times as fast as sum(1)
        dscores = math.log(2) * (of_values + dZ[:, 0] * weights)
        dscale = (dscores * row_scores + of_values / scale).sum(1)
        drows = dZ.mul_((weights * scale).unsqueeze(1))
        drows[:, 0] = dscores * scale
        embeddings = ctx.tree.embeddings
        drstd = dscale.new_zeros(ctx.pairs).index_copy_(0, ctx.tree.pairs, dscale)
        return bag_sums(drows, embeddings.parents, embeddings.offsets), drstd, None, None


def shared_attention(table, rstd, tree):
    """`SharedAttention`, rescaled for the heads that need it -> (B, D, H)."""
    y, sums = SharedAttention.apply(table, rstd, tree, False)
    far = (sums <= 2.0**LEAST).any(0).nonzero().flatten()
    if len(far):
        y = y.index_copy(2, far, SharedAttention.apply(table[:, :, far], rstd, tree, True)[0])
    return y


def line_attention(table, rstd, lines):
    """`shared_attention` of `Lines` -> (B, D, H). Every line has its own reference."""
    n_character, device = len(CHARACTERS), rstd.device
    of_character, of_rows, of_column = table.split([n_character, ROWS, COLUMNS])
    chosen = (lines.characters.unsqueeze(2) == torch.arange(n_character, device=device)).to(rstd.dtype)  # (L, 81, 7)
    row = (lines.rows.unsqueeze(1) == torch.arange(ROWS, device=device)).to(rstd.dtype)  # (L, 24)
    of_row = (row @ of_rows.flatten(1)).view(-1, *table.shape[1:])  # (L, 1 + D, H)
    of_places = row @ rstd.view(n_character, ROWS, COLUMNS).permute(1, 2, 0).flatten(1)  # (L, 81 * 7)
    scale = (chosen * of_places.view_as(chosen)).sum(2, keepdim=True)  # (L, 81, 1)
    scores = (chosen @ of_character[:, 0] + of_row[:, :1] + of_column[:, 0]) * scale  # (L, 81, H), in bits
    m = scores.detach().amax(1)
    weights = torch.exp2(scores - m.unsqueeze(1))
    scaled = weights * scale
    by_character = torch.einsum("lth,ltc->lch", scaled, chosen)  # the sum of values is linear in the table's rows
    values = torch.einsum("lch,cdh->ldh", by_character, of_character[:, 1:]) + torch.einsum("lth,tdh->ldh", scaled, of_column[:, 1:])
    values = values + scaled.sum(1).unsqueeze(1) * of_row[:, 1:]
    of_lines = torch.cat([weights.sum(1).unsqueeze(1), values], dim=1)  # Z of each line, (L, 1 + D, H)
    numbers = lines.pages.flatten()
    m = m.index_select(0, numbers).unflatten(0, (-1, ROWS))  # (B, 24, H)
    powers = torch.exp2(m - m.amax(1, keepdim=True))
    Z = (of_lines.index_select(0, numbers).unflatten(0, (-1, ROWS)) * powers.unsqueeze(2)).sum(1)
    return Z[:, 1:] / Z[:, :1]


# ---------------------------------------------------------------------------------------------------------------------
# More layers: pages share their beginnings
#
# Attention is causal: what a block computes at a position depends on the text up to there. So pages that begin alike share
# all work up to their first difference. Each distinct beginning is computed once, section by section; the queries of its last
# section attend to the keys and values of its path, as language model servers share prompts (Zheng et al. 2024,
# RadixAttention), here with gradients. Each path has a copy of its keys and values, which takes two to three times the memory
# that they take unshared; all else takes less.


class Paths(torch.autograd.Function):
    """rows (K, W) -> for each level, the rows of its children, (n * J, W). The gradient sums the runs of a row, in order."""

    @staticmethod
    def forward(ctx, rows, levels):
        ctx.rows, ctx.levels = len(rows), levels
        return tuple(rows.index_select(0, level.children.flatten()) for level in levels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        total = gradients[0].new_zeros(ctx.rows, gradients[0].size(1))
        for level, d in zip(ctx.levels, gradients):
            total[: len(level.offsets)] += F.embedding_bag(level.order, d, level.offsets, mode="sum")
        return total, None


def prefix_attention(q, kv, n_head, levels):
    """Queries (n, T, C) of the last T positions of each beginning, keys and values (K, SECTION, 2C) of all -> (n, T, C)."""
    queries, paths = q.split([len(level.children) for level in levels]), Paths.apply(kv.flatten(1), levels)
    return torch.cat([causal_attention(q, path.view(len(q), -1, kv.size(2)), n_head) for q, path in zip(queries, paths)])


# ---------------------------------------------------------------------------------------------------------------------
# Readers


class PageReader:
    """Reads pages while the weights stand still, as in a rollout or an evaluation.

    `encode` numbers the lines of a batch of pages, calling the reader with these numbers gives logits and values, and
    `batch` makes of any such numbers what the model itself reads, with gradients.
    """

    neighbours = 8  # pages that begin alike and stay together in minibatches: 16 leave 6 % fewer tokens, 4 leave 10 % more

    def __init__(self, model):
        self.model, self.index = model, LineIndex()

    def encode(self, tokens):
        """(B, 1944) uint8 tokens -> (B, 24) int64 array."""
        return self.index.encode(tokens)

    def batch(self, numbers):
        return self.index.prefix_tree(numbers, self.model.device)

    @torch.no_grad()
    def __call__(self, numbers):
        """(B, 24) numbers of lines -> logits (B, A), values (B,)."""
        return self.model(self.batch(numbers))


class LineReader(PageReader):
    """The same for one layer: each distinct line is summed once."""

    neighbours = 1

    @torch.no_grad()
    def __init__(self, model):
        super().__init__(model)
        table, rstd = model.pair_table()
        _, _, Z, m = leaves(table, rstd, torch.from_numpy(PAIRS).to(model.device), far=True)
        self.pairs = m, Z
        rows = lambda x: Rows(*x.shape[1:], dtype=x.dtype, device=x.device)
        self.pieces, self.lines = (rows(m), rows(Z)), (rows(m), rows(Z))
        self.near, self.reference = rows(Z), None  # lines again, with one reference for all

    def batch(self, numbers):
        return self.index.tree(numbers, self.model.device)

    @torch.no_grad()
    def __call__(self, numbers):
        """(B, 24) numbers of lines -> logits (B, A), values (B,)."""
        if len(self.index.lines) > self.near.n:
            self.read_new_lines()
        numbers = torch.from_numpy(numbers).to(self.model.device)
        Z = bag_sums(self.near(), numbers)
        if (Z[:, 0] <= 2.0**LEAST).any():
            _, Z, _ = rescaled_sums(*[rows() for rows in self.lines], numbers)
        return self.model.heads(self.model.after_attention(Z[:, 1:] / Z[:, :1]))

    def read_new_lines(self):
        self.extend(self.pieces, self.pairs, self.index.piece_pairs)
        self.extend(self.lines, [rows() for rows in self.pieces], self.index.line_pieces)
        m, Z = (rows() for rows in self.lines)
        n = self.near.n
        reference = m[n:].max(0).values - HEADROOM
        if n == 0:
            self.reference = reference
        elif (reference > self.reference).any():
            self.reference, n, self.near.n = torch.maximum(reference, self.reference), 0, 0
        self.near.append(Z[n:] * torch.exp2(m[n:] - self.reference).unsqueeze(1))

    def extend(self, parts, below, children):
        """Sums the parts that `children` has gained since the last call."""
        new = children()[parts[0].n :]
        if len(new):
            for rows, x in zip(parts, rescaled_sums(*below, new.to(self.model.device))):
                rows.append(x)
