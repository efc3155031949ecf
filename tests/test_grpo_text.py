import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig, BertLMHeadModel, DebertaV2Config, DebertaV2ForSequenceClassification, GPT2Config, GPT2ForSequenceClassification,
    GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip

from algorithms import grpo_text
from algorithms.grpo_text import ALGORITHM, GRPO, HELD_OUT, PROMPTS, Writer, advantages_of, brief, friendly, reward_model, sentences, until_end
from algorithms.language_model import reference_to, train_tokenizer
from algorithms_helpers import evaluated, run, same, states_of_a_straight_and_a_resumed_run, without_processes  # noqa: F401
from checkpoint import load_checkpoint
from command_line import CommandLineError
from ppo import k3

SMALL = "--num_samples 3 --max_new_tokens 6 --lr 0.01 --eval_interval 0 --save_freq 1 --device cpu"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello world"])


def small_model(kind, tokenizer):
    torch.manual_seed(0)
    if kind == "GPT-2":  # dropout 0.1, learned positions
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=None))  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model as a hub would give it."""
    path = tmp_path_factory.mktemp("model")
    small_model("Qwen3", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["Qwen3", "GPT-2"])
def test_logprobs_are_those_of_each_token_alone(kind, tokenizer):
    """Prompts of different lengths, padded on the left, answers of different lengths, padded on the right; at a temperature."""
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


def test_nothing_behind_the_end_is_drawn():
    tokens = torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0], [3, 4, 5, 6]])
    assert until_end(tokens, [0]).tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert until_end(tokens, [0, 5]).tolist() == [[True, True, False, False], [True, False, False, False], [True, True, True, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_are_drawn_as_they_are_scored(temperature, tokenizer, monkeypatch):
    """Whatever settings came with the model, and up to whichever of its end tokens comes first."""
    model = small_model("Qwen3", tokenizer)
    model.generation_config.update(eos_token_id=[0, 5, 6, 7, 8, 9], temperature=5.0, top_k=3, repetition_penalty=2.0, suppress_tokens=[*range(10, 200)])
    writer, real, scores = Writer(model, tokenizer, temperature), model.generate, []

    def generate(**inputs):
        result = real(**inputs, return_dict_in_generate=True, output_scores=True)
        scores.extend(result.scores)
        return result.sequences

    monkeypatch.setattr(model, "generate", generate)
    torch.manual_seed(0)
    tokens, mask, drawn = writer.write(["hi", "hello world, hello"] * 32, 20)
    T = drawn.shape[1]
    drawn_from = torch.stack(scores, 1).log_softmax(-1).gather(2, tokens[:, -T:, None])[:, :, 0]
    torch.testing.assert_close(writer.logprobs(model, tokens, mask, T)[drawn], drawn_from[drawn], rtol=0, atol=1e-4)
    answers = tokens[:, -T:]
    ends = torch.isin(answers, torch.tensor([0, 5, 6, 7, 8, 9]))
    assert (ends & drawn).sum(1).max() == 1 and torch.isin(answers, torch.arange(10, 200))[drawn].any()
    assert all(is_drawn.all() or ends[i, is_drawn.sum() - 1] for i, is_drawn in enumerate(drawn))


def test_a_model_that_draws_otherwise_than_it_scores_is_refused(tokenizer):
    torch.manual_seed(0)
    size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    bert = BertLMHeadModel(BertConfig(is_decoder=False, **size)).eval()
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(CommandLineError, match="in a way of its own; take another model"):
        Writer(bert, tokenizer).check(PROMPTS[0])
    for kind, temperature in (("Qwen3", 0.01), ("Qwen3", 100.0), ("GPT-2", 1.0)):
        Writer(small_model(kind, tokenizer), tokenizer, temperature).check(PROMPTS[0])


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    torch.testing.assert_close(advantages_of(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), rtol=0, atol=1e-3)
    assert advantages_of(rewards, normalize=False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_k3_estimates_the_divergence():
    """Its expectation over draws from p is KL(p, q), and no term is negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    terms = k3((q / p).log())
    assert terms.min() >= 0 and k3(torch.zeros(3)).abs().max() == 0
    torch.testing.assert_close((p * terms).sum(), (p * (p / q).log()).sum())


