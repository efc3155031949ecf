import contextlib
import csv
import importlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import sweep
import train_ppo
from algorithms.parts.training import run_algorithm
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from sweep import TRAININGS, combinations, directory_of, find_training, main

ROOT = Path(__file__).parent.parent
ONE = "reinforce_cartpole --num_steps 30 --episodes 2 --hidden 4 --seed 0".split()


class Process:
    """Stands in for the process of a training: it has ended with this status."""

    def __init__(self, status=0):
        self.status = status

    def poll(self):
        return self.status

    def terminate(self):
        pass

    def send_signal(self, signum):  # on Windows
        self.terminate()

    def wait(self):
        return self.status


@pytest.fixture
def in_this_process(monkeypatch, without_processes):
    """Trainings run in this process, at once. Gives the command lines of those that ran."""
    commands = []

    def start(command, env, cwd, stdout, stderr):
        commands.append(list(map(str, command[3:])))
        assert env["OMP_NUM_THREADS"] == "1"
        return Process(run_algorithm(importlib.import_module(command[2]).ALGORITHM, commands[-1]))

    monkeypatch.setattr(sweep, "start_program", start)
    monkeypatch.setattr(sweep, "POLL_INTERVAL", 0.0)
    return commands


def leave_run(run_dir, scores, done=True):
    """Write as much of a run as a sweep reads, if `is_finished` is replaced by `is_done`."""
    run_dir.mkdir(exist_ok=True)
    rows = [f"{i},{10 * i},{60 * i},{score}\n" for i, score in enumerate(scores, start=1)]
    (run_dir / "metrics.csv").write_text("update,global_step,seconds,eval_score\n" + "".join(rows))
    if done:
        (run_dir / "done").touch()


def is_done(run_dir):
    return (run_dir / "done").exists()


def run_dir_of(command):
    return Path(command[command.index("--run_dir") + 1])


@pytest.fixture
def made_up(monkeypatch):
    """Trainings end at once, with a score of 100 * LR. Gives the names of the runs, in the order of their start."""
    started = []

    def start(command, env, **streams):
        run_dir = run_dir_of(command)
        started.append(run_dir.name)
        leave_run(run_dir, [100 * float(command[command.index("--lr") + 1])])
        return Process()

    monkeypatch.setattr(sweep, "is_finished", is_done)
    monkeypatch.setattr(sweep, "check_begun", lambda run_dir, constants: None)
    monkeypatch.setattr(sweep, "start_program", start)
    monkeypatch.setattr(sweep, "POLL_INTERVAL", 0.0)
    return started


