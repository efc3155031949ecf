import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo import PPO, StopTraining
from test_ppo import done
from train_ppo import CONSTANTS, CommandLineError, check, choose_device, main, read_command_line

ROOT = Path(__file__).parent.parent
SMALL = "--num_envs 4 --rollout_steps 8 --batch_size 16 --epochs 2 --n_head 4 --n_embd 16 --device cpu"
SMALL += f" --num_steps {6 * 32} --eval_interval 2 --save_freq 2"


@pytest.fixture(autouse=True)
def cheap_evaluation(monkeypatch):
    def evaluate(policy):
        score = 100 * sum(p.abs().sum().item() for p in policy.parameters()) % 960
        return {"score": score, "min": 0, "max": 960, "cleared": 0, "games": 32, "mean_length": 9.0, "returned": 0.5}

    monkeypatch.setattr(train_ppo, "evaluate", evaluate)
    monkeypatch.setattr(train_ppo, "Background", lambda function, device, processes: lambda policy: done(train_ppo.evaluate(policy)))


def run(tmp_path, name, *more):
    return main([*SMALL.split(), "--run_dir", str(tmp_path / name), *more])


def logged(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in csv.DictReader(file)]


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x and y != y


@pytest.mark.parametrize("signum, status, minibatch", [(signal.SIGINT, 130, 3 * 4 + 1), (signal.SIGTERM, 143, 3 * 4 + 3)])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path, monkeypatch, capsys, signum, status, minibatch):
    """Six updates; and three, a signal in the midst of the fourth, and three more."""
    assert run(tmp_path, "straight") == 0
    step, steps = PPO.gradient_step, []

    def interrupted(self, *args):
        steps.append(0)
        if len(steps) == minibatch:
            os.kill(os.getpid(), signum)
        return step(self, *args)

    with monkeypatch.context() as m:
        m.setattr(PPO, "gradient_step", interrupted)
        assert run(tmp_path, "stopped") == status
    assert len(steps) == minibatch  # the minibatch was finished, and no other begun
    assert f"go on with: python train_ppo.py --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "stopped")["update_count"] == 3
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    states = [load_checkpoint(tmp_path / name) for name in ("straight", "stopped")]
    for state in states:
        assert state.pop("seconds") > 0 and state["constants"].pop("RUN_DIR")
    assert states[0]["update_count"] == 6 and same(*states)
    assert len(logged(tmp_path / "straight")) == 6 and logged(tmp_path / "straight") == logged(tmp_path / "stopped")
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


def test_what_a_run_leaves(tmp_path):
    run(tmp_path, "run")
    names = {file.name for file in (tmp_path / "run").iterdir() if "tfevents" not in file.name}
    assert names == {"config.json", "metrics.csv", "learning_curve.png", "best_model.pt", "last.pt",
                     "checkpoint_2.pt", "checkpoint_4.pt", "checkpoint_6.pt"}  # fmt: skip
    constants = json.loads((tmp_path / "run" / "config.json").read_text())
    assert constants == {**CONSTANTS, **constants} and constants["NUM_ENVS"] == 4 and constants["GAMMA"] == CONSTANTS["GAMMA"]
    best = load_checkpoint(tmp_path / "run" / "best_model.pt")
    assert best["evaluation"]["score"] == max(float(row["eval_score"] or 0) for row in logged(tmp_path / "run"))
    assert "optimizer" not in best and best["constants"] == constants
    readme = (ROOT / "README.md").read_text()
    assert [column for column in logged(tmp_path / "run")[0] if f"`{column}`" not in readme] == []


def test_one_seed_one_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, name, "--seed", str(seed))
    assert logged(tmp_path / "a") == logged(tmp_path / "b") != logged(tmp_path / "c")


def test_a_finished_run_can_be_made_longer(tmp_path):
    run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", str(8 * 32), "--num_envs", "4"]) == 0
    assert [row["update"] for row in logged(tmp_path / "run")] == [str(i) for i in range(1, 9)]


