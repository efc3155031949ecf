"""Trainings, evaluations and resumed runs of games other than Breakout."""

import csv
import re

import numpy as np
import pytest
import torch
from helpers import explained, logged_columns

import load_model
import train_ppo
from breakout_ascii import BreakoutAsciiVec
from evaluation import EPISODES_AT_ONCE, FIRST_SEED, OTHER_METRICS, episodes, evaluate, levels, play_episodes
from games.catch import Catch
from games.game import load_game
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError, Values
from model import GPT, GPTConfig
from policies import check_game, game_of, load_policy
from ppo import discounted_returns
from train_ppo import CONSTANTS, main

CATCH = "games.catch:Catch-v0"
SMALL = (
    "--num_envs 4 --rollout_steps 16 --batch_size 32 --n_embd 8 --n_head 2 --eval_interval 2 --eval_episodes 3".split()
)


def run(folder, *options):
    return main([*SMALL, "--run_dir", str(folder), "--save_freq", "1", *options])


def rows_of(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("game_id", [CATCH, "FrozenLake-v1"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, without_processes, game_id):
    """Bit for bit: its games are saved as seeds and actions."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(straight, "--game", game_id, "--num_steps", "256") == 0
    assert run(stopped, "--game", game_id, "--num_steps", "256") == 0
    assert main(["--resume", str(stopped / "checkpoint_2.safetensors")]) == 0
    for ours, theirs in zip(rows_of(straight), rows_of(stopped), strict=True):
        for name in ours.keys() - {"seconds", "steps_per_second"}:
            assert ours[name] == theirs[name], name
    states = [load_checkpoint(folder) for folder in (straight, stopped)]
    assert all(torch.equal(x, states[1]["model"][name]) for name, x in states[0]["model"].items())
    assert states[0]["mean_square"] == states[1]["mean_square"]


def test_games_that_do_not_repeat_themselves_start_anew(tmp_path, without_processes, monkeypatch, capsys):
    """A line says how many, and they go on from the page that is there."""
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "128")
    reset = Catch.reset
    monkeypatch.setattr(
        Catch, "reset", lambda self, seed=None, options=None: reset(self, seed=None if seed is None else seed + 1)
    )
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", "192"]) == 0
    assert re.search(r"[1-4] of 4 games start anew, because their state cannot be saved", capsys.readouterr().out)


def test_what_is_printed_and_logged(tmp_path, without_processes, capsys):
    assert run(tmp_path / "run", "--game", CATCH, "--num_steps", "128") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "learns Catch on cpu" in printed and "A page of games.catch.Catch has 16 lines of 26 characters." in printed
    assert "Off, because Catch has nothing for them: VARIED_STARTS, PAIRED_ENVS, MOVE_COEF" in printed
    assert "random play has 0." in printed and "3 episodes" in printed and "--watch" not in printed
    row = rows_of(tmp_path / "run")[-1]
    assert {f"eval_{name}" for name in OTHER_METRICS} == {name for name in row if name.startswith("eval_")}
    assert logged_columns(tmp_path / "run") == explained("other games")  # in docs/glossary.md
    best = load_checkpoint(tmp_path / "run" / "best_model.safetensors")
    assert {f"eval_{name}" for name in best["evaluation"]} == explained("other games", evaluation=True)
    assert row["eval_length"] == "15.0" and float(row["eval_min"]) <= float(row["eval_score"]) <= float(row["eval_max"])


def test_constants_that_ask_in_vain_are_off():
    """Breakout has something for all of them, CliffWalking for none, and a resumed run has no more to say."""
    values = Values(**CONSTANTS)
    assert train_ppo.applicable(values) == (values, "")
    c, line = train_ppo.applicable(Values(**CONSTANTS | {"GAME": "CliffWalking-v1"}))
    assert line.endswith(": VARIED_STARTS, PAIRED_ENVS, MOVE_COEF")
    assert (c.VARIED_STARTS, c.PAIRED_ENVS, c.MOVE_COEF) == (0.0, False, 0.0) and c.PAIRED_ENVS is False
    assert train_ppo.applicable(c)[1] == ""


@pytest.mark.parametrize("game_id", ["CartPole-v1", "Nothing-v0", "nomodule:Nothing-v0"])
def test_a_game_that_cannot_be_read_is_one_line(game_id):
    with pytest.raises(CommandLineError) as error:
        main(["--game", game_id])
    assert str(error.value).startswith("GAME: ") and game_id in str(error.value) and "\n" not in str(error.value)


def test_modules_of_a_checkpoint_are_imported_only_if_they_are_named(tmp_path, without_processes, monkeypatch):
    """A checkpoint may come from anybody. What it holds cannot run, and what it names runs only on request."""
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    for name in ("last", "best_model"):
        file = tmp_path / "run" / f"{name}.safetensors"
        state = load_checkpoint(file)
        save_checkpoint(file, state | {"game": "evil:X-v0", "constants": state["constants"] | {"GAME": "evil:X-v0"}})
    with pytest.raises(CheckpointError, match="its GAME 'evil:X-v0' would run a module's code; name it by --game"):
        main(["--resume", str(tmp_path / "run")])
    with pytest.raises(CheckpointError, match="its game 'evil:X-v0' would run a module's code; name it by --game"):
        load_model.main([str(tmp_path / "run"), "--evaluate"])
    load_model.main([str(tmp_path / "run"), "--evaluate", "--game", CATCH, "--episodes", "2"])


def test_the_commands_to_go_on_name_a_game_of_the_user(tmp_path, without_processes, monkeypatch, capsys):
    (tmp_path / "my_game.py").write_text(
        "import gymnasium\ngymnasium.register('MyCatch-v0', 'games.catch:Catch', max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    game = "my_game:MyCatch-v0"
    assert run(tmp_path / "run", "--game", game, "--num_steps", "64") == 0
    printed = capsys.readouterr().out
    resume, play = (
        re.search(rf"{what}: +python (.*)", printed)[1].split() for what in ("train longer", "watch it play")
    )
    assert main([*resume[1:-1], "128"]) == 0
    load_model.main([*play[1:], "--evaluate", "--episodes", "2"])


def test_a_page_that_cannot_be_read_ends_a_training_in_one_line(tmp_path, without_processes, monkeypatch, capsys):
    """The run is saved, and says how it goes on."""
    reset = Catch.reset

    def reset_with_another_ball(self, seed=None, options=None):
        page, info = reset(self, seed=seed, options=options)
        self.games = getattr(self, "games", 0) + 1
        if self.games > 3:
            page[5] = ord("%")
        return page, info

    monkeypatch.setattr(Catch, "reset", reset_with_another_ball)
    assert run(tmp_path / "run", "--game", CATCH, "--num_steps", "512", "--eval_interval", "0") == 1
    printed = capsys.readouterr()
    assert "shows the character '%' (code 37), none of its characters" in printed.err
    assert "--resume" in printed.err and "Traceback" not in printed.err + printed.out
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_a_run_keeps_its_game(tmp_path, without_processes):
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    with pytest.raises(CommandLineError, match="--game cannot change in a resumed run"):
        main(["--resume", str(tmp_path / "run"), "--game", "CliffWalking-v1"])


def test_a_run_whose_game_has_changed_is_not_resumed(tmp_path, without_processes, monkeypatch):
    """Characters in another order would be read as each other."""
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    game = load_game(CATCH)
    monkeypatch.setattr(game, "characters", game.characters[::-1])
    with pytest.raises(CommandLineError, match="was begun with characters .*; put that back in the game, or begin"):
        main(["--resume", str(tmp_path / "run"), "--num_steps", "128"])


def test_a_pending_evaluation_goes_when_evaluations_are_switched_off(tmp_path, without_processes):
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    state = load_checkpoint(tmp_path / "run")
    model = {
        name: state[name] for name in load_checkpoint(tmp_path / "run" / "best_model.safetensors") if name in state
    }
    save_checkpoint(tmp_path / "run" / "last.safetensors", state | {"evaluations": (model,)})
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", "128", "--eval_interval", "0"]) == 0
    assert not load_checkpoint(tmp_path / "run")["evaluations"]


def test_another_seed_scores_a_model_in_other_games(tmp_path, without_processes, monkeypatch):
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    seeds = []
    reset = Catch.reset
    monkeypatch.setattr(
        Catch, "reset", lambda self, seed=None, options=None: seeds.append(seed) or reset(self, seed=seed)
    )
    for seed in "01":
        load_model.main([str(tmp_path / "run"), "--evaluate", "--episodes", "8", "--seed", seed])
    played = [seed for seed in seeds if seed is not None and seed >= FIRST_SEED]
    assert len(set(played)) == 16 and played[:8] == list(range(FIRST_SEED, FIRST_SEED + 8))


def test_a_model_knows_its_game(tmp_path, without_processes):
    run(tmp_path / "run", "--game", CATCH, "--num_steps", "64")
    policy, meta = load_policy(tmp_path / "run")
    game = load_game(game_of(meta))
    assert game.id == CATCH and (policy.config.rows, policy.config.columns) == (16, 27)
    check_game("run", policy, meta, game)
    with pytest.raises(CheckpointError) as error:
        check_game("run", policy, meta, load_game("CliffWalking-v1"))
    line = str(error.value)
    assert CATCH in line and "CliffWalking-v1" in line and "rows 16 (the game: 4)" in line and "\n" not in line


# --- evaluation -------------------------------------------------------------------------------------------------------


def perfect(pages):
    """Play Catch perfectly."""
    lines = pages.reshape(len(pages), 16, 27)
    ball = (lines == ord("o")).any(1).argmax(1)
    middle = (lines[:, -1] == ord("=")).argmax(1) + 1
    return np.where(ball == middle, 0, np.where(ball < middle, 1, 2))


def test_episodes_are_those_of_their_seeds():
    """Played side by side, they are the ones that are played one by one."""
    game = load_game(CATCH)
    together = play_episodes(perfect, game, range(5))
    assert together == ([1.0] * 5, [15] * 5)
    still = play_episodes(lambda pages: np.zeros(len(pages), int), game, range(20))
    alone = [play_episodes(lambda pages: np.zeros(1, int), game, [seed])[0][0] for seed in range(20)]
    assert still[0] == alone and 0 < sum(alone) < 20


def test_the_mean_and_its_error():
    """Of more episodes than are played at once, greedily and sampled, always the same ones."""
    torch.manual_seed(0)
    game = load_game(CATCH)
    policy = GPT(GPTConfig(**game.page_sizes(), n_head=2, n_embd=8))
    n = EPISODES_AT_ONCE + 5
    for sample in (False, True):
        result = episodes(policy, game, n, sample=sample)
        assert result == episodes(policy, game, n, sample=sample)
        share = result["score"]
        assert result["error"] == pytest.approx((share * (1 - share) / (n - 1)) ** 0.5)
        assert (result["games"], result["length"], result["min"]) == (n, 15, 0)
    assert evaluate(policy, game, n) == episodes(policy, game, n, seed=FIRST_SEED)


def test_the_level_of_random_play():
    """The middle columns are caught by about one player in seven; the measurement is always the same."""
    level = levels(load_game(CATCH), 500)["random play"]
    assert 0.05 < level < 0.3


# --- returns of any size ----------------------------------------------------------------------------------------------


def test_discounted_returns():
    """By hand: two environments, of which the first ends an episode after its second step."""
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 8.0]])
    has_next = torch.tensor([[True, True], [False, True], [True, True]])
    expected = torch.tensor([[2.0, 2.0], [2.0, 4.0], [4.0, 8.0]])
    assert torch.equal(discounted_returns(rewards, has_next, 0.5), expected)


def test_rewards_a_thousand_times_as_large_are_learned_in_the_same_way(monkeypatch):
    """What is normalized has no unit, up to rounding. Without rewards nothing is divided by zero."""
    step = Catch.step

    def scaled(factor):
        def scaled_step(self, action):
            obs, reward, *rest = step(self, action)
            return obs, reward * factor, *rest

        return scaled_step

    learned = []
    for factor in (1, 1024, 0):
        monkeypatch.setattr(Catch, "step", scaled(factor))
        ppo = train_ppo.build(small(GAME=CATCH), torch.device("cpu"))
        for _ in range(2):
            ppo.collect_and_update()
        learned.append(ppo.weights.detach().clone())
    assert torch.equal(learned[0], learned[1]) and learned[2].isfinite().all()


def small(**changes):
    sizes = dict(NUM_ENVS=4, ROLLOUT_STEPS=16, BATCH_SIZE=32, N_HEAD=2, N_EMBD=8, PAIRED_ENVS=False)
    return Values(**CONSTANTS | sizes | changes)


def test_breakout_keeps_its_points():
    ppo = train_ppo.build(small(), torch.device("cpu"))
    assert isinstance(ppo.env, BreakoutAsciiVec) and ppo.config.reward_scale == 0.1 == ppo.reward_scale
    assert not ppo.config.normalize_rewards and "mean_square" not in ppo.state_dict()


def test_the_critic_starts_at_the_mean_return():
    """CliffWalking has negative rewards only. The shift is in the weights and in the stored values alike."""
    ppo = train_ppo.build(small(GAME="CliffWalking-v1"), torch.device("cpu"))
    before = ppo.policy.value_head.bias.item()
    ppo.collect()
    samples = ppo.buffer.samples
    assert ppo.policy.value_head.bias.item() < before - 1
    assert samples.old_values.mean() < -0.5
    with torch.no_grad():
        _, values = ppo.policy.heads(ppo.policy.features(samples.obs))
    torch.testing.assert_close(values, samples.old_values, rtol=1e-4, atol=1e-4)
    ppo.update()
    bias = ppo.policy.value_head.bias.item()
    ppo.collect()
    assert ppo.policy.value_head.bias.item() == bias
