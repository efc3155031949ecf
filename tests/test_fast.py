"""Every shortcut against the textbook GPT in float64: the same outputs, the same gradients, within what float32 can hold."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import all_new, foreign_end, largest_score, late_game, make_gpt, one_game, random_play, tolerance

import fast.shared_attention
from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS, BreakoutAsciiVec
from fast import DeviceGPT, FastGPT, gpt_for, shared_prefixes
from fast.cuda_graphs import Compiled
from fast.gpu_gpt import distinct_lines, every_line
from fast.line_index import LineIndex
from fast.shared_attention import SharedAttention, Tree, make_level, shared_attention
from fast.shared_prefixes import CHUNK, prefix_tree
from model import GPT, GPTConfig

PAGES = [random_play, late_game, all_new, foreign_end, one_game]
CPU = torch.device("cpu")


def features_and_gradient(gpt, pages):
    """-> features (B, C), and the gradient of a loss of all outputs, by all parameters, one vector."""
    gpt.zero_grad()
    features = gpt.features(pages)
    outputs = torch.cat([x.flatten() for x in (features, *gpt.heads(features), gpt.change_head(features))])
    (outputs * torch.linspace(-1, 1, len(outputs), dtype=outputs.dtype)).sum().backward()
    return features.detach(), torch.cat([p.grad.flatten() for p in gpt.parameters()])


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def twice(gpt, kind):
    """The same weights in another class."""
    other = kind(gpt.config)
    other.load_state_dict(gpt.state_dict())
    return other


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("pages", PAGES)
def test_fast_gpt_equals_gpt(pages, n_layer):
    gpt, tokens = make_gpt(n_layer=n_layer, n_head=4, n_embd=32, mlp_expansion=2), torch.from_numpy(pages())
    expected = features_and_gradient(copy.deepcopy(gpt).double(), gpt.encode(tokens))
    ours = twice(gpt, FastGPT)
    assert ours.state_dict().keys() == gpt.state_dict().keys()
    for x, reference in zip(features_and_gradient(ours, ours.encode(tokens)), expected):
        assert relative_error(x, reference) <= tolerance(largest_score(gpt)) * n_layer
    for x, reference in zip(ours(tokens), copy.deepcopy(gpt).double()(tokens)):
        torch.testing.assert_close(
            x, reference.float(), rtol=1e-3, atol=tolerance(largest_score(gpt)) * n_layer * 8
        )  # |features| = 6


@pytest.mark.parametrize(
    "pages, largest", [(random_play, 50), (late_game, 200), (random_play, 5000), (late_game, 5000), (all_new, 5000)]
)
def test_one_layer_is_exact_when_scores_are_huge(pages, largest):
    gpt, tokens = make_gpt(), torch.from_numpy(pages()[:1])
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight[: gpt.config.n_embd] *= largest / largest_score(gpt)
    assert largest_score(gpt) == pytest.approx(largest, rel=1e-4)
    characters = gpt.encode(tokens)
    expected = features_and_gradient(copy.deepcopy(gpt).double(), characters)
    on_cpu, on_device = twice(gpt, FastGPT), twice(gpt, DeviceGPT)
    shared = type(every_line(characters))(*(x[0] for x in distinct_lines(characters.unsqueeze(0))))
    paths = (gpt, characters), (on_cpu, on_cpu.encode(tokens)), (on_device, characters), (on_device, shared)
    for model, encoded in paths:
        for x, reference in zip(features_and_gradient(model, encoded), expected):
            assert relative_error(x, reference) <= tolerance(largest), type(model)


def test_a_wrong_sum_would_be_noticed():
    """The tolerance is no licence: scores rounded to TF32's 10 bits are far outside it."""
    gpt, tokens = make_gpt(), torch.from_numpy(random_play())
    expected, _ = features_and_gradient(copy.deepcopy(gpt).double(), gpt.encode(tokens))
    ours = twice(gpt, FastGPT)
    with torch.no_grad():
        ours.blocks[0].attn.c_attn.weight.mul_(1 + 2.0**-11)
    assert relative_error(ours.features(ours.encode(tokens)), expected) > 4 * tolerance(largest_score(gpt))


