"""Every shortcut gives the outputs and gradients of the textbook GPT in float64, within the precision of float32."""

import copy
import dataclasses
import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from helpers import PAGE, all_new, foreign_end, largest_score, late_game, make_gpt, one_game, random_play, tolerance

import fast.shared_attention
from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS, BreakoutAsciiVec
from fast import DeviceGPT, FastGPT, gpt_for, shared_prefixes
from fast.bags import make_bags
from fast.cuda_graphs import Compiled
from fast.gpu_gpt import Lines, distinct_lines, every_line
from fast.line_index import LineIndex
from fast.shared_attention import LineCache, SharedAttention, SharedPages, shared_attention
from fast.shared_prefixes import CHUNK, prefix_tree
from model import GPT, GPTConfig

PAGES = [random_play, late_game, all_new, foreign_end, one_game]
CPU = torch.device("cpu")


def features_and_gradient(gpt, pages):
    """Return features (B, C), and the gradient of a loss that depends on all outputs, as one vector."""
    gpt.zero_grad()
    features = gpt.features(pages)
    outputs = torch.cat([x.flatten() for x in (features, *gpt.heads(features), gpt.change_head(features))])
    (outputs * torch.linspace(-1, 1, len(outputs), dtype=outputs.dtype)).sum().backward()
    return features.detach(), torch.cat([p.grad.flatten() for p in gpt.parameters()])


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def twice(gpt, kind):
    """Return a model of another class with the same weights."""
    other = kind(gpt.config)
    other.load_state_dict(gpt.state_dict())
    return other


@pytest.mark.parametrize("name", ["bags", "line_index", "shared_attention", "shared_prefixes", "gpu_gpt"])
def test_the_examples_in_the_docstrings_are_right(name):
    results = doctest.testmod(importlib.import_module(f"fast.{name}"))
    assert results.failed == 0 and results.attempted > 0


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("pages", PAGES)
def test_fast_gpt_equals_gpt(pages, n_layer):
    gpt = make_gpt(n_layer=n_layer, n_head=2, n_embd=32, mlp_expansion=2)
    tokens = torch.from_numpy(pages())
    exact = copy.deepcopy(gpt).double()
    expected = features_and_gradient(exact, gpt.encode(tokens))
    ours = twice(gpt, FastGPT)
    assert ours.state_dict().keys() == gpt.state_dict().keys()
    for x, reference in zip(features_and_gradient(ours, ours.encode(tokens)), expected):
        assert relative_error(x, reference) <= tolerance(largest_score(gpt)) * n_layer
    atol = tolerance(largest_score(gpt)) * n_layer * 8  # |features| = 6
    for x, reference in zip(ours(tokens), exact.heads(expected[0])):
        torch.testing.assert_close(x, reference.float(), rtol=1e-3, atol=atol)


# Rows, columns with the last character of each line, and characters.
SHAPES = [(1, 8, 2), (7, 13, 95), (12, 41, 40), (23, 53, 3), (24, 81, 96), (31, 6, 128), (50, 133, 128)]


