import json
import logging
import math
import re
import shutil
import signal
import sys

import pytest
import torch
from algorithms_helpers import same
from fake_trainer import FakeWandb
from helpers import SIGHUP, SIGQUIT, needs_posix
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from algorithms import actor_critic
from algorithms.actor_critic import ActorCriticAgent, Config, expected_maximum, main, read_config
from harness import supervise
from harness.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from harness.device import DeviceError
from harness.options import CommandLineError
from harness.runs import locked


def test_the_optimum_is_known():
    """It is that of a closed form for two and three numbers (David & Nagaraja 2003), and of drawn numbers for ten."""
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert expected_maximum(3) == pytest.approx(3 / (2 * math.sqrt(math.pi)), rel=1e-6)
    drawn = torch.randn(200_000, 10, generator=torch.Generator().manual_seed(0)).amax(1)
    assert expected_maximum(10) == pytest.approx(
        drawn.mean().item(), abs=5 * drawn.std().item() / math.sqrt(len(drawn))
    )


def test_rewards_of_actions_are_independent_and_standard_normal():
    config = Config(input_dim=6, output_dim=3)
    model = actor_critic.RewardModel(config, torch.Generator().manual_seed(0), torch.device("cpu"))
    torch.testing.assert_close(model.directions @ model.directions.T, torch.eye(3))


def test_the_best_policy_has_no_regret_and_a_random_one_loses_everything():
    agent = ActorCriticAgent(Config(hidden_dim=4))
    agent.policy = lambda states: (agent.reward_model(states) * 1e6).log_softmax(1)
    assert agent.regret() < 1e-4 and agent.evaluate()["share"] == pytest.approx(1, abs=1e-3)
    agent.policy = lambda states: torch.full((len(states), 2), math.log(0.5))
    assert agent.evaluate()["score"] == pytest.approx(0, abs=0.02)


def test_a_step_by_hand():
    """The gradients of one step are those of the textbook.

    For each sample, that of the actor is onehot(a) - p times the advantage, and that of the critic is its error.
    """
    config = Config(hidden_dim=4, batch_size=5)
    agent, twin = ActorCriticAgent(config), ActorCriticAgent(config)
    states = torch.randn(5, 10, generator=twin.generator)
    probabilities, values = twin.policy(states).exp(), twin.value(states)
    actions = torch.multinomial(probabilities.detach(), 1, generator=twin.generator).squeeze(1)
    errors = (twin.reward_model(states)[range(5), actions] - values).detach()
    bias = ((probabilities - torch.eye(2)[actions]) * errors.unsqueeze(1)).mean(
        0
    )  # of minus the mean of log p(a) * error
    agent.optimizer.step = lambda: None
    with torch.no_grad():  # as a notebook may have set it
        agent.update()
    torch.testing.assert_close(agent.policy.layers[2].bias.grad, bias)
    torch.testing.assert_close(agent.value.layers[2].bias.grad, -errors.mean().view(1))


class OneDevice(TorchDispatchMode):
    """Fail for every function, except copies, of tensors on two devices, which "meta" allows and a GPU does not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        assert len({x.device for x in tensors}) <= 1 or "copy" in function.name(), function
        return function(*args, **kwargs or {})


def test_everything_is_on_the_device_that_is_named(monkeypatch, small):
    """Everything that a GPU would compute with is there, and the log names it. A device that does not work is named."""
    with monkeypatch.context() as m:
        # "meta" stands in for a GPU; it has shapes and no numbers.
        m.setattr(actor_critic, "check_finite", lambda when, **quantities: None)
        m.setattr(torch.Tensor, "cpu", lambda x: torch.ones(x.shape))
        m.setattr(torch.Tensor, "item", lambda x: 0.0 if x.is_meta else x.tolist())
        agent = ActorCriticAgent(Config(), torch.device("meta"))
        with OneDevice():
            agent.update()
            agent.regret()
            agent.reward_model.directions = agent.reward_model.directions.cpu()
            with pytest.raises(AssertionError):
                agent.regret()
    main(["small.json", "--device", "cpu"])
    (directory,) = small.glob("checkpoints_*")
    assert " on cpu in " in (directory / actor_critic.LOG).read_text()
    for words in ["small.json"], ["--resume", str(directory)], ["--evaluate"]:
        with pytest.raises(DeviceError, match="--device tpu does not work here"):
            main([*words, "--device", "tpu"])
    assert [*small.glob("checkpoints_*")] == [directory]


def test_it_learns():
    agent = ActorCriticAgent(Config(hidden_dim=64, learning_rate=3e-3, batch_size=64))
    before = agent.evaluate()["share"]
    for _ in range(600):
        agent.update()
    assert before < 0.6 and agent.evaluate()["share"] > 0.95


@pytest.fixture
def small(tmp_path, monkeypatch):
    """In a directory of its own, with three short epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(actor_critic, "STEPS_PER_EPOCH", 5)
    monkeypatch.setattr(actor_critic, "SAVE_FREQ", 1)
    (tmp_path / "small.json").write_text('{"hidden_dim": 8, "num_epochs": 3}')
    return tmp_path


