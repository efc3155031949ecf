"""Measures where a GPT looks: the attention of the last position in the last block, on a page and over a game."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from model import GPT

PAGES_AT_ONCE = 32  # whose keys take 16 MB
MEASURED = 500  # pages, which are enough to measure shares of attention


class Things(NamedTuple):
    """What there is on the pages of a game, to say what a head looks at."""

    names: Sequence[str]
    wholes: Sequence[str]  # of each thing the whole that it is a part of, as the paddle's left end is of the paddle
    on: Callable  # from pages (n, tokens) to the index of each token's thing, (n, tokens) int


def plain_gpt(policy):
    """Return a GPT of model.py, on the CPU, with the weights of a GPT of any class."""
    gpt = GPT(policy.config)
    gpt.load_state_dict(policy.state_dict())
    return gpt.eval()


@torch.no_grad()
def attention(gpt, tokens):
    """Return the attention weights of a plain GPT on pages (B, T) uint8.

    Returns:
        (B, H, T) float32: how much each head looks at each token; the weights of a head add up to 1.
    """
    x = gpt.embed(gpt.encode(tokens))
    for block in gpt.blocks[:-1]:
        x = block(x)
    block = gpt.blocks[-1]
    q, k, _ = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, gpt.config.n_head, -1)).unbind(2)  # (B, T, H, D) each
    scores = torch.einsum("bhd,bthd->bht", q[:, -1], k) / q.shape[-1] ** 0.5
    return scores.softmax(-1)


def attention_of_pages(gpt, pages):
    """Yield the `attention` on each page, an array (H, T). pages: an array (n, T), or an iterator over pages."""
    pages = iter(pages)
    while batch := list(itertools.islice(pages, PAGES_AT_ONCE)):
        yield from attention(gpt, np.stack(batch)).numpy()


def evenly_spaced(pages):
    """Return at most MEASURED of the pages (n, T), evenly spaced."""
    return pages[:: -(-len(pages) // MEASURED)]


def attention_shares(gpt, pages, things):
    """Measure the share of its attention that each head gives to each of the `Things`, over all pages (n, T).

    Returns:
        (H, things) float64; each row adds up to 1.
    """
    number = len(things.names)
    total = np.zeros((gpt.config.n_head, number))
    for weights, thing in zip(attention_of_pages(gpt, pages), things.on(pages)):
        total += np.stack([np.bincount(thing, head, number) for head in weights])
    return total / len(pages)


def main_thing(shares, things):
    """Return what a head looks at most, and its share of the attention, such as ("ball", 0.97).

    The parts of a whole, such as the paddle, count as one.

    Args:
        shares: (things,), a row of `attention_shares`.
    """
    share_of = dict.fromkeys(things.wholes, 0.0)
    for whole, share in zip(things.wholes, shares):
        share_of[whole] += share
    return max(share_of.items(), key=lambda item: item[1])


def order_of_heads(shares, things):
    """Return the heads of shares (H, things), those that look at the first thing first, such as the ball, and so on.

    Among heads that look at the same thing, the most attentive is first.
    """
    wholes = list(dict.fromkeys(things.wholes))
    main_things = [main_thing(of_head, things) for of_head in shares]

    def rank(head):
        thing, share = main_things[head]
        return wholes.index(thing), -share

    return sorted(range(len(shares)), key=rank)
