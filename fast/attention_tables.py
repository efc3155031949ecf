"""Tables from which the attention of a GPT of one layer can be looked up.

Only the last position of a page is read. It always holds the same newline, so its query is the same on every page. In
the first layer, keys and values depend only on a character and its position, and so does the score. There are 7 * 1944
such pairs of a character and a position, and a page is 1944 of them. So scores and values are computed once for all
pairs, and attention is a weighted mean over the pairs of a page.
"""

import math

import numpy as np
import torch

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS

NEWLINE = CHARACTERS.index("\n")
# One table has the embeddings of all characters, then of all rows from FIRST_ROW on, then of all columns.
FIRST_ROW = len(CHARACTERS)
FIRST_COLUMN = FIRST_ROW + ROWS
NUM_EMBEDDINGS = FIRST_COLUMN + COLUMNS  # 112
# (7 * 1944, 3): for each pair the indices of its three embeddings. The id of a pair is character * 1944 + position.
PAIRS = np.stack(np.unravel_index(np.arange(len(CHARACTERS) * TOKENS), (len(CHARACTERS), ROWS, COLUMNS)), axis=1)
PAIRS += [0, FIRST_ROW, FIRST_COLUMN]


def pair_table(gpt):
    """Compute a small table, from which follow the scores and values of all pairs.

    The input x of a pair is the sum of three embeddings, those of its character, row and column. LayerNorm subtracts
    the mean, which can be done for each embedding beforehand, and multiplies by a weight and by rstd, 1 over the
    standard deviation of x. Scores and values are linear in the result. So the score and the value of a pair are the
    sum of three rows of the table, times rstd.

    Returns:
        table  (112, 1 + D, H)  for each embedding and head the score, and then the D numbers of the value. Scores are
                                in bits, that is for exp2, which is cheaper than exp
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
