"""Sums over bags: the operation with which work on shared parts of pages reaches the pages.

As in `torch.nn.EmbeddingBag`, a bag is a list of indices of rows. A line of a page, for example, is a bag of pieces,
and a page is a bag of lines: whatever was computed for a line once is added up on every page that has the line.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Bags(NamedTuple):
    """n bags of J members each, and the same sorted by member for gradients, which add up over the bags of a member."""

    members: torch.Tensor  # (n, J) indices
    order: torch.Tensor  # (n * J,) positions in members.flatten(), sorted by member
    bag_of: torch.Tensor  # (n * J,) the bag at each position in `order`
    offsets: torch.Tensor  # (number of members,) where each member begins in `order` and `bag_of`


def make_bags(members, num_members, device="cpu"):
    """Return the `Bags` of an int64 array of indices below num_members, (n, J)."""
    if num_members <= 2**8:
        dtype = np.uint8
    elif num_members <= 2**16:
        dtype = np.uint16
    else:
        dtype = np.int32
    flat = members.ravel().astype(dtype)  # NumPy sorts integers of up to 16 bits by radix, which is much faster
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=num_members)
    arrays = members, order, order // members.shape[1], np.cumsum(counts) - counts
    return Bags(*(torch.from_numpy(x).to(device) for x in arrays))


def bag_sums(rows, bags, offsets=None):
    """Sum the rows (K, ...) of each bag, and return (n, ...).

    Bag i holds the indices bags[i] if bags is (n, J), or else bags[offsets[i] : offsets[i + 1]].
    """
    return F.embedding_bag(bags, rows.flatten(1), offsets, mode="sum").view(-1, *rows.shape[1:])
