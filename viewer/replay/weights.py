"""Writes the weights of a model as text, which is short where they may be rounded.

Each row of a matrix is written as whole numbers, in units of its largest weight: two letters of base64 for each weight,
which are 12 bits, or three, 18 bits. The second is as good as float32 for everything that a page shows.
"""

import string

import numpy as np
import torch

LETTERS = np.frombuffer((string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/").encode(), np.uint8)


def written(weights, letters):
    """Write a tensor as text.

    Args:
        weights: a tensor (..., n); a row has n weights.
        letters: how many letters each weight takes.

    Returns:
        the text, and the largest weight of each row, without its sign, a list of floats. In a row whose largest weight
        is x, a weight is its number in base 64, less half of 64 ** letters, times x / (64 ** letters / 2 - 1).
    """
    rows, largest = whole_numbers(weights, letters)
    places = 64 ** np.arange(letters)[::-1]
    digits = (rows + 64**letters // 2)[..., None] // places % 64
    return LETTERS[digits].tobytes().decode(), largest[:, 0].tolist()


def rounded(policy, letters):
    """Round the weights of a policy, in place, to what `written` writes."""
    state = policy.state_dict()
    for weights in state.values():
        rows, largest = whole_numbers(weights, letters)
        weights.copy_(torch.from_numpy((rows * (largest / most(letters))).reshape(weights.shape)))
    policy.load_state_dict(state)


def most(letters):
    """Return the largest number that so many letters can write, and its opposite, too."""
    return 64**letters // 2 - 1


def whole_numbers(weights, letters):
    """Return the rows of a tensor as whole numbers (rows, n), and the largest weight of each, (rows, 1), as written."""
    rows = weights.detach().cpu().double().numpy().reshape(-1, weights.shape[-1])
    # With so many digits the largest weight becomes the largest number, no more, and still does if it is rounded again.
    short = np.vectorize(lambda weight: float(f"{weight:.{2 * letters + 1}g}"), otypes=[float])
    largest = short(np.abs(rows).max(1, keepdims=True))
    units = np.where(largest > 0, largest, 1) / most(letters)
    return np.round(rows / units).astype(np.int64), largest