def test_every_constant_reaches_what_it_is_for(tmp_path):
    """Another value for each: nothing is dropped on the way, nothing swapped."""
    other = {"NUM_STEPS": 11, "NUM_ENVS": 3, "ROLLOUT_STEPS": 5, "EPOCHS": 5, "BATCH_SIZE": 7, "GAMMA": 0.91, "LAMBD": 0.92, "LAMBD_END": 0.93, "LAMBD_STEPS": 12,
             "EPS_CLIP": 0.13, "VALUE_LOSS_COEF": 0.14, "VALUE_CLIP": 0.15, "ENTROPY_COEF": 0.016, "MOVE_COEF": 0.017, "TARGET_KL": 0.17,
             "REWARD_SCALE": 0.18, "LR": 0.019, "MIN_LR": 0.0019, "LR_SCHEDULE": "linear", "WARMUP": 0.21, "MAX_GRAD_NORM": 0.22,
             "VARIED_STARTS": 0.23, "PREDICTION_COEF": 0.24, "TWINS": 0, "N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 8, "MLP_EXPANSION": 3,
             "SEED": 4, "DEVICE": "cpu", "RUN_DIR": str(tmp_path), "EVAL_INTERVAL": 6, "SAVE_FREQ": 9, "BLOCK_SIZE": 1944}  # fmt: skip
    assert other.keys() == CONSTANTS.keys()
    assert [name for name in other if other[name] == CONSTANTS[name]] == ["BLOCK_SIZE"]
    ppo = train_ppo.build(SimpleNamespace(**other), tmp_path, torch.device("cpu"))
    found = {**vars(ppo.config), **vars(ppo.policy.config), "num_envs": ppo.env.num_envs, "varied_starts": ppo.env.varied_starts,
             "device": str(ppo.device), "run_dir": str(ppo.callbacks[-1].run_dir), "save_freq": ppo.callbacks[-1].save_freq}  # fmt: skip
    assert {name: found[name.lower()] for name in other} == other


def test_runs_that_start_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ppo.time, "strftime", lambda form: "runs/now")
    assert [str(train_ppo.new_run_dir("")) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]


