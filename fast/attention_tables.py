"""Tables of the scores and values of attention, which a GPT of one layer allows.

The last character of a page is always the same newline, so its query is the same on every page. In one layer, keys and
values depend only on a character and its position, and so does the score. Attention is therefore a weighted mean over
1944 of the 7 * 1944 pairs of a character and a position, and scores and values of all pairs are computed once for all
pages.
"""

import math

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS

NEWLINE = CHARACTERS.index("\n")
# The embeddings of characters, rows and columns in one table:
FIRST_ROW = len(CHARACTERS)
FIRST_COLUMN = FIRST_ROW + ROWS
NUM_EMBEDDINGS = FIRST_COLUMN + COLUMNS  # 112
# (7 * 1944, 3): the three embeddings of each pair, whose number is character * 1944 + position
PAIRS = np.stack([x.ravel() for x in np.indices((len(CHARACTERS), ROWS, COLUMNS))], 1) + [0, FIRST_ROW, FIRST_COLUMN]


def pair_table(gpt):
    """Compute a small table and the factors rstd, from which follow the scores and values of all pairs.

    LayerNorm makes x * rstd * weight of a pair, where x is the sum of the embeddings of its character, row and column,
    each less its mean, and rstd is 1 over the standard deviation of x. Scores and values are linear in that. So the
    score and the value of a pair are the sum of three rows of the table, times rstd.

    Returns:
        table  (112, 1 + D, H)  for each embedding and head the score, in bits because exp2 is cheaper than exp, and
                                then the D numbers of the value
        rstd   (7 * 1944,)      for each pair
    """
    block = gpt.blocks[0]
    C = gpt.config.n_embd
    H = gpt.config.n_head
    x = torch.cat([gpt.wte.weight, gpt.wre.weight, gpt.wce.weight])
    x = x - x.mean(1, keepdim=True)
    rstd = pair_rstd(x @ x.T / C, block.ln_1.eps)
    w_q, w_k, w_v = block.attn.c_attn.weight.view(3, H, C // H, C)
    q = w_q @ block.ln_1(last_embedding(gpt)) * (math.log2(math.e) / math.sqrt(C // H))  # (H, D)
    w_score = (q.unsqueeze(1) @ w_k).transpose(0, 1)  # (1, H, C): q.(W_k x) = (W_k' q).x, so no key is computed
    weights = torch.cat([w_score, w_v.transpose(0, 1)]).flatten(0, 1) * block.ln_1.weight  # ((1 + D) * H, C)
    return (x @ weights.T).view(len(x), -1, H), rstd


def pair_rstd(dots, eps):
    """Compute LayerNorm's reciprocal standard deviation for the sum of embeddings of each pair.

    Args: dots (112, 112), the covariances of the embeddings, from which follows the variance of a sum of three.
    Returns: (7 * 1944,).
    """
    char = slice(FIRST_ROW)
    row = slice(FIRST_ROW, FIRST_COLUMN)
    col = slice(FIRST_COLUMN, NUM_EMBEDDINGS)
    variances = dots.diagonal()
    of_row = variances[row] + 2 * dots[char, row]  # (7, 24)
    of_column = variances[char, None] + 2 * dots[char, col]  # (7, 81)
    of_both = variances[col] + 2 * dots[row, col]  # (24, 81)
    variance = of_row.unsqueeze(2) + of_column.unsqueeze(1) + of_both  # (7, 24, 81)
    return (variance + eps).rsqrt().flatten()


def last_embedding(gpt):
    """Return the embedding (C,) of the newline that ends a page, the position whose query is used."""
    return gpt.wte.weight[NEWLINE] + gpt.wre.weight[-1] + gpt.wce.weight[-1]


def features_from_attention(gpt, y):
    """Compute the rest of the block and the final LayerNorm at the last position.

    Args: y (B, D, H), the output of attention there.
    Returns: features (B, C).
    """
    block = gpt.blocks[0]
    x = last_embedding(gpt) + block.attn.c_proj(y.transpose(1, 2).flatten(1))
    return gpt.ln_f(x + block.mlp(block.ln_2(x)))
