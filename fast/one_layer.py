"""What one layer allows: the last position asks every page the same question, so the answers can be tabulated.

The last character of a page is always the same newline, so its query is the same on every page. The keys and values of one
layer depend on a character and its position alone. So does the score of a pair (character, position), and attention becomes
a weighted mean over 1944 of 7 * 1944 pairs whose scores and values can be computed once for all pages.
"""

import itertools
import math

import numpy as np

import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS

NEWLINE = CHARACTERS.index("\n")
EMBEDDINGS = 0, len(CHARACTERS), len(CHARACTERS) + ROWS, len(CHARACTERS) + ROWS + COLUMNS  # characters, rows, columns
# (7 * 1944, 3): the three embeddings, counted as in EMBEDDINGS, of each pair character * 1944 + position
PAIRS = np.stack([x.ravel() for x in np.indices((len(CHARACTERS), ROWS, COLUMNS))], 1) + np.array(EMBEDDINGS[:-1])


def pair_table(gpt):
    """Score and values of every pair, in factors: table (112, 1 + D, H) of the 7 characters, 24 rows and 81 columns, and rstd
    (7 * 1944,), for H heads of size D.

    A pair's score, in bits, and its D values are the sum of three rows of the table, times its rstd. For LayerNorm takes off a
    mean, which is linear, and divides by a standard deviation, which follows from the inner products of the embeddings.
    """
    x = torch.cat([gpt.wte.weight, gpt.wre.weight, gpt.wce.weight])
    x = x - x.mean(1, keepdim=True)
    dots = x @ x.T / gpt.config.n_embd
    c, r, k = (slice(*ends) for ends in itertools.pairwise(EMBEDDINGS))
    squares = dots.diagonal()
    of_row = squares[r] + 2 * dots[c, r]  # (7, 24)
    of_column = squares[c, None] + 2 * dots[c, k]  # (7, 81)
    variance = of_row.unsqueeze(2) + of_column.unsqueeze(1) + (squares[k] + 2 * dots[r, k])  # (7, 24, 81)
    rstd = (variance + gpt.blocks[0].ln_1.eps).rsqrt().flatten()

    block, C, H = gpt.blocks[0], gpt.config.n_embd, gpt.config.n_head
    w_q, w_k, w_v = block.attn.c_attn.weight.view(3, H, C // H, C)
    q = w_q @ block.ln_1(last_embedding(gpt)) * (math.log2(math.e) / math.sqrt(C // H))  # (H, D)
    scores = (q.unsqueeze(1) @ w_k).transpose(0, 1)  # (1, H, C): q.(W_k x) = (W_k' q).x, no keys needed
    weights = torch.cat([scores, w_v.transpose(0, 1)]).flatten(0, 1) * block.ln_1.weight  # ((1 + D) * H, C)
    return (x @ weights.T).view(len(x), -1, H), rstd


def last_embedding(gpt):
    """(C,): the newline that ends a page."""
    return gpt.wte.weight[NEWLINE] + gpt.wre.weight[-1] + gpt.wce.weight[-1]


def after_attention(gpt, y):
    """Attention outputs of the last position, (B, D, H) -> (B, C): the rest of the block and the final LayerNorm."""
    block = gpt.blocks[0]
    x = last_embedding(gpt) + block.attn.c_proj(y.transpose(1, 2).flatten(1))
    return gpt.ln_f(x + block.mlp(block.ln_2(x)))
