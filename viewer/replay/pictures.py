"""Draws pages with the attention of a head as heat behind the characters, as pictures for gif and mp4."""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from viewer.drawing import padded
from viewer.replay.attention import attention_of_pages, attention_shares, evenly_spaced, main_thing
from viewer.replay.kinds import kind_of

HOT = np.array([255, 140, 0])  # RGB of a weight of 1; the page itself is grey
LABEL_HEIGHT = 14  # pixels
LABELLED_BY = 1000  # so many pages at the start of a replay decide what the label says about a head
NARROWEST = 150  # pixels, the least width of a picture, which a label needs


def attention_pictures(gpt, frames, game, head=None):
    """Yield an RGB picture for each of the pages of a replay, with the attention of one head or, side by side, of all.

    Args:
        gpt: a plain GPT.
        frames: an iterable of objects that have a page, such as `Frame`.
        game: a `Game`.
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
    kind = kind_of(game)
    draw = kind.drawer(game)
    pages = (frame.page for frame in frames)
    first_pages = list(itertools.islice(pages, LABELLED_BY))
    width = max(NARROWEST, draw(first_pages[0]).shape[1] // smaller + (kind.GAP if head is None else 0))
    labels = head_labels(gpt, np.stack(first_pages), kind, heads, width)
    pages, pages_again = itertools.tee(itertools.chain(first_pages, pages))
    for page, weights in zip(pages, attention_of_pages(gpt, pages_again)):
        grey = grey_picture(draw(page), smaller)
        tiles = []
        for i, label in zip(heads, labels):
            heat = heat_of(weights[i], game, grey.shape)
            tiles.append(np.concatenate([label, padded(heated(grey, heat, ink), width)]))
        yield side_by_side(tiles)


def head_labels(gpt, pages, kind, heads, width):
    """Return a label for each of the heads, with its number and its main thing on these pages.

    Each label is a picture (LABEL_HEIGHT, width, 3) uint8.
    """
    things = kind.things_of(pages)
    shares = attention_shares(gpt, evenly_spaced(pages), things)
    labels = []
    for head in heads:
        thing, share = main_thing(shares[head], things)
        image = Image.new("RGB", (width, LABEL_HEIGHT))
        text = f"head {head}: {thing} {100 * share:.0f} %"
        ImageDraw.Draw(image).text((4, 1), text, fill=(220, 220, 220), font=ImageFont.load_default_imagefont())
        labels.append(np.array(image))
    return labels


def grey_picture(picture, smaller):
    """Return a picture (H, W, 3) in grey, and smaller by this factor, (H / smaller, W / smaller, 1) uint8."""
    height, width = (size // smaller for size in picture.shape[:2])  # pixels at the edges without partners are left out
    whole = picture[: height * smaller, : width * smaller].max(2)
    brightest = whole.reshape(height, smaller, width, smaller)
    return brightest.max((1, 3))[..., None] // 4 * 3  # the brightest pixel is kept, so that thin strokes are


def heat_of(weights, game, shape):
    """Return the heat of each pixel, (H, W, 1) from 0 to 1, for attention weights (T,) that add up to 1.

    It is the logarithm of the weight, scaled to be 1 for a weight of 1, and 0 where the weight is the mean or less. So
    the scale is the same for all pages and heads.

    Args:
        shape: of the picture of a page, (H, W, 1).
    """
    height, width, _ = shape
    heat = 1 + np.log(np.maximum(weights, 1e-12)) / math.log(len(weights))
    cells = np.clip(heat, 0, 1).reshape(game.rows, game.columns)[:, :-1, None]
    row = np.arange(height)[:, None] * game.rows // height
    column = np.arange(width) * (game.columns - 1) // width
    return cells[row, column]


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
