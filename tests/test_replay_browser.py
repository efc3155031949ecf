"""The page of a replay in Chromium: it shows the games that were played, and computes what PyTorch computes."""

import base64

import numpy as np
import pytest
import torch
from helpers import PAGE
from replay_helpers import (
    CPU,
    Replay,
    check_answer,
    mouse_on,
    numbers,
    random_pages,
    recorded,
    text_of,
    wait_for,
    write_replay,
)

from model import GPTConfig
from policies import make_gpt
from viewer.replay.attention import attention, plain_gpt

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def other_replay(tmp_path_factory, markup):
    """Write a replay of another game."""
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes()), CPU)
    frames = recorded(policy, 100, game=markup, sample=True)
    path = write_replay(tmp_path_factory.mktemp("other") / "replay.html", policy, frames, markup)
    return Replay(path, [frames], [policy])


# Returns all numbers of a page as bytes, because as JSON the attention would take minutes.
READ = """([stage, texts]) => texts.map((text) => {
  const read = models[stage].read(Uint8Array.from(text, (character) => game.characters.indexOf(character)));
  const numbers = [read.probabilities, [read.value], read.changes, ...read.attention].flatMap((some) => [...some]);
  const bytes = new Uint8Array(Float32Array.from(numbers).buffer);
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
})"""


def read_in(page, pages, stage=0):
    """Return what the model of a stage computes in the browser, as `computed` does."""
    texts = [text_of(one) for one in pages]
    read = [np.frombuffer(base64.b64decode(one), np.float32) for one in page.evaluate(READ, [stage, texts])]
    actions, rows, columns, heads = page.evaluate("[actions.length, game.rows, game.columns, config.n_head]")
    ends = np.cumsum([actions, 1, rows + columns])
    probabilities, values, changes, weights = np.split(np.stack(read), ends, axis=1)
    return probabilities, values[:, 0], changes, weights.reshape(len(pages), heads, -1)


def computed(policy, pages):
    """Return probabilities, values, predicted changes and attention of a policy on pages."""
    return *numbers(policy, pages), attention(plain_gpt(policy), pages).numpy()


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_browser_computes_what_pytorch_computes(opened, replay):
    """Compare hundreds of pages of the replay and of random play, for an untrained and for the shipped model."""
    page = opened(replay.path)
    pages = np.concatenate([np.stack([frame.page for frame in replay.frames[::10]]), random_pages(100)])
    for stage, policy in enumerate(replay.policies):
        for part in np.array_split(pages, 10):
            assert_close(read_in(page, part, stage), computed(policy, part))


def test_each_stage_has_played_games_of_its_own_which_the_browser_plays_again(opened, replay):
    """From serves and actions alone it gets every page, action, score and number of lives, and where games end."""
    page = opened(replay.path)
    found = page.evaluate(
        "recordings.map((frames) => frames.map((frame) => "
        "[textOf(pageOf(frame.state)), frame.action, frame.score, frame.lives, frame.value]))"
    )
    for ours, frames, policy in zip(found, replay.recordings, replay.policies, strict=True):
        *ours, values = zip(*ours)
        assert list(zip(*ours)) == [(text_of(frame.page), *frame[1:4]) for frame in frames]
        some = np.stack([frame.page for frame in frames[::10]])
        np.testing.assert_allclose(values[::10], numbers(policy, some)[1], atol=0.006)
    assert any(frame.action == -1 for frame in replay.recordings[0]) and replay.frames[-1].action == -2


def test_more_layers(opened, tmp_path):
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**PAGE, n_layer=2, n_head=2, n_embd=8), CPU)
    frames = recorded(policy, 3)
    page = opened(write_replay(tmp_path / "deep.html", policy, frames))
    pages = np.stack([frame.page for frame in frames])
    assert_close(read_in(page, pages), computed(policy, pages))
    page.keyboard.press("m")
    assert page.locator("#map").is_hidden() and not page.locator("#map").is_checked()


