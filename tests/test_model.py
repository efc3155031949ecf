import copy
import math

import numpy as np
import pytest
import torch

from breakout_ascii import BreakoutAsciiVec
import model
from model import GPT, GPTConfig, SharedAttention, shared_attention, sinusoids
from pages import (CHARACTERS, COLUMNS, PAIRS, POSITIONS, ROWS, SECTION, Level, LineIndex, Tree, distinct_lines, every_line,
                   level)  # fmt: skip


def make_gpt(seed=0, **config):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**config))


def random_play():
    env = BreakoutAsciiVec(3)
    env.reset(seed=1)
    rng = np.random.default_rng(1)
    for _ in range(60):
        obs, *_ = env.step(rng.integers(3, size=3))
    return obs


def late_game():
    """Nearly empty walls, the balls anywhere."""
    env = BreakoutAsciiVec(3, varied_starts=1.0)
    env.reset(seed=2)
    env.games.bricks &= np.random.default_rng(2).random(env.games.bricks.shape) < 0.1
    env.games.ball_y[:], env.games.ball_x[:] = (14, 20, 3), (5, 33, 70)
    env.games.draw(np.ones(3, bool))
    return env.observation()


def all_new():
    """No two lines alike, nor any two pieces: random characters but for the last newline."""
    pages = np.random.default_rng(3).choice(np.frombuffer(CHARACTERS.encode(), np.uint8), (3, POSITIONS))
    pages[:, -1] = ord("\n")
    return pages


def foreign_end():
    """The last character is another on each page, so the pages share no query."""
    pages = all_new()
    pages[:, -1] = [ord(c) for c in "O# "]
    return pages


def one_game():
    """Pages that begin alike: four steps of one game, the first page twice."""
    env = BreakoutAsciiVec(1)
    pages = [env.reset(seed=1)[0]] + [env.step(np.array([1]))[0] for _ in range(4)]
    return np.concatenate(pages + pages[:1])


PAGES = [random_play, late_game, all_new, foreign_end, one_game]


def outputs_and_gradients(gpt, pages, plain):
    gpt.zero_grad()
    features = gpt.read_every_token(pages) if plain else gpt.features(pages)
    logits, values = gpt.heads(features)
    changes = gpt.change_head(features)
    weights = torch.linspace(-1, 1, logits.numel() + values.numel() + changes.numel(), dtype=logits.dtype)
    (torch.cat([x.flatten() for x in (logits, values, changes)]) * weights).sum().backward()
    return logits, values, {name: p.grad.clone() for name, p in gpt.named_parameters()}


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("pages", PAGES)
def test_fast_path_equals_plain_path(pages, n_layer):
    gpt = make_gpt(n_layer=n_layer, n_head=4, n_embd=32, mlp_expansion=2)
    torch.nn.init.ones_(gpt.value_head.bias)  # a value that happens to be near 0 has no relative error to speak of
    tokens = torch.from_numpy(pages())
    logits, values, gradients = outputs_and_gradients(gpt, tokens, plain=False)
    plain_logits, plain_values, plain_gradients = outputs_and_gradients(gpt, tokens, plain=True)
    assert relative_error(logits, plain_logits) <= 1e-5
    assert relative_error(values, plain_values) <= 1e-5
    whole = torch.cat([g.flatten() for g in plain_gradients.values()]).norm()
    for name, gradient in gradients.items():
        difference = (gradient - plain_gradients[name]).norm()
        assert difference <= 1e-4 * max(plain_gradients[name].norm(), 1e-3 * whole), name


def scores_of_pairs(gpt):
    """(7 * 1944, H) of every character everywhere, in nats."""
    table, rstd = gpt.pair_table()
    return table[torch.from_numpy(PAIRS)].sum(1)[:, 0] * rstd.unsqueeze(1) * math.log(2)


def largest_score(gpt):
    return scores_of_pairs(gpt).abs().max().item()


@pytest.mark.parametrize("pages, largest", [
    (random_play, 50), (late_game, 200), (random_play, 5000), (late_game, 5000), (all_new, 5000)])  # fmt: skip
