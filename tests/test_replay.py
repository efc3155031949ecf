"""A replay shows the game as it was played, and what its model computes, also in JavaScript."""

import itertools
import json
import re
import string
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PAGE
from PIL import Image
from replay_helpers import CPU, GAME, Markup, data_of, numbers, random_pages, recorded

import viewer.replay.attention
from breakout_ascii import BRICK_COLUMNS, BRICK_ROWS, BreakoutAscii, BreakoutAsciiVec, Games
from evaluation import greedy
from harness.checkpoint import load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from load_model import Situation, Step, main, play
from model import GPT, GPTConfig
from policies import SHIPPED, load_policy, make_gpt
from viewer.replay import breakout, text
from viewer.replay.attention import (
    attention,
    attention_shares,
    evenly_spaced,
    main_thing,
    order_of_heads,
    plain_gpt,
)
from viewer.replay.document import SCRIPTS, Stage, replay_html
from viewer.replay.pictures import attention_pictures
from viewer.replay.recording import Frame, record
from viewer.replay.text import changes_of, replay_data, things_of
from viewer.replay.weights import rounded, written


def read_weights(text, largest, letters, shape):
    """Return the weights in a text, an array of this shape, as weights.py says that they are written."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    weights = []
    for first in range(0, len(text), letters):
        number = 0
        for letter in text[first : first + letters]:
            number = number * 64 + alphabet.index(letter)
        weights.append(number - 64**letters // 2)
    units = np.reshape(largest, (-1, 1)) / (64**letters // 2 - 1)
    return np.reshape(np.reshape(weights, (len(largest), -1)) * units, shape)


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


def played_again(games):
    """Yield the pages of the games in the data of a page, by the rules in Python."""
    whole = np.ones((1, BRICK_ROWS, BRICK_COLUMNS), bool)
    for game in games:
        one = Games(1)
        one.reset(np.array([True]), np.array([game["serves"]]), whole)
        yield one.pages.flatten()
        for action in game["actions"]:
            one.step(np.array([int(action)]))
            yield one.pages.flatten()


def test_the_file_holds_the_game(monkeypatch):
    """It has serves and actions, from which every page follows. A hostile name becomes neither markup nor a placeholder
    of a template."""
    monkeypatch.setattr(viewer.replay.attention, "MEASURED", 20)  # the attention takes most of the time
    policy, _ = load_policy(SHIPPED)
    env = GAME.make()
    one, two = itertools.tee(play(policy, env, episodes=2, sample=True, seed=1))
    frames = list(record(one, breakout.starts(env)))
    steps = list(two)
    hostile = "</script><img src=x onerror=alert(1)>$data ${script}"
    text = replay_html([(Stage(hostile, policy), frames)], GAME, hostile, hostile, {3: 940})
    data = data_of(text)
    (stage,) = data["stages"]
    assert len(frames) == len(steps) + 2 == len(stage["values"])
    assert data["name"] == data["about"] == stage["label"] == hostile and data["without"] == {"3": 940}
    assert "<img" not in text and text.count("</script>") == 2 + len((*SCRIPTS, *breakout.SCRIPTS))
    first, second = stage["games"]
    assert first["serves"] != second["serves"] and first["end"] == second["end"] == -1
    assert first["actions"] + second["actions"] == "".join(str(step.action) for step in steps)
    pages = np.stack([frame.page for frame in frames])
    np.testing.assert_array_equal(np.stack(list(played_again(stage["games"]))), pages)
    assert len(text) < 400_000
    page = re.sub(r"<script[^>]*application/json.*?</script>|http-equiv", "", text, flags=re.S)
    assert "http" not in page  # nothing is fetched
    with torch.no_grad():
        values = torch.cat([policy(pages[i : i + 500])[1] for i in range(0, len(pages), 500)])
    np.testing.assert_allclose(stage["values"], values, atol=0.006)


def test_a_recording_that_is_cut_ends_in_another_way_than_a_game():
    """Each game has its own serves, and the first is known before a second one begins."""
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**PAGE, n_head=2, n_embd=8), CPU)
    frames = recorded(policy, 300, sample=True)
    (data,) = breakout.replay_data(frames).values()
    assert len(data) > 1 and [game["end"] for game in data] == [-1] * (len(data) - 1) + [-2]
    assert sum(len(game["actions"]) for game in data) == 300 == len(frames) - len(data)
    assert all(np.shape(game["serves"]) == (5, 3) for game in data)
    assert len({str(game["serves"]) for game in data}) > 1
    np.testing.assert_array_equal(np.stack(list(played_again(data))), [frame.page for frame in frames])
    (cut,) = breakout.replay_data(recorded(policy, 1)).values()
    assert [len(game["actions"]) for game in cut] == [1] and cut[0]["end"] == -2


def test_a_recording_keeps_how_each_game_began():
    """Whatever `start_of` says in the first step of a game, it is in the first frame of that game, and in no other."""
    page = np.zeros(2, np.uint8)
    before = [Situation(page, steps, lives=2) for steps in (0, 1, 0)]
    after = Situation(page, 1, 7.0, 1)
    steps = [Step(now, 2, after, {}, over, over) for now, over in zip(before, (False, True, True))]
    number = itertools.count(10)
    frames = list(record(steps, lambda: next(number)))
    assert [frame.start for frame in frames] == [10, None, None, 11, None]
    assert [frame.action for frame in frames] == [2, 2, -1, 2, -1]
    assert [frame.score for frame in frames] == [0, 0, 7, 0, 7] and [frame.lives for frame in frames] == [2, 2, 1, 2, 1]
    steps[2] = steps[2]._replace(over=False)
    assert list(record(steps))[-1].action == -2 and all(frame.start is None for frame in record(steps))


# Weights as text


def test_weights_are_written_to_within_half_a_unit():
    """Each row has a unit of its own; the text says the same as the weights that `rounded` leaves."""
    rng = np.random.default_rng(0)
    for letters in (2, 3):
        for shape in ((5,), (1, 1), (200, 7), (3, 4, 5)):
            weights = torch.from_numpy(
                rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
            ).float()
            text, largest = written(weights, letters)
            assert len(text) == letters * weights.numel() and len(largest) == weights.numel() // shape[-1]
            again = read_weights(text, largest, letters, shape)
            unit = np.reshape(largest, (*shape[:-1], 1)) / (64**letters // 2 - 1)
            assert (np.abs(again - weights.numpy()) <= 0.5001 * unit).all()
            np.testing.assert_allclose(unit[..., 0] * (64**letters // 2 - 1), weights.abs().amax(-1), rtol=1e-4)


@pytest.mark.parametrize("letters", [2, 3])
def test_the_largest_weight_is_never_written_as_its_opposite(letters):
    """Whatever its digits are, it needs no more letters than others."""
    weights = torch.logspace(-3, 3, 5000, dtype=torch.double).float()[:, None] * torch.tensor([1.0, -1.0, 0.3])
    again = read_weights(*written(weights, letters), letters, weights.shape)
    np.testing.assert_allclose(again, weights.numpy(), rtol=4 / 64**letters)


def test_rows_of_zeros_and_of_a_huge_range_can_be_written():
    """A zero stays a zero, and so does a row of them. A huge weight rounds its own row to zeros, but no other."""
    weights = torch.tensor([[0.0, 0.0, 0.0], [1e30, 1.0, -1e30], [1e-30, 0.0, -5e-31], [0.5, -0.25, 0.0]])
    for letters in (2, 3):
        again = read_weights(*written(weights, letters), letters, weights.shape)
        assert (again[0] == 0).all() and again[1, 1] == 0 and again[2, 1] == again[3, 2] == 0
        rows = np.array([[1e30, 0, -1e30], [1e-30, 0, -5e-31], [0.5, -0.25, 0]])
        np.testing.assert_allclose(again[1:], rows, rtol=3 / 64**letters)


@pytest.mark.parametrize("letters", [2, 3])
def test_rounded_weights_are_what_the_page_reads_however_often_they_are_rounded(letters):
    """An earlier stage plays with its rounded weights before these are written, which rounds them once more."""
    policy, _ = load_policy(SHIPPED)
    pages = random_pages(50)
    exact = numbers(policy, pages)
    rounded(policy, letters)
    once = {name: weights.clone() for name, weights in policy.state_dict().items()}
    for name, weights in once.items():
        again = read_weights(*written(weights, letters), letters, weights.shape)
        assert torch.equal(torch.from_numpy(again).float(), weights), name
    rounded(policy, letters)
    assert all(torch.equal(weights, once[name]) for name, weights in policy.state_dict().items())
    error = max(np.abs(ours - theirs).max() for ours, theirs in zip(numbers(policy, pages)[::2], exact[::2]))
    assert 0 < error < {2: 0.1, 3: 2e-4}[letters]  # of probabilities


def actions_of(stage, config, serves, steps):
    """Return the actions, as text, of the model whose weights the page has for a stage, in a game with these serves."""
    gpt = GPT(config)
    state = gpt.state_dict()
    letters = iter(stage["weights"])
    largest = iter(stage["largest"])
    for name, weights in state.items():
        text = "".join(itertools.islice(letters, stage["letters"] * weights.numel()))
        of_rows = list(itertools.islice(largest, weights.numel() // weights.shape[-1]))
        state[name] = torch.from_numpy(read_weights(text, of_rows, stage["letters"], weights.shape)).float()
    gpt.load_state_dict(state)
    env = BreakoutAscii()
    page, _ = env.reset(options={"serves": np.array(serves)[:, 1]})
    actions = ""
    for _ in range(steps):
        actions += str(greedy(gpt)(page[None])[0])
        page, *_ = env.step(int(actions[-1]))
    return actions


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
    assert [stage["letters"] for stage in of_run["stages"]] == [2, 2, 2, 3] and "wrote" in capsys.readouterr().out
    for stage in of_run["stages"]:
        (game,) = stage["games"]
        assert game["end"] == -2  # the recording ends there, the game does not
        assert game["actions"] == actions_of(stage, config, game["serves"], 20)
    assert len({stage["weights"] for stage in of_run["stages"]}) == 4
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
    gpt, frames = plain_gpt(policy), recorded(policy, 30)
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


def test_scores_are_as_short_as_they_can_be():
    """0.1 + 0.2 is 0.3, and 2.0 is 2. Lives are kept where a game has them."""
    page = np.full(170, 32, np.uint8)
    frames = [Frame(page, 0, score, lives) for score, lives in ((0.1 + 0.2, None), (2.0, 3), (-1e-9, None))]
    assert json.dumps(replay_data(frames)["frames"]) == "[[0, 0.3], [0, 2, 3], [0, 0]]"


def test_the_file_holds_any_game(markup):
    """Nothing on a page or in the name of an action becomes markup or a placeholder of a template."""
    torch.manual_seed(0)
    policy = make_gpt(GPTConfig(**markup.page_sizes(), n_head=4, n_embd=16), CPU)
    steps = list(play(policy, markup.make(), 100, sample=True))
    frames = recorded(policy, 100, game=markup, sample=True)
    html = replay_html([(Stage("", policy), frames)], markup, "", "")
    data = data_of(html)
    assert html.count("<script") == html.count("</script>") == 2 + len((*SCRIPTS, *text.SCRIPTS))
    assert "<b>stay" not in html
    (stage,) = data["stages"]
    assert restored(stage["changes"]) == [bytes(frame.page).decode() for frame in frames]
    assert data["actions"] == list(Markup.actions) and len(frames) == 103
    assert [frame[0] for frame in stage["frames"] if frame[0] < 0] == [-1, -1, -2]
    assert stage["frames"][40] == [-1, pytest.approx(steps[39].after.score), 1]
    assert stage["frames"][41] == [steps[40].action, 0, 3]


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
