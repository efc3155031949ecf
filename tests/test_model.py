import copy
import math

import numpy as np
import pytest
import torch
from helpers import PAGE, every_score, late_game, make_gpt, random_play

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, TOKENS
from model import GPTConfig, sinusoids


def test_one_layer_equals_attention_written_out():
    """The reference is written in NumPy float64, one head and one position at a time."""
    gpt = make_gpt(n_head=4, n_embd=16).double()
    page = late_game()[:1]
    w = {name: p.detach().numpy() for name, p in gpt.named_parameters()}

    def norm(x, g):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g

    x = np.array(
        [
            w["wte.weight"][CHARACTERS.index(chr(t))] + w["wre.weight"][p // 81] + w["wce.weight"][p % 81]
            for p, t in enumerate(page[0])
        ]
    )
    w_q, w_k, w_v = np.split(w["blocks.0.attn.c_attn.weight"], 3)
    h = norm(x, w["blocks.0.ln_1.weight"])
    y = []
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        scores = np.array([h[-1] @ w_q[rows].T @ w_k[rows] @ h[p] for p in range(TOKENS)]) / math.sqrt(4)
        weights = np.exp(scores - scores.max())
        y.append((weights / weights.sum()) @ (h @ w_v[rows].T))
    z = x[-1] + w["blocks.0.attn.c_proj.weight"] @ np.concatenate(y)
    hidden = w["blocks.0.mlp.c_fc.weight"] @ norm(z, w["blocks.0.ln_2.weight"])
    gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
    z = norm(z + w["blocks.0.mlp.c_proj.weight"] @ gelu, w["ln_f.weight"])
    logits, values = gpt(torch.from_numpy(page))
    np.testing.assert_allclose(logits[0].detach(), w["policy_head.weight"] @ z + w["policy_head.bias"], atol=1e-9)
    np.testing.assert_allclose(values.detach(), w["value_head.weight"] @ z + w["value_head.bias"], atol=1e-9)


def test_attention_is_causal():
    """A position's output does not depend on later positions."""
    gpt = make_gpt(n_layer=2, n_head=2, n_embd=8).double()
    x = torch.randn(1, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 30:] += 1
    for block in gpt.blocks:
        torch.testing.assert_close(block(x)[:, :30], block(other)[:, :30])
        assert not torch.allclose(block(x)[:, 30:], block(other)[:, 30:])


def test_every_character_counts():
    """A change of any character changes the features."""
    gpt = make_gpt(n_head=4, n_embd=16)
    page = random_play()[:1]
    for position in (0, 81 * 3 + 40, 81 * 22 + 79):
        other = page.copy()
        other[0, position] = ord("O")
        features = [gpt.features(gpt.encode(pages)) for pages in (page, other)]
        assert not torch.allclose(*features, atol=1e-5)


def test_answers():
    """`forward` and `inference_function` agree, and only the first has gradients."""
    gpt = make_gpt(n_head=4, n_embd=16)
    logits, values = gpt(torch.from_numpy(random_play()))
    assert logits.shape == (3, 3) and values.shape == (3,) and logits.dtype == values.dtype == torch.float32
    cached_logits, cached_values = gpt.inference_function()(gpt.encode(random_play()))
    torch.testing.assert_close((cached_logits, cached_values), (logits, values))
    assert logits.requires_grad and not cached_logits.requires_grad


def test_changed_rows_and_columns():
    """One changed character changes one row and one column."""
    gpt = make_gpt(n_head=2, n_embd=8)
    pages = torch.from_numpy(random_play())
    after = pages.clone()
    after[1, 3 * COLUMNS + 40] += 1
    changes = gpt.changes(pages, after)
    assert changes.shape == (3, ROWS + COLUMNS) and changes.nonzero().tolist() == [[1, 3], [1, ROWS + 40]]


# fmt: off
@pytest.mark.parametrize("wrong, message", [
    ({"n_layer": 0}, "at least 1"),
    ({"n_head": 7}, "n_embd 64 must be a multiple of n_head 7 and of 4; the nearest that fit: 56 and 84"),
    ({"n_embd": 30, "n_head": 15}, "the nearest that fit: 60"),
])
# fmt: on
def test_wrong_configurations_are_refused(wrong, message):
    """Sizes must be at least 1 and fit together; what does not fit is named beside what would."""
    with pytest.raises(ValueError, match=message):
        GPTConfig(**PAGE | wrong)


def test_initial_attention_finds_one_ball():
    """With a std of 0.02, as in nanoGPT, no head gives the ball ten times its share; with our initial weights some
    do."""
    positions = 14 * COLUMNS + torch.arange(1, 79)
    ball, blank = (CHARACTERS.index(c) * TOKENS + positions for c in "O ")

    def lift(gpt):
        scores = every_score(gpt)
        return (scores[ball] - scores[blank]).mean(0).max().item()

    gpt = make_gpt()
    small = copy.deepcopy(gpt)
    with torch.no_grad():
        for p in small.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else None
    assert lift(small) < math.log(1.1) and lift(gpt) > math.log(10)


def test_no_two_positions_look_alike():
    """The sums of row and column embeddings lie far apart."""
    positions = (sinusoids(ROWS, 64).unsqueeze(1) + sinusoids(COLUMNS, 64).roll(32, dims=1)).flatten(0, 1)
    distances = torch.cdist(positions, positions) + 9 * torch.eye(TOKENS)
    assert distances.min() > 0.1
