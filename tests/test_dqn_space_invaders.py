import re
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from algorithms_helpers import run, same, states_of_a_straight_and_a_resumed_run
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from algorithms.dqn_space_invaders import ALGORITHM, QNetwork, double_dqn_targets, evaluate
from algorithms.parts.atari import (
    SIZE,
    ActionSpaceWrapper,
    Replay,
    SkipFrame,
    SmallFrame,
    Stacks,
    make_env,
    restore_game,
    save_game,
)
from harness import supervise
from harness.checkpoint import CheckpointError, save_checkpoint
from harness.device import has_bf16
from harness.options import CommandLineError

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL = (
    "--num_envs 2 --update_steps 24 --replay_size 100 --burn_in 40 --batch_size 4 --learn_every 3 --sync_every 3 "
    "--epsilon_end 0.5 --epsilon_decay 0.99 --eval_interval 0 --save_freq 1 --device cpu"
)


def constants(**changes):
    return SimpleNamespace(
        **{**ALGORITHM.constants, "ENV_ID": "ALE/SpaceInvaders-v5", "ACTIONS": "", "STACK": 4, **changes}
    )


class Counting(gym.Env):
    """Frame t shows t; its reward is t. Action names as an Atari game has them."""

    observation_space, action_space = gym.spaces.Box(0, 255, (210, 160), np.uint8), gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return self.frame()

    def get_action_meanings(self):
        return ["NOOP", "RIGHT", "LEFT"]

    def reset(self, *, seed=None, options=None):
        self.t, self.actions = 0, []
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        return self.frame(), float(self.t), self.t == 10, False, {}

    def frame(self):
        frame = np.full((210, 160), self.t, np.uint8)
        if self.t % 2:  # a sprite that is drawn in every other frame
            frame[0, 0] = 200
        return frame


def test_skipped_frames():
    env = SkipFrame(Counting(), 4)
    env.reset()
    frame, reward, terminated, *_ = env.step(2)
    assert (frame[5, 5], frame[0, 0], reward, terminated) == (4, 200, 10.0, False) and env.unwrapped.actions == [2] * 4
    env.step(0)
    frame, reward, terminated, *_ = env.step(0)  # the game ends in the second of four
    assert (frame[5, 5], reward, terminated) == (10, 19.0, True)


def test_a_picture_is_of_one_action_alone():
    """With one frame for each action, a sprite that is in every other frame comes and goes."""
    env = SkipFrame(Counting(render_mode="rgb_array"), 1)
    env.reset()
    for t in range(1, 4):
        env.step(0)
        assert env.render()[0, 0] == (200 if t % 2 else t)
    env.reset()
    assert env.render()[0, 0] == 0


def test_allowed_actions():
    env = ActionSpaceWrapper(Counting(), ["LEFT", "NOOP"])
    env.reset()
    assert env.action_space.n == 2
    env.step(0), env.step(1)
    assert env.unwrapped.actions == [2, 0]
    with pytest.raises(ValueError, match="'JUMP' is no action of this game, which has NOOP, RIGHT, LEFT"):
        ActionSpaceWrapper(Counting(), ["JUMP"])


def area_means(line, target):
    """The last axis cut into `target` equal parts, and the mean of each: every pixel is first cut into `target`."""
    return np.repeat(line.astype(float), target, axis=-1).reshape(*line.shape[:-1], target, -1).mean(-1)


@pytest.mark.parametrize("rows", [210, 250, 84])  # as most games, as some, and as large as the result
def test_small_frames_are_means_of_areas(rows):
    """Each pixel of the frame counts in proportion to the area that it shares with the small one."""
    frame = np.random.default_rng(0).integers(256, size=(rows, 160)).astype(np.uint8)
    small = SmallFrame(Counting()).observation(frame)
    expected = area_means(area_means(frame, SIZE).T, SIZE).T
    assert small.shape == (SIZE, SIZE) and small.dtype == np.uint8
    np.testing.assert_allclose(small, expected, rtol=0, atol=0.5 + 1e-9)  # rounded, and nothing else


