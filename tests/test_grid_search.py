import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from algorithms import actor_critic, grid_search
from algorithms.grid_search import TRAININGS, combinations, directory_of, heat_map, main, training
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError

SMALL = "--num_steps 60 --episodes 2 --hidden 4 8 --eval_interval 1"


def in_turn(run):
    """Stands in for `run_side_by_side`, without threads and processes."""
    return lambda tasks, at_once: [task(run) for task in tasks]


@pytest.fixture
def in_this_process(monkeypatch, without_processes):
    """-> the command lines of the runs."""
    commands = []

    def run(command, cwd, stdout, stderr, env):
        commands.append(list(map(str, command[3:])))
        importlib.import_module("algorithms.parts.common").run_algorithm(
            importlib.import_module(command[2]).ALGORITHM, commands[-1]
        )

    monkeypatch.setattr(grid_search, "run_side_by_side", in_turn(run))
    return commands


def test_every_combination():
    assert combinations({"A": [1, 2], "B": ["x"]}) == [{"A": 1, "B": "x"}, {"A": 2, "B": "x"}]


def test_a_search_ranks_its_runs_and_goes_on_where_it_was(tmp_path, in_this_process, monkeypatch, capsys):
    words = [
        "reinforce_cartpole",
        *SMALL.split(),
        "--lr",
        "0.01",
        "0.02",
        "--out",
        str(tmp_path),
        "--map",
        "lr",
        "hidden",
        "--fresh",
        "2",
    ]
    assert main(words) == 0 and len(in_this_process) == 4
    with open(tmp_path / "grid.csv") as file:
        rows = list(csv.DictReader(file))
    best = [float(row["best"]) for row in rows]
    assert best == sorted(best, reverse=True) and {(row["LR"], row["HIDDEN"]) for row in rows} == {
        (lr, hidden) for lr in ("0.01", "0.02") for hidden in "48"
    }
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 200
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and table[0].endswith(
        "| LR | best | last | steps | minutes | fresh | fresh error | fresh min |"
    )
    with (
        monkeypatch.context() as patch,
        pytest.raises(CommandLineError, match="grid.png: not drawn .import of matplotlib.figure halted"),
    ):
        patch.setitem(sys.modules, "matplotlib.figure", None)
        main(words)
    assert table == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    lost = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert training("reinforce_cartpole").finished(lost)
    in_this_process.clear()
    (lost / "metrics.csv").unlink()
    with pytest.raises(CommandLineError, match="has lost its metrics.csv; delete the directory to train it again"):
        main(words)


def test_cells_that_hold_no_number_are_left_out(tmp_path):
    """Of a metrics.csv that a spreadsheet has saved."""
    text = 'update;global_step;seconds;eval_score\n1;10;30;2,5\n2;20;60;n/a\n3;30;90;"1.000,5"\n4;40,0;120;1,5\n5;50;150;\n'
    (tmp_path / "metrics.csv").write_bytes(text.encode("utf-8-sig"))
    assert training("reinforce_cartpole").result(tmp_path) == {"best": 2.5, "last": 1.5, "steps": 50, "minutes": 2.5}


def test_a_search_deletes_nothing(tmp_path, in_this_process):
    """A run that has lost its last checkpoint keeps all the rest; one that was killed before its first begins again."""
    words = ["reinforce_cartpole", *"--num_steps 30 --episodes 2 --hidden 4 --seed 0".split(), "--out", str(tmp_path)]
    killed = directory_of(tmp_path, {"NUM_STEPS": 30, "EPISODES": 2, "HIDDEN": 4, "SEED": 0})
    killed.mkdir()
    (killed / "run.lock").touch()
    assert main(words) == 0
    (killed / "last.pt").unlink()
    (killed / "notes.txt").write_text("mine")
    left = {file: file.read_bytes() for file in killed.iterdir()}
    with pytest.raises(
        CommandLineError,
        match="seed=0 is in use already, and has no last.pt to go on from; move it away, or name another --out",
    ):
        main(words)
    assert left == {file: file.read_bytes() for file in killed.iterdir()} and len(in_this_process) == 1


