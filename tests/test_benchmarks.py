"""Every benchmark, made small, against figures that are known."""

import csv
import functools
import importlib
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PAGE, make_gpt

import train_ppo
from algorithms.parts.language_model import tiny_model, train_tokenizer
from benchmarks import (
    compare,
    first_update,
    gpu_checks,
    grpo,
    language_models,
    learning,
    on_a_gpu,
    peers,
    robustness,
    small_weights,
    soak,
    throughput,
)
from benchmarks.slow_game import SlowGame
from breakout_ascii import TOKENS, BreakoutAscii, BreakoutAsciiVec
from callbacks import Callback
from evaluation import SERVES
from fast.gpu_checks import BF16_MARGIN, GRADIENT_MARGIN, VALUES_MARGIN
from fast.gpu_games import TensorGames
from harness.checkpoint import CheckpointError, save_checkpoint
from harness.device import DeviceError
from harness.options import CommandLineError
from model import GPT
from policies import load_policy
from ppo import value_loss
from sweep import find_training, read_grid
from train_ppo import CONSTANTS

ROOT = Path(__file__).parent.parent


def table(text):
    """Return the header and the rows of a markdown table, as lists of str."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return header, rows


def still(tokens):
    return np.zeros(len(tokens), int)


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (soak.main, "--minutes 0", "--minutes: must be a number in [0.01, 10_000.0], not '0'"),
        (soak.main, "--minutes", "expected one argument"),
        (robustness.main, "--games 0", "--games: must be an integer in [1, 10_000], not '0'"),
        (robustness.main, "--games few", "--games: must be an integer in [1, 10_000], not 'few'"),
        (robustness.main, "nowhere", "nowhere: there is no such file"),
        (learning.main, "nowhere", "nowhere: there are no runs; name a run, or the directory of a sweep"),
        (throughput.main, "--tables 6", "invalid choice: 6"),
        (throughput.main, "--repetitions 0", "--repetitions: must be an integer in [1, inf), not '0'"),
        (throughput.main, "--device tpu9", "--device tpu9 does not work here"),
        (peers.main, "lunarlander --num_steps 0", "--num_steps: must be an integer in [1, inf)"),
        (peers.main, "", "the following arguments are required: TASK; --help explains them"),
        (peers.main, "grpo --seed -1", "--seed: must be an integer in [0, "),
        (first_update.main, "--without graphs tea", "--without: invalid choice: 'tea'"),
        (first_update.main, "--updates 0", "--updates: must be an integer in [1, inf), not '0'"),
        (on_a_gpu.main, "--minutes 0", "--minutes: must be a number in [0.1, 10_000.0], not '0'"),
        (on_a_gpu.main, "--num_evs 8", "unknown argument --num_evs; did you mean --num_envs?"),
        (on_a_gpu.main, "--run_dir x", "--resume and --run_dir are chosen by this program; give it --out"),
        (on_a_gpu.main, "--device cuda:99", "try --device cpu and small sizes, to try this program out"),
        (language_models.main, "--turns 0", "--turns: must be an integer in [1, inf)"),
        (language_models.main, "--device tpu9", "--device tpu9 does not work here"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(main, arguments, message):
    with pytest.raises((CommandLineError, CheckpointError, DeviceError), match=re.escape(message)) as error:
        main(arguments.split())
    assert "\n" not in str(error.value)


# robustness.py


def play_one(serves):
    """Stand still in the environment for one game. Returns score, bricks left, lives left and steps."""
    env = BreakoutAscii()
    env.reset(options={"serves": serves})
    for step in range(1, 5000):
        _, _, over, _, info = env.step(0)
        if over:
            return info["score"], info["bricks"], info["lives"], step


def test_every_game_of_a_condition_is_played_to_its_end(monkeypatch):
    """This holds for the first game too, and however many are played at once."""
    serves, bricks, sticky = robustness.conditions(1, 0, True)["standard"]
    results = robustness.play(still, serves, bricks, sticky, 0, True)
    np.testing.assert_array_equal(np.stack(results[:4], 1), [play_one(dx) for dx in SERVES])
    assert (results.bricks > 0).all() and (results.lives == 0).all()
    monkeypatch.setattr(robustness, "GAMES_AT_ONCE", 5)
    np.testing.assert_array_equal(results, robustness.play(still, serves, bricks, sticky, 0, True))


def test_the_conditions_differ_in_one_thing_each():
    n = 4000
    conditions = robustness.conditions(n, 0, False)
    standard, whole, _ = conditions["standard"]
    assert (standard[..., 0] == 40).all() and (standard[..., 2] == 36).all()
    assert whole.all() and whole.shape == (n, 7, 13)
    assert np.mean(standard[..., 1] == 1) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(5 * n))
    serves, bricks, _ = conditions["random serves"]
    counts = np.bincount(serves[..., 0].ravel(), minlength=80)
    shares, error = counts[1:79] / (5 * n), math.sqrt(1 / 78 / (5 * n))
    assert (counts[[0, 79]] == 0).all() and np.abs(shares - 1 / 78).max() < 5 * error
    assert (serves[..., 1] == standard[..., 1]).all() and bricks.all()
    assert (np.abs(serves[..., 0] - serves[..., 2] - 3) <= 3).all()
    serves, bricks, _ = conditions["random layouts"]
    shares = bricks.mean((1, 2))  # any share alike
    quartiles = [0.25, 0.5, 0.75]
    assert (serves == standard).all() and np.abs(np.quantile(shares, quartiles) - quartiles).max() < 0.04
    assert [sticky for *_, sticky in conditions.values()] == [0.0, 0.0, 0.0, 0.1]
    for name, (serves, bricks, _) in robustness.conditions(n, 0, True).items():  # all players get the same
        same = [np.array_equal(x, y) for x, y in zip((serves, bricks), conditions[name])]
        assert same == ([False, False] if name == "standard" else [True, True])


def test_a_sticky_action_is_played_again(monkeypatch):
    """The player goes right and left by turns. A move is as chosen if the action is not replaced, or if it is replaced
    by the move before and that was not as chosen. So a share p = (1 - 0.25) + 0.25 (1 - p) of moves are as chosen."""
    monkeypatch.setattr(robustness, "STICKY", 0.25)
    serves, bricks, sticky = robustness.conditions(300, 0, False)["sticky actions"]
    paddles = []

    def player(tokens):
        paddles.append((tokens.reshape(-1, 24, 81)[:, 22] == ord("=")).argmax(1))
        return np.full(len(tokens), 1 + len(paddles) % 2)

    robustness.play(player, serves, bricks, sticky, 0, False)
    moves = np.diff(np.array(paddles[:18]), axis=0)  # no ball has come down yet
    chosen = np.where(np.arange(17) % 2, -2, 2)[:, None]
    assert np.mean((moves == chosen)[4:]) == pytest.approx(1 / 1.25, abs=0.03) and (np.abs(moves) <= 2).all()


@pytest.mark.faults
def test_the_table_of_robustness(tmp_path, monkeypatch, capsys):
    """Models are in the given order, and after them the tracker and random play, once each."""
    play_games = robustness.play_games

    def play(player, *arguments, **options):
        """Play only the tracker's games to their end."""
        return play_games(player, *arguments, **options, max_steps=2000 if player is robustness.tracker else 100)

    monkeypatch.setattr(robustness, "play_games", play)
    for seed, name in enumerate(("b.safetensors", "a.safetensors")):
        gpt = make_gpt(seed, n_head=2, n_embd=8)
        state = {"model": gpt.state_dict(), "gpt_config": asdict(gpt.config), "global_step": 1000}
        save_checkpoint(tmp_path / name, state)
    robustness.main([str(tmp_path / "b.safetensors"), str(tmp_path / "a.safetensors"), "--games", "2"])
    output = capsys.readouterr().out
    header, rows = table(output)
    assert header == list(robustness.COLUMNS) and output.count("trained for 1,000 steps") == 2
    players = [re.sub(r"^.*/", "", row[0]) for row in rows[::4]]
    models = [f"{name}.safetensors, {how}" for name in "ba" for how in ("greedy", "sampled")]
    assert players == [*models, "tracker", "random"]
    assert [row[1] for row in rows] == 6 * ["standard", "random serves", "random layouts", "sticky actions"]
    assert all(re.fullmatch(r"[\d.]+%?", cell) for row in rows for cell in row[2:3] + row[4:])
    drawn = [False] + 7 * [True]  # all but the standard games of greedy players
    assert [" ± " in row[3] for row in rows] == 3 * drawn
    assert rows[16] == ["tracker", "standard", "32", "960.0", "100.0%", "100.0%", "0.0%", "0.0%", "0.00"]
    assert [row[2] for row in rows[:8]] == ["32", "2", "2", "2", "2", "2", "2", "2"]