def test_keys_slider_and_address(opened, replay):
    frames = replay.frames
    page = opened(replay.path, "#frame=10&head=3")
    shown = page.locator("#status")
    assert shown.text_content().startswith("Step 10 of 1000")
    assert page.locator("[data-head='3']").get_attribute("aria-checked") == "true"
    page.keyboard.press("ArrowRight")
    assert shown.text_content().startswith("Step 11 ")
    page.locator("#slider").fill("500")
    assert f"Step 500 of 1000 · score {frames[500].score:g} " in shown.text_content()
    wait_for(page, "location.hash.includes('frame=500')")
    assert frames[500].score > 0 and f"score {frames[500].score:g}" in page.locator("#said").text_content()
    page.keyboard.press("p")  # with the slider focused
    point = next(i for i in range(501, 1001) if frames[i].score > frames[i - 1].score)
    assert shown.text_content().startswith(f"Step {point} ")
    page.keyboard.press("Shift+P")
    point_before = max(i for i in range(1, point) if frames[i].score > frames[i - 1].score)
    assert shown.text_content().startswith(f"Step {point_before} ")
    page.keyboard.press("End")
    assert f"score {frames[-1].score:g} · lives {frames[-1].lives} · the recording ends here" in shown.text_content()
    wait_for(page, "location.hash.includes('frame=1000')")  # once nothing has moved for a while
    for key in "lpp":
        page.keyboard.press(key)
    assert shown.text_content().endswith("the recording ends here · no further point")
    assert page.locator("#said").text_content() == "no further point"
    page.keyboard.press("Home")
    page.keyboard.press("h")
    page.locator("#speed").select_option("60")
    page.locator("#slider").focus()
    page.keyboard.press("Space")
    wait_for(page, "shown.frame >= 5")
    page.keyboard.press("Space")
    assert page.evaluate("playing") is None
    wait_for(page, "location.hash.includes(`frame=${shown.frame}&head=${shown.head}`)")
    page.goto(page.url.split("#")[0] + "#frame=nonsense&head=99&stage=-1")
    assert page.evaluate("shown.head") == "mean"


def test_an_edit_changes_the_answer_as_pytorch_says(opened, replay):
    """Edit by mouse and by keyboard, and undo it step by step."""
    page = opened(replay.path, "#frame=200")
    at = mouse_on(page)

    def check():
        return check_answer(page, replay.policies[1]).reshape(24, 81)

    before = check()
    page.locator("input[value=ball]").check()
    page.mouse.click(*at(15, 20))
    assert check()[15, 20] == ord("O") and "edited" in page.locator("#status").text_content()
    page.locator("input[value=paddle]").check()
    page.mouse.click(*at(22, 30))
    assert bytes(check()[22, 27:34]) == b"======="
    page.locator("input[value=brick]").check()
    page.mouse.click(*at(5, 8))
    assert (check()[5, 7] == ord("|")) != (before[5, 7] == ord("|"))
    page.locator("#page").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # the cursor is below the brick that was clicked
    assert (check()[6, 7] == ord("|")) != (before[6, 7] == ord("|"))
    assert "Row 6, column 8" in page.locator("#cell").text_content()
    for _ in range(3):
        page.keyboard.press("Escape")
    assert check()[15, 20] == ord("O") and page.locator("#undo").is_enabled()
    page.keyboard.press("Escape")
    assert np.array_equal(check(), before) and page.locator("#undo").is_disabled()


def test_the_map_says_what_pytorch_says_for_the_ball_in_every_cell(opened, replay):
    """Its choice is PyTorch's, unless that itself is a close one, and so is its certainty."""
    page = opened(replay.path, "#frame=200")
    page.locator("#map").check()
    wait_for(page, "mapOf === answered")
    told = page.evaluate("mapped")
    state = replay.frames[200].page.copy()
    state[state == ord("O")] = ord(" ")
    cells = [(row, column) for row in range(1, 23) for column in range(1, 79)]
    pages = np.repeat(state[None], len(cells), 0)
    pages[np.arange(len(cells)), [row * 81 + column for row, column in cells]] = ord("O")
    expected = np.concatenate([numbers(replay.policies[1], part)[0] for part in np.array_split(pages, 8)])
    _, second, first = np.sort(expected).T
    clear = first - second > 1e-3
    assert clear.mean() > 0.9
    best = np.array([told[row][column]["best"] for row, column in cells])
    sure = np.array([told[row][column]["sure"] for row, column in cells])
    np.testing.assert_array_equal(best[clear], expected.argmax(1)[clear])
    np.testing.assert_allclose(sure, 1.5 * (first - 1 / 3), atol=2e-4)


