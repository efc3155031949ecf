"""Pictures of pages, and gifs of pictures."""

import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.GifImagePlugin import getdata, getheader

PALETTE = 255  # colours that a frame of a gif can bring, beside the one that means "as before"
LONGEST_MS = 600_000  # that a frame of a gif may stay; the format ends at 655,350


def glyph_atlas(ink, paper):
    """The picture of every ASCII character in every row of a page.

    Args:
        ink, paper: (rows, 128, 3) uint8 RGB, the colours of each character and of what is behind it, row by row.

    Returns:
        (rows, 11, 128, 6, 3) uint8: row of the page, line of the glyph, character, dot in the line, RGB.
    """
    font = ImageFont.load_default_imagefont()  # every glyph is 6 wide and 11 high
    dots = np.zeros((11, 128, 6, 1), bool)
    for code in range(33, 127):
        glyph = Image.new("1", (6, 11))
        ImageDraw.Draw(glyph).text((0, 0), chr(code), fill=1, font=font)
        dots[:, code, :, 0] = glyph
    return np.where(dots, ink[:, None, :, None], paper[:, None, :, None])


def draw_pages(pages, atlas):
    """Pages (..., rows, columns) of ASCII codes, a `glyph_atlas` -> pictures (..., 11 * rows, 6 * columns, 3) uint8 RGB."""
    *shape, rows, columns = pages.shape
    dots = atlas[
        np.arange(rows)[:, None, None], np.arange(11)[:, None], pages[..., None, :]
    ]  # (..., rows, 11, columns, 6, 3)
    return dots.reshape(*shape, rows * 11, columns * 6, 3)


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