@pytest.mark.parametrize("spread, rescaled", [(100, False), (400, True)])
def test_pages_far_apart_in_one_head(monkeypatch, spread, rescaled):
    """In the first head four characters dwarf the rest of their page, and the other pages lack them."""
    torch.manual_seed(0)
    table, rstd = torch.randn(120, 1 + 3, 2), 0.5 + torch.rand(40)  # 40 pairs, each of three rows of its own
    table[:12:3, 0, 0] += spread  # bits, of the first four pairs; the scores of the second head lie near each other
    table.requires_grad_(), rstd.requires_grad_()
    pages = np.stack([np.arange(0, 20), np.arange(20, 40), np.arange(10, 30)])
    tree = Tree(torch.arange(40), make_level(np.arange(120).reshape(40, 3), 120), [make_level(pages, 40)])
    used = []
    apply = SharedAttention.apply
    monkeypatch.setattr(SharedAttention, "apply", lambda *args: used.append(args[0].size(2)) or apply(*args))
    y = shared_attention(table, rstd, tree)
    assert used == ([2, 1] if rescaled else [2])
    rows = table.view(40, 3, 4, 2).sum(1) * rstd.view(-1, 1, 1)
    weights = (rows[pages, 0] * math.log(2)).softmax(1)  # (3, 20, 2)
    expected = (weights.unsqueeze(2) * rows[pages, 1:]).sum(1)
    near = dict(rtol=tolerance(spread), atol=tolerance(spread) * 10)  # values and their sums are of order 1 to 10
    torch.testing.assert_close(y, expected, **near)
    loss = torch.linspace(-1, 1, y.numel()).view_as(y)
    for ours, theirs in zip(*(torch.autograd.grad((out * loss).sum(), (table, rstd)) for out in (y, expected))):
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("games, config", [(8, {}), (2, {"n_layer": 2, "n_head": 2, "n_embd": 8})])
def test_the_inference_cache_reads_what_the_model_reads(games, config):
    gpt, env = make_gpt(kind=FastGPT, **config), BreakoutAsciiVec(games, varied_starts=0.7)
    obs, _ = env.reset(seed=0)
    act, near = gpt.inference_cache(), dict(rtol=1e-3, atol=tolerance(largest_score(gpt)) * gpt.config.n_embd**0.5)
    for step in range(80):
        lines = gpt.encode(obs)
        logits, values = act(lines)
        if step % 16 == 0:
            for expected in (gpt(torch.from_numpy(obs)), gpt.heads(gpt.features(lines))):
                torch.testing.assert_close((logits, values), expected, **near)
        obs, *_ = env.step(np.arange(games) % 3)
    assert not logits.requires_grad


def test_the_inference_cache_rescales_the_pages_that_need_it(monkeypatch):
    gpt, env, rescaled = make_gpt(kind=FastGPT), BreakoutAsciiVec(32, varied_starts=0.7), []
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight[: gpt.config.n_embd] *= (
            16  # scores so far apart that most pages, but not all, lie too low
        )
    obs, _ = env.reset(seed=0)
    for _ in range(30):
        obs, *_ = env.step(np.arange(32) % 3)
    sums = fast.shared_attention.rescaled_sums
    monkeypatch.setattr(
        fast.shared_attention,
        "rescaled_sums",
        lambda m, below, parts: rescaled.append(parts.shape) or sums(m, below, parts),
    )
    act, lines = gpt.inference_cache(), gpt.encode(obs)
    ours = act(lines)
    assert [0 < n < 32 for n, parts in rescaled if parts == ROWS] == [True]
    torch.testing.assert_close(ours, gpt.heads(gpt.features(lines)), rtol=1e-3, atol=tolerance(largest_score(gpt)) * 8)


def test_an_older_cache_says_that_it_is_out_of_date():
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    older, newer = gpt.inference_cache(), gpt.inference_cache()
    lines = gpt.encode(random_play())
    with pytest.raises(RuntimeError, match="out of date"):
        older(lines)
    newer(lines)


def test_pages_that_end_otherwise_are_read_too():
    """The cache has been used already when the first comes."""
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    act = gpt.inference_cache()
    act(gpt.encode(random_play()))
    near = dict(rtol=1e-3, atol=tolerance(largest_score(gpt)) * 4)
    torch.testing.assert_close(act(gpt.encode(foreign_end())), twice(gpt, GPT)(foreign_end()), **near)