def some_pages(config, ending):
    """Return four pages (4, rows * columns) that have most lines in common, and all characters between them.

    ending: the index of the character that ends all pages, or None for different ones.
    """
    rng = np.random.default_rng(0)
    characters = np.tile(rng.integers(len(config.characters), size=config.tokens), (4, 1))
    characters[0, : len(config.characters)] = np.arange(len(config.characters))[: config.tokens]
    for page in range(1, 4):  # a part of a line differs, in the middle and further down
        first = rng.integers(config.tokens // 2, config.tokens)
        characters[page, first : first + 5] = rng.integers(
            len(config.characters), size=len(characters[0, first : first + 5])
        )
    characters[:, -1] = np.arange(4) % len(config.characters) if ending is None else ending
    return np.frombuffer(config.characters.encode(), np.uint8)[characters]


@pytest.mark.parametrize("ending", [None, 1])
@pytest.mark.parametrize("rows, columns, num_characters", SHAPES)
def test_pages_of_any_shape_and_alphabet(rows, columns, num_characters, ending):
    """One layer and two, and the shortcuts of a GPU, equal model.py, whether pages end with the same character or not.

    The pages of a rollout come one after the other, so that later ones bring lines that the earlier ones do not have.
    """
    characters = ("\n\0" + "".join(chr(code) for code in range(127, 0, -1) if chr(code) != "\n"))[:num_characters]
    config = GPTConfig(rows, columns, characters, n_action=5, n_head=2, n_embd=16, mlp_expansion=1)
    pages = torch.from_numpy(some_pages(config, ending))
    if config.tokens > 2000:
        pages = pages[:2]  # because model.py is slow
    for n_layer in (1, 2) if rows * columns < 2000 else (1,):
        torch.manual_seed(0)
        gpt = GPT(dataclasses.replace(config, n_layer=n_layer))
        ours = twice(gpt, FastGPT)
        characters = gpt.encode(pages)
        expected = features_and_gradient(copy.deepcopy(gpt).double(), characters)
        allowed = tolerance(bound_of_scores(gpt)) * n_layer
        for x, reference in zip(features_and_gradient(ours, ours.encode(pages)), expected):
            assert relative_error(x, reference) <= allowed
        act = ours.inference_function()
        one_by_one = torch.cat([act(ours.encode(page.unsqueeze(0)))[0] for page in pages])
        torch.testing.assert_close(one_by_one, gpt.heads(expected[0].float())[0], rtol=1e-3, atol=allowed * 8)
        if n_layer == 1 and ending is not None:
            on_device = twice(gpt, DeviceGPT)
            on_device.newline = ending
            for x, reference in zip(features_and_gradient(on_device, characters), expected):
                assert relative_error(x, reference) <= allowed


def bound_of_scores(gpt):
    """Return a bound of the scores of attention, in nats: a LayerNorm has the norm sqrt(C) at most."""
    C = gpt.config.n_embd
    norms = [torch.linalg.matrix_norm(w, 2) for w in gpt.blocks[0].attn.c_attn.weight.detach().split(C)[:2]]
    return (norms[0] * norms[1] * C / (C // gpt.config.n_head) ** 0.5).item()


def test_what_is_kept_follows_from_what_was_read():
    """With an alphabet of 128, and a page of 6650 of them, one page costs no more than with an alphabet of 2."""
    kept = []
    for characters in ("ab", "ab" + "".join(map(chr, range(97))) + "".join(map(chr, range(99, 128)))):
        config = GPTConfig(50, 133, characters, n_action=2, n_head=2, n_embd=8)
        gpt = FastGPT(config)
        act = gpt.inference_function()
        act(gpt.encode(np.full((1, config.tokens), ord("a"), np.uint8)))
        [cache] = [x.cell_contents for x in act.__closure__ if isinstance(x.cell_contents, LineCache)]
        tables = [cache.pairs, cache.pieces, cache.lines, gpt.index.line_pieces, gpt.index.piece_pairs]
        kept.append([len(table) for table in tables])
    assert kept[0] == kept[1] and kept[0][0] == 6650


@pytest.mark.parametrize(
    "pages, largest", [(random_play, 50), (late_game, 200), (random_play, 5000), (late_game, 5000), (all_new, 5000)]
)
def test_one_layer_is_exact_when_scores_are_huge(pages, largest):
    gpt = make_gpt()
    tokens = torch.from_numpy(pages()[:1])
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight[: gpt.config.n_embd] *= largest / largest_score(gpt)
    assert largest_score(gpt) == pytest.approx(largest, rel=1e-4)
    characters = gpt.encode(tokens)
    expected = features_and_gradient(copy.deepcopy(gpt).double(), characters)
    on_cpu, on_device = twice(gpt, FastGPT), twice(gpt, DeviceGPT)
    shared = Lines(*(x[0] for x in distinct_lines(characters.unsqueeze(0), GPTConfig(**PAGE))))
    ways = (gpt, characters), (on_cpu, on_cpu.encode(tokens)), (on_device, characters), (on_device, shared)
    for model, encoded in ways:
        for x, reference in zip(features_and_gradient(model, encoded), expected):
            assert relative_error(x, reference) <= tolerance(largest), type(model)


def test_a_wrong_sum_would_be_noticed():
    """Weights that are wrong in the eleventh bit, as with TF32, give features far outside the tolerance."""
    gpt = make_gpt()
    tokens = torch.from_numpy(random_play())
    expected, _ = features_and_gradient(copy.deepcopy(gpt).double(), gpt.encode(tokens))
    ours = twice(gpt, FastGPT)
    with torch.no_grad():
        ours.blocks[0].attn.c_attn.weight.mul_(1 + 2.0**-11)
    assert relative_error(ours.features(ours.encode(tokens)), expected) > 4 * tolerance(largest_score(gpt))


@pytest.mark.parametrize("spread, rescaled", [(100, False), (400, True)])
def test_pages_far_apart_in_one_head(monkeypatch, spread, rescaled):
    """A head is rescaled if some characters of one page have much larger scores than any of another page."""
    torch.manual_seed(0)
    # 40 pairs, each of which is the sum of three rows of its own
    table = torch.randn(120, 1 + 3, 2)
    rstd = 0.5 + torch.rand(40)
    table[:12:3, 0, 0] += spread  # the scores of the first four pairs in the first head
    table.requires_grad_()
    rstd.requires_grad_()
    pages = np.stack([np.arange(0, 20), np.arange(20, 40), np.arange(10, 30)])
    shared = SharedPages(torch.arange(40), make_bags(np.arange(120).reshape(40, 3), 120), [make_bags(pages, 40)])
    heads = []  # how many heads each call computes
    apply = SharedAttention.apply

    def counted(table, *args):
        heads.append(table.size(2))
        return apply(table, *args)

    monkeypatch.setattr(SharedAttention, "apply", counted)
    y = shared_attention(table, rstd, shared)
    assert heads == ([2, 1] if rescaled else [2])
    rows = table.view(40, 3, 4, 2).sum(1) * rstd.view(-1, 1, 1)
    weights = (rows[pages, 0] * math.log(2)).softmax(1)  # (3, 20, 2)
    expected = (weights.unsqueeze(2) * rows[pages, 1:]).sum(1)
    near = dict(rtol=tolerance(spread), atol=tolerance(spread) * 10)  # values and their sums are between 1 and 10 or so
    torch.testing.assert_close(y, expected, **near)
    loss = torch.linspace(-1, 1, y.numel()).view_as(y)
    for ours, theirs in zip(*(torch.autograd.grad((out * loss).sum(), (table, rstd)) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("games, config", [(8, {}), (2, {"n_layer": 2, "n_head": 2, "n_embd": 8})])
def test_the_inference_function_reads_what_the_model_reads(games, config):
    gpt = make_gpt(kind=FastGPT, **config)
    env = BreakoutAsciiVec(games, varied_starts=0.7)
    obs, _ = env.reset(seed=0)
    act = gpt.inference_function()
    near = dict(rtol=1e-3, atol=tolerance(largest_score(gpt)) * gpt.config.n_embd**0.5)
    for step in range(80):
        lines = gpt.encode(obs)
        logits, values = act(lines)
        if step % 16 == 0:
            for expected in (gpt(torch.from_numpy(obs)), gpt.heads(gpt.features(lines))):
                torch.testing.assert_close((logits, values), expected, **near)
        obs, *_ = env.step(np.arange(games) % 3)
    assert not logits.requires_grad


def test_the_inference_function_rescales_the_pages_that_need_it(monkeypatch):
    """The largest scores of some pages, but not of all, are far below those of other pages."""
    env = BreakoutAsciiVec(32, varied_starts=0.7)
    obs, _ = env.reset(seed=0)
    for _ in range(30):
        obs, *_ = env.step(np.arange(32) % 3)
    rescaled = []  # how many pages each call reads
    share_pages = fast.shared_attention.share_pages

    def counted(index, lines):
        rescaled.append(len(lines))
        return share_pages(index, lines)

    monkeypatch.setattr(fast.shared_attention, "share_pages", counted)
    some = 0
    for factor in range(8, 24):  # by which attention is sharper than at first
        gpt = make_gpt(kind=FastGPT)
        with torch.no_grad():
            gpt.blocks[0].attn.c_attn.weight[: gpt.config.n_embd] *= factor
        act, lines = gpt.inference_function(), gpt.encode(obs)
        rescaled.clear()
        ours = act(lines)
        some += any(0 < n < 32 for n in rescaled)
        expected = gpt.heads(gpt.features(lines))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=tolerance(largest_score(gpt)) * 8)
    assert some > 0


def test_an_older_cache_says_that_it_is_out_of_date():
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    older = gpt.inference_function()
    newer = gpt.inference_function()
    lines = gpt.encode(random_play())
    with pytest.raises(RuntimeError, match="out of date"):
        older(lines)
    newer(lines)


def test_pages_that_end_otherwise_are_read_too():
    """Pages with different last characters share no query. Even a cache that has read pages of the game reads them."""
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    act = gpt.inference_function()
    act(gpt.encode(random_play()))
    near = dict(rtol=1e-3, atol=tolerance(largest_score(gpt)) * 4)
    torch.testing.assert_close(act(gpt.encode(foreign_end())), twice(gpt, GPT)(foreign_end()), **near)


def test_forward_leaves_the_line_ids_of_a_rollout_alone():
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    lines = gpt.encode(random_play())
    expected = gpt.features(lines)
    gpt(all_new())
    assert torch.equal(gpt.features(lines), expected)
    assert torch.equal(gpt.encode(random_play()), lines)


def test_changes_are_those_of_gpt():
    env = BreakoutAsciiVec(5)
    obs, _ = env.reset(seed=0)
    pages = [torch.from_numpy(x) for x in (obs, env.step([0, 1, 2, 0, 1])[0])]
    assert torch.equal(make_gpt(kind=FastGPT).changes(*pages), make_gpt().changes(*pages))


def test_which_shortcut_suits_which_device():
    one, deep = GPTConfig(**PAGE), GPTConfig(**PAGE, n_layer=2)
    kinds = [type(gpt_for(config, torch.device(device))) for config in (one, deep) for device in ("cpu", "cuda", "mps")]
    assert kinds == [FastGPT, DeviceGPT, GPT, FastGPT, FastGPT, GPT]
    assert gpt_for(one, CPU).group_size == 1 and gpt_for(deep, CPU).group_size == 8


# Line ids


def test_a_line_index_gives_every_distinct_line_one_id():
    index = LineIndex(GPTConfig(**PAGE))
    pages = random_play()
    first = index.encode(pages)
    known = len(index.lines)
    assert known == len({(row, page[81 * row : 81 * row + 81].tobytes()) for page in pages for row in range(ROWS)})
    again = index.encode(pages[::-1].copy())
    np.testing.assert_array_equal(again, first[::-1])
    assert len(index.lines) == known
    pairs = index.piece_pairs.rows[index.line_pieces.rows[torch.from_numpy(first)]].reshape(len(pages), TOKENS)
    text = np.array([ord(c) for c in CHARACTERS])[pairs.numpy() // TOKENS]
    np.testing.assert_array_equal(text, pages)
    np.testing.assert_array_equal(pairs.numpy() % TOKENS, np.tile(np.arange(TOKENS), (len(pages), 1)))


def test_similar_lines_are_told_apart():
    """All lines that differ in one character from a given line are distinct, and each is distinct in another row."""
    page = np.frombuffer(CHARACTERS.encode(), np.uint8)[np.random.default_rng(4).integers(7, size=TOKENS)]
    pages = np.tile(page, (7 * COLUMNS, 1))
    for i, c in enumerate(CHARACTERS.encode()):
        pages[i * COLUMNS + np.arange(COLUMNS), np.arange(COLUMNS)] = c
    pages[:, COLUMNS : 2 * COLUMNS] = pages[:, :COLUMNS]
    expected = 2 * (6 * COLUMNS + 1) + 22  # rows 0 and 1 vary, the other 22 do not
    index = LineIndex(GPTConfig(**PAGE))
    index.encode(pages)
    assert len(index.lines) == expected
    characters = make_gpt(n_head=2, n_embd=8).encode(pages)
    assert distinct_lines(characters.unsqueeze(0), GPTConfig(**PAGE)).pages.unique().numel() == expected


# fmt: off
@pytest.mark.parametrize("kind, n_layer", [(GPT, 1), (FastGPT, 1), (FastGPT, 2)])
@pytest.mark.parametrize("spoil", [
    lambda pages: pages[:, :-1],
    lambda pages: pages[0],
    lambda pages: pages[:0],
    lambda pages: pages.astype(np.int64),
    lambda pages: np.where(pages == ord("O"), ord("x"), pages).astype(np.uint8),
    lambda pages: np.where(pages == ord("O"), 200, pages).astype(np.uint8),
])
# fmt: on
def test_wrong_pages_are_refused(spoil, kind, n_layer):
    gpt = make_gpt(kind=kind, n_layer=n_layer, n_head=2, n_embd=8)
    pages = np.ascontiguousarray(spoil(late_game()))
    for given in (pages, torch.from_numpy(pages)):
        with pytest.raises(ValueError, match="pages must be|character set") as error:
            gpt(given)
        assert "\n" not in str(error.value)


def test_a_refused_page_leaves_the_index_as_it_was():
    index = LineIndex(GPTConfig(**PAGE))
    pages = random_play()
    expected = index.encode(pages)
    bad = pages.copy()
    bad[1, 500] = ord("x")
    with pytest.raises(ValueError):
        index.encode(bad)
    np.testing.assert_array_equal(index.encode(pages), expected)


# Lines on a device


def test_lines_are_the_text_of_the_pages():
    """`every_line` and `distinct_lines` hold all the text of the pages, and the latter each line of a batch once."""
    pages = np.stack(
        [np.concatenate([one_game(), random_play()]), np.concatenate([random_play(), one_game()[:1].repeat(6, 0)])]
    )
    characters = make_gpt(n_head=2, n_embd=8).encode(torch.from_numpy(pages.reshape(-1, TOKENS))).view(2, 9, TOKENS)
    shared = distinct_lines(characters, GPTConfig(**PAGE))
    capacity = shared.rows.size(1)
    used = [len({(i % ROWS, line.tobytes()) for i, line in enumerate(batch.reshape(-1, COLUMNS))}) for batch in pages]
    assert used[0] != used[1]
    assert max(used) <= capacity < 2 * max(used)
    assert distinct_lines(characters, GPTConfig(**PAGE), min_capacity=4096).rows.size(1) == 4096
    for batch, n, lines in zip(characters, used, map(Lines._make, zip(*shared))):
        assert torch.equal(lines.pages.unique(), torch.arange(n))
        for of_batch in (lines, every_line(batch, GPTConfig(**PAGE))):
            assert torch.equal(of_batch.characters[of_batch.pages].flatten(1), batch)
            assert torch.equal(of_batch.rows[of_batch.pages], torch.arange(ROWS).expand(9, ROWS))


def test_a_new_cache_of_device_gpt_keeps_the_table_at_its_address():
    gpt = make_gpt(kind=DeviceGPT, n_head=4, n_embd=16)
    act = gpt.inference_function()
    pages = gpt.encode(random_play())
    addresses = [x.data_ptr() for x in gpt.table]
    before, _ = act(pages)
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight.mul_(2)
    assert torch.equal(act(pages)[0], before)  # the cache still has the old weights
    after = gpt.inference_function()(pages)
    assert not torch.equal(after[0], before)
    assert [x.data_ptr() for x in gpt.table] == addresses
    torch.testing.assert_close(after, gpt.heads(gpt.features(pages)))


# Prefixes


def test_a_prefix_tree_holds_each_prefix_once():
    pages = np.concatenate([one_game(), random_play(), all_new()])
    index = LineIndex(GPTConfig(**PAGE))
    tree = prefix_tree(index, index.encode(pages))
    texts = np.array([ord(c) for c in CHARACTERS], np.uint8)[tree.chunks]
    for length, of_length in enumerate(tree.paths, start=1):
        prefixes = [texts[path].tobytes() for path in of_length.members.numpy()]
        assert len(prefixes) == len(set(prefixes))
        assert set(prefixes) == {page[: length * CHUNK].tobytes() for page in pages}
        last_chunks = of_length.members[:, -1]
        assert (tree.starts[last_chunks] == (length - 1) * CHUNK).all()
    assert [prefixes[i] for i in tree.pages] == [page.tobytes() for page in pages]
    assert len(tree.chunks) == sum(len(of_length.members) for of_length in tree.paths)


@pytest.mark.faults
def test_compiled_blocks_are_compiled_for_few_sizes(monkeypatch):
    """The number of chunks differs from batch to batch, but torch gives up on functions that it compiles too often."""
    from torch._dynamo.testing import CompileCounter  # here because it is slow to import

    counter = CompileCounter()
    monkeypatch.setattr(shared_prefixes, "compiled", lambda f: Compiled(f, dynamic=True, backend=counter))
    gpt = make_gpt(kind=FastGPT, n_layer=3, n_head=2, n_embd=16)
    pages = np.concatenate([one_game(), random_play(), all_new()])
    expected, _ = gpt(torch.from_numpy(pages))
    gpt.compile_blocks = True
    compilations = []
    for n in (2, 5, 8, 10, len(pages)):
        logits, _ = gpt(torch.from_numpy(pages[:n]))
        logits.sum().backward()
        with torch.no_grad():
            gpt(torch.from_numpy(pages[:n]))
        compilations.append(counter.frame_count)
    torch.testing.assert_close(logits, expected)
    assert 4 <= compilations[-1] == compilations[1] <= 6  # two halves, with gradients and without


def test_bf16_is_for_the_blocks_alone():
    """The sums between the blocks, and what the final LayerNorm makes of them, stay in float32."""
    gpt = make_gpt(kind=FastGPT, n_layer=3, n_head=6, n_embd=96, mlp_expansion=1)
    tokens = torch.from_numpy(one_game())
    residuals = []
    with torch.no_grad():
        plain = gpt.features(gpt.encode(tokens))
        gpt.ln_f.register_forward_pre_hook(lambda _, args: residuals.append(args[0]))
        gpt.bf16 = True
        features = gpt.features(gpt.encode(tokens))
    assert features.dtype == residuals.pop().dtype == torch.float32
    assert 0 < relative_error(features, plain) < 0.03  # bf16 has 8 bits: 0.004 per rounding
