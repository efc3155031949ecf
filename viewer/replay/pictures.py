"""Pages with the attention of a head as heat behind the characters, as pictures for gif and mp4."""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from breakout_ascii import COLUMNS, ROWS, TOKENS, to_image
from viewer.replay.attention import attention_of_pages, name_of, shares, spread

HOT = np.array([255, 140, 0])  # RGB, of a weight of 1; the page itself is grey
LABEL = 14  # height of the line that names a head
NAMED_BY = 1000  # pages, the first ones: what a head looks at on them names it


def heat(weights):
    """Weights (1944,), which add up to 1 -> (24, 80, 1), 0 to 1: the logarithm of each, from what all tokens would get if a head did not
    care. So the scale is the same on all pages and for all heads."""
    return np.clip(1 + np.log(np.maximum(weights, 1e-12)) / math.log(TOKENS), 0, 1).reshape(ROWS, COLUMNS)[:, :-1, None]


def pictures(gpt, frames, head=None):
    """A plain GPT, an iterable of the frames of a replay -> yields RGB pictures: all heads side by side, or one, each named by what it
    looks at most."""
    pages = (frame.page for frame in frames)
    first = list(itertools.islice(pages, NAMED_BY))
    pages, read = itertools.tee(itertools.chain(first, pages))
    heads, smaller = (range(gpt.config.n_head), 2) if head is None else ([head], 1)
    names = [name_of(head_shares) for head_shares in shares(gpt, spread(np.stack(first)))]
    labels = [label(f"head {i}: {names[i][0]} {100 * names[i][1]:.0f} %", 480 // smaller) for i in heads]
    across = math.ceil(math.sqrt(len(heads)))
    rows, columns = (
        np.arange(0, 264, smaller) // 11,
        np.arange(0, 480, smaller) // 6,
    )  # of the page, for each line and dot
    for page, weights in zip(pages, attention_of_pages(gpt, read)):
        # the brightest of four dots stays, so that thin strokes do
        image = to_image(page).max(2).reshape(len(rows), smaller, len(columns), smaller).max((1, 3))[..., None] // 4 * 3
        tiles = [
            np.concatenate([name, heated(image, heat(weights[i])[rows][:, columns], ink=255 if head is None else 90)])
            for i, name in zip(heads, labels)
        ]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % across)
        yield np.concatenate([np.concatenate(tiles[i : i + across], 1) for i in range(0, len(tiles), across)])


def heated(image, heat, ink):
    """A grey picture (H, W, 1) and its heat (H, W, 1) -> (H, W, 3) uint8. What is brighter than ink is black where it is hot."""
    return np.where((image > ink) & (heat > 0.5), 0, np.maximum(image, heat * HOT)).astype(np.uint8)


def label(text, width):
    """-> (LABEL, width, 3) uint8."""
    image = Image.new("RGB", (width, LABEL))
    ImageDraw.Draw(image).text((4, 1), text, fill=(220, 220, 220), font=ImageFont.load_default_imagefont())
    return np.array(image)
