"""What one layer allows: scores and values of attention can be tabulated.

The last character of a page is always the same newline, so its query is the same on every page. The keys and values of one layer
depend on a character and its position alone. So does the score of a pair (character, position), and attention becomes a weighted
mean over 1944 of 7 * 1944 pairs, whose scores and values are computed once for all pages.
"""

import math

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS

NEWLINE = CHARACTERS.index("\n")
OFFSETS = 0, len(CHARACTERS), len(CHARACTERS) + ROWS  # where characters, rows and columns start among the embeddings,
NUM_EMBEDDINGS = len(CHARACTERS) + ROWS + COLUMNS  # 112 in all
# (7 * 1944, 3): the embeddings of each pair character * 1944 + position
PAIRS = np.stack([x.ravel() for x in np.indices((len(CHARACTERS), ROWS, COLUMNS))], 1) + np.array(OFFSETS)


def pair_table(gpt):
    """Scores and values of all pairs, in factors, for H heads of size D: T (112, 1 + D, H) and rstd (7 * 1944,).

    With x = wte[c] + wre[r] + wce[k], all without their means, LayerNorm gives x * rstd * weight. Keys and values are linear in
    that, so the score (row 0, in bits, for exp2 is cheaper than exp) and the values (rows 1..D) of a pair are (T[c] + T[r] +
    T[k]) * rstd.
    """
    block, C, H = gpt.blocks[0], gpt.config.n_embd, gpt.config.n_head
    x = torch.cat([gpt.wte.weight, gpt.wre.weight, gpt.wce.weight])
    x = x - x.mean(1, keepdim=True)
    dots = x @ x.T / C
    char, row, col = slice(0, OFFSETS[1]), slice(OFFSETS[1], OFFSETS[2]), slice(OFFSETS[2], NUM_EMBEDDINGS)
    squares = dots.diagonal()
    of_row = squares[row] + 2 * dots[char, row]  # (7, 24)
    of_column = squares[char, None] + 2 * dots[char, col]  # (7, 81)
    variance = of_row.unsqueeze(2) + of_column.unsqueeze(1) + (squares[col] + 2 * dots[row, col])  # (7, 24, 81)
    rstd = (variance + block.ln_1.eps).rsqrt().flatten()

    w_q, w_k, w_v = block.attn.c_attn.weight.view(3, H, C // H, C)
    q = w_q @ block.ln_1(last_embedding(gpt)) * (math.log2(math.e) / math.sqrt(C // H))  # (H, D)
    w_score = (q.unsqueeze(1) @ w_k).transpose(0, 1)  # (1, H, C): q.(W_k x) = (W_k' q).x, no keys needed
    weights = torch.cat([w_score, w_v.transpose(0, 1)]).flatten(0, 1) * block.ln_1.weight  # ((1 + D) * H, C)
    return (x @ weights.T).view(len(x), -1, H), rstd


def last_embedding(gpt):
    """(C,): of the last position, the newline that ends a page."""
    return gpt.wte.weight[NEWLINE] + gpt.wre.weight[-1] + gpt.wce.weight[-1]


def after_attention(gpt, y):
    """Attention outputs of the last position, (B, D, H) -> (B, C): the rest of the block and the final LayerNorm."""
    block = gpt.blocks[0]
    x = last_embedding(gpt) + block.attn.c_proj(y.transpose(1, 2).flatten(1))
    return gpt.ln_f(x + block.mlp(block.ln_2(x)))
