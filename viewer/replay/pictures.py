"""Draws pages with the attention of a head as heat behind the characters, as pictures for gif and mp4."""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from breakout_ascii import COLUMNS, ROWS, TOKENS, to_image
from viewer.replay.attention import attention_of_pages, attention_shares, evenly_spaced, main_thing

HOT = np.array([255, 140, 0])  # RGB of a weight of 1; the page itself is grey
LABEL_HEIGHT = 14  # pixels
LABELLED_BY = 1000  # so many pages at the start of a replay decide what the label says about a head
# Pixels of the picture of a page: 264 and 480. A character is 11 high and 6 wide.
HEIGHT = 11 * ROWS
WIDTH = 6 * (COLUMNS - 1)


def attention_pictures(gpt, frames, head=None):
    """Yield an RGB picture for each of the frames of a replay, with the attention of one head or, side by side, of all.

    Args:
        gpt: a plain GPT.
        frames: an iterable of `Frame`.
        head: the number of the head; None for all heads, at half the size.
    """
    if head is None:
        heads = range(gpt.config.n_head)
        smaller = 2  # the factor by which a page is smaller
        ink = 255  # at half the size no character becomes black
    else:
        heads = [head]
        smaller = 1
        ink = 90
    pages = (frame.page for frame in frames)
    first_pages = list(itertools.islice(pages, LABELLED_BY))
    labels = head_labels(gpt, np.stack(first_pages), heads, WIDTH // smaller)
    pages, pages_again = itertools.tee(itertools.chain(first_pages, pages))
    rows = np.arange(0, HEIGHT // smaller * smaller, smaller) // 11  # of the page, for each row of pixels
    columns = np.arange(0, WIDTH, smaller) // 6
    for page, weights in zip(pages, attention_of_pages(gpt, pages_again)):
        grey = grey_picture(page, smaller)
        tiles = []
        for i, label in zip(heads, labels):
            heat = heat_of(weights[i])[rows][:, columns]
            tiles.append(np.concatenate([label, heated(grey, heat, ink)]))
        yield side_by_side(tiles)


def head_labels(gpt, pages, heads, width):
    """Return a label for each of the heads, with its number and its main thing on these pages.

    Each label is a picture (LABEL_HEIGHT, width, 3) uint8.
    """
    shares = attention_shares(gpt, evenly_spaced(pages))
    labels = []
    for head in heads:
        thing, share = main_thing(shares[head])
        image = Image.new("RGB", (width, LABEL_HEIGHT))
        text = f"head {head}: {thing} {100 * share:.0f} %"
        ImageDraw.Draw(image).text((4, 1), text, fill=(220, 220, 220), font=ImageFont.load_default_imagefont())
        labels.append(np.array(image))
    return labels


def grey_picture(page, smaller):
    """Return the picture of a page (1944,) in grey, (HEIGHT / smaller, WIDTH / smaller, 1) uint8."""
    whole = to_image(page).max(2)[: HEIGHT // smaller * smaller]  # a last row of pixels that has no partner is left out
    brightest = whole.reshape(HEIGHT // smaller, smaller, WIDTH // smaller, smaller)
    return brightest.max((1, 3))[..., None] // 4 * 3  # the brightest pixel is kept, so that thin strokes are


def heat_of(weights):
    """Return the heat of each character, (24, 80, 1) from 0 to 1, for attention weights (1944,) that add up to 1.

    It is the logarithm of the weight, scaled to be 1 for a weight of 1, and 0 where the weight is the mean or less. So
    the scale is the same for all pages and heads.
    """
    heat = 1 + np.log(np.maximum(weights, 1e-12)) / math.log(TOKENS)
    return np.clip(heat, 0, 1).reshape(ROWS, COLUMNS)[:, :-1, None]


def heated(grey, heat, ink):
    """Return a picture (H, W, 3) uint8 of a grey picture (H, W, 1) with its heat (H, W, 1).

    Pixels that are brighter than `ink` become black where it is hot.
    """
    return np.where((grey > ink) & (heat > 0.5), 0, np.maximum(grey, heat * HOT)).astype(np.uint8)


def side_by_side(tiles):
    """Return pictures of one size as one picture, in as many columns as rows or one more. The rest is black."""
    across = math.ceil(math.sqrt(len(tiles)))
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    rows = [np.concatenate(tiles[i : i + across], axis=1) for i in range(0, len(tiles), across)]
    return np.concatenate(rows)