# learning.py

CURVES = {  # seed: (steps, seconds, score, games cleared, share of varied games cleared) of each evaluation
    0: [(1_000_000, 60, 350.0, 0, 0.0), (2_000_000, 120, 960.0, 32, 0.5), (4_000_000, 180, 945.0, 30, 0.75)],
    1: [(1_000_000, 90, 100.0, 0, 0.0), (2_000_000, 180, 650.5, 1, 0.125), (4_000_000, 270, 640.0, 2, 0.25)],
}
MARKS = [f"{mark}: {unit}" for mark in (300, 600, 900, 960) for unit in ("M steps", "min")]


def leave_run(run_dir, seed, curve):
    """Write the files that learning.py reads of a run. Three more rows have no evaluation, or a damaged one."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"SEED": seed, "NUM_STEPS": 4_000_000}))
    rows = [",".join(map(str, (i, *evaluation))) for i, evaluation in enumerate(curve, start=1)]
    rows += ["9,3500000,999,,,", "10,3600000,999,n/a,,", '11,3700000,999,"81,25",3,']
    (run_dir / "metrics.csv").write_text(
        "\n".join(["update,global_step,seconds,eval_score,eval_cleared,eval_varied", *rows, ""])
    )


def test_variants_beside_each_other(tmp_path, capsys):
    """The row of a variant has its seeds in order, near each number of steps; the first variant is in every panel."""
    names = {"gamma=0.9": "default", "gamma=0.9,lr=0.1": "lr=0.1", "gamma=0.9,n_head=1": "n_head=1"}
    for name in names:
        for seed in (1, 0):
            leave_run(tmp_path / f"{name},seed={seed}", seed, CURVES[seed])
    assert compare.main([tmp_path, "--at", 1_400_000, 3_900_000]) == 0
    assert table(capsys.readouterr().out) == (
        ["variant", "seeds", "near 1.4M", "near 3.9M", "best"],
        [[name, "0 1", "350 100", "945 640", "960 650"] for name in names.values()],
    )
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    panels = compare.draw(compare.read_variants([tmp_path]), across=1, levels=[960]).axes
    assert [panel.get_title() for panel in panels] == ["lr=0.1", "n_head=1"]
    assert all([line.get_ydata()[1] for line in panel.lines] == [960, *2 * [960.0, 650.5]] for panel in panels)
    with pytest.raises(CommandLineError, match="there are no runs"):
        compare.main([tmp_path / "nowhere"])


def test_runs_of_the_same_variant_and_seed_are_not_mixed(tmp_path):
    """The default constants alone have no name. A run that is named twice counts once."""
    leave_run(tmp_path / "a" / "seed=0", 0, CURVES[0])
    leave_run(tmp_path / "a" / "gamma=0.9,seed=0", 0, CURVES[0])
    assert list(compare.read_variants([tmp_path / "a", tmp_path / "a" / "seed=0"])) == ["default", "gamma=0.9"]
    leave_run(tmp_path / "b" / "seed=0", 0, CURVES[1])
    for read_variants in compare.read_variants, learning.read_variants:
        with pytest.raises(CommandLineError, match="a.seed=0 and .*b.seed=0 have the same name"):
            read_variants([tmp_path / "a", tmp_path / "b"])


def test_the_tables_of_learning(tmp_path, monkeypatch, capsys):
    """The first table has every seed of every variant, the default constants first. Then come medians, then ranges."""
    for seed, curve in CURVES.items():
        leave_run(tmp_path / f"seed={seed}", seed, curve)
    leave_run(tmp_path / "gamma=0.9,seed=0,paired_envs=False", 0, CURVES[0][:1])
    assert learning.main([tmp_path]) == 0
    output = capsys.readouterr()
    *tables, written = output.out.strip().split("\n\n")
    seeds, medians, ranges = map(table, tables)
    assert [line.split(", ")[1] for line in written.splitlines()] == [
        "the first table",
        "the curves of default constants",
    ]
    last = ["best", "best: games cleared", "best: M steps", "best: varied", "last", "last: varied"]
    name = "gamma=0.9,paired_envs=False"
    assert seeds == (
        ["variant", "seed", *MARKS, *last],
        [
            ["default constants", "0", "1", "1", "2", "2", "2", "2", "2", "2", "960", "32", "2", "0.5", "945", "0.75"],
            ["default constants", "1", "2", "3", "2", "3", *4 * ["-"], "650.5", "1", "2", "0.125", "640", "0.25"],
            [name, "0", "1", "1", *6 * ["-"], "350", "0", "1", "0", "350", "0"],
        ],
    )
    means = ["1.5", "2", "2", "2.5", *4 * ["-"], "805.2", "16.5", "2", "0.312", "792.5", "0.5"]
    assert medians == (
        ["variant", "seeds", "of the seeds", *MARKS, *last],
        [
            ["default constants", "2", "median", *means],
            [name, "1", "median", "1", "1", *6 * ["-"], "350", "0", "1", "0", "350", "0"],
        ],
    )
    lows = ["1", "1", *6 * ["2"], "650.5", "1", "2", "0.125", "640", "0.25"]
    highs = ["2", "3", "2", "3", *4 * ["-"], "960", "32", "2", "0.5", "945", "0.75"]
    statistics = {
        "min": lows,
        "max": highs,
        "interquartile mean": means,
        "interval, low": lows,
        "interval, high": highs,
    }
    assert ranges[0] == medians[0] and ranges[1][:5] == [
        ["default constants", "2", name, *numbers] for name, numbers in statistics.items()
    ]
    unfinished = tmp_path / "gamma=0.9,seed=0,paired_envs=False"
    assert output.err == f"{unfinished} has not finished: its last evaluation is after 1,000,000 steps\n"
    with open(tmp_path / "learning.csv", encoding="utf-8") as file:
        assert [row["300: min"] for row in csv.DictReader(file)] == ["1.0", "3.0", "1.0"]
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    halted = "learning.png: not drawn .import of matplotlib.figure halted.*install it with pip"
    with pytest.raises(CommandLineError, match=halted):
        learning.main([tmp_path])
    assert len(capsys.readouterr().out.strip().split("\n\n")) == 4  # the tables and learning.csv come first


def test_which_runs_learning_reads(tmp_path):
    """It reads runs that are named, and the runs in a directory that is named, but nothing deeper."""
    for name in ("a/seed=0", "a/seed=1", "b", "a/seed=0/old"):
        leave_run(tmp_path / name, 0, CURVES[0])
    assert learning.runs_in([tmp_path / "a", tmp_path / "b"]) == [tmp_path / x for x in ("a/seed=0", "a/seed=1", "b")]
    names = ["seed=3", "lr=0.1,seed=12", "seed=0,lr=0.1", "a=1,seed=0,b=2", "small_weights,seed=0"]
    variants = ["", "lr=0.1", "lr=0.1", "a=1,b=2", "small_weights"]
    assert [learning.variant_of(tmp_path / name) for name in names] == variants
    leave_run(tmp_path / "empty", 0, [])
    with pytest.raises(CommandLineError, match="metrics.csv has no evaluations of Breakout; leave this run out"):
        learning.main([tmp_path / "empty"])


def test_the_interquartile_mean():
    assert learning.interquartile_mean(np.array([[960, 0, 1, 2, 3, 4, 900, -5]])) == pytest.approx([2.5])
    assert learning.interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0  # of three none is left out


# small_weights.py


def test_small_weights_are_those_of_nanogpt(tmp_path, monkeypatch):
    """A training begins with them, and its model is played without them."""
    monkeypatch.setattr(GPT, "init_weights", GPT.init_weights)  # restored at the end
    monkeypatch.setattr(train_ppo, "evaluation_of", lambda c, device: None)
    training = "--num_envs 4 --rollout_steps 8 --batch_size 16 --epochs 1 --num_steps 32"
    small = f"{training} --n_head 2 --n_embd 8 --device cpu --run_dir {tmp_path / 'run'}"
    assert small_weights.main(small.split()) == 0
    for name, p in make_gpt().named_parameters():
        std = 0.02 / math.sqrt(2) if "c_proj" in name else 0.02
        if p.dim() > 1:
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(p.numel()))
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()
    assert load_policy(tmp_path / "run")[0].wte.weight.std().item() < 0.05


# baseline.py


def test_without_stable_baselines3_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "benchmarks.baseline", raising=False)
    with pytest.raises(SystemExit) as end:
        importlib.import_module("benchmarks.baseline")
    assert end.value.code == "-m benchmarks.baseline: needs Stable-Baselines3: pip install stable-baselines3"


@pytest.fixture
def baseline(monkeypatch):
    pytest.importorskip("stable_baselines3")
    module = importlib.import_module("benchmarks.baseline")
    for name, value in {"NUM_ENVS": 4, "ROLLOUT_STEPS": 8, "BATCH_SIZE": 16, "EVAL_INTERVAL": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_small_baseline(tmp_path, baseline, capsys):
    arguments = ["--num_steps", "90", "--seed", "3", "--out", str(tmp_path / "out")]
    baseline.main(arguments)
    with open(tmp_path / "out" / "seed3.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["update"], row["steps"]) for row in rows] == [("2", "64"), ("3", "96")]
    assert all(0 <= float(row["score"]) <= 960 and row["cleared"] == "0" for row in rows)
    assert f"last {float(rows[-1]['score']):.2f}" in capsys.readouterr().out
    with pytest.raises(CommandLineError, match="seed3.csv exists already; name another --out"):
        baseline.main(arguments)


def test_stable_baselines3_weighs_the_losses_as_ours_does(baseline, monkeypatch):
    """Its coefficients times its losses equal ours. Its value loss is the whole squared error, ours is half of it."""
    given = {}

    class Recorded(baseline.PPO):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            given.update(vars(self))

    monkeypatch.setattr(baseline, "PPO", Recorded)
    next(baseline.train(0, 32))
    c, errors = SimpleNamespace(**CONSTANTS), torch.tensor([1.0, -3.0])
    ours, _ = value_loss(errors, torch.zeros(2), torch.zeros(2))
    assert given["vf_coef"] * torch.nn.functional.mse_loss(errors, torch.zeros(2)) == c.VALUE_LOSS_COEF * ours
    found = given["ent_coef"], given["max_grad_norm"], given["clip_range"](1.0)
    assert found == (c.ENTROPY_COEF, c.MAX_GRAD_NORM, c.EPS_CLIP)
    assert given["normalize_advantage"] and given["clip_range_vf"] is None
    assert given["policy"].optimizer.defaults["eps"] == 1e-5


def test_the_games_as_stable_baselines3_sees_them(baseline):
    """A lost life ends a return, a truncation has the final observation, and rewards are scaled."""
    ours, env = BreakoutAsciiVec(8, max_episode_steps=60), BreakoutAsciiVec(8, max_episode_steps=60)
    games, rng, seen = baseline.Games(env), np.random.default_rng(0), np.zeros(3, int)
    games.seed(1)
    np.testing.assert_array_equal(games.reset(), ours.reset(seed=1)[0] / np.float32(127))
    for _ in range(130):
        actions = rng.integers(3, size=8)
        games.step_async(actions)
        obs, rewards, dones, infos = games.step_wait()
        tokens, points, terminated, truncated, our_infos = ours.step(actions)
        np.testing.assert_array_equal(obs, tokens / np.float32(127))
        np.testing.assert_allclose(rewards, points * CONSTANTS["REWARD_SCALE"])
        lost = our_infos["life_lost"] | our_infos.get("final_info", {}).get("life_lost", False)
        np.testing.assert_array_equal(dones, terminated | truncated | lost)
        cut = np.array(["TimeLimit.truncated" in info for info in infos])
        assert (cut <= truncated).all()
        assert all(info["terminal_observation"].shape == (TOKENS,) for info in infos if info)
        seen += (points > 0).sum(), lost.sum(), cut.sum()
    assert (seen > 0).all()


# throughput.py


@pytest.fixture
def small(monkeypatch):
    """Make the constants small, and return a GPT of that size."""
    constants = dict(NUM_ENVS=4, ROLLOUT_STEPS=16, BATCH_SIZE=8, EVAL_INTERVAL=1, N_HEAD=2, N_EMBD=8, MLP_EXPANSION=1)
    constants |= dict(PAIRED_ENVS=True, PREDICTION_COEF=0.1, VARIED_STARTS=0.7)
    for name, value in constants.items():
        monkeypatch.setattr(throughput.C, name, value)
    monkeypatch.setattr(throughput, "SPREAD_STEPS", 30)
    monkeypatch.setattr(throughput, "GAMES", (2, 4))
    monkeypatch.setattr(throughput, "RANDOM_ACTIONS", {"middling": 0.5})
    monkeypatch.setattr(throughput, "DEEP", {"n_layer": 2, "n_embd": 8, "n_head": 2, "mlp_expansion": 1})
    game_row = functools.partial(throughput.game_row, num_envs=8, num_plain=2, steps=150)
    monkeypatch.setattr(throughput, "game_row", game_row)
    torch.manual_seed(0)
    return throughput.make_gpt(throughput.GPTConfig(**PAGE, n_embd=8, n_head=2, mlp_expansion=1), torch.device("cpu"))


ONCE = SimpleNamespace(repetitions=1, num_steps=64)


def amount(cell):
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.faults
def test_the_table_of_speed(small):
    _, header, rows = throughput.speed_table(small, ONCE)
    assert [len(row) for row in rows] == 5 * [len(header)] and rows[0][-1] == "equal"
    for row in rows:  # of one repetition the median is the ratio itself
        assert amount(row[3]) == pytest.approx(amount(row[1]) / amount(row[2]), rel=0.02)
    assert all(float(row[-1]) < 1e-4 for row in rows[1:]), rows


def test_the_game_is_compared_character_by_character(small, monkeypatch):
    class Shifted(SlowGame):
        def page(self):
            return super().page().replace("=======#", "======= ").replace("O", "o")

    monkeypatch.setattr(throughput, "SlowGame", Shifted)
    assert throughput.game_row(1)[-1] == "300 characters"  # one in each page of two games, 150 steps


def test_a_wrong_gpt_is_seen(small, monkeypatch):
    plain = throughput.plain_gpt

    def wrong(policy):
        gpt = plain(policy)
        with torch.no_grad():
            gpt.policy_head.weight *= 1.01
        return gpt

    monkeypatch.setattr(throughput, "plain_gpt", wrong)
    rows = list(throughput.model_rows("", small, throughput.training_pages(small, "middling"), 1))
    assert all(float(row[-1]) == pytest.approx(0.01, rel=0.2) for row in rows)


@pytest.mark.faults
def test_the_table_of_changes(small):
    _, header, rows = throughput.changes_table(small, ONCE)
    shares = ["0", "0.1", "1", "10", "100"]
    assert [row[0].split(", ")[1] for row in rows[::2]] == [f"{share} % changed" for share in shares]
    assert all(float(row[-1]) < 1e-4 for row in rows), rows


def test_the_pages_that_are_read(small, monkeypatch):
    """A minibatch has each page of a rollout of pairs once."""
    monkeypatch.setattr(throughput.C, "BATCH_SIZE", 4 * 16)  # the whole rollout
    pages = throughput.training_pages(small, "middling")
    assert pages.shape == (64, TOKENS) and pages.dtype == np.uint8
    texts = [page.tobytes() for page in pages]
    assert 32 < len(set(texts)) <= 62  # both pairs begin with the same page
    grouped = throughput.training_pages(small, "middling", 8)
    assert sorted(page.tobytes() for page in grouped) == sorted(texts)


def test_the_table_of_games(small):
    _, header, rows = throughput.games_table(small, ONCE)
    assert [row[0] for row in rows] == ["2", "4"] and all(amount(row[1]) > 0 for row in rows)


def test_where_the_time_goes(small, monkeypatch):
    """The weights stay as they are, though the constants of the training ask for a model of another size."""
    trainers = []

    def endless_trainer(policy):
        trainer, c = original(policy)
        trainers.append(trainer)
        return trainer, c

    original = throughput.endless_trainer
    monkeypatch.setattr(throughput, "evaluation_of", lambda c, device: Callback())
    monkeypatch.setattr(throughput, "endless_trainer", endless_trainer)
    monkeypatch.setattr(throughput.C, "N_EMBD", 16)
    steps, seconds, parts = throughput.seconds_of_parts(small, 3 * 64)
    assert steps == 3 * 64
    for name, x in trainers[0].policy.state_dict().items():
        # A step of Adam is at most a few times the learning rate of 1e-9.
        torch.testing.assert_close(x, small.state_dict()[name], rtol=0, atol=1e-4)
    assert list(parts) == [
        "game",
        "forward",
        "prediction targets",
        "buffer.add",
        "GAE",
        "update",
        "evaluations",
        "other callbacks",
        "rest",
    ]
    assert all(share > 0 for share in parts.values())


def test_a_part_does_not_count_the_parts_it_calls(small, monkeypatch):
    """Time is read from a clock that ticks once for each reading."""
    readings = iter(range(10**6))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(readings)))
    trainer, _ = throughput.endless_trainer(small)
    trainer.callbacks = [Callback(), Callback()]
    with throughput.clocks(trainer, trainer.callbacks[0]) as parts:
        trainer.emit("on_update_end")
    assert parts["evaluations"] == 1 and parts["other callbacks"] == 3 - 1


def test_speed_and_memory_of_a_whole_training(monkeypatch):
    """The speed is by the run's own clock. Linux gives the peak in kilobytes."""

    class Process:
        returncode = 0

        def __init__(self, command, **kwargs):
            run_dir = Path(command[command.index("--run_dir") + 1])
            run_dir.mkdir()
            save_checkpoint(run_dir / "last.safetensors", {"global_step": 3000, "seconds": 1.5})

        def communicate(self):
            return b"2000000\n", None

        def wait(self):
            pass

        terminate = wait

    monkeypatch.setattr(throughput.subprocess, "Popen", Process)
    monkeypatch.setattr(throughput.sys, "platform", "linux")
    assert throughput.training(3000, "cpu") == (2000.0, pytest.approx(2.048))
    Process.returncode = 1
    with pytest.raises(CommandLineError, match="the training has ended with status 1; its reason stands above"):
        throughput.training(3000, "cpu")