def table_of(path):
    with open(path / "sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_combination():
    assert combinations({"A": [1, 2], "B": ["x"]}) == [{"A": 1, "B": "x"}, {"A": 2, "B": "x"}]


# --- small trainings --------------------------------------------------------------------------------------------------


def test_a_sweep_ranks_its_runs_and_goes_on_where_it_was(tmp_path, in_this_process, monkeypatch, capsys):
    """Every combination is trained once. A second start trains nothing, and prints the same table again."""
    words = [*ONE, "--lr", "0.01", "0.02", "--out", str(tmp_path), "--map", "lr", "hidden", "--fresh", "2"]
    assert main(words) == 0 and len(in_this_process) == 2
    rows = table_of(tmp_path)
    best = [float(row["best"]) for row in rows]
    assert best == sorted(best, reverse=True) and {row["LR"] for row in rows} == {"0.01", "0.02"}
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width > 200
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert table[0].endswith("| LR | best | last | steps | minutes | fresh | fresh error | fresh min |")
    halted = pytest.raises(CommandLineError, match="sweep.png: not drawn .import of matplotlib.figure halted")
    with monkeypatch.context() as patch, halted:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        main(words)
    assert table == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(in_this_process) == 2


def test_runs_that_have_finished_are_found_without_a_journal(tmp_path, in_this_process, capsys):
    """The journal may be deleted, as after damage, and a sweep with more values takes what there is."""
    words = [*ONE, "--out", str(tmp_path)]
    assert main(words) == 0
    for text in ("{", "{}\n{}\n"):
        (tmp_path / "sweep.journal").write_text(text)
        with pytest.raises(CommandLineError, match="sweep.journal: is damaged; delete it"):
            main(words)
    (tmp_path / "sweep.journal").unlink()
    assert main(words) == 0 and len(in_this_process) == 1
    assert main([*words, "--gamma", "0.99"]) == 0 and len(in_this_process) == 2
    wider = [*ONE, "1", "--out", str(tmp_path)]
    assert main(wider) == 0 and len(in_this_process) == 3
    capsys.readouterr()
    (tmp_path / "sweep.journal").unlink()
    lost = directory_of(tmp_path, {"NUM_STEPS": 30, "EPISODES": 2, "HIDDEN": 4, "SEED": 1})
    (lost / "metrics.csv").unlink()
    with pytest.raises(CommandLineError, match="1 runs did not finish"):
        main(wider)
    assert "; 0 of 2 runs left" in (output := capsys.readouterr().out) and "seed=1 has no result; see " in output


def test_cells_that_hold_no_number_are_left_out(tmp_path, made_up):
    """A spreadsheet may have saved the metrics.csv."""
    text = "update;global_step;seconds;eval_score\n1;10;30;2,5\n2;20;60;n/a\n"
    text += '3;30;90;"1.000,5"\n4;40,0;120;1,5\n5;50;150;\n'
    run_dir = tmp_path / "seed=0"
    leave_run(run_dir, [])
    (run_dir / "metrics.csv").write_bytes(text.encode("utf-8-sig"))
    assert main(["reinforce_cartpole", "--seed", "0", "--out", str(tmp_path)]) == 0
    assert table_of(tmp_path) == [{"SEED": "0", "best": "2.5", "last": "1.5", "steps": "50", "minutes": "2.5"}]


def test_a_sweep_deletes_nothing(tmp_path, in_this_process):
    """A run that has lost its last checkpoint keeps all the rest; one that was killed before its first begins again."""
    words = [*ONE, "--out", str(tmp_path)]
    killed = directory_of(tmp_path, {"NUM_STEPS": 30, "EPISODES": 2, "HIDDEN": 4, "SEED": 0})
    killed.mkdir()
    (killed / "run.lock").touch()
    assert main(words) == 0
    (killed / "last.safetensors").unlink()
    (killed / "notes.txt").write_text("mine")
    left = {file: file.read_bytes() for file in killed.iterdir()}
    message = "seed=0 is in use already, and has no last.safetensors to go on from; move it away, or name another --out"
    with pytest.raises(CommandLineError, match=message):
        main(words)
    assert left == {file: file.read_bytes() for file in killed.iterdir()} and len(in_this_process) == 1


def test_a_run_that_was_stopped_is_resumed(tmp_path, in_this_process, capsys):
    """Its training had saved, and its trial is still RUNNING in the journal."""
    words = [*ONE, "--out", str(tmp_path)]
    run_dir = directory_of(tmp_path, {"NUM_STEPS": 30, "EPISODES": 2, "HIDDEN": 4, "SEED": 0})
    assert main(words) == 0
    state = load_checkpoint(run_dir)
    save_checkpoint(run_dir / "last.safetensors", state | {"global_step": 10})
    text = (tmp_path / "sweep.journal").read_text().splitlines(keepends=True)
    ended = [line for line in text if '"state":1' in line]
    (tmp_path / "sweep.journal").write_text("".join(line for line in text if line not in ended))
    capsys.readouterr()
    assert main(words) == 0 and in_this_process[1:] == [["--resume", str(run_dir)]]
    assert len(ended) == 1 and "seed=0 goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, values, named",
    [
        ("grpo_text", {"REWARD_MODEL": "my_reward:length", "SEED": 1}, ["--reward_model", "my_reward:length"]),
        ("grpo_text", {"REWARD_MODEL": "brief", "SEED": 1}, []),
        ("dqn_space_invaders", {"ENV_ID": "my_game:Invaders-v0"}, ["--env_id", "my_game:Invaders-v0"]),
        ("train_ppo", {"SEED": 1, "GAME": "my_game:Catch-v0"}, ["--game", "my_game:Catch-v0"]),
    ],
)
def test_a_run_that_is_resumed_names_a_module_of_the_user_again(name, values, named, tmp_path):
    (tmp_path / "last.safetensors").touch()
    command = sweep.command_of(find_training(name), tmp_path, values)
    assert command[-2 - len(named) :] == ["--resume", tmp_path, *named]


