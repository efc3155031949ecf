"""Sums over bags of rows: how what is computed once for a part of pages gets to all pages that have the part.

As in `torch.nn.EmbeddingBag`, a bag is a list of indices of rows. For example, a page is a bag of lines. Here two pages
of two lines have line 1 in common. The result for a page is a sum over its lines, and the gradient of a line is a sum
over its pages:

>>> pages = make_bags(np.array([[0, 1], [1, 2]]), num_members=3)
>>> lines = torch.tensor([[10.0], [20.0], [30.0]])
>>> bag_sums(lines, pages.members).flatten()
tensor([30., 50.])
>>> gradients = torch.tensor([[1.0], [7.0]])  # of the pages
>>> bag_sums(gradients, pages.bag_of, pages.offsets).flatten()
tensor([1., 8., 7.])
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Bags(NamedTuple):
    """n bags of J members each; and for gradients, which are sums over all bags of a member, the same by member."""

    members: torch.Tensor  # (n, J) indices
    order: torch.Tensor  # (n * J,) positions in members.flatten(), sorted by member
    bag_of: torch.Tensor  # (n * J,) the bag at each position in `order`
    offsets: torch.Tensor  # (number of members,) where each member begins in `order` and `bag_of`


def make_bags(members, num_members, device="cpu"):
    """Return the `Bags` whose members are an int64 array of indices below num_members, (n, J)."""
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