def test_rewards_by_hand():
    twenty = "word " * 19 + "end."
    assert brief("", twenty) == 1 and brief("", "word " * 40) == 0.25 and brief("", "") == 0
    assert sentences("", "One. Two three") == pytest.approx(1 / 3) and sentences("", "3.14 is no end") == 0 and sentences("", "All. Of it!") == 1
    assert friendly("", "Good, good day!") == pytest.approx(2 / 3) and friendly("", "") == 0


def test_a_classifier_reads_prompt_and_answer_as_a_pair(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = DebertaV2Config(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                             relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=1, pad_token_id=0)  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = reward_model(str(tmp_path), torch.device("cpu"))
    together = reward(["hi", "hi there"], ["hello world", "yes"])
    for i, pair in enumerate((("hi", "hello world"), ("hi there", "yes"))):
        alone = model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)
    decoder = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=1, bos_token_id=0, eos_token_id=0)
    model = GPT2ForSequenceClassification(decoder).eval()  # it and its tokenizer know of no padding
    model.save_pretrained(tmp_path / "decoder")
    without_pad = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    without_pad.save_pretrained(tmp_path / "decoder")
    together = reward_model(str(tmp_path / "decoder"), torch.device("cpu"))(["hi", "hi there"], ["hello world", "yes"])
    model.config.pad_token_id = 0
    alone = model(**without_pad("hi there", "yes", return_tensors="pt")).logits[0, 0]
    torch.testing.assert_close(together[1], alone, rtol=0, atol=1e-5)
    config.num_labels = 2
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CommandLineError, match="2 outputs"):
        reward_model(str(tmp_path), torch.device("cpu"))


def small_grpo(tokenizer, reward, **changes):
    c = SimpleNamespace(**{**ALGORITHM.constants, "NUM_SAMPLES": 8, "MAX_NEW_TOKENS": 4, "LR": 1e-2, "NUM_STEPS": 10**6, **changes})
    model = small_model("Qwen3", tokenizer)
    return GRPO(Writer(model, tokenizer, c.TEMPERATURE, c.TOP_P), reward, reference_to(model), c, torch.device("cpu"), {})


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_divergence_is_zero_at_the_start_and_the_ratio_moves_with_more_epochs(tokenizer, top_p):
    grpo = small_grpo(tokenizer, lambda prompts, answers: torch.tensor([float(len(a)) for a in answers]), TOP_P=top_p, EPOCHS=1)
    torch.manual_seed(1)
    first = grpo.update(*grpo.collect())
    assert first["kl_reference"] == pytest.approx(0, abs=1e-6)
    grpo.c.EPOCHS = 3
    stats = grpo.update(*grpo.collect())
    assert stats["approx_kl"] > 1e-6 and stats["kl_reference"] > 1e-6


