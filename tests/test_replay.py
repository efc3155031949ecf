"""A replay shows the game as it was played, and what its model computes, also in JavaScript."""

import json
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import PAGE
from PIL import Image

import viewer.replay.attention
from breakout_ascii import BreakoutAsciiVec
from games.game import BREAKOUT, load_game
from harness.checkpoint import load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from load_model import main, play
from model import GPT, GPTConfig
from policies import SHIPPED, load_policy, make_gpt
from viewer.replay import breakout
from viewer.replay.attention import (
    attention,
    attention_shares,
    evenly_spaced,
    main_thing,
    order_of_heads,
    plain_gpt,
)
from viewer.replay.document import Stage, replay_html
from viewer.replay.pictures import attention_pictures
from viewer.replay.recording import Frame, record
from viewer.replay.text import changes_of, replay_data, things_of

CPU = torch.device("cpu")
GAME = load_game(BREAKOUT)


def played(policy, *limits, game=GAME, **options):
    """Return the steps of a policy's play."""
    return list(play(policy, game.make(), *limits, **options))


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
    things = breakout.things_of(page)
    counts = np.bincount(things.on(page)[0], minlength=len(things.names))
    assert dict(zip(things.names, counts)) == {
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
    np.testing.assert_allclose(attention_shares(gpt, page, things), np.tile(counts / 1944, (4, 1)), atol=1e-6)
    looks = np.zeros((3, len(things.names)))
    looks[0, [1, 2, 3, 6]] = 0.2, 0.2, 0.2, 0.4
    looks[1, 6] = 1
    looks[2, 0] = 1
    expected = [("paddle", pytest.approx(0.6)), ("empty space", 1), ("ball", 1)]
    assert [main_thing(head, things) for head in looks] == expected
    assert order_of_heads(looks, things) == [2, 0, 1]


@pytest.mark.parametrize("length, seen", [(1, 1), (500, 500), (501, 251), (1351, 451)])
def test_heads_are_measured_on_at_most_500_pages_spread_evenly(length, seen):
    chosen = evenly_spaced(np.arange(length))
    assert len(chosen) == seen <= 500 and len(set(np.diff(chosen))) <= 1 and chosen[0] == 0


def test_the_file_holds_the_game(monkeypatch):
    """It has every frame, with the last page of each game. A hostile name becomes neither markup nor a placeholder of a
    template."""
    monkeypatch.setattr(viewer.replay.attention, "MEASURED", 20)  # the attention takes most of the time
    policy, _ = load_policy(SHIPPED)
    steps = played(policy, episodes=2, sample=True, seed=1)
    frames = list(record(steps))
    hostile = "</script><img src=x onerror=alert(1)>$data ${script}"
    text = replay_html(frames, [Stage(hostile, policy)], GAME, hostile, hostile)
    data = data_of(text)
    assert len(frames) == len(steps) + 2 == len(data["frames"])
    assert data["name"] == data["stages"][0]["label"] == hostile
    assert "<img" not in text and text.count("</script>") == 4
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
        assert breakout.ball_and_paddle(page) == (x, 22, left)


def test_stages_of_a_run(tmp_path, capsys):
    """The page has the stages of the run that its model went through, and the model itself."""
    config = GPTConfig(**PAGE, n_head=4, n_embd=16)
    for name, step, sizes in (
        ("stage_0", 0, config),
        ("stage_40960", 40_960, config),
        ("stage_9000", 9_000, config),
        ("stage_50000", 50_000, replace(config, n_embd=8)),  # of another model
        ("stage_2000000", 2_000_000, config),
        ("checkpoint_1", 500, config),
        ("best_model", 1_000_000, config),
    ):
        torch.manual_seed(step)
        weights = {key: x.half() if "stage" in name else x for key, x in GPT(sizes).state_dict().items()}
        save_checkpoint(
            tmp_path / f"{name}.safetensors", {"gpt_config": asdict(sizes), "model": weights, "global_step": step}
        )
    (tmp_path / "stage_60000.safetensors").write_bytes(b"damaged")

    def data(model):
        assert main([str(model), "--steps", "20", "--out", str(tmp_path / "replay.html")]) == 0
        return data_of((tmp_path / "replay.html").read_text(encoding="utf-8"))

    def labels(model):
        return [stage["label"] for stage in data(model)["stages"]]

    of_run = data(tmp_path)
    assert [stage["label"] for stage in of_run["stages"]] == ["start", "9,000 steps", "40,960 steps", "1,000,000 steps"]
    assert len({stage["weights"] for stage in of_run["stages"]}) == 4 and "wrote" in capsys.readouterr().out
    assert of_run["frames"][-1][3] == -2  # the recording ends there, the game does not
    assert labels(tmp_path / "stage_9000.safetensors") == ["start", "9,000 steps"]
    assert labels(tmp_path / "stage_0.safetensors") == ["start"]
    state = load_checkpoint(tmp_path / "best_model.safetensors")
    del state["global_step"]
    save_checkpoint(tmp_path / "foreign.safetensors", state)
    assert labels(tmp_path / "foreign.safetensors") == ["start"]  # it says no steps


def test_pictures_show_attention(tmp_path):
    """For a head that looks only at the ball, the ball's cell is hot and the others are grey. All heads fit side by
    side."""
    policy, _ = load_policy(SHIPPED)
    gpt, frames = plain_gpt(policy), list(record(played(policy, 30)))
    head = int(attention(gpt, frames[20].page[None])[0, :, int((frames[20].page == ord("O")).argmax())].argmax())
    one = list(attention_pictures(gpt, frames, GAME, head))
    row, column = divmod(int((frames[20].page == ord("O")).argmax()), 81)
    picture = one[20][14:]
    assert picture.shape == (264, 480, 3)
    hot = picture[row * 11 : row * 11 + 11, column * 6 : column * 6 + 6].astype(int)
    assert (hot[..., 0] - hot[..., 2] > 100).mean() > 0.5
    assert (picture[..., 0].astype(int) - picture[..., 2] > 100).sum() < 2 * 66  # pixels of two characters
    assert next(attention_pictures(gpt, frames[:1], GAME)).shape == (4 * (132 + 14), 4 * 240, 3)
    main([str(SHIPPED), "--attention", "--steps", "5", "--out", str(tmp_path / "heads.gif")])
    with Image.open(tmp_path / "heads.gif") as gif:
        assert gif.size == (960, 614) and gif.n_frames == 6


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


# Other games than Breakout


class Markup(gym.Env):
    """A game whose pages, actions and rewards are as hard to show as any: markup, quotes, 25 actions, a fine of -0.1.

    Each action writes somewhere. Now and then a life is lost; an episode has 40 steps.
    """

    ROWS, COLUMNS = 5, 33
    actions = ("<b>stay</b>", 'a "quoted" name', *(f"action {i}" for i in range(2, 25)))
    colours = {"<": (255, 80, 80), '"': (90, 200, 255)}
    text = r"""</script><script>alert(1)</script> <!-- &amp; ${data} $data '"` \\ \u003c"""

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 127, (self.ROWS, self.COLUMNS), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.page = np.frombuffer(self.text.ljust(self.ROWS * self.COLUMNS).encode(), np.uint8).copy()
        self.steps = 0
        self.lives = 3
        return self.page.reshape(self.ROWS, self.COLUMNS).copy(), {"lives": self.lives}

    def step(self, action):
        self.steps += 1
        self.page[self.np_random.integers(len(self.page))] = ord("<") + action
        self.lives -= int(self.steps % 20 == 0)
        reward = 1.0 if self.page[0] != ord("<") else -0.1
        page = self.page.reshape(self.ROWS, self.COLUMNS).copy()
        return page, reward, False, self.steps == 40, {"lives": np.int64(self.lives)}


@pytest.fixture(scope="module")
def markup():
    """Return the `Game` of Markup."""
    gym.register("Markup-v0", Markup)
    yield load_game("Markup-v0")
    del gym.registry["Markup-v0"]


def restored(changes):
    """Return the pages that `changes_of` has shortened, as text.js unpacks them."""
    pages = []
    for change in changes:
        page = list(pages[-1]) if pages else []
        for position, new in zip(change[::2], change[1::2]):
            page[position : position + len(new)] = new
        pages.append("".join(page))
    return pages


def test_pages_are_kept_as_their_changes():
    """Whether nothing changes, a little, or all. A long game with few changes makes a small file."""
    rng = np.random.default_rng(0)
    pages = [rng.integers(32, 127, 1944, np.uint8)]
    for number in (0, 1, 2, 30, 1944, *[6] * 200):
        page = pages[-1].copy()
        page[rng.integers(1944, size=number)] = rng.integers(32, 127, number)
        pages.append(page)
    changes = changes_of(np.stack(pages))
    assert restored(changes) == [page.tobytes().decode() for page in pages]
    assert changes[1] == [] and changes_of(np.stack(pages[:1])) == [[0, pages[0].tobytes().decode()]]
    assert len(json.dumps(changes[6:], separators=(",", ":"))) / 200 < 75  # bytes a step, and 10,000 steps in 0.75 MB


def test_heads_are_named_by_the_characters_they_look_at():
    """The rarest character comes first. Those that cannot be seen come last, and have a name."""
    page = np.frombuffer(b"@..#\n 'a#\n....\n", np.uint8)[None]
    things = things_of(page)
    assert sorted(things.names[:3]) == ["'" * 3, "'@'", "'a'"]
    assert things.names[3:] == ["'#'", "'.'", "space", "line ends"]
    assert [things.names[i] for i in things.on(page)[0, [0, 1, 4, 5]]] == ["'@'", "'.'", "line ends", "space"]
    looks = np.array([[0, 0, 0, 0.1, 0, 0.9, 0], [0.6, 0, 0.4, 0, 0, 0, 0], [0, 0, 0, 0.6, 0.4, 0, 0]])
    named = [main_thing(head, things) for head in looks]
    assert named == [("space", 0.9), (things.names[0], 0.6), ("'#'", 0.6)] and order_of_heads(looks, things) == [
        1,
        2,
        0,
    ]


def test_scores_are_as_short_as_they_can_be(markup):
    """0.1 + 0.2 is 0.3, and 2.0 is 2. Lives are kept where a game has them."""
    page = np.full(170, 32, np.uint8)
    frames = [Frame(page, 0, score, lives) for score, lives in ((0.1 + 0.2, None), (2.0, 3), (-1e-9, None))]
    assert json.dumps(replay_data(frames, markup)["frames"]) == "[[0, 0.3], [0, 2, 3], [0, 0]]"


def test_the_file_holds_any_game(markup):
    """Nothing on a page or in the name of an action becomes markup or a placeholder of a template."""
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes(), n_head=4, n_embd=16), CPU)
    steps = played(policy, 100, game=markup, sample=True)
    frames = list(record(steps))
    text = replay_html(frames, [Stage("", policy)], markup, "", "")
    data = data_of(text)
    assert text.count("<script") == text.count("</script>") == 4 and "<b>stay" not in text
    assert restored(data["changes"]) == [bytes(frame.page).decode() for frame in frames]
    assert data["actions"] == list(Markup.actions) and len(frames) == 103
    assert [frame[0] for frame in data["frames"] if frame[0] < 0] == [-1, -1, -2]
    assert data["frames"][40] == [-1, pytest.approx(steps[39].after.score), 1]
    assert data["frames"][41] == [steps[40].action, 0, 3]


