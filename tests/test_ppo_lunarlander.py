import gymnasium as gym
import numpy as np
import pytest
import torch
from algorithms_helpers import evaluated, run, same, states_of_a_straight_and_a_resumed_run
from gymnasium.vector import AutoresetMode
from PIL import Image

from algorithms.ppo_lunarlander import ALGORITHM, ENV_ID, ActorCritic, Recorded, RecordedEnvs, make_env
from harness.options import CommandLineError

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = (
    "--num_envs 2 --rollout_steps 64 --batch_size 32 --epochs 1 --hidden 8 --eval_interval 0 --save_freq 1 "
    "--lr 0.001 --min_lr 0.001"
)


def test_a_lander_takes_the_same_course_again():
    """From its random numbers and its actions, in the middle of its third episode."""
    first, second = Recorded(make_env()), Recorded(make_env())
    rng = np.random.default_rng(0)
    first.reset(seed=3)
    for _ in range(2):
        while not any(first.step(rng.integers(4))[2:4]):
            pass
        first.reset()
    for _ in range(40):
        first.step(rng.integers(4))
    second.load_state_dict(first.state_dict())
    for _ in range(30):
        action = rng.integers(4)
        for ours, theirs in zip(first.step(action)[:4], second.step(action)[:4]):
            np.testing.assert_array_equal(ours, theirs)
    assert np.array_equal(first.reset()[0], second.reset()[0])


def test_recording_changes_nothing():
    plain = gym.vector.SyncVectorEnv([lambda: gym.make(ENV_ID)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    ours = RecordedEnvs([lambda: Recorded(make_env())] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    np.testing.assert_array_equal(plain.reset(seed=1)[0], ours.reset(seed=1)[0])
    for actions in np.random.default_rng(0).integers(4, size=(200, 2)):
        for a, b in zip(plain.step(actions)[:4], ours.step(actions)[:4]):
            np.testing.assert_array_equal(a, b)


def test_actor_and_critic_share_nothing():
    policy = ActorCritic(8)
    logits, values = policy(torch.zeros(5, 8))
    assert logits.shape == (5, 4) and values.shape == (5,)
    values.sum().backward()
    assert all(p.grad is None for p in policy.actor.parameters())


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(ALGORITHM, SMALL, tmp_path, 4 * 128, 2 * 128)
    assert same(straight, resumed) and straight[0]["update_count"] == 4


def test_play_and_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = evaluated(ALGORITHM, None, capsys, "--episodes", 8)  # the shipped model
    assert result["score"] >= 200 and result["games"] == 8
    assert run(ALGORITHM, "--play", "--out", "landing.gif") == 0
    with Image.open("landing.gif") as gif:
        assert gif.n_frames > 50


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--num_envs 16 --rollout_steps 256 --batch_size 1000",
            "BATCH_SIZE 1000 must divide the 4,096 samples of a rollout .*; the nearest that fit: 512 and 1024$",
        ),
        ("--min_lr 0.5 --lr 0.1", "MIN_LR 0.5 must not exceed LR 0.1"),
        ("--gama 0.9", "unknown argument --gama; did you mean --gamma"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(CommandLineError, match=message):
        run(ALGORITHM, *words.split())
