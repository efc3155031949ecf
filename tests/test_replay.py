"""A replay shows the game as it was played, and what its model computes, also in JavaScript."""

import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import PAGE
from PIL import Image

import viewer.replay.attention
from breakout_ascii import BreakoutAsciiVec
from harness.checkpoint import save_checkpoint
from harness.options import CommandLineError
from load_model import main, play
from model import GPT, GPTConfig
from policies import SHIPPED, load_policy, make_gpt
from viewer.replay.attention import (
    THINGS,
    attention,
    attention_shares,
    evenly_spaced,
    main_thing,
    order_of_heads,
    plain_gpt,
    things_on,
)
from viewer.replay.document import Stage, replay_html
from viewer.replay.pictures import attention_pictures
from viewer.replay.recording import ball_and_paddle, record

CPU = torch.device("cpu")


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def random_pages(n, seed=0):
    """Return pages of random play from varied starts."""
    env = BreakoutAsciiVec(n, varied_starts=1.0)
    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        obs, *_ = env.step(rng.integers(3, size=n))
    return obs


@pytest.mark.parametrize("n_layer", [1, 2])
def test_attention_is_what_the_model_computes(n_layer):
    """With these weights in place of scaled_dot_product_attention in the last block, the features are the model's."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**PAGE, n_layer=n_layer, n_head=2, n_embd=8)).double()
    pages = random_pages(2)
    weights = attention(gpt, pages)
    assert weights.shape == (2, 2, 1944)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, dtype=torch.double))
    characters = gpt.encode(pages)
    x = gpt.embed(characters)
    for block in gpt.blocks[:-1]:
        x = block(x)
    block = gpt.blocks[-1]
    values = block.attn.c_attn(block.ln_1(x))[..., 16:].unflatten(-1, (2, 4))
    y = torch.einsum("bht,bthd->bhd", weights, values).flatten(1)
    x = x[:, -1] + block.attn.c_proj(y)
    torch.testing.assert_close(gpt.ln_f(x + block.mlp(block.ln_2(x))), gpt.features(characters))


def test_heads_are_named_by_what_they_look_at():
    page = BreakoutAsciiVec(1).reset(seed=0)[0]
    counts = np.bincount(things_on(page)[0], minlength=len(THINGS))
    assert dict(zip(THINGS, counts)) == {
        "ball": 1,
        "paddle's left end": 1,
        "paddle's middle": 5,
        "paddle's right end": 1,
        "bricks": 91 * 6,
        "walls": 80 * 2 + 22 * 2,
        "empty space": 78 * 22 - 91 * 6 - 8,
        "line ends": 24,
    }
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**PAGE, n_head=4, n_embd=16))
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight[:32] = 0  # no head cares
    np.testing.assert_allclose(attention_shares(gpt, page), np.tile(counts / 1944, (4, 1)), atol=1e-6)
    looks = np.zeros((3, len(THINGS)))
    looks[0, [1, 2, 3, 6]] = 0.2, 0.2, 0.2, 0.4
    looks[1, 6] = 1
    looks[2, 0] = 1
    expected = [("paddle", pytest.approx(0.6)), ("empty space", 1), ("ball", 1)]
    assert [main_thing(head) for head in looks] == expected
    assert order_of_heads(looks) == [2, 0, 1]


@pytest.mark.parametrize("length, seen", [(1, 1), (500, 500), (501, 251), (1351, 451)])
def test_heads_are_measured_on_at_most_500_pages_spread_evenly(length, seen):
    chosen = evenly_spaced(np.arange(length))
    assert len(chosen) == seen <= 500 and len(set(np.diff(chosen))) <= 1 and chosen[0] == 0


def test_the_file_holds_the_game(monkeypatch):
    """It has every frame, with the last page of each game. A hostile name becomes neither markup nor a placeholder of a
    template."""
    monkeypatch.setattr(viewer.replay.attention, "MEASURED", 20)  # the attention takes most of the time
    policy, _ = load_policy(SHIPPED)
    steps = list(play(policy, episodes=2, sample=True, seed=1))
    frames = list(record(steps))
    hostile = "</script><img src=x onerror=alert(1)>$data ${script}"
    text = replay_html(frames, [Stage(hostile, policy)], hostile, hostile)
    data = data_of(text)
    assert len(frames) == len(steps) + 2 == len(data["frames"])
    assert data["name"] == data["stages"][0]["label"] == hostile
    assert "<img" not in text and text.count("</script>") == 3
    ends = [frame for frame in data["frames"] if frame[3] < 0]
    assert [end[3:] for end in ends] == [[-1, step.info["score"], step.info["lives"]] for step in steps if step.last]
    assert [frame[3] for frame in data["frames"] if frame[3] >= 0] == [step.action for step in steps]
    assert len(text) < 3_000_000
    page = re.sub(r"<script[^>]*application/json.*?</script>|http-equiv", "", text, flags=re.S)
    assert "http" not in page  # nothing is fetched
    pages = np.stack([frame.page for frame in frames])
    with torch.no_grad():
        values = torch.cat([policy(pages[i : i + 500])[1] for i in range(0, len(pages), 500)])
    np.testing.assert_allclose(data["stages"][0]["values"], values, atol=1e-3)


def test_the_last_ball_may_lie_over_an_end_of_the_paddle():
    for x, left in ((20, 20), (26, 20), (40, 20)):
        page = np.full(1944, ord(" "), np.uint8)
        page[22 * 81 + left : 22 * 81 + left + 7] = ord("=")
        page[22 * 81 + x] = ord("O")
        assert ball_and_paddle(page) == (x, 22, left)


def test_stages_of_a_run(tmp_path, capsys):
    config = GPTConfig(**PAGE, n_head=4, n_embd=16)
    for name, step in (
        ("checkpoint_0", 0),
        ("checkpoint_1", 90),
        ("checkpoint_2", 800),
        ("checkpoint_3", 2000),
        ("best_model", 1000),
    ):
        torch.manual_seed(step)
        save_checkpoint(
            tmp_path / f"{name}.safetensors",
            {"gpt_config": asdict(config), "model": dict(GPT(config).state_dict()), "global_step": step},
        )
    (tmp_path / "checkpoint_9.safetensors").write_bytes(b"damaged")
    main([str(tmp_path), "--steps", "20", "--out", str(tmp_path / "replay.html")])
    data = data_of((tmp_path / "replay.html").read_text(encoding="utf-8"))
    assert [stage["label"] for stage in data["stages"]] == ["start", "90 steps", "1,000 steps"]
    assert len({stage["weights"] for stage in data["stages"]}) == 3 and "wrote" in capsys.readouterr().out
    assert data["frames"][-1][3] == -2  # the recording ends there, the game does not
    save_checkpoint(
        tmp_path / "foreign.safetensors", {"gpt_config": asdict(config), "model": dict(GPT(config).state_dict())}
    )  # says no steps
    main([str(tmp_path / "foreign.safetensors"), "--steps", "2", "--out", str(tmp_path / "replay.html")])
    assert [stage["label"] for stage in data_of((tmp_path / "replay.html").read_text(encoding="utf-8"))["stages"]] == [
        "start"
    ]


def test_pictures_show_attention(tmp_path):
    """For a head that looks only at the ball, the ball's cell is hot and the others are grey. All heads fit side by
    side."""
    policy, _ = load_policy(SHIPPED)
    gpt, frames = plain_gpt(policy), list(record(play(policy, 30)))
    head = int(attention(gpt, frames[20].page[None])[0, :, int((frames[20].page == ord("O")).argmax())].argmax())
    one = list(attention_pictures(gpt, frames, head))
    row, column = divmod(int((frames[20].page == ord("O")).argmax()), 81)
    picture = one[20][14:]
    assert picture.shape == (264, 480, 3)
    hot = picture[row * 11 : row * 11 + 11, column * 6 : column * 6 + 6].astype(int)
    assert (hot[..., 0] - hot[..., 2] > 100).mean() > 0.5
    assert (picture[..., 0].astype(int) - picture[..., 2] > 100).sum() < 2 * 66  # pixels of two characters
    assert next(attention_pictures(gpt, frames[:1])).shape == (4 * (132 + 14), 4 * 240, 3)
    main([str(SHIPPED), "--attention", "--steps", "5", "--out", str(tmp_path / "heads.gif")])
    with Image.open(tmp_path / "heads.gif") as gif:
        assert gif.size == (960, 584) and gif.n_frames == 6


@pytest.mark.parametrize(
    "words, message",
    [
        ("--head 16", "from 0 to 15"),
        ("--head -1", "from 0 to 15"),
        ("--attention --evaluate", "are for a .gif"),
        ("--attention --out x.html", "every head in any case"),
        ("--steps 20000 --out x.html", "at most 10000 for an .html"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandLineError, match=message) as error:
        main([str(SHIPPED), *words.split()])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# In a browser


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Write a replay of 1000 steps, with an untrained model as the first stage. Returns file, frames and policies."""
    policy, _ = load_policy(SHIPPED)
    torch.manual_seed(0)
    untrained = make_gpt(policy.config, CPU)
    frames = list(record(play(policy, 1000)))
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    hostile = "<img src=x onerror=alert(1)>"
    path.write_text(
        replay_html(frames, [Stage("start", untrained), Stage(hostile, policy)], hostile, hostile), encoding="utf-8"
    )
    return path, frames, [untrained, policy]