def test_default_gpt_is_exact_when_scores_are_huge(pages, largest):
    gpt, tokens = make_gpt(), torch.from_numpy(pages()[:1])
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight[: gpt.config.n_embd] *= largest / largest_score(gpt)
    assert largest_score(gpt) == pytest.approx(largest, rel=1e-4)
    exact, plain, *fast = (
        (torch.cat([logits.flatten(), values]), torch.cat([g.flatten() for g in gradients.values()]))
        for logits, values, gradients in (
            outputs_and_gradients(copy.deepcopy(gpt).double(), tokens, plain=True),
            outputs_and_gradients(gpt, tokens, plain=True),
            outputs_and_gradients(gpt, tokens, plain=False),
            outputs_and_gradients(gpt, every_line(tokens), plain=False),
            outputs_and_gradients(gpt, distinct_lines(tokens), plain=False),
        )
    )
    for path in fast:
        for of_exact, of_plain, of_fast in zip(exact, plain, path):  # the answers, then the gradients
            assert (of_fast - of_exact).norm() <= 4 * (of_plain - of_exact).norm() + 1e-6 * of_exact.norm()


def test_lines_are_the_text_of_the_pages():
    """All of them, and the distinct ones: the same text in another row is another line."""
    pages = np.concatenate([one_game(), random_play()])
    text = np.array([ord(c) for c in CHARACTERS], np.uint8)
    for lines, n in ((every_line, ROWS * len(pages)), (distinct_lines, None)):
        characters, rows, numbers = lines(torch.from_numpy(pages))
        np.testing.assert_array_equal(text[characters[numbers].flatten(1)], pages)
        assert torch.equal(rows[numbers], torch.arange(ROWS).expand(len(pages), ROWS))
        assert len(rows) == len(characters) == (n or len({(i % ROWS, line.tobytes()) for i, line in enumerate(pages.reshape(-1, COLUMNS))}))


