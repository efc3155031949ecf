"""The pictures of pages."""

import numpy as np
import pytest

from breakout_ascii import BreakoutAsciiVec
from drawing import to_image


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