def test_reading_leaves_the_line_numbers_of_a_rollout_alone():
    gpt = make_gpt(kind=FastGPT, n_head=4, n_embd=16)
    lines = gpt.encode(random_play())
    expected = gpt.features(lines)
    gpt(all_new())
    assert torch.equal(gpt.features(lines), expected) and torch.equal(gpt.encode(random_play()), lines)


def test_changes_are_those_of_gpt():
    env = BreakoutAsciiVec(5)
    obs, _ = env.reset(seed=0)
    pages = [torch.from_numpy(x) for x in (obs, env.step([0, 1, 2, 0, 1])[0])]
    assert torch.equal(make_gpt(kind=FastGPT).changes(*pages), make_gpt().changes(*pages))


def test_which_shortcut_suits_which_device():
    deep, one = GPTConfig(n_layer=2), GPTConfig()
    kinds = [type(gpt_for(config, torch.device(device))) for config in (one, deep) for device in ("cpu", "cuda", "mps")]
    assert kinds == [FastGPT, DeviceGPT, GPT, FastGPT, FastGPT, GPT]
    assert gpt_for(one, CPU).group_size == 1 and gpt_for(deep, CPU).group_size == 8


# Line numbers


def test_a_line_index_numbers_distinct_lines_once():
    index, pages = LineIndex(), random_play()
    first = index.encode(pages)
    known = len(index.lines)
    assert known == len({(row, page[81 * row : 81 * row + 81].tobytes()) for page in pages for row in range(ROWS)})
    again = index.encode(pages[::-1].copy())
    np.testing.assert_array_equal(again, first[::-1])
    assert len(index.lines) == known
    pairs = index.piece_pairs()[index.line_pieces()[torch.from_numpy(first)]].reshape(len(pages), TOKENS)
    text = np.array([ord(c) for c in CHARACTERS])[pairs.numpy() // TOKENS]
    np.testing.assert_array_equal(text, pages)
    np.testing.assert_array_equal(pairs.numpy() % TOKENS, np.tile(np.arange(TOKENS), (len(pages), 1)))


def test_hashes_tell_lines_apart():
    """Every line that differs from another in one character, and the same line in another row."""
    page = np.frombuffer(CHARACTERS.encode(), np.uint8)[np.random.default_rng(4).integers(7, size=TOKENS)]
    pages = np.tile(page, (7 * COLUMNS, 1))
    pages[:, :COLUMNS] = page[:COLUMNS]
    for i, c in enumerate(CHARACTERS.encode()):
        pages[i * COLUMNS + np.arange(COLUMNS), np.arange(COLUMNS)] = c
    pages[:, COLUMNS : 2 * COLUMNS] = pages[:, :COLUMNS]
    index = LineIndex()
    index.encode(pages)
    assert len(index.lines) == 2 * (6 * COLUMNS + 1) + 22


@pytest.mark.parametrize("kind, n_layer", [(GPT, 1), (FastGPT, 1), (FastGPT, 2)])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda pages: pages[:, :-1],
        lambda pages: pages[0],
        lambda pages: pages[:0],
        lambda pages: pages.astype(np.int64),
        lambda pages: np.where(pages == ord("O"), ord("x"), pages).astype(np.uint8),
        lambda pages: np.where(pages == ord("O"), 200, pages).astype(np.uint8),
    ],
)
def test_wrong_pages_are_refused(spoil, kind, n_layer):
    gpt, pages = make_gpt(kind=kind, n_layer=n_layer, n_head=2, n_embd=8), np.ascontiguousarray(spoil(late_game()))
    for given in (pages, torch.from_numpy(pages)):
        with pytest.raises(ValueError, match="pages must be|character set") as error:
            gpt(given)
        assert "\n" not in str(error.value)


def test_a_refused_page_leaves_the_index_as_it_was():
    index, pages = LineIndex(), random_play()
    expected = index.encode(pages)
    bad = pages.copy()
    bad[1, 500] = ord("x")
    with pytest.raises(ValueError):
        index.encode(bad)
    np.testing.assert_array_equal(index.encode(pages), expected)