def test_throughput_from_the_command_line(small, monkeypatch, capsys):
    # The sizes that `small` sets are not those of the shipped model, which is read here.
    monkeypatch.setattr(throughput, "C", SimpleNamespace(**CONSTANTS | {"ROLLOUT_STEPS": 8}))
    throughput.main("--tables 3 --repetitions 1 --device cpu".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("torch ")
    assert lines[2] == "Table 3: speed of rollouts for more and more games: learned play"
    assert len(lines) == 7


@pytest.mark.faults
@pytest.mark.parametrize("constants, kinds", [("--n_layer 1 --n_head 2", "ABCD"), ("--n_layer 2 --n_head 2", "DE")])
def test_the_gpu_checks_print_every_check(capsys, constants, kinds):
    small = "--device cpu --n_embd 8 --num_envs 4 --rollout_steps 4 --batch_size 8 --epochs 1"
    assert gpu_checks.main((small + " " + constants).split()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match("  [A-E] ", line)]
    assert {row[0] for row in rows} == set(kinds) and {row[-1] for row in rows} == {"ok"}
    assert all(0 <= float(row[-3]) <= float(row[-2]) for row in rows)


def test_the_gpu_checks_are_of_breakout():
    with pytest.raises(CommandLineError, match="plays Breakout alone, not games.catch:Catch-v0; leave out --game"):
        gpu_checks.main("--device cpu --game games.catch:Catch-v0".split())


def test_the_gpu_checks_say_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(TensorGames, "bounce_off_walls", lambda self: None)
    small = "--device cpu --n_embd 8 --n_head 2 --num_envs 16 --rollout_steps 4 --batch_size 8"
    assert gpu_checks.main(small.split()) == 1
    *_, row, line = capsys.readouterr().out.splitlines()
    assert row.endswith("WRONG") and line.startswith("  wrong results on cpu, torch 2.")


def test_the_gpu_checks_take_no_run_of_several_ranks(tmp_path):
    constants = CONSTANTS | {"NUM_ENVS": 8, "ROLLOUT_STEPS": 4, "BATCH_SIZE": 8, "RUN_DIR": str(tmp_path)}
    save_checkpoint(
        tmp_path / "last.safetensors",
        {"constants": constants, "obs": torch.zeros(4, 1944, dtype=torch.uint8), "optimizer": {}, "global_step": 32},
    )
    (tmp_path / "config.json").touch()
    with pytest.raises(CommandLineError, match="was trained by 2 ranks, not 1; go on with torchrun"):
        gpu_checks.main(["--resume", str(tmp_path)])


@pytest.mark.slow
def test_peers_small(monkeypatch, capsys):
    """Both run. The scores that they reach in so few steps say nothing."""
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(peers, "EVERY", 4096)
    monkeypatch.setattr(peers, "SOLVED", -1e9)
    peers.main(["lunarlander", "--num_steps", "4096"])
    out = capsys.readouterr().out
    assert re.search(r"ours: -1e\+09 points after 4,096 steps", out)
    assert re.search(r"SB3: -1e\+09 points after 16,384 steps", out)
    monkeypatch.setattr(peers, "STEPS", 24)
    peers.main(["space_invaders", "--turns", "1"])
    assert re.search(r"ours \d+, SB3 \d+ steps/s, ratio \d", capsys.readouterr().out)


@pytest.mark.parametrize(
    "task, package", [("lunarlander", "stable_baselines3"), ("space_invaders", "stable_baselines3"), ("grpo", "trl")]
)
def test_a_task_names_the_peer_it_lacks(monkeypatch, task, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CommandLineError, match=f"^needs {package}: pip install {package.replace('_', '-')}$"):
        peers.main([task])


def test_our_part_of_the_comparison_with_trl_needs_no_trl(monkeypatch, capsys, tmp_path):
    tokenizer = train_tokenizer(["hello world"])
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(peers, "need", lambda package: None)
    monkeypatch.setattr(
        peers,
        "train_their_writer",
        lambda c, prompts: (grpo.grpo.make_writer(c, torch.device("cpu")).state_dict(), [1.0]),
    )
    peers.main(["grpo", "--num_steps", "2", "--model", str(tmp_path)])
    before, after = re.search(
        r"TRL: reward (\S+) \(.*\) before, (\S+) \(.*\) after 2 steps", capsys.readouterr().out
    ).groups()
    assert before == after


@pytest.mark.parametrize("loss", ["bnpo", "grpo", "dr_grpo"])
def test_grpo_learns_what_trl_does(loss, monkeypatch, capsys, tmp_path):
    """The answers are the same in every step, and the weights at the end differ only by rounding. With another loss the
    cosine would be 0.98, and with another penalty 0.997 to 0.999."""
    pytest.importorskip("trl")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["hello world"])
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    states = []
    evaluate = peers.grpo.evaluate
    monkeypatch.setitem(peers.grpo.REWARDS, "brief", lambda prompt, answer: sum(map(str.isascii, answer)) / 16)
    monkeypatch.setattr(peers.grpo, "MAX_NEW_TOKENS", 16)
    monkeypatch.setattr(peers.grpo, "LR", 1e-3)
    monkeypatch.setattr(peers.grpo, "KL_COEF", 1.0)  # more than by default, so that its gradient shows
    monkeypatch.setattr(peers.grpo, "LOSS", loss)
    monkeypatch.setattr(peers.grpo, "evaluate", lambda state: states.append(state["model"]) or evaluate(state))
    peers.main(["grpo", "--float32", "--num_steps", "2", "--model", str(tmp_path)])
    out = capsys.readouterr().out
    for step in "12":
        ours, theirs = re.findall(rf": step {step}, reward (\S+), [\d.]+ s", out)
        assert ours == theirs
    result = r"reward 0\.\d+ \(standard error 0\.\d+\) before, 0\.\d+ \(0\.\d+\) after 2 steps, \d+\.\d+ s per step"
    assert re.search(f"ours: {result}\nTRL: {result}$", out.rstrip())
    start, ours, theirs = (torch.cat([x.flatten() for x in state.values()]) for state in states)
    assert (ours - start).norm() > 0 and torch.cosine_similarity(ours - start, theirs - start, 0) > 0.9999


