"""Checks rules of every game and every checkpoint on examples that Hypothesis draws."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import same

from breakout_ascii import BreakoutAscii, BreakoutAsciiVec, to_text
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, to_plain

few = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
moves = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=20
)  # (action, how often in a row)
serves = st.lists(st.sampled_from([-1, 1]), min_size=5, max_size=5)


def check_page(page, info, ended):
    """Check a page: one ball, a paddle and a border that are whole unless the ball lies on them, and the score."""
    lines = to_text(page).splitlines()
    assert sum(line.count("O") for line in lines) == 1
    paddle = lines[22].replace("O", "=") if ended and "=======" not in lines[22] else lines[22]
    assert paddle.count("=") == 7 and "=======" in paddle and sum(line.count("=") for line in lines[:22]) == 0
    border = lines[0] + lines[23] + "".join(line[0] + line[79] for line in lines)
    assert set(border) <= {"#", "O"} and border.count("O") <= 2  # a corner counts twice
    assert info["bricks"] == sum(line.count("|____|") for line in lines[5:12])
    assert info["score"] == 10 * (91 - info["bricks"]) + 50 * (info["bricks"] == 0)


@few
@given(serves, moves)
def test_a_game_keeps_its_rules_alone_and_beside_another(serves, moves):
    one, many = BreakoutAscii(), BreakoutAsciiVec(2)
    page, info = one.reset(options={"serves": serves})
    pages, _ = many.reset(options={"serves": serves})
    total, shown = 0, [(page, page.copy())]
    for step, action in enumerate(action for action, times in moves for _ in range(times)):
        assert (page == pages[0]).all()
        page, reward, terminated, truncated, info = one.step(action)
        pages, rewards, ends, cuts, infos = many.step(np.array([action, step % 3]))
        total += reward
        assert total == info["score"] and (reward, terminated, truncated) == (rewards[0], ends[0], cuts[0])
        check_page(page, info, terminated)
        if terminated or truncated:
            assert (infos["final_obs"][0] == page).all() and infos["final_info"]["score"][0] == info["score"]
            break
        assert {name: infos[name][0] for name in info} == info
        shown += [(page, page.copy()), (pages, pages.copy())]
    assert all((page == copy).all() for page, copy in shown[-100:])  # no later step has written to what was returned
    before = many.state_dict()
    page[:], pages[:] = 0, 0  # nor does writing to it change a game
    assert same(to_plain(before), to_plain(many.state_dict())) and many.observation().all() and one._observation().all()


numbers = st.none() | st.booleans() | st.integers(-(2**128), 2**128) | st.floats() | st.text(max_size=9)
dtypes = st.sampled_from([np.uint8, np.int64, np.float32, np.float64, np.bool_])
tensors = dtypes.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=5))
).map(torch.from_numpy)
states = st.dictionaries(
    st.text(max_size=9),
    st.recursive(
        numbers | tensors,
        lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=4),
    ),
    max_size=5,
)


def finite(x):
    if isinstance(x, dict):
        return all(map(finite, x.values()))
    return all(map(finite, x)) if isinstance(x, list) else not isinstance(x, torch.Tensor) or bool(x.isfinite().all())


@few
@given(states)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, state):
    """A state with a tensor that is not finite is refused instead."""
    save_checkpoint(tmp_path / "last.safetensors", state)
    if finite(state):
        assert same(load_checkpoint(tmp_path), state)
    else:
        with pytest.raises(CheckpointError, match="is not finite"):
            load_checkpoint(tmp_path)


@few
@given(states, st.data())
def test_a_changed_number_is_noticed(tmp_path, state, data):
    """The checksum notices what another program has edited in a saved file."""
    number = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    save_checkpoint(tmp_path / "last.safetensors", {"state": state, "edited": number})
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        tensors, metadata = file.get_tensors(), file.metadata()
    found = json.loads(metadata["state"])
    metadata["state"] = json.dumps(found | {"edited": math.nextafter(number, math.inf)})
    save_file(tensors, tmp_path / "last.safetensors", metadata)
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_checkpoint(tmp_path)