def test_what_a_character_is_looked_at_by_goes_when_the_mouse_has_gone(opened, replay):
    page = opened(replay.path, "#frame=200")
    box = page.locator("#page").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    assert page.locator("#cell").text_content().startswith("Row ")
    page.mouse.move(box["x"] + 9, 2)
    assert page.locator("#cell").text_content().startswith("Point at a character")
    page.locator("#page").focus()
    page.keyboard.press("Alt+ArrowDown")  # the browser's
    assert page.locator("#cell").text_content().startswith("Point at a character")


def test_text_that_wraps_starts_nothing_anew(opened, replay):
    """On a narrow screen the text about a cell grows by a line when the map is ready; the map is not computed again."""
    page = opened(replay.path, "#frame=200", width=320)
    page.locator("#map").check()
    page.evaluate("look({ row: current().y, column: current().x })")
    wait_for(page, "element('cell').textContent.includes('With the ball here')")
    page.evaluate("() => { globalThis.first = mapped; }")
    page.wait_for_timeout(500)
    assert page.evaluate("mapped === first && !mapping")
    assert page.evaluate("element('cell').textContent.includes('With the ball here')")


def test_a_finger_inspects_a_character(opened, replay):
    page = opened(replay.path, "#frame=200", width=400, has_touch=True)
    page.touchscreen.tap(*mouse_on(page)(12, 10))
    assert page.locator("#cell").text_content().startswith("Row 12, column 10: ")


def test_stages_and_looks(opened, replay, tmp_path):
    """Another stage shows its own game. Nothing overflows at any width, in either colour scheme."""
    page = opened(replay.path, "#frame=300")
    page.locator("#stage").fill("0")
    assert page.locator("#stage-name").text_content() == "start"
    page.locator("#slider").fill("300")
    np.testing.assert_array_equal(check_answer(page, replay.policies[0]), replay.recordings[0][300].page)
    assert page.locator("#status").text_content().startswith("Step 300 of 4")
    page.locator("#stage").fill("1")
    page.locator("#slider").fill("300")
    np.testing.assert_array_equal(check_answer(page, replay.policies[1]), replay.frames[300].page)
    assert "<img" in page.locator("#about").text_content()
    for scheme in ("light", "dark"):
        for width in (1280, 400):
            page = opened(replay.path, "#frame=300", width=width, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=tmp_path / f"{scheme}_{width}.png", full_page=True)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_the_browser_reads_any_page(opened, tmp_path, markup, n_layer):
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes(), n_layer=n_layer, n_head=4, n_embd=16), CPU)
    frames = recorded(policy, 45, game=markup, sample=True)
    page = opened(write_replay(tmp_path / "any.html", policy, frames, markup))
    texts = page.evaluate("line.map((frame) => textOf(pageOf(frame.state)))")
    assert texts == [text_of(frame.page) for frame in frames]
    pages = np.stack([frame.page for frame in frames])
    assert_close(read_in(page, pages), computed(policy, pages))
    page.locator("#slider").fill("30")
    shown = page.evaluate("[...element('page').children].map((line) => line.textContent).join('')")
    assert shown == texts[30]


def test_an_edit_by_character_changes_the_answer_as_pytorch_says(opened, other_replay):
    """By mouse and keys, and in the field that a phone needs. Escape undoes each, and then lets the page go."""
    page = opened(other_replay.path, "#frame=50")
    tokens = other_replay.frames[50].page.reshape(5, 34).copy()

    def check():
        np.testing.assert_array_equal(check_answer(page, other_replay.policies[0]), tokens.flatten())

    check()
    assert page.locator("#write").is_disabled() and page.locator("#undo").is_disabled()
    at = mouse_on(page, 5, 33)
    page.mouse.click(*at(2, 10))
    page.mouse.move(*at(0, 0))  # the cursor stays where the click was
    for key, row, column in (("<", 2, 10), ("ArrowRight", 0, 0), ("Space", 2, 11), ("ArrowDown", 0, 0), ("p", 3, 11)):
        page.keyboard.press(key)
        if not key.startswith("Arrow"):
            tokens[row, column] = ord(" " if key == "Space" else key)
        check()
    assert "Row 3, column 11: p. " in page.locator("#cell").text_content()
    altgr = "{ key: '@', ctrlKey: true, altKey: true, modifierAltGraph: true, bubbles: true }"
    page.evaluate(f"element('page').dispatchEvent(new KeyboardEvent('keydown', {altgr}))")
    tokens[3, 11] = ord("@")
    check()
    page.evaluate("element('page').dispatchEvent(new KeyboardEvent('keydown', { key: 'd', altKey: true }))")
    check()
    page.locator("#write").press_sequentially("a&")
    tokens[3, 11] = ord("&")
    check()
    page.locator("#write").press_sequentially("\u00e9")
    assert "knows no character '\u00e9'" in page.locator("#cell").text_content()
    check()
    assert "edited" in page.locator("#status").text_content()
    for now in ("a", "@", "p", None):
        page.keyboard.press("Escape")
        tokens[3, 11] = ord(now) if now else other_replay.frames[50].page.reshape(5, 34)[3, 11]
        check()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    tokens = other_replay.frames[50].page.reshape(5, 34).copy()
    check()
    page.locator("#page").focus()
    page.keyboard.press("Escape")
    assert page.locator("#write").is_disabled() and page.evaluate("cursor") is None
    page.keyboard.press("h")  # is no character of the page now
    check()
    assert page.evaluate("shown.head") != "mean"