# grpo.py


def test_what_learning_from_answers_takes_and_how_exact_it_is(tmp_path, capsys):
    """Rounding depends on the CPU: log-probabilities may differ by 1e-5 in float32, and by 0.1 in bfloat16."""
    pytest.importorskip("resource")
    tokenizer = train_tokenizer(["hello world"])
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    peak, seconds = grpo.peak_of_a_step(str(tmp_path), 4, 8, 2, True)
    assert 0.1 < peak < 100 and seconds > 0
    grpo.main(["gap", "--model", str(tmp_path), "--prompts", "1"])
    exact, rough = map(float, re.findall(r"drawn - scored: mean \S+, mean absolute (\S+),", capsys.readouterr().out))
    assert 0 <= exact < 1e-5 and 0 <= rough < 0.1


# language_models.py


@pytest.mark.faults
def test_what_reading_the_beginning_once_saves(capsys, monkeypatch):
    monkeypatch.setattr(language_models, "load_tokenizer", lambda name, texts: train_tokenizer(["letters"]))
    language_models.main(["--model", "tiny", "--turns", "1"])
    out = capsys.readouterr().out
    times = re.search(r"read once (\S+) s, before every text (\S+) s, ratio (\S+)", out).groups()
    tokens = re.search(r"has (\d+) tokens; a pass reads (\d+) without it, and (\d+) with", out).groups()
    beginning, without, with_it = map(int, tokens)
    assert min(map(float, times)) > 0 and 1 < beginning == with_it - without + 1


