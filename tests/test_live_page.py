"""The page of a replay, used by somebody who tries everything: its promises hold in any order of clicks and keys.

What the browser plays is played again by the rules in Python, and what its model computes is compared with PyTorch.
"""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from replay_helpers import Replay, mouse_on, recorded, text_of, wait_for, write_replay

from breakout_ascii import BRICK_COLUMNS, BRICK_ROWS, Games
from games.game import load_game
from model import GPTConfig
from policies import make_gpt

pytestmark = pytest.mark.browser

CLOSE = 1e-3  # two actions are about as probable; the browser may choose the other one
SILENT = (7, 13)
STATE = {"x": "ball_x", "y": "ball_y", "dx": "dx", "dy": "dy", "paddle": "paddle_x"} | {
    name: name for name in ("lives", "score", "elapsed", "serves")
}
# The frames of the line from some frame on, each with its page as text
LINE = "(first) => line.slice(first).map((frame) => ({ ...frame, page: textOf(pageOf(frame.state)) }))"
RECORDED = "JSON.stringify(recordings)"
PAGE = "textOf(pageOf(current()))"


# What is shared: the replay of another game, and the games in Python


@pytest.fixture(scope="module")
def catch(tmp_path_factory):
    """Write a replay of another game."""
    game = load_game("games.catch:Catch-v0")
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**game.page_sizes(), n_head=4, n_embd=16), torch.device("cpu"))
    frames = recorded(policy, 60, game=game)
    path = tmp_path_factory.mktemp("catch") / "replay.html"
    return Replay(write_replay(path, policy, frames, game), [frames], [policy])


def game_in(state):
    """Return `Games` with one game, in the state of a frame in the browser."""
    games = Games(1)
    bricks = np.array([int(brick) for brick in state["bricks"]], bool).reshape(1, BRICK_ROWS, BRICK_COLUMNS)
    arrays = {python: np.array([state[name]]) for name, python in STATE.items()}
    games.load_state_dict(arrays | {"bricks": bricks, "bricks_left": bricks.sum((1, 2))})
    return games


def replayed(state, actions):
    """Play actions from a state by the rules in Python. Returns for each page (text, score, lives), and the game."""
    games = game_in(state)
    told = [(text_of(games.pages), int(games.score[0]), int(games.lives[0]))]
    for action in actions:
        games.step(np.array([action]))
        told.append((text_of(games.pages), int(games.score[0]), int(games.lives[0])))
    return told, games


def check_played(line):
    """Check that the frames of a part of the line, which begins with an edit or after one, follow by Python's rules."""
    told, games = replayed(line[0]["state"], [frame["action"] for frame in line[:-1]])
    assert [(frame["page"], frame["score"], frame["lives"]) for frame in line] == told
    for name, python in STATE.items():
        assert line[-1]["state"][name] == getattr(games, python)[0].tolist(), name