def test_a_kill_before_the_first_checkpoint_leaves_something_to_resume(tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(PPO, "collect", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run")
    run(tmp_path, "straight")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")


def test_the_loop_for_a_gpu_leaves_the_same_files_and_either_loop_goes_on(tmp_path, monkeypatch):
    for constants, expected in (({}, True), ({"N_LAYER": 2}, False), ({"BATCH_SIZE": 500}, False)):
        assert train_ppo.lives_on_device(SimpleNamespace(**CONSTANTS | constants), torch.device("cuda")) == expected
    assert not train_ppo.lives_on_device(SimpleNamespace(**CONSTANTS), torch.device("cpu"))
    with monkeypatch.context() as m:
        m.setattr(train_ppo, "lives_on_device", lambda c, device: True)
        assert run(tmp_path, "run") == 0
        assert main(["--resume", str(tmp_path / "run"), "--num_steps", "224"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--num_steps", "256"]) == 0
    rows = logged(tmp_path / "run")
    assert [row["global_step"] for row in rows] == [str(32 * n) for n in range(1, 9)]
    assert [row["update"] for row in rows if row["eval_score"]] == ["2", "4", "6", "7", "8"]
    assert all(math.isfinite(float(rows[-2][name])) for name in rows[0] if not name.startswith(("eval_", "train_score")))
    assert load_checkpoint(tmp_path / "run")["update_count"] == 8 and (tmp_path / "run" / "best_model.pt").exists()


def test_a_stop_while_the_last_evaluation_is_waited_for_does_not_lose_it(tmp_path, monkeypatch, capsys):
    class Slow:
        asked = 0

        def done(self):
            self.asked += 1
            if self.asked == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return False

    with monkeypatch.context() as m:
        m.setattr(train_ppo, "Background", lambda function, device, processes: lambda policy: Slow())
        assert run(tmp_path, "run", "--eval_interval", "100", "--save_freq", "1") == 130
    assert load_checkpoint(tmp_path / "run")["update_count"] == 6 and not (tmp_path / "run" / "best_model.pt").exists()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    best = load_checkpoint(tmp_path / "run" / "best_model.pt")
    assert best["update_count"] == 6 and logged(tmp_path / "run")[5]["eval_score"] == str(best["evaluation"]["score"])
    with pytest.raises(CommandLineError, match="has done 192 steps already"):
        main(["--resume", str(tmp_path / "run")])


def test_an_evaluator_that_dies_at_once_loses_nothing(tmp_path, monkeypatch, capsys):
    """Neither at first nor in a resume, which begins with an evaluation."""

    def dead(policy):
        raise ChildProcessError("the process that evaluates has died")

    run(tmp_path, "run")
    for name in ("last.pt", "checkpoint_4.pt"):
        with monkeypatch.context() as m:
            m.setattr(train_ppo, "Background", lambda function, device, processes: dead)
            assert main(["--resume", str(tmp_path / "run" / name), "--num_steps", "400"]) == 1
        assert load_checkpoint(tmp_path / "run")["update_count"] == {"last.pt": 7, "checkpoint_4.pt": 4}[name]
        assert "has died; go on with" in capsys.readouterr().err


def test_resuming_an_older_checkpoint_keeps_a_better_model(tmp_path, monkeypatch):
    scores = iter([100.0, 900.0, 200.0])
    monkeypatch.setattr(train_ppo, "evaluate", lambda policy: {
        "score": next(scores, 300.0), "min": 0, "max": 960, "cleared": 0, "games": 32, "mean_length": 9.0, "returned": 0.5})  # fmt: skip
    run(tmp_path, "run")
    assert main(["--resume", str(tmp_path / "run" / "checkpoint_2.pt")]) == 0
    assert load_checkpoint(tmp_path / "run" / "best_model.pt")["evaluation"]["score"] == 900


def test_a_gradient_that_is_not_finite_loses_nothing(tmp_path, monkeypatch, capsys):
    update = PPO.update

    def spoiled(self):
        if self.update_count == 2:
            self.buffer.data.returns[:] = math.nan
        return update(self)

    monkeypatch.setattr(PPO, "update", spoiled)
    assert run(tmp_path, "run") == 1
    assert re.search("not finite in update 3.*--resume .*run --lr 0.001", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run")["update_count"] == 2


@pytest.mark.parametrize("error, message", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory; go on with: .*run --batch_size 8"),
    (MemoryError(), "out of memory; go on with: .*run --batch_size 8"),
    (ChildProcessError("the process that evaluates has died"), "has died; go on with: .*run$"),
    (StopTraining(), "stopped; go on with: .*run$"),  # a rank that got no signal itself
])  # fmt: skip
def test_a_run_that_cannot_go_on_is_saved(tmp_path, monkeypatch, capsys, error, message):
    def fail(self):
        raise error

    monkeypatch.setattr(PPO, "update", fail)
    assert run(tmp_path, "run") in (1, 143)
    assert re.search(message, capsys.readouterr().err.strip())
    assert load_checkpoint(tmp_path / "run")["update_count"] == 0


def test_a_model_too_large_for_the_memory(tmp_path, monkeypatch):
    def build(*arguments):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(train_ppo, "build", build)
    with pytest.raises(CommandLineError, match="does not fit into the memory of cpu; try a smaller --n_embd"):
        run(tmp_path, "run")


def test_overrides():
    assert read_command_line(["--seed", "7", "--lr=0.1", "--resume", "x"], CONSTANTS) == ("x", {"SEED": 7, "LR": 0.1})


@pytest.mark.parametrize("arguments, message", [
    ("--gama 0.9", "unknown argument --gama; did you mean --gamma?"),
    ("--num-steps 9", "unknown argument --num-steps; did you mean --num_steps?"),
    ("--num_steps many", "--num_steps needs an integer, not 'many'"),
    ("--num_steps 1.5", "--num_steps needs an integer"),
    ("--lr fast", "--lr needs a number, not 'fast'"),
    ("--lr nan", "LR (--lr) must be a number from"),
    ("--gamma 1.1", "GAMMA (--gamma) must be a number from 0 to 1, not 1.1"),
    ("--seed -1", "SEED (--seed) must be an integer from 0"),
    ("--num_envs 0", "NUM_ENVS"),
    ("--lr_schedule step", "linear or cosine, not 'step'"),
    ("--batch_size 99999", "BATCH_SIZE must not exceed"),
    ("--num_envs 33", "TWINS needs an even number of games; change NUM_ENVS"),
    ("--min_lr 0.5", "MIN_LR 0.5 must not exceed"),
    ("--n_head 7", "multiple of n_head"),
    ("--block_size 99", "block_size must be 1944"),
    ("--device tpu9", "--device tpu9 does not work here"),
    ("--seed", "expected one argument"),
])  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line_before_anything_starts(tmp_path, arguments, message):
    with pytest.raises(CommandLineError, match=re.escape(message)) as error:
        main([*arguments.split(), "--run_dir", str(tmp_path / "run")] if "--seed" != arguments else ["--seed"])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_edited_constants_are_checked_too():
    check(CONSTANTS)
    check(CONSTANTS | {"VARIED_STARTS": 1})  # an integer is a number
    for edit, message in (({"NUM_STEPS": 1e6}, "NUM_STEPS.*must be an integer.*not 1000000.0"), ({"TARGET_KL": None}, "must be a number"),
                          ({"N_LAYER": True}, "must be an integer"), ({"RUN_DIR": None}, "RUN_DIR.*must be text, not None")):  # fmt: skip
        with pytest.raises(CommandLineError, match=message):
            check(CONSTANTS | edit)


def test_a_run_directory_in_use_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run")
    with pytest.raises(CommandLineError, match="in use already"):
        run(tmp_path, "run/notes.txt")
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_what_cannot_be_resumed(tmp_path):
    run(tmp_path, "run")
    last = tmp_path / "run" / "last.pt"
    with pytest.raises(CheckpointError, match="best_model.pt: holds a model to play.*last.pt"):
        main(["--resume", str(tmp_path / "run" / "best_model.pt")])
    with pytest.raises(CommandLineError, match="--n_embd cannot change"):
        main(["--resume", str(last), "--n_embd", "32"])
    state = load_checkpoint(last)
    del state["model"]["wte.weight"]
    save_checkpoint(tmp_path / "run" / "spoiled.pt", state)
    with pytest.raises(CheckpointError, match="does not fit this program.*wte.weight"):
        main(["--resume", str(tmp_path / "run" / "spoiled.pt"), "--num_steps", "1000"])
    save_checkpoint(tmp_path / "elsewhere.pt", state)
    with pytest.raises(CheckpointError, match="elsewhere.pt: lies outside its run"):
        main(["--resume", str(tmp_path / "elsewhere.pt")])
    save_checkpoint(tmp_path / "run" / "older.pt", state | {"constants": {"GAMMA": 1}})
    with pytest.raises(CheckpointError, match="older.pt: has other constants"):
        main(["--resume", str(tmp_path / "run" / "older.pt")])
    with pytest.raises(CommandLineError, match="has done 192 steps already; to go on, give a larger --num_steps"):
        main(["--resume", str(last)])
    with pytest.raises(CheckpointError, match="there is no such file|has no last.pt"):
        main(["--resume", ""])
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="last.pt"):
        main(["--resume", str(tmp_path / "run")])


def test_auto_is_the_cpu_where_cuda_does_not_work(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image\nmore lines")

    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch, "ones", broken)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(CommandLineError, match=r"no kernel image\); try --device cpu$"):
        choose_device("cuda")


def script(*arguments, cwd, **kwargs):
    return subprocess.Popen([sys.executable, str(ROOT / "train_ppo.py"), *arguments], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)  # fmt: skip


def wait_for(pattern, folder):
    deadline = time.time() + 60
    while not list(folder.glob(pattern)) and time.time() < deadline:
        time.sleep(0.1)


def test_on_the_command_line(tmp_path):
    """In another directory: one run stopped by Ctrl-C, one by Ctrl-C twice while nobody reads its output, one mistake."""
    long = [*SMALL.split(), "--num_steps", "100000000"]
    once, twice, mistake = script(*long, cwd=tmp_path), script(*long, "--eval_interval", "0", "--run_dir", "twice", cwd=tmp_path), script("--sede", "1", cwd=tmp_path)
    try:
        twice.stdout.close()
        wait_for("runs/*/checkpoint_*.pt", tmp_path)
        wait_for("twice/checkpoint_*.pt", tmp_path)
        once.send_signal(signal.SIGINT)
        _, err = once.communicate(timeout=30)
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert once.returncode == 130 and "Traceback" not in err
        assert f"go on with: python train_ppo.py --resume runs/{run_dir.name}" in err
        assert load_checkpoint(run_dir)["update_count"] >= 2

        assert twice.poll() is None
        twice.send_signal(signal.SIGINT)
        time.sleep(0.002)
        twice.send_signal(signal.SIGINT)
        assert twice.wait(timeout=30) in (-signal.SIGINT, 130)

        _, err = mistake.communicate(timeout=60)
        assert mistake.returncode == 1 and err == "train_ppo.py: unknown argument --sede; did you mean --seed?\n"
    finally:
        for process in (once, twice, mistake):
            process.kill()
        twice.stderr.close()
        twice.wait()


@pytest.mark.parametrize("edit", [{"NUM_ENVS": 9}, {"BATCH_SIZE": 33}])
def test_what_two_ranks_cannot_share(monkeypatch, edit):
    monkeypatch.setattr(train_ppo, "RANKS", 2)
    check(CONSTANTS)
    with pytest.raises(CommandLineError, match="NUM_ENVS and BATCH_SIZE are shared by 2 ranks"):
        check(CONSTANTS | edit)


def test_two_ranks_on_the_command_line(tmp_path):
    def launch(*more):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ppo.py"]
        return subprocess.run([*launcher, *more], cwd=ROOT, capture_output=True, text=True, timeout=120)

    run_dir = tmp_path / "run"
    done = launch(*SMALL.split(), "--run_dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("learns Breakout") + done.stdout.count("learns Breakout") == 1  # rank 0 alone prints
    assert [row["global_step"] for row in logged(run_dir)] == [str(32 * i) for i in range(1, 7)]
    assert [bool(row["eval_score"]) for row in logged(run_dir)] == [False, True] * 3
    with pytest.raises(CommandLineError, match="was trained by 2 ranks, not 1; use torchrun"):
        main(["--resume", str(run_dir), "--num_steps", "256"])
    assert launch("--resume", str(run_dir), "--num_steps", "256", "--eval_interval", "0").returncode == 0
    assert load_checkpoint(run_dir)["global_step"] == 256