@pytest.mark.parametrize("rows, columns", [(1, 8), (7, 31), (50, 133)])
def test_pictures_show_the_attention_on_any_page(rows, columns):
    """A head that looks at one character alone makes its cell hot, and no other."""
    game = SimpleNamespace(id="Other-v0", rows=rows, columns=columns, colours={})
    characters = " .@\n"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(rows, columns, characters, n_action=2, n_head=2, n_embd=8))
    page = np.full((rows, columns), ord("."), np.uint8)
    page[:, -1] = ord("\n")
    row, column = rows // 2, columns // 2
    page[row, column] = ord("@")
    with torch.no_grad():  # the newline at the end asks for "@", and no place matters
        gpt.wte.weight[:] = 0
        gpt.wte.weight[2, 0] = gpt.wte.weight[3, 1] = 1
        gpt.wre.weight[:] = gpt.wce.weight[:] = 0
        gpt.blocks[0].attn.c_attn.weight[:] = 0
        gpt.blocks[0].attn.c_attn.weight[:8, 1] = gpt.blocks[0].attn.c_attn.weight[8:16, 0] = 5
    frame = Frame(page.reshape(-1), 0, 0)
    picture = next(attention_pictures(gpt, [frame], game, head=1))[14:]
    hot = np.argwhere(
        (picture[..., 0].astype(int) - picture[..., 2] > 100).all(-1)
        if picture.ndim == 4
        else picture[..., 0].astype(int) - picture[..., 2] > 100
    )
    height = picture.shape[0] // rows
    width = height * 6 // 11
    assert len(hot) > 0.5 * height * width
    assert set(hot[:, 0] // height) == {row} and set(hot[:, 1] // width) == {column}
    both = next(attention_pictures(gpt, [frame], game))
    assert both.shape[1] % 2 == 0 and both.shape[1] >= 300


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
    frames = list(record(played(policy, 1000)))
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    hostile = "<img src=x onerror=alert(1)>"
    path.write_text(
        replay_html(frames, [Stage("start", untrained), Stage(hostile, policy)], GAME, hostile, hostile),
        encoding="utf-8",
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
    frames = list(record(played(policy, 3)))
    (tmp_path / "deep.html").write_text(replay_html(frames, [Stage("", policy)], GAME, "", ""), encoding="utf-8")
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


@pytest.fixture(scope="module")
def other_replay(tmp_path_factory, markup):
    """Write a replay of another game. Returns file, frames and policy."""
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes()), CPU)
    frames = list(record(played(policy, 100, game=markup, sample=True)))
    path = tmp_path_factory.mktemp("other") / "replay.html"
    path.write_text(replay_html(frames, [Stage("", policy)], markup, "", ""), encoding="utf-8")
    return path, frames, policy