def test_a_run_that_stops_early_because_it_is_solved_has_a_result(tmp_path, in_this_process, capsys):
    words = "reinforce_cartpole --num_steps 200 --episodes 120 --hidden 4 --stop_at 1 --seed 0".split()
    assert main([*words, "--out", str(tmp_path)]) == 0 and len(in_this_process) == 1
    assert "has finished" in capsys.readouterr().out and len(table_of(tmp_path)) == 1


def test_paths_are_those_that_runs_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "p.txt").write_text("Why?\n")
    _, _, grid = sweep.read_command_line("grpo_text --prompts_file ./p.txt --policy_model smollm2 ./smollm2".split())
    assert grid == {"PROMPTS_FILE": [str(tmp_path / "p.txt")], "POLICY_MODEL": ["smollm2", str(tmp_path / "smollm2")]}


@pytest.mark.parametrize("damaged", ["[1]", '"GAMMA"', "{", "7"])
def test_the_constants_of_a_run_that_cannot_be_read(tmp_path, damaged):
    (tmp_path / "seed=0").mkdir()
    (tmp_path / "seed=0" / "config.json").write_text(damaged)
    message = "config.json: is damaged; move its directory away, or name another --out"
    with pytest.raises(CommandLineError, match=message):
        main(["reinforce_cartpole", "--seed", "0", "--out", str(tmp_path)])


def test_a_sweep_of_a_game_that_lacks_something_can_be_started_again(tmp_path, monkeypatch):
    """Catch has no varied starts, so its runs record that these are off."""
    words = "train_ppo --game games.catch:Catch-v0 --seed 0".split()
    constants = train_ppo.CONSTANTS | {"GAME": "games.catch:Catch-v0", "SEED": 0}
    run_dir = directory_of(tmp_path, {"GAME": "games.catch:Catch-v0", "SEED": 0})
    run_dir.mkdir()
    applied, _ = train_ppo.applicable(SimpleNamespace(**constants))
    assert applied.VARIED_STARTS == 0 != constants["VARIED_STARTS"]
    _, training, grid = sweep.read_command_line(words)
    for recorded, message in (vars(applied), None), (vars(applied) | {"LR": 0.5}, "begun with other constants"):
        (run_dir / "config.json").write_text(json.dumps(recorded))
        with pytest.raises(CommandLineError, match=message) if message else contextlib.nullcontext():
            sweep.check_runs(training, tmp_path, grid)


def test_a_sweep_begun_with_other_constants_is_not_mixed(tmp_path, in_this_process):
    words = [*ONE, "--gamma", "0.9", "--out", str(tmp_path)]
    assert main(words) == 0
    (run_dir,) = (path for path in tmp_path.iterdir() if path.is_dir())
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config.replace('"DEVICE": "auto"', '"DEVICE": "cpu"'))  # a GPU has failed
    assert main(words) == 0
    (run_dir / "config.json").write_text(config.replace('"GAMMA": 0.9', '"GAMMA": 0.5'))
    with pytest.raises(CommandLineError, match="was begun with other constants"):
        main(words)


def test_runs_of_another_board_do_not_count_as_finished(tmp_path):
    """Somebody has edited the game since an earlier sweep of train_ppo.py with the same constants."""
    training = sweep.find_training("train_ppo")
    (tmp_path / "seed=0").mkdir()
    sweep.check_runs(training, tmp_path, {"SEED": [0]})
    save_checkpoint(tmp_path / "seed=0" / "last.safetensors", {"board": {"LIVES": 3}})
    with pytest.raises(CommandLineError, match=r"seed=0 was begun with LIVES 3 \(here 5\)"):
        sweep.check_runs(training, tmp_path, {"SEED": [0]})


