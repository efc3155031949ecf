"""Playing on in the page of a replay, by the model or by hand, with edits or without.

Every step that the browser plays is played again by the rules in Python, and every action that its model chooses is
compared with PyTorch's.
"""

import numpy as np
import pytest
from replay_helpers import mouse_on, numbers, text_of, wait_for

from breakout_ascii import Games

pytestmark = pytest.mark.browser

TOLD = """const told = ({ state: s, action, hand, best, edited, score, lives }) => ({
  state: [s.x, s.y, s.dx, s.dy, s.paddle, s.lives, s.score, s.elapsed, [...s.bricks].map(Number), s.serves],
  page: textOf(pageOf(s)), action, hand: hand ?? false, best: best ?? null, edited: edited ?? false, score, lives,
})"""  # what a test asks of a frame
LINE = f"{{ {TOLD}; line.map(told) }}"
STATE = ("ball_x", "ball_y", "dx", "dy", "paddle_x", "lives", "score", "elapsed", "bricks", "serves")
STAY, LEFT, RIGHT = 0, 1, 2


def game_in(state):
    """Return `Games` with one game, in the state of a frame in the browser."""
    games = Games(1)
    arrays = {name: np.array(x)[None] for name, x in zip(STATE, state)}
    bricks = arrays["bricks"].reshape(games.bricks.shape).astype(bool)
    games.load_state_dict(arrays | {"bricks": bricks, "bricks_left": bricks.sum((1, 2))})
    return games


def check_line(line, policy=None):
    """Check frames that follow each other: their pages, the steps between them and, given a policy, its choices."""
    for before, after in zip(line, line[1:]):
        games = game_in(before["state"])
        assert text_of(games.pages) == before["page"]
        if after["edited"]:
            continue
        _, terminated, _ = games.step(np.array([before["action"]]))
        assert text_of(games.pages) == after["page"]
        for name, x in game_in(after["state"]).state_dict().items():
            np.testing.assert_array_equal(x, games.state_dict()[name], err_msg=name)
        assert (after["score"], after["lives"]) == (games.score[0], games.lives[0])
        assert (after["action"] == -1) == terminated[0]
    if policy:
        check_choices(policy, [frame for frame in line[:-1] if not frame["hand"] and frame["action"] is not None])


def check_choices(policy, frames, name="action"):
    """Check that in frames the browser's model prefers what PyTorch does, unless two actions are nearly as probable."""
    pages = np.stack([np.frombuffer(frame["page"].encode(), np.uint8) for frame in frames])
    probabilities, _, _ = numbers(policy, pages)
    _, second, first = np.sort(probabilities).T
    differing = np.array([frame[name] for frame in frames]) != probabilities.argmax(1)
    assert not differing[first - second > 1e-3].any()


def press(page, key, times=1):
    for _ in range(times):
        page.keyboard.press(key)


def edit(page, tool, row, column):
    """Click on a cell, which puts the ball or the paddle there, or takes or lays a brick."""
    page.locator(f"input[value={tool}]").check()
    page.mouse.click(*mouse_on(page)(row, column))


def test_playing_on_from_a_frame_is_what_the_recording_is(opened, replay):
    """The same model makes the same moves. The recording stays, and undo goes back to it."""
    page = opened(replay.path, "#frame=300")
    page.locator("#speed").select_option("60")
    page.locator("#on").click()
    wait_for(page, "shown.frame >= 340")
    press(page, "Space")
    assert "played on here, not recorded" in page.locator("#status").text_content()
    line = page.evaluate(LINE)
    check_line(line[300:], replay.policies[1])
    if [frame["action"] for frame in line[:-1]] == [frame.action for frame in replay.frames[: len(line) - 1]]:
        assert [frame["page"] for frame in line] == [text_of(frame.page) for frame in replay.frames[: len(line)]]
    assert page.evaluate("[branch, recordings[1].length]") == [301, 1001]
    press(page, "Escape")
    assert page.evaluate("line === recordings[1] && branch === Infinity")
    assert page.locator("#status").text_content().startswith("Step 300 of 1000")