def test_a_moving_sprite_does_not_flicker():
    """A row keeps its brightness wherever it is: with a whole pixel for one target, 2 or 3 rows would share a mean."""
    frames = np.zeros((209, 210, 160), np.uint8)
    frames[np.arange(209), np.arange(209)] = 250
    frames[np.arange(209), np.arange(1, 210)] = 250
    brightness = [SmallFrame(Counting()).observation(frame).sum(dtype=int) / SIZE for frame in frames]
    assert set(brightness) == {2 * 250 * SIZE / 210}


def test_a_real_game():
    env = make_env(constants(ACTIONS="NOOP, FIRE"))
    frame, _ = env.reset(seed=0)
    assert frame.shape == (84, 84) and frame.max() > 50 and env.action_space.n == 2
    assert env.get_wrapper_attr("repeat_action_probability") == 0.25 and ALGORITHM.constants["SKIP"] == 4
    other = make_env(constants(ENV_ID="ALE/Pong-v5"))
    assert other.reset(seed=0)[0].shape == (84, 84) and other.action_space.n == 6 and other.step(3)[0].shape == (84, 84)
    for env_id, actions in (("ALE/Nowhere-v5", ""), ("ALE/Pong-v5", "JUMP"), ("CartPole-v1", "")):
        with pytest.raises(CommandLineError, match=env_id) as error:
            make_env(constants(ENV_ID=env_id, ACTIONS=actions))
        assert "\n" not in str(error.value)


def test_a_file_cannot_name_a_module(tmp_path, monkeypatch):
    """Gymnasium would import it. On the command line somebody who trusts it may."""
    (tmp_path / "evil.py").write_text("raise ZeroDivisionError('its code has run')")
    (tmp_path / "config.json").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    dqn = ALGORITHM.build(constants(NUM_ENVS=1, REPLAY_SIZE=100, DEVICE="cpu"))
    evil = dqn.state_dict()
    evil["constants"]["ENV_ID"] = "evil:Foo-v0"
    save_checkpoint(tmp_path / "last.safetensors", evil)
    for words in ("--resume",), ("--evaluate",), ("--play",):
        with pytest.raises(CheckpointError, match="its ENV_ID 'evil:Foo-v0' would run a module's code"):
            run(ALGORITHM, *words, tmp_path / "last.safetensors")
    (tmp_path / "mine.py").write_text(
        "import ale_py, gymnasium\n"
        "game = {'game': 'space_invaders'}\n"
        "gymnasium.register('Mine-v0', 'ale_py.env:AtariEnv', kwargs=game, max_episode_steps=30)\n"
    )
    mine = evil | {"constants": evil["constants"] | {"ENV_ID": "mine:Mine-v0"}}
    save_checkpoint(tmp_path / "last.safetensors", mine)
    words = "--evaluate", tmp_path / "last.safetensors", "--episodes", 1
    assert run(ALGORITHM, *words, "--env_id", "mine:Mine-v0") == 0
    with pytest.raises(CheckpointError, match="its game is 'mine:Mine-v0', not 'ALE/Pong-v5'; leave out --env_id"):
        run(ALGORITHM, *words, "--env_id", "ALE/Pong-v5")
    state = dqn.state_dict() | {"evaluations": [evil]}  # those that a stop interrupted are begun again
    dqn.check_state(state)
    dqn.load_state_dict(state)
    assert dqn.pending[0]["constants"] == dqn.metadata["constants"]
    with pytest.raises(ZeroDivisionError, match="its code has run"):
        run(ALGORITHM, *SMALL.split(), "--env_id", "evil:Foo-v0", "--run_dir", tmp_path / "trusted")


def goes_on_alike(env_id):
    """Whether a game that is restored into an emulator which was only reset goes on as where it was saved."""
    c = constants(ENV_ID=env_id, STICKY=0.25, SKIP=4)
    first, second, rng = make_env(c), make_env(c), np.random.default_rng(0)
    first.reset(seed=0), second.reset(seed=1)
    for action in rng.integers(first.action_space.n, size=100):
        if first.step(action)[2]:
            first.reset()
    restore_game(second, save_game(first))
    for action in rng.integers(first.action_space.n, size=20):
        (a, *numbers, _), (b, *same_numbers, _) = first.step(action), second.step(action)
        ram, same_ram = (env.unwrapped.ale.getRAM() for env in (first, second))
        if numbers != same_numbers or (a != b).any() or (ram != same_ram).any():
            return False
        if numbers[1]:
            break
    return True


