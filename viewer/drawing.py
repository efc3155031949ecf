"""Draws pages as pictures, and writes pictures as gifs."""

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.GifImagePlugin import getdata, getheader

PAPER = (24, 24, 24)  # RGB
WHITE = (235, 235, 235)
GREY = (150, 150, 150)
LARGEST = 4  # the factor by which a small page is enlarged at most,
LARGE = 400, 480  # as long as it has no more pixels than these, in height and in width
MARGIN = 4  # pixels around a status line
PALETTE = 255  # colours in a frame of a gif; the 256th means "as before"
LONGEST_MS = 600_000  # a frame of a gif stays at most so long; the format allows 655,350


def glyph_atlas(ink, paper):
    """Draw every ASCII character in the colours that it has in each row of a page.

    Args:
        ink, paper: (rows, 128, 3) uint8 RGB, the colours of each character and of its background, row by row.

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
    """Return pictures (..., 11 * rows, 6 * columns, 3) uint8 RGB of pages (..., rows, columns) of ASCII codes.

    atlas: from `glyph_atlas`, for so many rows, or for one that is like all others.
    """
    *shape, rows, columns = pages.shape
    row = np.arange(rows)[:, None, None] % len(atlas)
    line = np.arange(11)[:, None]
    dots = atlas[row, line, pages[..., None, :]]  # (..., rows, 11, columns, 6, 3)
    return dots.reshape(*shape, rows * 11, columns * 6, 3)


def page_drawer(rows, columns, colours):
    """Return a function that draws a page (rows * columns,) of ASCII codes, as a picture (H, W, 3) uint8 RGB.

    Newlines, in the last column, are not drawn. Small pages are drawn larger, by a whole factor.

    Args:
        colours: {character: (red, green, blue)}; letters and digits are otherwise white, all else is grey.
    """
    ink = np.full((1, 128, 3), GREY, np.uint8)
    ink[:, list((string.ascii_letters + string.digits + "@").encode())] = WHITE
    for character, colour in colours.items():
        ink[:, ord(character)] = colour
    atlas = glyph_atlas(ink, np.full_like(ink, PAPER))
    factor = max(1, min(LARGEST, LARGE[0] // (11 * rows), LARGE[1] // (6 * columns)))

    def draw(page):
        picture = draw_pages(page.reshape(rows, columns)[:, :-1], atlas)
        return picture.repeat(factor, 0).repeat(factor, 1)

    return draw


def with_status(pictures, lines):
    """Yield each picture with a line of text under it.

    The text is drawn twice as large as a terminal's where a picture has room for that, and a picture that has no room
    even for small text is made wider.

    Args:
        pictures: an iterable of arrays (H, W, 3) uint8 RGB, all of one size.
        lines: an iterable of as many str. What is longer than the first one is cut off there, so that all pictures
            remain of one size.
    """
    ink = np.full((1, 128, 3), WHITE, np.uint8)
    atlas = glyph_atlas(ink, np.zeros_like(ink))
    columns = None
    for picture, line in zip(pictures, lines, strict=True):
        columns = columns or len(line)
        text = draw_pages(np.frombuffer(line.ljust(columns)[:columns].encode(), np.uint8)[None], atlas)
        factor = 2 if picture.shape[1] >= MARGIN + 2 * text.shape[1] else 1
        status = np.pad(text.repeat(factor, 0).repeat(factor, 1), ((MARGIN, MARGIN), (MARGIN, 0), (0, 0)))
        width = max(picture.shape[1], status.shape[1])
        yield np.concatenate([padded(picture, width), padded(status, width)])


def padded(picture, width):
    """Return a picture with black at its right, so that it is so wide."""
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)))


def write_gif(path, pictures, frame_ms):
    """Write pictures as a gif that plays for ever.

    Each frame is written as soon as the next picture differs from it, and holds only the pixels that have changed since
    the frame before. So memory does not grow with the number of pictures, as it does in the writers of Pillow and
    imageio.

    Args:
        pictures: an iterable of at least one array (H, W, 3) uint8 RGB; a new array each, all of one size.
        frame_ms: how long each picture is shown, a multiple of 10, because a gif counts hundredths of a second.
            Browsers slow down what is below 20.
    """
    before = None  # from which every pixel of the first picture differs
    with open(path, "wb") as file:
        for picture, duration in with_durations(pictures, frame_ms):
            red, green, blue = np.moveaxis(picture != before, 2, 0)
            changed = red | green | blue  # four times as fast as any(2)
            changed[0, 0] |= not changed.any()  # a frame needs a pixel, even if nothing has moved for LONGEST_MS
            colours, indices = palette_of(picture[changed])
            frame = np.full(changed.shape, len(colours), np.uint8)  # the colour after the last one means "as before"
            frame[changed] = indices
            rows = np.flatnonzero(changed.any(1))
            columns = np.flatnonzero(changed.any(0))
            top = int(rows[0])
            left = int(columns[0])
            image = Image.fromarray(frame[top : rows[-1] + 1, left : columns[-1] + 1])
            image.putpalette(colours.tobytes() + b"\0\0\0")
            if before is None:
                file.writelines(getheader(image, info={"loop": 0})[0])
            options = {"duration": duration, "transparency": len(colours), "include_color_table": True}
            file.writelines(getdata(image, (left, top), **options))
            before = picture
        file.write(b";")  # the end of a gif


def with_durations(pictures, frame_ms):
    """Yield each picture that differs from the one before, and the milliseconds for which it stays.

    A picture that stays longer than LONGEST_MS is yielded several times.
    """
    shown = None
    duration = 0
    for picture in pictures:
        if duration and duration + frame_ms <= LONGEST_MS and np.array_equal(picture, shown):
            duration += frame_ms
        else:
            if duration:
                yield shown, duration
            shown = picture
            duration = frame_ms
    yield shown, duration


def palette_of(pixels):
    """Return at most PALETTE colours for pixels (K, 3) uint8, and the index of each pixel's colour, (K,).

    Only if the pixels have more colours than that does a pixel get another colour, a similar one.
    """
    colours, indices = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_inverse=True)
    if len(colours) > PALETTE:
        image = Image.fromarray(pixels[None]).quantize(PALETTE)
        return np.uint8(image.getpalette()).reshape(-1, 3)[:PALETTE], np.asarray(image)[0]
    return np.uint8(colours[:, None] >> [16, 8, 0] & 255), indices
