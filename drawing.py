"""Pictures of pages, for gifs and for render_mode="rgb_array", and the gifs. Colours are for people: a page, which is all that
an agent sees, has none."""

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.GifImagePlugin import getdata, getheader

from breakout_ascii import BRICK_ROWS, BRICK_TOP, CHARACTERS, COLUMNS, ROWS, check_tokens

BRICK_COLOURS = [
    (232, 80, 80),
    (226, 120, 64),
    (214, 154, 58),
    (206, 196, 70),
    (92, 190, 96),
    (74, 170, 200),
    (104, 120, 240),
]  # top row first, RGB
COLOURS = {"#": (140, 140, 140), "=": (230, 110, 200), "O": (255, 255, 255)}

PALETTE = 255  # colours that a frame of a gif can bring, beside the one that means "as before"
LONGEST_MS = 600_000  # that a frame of a gif may stay; the format ends at 655,350


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


def write_gif(path, pictures, frame_ms):
    """Write pictures as a gif that plays for ever.

    Every frame is written as soon as the picture after it differs, and holds only what has changed since the frame before. So memory
    does not grow with the number of pictures, as it does in Pillow's and imageio's own writers.

    Args:
        pictures: an iterable of at least one array (H, W, 3) uint8 RGB, each a new one, all of one size.
        frame_ms: how long each is shown, a multiple of 10, because a gif counts hundredths of a second; browsers slow down below 20.
    """
    before = None  # every pixel differs from that
    with open(path, "wb") as file:
        for picture, duration in with_durations(pictures, frame_ms):
            red, green, blue = np.moveaxis(picture != before, 2, 0)
            changed = red | green | blue  # four times as fast as any(2)
            changed[0, 0] |= not changed.any()  # nothing moved for LONGEST_MS
            colours, indices = palette_of(picture[changed])
            frame = np.full(changed.shape, len(colours), np.uint8)  # the colour after the last: as before
            frame[changed] = indices
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            top, left = int(rows[0]), int(columns[0])
            image = Image.fromarray(frame[top : rows[-1] + 1, left : columns[-1] + 1])
            image.putpalette(colours.tobytes() + b"\0\0\0")
            if before is None:
                file.writelines(getheader(image, info={"loop": 0})[0])
            its_own = {"duration": duration, "transparency": len(colours), "include_color_table": True}
            file.writelines(getdata(image, (left, top), **its_own))
            before = picture
        file.write(b";")  # the end of a gif


def with_durations(pictures, frame_ms):
    """Yields each picture that differs from the one before, and how many milliseconds it stays, at most LONGEST_MS."""

    def look(numbered):
        number, picture = numbered
        return number * frame_ms // LONGEST_MS, picture.tobytes()

    for _, alike in itertools.groupby(enumerate(pictures), look):
        _, picture = next(alike)
        yield picture, frame_ms * (1 + sum(1 for _ in alike))


def palette_of(pixels):
    """Pixels (K, 3) uint8 -> their colours (at most PALETTE, 3) uint8, and the index of each pixel's, (K,). Exact, if there are no more."""
    colours, indices = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_inverse=True)
    if len(colours) > PALETTE:
        image = Image.fromarray(pixels[None]).quantize(PALETTE)
        return np.uint8(image.getpalette()).reshape(-1, 3)[:PALETTE], np.asarray(image)[0]
    return np.uint8(colours[:, None] >> [16, 8, 0] & 255), indices