@pytest.mark.parametrize("action", [[], [3], -1, 6, "FIRE"])
def test_a_game_is_not_restored_with_an_action_that_it_lacks(action):
    """Such an action would end the training later, where a state is saved."""
    game = make_env(constants())
    game.reset(seed=0)
    with pytest.raises(ValueError, match="the game has no action"):
        restore_game(game, save_game(game) | {"last_action": action})


@pytest.mark.parametrize("env_id", ["ALE/Qbert-v5", "ALE/Tetris-v5", "ALE/Breakout-v5"])
def test_a_restored_game_goes_on_alike(env_id):
    """Qbert and Tetris do so too, which need an emulator that has drawn a frame."""
    assert goes_on_alike(env_id)


@pytest.mark.faults
def test_every_restored_game_goes_on_alike():
    gym.register_envs(ale_py)
    games = [env_id for env_id in gym.registry if re.fullmatch(r"ALE/\w+-v5", env_id)]
    assert len(games) > 100 and [env_id for env_id in games if not goes_on_alike(env_id)] == []


def test_stacks_start_with_the_first_frame():

    def frame(*numbers):
        return np.stack([np.full((SIZE, SIZE), n, np.uint8) for n in numbers])

    stacks = Stacks(frame(1, 11), 3)
    stacks.push(frame(2, 12), np.array([False, False]))
    stacks.push(frame(3, 13), np.array([False, True]))
    assert stacks.frames[:, :, 0, 0].tolist() == [[1, 2, 3], [13, 13, 13]]


def filled(steps, size=40, num_envs=2, stack=3, seed=0):
    """A memory, and its transitions: {the numbers of a stack: (action, reward, those of the next stack, end)}."""
    rng, replay, expected = np.random.default_rng(seed), Replay(size, num_envs, stack), {}
    number, first = 0, np.ones(num_envs, bool)
    frames = np.zeros((num_envs, SIZE, SIZE), np.uint8)
    for env in range(num_envs):
        number += 1
        frames[env] = number
    stacks = Stacks(frames, stack)
    for _ in range(steps):
        actions, rewards = rng.integers(6, size=num_envs), rng.random(num_envs).astype(np.float32)
        over, cut, lost = rng.random(num_envs) < 0.15, rng.random(num_envs) < 0.05, rng.random(num_envs) < 0.1
        ends, unfinished = over | lost, cut & ~over
        before = stacks.frames[:, :, 0, 0].copy()
        replay.add(stacks.frames[:, -1].copy(), first, actions, rewards, ends, unfinished)
        for env in range(num_envs):
            number = number % 250 + 1
            frames[env] = number
        first = over | cut
        stacks.push(frames, first)
        for env in range(num_envs):
            if not unfinished[env]:
                expected[(*before[env],)] = (actions[env], rewards[env], (*stacks.frames[env, :, 0, 0],), ends[env])
    return replay, expected


@pytest.mark.parametrize("steps", [6, 15, 57])  # nearly empty, not yet full, around the end three times
def test_what_is_drawn_has_happened(steps):
    replay, expected = filled(steps)
    stacks, actions, rewards, next_stacks, ends = replay.sample(500, np.random.default_rng(1))
    assert stacks.shape == (500, 3, SIZE, SIZE) and stacks.dtype == np.uint8 and actions.dtype == np.int64
    drawn = set()
    for stack, action, reward, next_stack, end in zip(
        stacks[..., 0, 0], actions, rewards, next_stacks[..., 0, 0], ends
    ):
        expected_action, expected_reward, expected_next, expected_end = expected[(*stack,)]
        assert (action, reward, end) == (expected_action, expected_reward, expected_end)
        assert end or (*next_stack,) == expected_next
        drawn.add((*stack,))
    assert len(drawn) <= len(replay) and len(drawn) > 0.7 * len(replay)


