"""Faults in numbers: damaged files and kills at random moments. They take long, and run with --faults."""

import random
from pathlib import Path

import pytest

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from test_checkpoint import example, same

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.faults


def damaged(data, rng):
    """-> data with some bits flipped, an end cut off, two stretches swapped, or a stretch of zeros."""
    data, kind, length = bytearray(data), rng.choice(["flips", "cut", "swap", "zeros"]), rng.choice([1, 8, 64, 1000])
    i, j = (rng.randrange(len(data) - length) for _ in range(2))
    if kind == "flips":
        for place in rng.choices(range(len(data)), k=rng.choice([1, 1, 2, 10])):
            data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[i:]
    elif kind == "swap":
        data[i : i + length], data[j : j + length] = data[j : j + length], data[i : i + length]
    else:
        data[i : i + length] = bytes(length)
    return bytes(data)


def test_a_thousand_damaged_checkpoints(tmp_path):
    """Each is refused in one line, or holds what it held: half with our checksum, half of a version that had none."""
    save_checkpoint(tmp_path / "new.pt", example() | {"score": 0.5})
    rng, refused = random.Random(0), 0
    for source in (tmp_path / "new.pt", ROOT / "pretrained" / "breakout.pt"):
        data, state = source.read_bytes(), load_checkpoint(source)
        for trial in range(500):
            path = tmp_path / "damaged" / "bad.pt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged(data, rng))
            try:
                assert same(load_checkpoint(path), state), (source, trial)
            except CheckpointError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
                refused += 1
    assert refused > 600