@pytest.mark.parametrize("spread, rescaled", [(100, False), (400, True)])
def test_pages_far_apart_in_one_head(monkeypatch, spread, rescaled):
    """In the first head four characters dwarf the rest of their page, and the other pages lack them."""
    torch.manual_seed(0)
    table, rstd = torch.randn(120, 1 + 3, 2), 0.5 + torch.rand(40)  # 40 pairs, each of three rows of its own
    table[:12:3, 0, 0] += spread  # bits, of the first four pairs; the second head stays near
    table.requires_grad_(), rstd.requires_grad_()
    make = lambda children, n: Level(*map(torch.from_numpy, level(children, n)))
    pages = np.stack([np.arange(0, 20), np.arange(20, 40), np.arange(10, 30)])
    tree = Tree(torch.arange(40), make(np.arange(120).reshape(40, 3), 120), [make(pages, 40)])
    used = []
    apply = SharedAttention.apply
    monkeypatch.setattr(SharedAttention, "apply", lambda *args: used.append(args[0].size(2)) or apply(*args))
    y = shared_attention(table, rstd, tree)
    assert used == ([2, 1] if rescaled else [2])
    rows = table.view(40, 3, 4, 2).sum(1) * rstd.view(-1, 1, 1)
    weights = (rows[pages, 0] * math.log(2)).softmax(1)  # (3, 20, 2)
    expected = (weights.unsqueeze(2) * rows[pages, 1:]).sum(1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6 * spread)  # the reference rounds scores of this size
    loss = torch.linspace(-1, 1, y.numel()).view_as(y)
    for ours, theirs in zip(*(torch.autograd.grad((out * loss).sum(), (table, rstd)) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * spread)


def test_one_layer_equals_attention_written_out():
    """An independent reference in NumPy float64: one head and one position at a time."""
    gpt, page = make_gpt(n_head=4, n_embd=16).double(), late_game()[:1]
    w = {name: p.detach().numpy() for name, p in gpt.named_parameters()}

    def norm(x, g):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g

    x = np.array([w["wte.weight"][CHARACTERS.index(chr(t))] + w["wre.weight"][p // 81] + w["wce.weight"][p % 81]
                  for p, t in enumerate(page[0])])  # fmt: skip
    w_q, w_k, w_v = np.split(w["blocks.0.attn.c_attn.weight"], 3)
    h = norm(x, w["blocks.0.ln_1.weight"])
    y = []
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        scores = np.array([h[-1] @ w_q[rows].T @ w_k[rows] @ h[p] for p in range(POSITIONS)]) / math.sqrt(4)
        weights = np.exp(scores - scores.max())
        y.append((weights / weights.sum()) @ (h @ w_v[rows].T))
    z = x[-1] + w["blocks.0.attn.c_proj.weight"] @ np.concatenate(y)
    hidden = w["blocks.0.mlp.c_fc.weight"] @ norm(z, w["blocks.0.ln_2.weight"])
    gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
    z = norm(z + w["blocks.0.mlp.c_proj.weight"] @ gelu, w["ln_f.weight"])
    logits, values = gpt(torch.from_numpy(page))
    np.testing.assert_allclose(logits[0].detach(), w["policy_head.weight"] @ z + w["policy_head.bias"], atol=1e-9)
    np.testing.assert_allclose(values.detach(), w["value_head.weight"] @ z + w["value_head.bias"], atol=1e-9)


def test_every_character_counts():
    """Change one character anywhere that a game can: the answer changes, on both paths."""
    gpt, page = make_gpt(), random_play()[:1]
    for place in (0, 81 * 3 + 40, 81 * 22 + 79):
        other = page.copy()
        other[0, place] = ord("O")
        for read in (gpt.features, gpt.read_every_token):
            assert not torch.allclose(read(torch.from_numpy(page)), read(torch.from_numpy(other)), atol=1e-5)


@pytest.mark.parametrize("games, config", [(8, {}), (2, {"n_layer": 2, "n_head": 2, "n_embd": 8})])
def test_reader_reads_what_the_model_reads(games, config):
    gpt, env = make_gpt(**config), BreakoutAsciiVec(games, varied_starts=0.7)
    obs, _ = env.reset(seed=0)
    reader = gpt.reader()
    for step in range(80):
        numbers = reader.encode(obs)
        logits, values = reader(numbers)
        if step % 16 == 0:
            expected_logits, expected_values = gpt(torch.from_numpy(obs))
            torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6)
            batch_logits, _ = gpt(reader.batch(numbers))
            torch.testing.assert_close(logits, batch_logits, rtol=1e-5, atol=1e-6)
        obs, *_ = env.step(np.arange(games) % 3)
    assert not logits.requires_grad


def test_a_prefix_tree_holds_each_beginning_once():
    pages, index = np.concatenate([one_game(), random_play(), all_new()]), LineIndex()
    tree = index.prefix_tree(index.encode(pages))
    texts = np.array([ord(c) for c in CHARACTERS], np.uint8)[tree.sections]
    for length, level in enumerate(tree.levels, start=1):
        beginnings = [texts[path].tobytes() for path in level.children.numpy()]
        assert len(beginnings) == len(set(beginnings))
        assert set(beginnings) == {page[: length * SECTION].tobytes() for page in pages}
        own = level.children[:, -1]
        assert (tree.starts[own] == (length - 1) * SECTION).all()
    assert [beginnings[i] for i in tree.pages] == [page.tobytes() for page in pages]
    assert len(tree.sections) == sum(len(level.children) for level in tree.levels)


def test_compiled_blocks_are_compiled_for_few_sizes(monkeypatch):
    """Every batch has another number of sections. What is compiled anew for each would soon not be compiled at all."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    counter = CompileCounter()
    monkeypatch.setattr(model, "compiled_once", lambda f: torch.compile(f, dynamic=True, backend=counter))
    gpt, pages = make_gpt(n_layer=3, n_head=2, n_embd=16), np.concatenate([one_game(), random_play(), all_new()])
    expected = gpt(torch.from_numpy(pages))[0]
    gpt.compile_blocks()
    assert gpt.compiled and not copy.deepcopy(gpt).compiled
    frames = []
    for n in (2, 5, 8, 10, len(pages)):
        logits, _ = gpt(torch.from_numpy(pages[:n]))
        logits.sum().backward()
        with torch.no_grad():
            gpt(torch.from_numpy(pages[:n]))
        frames.append(counter.frame_count)
    torch.testing.assert_close(logits, expected)
    assert 4 <= frames[-1] == frames[1] <= 6  # two halves, with gradients and without


def test_bf16_is_for_the_blocks_alone():
    gpt, tokens = make_gpt(n_layer=3, n_head=6, n_embd=96, mlp_expansion=1), torch.from_numpy(one_game())
    with torch.no_grad():
        plain, residuals = gpt.read_every_token(tokens), []
        gpt.ln_f.register_forward_pre_hook(lambda _, args: residuals.append(args[0]))
        gpt.bf16 = True
        for features in (gpt.features(tokens), gpt.read_every_token(tokens)):
            assert features.dtype == residuals.pop().dtype == torch.float32
            assert 0 < relative_error(features, plain) < 0.03


def test_line_index_numbers_distinct_lines_once():
    index, pages = LineIndex(), random_play()
    first = index.encode(pages)
    known = len(index.lines)
    assert known == len({(row, page[81 * row : 81 * row + 81].tobytes()) for page in pages for row in range(ROWS)})
    again = index.encode(pages[::-1].copy())
    np.testing.assert_array_equal(again, first[::-1])
    assert len(index.lines) == known
    pairs = index.piece_pairs()[index.line_pieces()[torch.from_numpy(first)]].reshape(len(pages), POSITIONS)
    text = np.array([ord(c) for c in CHARACTERS])[pairs.numpy() // POSITIONS]
    np.testing.assert_array_equal(text, pages)
    np.testing.assert_array_equal(pairs.numpy() % POSITIONS, np.tile(np.arange(POSITIONS), (len(pages), 1)))


def test_hashes_tell_lines_apart():
    """Every line that differs from another in one character, and the same line in another row."""
    page = np.frombuffer(CHARACTERS.encode(), np.uint8)[np.random.default_rng(4).integers(7, size=POSITIONS)]
    pages = np.tile(page, (7 * COLUMNS, 1))
    pages[:, :COLUMNS] = page[:COLUMNS]
    for i, c in enumerate(CHARACTERS.encode()):
        pages[i * COLUMNS + np.arange(COLUMNS), np.arange(COLUMNS)] = c
    pages[:, COLUMNS : 2 * COLUMNS] = pages[:, :COLUMNS]
    index = LineIndex()
    index.encode(pages)
    assert len(index.lines) == 2 * (6 * COLUMNS + 1) + 22


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("spoil", [
    lambda pages: pages[:, :-1], lambda pages: pages[0], lambda pages: pages[:0], lambda pages: pages.astype(np.int64),
    lambda pages: np.where(pages == ord("O"), ord("x"), pages).astype(np.uint8),
    lambda pages: np.where(pages == ord("O"), 200, pages).astype(np.uint8),
])  # fmt: skip
def test_wrong_pages_are_refused(spoil, n_layer):
    gpt = make_gpt(n_layer=n_layer, n_head=2, n_embd=8)
    with pytest.raises(ValueError, match="pages must be|character set") as error:
        gpt(torch.from_numpy(np.ascontiguousarray(spoil(late_game()))))
    assert "\n" not in str(error.value)


def test_a_refused_page_leaves_the_index_as_it_was():
    index, pages = LineIndex(), random_play()
    expected = index.encode(pages)
    bad = pages.copy()
    bad[1, 500] = ord("x")
    with pytest.raises(ValueError):
        index.encode(bad)
    np.testing.assert_array_equal(index.encode(pages), expected)


@pytest.mark.parametrize("wrong", [{"block_size": 100}, {"n_layer": 0}, {"n_head": 7}, {"n_embd": 30, "n_head": 15}])
def test_wrong_configurations_are_refused(wrong):
    with pytest.raises(ValueError):
        GPTConfig(**wrong)


def test_initial_attention_finds_one_ball():
    """With std 0.02 everywhere, as in nanoGPT, no head gives the ball ten times its share; with ours some do."""
    places = 14 * COLUMNS + torch.arange(1, 79)
    ball, blank = (CHARACTERS.index(c) * POSITIONS + places for c in "O ")

    def lift(gpt):
        scores = scores_of_pairs(gpt)
        return (scores[ball] - scores[blank]).mean(0).max().item()

    gpt = make_gpt()
    small = copy.deepcopy(gpt)
    with torch.no_grad():
        for p in small.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else None
    assert lift(small) < math.log(1.1) and lift(gpt) > math.log(10)


def test_no_two_positions_look_alike():
    positions = (sinusoids(ROWS, 64).unsqueeze(1) + sinusoids(COLUMNS, 64).roll(32, dims=1)).flatten(0, 1)
    distances = torch.cdist(positions, positions) + 9 * torch.eye(POSITIONS)
    assert distances.min() > 0.1


def test_speed_up_falls_back_without_a_compiler(monkeypatch):
    gpt = make_gpt(n_layer=2, n_head=2, n_embd=8)
    expected, _ = gpt(torch.from_numpy(late_game()))
    gpt.speed_up()  # not on CUDA: nothing happens
    assert gpt.bf16 is False

    def no_compiler(f):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(model, "compiled_once", no_compiler)
    with pytest.warns(UserWarning, match="going on without: no compiler$"):
        gpt.compile_blocks()
    torch.testing.assert_close(gpt(torch.from_numpy(late_game()))[0], expected)