def test_tokens_behind_the_end_change_nothing(tokenizer):
    grpos = [small_grpo(tokenizer, None) for _ in range(2)]
    tokens = torch.randint(1, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[:2, 6] = 0
    drawn = until_end(tokens[:, 5:], [0])
    mask = torch.cat([torch.ones(4, 5, dtype=torch.long), drawn.long()], 1)
    other = tokens.clone()
    other[:2, 7:] = 77
    for grpo, x in zip(grpos, (tokens, other)):
        grpo.rewards = grpo.lengths = torch.zeros(4)
        grpo.update(x, mask, drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    assert same(grpos[0].policy.state_dict(), grpos[1].policy.state_dict())


@pytest.mark.parametrize("kl_coef", [0.0, 100.0])
def test_finds_the_optimum_of_a_toy_task(tokenizer, kl_coef):
    """Two tokens, and half of the reward for the right letter at each place: they are found, unless the divergence costs too much."""
    grpo = small_grpo(tokenizer, None, NUM_SAMPLES=64, MAX_NEW_TOKENS=2, KL_COEF=kl_coef, LR=1e-2)
    grpo.reward = lambda prompts, answers: torch.tensor([sum(a == b for a, b in zip(answer, "hi")) / 2 for answer in answers])
    with torch.no_grad():  # so that the letters are drawn now and then
        head = grpo.policy.model.get_output_embeddings().weight
        for letter in "hi":
            head[tokenizer.encode(letter)[0]] += head.std()
    torch.manual_seed(0)
    for _ in range(40):
        stats = grpo.update(*grpo.collect())
    if kl_coef == 0:
        assert stats["episode_return"] > 0.9
    else:
        assert stats["kl_reference"] < 0.5


def test_no_prompt_comes_twice_in_a_step_before_all_have_and_none_is_held_out(tokenizer):
    assert not set(PROMPTS) & set(HELD_OUT)
    seen = []
    grpo = small_grpo(tokenizer, lambda prompts, answers: seen.append(prompts) or torch.zeros(len(prompts)), PROMPTS_PER_STEP=30, NUM_SAMPLES=2)
    grpo.collect()
    assert len(seen[0]) == 60 and seen[0][0] == seen[0][1] and set(seen[0]) == set(PROMPTS)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, folder, without_processes, capsys):  # noqa: F811
    small = f"{SMALL} --policy_model {folder} --lora_rank 2"
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, small, tmp_path, 4, 2)
    assert same(straight, resumed) and straight[0]["update_count"] == 4
    assert all("lora_" in name for name in straight[0]["model"])
    printed = capsys.readouterr().out
    assert " best " in printed and "worst" in printed and (tmp_path / "straight" / "model" / "adapter_config.json").exists()


def test_a_resumed_run_takes_its_new_learning_rate(tmp_path, folder, without_processes):  # noqa: F811
    """And what an evaluation draws in this process leaves the training's random numbers alone."""
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--lora_rank", 2, "--num_steps", 1, "--run_dir", tmp_path / "run") == 0
    before = load_checkpoint(tmp_path / "run" / "last.pt")
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--num_steps", 2, "--lr", 1e-9) == 0
    after = load_checkpoint(tmp_path / "run" / "last.pt")
    moved = max((after["model"][name] - x).abs().max() for name, x in before["model"].items())
    assert 0 < moved < 1e-7  # a step of Adam is at most some times the learning rate, which was 0.01
    random = torch.get_rng_state()
    grpo_text.evaluate(after, 4)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_adapter_goes_on_as_part_of_the_model(tmp_path, folder, without_processes, tokenizer):  # noqa: F811
    trained = tmp_path / "run" / "model"
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--lora_rank", 2, "--num_steps", 2, "--run_dir", tmp_path / "run") == 0
    c = SimpleNamespace(**load_checkpoint(tmp_path / "run")["constants"])
    writer = grpo_text.make_writer(c, torch.device("cpu"))
    tokens = torch.randint(1, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    start = writer.logprobs(writer.model, tokens, torch.ones_like(tokens), 8)
    writer.load_state_dict(load_checkpoint(tmp_path / "run")["model"])
    expected = writer.logprobs(writer.model, tokens, torch.ones_like(tokens), 8)
    for rank in 0, 2:
        loaded = grpo_text.make_writer(SimpleNamespace(**vars(c) | {"POLICY_MODEL": str(trained), "LORA_RANK": rank}), torch.device("cpu"))
        torch.testing.assert_close(loaded.logprobs(loaded.model, tokens, torch.ones_like(tokens), 8), expected, rtol=0, atol=1e-4)
    assert (start - expected).abs().max() > 1e-3
    words = f"{SMALL} --policy_model {trained} --lora_rank 2 --num_steps 2 --run_dir {tmp_path / 'second'}"
    assert run(ALGORITHM, *words.split()) == 0
    state = load_checkpoint(tmp_path / "second")
    writer = grpo_text.make_writer(SimpleNamespace(**state["constants"]), torch.device("cpu"))
    writer.load_state_dict(state["model"])
    saved = grpo_text.make_writer(SimpleNamespace(**vars(c) | {"POLICY_MODEL": str(tmp_path / "second" / "model"), "LORA_RANK": 0}), torch.device("cpu"))
    second, expected = (x.logprobs(x.model, tokens, torch.ones_like(tokens), 8) for x in (saved, writer))
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-4)