def test_what_a_run_leaves(small):
    main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    assert len(directory.name) == len("checkpoints_YYYYMMDD_HHMMSS")
    assert {file.name for file in directory.iterdir()} == {
        "run.lock",
        "actor_critic_training.log",
        "epoch_1.safetensors",
        "epoch_2.safetensors",
        "epoch_3.safetensors",
        "final.safetensors",
    }
    log = (directory / "actor_critic_training.log").read_text()
    assert log.count("epoch ") == 3 and '"seed": 42' in log and "expected reward" in log


def test_weights_and_biases_get_each_epoch_and_the_evaluation(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    assert main(["small.json", "--wandb", "mine"]) == 0
    assert [row["global_step"] for row in wandb.rows] == [5, 10, 15, 15]
    assert {"update", "seconds", "charts/episodic_return", "losses/actor_loss", "losses/critic_loss"} < set(
        wandb.rows[0]
    )
    assert set(wandb.rows[-1]) == {"global_step", "eval/score", "eval/optimum", "eval/share"} and wandb.finished == 1
    assert wandb.inits[0]["id"].startswith("checkpoints_") and wandb.inits[0]["config"]["num_epochs"] == 3


def test_a_resumed_run_is_the_same_bit_for_bit_and_so_is_a_second(small):
    main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    straight = load_checkpoint(directory / "final.safetensors")
    main(["--resume", str(directory / "epoch_1.safetensors")])
    assert same(load_checkpoint(directory / "final.safetensors"), straight)
    main(["small.json"])
    (second,) = set(small.glob("checkpoints_*")) - {directory}
    assert same(load_checkpoint(second / "final.safetensors"), straight)


def test_a_checkpoint_outside_its_run_is_not_resumed(small):
    """What lies beside it is not ours to replace or to delete."""
    main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    models = small / "models"
    models.mkdir()
    (models / "final.safetensors").write_text("a foreign model")
    (models / "notes.safetensors.tmp").write_text("foreign too")
    (models / "epoch_1.safetensors").write_bytes((directory / "epoch_1.safetensors").read_bytes())
    (small / "other.json").write_text('{"hidden_dim": 8, "num_epochs": 3, "seed": 7}')
    main(["other.json"])
    (other,) = set(small.glob("checkpoints_*")) - {directory}
    (other / "epoch_9.safetensors").write_bytes((directory / "epoch_1.safetensors").read_bytes())
    for file in (models / "epoch_1.safetensors", other / "epoch_9.safetensors"):
        left = {path: path.read_bytes() for path in file.parent.iterdir()}
        with pytest.raises(
            CheckpointError,
            match=f"{file.name}: lies outside its run .no actor_critic_training.log beside it tells of it.",
        ) as error:
            main(["--resume", str(file)])
        assert "\n" not in str(error.value) and left == {path: path.read_bytes() for path in file.parent.iterdir()}


@pytest.mark.parametrize("words", [["--resume", ""], ["--evaluate", ""], ["--play", ""], ["--directory", ""], [""]])
def test_a_variable_of_the_shell_that_is_not_set_starts_nothing(small, words):
    with pytest.raises(CommandLineError, match="is empty; name a file or a directory"):
        main(words)
    assert [path.name for path in small.iterdir()] == ["small.json"]


def test_each_line_of_the_log_appears_once(small, capsys):
    """Even if another package has given the root logger a handler."""
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        main(["small.json"])
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err.count("epoch 2: reward") == 1


@pytest.mark.parametrize("last", [1, 3])
def test_a_directory_that_is_removed_while_training_can_be_resumed(small, monkeypatch, capsys, last):
    calls, update = [], ActorCriticAgent.update

    def meanwhile(agent):
        calls.append(0)
        if len(calls) == 8:
            shutil.rmtree(next(small.glob("checkpoints_*")))
        if len(calls) == 5 * last + 4:
            signal.raise_signal(signal.SIGTERM)
        return update(agent)

    with monkeypatch.context() as m:
        m.setattr(ActorCriticAgent, "update", meanwhile)
        (small / "small.json").write_text('{"hidden_dim": 8, "num_epochs": 4}')
        assert main(["small.json"]) == 143
    assert "was renamed or removed; it is made anew" in capsys.readouterr().err
    (directory,) = small.glob("checkpoints_*")
    main(["--resume", str(directory)])
    assert load_checkpoint(directory / "final.safetensors")["epoch"] == 4


@pytest.mark.parametrize(
    "signum, status",
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(SIGHUP, 129, marks=needs_posix),
        pytest.param(SIGQUIT, 131, marks=needs_posix),
    ],
)
def test_a_signal_saves_whole_epochs(small, monkeypatch, signum, status):
    calls, update = [], ActorCriticAgent.update

    def interrupted(agent):
        calls.append(0)
        if len(calls) == 8:
            signal.raise_signal(signum)
        return update(agent)

    with monkeypatch.context() as m:
        m.setattr(ActorCriticAgent, "update", interrupted)
        assert main(["small.json"]) == status
    (directory,) = small.glob("checkpoints_*")
    assert (
        load_checkpoint(directory / "final.safetensors")["epoch"] == 1
        and "--resume" in (directory / "actor_critic_training.log").read_text()
    )
    with locked(directory), pytest.raises(CommandLineError, match="another process is training this run"):
        main(["--resume", str(directory)])
    main(["--resume", str(directory)])
    main(["small.json"])
    (straight,) = set(small.glob("checkpoints_*")) - {directory}
    assert same(load_checkpoint(directory / "final.safetensors"), load_checkpoint(straight / "final.safetensors"))
    with pytest.raises(CommandLineError, match="has done all of its 3 epochs already"):
        main(["--resume", str(directory / "final.safetensors")])