@pytest.mark.browser
@pytest.mark.parametrize("n_layer", [1, 2])
def test_the_browser_reads_any_page(opened, tmp_path, markup, n_layer):
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes(), n_layer=n_layer, n_head=4, n_embd=16), CPU)
    frames = list(record(played(policy, 45, game=markup, sample=True)))
    (tmp_path / "any.html").write_text(replay_html(frames, [Stage("", policy)], markup, "", ""), encoding="utf-8")
    page = opened(path=tmp_path / "any.html")
    texts = page.evaluate("frames.map((_, i) => textOf(pageOf(stateOf(i))))")
    assert texts == [bytes(frame.page).decode() for frame in frames]
    found = page.evaluate(READ, [0, texts])
    pages = np.stack([frame.page for frame in frames])
    for i, expected in enumerate((*numbers(policy, pages), attention(plain_gpt(policy), pages))):
        np.testing.assert_allclose(np.array([one[i] for one in found]), expected, atol=1e-4, rtol=1e-4)
    page.locator("#slider").fill("30")
    shown = page.evaluate("[...element('page').children].map((line) => line.textContent).join('')")
    assert shown == texts[30]


@pytest.mark.browser
def test_an_edit_by_character_changes_the_answer_as_pytorch_says(opened, other_replay):
    """By mouse and keys, and in the field that a phone needs. Escape undoes all, and then lets the page go."""
    path, frames, policy = other_replay
    page = opened("#frame=50", path=path)
    box = page.locator("#page").bounding_box()
    tokens = frames[50].page.reshape(5, 34).copy()

    def check():
        assert page.evaluate("textOf(pageOf(current()))") == bytes(tokens.reshape(-1)).decode()
        probabilities, values, changes = numbers(policy, tokens.reshape(1, -1))
        np.testing.assert_allclose(page.evaluate("answer.probabilities"), probabilities[0], atol=1e-4)
        np.testing.assert_allclose(page.evaluate("[...answer.changes]"), changes[0], atol=1e-4)
        assert float(page.locator("#value").text_content()) == pytest.approx(values[0], abs=6e-4)

    check()
    assert page.locator("#write").is_disabled() and page.locator("#undo").is_disabled()
    page.mouse.click(box["x"] + 10.5 * box["width"] / 33, box["y"] + 2.5 * box["height"] / 5)
    page.mouse.move(box["x"] + 1, box["y"] + 1)  # the cursor stays where the click was
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
    page.keyboard.press("Escape")
    tokens = frames[50].page.reshape(5, 34).copy()
    check()
    page.locator("#page").focus()
    page.keyboard.press("Escape")
    assert page.locator("#write").is_disabled() and page.evaluate("cursor") is None
    page.keyboard.press("h")  # is no character of the page now
    check()
    assert page.evaluate("shown.head") != "mean"


@pytest.mark.browser
def test_events_and_status_of_any_game(opened, other_replay):
    _, frames, _ = other_replay
    page = opened(path=other_replay[0])
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
    page.keyboard.press("m")
    page.keyboard.press("r")  # Breakout's
    assert status.text_content().startswith("Step 41 ") and page.locator("#map").is_hidden()
    assert page.locator("#actions tr").count() == 25


@pytest.mark.browser
def test_looks_of_any_game(opened, other_replay):
    """With 25 actions nothing overflows, and the one that was taken can be seen."""
    for scheme in ("light", "dark"):
        for width in (1280, 400):
            page = opened("#frame=30", path=other_replay[0], width=width, scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            top, bottom = page.evaluate(
                "(({ top, bottom }) => [top, bottom])(element('answers').getBoundingClientRect())"
            )
            row = page.locator("#actions tr.chosen").bounding_box()
            assert top - 1 <= row["y"] and row["y"] + row["height"] <= bottom + 1