def probabilities_of(policy, texts):
    """Return the probabilities of the actions on pages of text, by PyTorch."""
    pages = np.stack([np.frombuffer(text.encode(), np.uint8) for text in texts])
    with torch.no_grad():
        return torch.cat([policy(some)[0].softmax(-1) for some in np.array_split(pages, len(pages) // 256 + 1)]).numpy()


def check_preferred(policy, texts, preferred):
    """Check that these actions are the most probable on pages, by PyTorch, unless two are about as probable."""
    probabilities = probabilities_of(policy, texts)
    second, first = np.sort(probabilities)[:, -2:].T
    wrong = probabilities.argmax(1) != np.array(preferred)
    assert not (wrong & (first - second > CLOSE)).any()


def without_heads(policy, heads):
    """Return a copy of a policy without what some heads say, as in docs/heads.md."""
    policy = copy.deepcopy(policy)
    size = policy.config.n_embd // policy.config.n_head
    for head in heads:
        policy.blocks[0].attn.c_proj.weight.data[:, size * head : size * (head + 1)] = 0
    return policy


def place(page, row, column):
    """Return where a cell is, as the pointer needs it."""
    return mouse_on(page, *page.evaluate("[game.rows, WIDTH]"))(row, column)


def drag(page, start, end, lift=True):
    page.mouse.move(*place(page, *start))
    page.mouse.down()
    page.mouse.move(*place(page, *end), steps=4)
    if lift:
        page.mouse.up()


def ball(page):
    state = page.evaluate("current()")
    return state["y"], state["x"]


def status(page):
    return page.locator("#status").text_content()


def set_slider(page, name, value):
    page.locator(f"#{name}").fill(str(value))


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


# Playing on, and taking over


def test_edit_play_on_take_over_and_edit_again(opened, replay):
    """Every page is the one that Python's rules make, each move of the model the one that PyTorch prefers. Agreement is
    counted as PyTorch counts it, a link shows all of it again, and undo goes back through all of it."""
    page = opened(replay.path, "#frame=30&head=3")
    before = page.evaluate(RECORDED)
    drag(page, ball(page), (15, 20))
    assert status(page).startswith("Step 30 of 30 ") and status(page).endswith("edited")
    assert "the recording is left at step 30" in page.locator("#chart").get_attribute("aria-label")
    page.locator("#speed").select_option("60")
    page.locator("#on").click()
    wait_for(page, "line.length > 45")
    assert "played on here, not recorded" in status(page)
    page.keyboard.down("ArrowLeft")
    wait_for(page, "line.filter(({ hand }) => hand).length >= 8")
    page.keyboard.up("ArrowLeft")
    mine = page.evaluate("line.length")
    wait_for(page, f"line.length > {mine + 8}")
    press(page, "Space")
    second = page.evaluate("shown.frame")
    drag(page, ball(page), (14, 60))
    press(page, *["ArrowRight"] * 12)
    line = page.evaluate(LINE, 30)
    assert page.evaluate("line.length") == second + 13 and page.evaluate("line[29] === recordings[1][29]")
    check_played(line[: second - 30])
    check_played(line[second - 30 :])
    moved = [frame for frame in line[:-1] if frame["action"] is not None]
    check_preferred(replay.policies[1], [frame["page"] for frame in moved], [frame["best"] for frame in moved])
    by_hand = [frame["hand"] for frame in line[:-1]]
    first, last = by_hand.index(True), len(by_hand) - by_hand[::-1].index(True)
    assert all(by_hand[first:last]) and {frame["action"] for frame in line[first:last]} == {1}
    assert all(frame["action"] == frame["best"] for frame in moved if not frame["hand"])
    agreed = sum(frame["best"] == 1 for frame in moved if frame["hand"])
    assert page.locator("#agreement").text_content() == f"You agree in {agreed} of {last - first} moves."
    seen = "[line.map(({ state, hand, edited }) => [state, !!hand, !!edited]), shown, element('agreement').textContent]"
    wait_for(page, "location.hash.includes(`frame=${shown.frame}&`)")
    address = page.url.split("#")[1]
    linked = opened(replay.path, f"#{address}")
    assert linked.evaluate(seen) == page.evaluate(seen) and linked.evaluate("address()") == address
    press(page, "Escape")
    assert page.evaluate("line.length") == second + 1 and status(page).endswith("edited")
    press(page, "Escape", "Escape", "Escape")
    assert status(page).startswith(f"Step 30 of {len(replay.frames) - 1} ") and page.locator("#undo").is_disabled()
    assert page.evaluate("line === recordings[1]") and page.evaluate(RECORDED) == before
    press(linked, "Escape")
    assert linked.evaluate("line === recordings[1]")


def test_the_recordings_end_is_no_end_but_the_games_is(opened, replay):
    end = len(replay.frames) - 1
    page = opened(replay.path, f"#frame={end}")
    assert status(page).endswith("the recording ends here")
    press(page, "Space")
    wait_for(page, f"line.length > {end + 5}")
    press(page, "Space")
    check_played(page.evaluate(LINE, end))
    press(page, "Escape")
    wall = "1"
    page.goto(page.url.split("#")[0] + f"#frame=40&stage=1&from=1&at=40&line=(5.20.1.1.60.1.70.40.{wall})")
    press(page, *["ArrowRight"] * 5)
    assert status(page) == "Step 43 of 43 · score 70 · lives 0 · played on here, not recorded · the game is over"
    check_played(page.evaluate(LINE, 40))
    press(page, "o")
    assert page.evaluate("[playing, line.length]") == [None, 44]
    page.locator("#speed").select_option("5")
    press(page, "Space")
    wait_for(page, "shown.frame > 0 && shown.frame < 40")  # the line is shown again from its beginning


def test_a_link_can_be_taken_over_right_before_an_edit(opened, replay):
    """What follows there is left behind, and undo has it."""
    page = opened(replay.path, "#frame=22&from=1&at=21&line=00(40.15.1.1.36.5.10.23.1)00")
    line = page.evaluate(LINE, 0)
    assert len(line) == 25 and line[22]["edited"] and line[21]["action"] == 0
    press(page, "ArrowLeft")
    page.locator("#speed").select_option("60")
    page.keyboard.down("ArrowRight")  # steps, because nothing plays
    page.keyboard.up("ArrowRight")
    press(page, "ArrowLeft")
    page.evaluate("hand = 2; step(1); hand = null")
    assert page.evaluate("[shown.frame, line.length]") == [22, 23]
    check_played(page.evaluate(LINE, 20))
    press(page, "Escape")
    assert page.evaluate(LINE, 0) == line


def test_arrows_are_the_paddles_only_while_time_goes_on(opened, replay):
    """Not after a pause, though one is still held; not when the window is left; nor where a control needs them."""
    page = opened(replay.path, "#frame=10&head=3")
    page.mouse.click(*place(page, 13, 10))
    press(page, "ArrowRight", "ArrowRight", "ArrowLeft")  # they step, also after a click on the page
    assert status(page).startswith("Step 11 ")
    press(page, "Space")
    page.keyboard.down("ArrowLeft")
    page.keyboard.down("ArrowRight")
    assert page.evaluate("hand") == 2
    page.keyboard.up("ArrowLeft")
    assert page.evaluate("hand") == 2
    wait_for(page, "line.at(-2).hand")
    press(page, "Space")
    at = page.evaluate("shown.frame")
    page.keyboard.down("ArrowRight")  # it repeats
    assert page.evaluate("shown.frame") == at
    page.keyboard.up("ArrowRight")
    assert page.evaluate("hand") is None
    press(page, "ArrowLeft")
    assert page.evaluate("shown.frame") == at - 1
    press(page, "Space")
    page.keyboard.down("ArrowLeft")
    page.evaluate("dispatchEvent(new Event('blur'))")
    assert page.evaluate("hand") is None
    page.keyboard.up("ArrowLeft")
    page.locator("[data-head='3']").focus()
    press(page, "ArrowRight")
    assert page.evaluate("[hand, shown.head === stages[1].order[stages[1].order.indexOf(3) + 1]]") == [None, True]


# Editing


def test_a_drag_is_one_edit_and_no_click(opened, replay):
    """Whatever a click would do, a drag does not do as well. The page follows before the button is let go."""
    page = opened(replay.path, "#frame=30")
    recordings = page.evaluate(RECORDED)
    for tool in ("ball", "paddle", "brick"):
        page.locator(f"input[value={tool}]").check()
        state, tip = page.evaluate("[current(), tipOf(current())]")
        drag(page, (tip["row"], tip["column"]), (tip["row"] - 5 * state["dy"], tip["column"]))
        assert page.evaluate("current()") == state | {"dy": -state["dy"]} and page.evaluate("past.length") == 1
        press(page, "Escape")
    row, column = ball(page)
    x, y = place(page, row, column)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 1, y + 1)  # a hand trembles
    assert page.evaluate("past.length") == 0
    probabilities = page.evaluate("answer.probabilities")
    page.mouse.move(*place(page, 14, 30), steps=3)
    assert ball(page) == (14, 30) and page.evaluate("answer.probabilities") != probabilities
    press(page, "Escape")  # in the middle of the drag
    page.mouse.move(*place(page, 15, 33))
    page.mouse.up()
    assert page.evaluate(RECORDED) == recordings


def test_an_edit_leaves_a_ball_in_a_wall_where_it_turns_round(opened, replay):
    page = opened(replay.path)
    page.evaluate("seek(line.findIndex(({ state }) => state.x === 0 || state.x === WIDTH - 1))")
    assert ball(page)[1] in (0, 79)
    for tool, (row, column) in (("paddle", (22, 30)), ("brick", (5, 30))):
        was = ball(page)
        page.locator(f"input[value={tool}]").check()
        page.mouse.click(*place(page, row, column))
        assert "edited" in status(page) and ball(page) == was
        assert ball(opened(replay.path, "#" + page.evaluate("address()"))) == was
    page.locator("input[value=ball]").check()
    page.mouse.click(*place(page, 14, 79))  # but nobody drops it there
    assert ball(page) == (14, 78)


def test_undo_shows_the_recording_of_the_stage_that_is_chosen(opened, replay):
    page = opened(replay.path, "#frame=140")
    press(page, "d", "d")
    set_slider(page, "stage", 0)
    assert "edited" in status(page)
    check_preferred(replay.policies[0], [page.evaluate(PAGE)], [largest_of(page)])
    press(page, "Escape", "Escape")
    assert page.evaluate("line === recordings[0] && branch === Infinity")
    assert page.evaluate(PAGE) == text_of(replay.recordings[0][page.evaluate("shown.frame")].page)


def largest_of(page):
    return int(np.argmax(page.evaluate("answer.probabilities")))


# Stages, heads, the map, the temperature


def test_each_stage_plays_its_own_game(opened, replay):
    """It begins at once. Scores without a head are the model's own."""
    page = opened(replay.path, "#frame=5")
    assert page.locator("label:has([data-switch='3'])").text_content() == "940 if off"
    for stage, frame in ((0, 5), (1, 5), (1, 999), (0, 0)):
        set_slider(page, "stage", stage)
        wait_for(page, "shown.frame > 0")  # it plays at once
        set_slider(page, "slider", frame)
        recording = replay.recordings[stage]
        assert status(page).startswith(f"Step {frame} of {len(recording) - 1} ")
        assert page.evaluate(PAGE) == text_of(recording[frame].page)
        probabilities = probabilities_of(replay.policies[stage], [text_of(recording[frame].page)])
        np.testing.assert_allclose([page.evaluate("answer.probabilities")], probabilities, atol=1e-4)
        assert (page.locator("#stage-name").text_content() == "start") == (stage == 0)
        assert page.locator("#actions tr.chosen td").first.text_content().startswith("▶ ")
    assert page.locator("label:has([data-switch='3'])").text_content() == "on"


def test_a_silent_head_says_nothing(opened, replay):
    """The answer is PyTorch's without it, also in the map for every cell, and the mark is at that answer."""
    page = opened(replay.path, "#frame=40&head=3")
    attended = page.evaluate("answer.attention.map((weights) => [...weights])")
    before = page.evaluate("answer.probabilities")
    for head in SILENT:
        page.locator(f"[data-switch='{head}']").uncheck()
    silent = without_heads(replay.policies[1], SILENT)
    for step in (40, 41, 42):
        expected = probabilities_of(silent, [text_of(replay.frames[step].page)])[0]
        np.testing.assert_allclose(page.evaluate("answer.probabilities"), expected, atol=1e-4)
        marked = page.locator("#actions tr").nth(int(expected.argmax()))
        assert np.sort(expected)[-1] - np.sort(expected)[-2] < CLOSE or marked.get_attribute("class") == "chosen"
        press(page, "ArrowRight")
    press(page, *["ArrowLeft"] * 3)
    assert np.abs(np.subtract(page.evaluate("answer.probabilities"), before)).max() > 0.01
    np.testing.assert_array_equal(page.evaluate("answer.attention.map((weights) => [...weights])"), attended)
    assert "off=7.13" in page.evaluate("address()")
    press(page, "m")
    wait_for(page, "mapped")
    press(page, "m", "m")  # off, and on again
    wait_for(page, "mapped")
    check_map(page, silent)
    press(page, "Space")
    wait_for(page, "shown.frame >= 45")
    assert page.evaluate("mapped !== null")  # it stays while time goes on
    press(page, "Space")
    wait_for(page, "mapOf === answered")
    page.locator("[data-switch='7']").check()
    assert page.evaluate("[...silent]") == [13]


def check_map(page, policy):
    """Check the map against PyTorch, for the ball in every cell."""
    told = page.evaluate("mapped.map((cells) => [...cells].map((cell) => cell && [cell.best, cell.sure]))")
    state = np.frombuffer(page.evaluate(PAGE).replace("O", " ").encode(), np.uint8)
    cells = [(row, column) for row in range(1, 23) for column in range(1, 79)]
    pages = np.repeat(state[None], len(cells), 0)
    pages[np.arange(len(cells)), [row * 81 + column for row, column in cells]] = ord("O")
    probabilities = probabilities_of(policy, [text_of(some) for some in pages])
    second, first = np.sort(probabilities)[:, -2:].T
    best, sure = np.array([told[row][column] for row, column in cells]).T
    np.testing.assert_allclose(sure, (first - 1 / 3) / (2 / 3), atol=3e-4)
    assert (first - second > CLOSE).mean() > 0.9
    assert not ((best != probabilities.argmax(1)) & (first - second > CLOSE)).any()


def test_temperature(opened, replay):
    """The actions are drawn from the softmax of the logits divided by it. At 0 the best one is taken."""
    page = opened(replay.path, "#frame=20")
    n = 1000
    evenly = f"((i) => {{ Math.random = () => ((i++ % {n}) + 0.5) / {n}; }})(0)"
    page.evaluate(evenly)
    for temperature in (0.1, 0.5, 1, 1.5):
        set_slider(page, "temperature", temperature)
        for logits in ([0.5, -0.2, 0.1], [2.0, 3.0, 1.9], [-40.0, 0.0, 40.0]):
            draws = page.evaluate(f"Array.from({{ length: {n} }}, () => drawn({logits}))")
            expected = torch.tensor(logits).double().div(temperature).softmax(0).numpy()
            np.testing.assert_allclose(np.bincount(draws, minlength=3) / n, expected, atol=1.5 / n)
    press(page, "o")  # with 1.5, where many moves are not the best ones
    wait_for(page, "line.length > 60")
    line = page.evaluate(LINE, 20)
    check_played(line)
    assert any(frame["action"] != frame["best"] for frame in line[:-1])
    press(page, "Space")
    set_slider(page, "temperature", 0)
    at = page.evaluate("shown.frame")
    for _ in range(10):
        page.locator("#forward").click()
    line = page.evaluate(LINE, at)[:-1]
    assert len(line) == 10
    assert all(frame["action"] == frame["best"] for frame in line)
    check_preferred(replay.policies[1], [frame["page"] for frame in line], [frame["action"] for frame in line])


# You against the GPT


def test_a_match_serves_both_the_same_balls(opened, replay):
    """Your game is what you hold, the GPT's is what PyTorch plays, and the page behind them stays as it was."""
    page = opened(replay.path, "#frame=20")
    press(page, "v", "Space", "End", "p", "d", "o", "m", "h")
    assert page.evaluate("[playing, shown.frame, shown.head, past.length, match.moves]") == [None, 20, "mean", 0, 0]
    start = page.evaluate("[match.yours, match.its]")
    assert start[0] == start[1]
    page.locator("#again").focus()
    page.keyboard.down("ArrowRight")  # though a button has the focus
    wait_for(page, "match.moves >= 15")
    match = page.evaluate("({ ...match, said: element('match-agreement').textContent })")
    page.keyboard.up("ArrowRight")
    mine, games = replayed(start[0], [2] * match["moves"])
    assert {name: getattr(games, python)[0].tolist() for name, python in STATE.items()}.items() <= match[
        "yours"
    ].items()
    texts = [text for text, _, _ in mine[:-1]]
    advice = probabilities_of(replay.policies[1], texts)
    unsure = (np.sort(advice)[:, -1] - np.sort(advice)[:, -2] < CLOSE).sum()
    agreed = (advice.argmax(1) == 2).sum()
    assert abs(match["agreed"] - agreed) <= unsure
    assert match["said"] == f"You do what it would have done in {match['agreed']} of {match['moves']} steps."
    games = game_in(start[1])
    for _ in range(match["moves"]):
        games.step(probabilities_of(replay.policies[1], [text_of(games.pages)]).argmax(1))
    assert text_of(games.pages) == page.evaluate("(state) => textOf(pageOf(state))", match["its"])
    page.set_viewport_size({"width": 900, "height": 700})
    press(page, "Escape")
    assert page.locator("#match").is_hidden() and page.evaluate("match") is None
    assert page.locator("#chart").bounding_box()["height"] == 64 and status(page).startswith("Step 20 ")


def test_a_match_ends(opened, replay):
    """With the scores of both; another one has other serves, and can be left while it runs."""
    page = opened(replay.path, "#stage=0")
    press(page, "v")
    page.evaluate("hand = 1; while (!isOver(match.yours) || !isOver(match.its)) stepMatch(); hand = null")
    you, it = page.evaluate("[match.yours.score, match.its.score]")
    said = page.locator("#match-said").text_content()
    winner = "You have won" if you > it else "The GPT has won" if you < it else "A draw"
    assert said == f"{winner}: {you} for you, {it} for the GPT."
    serves = page.evaluate("match.yours.serves")
    for _ in range(20):  # there are 32
        page.locator("#again").click()
        if (others := page.evaluate("match.yours.serves")) != serves:
            break
    assert others != serves and page.evaluate("[match.moves, match.running]") == [0, False]
    page.locator("#match [data-hand='1']").hover()
    page.mouse.down()
    wait_for(page, "match.moves >= 2")
    page.mouse.up()
    assert page.evaluate("hand") is None
    press(page, "v")
    page.wait_for_timeout(150)
    assert page.evaluate("match") is None and page.locator("main").is_visible()


# The first ten seconds, and the looks


def test_it_opens_moving_with_three_captions(opened, replay):
    page = opened(replay.path, "")
    wait_for(page, "shown.frame >= 3")
    assert page.evaluate("shown.head === stages[1].order[0]")
    page.locator("#play").click()
    captions = page.locator(".caption")
    assert [caption.text_content().strip()[0] for caption in captions.all()] == ["1", "2", "3"]
    assert all(caption.is_visible() for caption in captions.all())
    assert "looks at the ball" in page.locator("#caption-head").text_content()
    at = place(page, *page.evaluate("((t) => [Math.floor(t / 81), t % 81])(largest(answer.attention[shown.head]))"))
    box = page.locator("#caption-head").bounding_box()
    gap = min(abs(box["x"] - at[0]), abs(box["x"] + box["width"] - at[0]))
    assert gap < 30 and box["y"] - 10 < at[1] < box["y"] + box["height"]
    press(page, "d")
    assert not any(caption.is_visible() for caption in captions.all()) and "edited" in status(page)
    press(page, "Escape")
    assert "edited" not in status(page)
    still = opened(replay.path, "", reduced_motion="reduce")
    assert still.locator(".caption").first.is_visible()
    still.wait_for_timeout(300)
    assert still.evaluate("[playing, shown.frame]") == [None, 0]
    still.locator("#caption-answer .dismiss").click()
    assert still.locator(".caption").first.is_hidden()
    linked = opened(replay.path, "#frame=3&off=2")
    assert linked.locator(".caption").first.is_hidden() and linked.evaluate("playing") is None
    linked.locator("#afresh").click()
    wait_for(linked, "shown.frame >= 4")
    assert linked.locator(".caption").first.is_visible() and linked.evaluate("silent.size") == 0


def test_nothing_overflows(opened, replay, catch):
    """Neither with captions, nor in a match, nor in another game."""
    for path in (replay.path, catch.path):
        page = opened(path, "", reduced_motion="reduce")
        for width in (1280, 800, 400, 320):
            page.set_viewport_size({"width": width, "height": 800})
            wait_for(page, f"document.documentElement.scrollWidth <= {width}")  # once it has found its size
    press(page := opened(replay.path), "v")
    for width in (1280, 800, 400, 320):
        page.set_viewport_size({"width": width, "height": 800})
        wait_for(page, f"document.documentElement.scrollWidth <= {width}")


def test_what_answers_an_edit_is_in_sight(opened, replay):
    """On a laptop all tools too. On a phone the page stays in its place while the status grows by a word."""
    page = opened(replay.path, "#frame=40", height=800)
    for name in ("page", "answer", "controls", "chart", "slider", "tools", "hands", "maps", "stage"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800, name
    phone = opened(replay.path, "#frame=40", width=400, height=800, has_touch=True)
    box = phone.locator("#answers").bounding_box()
    assert box["y"] + box["height"] <= 800
    top = phone.locator("#page").bounding_box()["y"]
    press(phone, "d")
    assert "edited" in status(phone) and phone.locator("#page").bounding_box()["y"] == top
    press(phone, "ArrowRight")
    assert "not recorded" in status(phone) and phone.locator("#page").bounding_box()["y"] == top
    phone.touchscreen.tap(*place(phone, 12, 10))
    assert phone.locator("#cell").text_content().startswith("Row 12, column 10: ")
    phone.locator("#zoom").tap()
    phone.evaluate("look(null); seek(100)")
    frame, (x, y) = phone.locator("#frame").bounding_box(), place(phone, *ball(phone))
    assert frame["x"] <= x <= frame["x"] + frame["width"] and frame["y"] <= y <= frame["y"] + frame["height"]
    assert phone.evaluate("sizes().w") > 10


def test_the_ring_of_the_focus_is_whole(opened, replay):
    """Nothing lies over it on any side of the page."""
    page = opened(replay.path, "#frame=40")
    page.locator("#page").focus()
    press(page, "ArrowUp")  # the ring is for the keyboard
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    box = page.locator("#page").bounding_box()
    left, top = round(box["x"]), round(box["y"])
    right, bottom = round(box["x"] + box["width"]), round(box["y"] + box["height"])
    ring = (picture == (10, 86, 168)).all(-1)  # --accent
    beside = ring[top:bottom, left - 5 : left], ring[top:bottom, right : right + 5]
    above_and_below = ring[top - 5 : top, left:right], ring[bottom : bottom + 5, left:right]
    assert all(side.any(1).mean() > 0.95 for side in beside)
    assert all(side.any(0).mean() > 0.95 for side in above_and_below)


TEXTS = (
    "#status, #about, h2, #actions td, #answer p, #answer small, #controls button:enabled, #controls label, #tools, "
    "#hands, #cell, #stage-name, #maps label, #heads span, #heads label, #shares, #legend p, #prediction, footer p, "
    ".caption, #page .wall, #page .paddle, #page .ball, #page .brick, #typing"
)
CONTRASTS = """(selector) => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgb = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255);
  };
  const light = (colours) => rgb(colours).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const below = (node) => node ? [...below(node.parentElement), getComputedStyle(node).backgroundColor] : [];
  return [...document.querySelectorAll(selector)].filter((node) => node.checkVisibility()).map((node) => {
    const papers = below(node);
    const [low, high] = [light(papers), light([...papers, getComputedStyle(node).color])].sort((a, b) => a - b);
    const what = `${node.tagName} ${node.id || node.className} ${node.textContent.slice(0, 20)}`;
    return [(high + 0.05) / (low + 0.05), what];
  });
}"""


def test_texts_are_easy_to_read(opened, replay, catch):
    """Their contrast with what is behind them is 4.5 or more, in both schemes."""
    for path in (replay.path, catch.path):
        page = opened(path, "", reduced_motion="reduce")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found = page.evaluate(CONTRASTS, TEXTS)
            assert len(found) > 40 and not [(round(contrast, 2), what) for contrast, what in found if contrast < 4.5]


# Addresses, and other games


def test_an_address_that_cannot_be_read_says_so(opened, replay):
    """Also after the page has found its size, which draws it a second time."""
    page = opened(replay.path, "#frame=20&line=zzz")
    page.wait_for_timeout(100)
    assert status(page).endswith("the address adds something to the recording that cannot be read")
    page.goto(page.url.split("#")[0] + "#frame=20&off=&head=99&stage=-1")
    assert page.evaluate("[...silent]") == [] and status(page).startswith("Step 20 of ")
    page.locator("#speed").select_option("1")
    press(page, "o", "Space")  # a line on which nothing has been played yet
    linked = opened(replay.path, "#" + page.evaluate("address()"))
    assert (
        status(linked) == status(page) == "Step 20 of 20 · score 10 · lives 5" and linked.evaluate("past.length") == 1
    )


def test_another_game_is_edited_but_not_played_on(opened, catch):
    """It says so, where it can be read and where one tries. A click into the field lets one type there."""
    page = opened(catch.path, "#frame=20")
    assert "To play on, the page would need the rules of the game" in page.locator("#typing").text_content()
    for name in ("#on", "#versus", "#temperature", "#map", "#tools"):
        assert page.locator(name).is_hidden()
    before = page.evaluate(PAGE)
    page.mouse.click(*place(page, 2, 3))
    page.locator("#write").click()
    press(page, "o")
    edited = page.evaluate(PAGE)
    at = 2 * (catch.policies[0].config.columns) + 3
    assert edited == before[:at] + "o" + before[at + 1 :] and "edited" in status(page)
    expected = probabilities_of(catch.policies[0], [edited])
    np.testing.assert_allclose([page.evaluate("answer.probabilities")], expected, atol=1e-4)
    page.locator("#play").click()
    assert "no rules to play on by" in status(page) and page.evaluate("[playing, shown.frame]") == [None, 20]
    assert opened(catch.path, "#" + page.evaluate("address()")).evaluate(PAGE) == edited
    press(page, "Escape")
    assert page.evaluate(PAGE) == before and "edited" not in status(page)
    page.locator("[data-switch='0']").uncheck()
    expected = probabilities_of(without_heads(catch.policies[0], [0]), [before])
    np.testing.assert_allclose([page.evaluate("answer.probabilities")], expected, atol=1e-4)
    phone = opened(catch.path, "#frame=0", width=320)
    phone.locator("#zoom").click()
    phone.evaluate("element('frame').scrollTop = 40")
    scrolled = phone.evaluate("element('frame').scrollTop")
    press(phone, "ArrowRight")
    assert phone.evaluate("element('frame').scrollTop") == scrolled