def test_the_address_holds_all_that_was_edited_and_played(opened, replay):
    """A link shows the same page, line, head, stage and silent heads, in a browser that knows nothing else."""
    page = opened(replay.path, "#frame=120&head=5")
    edit(page, "ball", 15, 20)
    press(page, "ArrowRight", 40)
    page.locator("#speed").select_option("60")
    press(page, "Space")
    page.keyboard.down("ArrowLeft")
    wait_for(page, "shown.frame >= 200")  # with more than 26 moves that are the same
    page.keyboard.up("ArrowLeft")
    press(page, "Space")
    edit(page, "brick", 5, 8)
    press(page, "ArrowRight", 5)
    page.locator("[data-switch='7']").uncheck()
    press(page, "ArrowLeft", 2)
    wait_for(page, "location.hash.includes('off=7') && location.hash.includes(`frame=${shown.frame}&`)")
    address = page.evaluate("location.hash")
    assert len(address) < 400
    line = page.evaluate(LINE)
    shown = page.evaluate("[shown, [...silent], branch, from, answer.probabilities]")
    again = opened(replay.path, address)
    assert again.evaluate("[shown, [...silent], branch, from, answer.probabilities]") == shown
    found = again.evaluate(LINE)
    for name in ("state", "page", "edited", "score", "lives"):
        assert [frame[name] for frame in found] == [frame[name] for frame in line], name
    steps = [i for i in range(120, len(line) - 1) if not line[i + 1]["edited"]]
    assert [found[i]["action"] for i in steps] == [line[i]["action"] for i in steps]
    assert [found[i]["hand"] for i in steps] == [line[i]["hand"] for i in steps]
    agreed = [[i for i in steps if some[i]["hand"] and some[i]["best"] == some[i]["action"]] for some in (line, found)]
    assert agreed[0] == agreed[1]
    wait_for(again, f"location.hash === {address!r}")
    press(again, "Escape")
    assert again.evaluate("line === recordings[1]")


WHOLE_WALL = np.base_repr(2**91 - 1, 36).lower()


@pytest.mark.parametrize(
    "line",
    [
        "(",
        "()",
        "(1.2)",
        "(a.b.c.d.e.f.g.h.i)",
        "(40.15.1.0.36.5.0.9.zz)",  # a ball that does not rise or fall
        "(40.15.1.1.36.9.0.9.0)",  # nine lives
        f"(40.6.1.1.36.5.0.9.{WHOLE_WALL})",  # a ball in a brick
        "9",
        "0z" * 400,  # beyond the end of the game
    ],
)
def test_an_address_that_cannot_be_read_shows_the_recording(opened, replay, line):
    page = opened(replay.path, f"#frame=50&stage=1&from=1&at=40&line={line}")
    said = "the address adds something to the recording that cannot be read"
    assert said in page.locator("#status").text_content()
    assert page.evaluate("line === recordings[1]") and page.locator("#undo").is_disabled()
    page.goto(page.url.split("#")[0] + "#frame=50&from=7&at=-3&line=000")
    assert page.evaluate("line === recordings[1]")


def test_an_address_makes_no_state_that_the_game_could_not_have(opened, replay):
    """A ball or a paddle beyond the walls is put between them."""
    page = opened(replay.path, "#frame=40&stage=1&from=1&at=40&line=(999.999.1.-1.999.5.0.9.1)00")
    line = page.evaluate(LINE)
    assert len(line) == 43 and line[40]["edited"]
    check_line(line[40:])
    assert 0 < line[40]["state"][0] < 79 and 0 < line[40]["state"][1] < 23 and line[40]["state"][4] == 72


def test_nothing_that_is_hidden_moves_during_a_match(opened, replay):
    page = opened(replay.path)
    press(page, "v")
    for key in ("Space", "End", "p", "h", "d", "o"):
        press(page, key)
    assert page.evaluate("[playing, shown.frame, shown.head, past.length]") == [None, 0, "mean", 0]


def test_an_edit_changes_no_sizes(opened, replay):
    """The answer's bars are as long as before, and the page has not moved."""
    page = opened(replay.path, "#frame=200")
    sizes = """["page", "answers", "controls", "chart"].map((id) => element(id).getBoundingClientRect().toJSON())
      .concat([...document.querySelectorAll("meter")].map((bar) => bar.getBoundingClientRect().toJSON()))"""
    before = page.evaluate(sizes)
    edit(page, "ball", 15, 20)
    assert page.evaluate(sizes) == before


def test_keys_play_after_a_click(opened, replay):
    """Arrows step after a click on a button, on the page or on a control."""
    page = opened(replay.path, "#frame=200")
    page.mouse.click(*mouse_on(page)(15, 20))
    press(page, "ArrowRight")
    page.locator("#forward").click()
    press(page, "ArrowRight")
    page.locator("input[value=ball]").check()
    press(page, "ArrowRight")
    page.locator("[data-head='3']").click()
    press(page, "ArrowRight")
    assert page.evaluate("shown.frame") == 205