@pytest.mark.faults
def test_levels_to_compare_with(capsys):
    language_models.main(["--levels", "2"])
    scores = json.loads(capsys.readouterr().out)
    rule, random_play = scores["following the ball"], scores["random play"]
    assert rule["games"] == 2 and rule["min"] > random_play["max"]


def test_the_pages_name_constants_and_margins_that_there_are():
    """The pages name options that measure the ablations again, and the errors that a GPU may have."""
    docs = ROOT / "docs"
    page = (docs / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(--[a-z_]+ [^`|]+)` \| \d \|", page, re.M)
    assert len(rows) == 5
    for row in rows:
        read_grid(row.split(), find_training("train_ppo"))
    page = (docs / "gpu.md").read_text(encoding="utf-8")
    for margin in (VALUES_MARGIN, GRADIENT_MARGIN):
        assert f"{margin} times the error of float32" in page
    for margin in (BF16_MARGIN, BF16_MARGIN**2):
        assert f"{margin} times the error of bf16" in page


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_short_soak(capsys):
    small = "--num_envs 4 --rollout_steps 8 --batch_size 16 --n_head 4 --n_embd 16 --device cpu --eval_interval 0"
    assert soak.main(["--minutes", "0.4", *small.split()]) in (0, 1)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["memory", "open files", "speed"]