@pytest.mark.parametrize(
    "spoiled, message",
    [
        ("reward_model", "the rewards are not finite in epoch 2; check the environment"),
        ("policy", "the logits are not finite in epoch 2; try a lower learning rate"),
        ("value", "the values are not finite in epoch 2; try a lower learning rate"),
    ],
)
def test_what_is_not_finite_is_named_and_ends_the_training(spoiled, message, small, monkeypatch):
    calls, update = [], ActorCriticAgent.update

    def diverges(agent):
        calls.append(0)
        if len(calls) == 6:
            part = getattr(agent, spoiled)
            with torch.no_grad():
                (part.directions if spoiled == "reward_model" else next(part.parameters()))[0] = math.inf
        return update(agent)

    monkeypatch.setattr(ActorCriticAgent, "update", diverges)
    with pytest.raises(FloatingPointError, match=message):
        main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    assert (
        load_checkpoint(directory / "final.safetensors")["epoch"] == 1
        and "--resume" not in (directory / "actor_critic_training.log").read_text()
    )


def test_a_log_that_cannot_be_opened_ends_no_training(small, capsys):
    main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    (directory / "actor_critic_training.log").unlink()
    (directory / "actor_critic_training.log").mkdir()
    config = json.loads((small / "small.json").read_text())
    agent = actor_critic.load_agent(directory / "final.safetensors")
    agent.config = agent.config._replace(num_epochs=config["num_epochs"] + 1)
    actor_critic.train(agent, directory)
    assert load_checkpoint(directory / "final.safetensors")["epoch"] == config["num_epochs"] + 1
    assert "actor_critic_training.log: not written; training goes on" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_while_costs_files_only(small, monkeypatch, capsys):
    """In the second epoch no file may grow beyond 100 bytes."""
    resource, calls, update = pytest.importorskip("resource"), [], ActorCriticAgent.update
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(agent):
        calls.append(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if 6 <= len(calls) <= 10 else soft, hard))
        return update(agent)

    monkeypatch.setattr(ActorCriticAgent, "update", limited)
    try:
        main(["small.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (directory,) = small.glob("checkpoints_*")
    assert {file.name for file in directory.glob("*.safetensors")} == {
        "epoch_1.safetensors",
        "epoch_3.safetensors",
        "final.safetensors",
    }
    err = capsys.readouterr().err
    assert (
        "actor_critic_training.log: not written; training goes on" in err
        and "epoch_2.safetensors: not saved (File too large)" in err
        and "Traceback" not in err
    )
    assert load_checkpoint(directory / "final.safetensors")["epoch"] == 3


def test_the_config_is_written_if_there_is_none(tmp_path, capsys):
    assert read_config(tmp_path / "config.json") == Config() and "wrote" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "input_dim": 10,
        "output_dim": 2,
        "hidden_dim": 256,
        "learning_rate": 1e-4,
        "batch_size": 32,
        "num_epochs": 100,
        "seed": 42,
    }
    assert read_config(tmp_path / "config.json") == Config()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold an object"),
        ('{"sed": 1}', "unknown key 'sed'; the keys are input_dim"),
        ('{"seed": 1.5}', r"seed must be an integer in \[0, 2_147_483_647\], not 1.5"),
        ('{"seed": true}', "seed must be an integer"),
        ('{"learning_rate": "fast"}', r"learning_rate must be a number in \(0.0, 1.0\], not 'fast'"),
        ('{"batch_size": 0}', r"batch_size must be an integer in \[2, inf\)"),
        ('{"output_dim": 11}', "output_dim 11 must not exceed input_dim 10"),
        ('{"learning_rate": NaN}', "learning_rate must be a number"),
    ],
)
def test_bad_configs(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CommandLineError, match=message) as error:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_a_directory_is_no_config(tmp_path):
    with pytest.raises(CommandLineError, match="is a directory; name a JSON file"):
        read_config(tmp_path)


