"""Pages become pictures, and pictures become gifs that show the same."""

import weakref

import numpy as np
import pytest
from helpers import status_in
from PIL import Image

from breakout_ascii import BreakoutAsciiVec, to_image
from viewer.drawing import page_drawer, with_status, write_gif


def test_to_image():
    tokens, _ = BreakoutAsciiVec(3).reset(seed=0)
    images = to_image(tokens)
    assert images.shape == (3, 264, 480, 3) and images.dtype == np.uint8
    assert (images[1] == to_image(tokens[1])).all()
    cells = images[0].reshape(24, 11, 80, 6, 3).swapaxes(1, 2)  # (24, 80, 11, 6, 3)
    assert (cells[21, 40] == 255).any() and not cells[15, 40].any()  # the ball is white, nothing is black
    brightest = cells.max((2, 3))  # (24, 80, 3)
    assert len({tuple(brightest[row, 1]) for row in range(5, 12)}) == 7
    assert (brightest[0] == brightest[23]).all() and len(set(map(tuple, brightest[0]))) == 1
    assert (cells[5, 1] == cells[5, 7]).all() and (cells[5, 1] != cells[5, 2]).any()  # characters can be told apart


@pytest.mark.parametrize("tokens", [np.zeros((2, 2, 1944), np.uint8), np.zeros(1944, np.uint8)])
def test_only_pages_have_pictures(tokens):
    with pytest.raises(ValueError, match="tokens must"):
        to_image(tokens)


@pytest.mark.parametrize("rows, columns, factor", [(1, 8, 4), (16, 27, 2), (24, 81, 1), (50, 133, 1), (60, 5, 1)])
def test_any_page_has_a_picture(rows, columns, factor):
    """Every character is drawn as the same glyph wherever it is, and a small page larger."""
    rng = np.random.default_rng(0)
    page = rng.integers(32, 127, (rows, columns), np.uint8)
    page[:, -1] = ord("\n")
    page[0, 0] = ord("<")
    picture = page_drawer(rows, columns, {"<": (1, 2, 250)})(page.reshape(-1))
    assert picture.shape == (11 * rows * factor, 6 * (columns - 1) * factor, 3) and picture.dtype == np.uint8
    assert (picture == picture[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)).all()
    cells = picture[::factor, ::factor].reshape(rows, 11, columns - 1, 6, 3).swapaxes(1, 2)
    seen = {}
    for code, cell in zip(page[:, :-1].ravel(), cells.reshape(-1, 11, 6, 3)):
        np.testing.assert_array_equal(cell, seen.setdefault(code, cell))
    assert len({cell.tobytes() for cell in seen.values()}) == len(seen)
    assert {tuple(dot) for dot in cells[0, 0].reshape(-1, 3)} == {(24, 24, 24), (1, 2, 250)}


@pytest.mark.parametrize(
    "width, factor, whole", [(168, 1, 196), (312, 1, 312), (387, 1, 387), (388, 2, 388), (480, 2, 480)]
)
def test_a_status_line_stands_under_every_picture(width, factor, whole):
    """Large where there is room; a narrow picture is made wider. Nothing above it changes, and no size ever does."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 11, width, 3), np.uint8)
    lines = ["score 0      step 1".ljust(32), "score 1,234  step 2", "score 1".ljust(32, "."), "x" * 40]
    for picture, line, shown in zip(pictures, lines, with_status(iter(pictures), iter(lines)), strict=True):
        assert shown.shape == (11 + 11 * factor + 8, whole, 3) and shown.dtype == np.uint8
        np.testing.assert_array_equal(shown[:11, :width], picture)
        assert not shown[:11, width:].any()
        assert status_in(shown) == (line[:32].rstrip(), factor)


def decoded(path):
    """Return the pictures of a gif, and how many milliseconds each is shown."""
    pictures = []
    durations = []
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            pictures.append(np.array(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    return pictures, durations


def test_a_gif_shows_exactly_what_it_was_given(tmp_path):
    """The pictures have new colours late, single pixels at the edges, and 255 colours. Some repeat, and one returns."""
    rng = np.random.default_rng(0)
    still = np.full((9, 31, 3), 7, np.uint8)
    dot = still.copy()
    dot[4, 5] = 255, 0, 1
    corner = still.copy()
    corner[8, 30] = 0, 3, 255
    noise = [rng.integers(0, 256, (255, 3), np.uint8)[rng.integers(0, 255, (9, 31))] for _ in range(5)]
    pictures = [still, still, dot, corner, *noise, still, corner, corner, corner]
    write_gif(tmp_path / "x.gif", iter(pictures), 20)
    shown, durations = decoded(tmp_path / "x.gif")
    assert durations == [40, *[20] * 8, 60]
    for given, read in zip(pictures[1:-2], shown, strict=True):
        np.testing.assert_array_equal(given, read)


def test_a_gif_of_more_colours_than_it_can_hold_is_close(tmp_path):
    y, x = np.mgrid[:64, :64]
    pictures = [np.stack([4 * y, 4 * x, 0 * x + blue], 2).astype(np.uint8) for blue in (0, 90)]
    write_gif(tmp_path / "x.gif", pictures, 100)
    for given, read in zip(pictures, decoded(tmp_path / "x.gif")[0], strict=True):
        assert np.abs(given.astype(int) - read).max() <= 32


def test_a_gif_keeps_no_picture(tmp_path):
    """Only the present picture and its neighbours are in memory. All earlier ones are in the file already."""
    alive = weakref.WeakSet()
    most = 0  # pictures that were alive at once
    written = []  # the size of the file whenever a picture was made
    rng = np.random.default_rng(0)

    class Picture(np.ndarray):
        """An array with a hash, which a WeakSet needs."""

        __hash__ = object.__hash__

    def pictures():
        nonlocal most
        noise = None
        for i in range(100):
            noise = rng.integers(0, 256, (64, 64, 3), np.uint8) if i % 2 == 0 else noise
            picture = noise.copy().view(Picture)
            alive.add(picture)
            most = max(most, len(alive))
            written.append((tmp_path / "x.gif").stat().st_size)
            yield picture

    write_gif(tmp_path / "x.gif", pictures(), 20)
    whole = (tmp_path / "x.gif").stat().st_size
    assert most <= 4 and written[50] == pytest.approx(whole / 2, rel=0.2)
    assert decoded(tmp_path / "x.gif")[1] == [40] * 50


def test_a_picture_may_stay_longer_than_a_frame_can(tmp_path):
    """A gif counts the hundredths of a second of a frame in two bytes, up to 11 minutes. This picture stays for 20."""
    picture = np.full((3, 3, 3), 9, np.uint8)
    write_gif(tmp_path / "x.gif", (picture for _ in range(30_000)), 40)
    assert sum(decoded(tmp_path / "x.gif")[1]) == 30_000 * 40