def test_runs_with_contents_of_another_kind_are_named(tmp_path, in_this_process):
    """A checksum does not say who wrote a checkpoint."""
    words = [*ONE, "--eval_interval", "1", "--fresh", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    (run_dir,) = (path for path in tmp_path.iterdir() if path.is_dir())
    last, best = load_checkpoint(run_dir), load_checkpoint(run_dir / "best_model.safetensors")
    for spoiled in ({"constants": None}, {"constants": {"NUM_STEPS": "x"}}, {"evaluations": 5}, {"global_step": 0.5}):
        save_checkpoint(run_dir / "last.safetensors", last | spoiled)
        assert not sweep.is_finished(run_dir)
    save_checkpoint(run_dir / "last.safetensors", last)
    for spoiled in ({"constants": 5}, {"algorithm": "another"}, {"constants": {"HIDDEN": "x"}}):
        save_checkpoint(run_dir / "best_model.safetensors", best | spoiled)
        with pytest.raises(CheckpointError, match="best_model.safetensors"):
            main(words)
    for text in ("[]", "5", "null", "{"):
        (run_dir / "config.json").write_text(text)
        with pytest.raises(CommandLineError, match="config.json: is damaged"):
            main(words)


# --- trainings that are made up ---------------------------------------------------------------------------------------


def test_a_run_that_fails_is_tried_once(tmp_path, made_up, monkeypatch, capsys):
    """The others go on, their table is printed, and the next start tries it again."""
    start, failing = sweep.start_program, True

    def start_or_fail(command, env, **streams):
        if failing and "0.2" in command:
            made_up.append("fails")
            return Process(status=1)
        return start(list(map(str, command)), env, **streams)

    monkeypatch.setattr(sweep, "start_program", start_or_fail)
    words = "reinforce_cartpole --min_lr 0 --lr 0.2 0.3 --seed 0".split() + ["--out", str(tmp_path)]
    monkeypatch.setattr(sweep, "command_of", lambda training, d, values: ["--run_dir", d, "--lr", str(values["LR"])])
    with pytest.raises(CommandLineError, match="1 runs did not finish, see .*lr=0.2,seed=0.log; start again to go on"):
        main(words)
    assert made_up.count("fails") == 1 and [row["LR"] for row in table_of(tmp_path)] == ["0.3"]
    assert "lr=0.2,seed=0 has no result; see " in capsys.readouterr().out
    failing = False
    assert main(words) == 0 and [row["LR"] for row in table_of(tmp_path)] == ["0.3", "0.2"]


def test_two_processes_share_a_sweep(tmp_path, made_up, monkeypatch):
    """Each run is trained by one of them, and both print the whole table. Threads stand in for the processes: each has
    its own connection to the journal and its own files, so the locks hold between them too."""
    monkeypatch.setattr(sweep, "available_cores", lambda: 1)
    meeting = threading.Barrier(2, timeout=60)
    start = sweep.start_program

    def start_together(command, env, **streams):
        if len(made_up) < 2:
            meeting.wait()
        return start(command, env, **streams)

    monkeypatch.setattr(sweep, "start_program", start_together)
    training, grid = find_training("reinforce_cartpole"), {"LR": [0.1, 0.2, 0.3], "SEED": [0, 1]}
    sweeps = [sweep.Sweep(training, tmp_path, grid, None) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(one.run, prune=False) for one in sweeps]:
            future.result(60)
    assert sorted(made_up) == sorted(directory_of(tmp_path, values).name for values in combinations(grid))
    assert sweeps[0].rows() == sweeps[1].rows() and len(sweeps[0].rows()) == 6


def test_what_another_process_has_left_is_taken_up(tmp_path, made_up):
    """Not while the other still runs it, which the lock tells."""
    training, grid = find_training("reinforce_cartpole"), {"LR": [0.1]}
    stopped = sweep.Sweep(training, tmp_path, grid, None)
    run = stopped.take()
    other = sweep.Sweep(training, tmp_path, grid, None)
    assert other.take() is None and len(other.others()) == 1
    run.lock.release()
    other.run(prune=False)
    assert made_up == ["lr=0.1"] and other.rows()[0]["best"] == 10


def test_a_search_draws_from_ranges(tmp_path, made_up):
    """Between two numbers, on a logarithmic scale if one is ten times the other. More trials go on where it was."""
    words = "reinforce_cartpole --min_lr 0 --lr 0.001 0.1 --hidden 4 8 16 --episodes 4 8 --gamma 0.5 0.6".split()
    words += ["--out", str(tmp_path), "--search"]
    assert main([*words, "3"]) == 0 and len(made_up) == 3
    before = table_of(tmp_path)
    assert main([*words, "12"]) == 0 and len(made_up) == 12
    rows = table_of(tmp_path)
    assert all(row in rows for row in before) and len({row["LR"] for row in rows}) == 12
    assert all(0.001 <= float(row["LR"]) <= 0.1 and 0.5 <= float(row["GAMMA"]) <= 0.6 for row in rows)
    assert all(row["HIDDEN"] in ("4", "8", "16") and 4 <= int(row["EPISODES"]) <= 8 for row in rows)
    assert rows[0]["best"] == str(max(100 * float(row["LR"]) for row in rows))
    studies = [json.loads(line) for line in (tmp_path / "sweep.journal").read_text().splitlines()]
    kinds = {line["param_name"]: json.loads(line["distribution"]) for line in studies if "distribution" in line}
    assert kinds["LR"]["attributes"]["log"] and not kinds["GAMMA"]["attributes"]["log"]
    assert kinds["EPISODES"]["name"] == "IntDistribution" and kinds["HIDDEN"]["name"] == "CategoricalDistribution"


def test_a_search_leaves_out_what_does_not_fit_together(tmp_path, made_up, capsys):
    """The lowest learning rate may be above the highest end of its fall; such a trial is not tried again."""
    words = "reinforce_cartpole --lr 0.01 0.02 0.03 --min_lr 0.001 0.015 0.025 --out".split()
    assert main([*words, str(tmp_path), "--search", "12"]) == 0
    left_out = capsys.readouterr().out.count("is left out: MIN_LR 0.0")
    assert made_up and left_out > 0 and len(table_of(tmp_path)) == 12 - left_out
    assert main([*words, str(tmp_path), "--search", "12"]) == 0 and "left out" not in capsys.readouterr().out


def test_runs_without_hope_are_pruned(tmp_path, made_up, monkeypatch, capsys):
    """Five runs end well. The sixth lies below their median and is stopped. It is in the table, and not tried again."""

    class Running(Process):
        status = None

        def __init__(self, run_dir):
            self.run_dir = run_dir

        def terminate(self):
            self.status = 143

    def start(command, env, **streams):
        run_dir = run_dir_of(command)
        made_up.append(run_dir.name)
        good = float(command[command.index("--lr") + 1]) < 0.6
        leave_run(run_dir, [1, 2, 3, 4, 5, 6] if good else [1, 1, 1, 1, 1, 1], done=good)
        return Process() if good else Running(run_dir)

    monkeypatch.setattr(sweep, "start_program", start)
    monkeypatch.setattr(sweep, "available_cores", lambda: 1)
    monkeypatch.setattr(sweep, "STATE_INTERVAL", -1.0)
    words = "reinforce_cartpole --min_lr 0 --lr 0.1 0.2 0.3 0.4 0.5 0.6 --prune".split() + ["--out", str(tmp_path)]
    for _ in range(2):
        assert main(words) == 0
        assert len(made_up) == 6 and [row["best"] for row in table_of(tmp_path)] == 5 * ["6"] + ["1"]
    output = capsys.readouterr().out
    assert "5 ended, 1 running here, 0 elsewhere, 0 to begin" in output
    assert "    min_lr=0.0,lr=0.6: 60 steps in 6.0 minutes, score 1\n" in output
    assert (
        "min_lr=0.0,lr=0.6 was stopped early, after 60 steps: best 1, last 1, 6 minutes; 0 of 6 runs left\n" in output
    )
    assert "has finished: best 6, last 6, 6 minutes; 5 of 6 runs left\n" in output


@pytest.mark.parametrize("error, message", [(KeyboardInterrupt, "stopped; start again to go on"), (OSError, None)])
def test_a_stop_stops_the_runs(tmp_path, made_up, monkeypatch, error, message):
    """They are given the time to save, and the next start goes on."""
    events = []

    class Running(Process):
        def poll(self):
            raise error

        def terminate(self):
            events.append("stop")

        def wait(self):
            events.append("saved")

    words = ["reinforce_cartpole", "--min_lr", "0", "--lr", "0.1", "0.2", "0.3", "--out", str(tmp_path)]
    raised = CommandLineError if error is KeyboardInterrupt else error
    monkeypatch.setattr(sweep, "available_cores", lambda: 2)
    with monkeypatch.context() as patch, pytest.raises(raised, match=message):
        patch.setattr(sweep, "start_program", lambda *_, **__: Running())
        main(words)
    assert events == ["stop", "stop", "saved", "saved"] and not made_up
    assert main(words) == 0 and len(made_up) == 3


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    # fmt: off
    [
        ("reinforce_cartpole", "name at least one constant"),
        ("reinforce_cartpole --lrr 1", "unknown argument --lrr; did you mean --lr"),
        ("reinforce_cartpole 3", "unknown argument 3"),
        ("reinforce_cartpole --lr", "--lr: expected at least one argument"),
        ("reinforce_cartpole --lr fast", "--lr needs a number, not 'fast'"),
        ("reinforce_cartpole --lr 7", r"LR .* must be a number in \(0.0, 1.0\]"),
        ("reinforce_cartpole --run_dir a b", "unknown argument --run_dir"),
        ("nothing --lr 1", "invalid choice: 'nothing'"),
        ("reinforce_cartpole --lr 0.1 --map lr seed", "--map takes two of the constants of the grid: lr"),
        ("train_ppo --batch_size 7", "BATCH_SIZE 7 must divide .* 4 and 8$"),
        ("reinforce_cartpole --eval_interval 0", "without evaluations there is nothing to compare"),
        ("reinforce_cartpole --seed 0 --fresh 0", "--fresh: must be an integer in"),
        ("train_ppo --seed 0 --fresh 9", "--fresh: train_ppo cannot be scored in fresh games"),
        ("reinforce_cartpole --lr 0.1 0.2 --search 0", "--search: must be an integer in"),
        ("reinforce_cartpole --lr 0.1 --search 9", "--search needs a constant with two values or more"),
        ("reinforce_cartpole --lr 0.1 0.2 --search 9 --map lr lr", "no --map, which draws a grid"),
    ],
    # fmt: on
)
def test_bad_input(tmp_path, words, message):
    with pytest.raises(CommandLineError, match=message) as error:
        main([*words.split(), "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_without_optuna_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(CommandLineError, match=r"^needs optuna: pip install -r .*algorithms.requirements.txt$"):
        main(["reinforce_cartpole", "--seed", "0"])


def test_a_bare_sweep_of_the_language_model(monkeypatch):
    """It searches learning rates and KL targets."""
    _, _, grid = sweep.read_command_line(["ppo_llm_breakout"])
    assert grid == {"LR": [2e-4, 5e-4, 1e-3], "KL_TARGET": [0.2, 0.8], "NUM_STEPS": [40960]}


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_can_be_searched(name):
    training = find_training(name)
    assert "SEED" in training.constants
    assert training.program[-1].endswith((f"{name}.py", f"algorithms.{name}"))


def test_on_the_command_line():
    """Also with a matplotlib backend that is not there, as notebooks leave it in the environment."""
    command = [sys.executable, "sweep.py", "reinforce_cartpole", "--lr"]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    line = "sweep.py: argument --lr: expected at least one argument\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