def test_the_address_keeps_what_was_typed(opened, other_replay):
    """A link shows the same page. One with a character that there is not, or at no place, shows the recording."""
    page = opened(other_replay.path, "#frame=50")
    page.mouse.click(*mouse_on(page, 5, 33)(2, 10))
    for key in "<&(.":
        page.keyboard.press(key)
        page.keyboard.press("ArrowRight")
    tokens = check_answer(page, other_replay.policies[0])
    assert text_of(tokens[2 * 34 + 10 : 2 * 34 + 14]) == "<&(."
    wait_for(page, "location.hash.includes('line=')")
    address = page.evaluate("location.hash")
    again = opened(other_replay.path, address)
    np.testing.assert_array_equal(check_answer(again, other_replay.policies[0]), tokens)
    assert "edited" in again.locator("#status").text_content()
    again.locator("#undo").click()
    assert again.evaluate("line === recordings[0] && shown.frame") == 50
    for line in ("(1.999)", "(170.1)", "(33.5)", "(1)", "000"):
        again.goto(again.url.split("#")[0] + f"#frame=50&at=50&from=0&line={line}")
        wait_for(again, "element('status').textContent.includes('cannot be read')")
        assert again.evaluate("line === recordings[0]")
        again.goto(again.url.split("#")[0] + "#frame=50")
        wait_for(again, "!element('status').textContent.includes('cannot be read')")


def test_events_and_status_of_any_game(opened, other_replay):
    frames = other_replay.frames
    page = opened(other_replay.path)
    status = page.locator("#status")
    assert status.text_content() == "Step 0 of 102 \u00b7 game 1 of 3 \u00b7 return 0 \u00b7 lives 3"
    page.keyboard.press("g")
    assert status.text_content().startswith("Step 41 of 102 \u00b7 game 2 of 3 ")
    page.keyboard.press("ArrowLeft")
    assert status.text_content().endswith("\u00b7 lives 1 \u00b7 the game is over")
    for key, sign in (("Shift+L", -1), ("p", 1)):
        at = page.evaluate("shown.frame")
        page.keyboard.press(key)
        passed = [i for i in range(1, 103) if sign * (frames[i].score - frames[i - 1].score) > 0 and i != 41]
        expected = max(i for i in passed if i < at) if sign < 0 else min(i for i in passed if i > at)
        assert page.evaluate("shown.frame") == expected
    page.keyboard.press("g")
    for key in "mrovd":  # Breakout's
        page.keyboard.press(key)
    assert status.text_content().startswith("Step 41 ") and page.locator("#map").is_hidden()
    assert page.locator("#undo").is_disabled() and page.locator("#actions tr").count() == 25


def test_looks_of_any_game(opened, other_replay):
    """With 25 actions nothing overflows, and the one that was taken can be seen."""
    for scheme in ("light", "dark"):
        for width in (1280, 400):
            page = opened(other_replay.path, "#frame=30", width=width, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            top, bottom = page.evaluate(
                "(({ top, bottom }) => [top, bottom])(element('answers').getBoundingClientRect())"
            )
            row = page.locator("#actions tr.chosen").bounding_box()
            assert top - 1 <= row["y"] and row["y"] + row["height"] <= bottom + 1