def test_the_shipped_model_is_near_the_optimum(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--evaluate"])
    out, err = capsys.readouterr()
    assert json.loads(out)["share"] >= 0.99 and err.endswith(
        "actor_critic.safetensors: trained for 100 epochs (the shipped model, because there is no run)\n"
    )
    with pytest.raises(CheckpointError, match="is no model of actor_critic"):
        main(["--evaluate", str(actor_critic.ALGORITHMS / "pretrained" / "reinforce_cartpole.safetensors")])


def test_the_newest_run_is_played_unless_another_is_named(small, capsys):
    main(["small.json"])
    (directory,) = small.glob("checkpoints_*")
    capsys.readouterr()
    main(["--play"])
    out, err = capsys.readouterr()
    assert err.endswith("final.safetensors: trained for 3 epochs (the newest run)\n")
    assert re.fullmatch(r"(state \d: action \d, with .* 0.\d+, has .*; action \d is best, with -?\d.\d+\n){5}", out)
    main(["--evaluate", str(directory)])
    assert capsys.readouterr().err.endswith("final.safetensors: trained for 3 epochs\n")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": 3}, "must hold an object"),
        ({"config": {"hidden_dim": 10**9}}, "hidden_dim must be an integer in"),
        ({"config": {"hidden_dim": 65536, "input_dim": 4096}}, r"state\['policy'\]\['layers.0.weight'\] is a tensor"),
        ({"config": {3: 3}}, "unknown key 3"),
        ({"epoch": "x"}, r"state\['epoch'\] is str"),
        ({"epoch": -1}, r"state\['epoch'\] is int -1"),
        ({"policy": {}}, "lacks 'layers.0.weight'"),
        ({"optimizer": {"state": {0: {}}}}, "lacks 'step'"),
        ({"directions": torch.ones(3)}, "is a tensor .3,. of float32"),
        ({"generator": torch.ones(4)}, "float32"),
        ({"generator": torch.zeros(5056, dtype=torch.uint8)}, "does not fit this program"),
    ],
)
def test_a_checkpoint_of_a_stranger(small, change, message):
    save_checkpoint("final.safetensors", ActorCriticAgent(Config(hidden_dim=8)).state_dict() | change)
    for option in "--evaluate", "--resume":
        with pytest.raises((CheckpointError, CommandLineError), match=f"final.safetensors: .*{message}") as caught:
            main([option, "final.safetensors"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["--seed 1", "--hidden_dim=8"])
def test_a_name_of_the_configuration_is_no_option(words):
    """The message says where it belongs, because the other trainings have such options."""
    with pytest.raises(CommandLineError, match="^--.* is no option; it belongs in CONFIG, a JSON file such as "):
        main(words.split())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--evaluate a --play b", "not allowed with argument"),
        ("--evaluate --resume c", "not allowed with argument"),
        ("mine.json --play", "a run keeps its own constants; leave out mine.json"),
        ("mine.json --resume c", "a run keeps its own constants; leave out mine.json"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, message):
    with pytest.raises(CommandLineError, match=message):
        main(words.split())


@pytest.mark.parametrize(
    "changes, lower",
    [
        ({"batch_size": 10**6, "hidden_dim": 65536}, "lower batch_size or hidden_dim"),
        ({"hidden_dim": 65536, "input_dim": 4096}, "lower hidden_dim"),
        ({"batch_size": 10**6, "hidden_dim": 1, "input_dim": 4096}, "lower batch_size"),
    ],
)
def test_what_does_not_fit_into_memory_does_not_begin(tmp_path, monkeypatch, changes, lower):
    monkeypatch.setattr(supervise, "free_memory", lambda device: 4e9)
    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(
        CommandLineError, match=f"^this training needs .* GB or more, and cpu has 4.0 GB free, .*; {lower}$"
    ):
        main([str(tmp_path / "config.json"), "--directory", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    actor_critic.check_memory(Config(), torch.device("cpu"))