# Lines on a device


def test_lines_are_the_text_of_the_pages():
    """All of them, and the distinct ones of each batch: the same text in another row is another line."""
    pages = np.stack(
        [np.concatenate([one_game(), random_play()]), np.concatenate([random_play(), one_game()[:1].repeat(6, 0)])]
    )
    characters = make_gpt(n_head=2, n_embd=8).encode(torch.from_numpy(pages.reshape(-1, TOKENS))).view(2, 9, TOKENS)
    shared = distinct_lines(characters)
    capacity = shared.rows.size(1)
    used = [len({(i % ROWS, line.tobytes()) for i, line in enumerate(batch.reshape(-1, COLUMNS))}) for batch in pages]
    assert (
        used[0] != used[1]
        and max(used) <= capacity < 2 * max(used)
        and distinct_lines(characters, capacity=4096).rows.size(1) == 4096
    )
    for batch, text, n, lines in zip(characters, pages, used, map(type(shared)._make, zip(*shared))):
        assert torch.equal(lines.pages.unique(), torch.arange(n))
        for of, rows, numbers in (lines, every_line(batch)):
            assert torch.equal(of[numbers].flatten(1), batch) and torch.equal(
                rows[numbers], torch.arange(ROWS).expand(9, ROWS)
            )


def test_device_gpt_keeps_the_table_of_its_cache_in_its_place():
    gpt = make_gpt(kind=DeviceGPT, n_head=4, n_embd=16)
    act, pages = gpt.inference_cache(), gpt.encode(random_play())
    places = [x.data_ptr() for x in gpt.table]
    before = act(pages)
    with torch.no_grad():
        gpt.blocks[0].attn.c_attn.weight.mul_(2)
    assert torch.equal(act(pages)[0], before[0])  # as the weights were
    after = gpt.inference_cache()(pages)
    assert not torch.equal(after[0], before[0]) and [x.data_ptr() for x in gpt.table] == places
    torch.testing.assert_close(after, gpt.heads(gpt.features(pages)))


# Prefixes


def test_a_prefix_tree_holds_each_prefix_once():
    pages, index = np.concatenate([one_game(), random_play(), all_new()]), LineIndex()
    tree = prefix_tree(index, index.encode(pages))
    texts = np.array([ord(c) for c in CHARACTERS], np.uint8)[tree.chunks]
    for length, of_length in enumerate(tree.levels, start=1):
        starts = [texts[path].tobytes() for path in of_length.children.numpy()]
        assert len(starts) == len(set(starts))
        assert set(starts) == {page[: length * CHUNK].tobytes() for page in pages}
        own = of_length.children[:, -1]
        assert (tree.starts[own] == (length - 1) * CHUNK).all()
    assert [starts[i] for i in tree.pages] == [page.tobytes() for page in pages]
    assert len(tree.chunks) == sum(len(of_length.children) for of_length in tree.levels)


def test_compiled_blocks_are_compiled_for_few_sizes(monkeypatch):
    """Every batch has another number of chunks. What is compiled anew for each would soon not be compiled at all."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    counter = CompileCounter()
    monkeypatch.setattr(shared_prefixes, "compiled", lambda f: Compiled(f, dynamic=True, backend=counter))
    gpt, pages = (
        make_gpt(kind=FastGPT, n_layer=3, n_head=2, n_embd=16),
        np.concatenate([one_game(), random_play(), all_new()]),
    )
    expected = gpt(torch.from_numpy(pages))[0]
    gpt.compile_blocks = True
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
    gpt, tokens = make_gpt(kind=FastGPT, n_layer=3, n_head=6, n_embd=96, mlp_expansion=1), torch.from_numpy(one_game())
    with torch.no_grad():
        plain, residuals = gpt.features(gpt.encode(tokens)), []
        gpt.ln_f.register_forward_pre_hook(lambda _, args: residuals.append(args[0]))
        gpt.bf16 = True
        features = gpt.features(gpt.encode(tokens))
    assert features.dtype == residuals.pop().dtype == torch.float32
    assert 0 < relative_error(features, plain) < 0.03  # bf16 has 8 bits: 0.004 per rounding