def memory_of_cut_off_steps(finished=()):
    """A memory of six steps of a game, of which all but those listed were cut off."""
    replay = Replay(6, 1, 4)
    for t in range(6):
        frames = np.full((1, SIZE, SIZE), t, np.uint8)
        replay.add(frames, np.array([True]), [t], [0.0], [False], [t not in finished])
    return replay


def test_a_memory_of_which_nothing_can_be_drawn():
    """The newest step has no next frame, so it cannot be drawn although it is finished."""
    for finished in (), (5,):
        with pytest.raises(
            CommandLineError, match="^every step in the replay memory was cut off, .*; check the time limit"
        ):
            memory_of_cut_off_steps(finished).sample(4, np.random.default_rng(0))
    _, actions, *_ = memory_of_cut_off_steps((4,)).sample(4, np.random.default_rng(0))
    assert actions.tolist() == [4] * 4


def test_each_frame_is_kept_once():
    replay = Replay(1200, 6, 4)
    bytes_per_transition = (
        sum(x.nbytes for x in vars(replay).values() if isinstance(x, np.ndarray) and len(x) == 200) / 1200
    )
    assert SIZE**2 <= bytes_per_transition < SIZE**2 + 16
    with pytest.raises(ValueError, match="REPLAY_SIZE 35 is too small for 6 games .*; the least is 36"):
        Replay(35, 6, 4)


def test_targets_by_hand():
    """The network itself prefers the second action, of which the frozen copy thinks less."""
    targets = double_dqn_targets(
        torch.tensor([1.0, 1.0]),
        torch.tensor([[1.0, 2.0], [0.0, 5.0]]),
        torch.tensor([[10.0, 3.0], [7.0, 9.0]]),
        torch.tensor([0.0, 1.0]),
        0.5,
    )
    assert targets.tolist() == [1 + 0.5 * 3, 1]


def test_values_of_a_problem_with_two_states():
    """Double DQN finds the values of a problem with two states, which are known for a discount of 0.5.

    In state 0, action 0 stays and pays 1, and action 1 leads to state 1. In state 1, action 0 pays 5 and ends the
    episode, and action 1 leads back to state 0.
    """
    expected = torch.tensor([[1 + 0.5 * 2.5, 0.5 * 5], [5, 0.5 * 2.5]])
    q, frozen = torch.zeros(2, 2), torch.zeros(2, 2)
    state, action = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    rewards, following, ends = torch.tensor([1.0, 0, 5, 0]), torch.tensor([0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 0])
    for step in range(200):
        if step % 5 == 0:
            frozen = q.clone()
        q[state, action] += 0.5 * (
            double_dqn_targets(rewards, q[following], frozen[following], ends, 0.5) - q[state, action]
        )
    torch.testing.assert_close(q, expected, atol=1e-3, rtol=0)


def test_the_network_is_that_of_the_paper():
    network = QNetwork(4, 6)
    assert sum(p.numel() for p in network.parameters()) == 1_687_206  # with the six actions of Space Invaders
    frames = torch.randint(256, (2, 4, SIZE, SIZE), dtype=torch.uint8)
    assert network(frames).shape == (2, 6) and network(frames).dtype == torch.float32
    assert network.greedy(frames.numpy()).tolist() == network(frames).argmax(1).tolist()


