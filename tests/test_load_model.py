import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import PAGE, largest_score, status_in, tolerance
from PIL import Image

import load_model
from breakout_ascii import BreakoutAscii, standard_serves, to_image
from evaluation import SERVES, play_games, summary
from games.game import BREAKOUT, load_game
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.options import CommandLineError
from load_model import main, play
from model import GPT, GPTConfig
from policies import SHIPPED, find_model, load_policy
from train_ppo import CONSTANTS
from viewer.drawing import page_drawer
from viewer.replay import breakout

ROOT = Path(__file__).parent.parent
CATCH = "games.catch:Catch-v0"


def played(policy, *limits, game_id=BREAKOUT, **options):
    """Return the steps of a policy's play."""
    return list(play(policy, load_game(game_id).make(), *limits, **options))


def save_model(path, game_id, **more):
    """Write a checkpoint of an untrained model of a game."""
    torch.manual_seed(0)
    config = GPTConfig(**load_game(game_id).page_sizes(), n_head=4, n_embd=16)
    state = {"gpt_config": asdict(config), "model": dict(GPT(config).state_dict()), "global_step": 5, "game": game_id}
    save_checkpoint(path, state | more)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = GPTConfig(**PAGE, n_head=4, n_embd=16)
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, {"gpt_config": asdict(config), "model": dict(GPT(config).state_dict()), "global_step": 5})
    return path


def test_load_policy(checkpoint):
    """The GPT is ready to play, and the dict has everything but its weights."""
    policy, meta = load_policy(checkpoint)
    assert not policy.training and policy.config.n_embd == 16 and meta["global_step"] == 5 and "model" not in meta
    obs, _ = BreakoutAscii().reset(seed=0)
    logits, values = policy(torch.from_numpy(np.stack([obs, obs])))
    assert logits.shape == (2, 3) and values.shape == (2,) and logits.dtype == values.dtype == torch.float32


def test_a_stage_plays_with_its_rounded_weights(checkpoint, tmp_path, monkeypatch, capsys):
    """It is played if somebody names it, and is no model of a run."""
    state = load_checkpoint(checkpoint)
    halves = {name: x.half() for name, x in state["model"].items()}
    for name, weights in (("half", halves), ("rounded", {name: x.float() for name, x in halves.items()})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_checkpoint(tmp_path / "runs" / name / "stage_5.safetensors", state | {"model": weights})
    pages = torch.from_numpy(np.stack([BreakoutAscii().reset(seed=seed)[0] for seed in range(4)]))
    half, rounded, exact = (
        load_policy(path)[0](pages)
        for path in (
            tmp_path / "runs/half/stage_5.safetensors",
            tmp_path / "runs/rounded/stage_5.safetensors",
            checkpoint,
        )
    )
    assert all(map(torch.equal, half, rounded)) and not torch.equal(half[1], exact[1])
    assert half[0].dtype == half[1].dtype == torch.float32
    monkeypatch.chdir(tmp_path)
    assert main([str(Path("runs/half/stage_5.safetensors")), "--steps", "5"]) == 0
    assert "stage_5.safetensors: trained for 5 steps" in capsys.readouterr().out
    assert find_model(None)[0] == SHIPPED
    with pytest.raises(CheckpointError, match="half: has no best_model.safetensors or last.safetensors in it"):
        find_model("runs/half")


def test_models_of_wrapped_policies_load(checkpoint, tmp_path):
    """Prefixes that wrappers put before the names of weights are ignored."""
    state = load_checkpoint(checkpoint)
    page = BreakoutAscii().reset(seed=0)[0][None]
    expected = load_policy(checkpoint)[0](page)[0]
    for prefix in ("_orig_mod.", "module."):
        save_checkpoint(
            tmp_path / "wrapped.safetensors",
            state | {"model": {prefix + name: x for name, x in state["model"].items()}},
        )
        assert torch.equal(load_policy(tmp_path / "wrapped.safetensors")[0](page)[0], expected)


def test_gif_shows_every_step(checkpoint, tmp_path, capsys):
    """Its frames are the pages after each action, for 40 ms each, with their exact colours, and what they have come
    to."""
    out = tmp_path / "small.gif"
    main([str(checkpoint), "--steps", "150", "--out", str(out), "--sample", "--seed", "3"])
    policy, _ = load_policy(checkpoint)
    steps = played(policy, 150, seed=3, sample=True)
    assert any(step.last for step in steps[:-1]), "no game ended within the gif: the test shows less than it should"
    with Image.open(out) as gif:
        durations = 0
        in_game = 0
        for i in range(gif.n_frames):
            gif.seek(i)
            durations += gif.info["duration"]
            picture = np.array(gif.convert("RGB"))
            np.testing.assert_array_equal(picture[:264], to_image(steps[i].after.page))  # exactly, colours too
            in_game += 1
            info = steps[i].info
            text, factor = status_in(picture)
            assert text == f"score {info['score']:<3}   lives {info['lives']}   step {in_game:,}" and factor == 2
            in_game = 0 if steps[i].last else in_game
    assert durations == 150 * 40
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("game")]
    infos = [step.info for step in steps if step.last]
    assert (
        len(lines) == len(infos)
        and f"game 1: {infos[0]['score']} points, {infos[0]['bricks']} of 91 bricks" in lines[0]
    )