@pytest.fixture
def opened(chromium, replay):
    """Return a function that opens the page in a new tab. Any error, dialog or request fails the test at the end."""
    problems, pages = [], []

    def open_page(place="", path=replay[0], width=1280, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: problems.extend([] if request.url.startswith("file:") else [request.url]))
        page.goto(path.as_uri() + place)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not problems


def numbers(policy, pages):
    """Return probabilities, values and predicted changes of a policy on pages."""
    with torch.no_grad():
        features = policy.features(policy.encode(pages))
        logits, values = policy.heads(features)
        return logits.softmax(-1).numpy(), values.numpy(), policy.change_head(features).sigmoid().numpy()


def wait_for(page, expression):
    """Wait until an expression is true. Playwright's own function would evaluate a string, which the page forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 30 s: {expression}")


READ = """([stage, texts]) => texts.map((text) => {
  const read = models[stage].read(Uint8Array.from(text, (character) => game.characters.indexOf(character)));
  return [read.probabilities, read.value, [...read.changes], read.attention.map((head) => [...head])];
})"""


@pytest.mark.browser
def test_the_browser_computes_what_pytorch_computes(opened, replay):
    """Compare hundreds of pages of the replay and of random play, for an untrained and for the shipped model."""
    _, frames, policies = replay
    page = opened()
    pages = np.concatenate([np.stack([frame.page for frame in frames[::10]]), random_pages(100)])
    drawn = page.evaluate("frames.map((_, i) => textOf(pageOf(stateOf(i))))")
    assert drawn == [bytes(frame.page).decode() for frame in frames]
    for stage, policy in enumerate(policies):
        found = [page.evaluate(READ, [stage, [bytes(p).decode() for p in part]]) for part in np.array_split(pages, 10)]
        found = [np.array([one[i] for part in found for one in part]) for i in range(4)]
        expected = (
            *numbers(policy, pages),
            np.concatenate([attention(plain_gpt(policy), part) for part in np.array_split(pages, 10)]),
        )
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.browser
def test_more_layers(opened, tmp_path):
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**PAGE, n_layer=2, n_head=2, n_embd=8), CPU)
    frames = list(record(play(policy, 3)))
    (tmp_path / "deep.html").write_text(replay_html(frames, [Stage("", policy)], "", ""), encoding="utf-8")
    page = opened(path=tmp_path / "deep.html")
    for one, *expected in zip(
        page.evaluate(READ, [0, [bytes(frame.page).decode() for frame in frames]]),
        *numbers(policy, np.stack([frame.page for frame in frames])),
    ):
        for ours, theirs in zip(one, expected):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    page.keyboard.press("m")
    assert page.locator("#map").is_hidden() and not page.locator("#map").is_checked()


@pytest.mark.browser
def test_keys_slider_and_address(opened, replay):
    _, frames, _ = replay
    page = opened("#frame=10&head=3")
    shown = page.locator("#status")
    assert shown.text_content().startswith("Step 10 of 1000")
    assert page.locator("[data-head='3']").get_attribute("aria-checked") == "true"
    page.keyboard.press("ArrowRight")
    assert shown.text_content().startswith("Step 11 ")
    page.locator("#slider").fill("500")
    assert f"Step 500 of 1000 · score {frames[500].score} " in shown.text_content()
    wait_for(page, "location.hash.includes('frame=500')")
    assert frames[500].score > 0 and f"score {frames[500].score}" in page.locator("#said").text_content()
    page.keyboard.press("p")  # with the slider focused
    point = next(i for i in range(501, 1001) if frames[i].score > frames[i - 1].score)
    assert shown.text_content().startswith(f"Step {point} ")
    page.keyboard.press("Shift+P")
    point_before = max(i for i in range(1, point) if frames[i].score > frames[i - 1].score)
    assert shown.text_content().startswith(f"Step {point_before} ")
    page.keyboard.press("End")
    assert f"score {frames[-1].score} · lives {frames[-1].lives} · the recording ends here" in shown.text_content()
    wait_for(page, "location.hash.includes('frame=1000')")  # once nothing has moved for a while
    for key in "lpp":
        page.keyboard.press(key)
    assert shown.text_content().endswith("the recording ends here · no further point")
    assert page.locator("#said").text_content() == "no further point"
    assert page.locator("[data-event=lost]").is_disabled()
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


@pytest.mark.browser
def test_an_edit_changes_the_answer_as_pytorch_says(opened, replay):
    """Edit by mouse and by keyboard; the map gives the same answer for every cell."""
    _, frames, policies = replay
    page = opened("#frame=200")
    box = page.locator("#page").bounding_box()

    def click(row, column):
        page.mouse.click(box["x"] + (column + 0.5) * box["width"] / 80, box["y"] + (row + 0.5) * box["height"] / 24)

    def check():
        text = page.evaluate("textOf(pageOf(current()))")
        tokens = np.frombuffer(text.encode(), np.uint8)[None]
        probabilities, values, _ = numbers(policies[1], tokens.copy())
        np.testing.assert_allclose(page.evaluate("answer.probabilities"), probabilities[0], atol=1e-4)
        np.testing.assert_allclose(page.evaluate("answer.value"), values[0], atol=1e-4, rtol=1e-4)
        assert float(page.locator("#value").text_content()) == pytest.approx(values[0], abs=6e-4)
        return tokens.reshape(24, 81).copy()

    before = check()
    page.locator("input[value=ball]").check()
    click(15, 20)
    assert check()[15, 20] == ord("O") and page.evaluate("edited") is not None
    page.locator("input[value=paddle]").check()
    click(22, 30)
    assert bytes(check()[22, 27:34]) == b"======="
    page.locator("input[value=brick]").check()
    click(5, 8)
    assert (check()[5, 7] == ord("|")) != (before[5, 7] == ord("|"))
    page.locator("#page").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # the cursor is below the brick that was clicked
    assert (check()[6, 7] == ord("|")) != (before[6, 7] == ord("|"))
    assert "Row 6, column 8" in page.locator("#cell").text_content()
    page.locator("#map").check()
    wait_for(page, "mapped !== null && mapped[1][1] !== undefined")
    told = page.evaluate("mapped.map((line) => line.map((cell) => cell && cell.best))")
    state, cells = check(), [(row, column) for row in range(1, 23) for column in range(1, 79)]
    state[state == ord("O")] = ord(" ")
    pages = np.repeat(state.reshape(1, -1), len(cells), 0)
    pages[np.arange(len(cells)), [row * 81 + column for row, column in cells]] = ord("O")
    expected = np.concatenate([numbers(policies[1], part)[0] for part in np.array_split(pages, 8)])
    margins = np.sort(expected)[:, -1] - np.sort(expected)[:, -2]
    wrong = [cell for cell, p, m in zip(cells, expected, margins) if m > 1e-3 and told[cell[0]][cell[1]] != p.argmax()]
    assert not wrong and (margins > 1e-3).mean() > 0.9
    page.keyboard.press("Escape")
    assert np.array_equal(check(), before)


@pytest.mark.browser
def test_what_a_character_is_looked_at_by_goes_when_the_mouse_has_gone(opened):
    page = opened("#frame=200")
    box = page.locator("#page").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    assert page.locator("#cell").text_content().startswith("Row ")
    page.mouse.move(box["x"] + 9, 2)
    assert page.locator("#cell").text_content().startswith("Point at a character")
    page.locator("#page").focus()
    page.keyboard.press("Alt+ArrowDown")  # the browser's
    assert page.locator("#cell").text_content().startswith("Point at a character")


@pytest.mark.browser
def test_text_that_wraps_starts_nothing_anew(opened):
    """On a narrow screen the text about a cell grows by a line when the map is ready; the map is not computed again."""
    page = opened("#frame=200", width=320)
    page.locator("#map").check()
    page.evaluate("look({ row: current().y, column: current().x })")
    wait_for(page, "element('cell').textContent.includes('With the ball here')")
    task = page.evaluate("mapTask")
    page.wait_for_timeout(500)
    assert page.evaluate("mapTask") == task
    assert page.evaluate("element('cell').textContent.includes('With the ball here')")


@pytest.mark.browser
def test_a_finger_inspects_a_character(chromium, replay):
    context, problems = chromium.new_context(viewport={"width": 400, "height": 800}, has_touch=True), []
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(replay[0].as_uri() + "#frame=200")
    box = page.locator("#page").bounding_box()
    page.touchscreen.tap(box["x"] + 10.5 * box["width"] / 80, box["y"] + 12.5 * box["height"] / 24)
    assert page.locator("#cell").text_content().startswith("Row 12, column 10: ") and not problems
    context.close()


@pytest.mark.browser
def test_stages_and_looks(opened, replay, tmp_path):
    """Another stage shows another model on the same frame. Nothing overflows at any width, in either colour scheme."""
    _, frames, policies = replay
    page = opened("#frame=300")
    page.locator("#stages button").first.click()
    probabilities, _, _ = numbers(policies[0], frames[300].page[None])
    np.testing.assert_allclose(page.evaluate("answer.probabilities"), probabilities[0], atol=1e-4)
    assert "<img" in page.locator("#about").text_content()
    for scheme in ("light", "dark"):
        for width in (1280, 400):
            page = opened("#frame=300", width=width, scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=tmp_path / f"{scheme}_{width}.png", full_page=True)