@pytest.mark.parametrize("name", ["reinforce_cartpole", "actor_critic"])
@pytest.mark.parametrize("damaged", ["[1]", '"GAMMA"', "{", "7"])
def test_the_constants_of_a_run_that_cannot_be_read(tmp_path, name, damaged):
    (tmp_path / "seed=0").mkdir()
    (tmp_path / "seed=0" / "config.json").write_text(damaged)
    with pytest.raises(
        CommandLineError, match="config.json: is damaged; move its directory away, or name another --out"
    ):
        main([name, "--seed", "0", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "words, message",
    [
        ("reinforce_cartpole", "name at least one constant"),
        ("reinforce_cartpole --lrr 1", "--lrr: is no constant to search"),
        ("reinforce_cartpole 3", "'3' stands before any constant"),
        ("reinforce_cartpole --lr", "--lr needs at least one value"),
        ("reinforce_cartpole --lr fast", "--lr needs a number, not 'fast'"),
        ("reinforce_cartpole --lr 7", "LR .* must be a number from 1e-09 to 1"),
        ("reinforce_cartpole --run_dir a b", "--run_dir: is no constant to search"),
        ("nothing --lr 1", "invalid choice: 'nothing'"),
        ("reinforce_cartpole --lr 0.1 --map lr seed", "--map seed: is not searched; the grid has lr"),
        ("train_ppo --batch_size 7", "BATCH_SIZE must divide"),
        ("reinforce_cartpole --eval_interval 0", "without evaluations there is nothing to compare"),
        ("reinforce_cartpole --seed 0 --fresh 0", "--fresh must be 1 or more"),
        ("train_ppo --seed 0 --fresh 9", "--fresh: train_ppo cannot be scored in fresh games"),
        ("actor_critic --output_dim 11", "OUTPUT_DIM must not exceed INPUT_DIM"),
    ],
)
def test_bad_input(tmp_path, words, message):
    with pytest.raises(CommandLineError, match=message) as error:
        main([*words.split(), "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_can_be_searched(name):
    what = training(name)
    assert (
        "SEED" in what.constants
        and set(what.ranges) <= set(what.constants)
        and what.program[-1].endswith((f"{name}.py", f"algorithms.{name}"))
    )


def test_a_search_begun_with_other_constants_is_not_mixed(tmp_path, in_this_process):
    assert (
        main(
            [
                "reinforce_cartpole",
                *"--num_steps 30 --episodes 2 --hidden 4 --seed 0 --gamma 0.9".split(),
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    (run_dir,) = (path for path in tmp_path.iterdir() if path.is_dir())
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config.replace('"DEVICE": "auto"', '"DEVICE": "cpu"'))  # a GPU has failed
    assert (
        main(
            [
                "reinforce_cartpole",
                *"--num_steps 30 --episodes 2 --hidden 4 --seed 0 --gamma 0.9".split(),
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    (run_dir / "config.json").write_text(config.replace('"GAMMA": 0.9', '"GAMMA": 0.5'))
    with pytest.raises(CommandLineError, match="was begun with other constants"):
        main(
            [
                "reinforce_cartpole",
                *"--num_steps 30 --episodes 2 --hidden 4 --seed 0 --gamma 0.9".split(),
                "--out",
                str(tmp_path),
            ]
        )


def test_runs_with_contents_of_another_kind_are_named(tmp_path, in_this_process):
    """A checksum does not say who wrote a checkpoint."""
    words = [
        "reinforce_cartpole",
        *"--num_steps 30 --episodes 2 --hidden 4 --eval_interval 1 --seed 0 --fresh 1".split(),
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    (run_dir,) = (path for path in tmp_path.iterdir() if path.is_dir())
    what, last, best = (
        training("reinforce_cartpole"),
        load_checkpoint(run_dir),
        load_checkpoint(run_dir / "best_model.pt"),
    )
    for spoiled in ({"constants": None}, {"constants": {"NUM_STEPS": "x"}}, {"evaluations": 5}, {"global_step": 0.5}):
        save_checkpoint(run_dir / "last.pt", last | spoiled)
        assert not what.finished(run_dir)
    save_checkpoint(run_dir / "last.pt", last)
    for spoiled in ({"constants": 5}, {"model": {}}, {"algorithm": "another"}, {"constants": {"HIDDEN": "x"}}):
        save_checkpoint(run_dir / "best_model.pt", best | spoiled)
        with pytest.raises(CheckpointError, match="best_model.pt"):
            main(words)
    for text in ("[]", "5", "null", "{"):
        (run_dir / "config.json").write_text(text)
        with pytest.raises(CommandLineError, match="config.json: is damaged"):
            main(words)


def test_the_training_with_a_config_file(tmp_path, monkeypatch, in_this_process):
    monkeypatch.setattr(actor_critic, "STEPS_PER_EPOCH", 2)
    monkeypatch.setattr(
        grid_search,
        "run_side_by_side",
        in_turn(lambda command, **kwargs: actor_critic.main(list(map(str, command[3:])))),
    )
    words = "actor_critic --num_epochs 1 --hidden_dim 4 --seed 1 2 --out".split() + [str(tmp_path)]
    assert main(words) == 0
    assert main(words) == 0
    with open(tmp_path / "grid.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["SEED"] for row in rows} == {"1", "2"} and all(-1 < float(row["best"]) < 1 for row in rows)
    (first,) = tmp_path.glob("*seed=1/checkpoints_*")
    shutil.copytree(first, first.with_name(f"{first.name}-2"))  # somebody keeps a copy
    assert main(words) == 0
    save_checkpoint(first.with_name(f"{first.name}-2") / "final.pt", {"epoch": "x"})
    with pytest.raises(CheckpointError, match="is no model of actor_critic"):
        main(words)
    (first.parent / "config.json").write_text('{"seed": 3}')
    with pytest.raises(CommandLineError, match="seed=1 was begun with other constants; name another --out"):
        main(words)


def test_on_the_command_line():
    command = [sys.executable, "-m", "algorithms.grid_search", "reinforce_cartpole", "--lr"]
    environment = {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }  # as notebooks set it, here without that package
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "-m algorithms.grid_search: --lr needs at least one value\n",
    )


def test_a_heat_map_is_in_order():
    """Rows come the best first; axes ascend, to the right and upwards."""
    rows = [
        {"LR": lr, "SEED": seed, "best": 100 * lr + seed}
        for lr, seed in ((0.01, 1), (0.001, 2), (0.1, 1), (0.001, 1), (0.1, 2), (0.01, 2))
    ]
    axes = heat_map(rows, "LR", "SEED").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"] and axes.get_ylim()[
        0
    ] < axes.get_ylim()[1]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1.1, 2, 11], [2.1, 3, 12]])
