"""Pictures of pages, for gifs and for render_mode="rgb_array". Colours are for people: a page, which is all that an agent
sees, has none."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from breakout_ascii import BRICK_ROWS, BRICK_TOP, CHARACTERS, COLUMNS, ROWS, check_tokens

BRICK_COLOURS = [(232, 80, 80), (226, 120, 64), (214, 154, 58), (206, 196, 70),
                 (92, 190, 96), (74, 170, 200), (104, 120, 240)]  # top row first, RGB
COLOURS = {"#": (140, 140, 140), "=": (230, 110, 200), "O": (255, 255, 255)}


@functools.cache
def glyph_atlas():
    """-> (24, 11, 128, 6, 3) uint8: row of the page, line of the glyph, character, dot in the line, RGB."""
    font = ImageFont.load_default_imagefont()  # every glyph is 6 wide and 11 high
    atlas = np.zeros((ROWS, 11, 128, 6, 3), np.uint8)
    for character in CHARACTERS.strip():
        glyph = Image.new("1", (6, 11))
        ImageDraw.Draw(glyph).text((0, 0), character, fill=1, font=font)
        ink = np.array(glyph)[..., None]  # (11, 6, 1)
        for row in range(ROWS):
            brick_row = np.clip(row - BRICK_TOP, 0, BRICK_ROWS - 1)
            colour = np.uint8(COLOURS.get(character, BRICK_COLOURS[brick_row]))
            paper = 0 * colour if character == "O" else colour // 4  # things are solid, yet their characters legible
            atlas[row, :, ord(character)] = np.where(ink, colour, paper)
    return atlas


def to_image(tokens):
    """tokens (1944,) -> (264, 480, 3) uint8 RGB, or (B, 1944) -> (B, 264, 480, 3). Raises ValueError for non-pages."""
    tokens = check_tokens(tokens, (1, 2))
    pages = tokens.reshape(-1, ROWS, 1, COLUMNS)[..., :-1]  # (B, 24, 1, 80): newlines are not drawn
    dots = glyph_atlas()[np.arange(ROWS)[:, None, None], np.arange(11)[:, None], pages]  # (B, 24, 11, 80, 6, 3)
    return dots.reshape(*tokens.shape[:-1], ROWS * 11, (COLUMNS - 1) * 6, 3)
