"""Measures where a GPT looks: the attention of the last position in the last block, on a page and over a game."""

import itertools

import numpy as np
import torch

from model import GPT

PAGES_AT_ONCE = 32  # whose keys take 16 MB
MEASURED = 500  # pages, which are enough to measure shares of attention
THINGS = (
    "ball", "paddle's left end", "paddle's middle", "paddle's right end", "bricks", "walls", "empty space", "line ends",
)  # fmt: skip
PADDLE_THINGS = THINGS[1:4]


def plain_gpt(policy):
    """Return a GPT of model.py, on the CPU, with the weights of a GPT of any class."""
    gpt = GPT(policy.config)
    gpt.load_state_dict(policy.state_dict())
    return gpt.eval()


@torch.no_grad()
def attention(gpt, tokens):
    """Return the attention weights of a plain GPT on pages (B, 1944) uint8.

    Returns:
        (B, H, 1944) float32: how much each head looks at each token; the weights of a head add up to 1.
    """
    x = gpt.embed(gpt.encode(tokens))
    for block in gpt.blocks[:-1]:
        x = block(x)
    block = gpt.blocks[-1]
    q, k, _ = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, gpt.config.n_head, -1)).unbind(2)  # (B, T, H, D) each
    scores = torch.einsum("bhd,bthd->bht", q[:, -1], k) / q.shape[-1] ** 0.5
    return scores.softmax(-1)


def attention_of_pages(gpt, pages):
    """Yield the `attention` on each page, an array (H, 1944). pages: an array (n, 1944), or an iterator over pages."""
    pages = iter(pages)
    while batch := list(itertools.islice(pages, PAGES_AT_ONCE)):
        yield from attention(gpt, np.stack(batch)).numpy()


def things_on(pages):
    """Return for each token of pages (n, 1944) the index of its thing in THINGS, (n, 1944) int."""
    paddle = pages == ord("=")
    left = paddle & (np.cumsum(paddle, 1) == 1)
    right = paddle & (np.cumsum(paddle[:, ::-1], 1)[:, ::-1] == 1)
    masks = [  # in the order of THINGS, without the last one, the line ends
        pages == ord("O"),
        left,
        paddle & ~left & ~right,
        right,
        np.isin(pages, (ord("|"), ord("_"))),
        pages == ord("#"),
        pages == ord(" "),
    ]
    return np.select(masks, range(len(masks)), default=len(masks))


def evenly_spaced(pages):
    """Return at most MEASURED of the pages (n, 1944), evenly spaced."""
    return pages[:: -(-len(pages) // MEASURED)]


def attention_shares(gpt, pages):
    """Measure the share of its attention that each head gives to each of THINGS, over all pages (n, 1944).

    Returns:
        (H, things) float64; each row adds up to 1.
    """
    total = np.zeros((gpt.config.n_head, len(THINGS)))
    for weights, things in zip(attention_of_pages(gpt, pages), things_on(pages)):
        total += np.stack([np.bincount(things, head, len(THINGS)) for head in weights])
    return total / len(pages)


def main_thing(shares):
    """Return the thing that a head looks at most, and its share of the attention, such as ("ball", 0.97).

    The parts of the paddle count as one thing.

    Args:
        shares: (things,), a row of `attention_shares`.
    """
    share_of = {"paddle": sum(shares[THINGS.index(thing)] for thing in PADDLE_THINGS)}
    share_of |= {thing: share for thing, share in zip(THINGS, shares) if thing not in PADDLE_THINGS}
    return max(share_of.items(), key=lambda item: item[1])


def order_of_heads(shares):
    """Return the heads of shares (H, things), those that look at the ball first, then those that look at the paddle,
    and so on. Among heads that look at the same thing, the most attentive is first."""
    things = ["ball", "paddle", *THINGS[4:]]
    main_things = [main_thing(of_head) for of_head in shares]

    def rank(head):
        thing, share = main_things[head]
        return things.index(thing), -share

    return sorted(range(len(shares)), key=rank)