def test_all_weights_learn_if_asked(tmp_path, folder, without_processes, capsys):  # noqa: F811
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--lora_rank", 0, "--num_steps", 1, "--run_dir", tmp_path / "run") == 0
    state = load_checkpoint(tmp_path / "run")
    assert "model.model.embed_tokens.weight" in state["model"] and (tmp_path / "run" / "model" / "config.json").exists()
    result = evaluated(ALGORITHM, tmp_path / "run", capsys, "--episodes", 16)
    assert result["answers"] == 16 and 0 <= result["min"] <= result["score"] <= result["max"] <= 1
    assert run(ALGORITHM, "--play", tmp_path / "run") == 0
    first = capsys.readouterr().out
    assert run(ALGORITHM, "--play", tmp_path / "run", "--seed", 3) == 0
    assert first.count("?") >= len(HELD_OUT) and capsys.readouterr().out != first
    with pytest.raises(CommandLineError, match="--episodes and --out belong to a gif"):
        run(ALGORITHM, "--play", tmp_path / "run", "--episodes", 2)


@pytest.mark.parametrize("words, message", [
    (["--policy_model", "tiny"], "knows no words"), (["--policy_model", "no/such-model"], "cannot be loaded"), (["--num_samples", 1], "NUM_SAMPLES"),
    (["--reward_model", "no/such-model"], "cannot be loaded"), (["--top_p", 0], "TOP_P"),
    (["--policy_model", "damaged"], "cannot be loaded"), (["--policy_model", "endless"], "no end token"),
    (["--max_new_tokens", 60000], "reads 32768 tokens at most, so MAX_NEW_TOKENS must be 32"),
])  # fmt: skip
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


def test_lack_of_memory_is_one_line_with_advice(monkeypatch, tmp_path, folder, capsys, without_processes):  # noqa: F811
    def collect(self):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(grpo_text.GRPO, "collect", collect)
    assert run(ALGORITHM, *SMALL.split(), "--policy_model", folder, "--run_dir", tmp_path / "run", "--num_samples", 8) == 1
    assert "--num_samples 4" in capsys.readouterr().err


def fails(*args, **kwargs):
    raise RuntimeError("No API key configured.\nUse `wandb login`")


@pytest.mark.parametrize("wandb, reason", [
    (None, "import of wandb halted; None in sys.modules; install it with pip"),
    (SimpleNamespace(init=fails), "RuntimeError: No API key configured. Use `wandb login`"),
    (SimpleNamespace(init=lambda **_: SimpleNamespace(log=fails, finish=fails)), "RuntimeError: No API key configured. Use `wandb login`"),
])  # fmt: skip
def test_weights_and_biases_that_fail_end_no_training(monkeypatch, capsys, wandb, reason):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    watching, trainer = grpo_text.WeightsAndBiases("project", {}), SimpleNamespace(stats={"loss": 1.0}, update_count=1)
    for event in ("on_training_start", "on_update_end", "on_update_end"):
        watching.hear(event, trainer)
    watching.hear("close")
    assert capsys.readouterr().out == f"warning: no more goes to Weights & Biases ({reason}); training goes on\n"