def test_a_gif_that_the_disk_has_no_room_for(checkpoint, tmp_path):
    """One line, and the old gif stays: no file may grow beyond 1000 bytes."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "old.gif"
    out.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            OSError, match="old.gif: not written .File too large.; free some disk space or check the permissions$"
        ):
            main([str(checkpoint), "--steps", "20", "--out", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["old.gif", "small.safetensors"]


def test_an_unfinished_gif_leaves_the_old_one(checkpoint, tmp_path, monkeypatch):
    """An interruption replaces no file and leaves no half of one."""
    (tmp_path / "old.gif").write_bytes(b"old")
    monkeypatch.setattr(breakout, "to_image", lambda page: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([str(checkpoint), "--out", str(tmp_path / "old.gif")])
    assert (tmp_path / "old.gif").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == [
        "old.gif",
        "small.safetensors",
    ]


def test_the_shipped_model(tmp_path, capsys):
    """It scores what its README says, on every CPU: its closest decision is wider than what float32 may round."""
    policy, meta = load_policy(SHIPPED)
    weight = policy.policy_head.weight
    margins = []

    @torch.no_grad()
    def player(tokens):
        features = policy.features(policy.encode(tokens))
        (first, second), (i, j) = (x.T for x in policy.heads(features)[0].topk(2))
        rounded = (weight[i] - weight[j]).norm(dim=1) * features.norm(dim=1)  # times the features' relative error
        margins.append(((first - second) / rounded).min().item())
        return i.numpy()

    result = summary(play_games(player, standard_serves(SERVES), np.ones((32, 7, 13), bool), deterministic=True))
    assert min(margins) > tolerance(largest_score(policy))
    readme = (SHIPPED.parent / "README.md").read_text(encoding="utf-8")
    assert f"scores {result['score']:.0f} points and clears {result['cleared']} of 32 games" in readme
    assert f"{meta['global_step']:,} steps" in readme and f"--seed {meta['constants']['SEED']}" in readme
    assert meta["constants"].keys() <= CONSTANTS.keys()
    main([str(SHIPPED), "--steps", "200", "--out", str(tmp_path / "gpt.gif")])
    with Image.open(tmp_path / "gpt.gif") as gif:
        assert gif.n_frames == 200
    assert 10_000 < (tmp_path / "gpt.gif").stat().st_size < 100_000  # half of it for the steps, which change every time


def test_episodes_are_whole_games(checkpoint):
    """Two games are played to their ends."""
    policy, _ = load_policy(checkpoint)
    steps = played(policy, episodes=2, sample=True)
    ends = [step for step in steps if step.last]
    assert len(ends) == 2 and steps[-1] is ends[-1] and all(step.info["lives"] == 0 for step in ends)


def test_the_seed_decides_what_is_played(checkpoint):
    """The same seed gives the same pages, and another seed others."""
    policy, _ = load_policy(checkpoint)
    frames = [
        np.stack([step.before.page for step in played(policy, 200, seed=seed, sample=True)]) for seed in (0, 0, 1)
    ]
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


def test_evaluate_prints_json_last(checkpoint, capsys):
    """The last line of the output can be read by a program."""
    main([str(checkpoint), "--evaluate"])
    exact = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(exact) == ["score", "min", "max", "cleared", "games"] and exact["games"] == 32
    main([str(checkpoint), "--evaluate", "--sample", "--episodes", "10"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["games"] == 10


def test_the_newest_run_of_a_gpt_else_the_shipped_model(tmp_path, monkeypatch, checkpoint, capsys):
    """Whatever it has of a model, wherever it lies, and whoever else has written a run since."""
    monkeypatch.chdir(tmp_path)
    assert find_model(None) == (SHIPPED, " (the shipped model, because there is no run)")
    gpt = load_checkpoint(checkpoint)
    pole = {"algorithm": "reinforce_cartpole", "global_step": 1}
    runs = {
        "b/best_model.safetensors": gpt,
        "a/best_model.safetensors": gpt,
        "grid/train_ppo/seed=0/last.safetensors": gpt,
        "x/best_model.safetensors": pole,
    }
    for i, (name, state) in enumerate(runs.items()):
        file = tmp_path / "runs" / name
        file.parent.mkdir(parents=True)
        save_checkpoint(file, state)
        os.utime(file, (1e9 + i, 1e9 + i))
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "best_model.safetensors").write_text("of another project")
    newest = Path("runs/grid/train_ppo/seed=0/last.safetensors")
    why = f" (the newest run; it has no best model yet; to play another run's, name {Path('runs/a')})"
    assert find_model(None) == (newest, why)
    main(["--steps", "1"])
    assert capsys.readouterr().out.startswith(f"{newest}: trained for 5 steps{why}\n")
    main(["runs/b", "--steps", "1"])
    assert capsys.readouterr().out.startswith(f"{Path('runs/b/best_model.safetensors')}: trained for 5 steps\n")
    newest.unlink()
    assert find_model(None) == (Path("runs/a/best_model.safetensors"), " (the newest run)")


def test_a_newest_run_that_is_damaged_is_named(tmp_path, monkeypatch, checkpoint):
    """No older one is taken for it."""
    monkeypatch.chdir(tmp_path)
    for name in ("older", "newer"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").touch()
        (run / "best_model.safetensors").write_bytes(checkpoint.read_bytes())
        os.utime(run / "best_model.safetensors", (1e9, 1e9))
    (tmp_path / "runs" / "newer" / "best_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="newer.best_model.safetensors: is no checkpoint"):
        main([])


def test_no_way_leads_to_the_model_from_the_working_directory(tmp_path, monkeypatch, checkpoint, capsys):
    """On Windows it may be on another drive; and the working directory may have been removed."""
    for error in (
        ValueError("path is on mount 'D:', start on mount 'C:'"),
        FileNotFoundError(2, "No such file or directory"),
    ):
        monkeypatch.setattr(os.path, "relpath", Mock(side_effect=error))
        main([str(checkpoint), "--steps", "1", "--out", str(tmp_path / "a.gif")])
        assert capsys.readouterr().out.startswith(f"{checkpoint}: trained for")


def test_a_path_that_is_empty_or_begins_with_the_home_directory(tmp_path, monkeypatch, checkpoint):
    """Paths are understood as a shell would, and an empty one is refused."""
    for variable in ("HOME", "USERPROFILE"):  # of Windows
        monkeypatch.setenv(variable, str(tmp_path))
    main([f"~/{checkpoint.relative_to(tmp_path)}", "--steps", "1", "--out=~/a.gif"])
    assert (tmp_path / "a.gif").exists()
    for arguments in ([""], [str(checkpoint), "--out", ""]):
        with pytest.raises(CommandLineError, match="is empty; name a file or a directory"):
            main(arguments)


def test_files_that_are_no_model(tmp_path, checkpoint):
    """Each is refused in one line that names the file."""
    for name, content in (
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello"),
        ("cut.safetensors", checkpoint.read_bytes()[:-100]),
    ):
        (tmp_path / name).write_bytes(content)
    save_checkpoint(tmp_path / "other.safetensors", {"model": {}, "gpt_config": {"n_layers": 3}})
    save_checkpoint(tmp_path / "nothing.safetensors", {"global_step": 1})
    save_checkpoint(tmp_path / "misfit.safetensors", {"model": {"wte.weight": torch.ones(2)}, "gpt_config": {}})
    config = {"n_head": 4, "n_embd": 16}
    for name, edit in (
        ("float.safetensors", {"n_head": 4.0}),
        ("layers.safetensors", {"n_layer": 100_000}),
        ("wide.safetensors", {"n_embd": 8192}),
        ("actions.safetensors", {"n_action": 5}),
    ):
        save_checkpoint(tmp_path / name, load_checkpoint(checkpoint) | {"gpt_config": config | edit})
    save_checkpoint(tmp_path / "list.safetensors", {"model": [1], "gpt_config": config})
    state = load_checkpoint(checkpoint)
    state["model"]["wte.weight"][0, 0] = math.nan
    save_checkpoint(tmp_path / "nan.safetensors", state)
    names = "empty text cut other nothing misfit missing float layers wide actions list nan".split()
    for name in (f"{name}.safetensors" for name in names):
        with pytest.raises(CheckpointError, match=name) as error:
            load_policy(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps 0 --out x.html", "--steps: must be an integer in [1, 1_000_000_000], not '0'"),
        ("--steps 20000 --out x.html", "--steps must be at most 10000 for an .html, not 20000"),
        ("--episodes 0", "--episodes: must be an integer in [1, 1_000_000], not '0'"),
        ("--episodes 3 --out x.html", "--episodes must be at most 2 for an .html, not 3"),
        ("--seed 99999999999", "--seed: must be an integer in [0, 4_294_967_295], not"),
        ("--out x.png", "must end in .gif, .html or .mp4"),
        ("--out nowhere/x.gif", "no directory nowhere"),
        ("--evaluate --episodes 5", "--episodes goes with --sample"),
        ("--step 3", "unknown argument --step; did you mean --steps"),
        ("--seed x", "--seed: must be an integer in [0, 4_294_967_295], not 'x'"),
    ],
)
def test_wrong_arguments(arguments, message):
    """Each is refused before anything is played."""
    with pytest.raises(CommandLineError, match=re.escape(message)):
        main(arguments.split())


def test_mp4_without_its_package(checkpoint, tmp_path, monkeypatch):
    """The error says how to install it."""
    monkeypatch.setattr(load_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandLineError, match="pip install imageio-ffmpeg"):
        main([str(checkpoint), "--out", str(tmp_path / "x.mp4")])


def test_mp4(checkpoint, tmp_path):
    """And one that the disk has no room for leaves the old one."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    resource = pytest.importorskip("resource")
    out = tmp_path / "x.mp4"
    main([str(checkpoint), "--out", str(out), "--steps", "30"])
    whole = out.read_bytes()
    assert ffmpeg.count_frames_and_secs(str(out))[0] == 30
    (tmp_path / "link.mp4").symlink_to("other")
    main([str(checkpoint), "--out", str(tmp_path / "link.mp4"), "--steps", "2"])
    assert ffmpeg.count_frames_and_secs(str(tmp_path / "other"))[0] == 2
    for name in "link.mp4", "other":
        (tmp_path / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            OSError, match="x.mp4: not written .*; free some disk space or check the permissions$"
        ) as error:
            main([str(checkpoint), "--out", str(out), "--steps", "30"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        out.read_bytes() == whole
        and "\n" not in str(error.value)
        and sorted(os.listdir(tmp_path)) == ["small.safetensors", "x.mp4"]
    )


def test_an_mp4_of_odd_sizes(tmp_path, capfd):
    """A page may have any size, but a video has an even one. Nothing is resized, and no warning printed."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    load_model.write_mp4(str(tmp_path / "x.mp4"), [np.full((33, 141, 3), 200, np.uint8)] * 3, 100)
    about = next(ffmpeg.read_frames(str(tmp_path / "x.mp4")))
    assert about["size"] == (142, 34) and about["fps"] == 10 and capfd.readouterr().err == ""


def test_on_the_command_line(tmp_path):
    """The shipped model plays in a fresh clone whose path has a space and an umlaut, with no home and no imageio.

    The output takes only ASCII. A bad file is one line, though the output is closed.
    """
    tmp_path = tmp_path / "a f\u00fc"
    tmp_path.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for name in ("fast", "games", "harness", "viewer", "pretrained"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "imageio.py").write_text("raise ImportError('there is no imageio')")
    (tmp_path / "bad.safetensors").write_bytes(b"PK\3\4 not a checkpoint")

    def script(*arguments):
        command = [sys.executable, "load_model.py", *arguments]
        if "bad.safetensors" in arguments and sys.platform != "win32":
            command = ["bash", "-c", 'exec "$@" >&-', "", *command]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "HOME": "/proc/nowhere"}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    with script("--steps", "60", "--out", "\u00fc.gif") as good, script("bad.safetensors") as bad:  # side by side
        out, progress = good.communicate()
        _, err = bad.communicate()
    assert good.returncode == 0 and (tmp_path / "\u00fc.gif").stat().st_size > 1000 and "Traceback" not in progress
    assert "pretrained" in out and "wrote \\xfc.gif" in out
    assert bad.returncode == 1 and err.startswith("load_model.py: bad.safetensors: ") and err.count("\n") == 1


def test_weights_that_are_finite_but_far_too_large(checkpoint):
    """Logits that are not finite are an error, greedy or sampled."""
    policy, _ = load_policy(checkpoint)
    policy.policy_head.weight.data.fill_(3e38)
    for sample in (False, True):
        with pytest.raises(FloatingPointError, match="the logits are not finite"):
            played(policy, 3, sample=sample)


def test_older_checkpoints_load(checkpoint, tmp_path):
    """Their configuration names the length of a page, which is always the same."""
    state = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "older.safetensors", state | {"gpt_config": state["gpt_config"] | {"block_size": 1944}})
    page = BreakoutAscii().reset(seed=0)[0][None]
    assert torch.equal(load_policy(tmp_path / "older.safetensors")[0](page)[0], load_policy(checkpoint)[0](page)[0])


# Other games than Breakout


def test_the_gif_of_another_game_begins_with_its_first_page(tmp_path, capsys):
    """Every game is shown from its first page to its last. The lines at the end say what each game has returned."""
    model = save_model(tmp_path / "catch.safetensors", CATCH)
    main([model, "--steps", "40", "--out", str(tmp_path / "catch.gif"), "--sample", "--seed", "1"])
    steps = played(load_policy(model)[0], 40, game_id=CATCH, seed=1, sample=True)
    pages = []
    for step in steps:
        pages += [step.before.page, step.after.page] if step.last else [step.before.page]
    draw = page_drawer(16, 27, {"o": (255, 255, 255), "=": (230, 110, 200)})
    numbers = [(step % 16, 0 if step % 16 < 15 else steps[step // 16 * 15 + 14].after.score) for step in range(43)]
    with Image.open(tmp_path / "catch.gif") as gif:
        assert gif.n_frames == len(pages) == 43 and gif.info["duration"] == 100
        for i, page in enumerate(pages):
            gif.seek(i)
            picture = np.array(gif.convert("RGB"))
            np.testing.assert_array_equal(picture[:352], draw(page))
            assert status_in(picture) == (f"return {numbers[i][1]:<8g} step {numbers[i][0]}", 1)
    returns = [step.after.score for step in steps if step.last]
    first, *games, last = capsys.readouterr().out.splitlines()
    assert first.endswith("catch.safetensors: trained for 5 steps on games.catch:Catch-v0")
    cut = "; cut off after 40 steps in all; --episodes 3 plays to the end"
    assert games == [
        f"game {n}: return {score:g} after {length} steps{end}"
        for n, score, length, end in zip((1, 2, 3), returns, (15, 15, 10), ("", "", cut), strict=True)
    ]


def test_many_games_are_told_in_few_lines(tmp_path, capsys):
    """Most of them in one line, which has their mean."""
    model = save_model(tmp_path / "catch.safetensors", CATCH)
    main([model, "--episodes", "12", "--out", str(tmp_path / "catch.gif"), "--sample"])
    returns = [s.after.score for s in played(load_policy(model)[0], episodes=12, game_id=CATCH, sample=True) if s.last]
    games = capsys.readouterr().out.splitlines()[1:-1]
    assert len(games) == 10 and games[8].startswith("game 9: return ")
    assert games[-1] == f"3 further games: mean return {sum(returns[9:]) / 3:.6g}"
    main([model, "--steps", "160", "--out", str(tmp_path / "catch.gif"), "--sample"])
    *_, rest, cut, _ = capsys.readouterr().out.splitlines()
    assert rest == f"1 further game: mean return {returns[9]:.6g}"
    assert cut == "game 11: return 0 after 10 steps; cut off after 160 steps in all; --episodes 11 plays to the end"


@pytest.mark.parametrize(
    "game_id, words, number, further",
    [
        (BREAKOUT, "", 1, "1000 steps; --episodes 1 plays to the end"),
        (BREAKOUT, "--steps 30 --out x.gif", 1, "30 steps; --episodes 1 plays to the end"),
        (BREAKOUT, "--steps 9000 --out x.html", 2, "9000 steps in all; --episodes 2 plays to the end"),
        (BREAKOUT, "--steps 9000 --out x.html", 3, "9000 steps in all; --steps 10000 plays on"),
        (BREAKOUT, "--steps 10000 --out x.html", 7, "10000 steps in all, the most in an .html"),
        (CATCH, "--steps 10", 1, "10 steps; --episodes 1 plays to the end"),
        (CATCH, "--steps 10 --out x.html", 1, "10 steps; --episodes 1 plays to the end or to 10000 steps"),
        (CATCH, "--episodes 700 --out x.html", 667, "10000 steps in all, the most in an .html"),
    ],
)
def test_where_a_game_is_cut_off_and_how_to_see_its_end(game_id, words, number, further):
    """What is advised is allowed, and plays on."""
    args = load_model.read_command_line(words.split())
    game = load_game(game_id)
    assert load_model.cut_off(number, args, game) == f"; cut off after {further}"
    for option in re.findall(r"--\w+ \d+", further):
        advised = load_model.read_command_line(f"{option} --out {args.out}".split())
        if game_id == BREAKOUT:
            load_model.check_breakout(advised)


def test_numbers_of_a_status_line_stay_where_they_are():
    """Whether they are small or large, in games with lives and without. The longest of all are shown as well."""
    catch = load_game(CATCH)
    lines = [
        load_model.status_line(load_model.Situation(None, steps, score, lives), catch)
        for steps, score, lives in ((0, 0.0, 3), (1_000, 0.1 + 0.2, 0), (999_999, -123.456, 12))
    ]
    assert [line.rstrip() for line in lines] == [
        "return 0        lives 3   step 0",
        "return 0.3      lives 0   step 1,000",
        "return -123.456 lives 12  step 999,999",
    ]
    assert len(set(map(len, lines))) == 1
    line = load_model.status_line(load_model.Situation(None, 1_000_000, -1234567.0), catch)
    assert line.rstrip() == "return -1.23457e+06 step 1,000,000"


def test_the_status_under_pictures_of_attention(tmp_path):
    """One line for all heads, about the page that they read."""
    model = save_model(tmp_path / "catch.safetensors", CATCH)
    for words, size in (("--head 1", (312, 385)), ("--attention", (320, 399))):
        main([model, *words.split(), "--steps", "15", "--out", str(tmp_path / "heads.gif")])
        with Image.open(tmp_path / "heads.gif") as gif:
            assert gif.size == size and gif.n_frames == 16
            for i in range(16):
                gif.seek(i)
                assert status_in(np.array(gif.convert("RGB")))[0].endswith(f"step {i}")


def test_the_score_of_another_game(tmp_path, capsys):
    """It is a mean over as many games as the training evaluated, unless --episodes says how many."""
    model = save_model(tmp_path / "catch.safetensors", CATCH, constants={"EVAL_EPISODES": 7})
    for words, games in (("", 7), ("--episodes 3", 3), ("--sample --episodes 30", 30)):
        main([model, "--evaluate", *words.split()])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert list(result) == ["score", "error", "min", "max", "length", "games"]
        assert result["games"] == games and result["length"] == 15 and 0 <= result["score"] <= 1
    save_model(tmp_path / "catch.safetensors", CATCH)
    main([model, "--evaluate"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["games"] == 100


def test_the_page_of_another_game_has_at_most_10_000_steps(tmp_path, monkeypatch, capsys):
    """However many games are asked for. (Here it is 50, to save time.)"""
    monkeypatch.setitem(load_model.HTML_LIMITS, "steps", 50)
    model = save_model(tmp_path / "catch.safetensors", CATCH)
    main([model, "--steps", "50", "--episodes", "5", "--out", str(tmp_path / "catch.html")])
    games = capsys.readouterr().out.splitlines()[1:-1]
    assert len(games) == 4 and games[-1].endswith("after 5 steps; cut off after 50 steps in all, the most in an .html")


def test_a_game_that_does_not_fit_or_cannot_be_made(tmp_path):
    """One line names the model and the game, or the package that is missing."""
    model = save_model(tmp_path / "catch.safetensors", CATCH)
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_checkpoint(elsewhere, load_checkpoint(model) | {"game": "games.gone:Game-v0"})
    for arguments, message in (
        ([model, "--game", BREAKOUT], "catch.safetensors: .*Catch-v0.* cannot play BreakoutAscii-v0.*rows 16"),
        (
            [str(SHIPPED), "--game", CATCH],
            "breakout.safetensors: .*BreakoutAscii-v0.* cannot play games.catch:Catch-v0",
        ),
        ([model, "--game", "Nowhere-v3"], "Nowhere-v3 cannot be made"),
        ([model, "--game", "CartPole-v1"], "CartPole-v1 .*page"),
        ([str(elsewhere)], "elsewhere.safetensors: games.gone:Game-v0 cannot be made: .*games.gone"),
    ):
        with pytest.raises((CommandLineError, CheckpointError), match=message) as error:
            main([*arguments, "--out", str(tmp_path / "x.gif")])
        assert "\n" not in str(error.value) and not (tmp_path / "x.gif").exists()


def test_a_model_may_play_another_game_that_fits(tmp_path, capsys):
    """CliffWalking on slippery ice has the same page and the same actions."""
    gym.register(
        "SlipperyCliff-v0", "gymnasium.envs.toy_text.cliffwalking:CliffWalkingEnv", kwargs={"is_slippery": True}
    )
    try:
        model = save_model(tmp_path / "cliff.safetensors", "CliffWalking-v1")
        main([model, "--game", "SlipperyCliff-v0", "--steps", "5", "--out", str(tmp_path / "cliff.gif")])
    finally:
        del gym.registry["SlipperyCliff-v0"]
    assert "game 1: return -" in capsys.readouterr().out