def test_a_resumed_run_is_the_same_bit_for_bit_if_it_keeps_its_memory(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(
        ALGORITHM, SMALL + " --keep_replay true", tmp_path, 48, 24
    )
    assert same(straight, resumed) and straight[0]["learning_steps"] == 16


@pytest.mark.faults
def test_without_its_memory_a_resumed_run_fills_it_anew(tmp_path, without_processes):
    straight, resumed = states_of_a_straight_and_a_resumed_run(
        ALGORITHM, SMALL + " --keep_replay false", tmp_path, 48, 24
    )
    assert (
        resumed[0]["global_step"] == straight[0]["global_step"] == 48
        and resumed[0]["learning_steps"] == straight[0]["learning_steps"]
    )
    assert len(resumed[1]) == 2 and not same(straight[0]["model"], resumed[0]["model"]) and "replay" not in resumed[0]


def test_the_frozen_copy_is_renewed(monkeypatch):
    dqn = ALGORITHM.build(constants(NUM_ENVS=2, REPLAY_SIZE=100, BURN_IN=40, SYNC_EVERY=3, BATCH_SIZE=4, DEVICE="cpu"))
    while not len(dqn.replay):
        dqn.act()
    same_weights = []
    for _ in range(6):
        dqn.learning_step()
        same_weights.append(all(torch.equal(a, b) for a, b in zip(dqn.policy.parameters(), dqn.target.parameters())))
    assert same_weights == [False, False, True] * 2


class NoFloat64(TorchDispatchMode):
    """Fail for every float64 tensor that is made: Apple's GPUs have none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        assert not any(getattr(x, "dtype", None) == torch.float64 for x in tree_leaves(made)), function
        return made


def test_apples_gpus_have_what_a_learning_step_needs():
    """No such GPU is needed for the test: the step makes no float64, and PyTorch has fused Adam and autocast there."""
    dqn = ALGORITHM.build(constants(NUM_ENVS=2, REPLAY_SIZE=100, BURN_IN=40, BATCH_SIZE=4, DEVICE="cpu"))
    while not len(dqn.replay):
        dqn.act()
    with NoFloat64():
        dqn.learning_step()
        dqn.policy.greedy(dqn.stacks.frames)
        with pytest.raises(AssertionError):
            torch.zeros(1).double()
    assert "mps" in _get_fused_kernels_supported_devices()
    with torch.autocast("mps", torch.bfloat16, enabled=False):
        assert not has_bf16(torch.device("mps"))


def test_an_end_of_epsilon_above_its_start_is_refused():
    with pytest.raises(CommandLineError, match="EPSILON_END 0.1 must not exceed EPSILON 0.05"):
        run(ALGORITHM, "--epsilon", 0.05)


def test_epsilon_falls_to_its_end():
    dqn = ALGORITHM.build(
        constants(NUM_ENVS=1, REPLAY_SIZE=100, EPSILON=1.0, EPSILON_END=0.1, EPSILON_DECAY=0.9, DEVICE="cpu")
    )
    epsilons = []
    for dqn.global_step in (0, 1, 2, 100):
        epsilons.append(dqn.epsilon)
    assert epsilons == pytest.approx([1, 0.9, 0.81, 0.1])


def test_an_evaluation_counts_the_games_that_were_begun_first(tmp_path):
    state = {
        "constants": {**ALGORITHM.constants, "ENV_ID": "ALE/SpaceInvaders-v5", "STACK": 4, "ACTIONS": ""},
        "model": QNetwork(4, 6).state_dict(),
    }
    result = evaluate(state, episodes=2, seed=0)
    assert result["games"] == 2 and 0 <= result["min"] <= result["score"] <= result["max"] and result["min"] % 5 == 0


def test_bad_input(tmp_path):
    for words, message in (
        ("--num_envs 6 --replay_size 10", "too small for 6 games"),
        ("--env_id ALE/Nope-v5", "ALE/Nope-v5"),
        ("--epsilon 2", r"EPSILON .* must be a number in \[0.0, 1.0\]"),
        ("--device tpu", "does not work here"),
    ):
        with pytest.raises(ValueError, match=message):
            run(ALGORITHM, *words.split(), "--run_dir", str(tmp_path / "run"))


@pytest.mark.parametrize(
    "words, lower",
    [
        ("--replay_size 1000000", "lower --replay_size in a new run"),
        ("--replay_size 300000 --keep_replay true", "leave --keep_replay out, or lower --replay_size"),
    ],
)
def test_a_memory_that_does_not_fit_is_named(tmp_path, monkeypatch, words, lower):
    monkeypatch.setattr(supervise, "free_memory", lambda device: 7e9)
    with pytest.raises(
        CommandLineError,
        match=f"^a replay memory of this size needs .* GB or more, and cpu has 7.0 GB free, .*; {lower}",
    ):
        run(ALGORITHM, *words.split(), "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
