"""Tables from which the attention of a GPT of one layer can be looked up.

Only the last position of a page is read. If it holds the same character on every page, such as a newline, its query
is always the same. In the first layer, keys and values depend only on a character and its position, and so does the
score. Breakout has 7 * 1944 such pairs of a character and a position, and a page is 1944 of them. So the score and the
value of a pair are computed once, and attention is a weighted mean over the pairs of a page.

The id of a pair is character * tokens + position. One table has the embeddings of all characters, then of all rows,
then of all columns: 7 + 24 + 81 = 112.
"""

import math

import numpy as np
import torch


def num_embeddings(config):
    return len(config.characters) + config.rows + config.columns


def embeddings_of_pairs(pairs, config):
    """Return for each pair, given by its id (P,), the indices of its three embeddings, (P, 3)."""
    num_characters = len(config.characters)
    indices = np.stack(np.unravel_index(pairs, (num_characters, config.rows, config.columns)), axis=1)
    return indices + [0, num_characters, num_characters + config.rows]


def pair_table(gpt, last_character):
    """Compute a small table, from which follow the scores and values of all pairs.

    The input x of a pair is the sum of three embeddings, those of its character, row and column. LayerNorm subtracts
    the mean, which can be done for each embedding beforehand, and multiplies by a weight and by rstd, 1 over the
    standard deviation of x. Scores and values are linear in the result. So the score and the value of a pair are the
    sum of three rows of the table, times rstd.

    Args:
        last_character: the index of the character that ends every page.

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
    rstd = pair_rstd(x @ x.T / C, block.ln_1.eps, gpt.config)
    w_q, w_k, w_v = block.attn.c_attn.weight.view(3, H, C // H, C)
    q = w_q @ block.ln_1(last_embedding(gpt, last_character)) * (math.log2(math.e) / math.sqrt(C // H))  # (H, D)
    w_score = (q.unsqueeze(1) @ w_k).transpose(0, 1)  # (1, H, C): q.(W_k x) = (W_k' q).x, so no key is computed
    weights = torch.cat([w_score, w_v.transpose(0, 1)]).flatten(0, 1) * block.ln_1.weight  # ((1 + D) * H, C)
    return (x @ weights.T).view(len(x), -1, H), rstd


def pair_rstd(dots, eps, config):
    """Compute LayerNorm's reciprocal standard deviation for the sum of embeddings of each pair.

    Args: dots (112, 112), the covariances of the embeddings, from which follows the variance of a sum of three.
    Returns: (7 * 1944,).
    """
    first_row = len(config.characters)
    first_column = first_row + config.rows
    char = slice(first_row)
    row = slice(first_row, first_column)
    col = slice(first_column, len(dots))
    variances = dots.diagonal()
    of_row = variances[row] + 2 * dots[char, row]  # (7, 24)
    of_column = variances[char, None] + 2 * dots[char, col]  # (7, 81)
    of_both = variances[col] + 2 * dots[row, col]  # (24, 81)
    variance = of_row.unsqueeze(2) + of_column.unsqueeze(1) + of_both  # (7, 24, 81)
    return (variance + eps).rsqrt().flatten()


def last_embedding(gpt, last_character):
    """Return the embedding (C,) of the character that ends a page, at the position whose query is used."""
    return gpt.wte.weight[last_character] + gpt.wre.weight[-1] + gpt.wce.weight[-1]


def features_from_attention(gpt, y, last_character):
    """Compute the rest of the block and the final LayerNorm at the last position.

    Args:
        y: (B, D, H), the output of attention there.
        last_character: the index of the character that ends every page.

    Returns:
        features (B, C).
    """
    block = gpt.blocks[0]
    x = last_embedding(gpt, last_character) + block.attn.c_proj(y.transpose(1, 2).flatten(1))
    return gpt.ln_f(x + block.mlp(block.ln_2(x)))
