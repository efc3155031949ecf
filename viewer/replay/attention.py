"""Where a GPT looks: the attention of its last position, in its last block, and what that amounts to over a game."""

import itertools

import numpy as np
import torch

from model import GPT

PAGES_AT_ONCE = 32  # their keys take 16 MB
MEASURED = 500
THINGS = (
    "ball",
    "paddle's left end",
    "paddle's middle",
    "paddle's right end",
    "bricks",
    "walls",
    "empty space",
    "line ends",
)
PADDLE_THINGS = THINGS[1:4]


def plain_gpt(policy):
    """A GPT of any class -> one of model.py, with the same weights, on the CPU."""
    gpt = GPT(policy.config)
    gpt.load_state_dict(policy.state_dict())
    return gpt.eval()


@torch.no_grad()
def attention(gpt, tokens):
    """A plain GPT; pages (B, 1944) uint8 -> (B, H, 1944) float32: the weight of each token, which add up to 1 for each head."""
    x = gpt.embed(gpt.encode(tokens))
    for block in gpt.blocks[:-1]:
        x = block(x)
    block = gpt.blocks[-1]
    q, k, _ = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, gpt.config.n_head, -1)).unbind(2)  # (B, T, H, D) each
    scores = torch.einsum("bhd,bthd->bht", q[:, -1], k) / q.shape[-1] ** 0.5
    return scores.softmax(-1)


def attention_of_pages(gpt, pages):
    """Yields `attention` of each page, an array (H, 1944). pages: an array (n, 1944), or an iterator over pages of any number."""
    pages = iter(pages)
    while batch := list(itertools.islice(pages, PAGES_AT_ONCE)):
        yield from attention(gpt, np.stack(batch)).numpy()


def things_on(pages):
    """(n, 1944) uint8 -> (n, 1944): which of THINGS each token belongs to."""
    paddle = pages == ord("=")
    left = paddle & (np.cumsum(paddle, 1) == 1)
    right = paddle & (np.cumsum(paddle[:, ::-1], 1)[:, ::-1] == 1)
    seen = [
        pages == ord("O"),
        left,
        paddle & ~left & ~right,
        right,
        np.isin(pages, (ord("|"), ord("_"))),
        pages == ord("#"),
        pages == ord(" "),
    ]
    return np.select(seen, range(len(seen)), len(seen))


def spread(pages):
    """(n, 1944) -> at most MEASURED of them, spread over the game: enough to measure `shares`."""
    return pages[:: -(-len(pages) // MEASURED)]


def shares(gpt, pages):
    """How much of its attention each head gives to each of THINGS, over all pages (n, 1944) -> (H, things), rows add up to 1."""
    total = np.zeros((gpt.config.n_head, len(THINGS)))
    for weights, things in zip(attention_of_pages(gpt, pages), things_on(pages)):
        total += np.stack([np.bincount(things, head, len(THINGS)) for head in weights])
    return total / len(pages)


def name_of(head_shares):
    """The shares (things,) of a head -> what it looks at most, the paddle taken as one, and that share: "ball", 0.97."""
    whole = {"paddle": sum(head_shares[THINGS.index(thing)] for thing in PADDLE_THINGS)}
    whole |= {thing: share for thing, share in zip(THINGS, head_shares) if thing not in PADDLE_THINGS}
    return max(whole.items(), key=lambda item: item[1])


def sort_heads(all_shares):
    """Shares (H, things) -> heads in the order of what they look at, as THINGS are ordered, the most attentive first."""
    order = ["ball", "paddle", *THINGS[4:]]
    named = [name_of(head_shares) for head_shares in all_shares]
    return sorted(range(len(named)), key=lambda head: (order.index(named[head][0]), -named[head][1]))
