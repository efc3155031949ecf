"""Sums over bags of rows, by which results that are computed once for each line get to all pages with that line.

As in `torch.nn.EmbeddingBag`, a bag is a list of indices of rows. For example, a page is a bag of lines. Here two pages
of two lines each have line 1 in common. The sum of a page is over its lines, and the gradient of a line is the sum of
the gradients of its pages:

>>> pages = make_bags(np.array([[0, 1], [1, 2]]), num_members=3)
>>> lines = torch.tensor([[10.0], [20.0], [30.0]])  # what was computed for each line, here one number
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
    """n bags of J members each.

    Gradients need the opposite: for each member, the bags that have it. These are `bag_of`, cut at `offsets`.
    """

    members: torch.Tensor  # (n, J) indices
    order: torch.Tensor  # (n * J,) the positions in members.flatten(), sorted by the member that is there
    bag_of: torch.Tensor  # (n * J,) the bag to which each of these positions belongs
    offsets: torch.Tensor  # (number of members,) where the positions of each member begin in `order` and `bag_of`


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


def bag_sums(rows, indices, offsets=None):
    """Sum the rows (K, ...) of each bag, and return (n, ...).

    Bag i has the rows indices[i] if indices is (n, J). With offsets (n,) it has the rows indices[offsets[i] :
    offsets[i + 1]].
    """
    return F.embedding_bag(indices, rows.flatten(1), offsets, mode="sum").view(-1, *rows.shape[1:])
