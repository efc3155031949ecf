"""What a GPU would do, here on the CPU: the self-test catches what it is for, what fails is left out, and both steps can be recorded.

Stand-ins: the device loop runs on the CPU, and a tape of aten calls takes the place of CUDA graphs (software_graph.py).
"""

import contextlib
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import device_trainer, make_gpt
from software_graph import Tape, tensors, use_software_graphs

from breakout_ascii import BreakoutAsciiVec, Games
from callbacks import Callback
from fast import FastGPT, GPURunner, attention_tables, gpu_checks, gpu_training, shared_prefixes
from fast.cuda_graphs import BF16, COMPILE, GRAPHS, Compiled, GraphRunner, ShortcutFailed
from fast.gpu_checks import check_games, check_prefixes, check_update, set_rare_cases
from fast.gpu_games import TensorGames
from fast.gpu_gpt import DeviceGPT
from harness import supervise
from harness.checkpoint import load_checkpoint, to_plain
from harness.device import GPUError
from ppo import PPO

CONFIG = dict(num_envs=8, rollout_steps=6, batch_size=8, epochs=1, num_steps=2 * 48)


def checked(shortcuts=(), **changes):
    """-> a training that checks itself, with a snapshot to start from."""
    ppo = device_trainer(runner=GPURunner(shortcuts), **CONFIG | changes)
    ppo.keep_snapshot()
    return ppo


def failing(checks):
    return {check.name[0] for check in checks if not check.passed}


def checks_of_one_update(ppo):
    return check_update(ppo, update(ppo))


def update(ppo):
    """-> the state before it"""
    before = to_plain(ppo.state_dict())
    ppo.collect()
    ppo.update()
    return before


# The self-test


def test_all_checks_pass_and_leave_the_training_as_it_is():
    ours, plain = checked(), device_trainer(**CONFIG)
    ours.learn()
    plain.learn()
    checks = ours.runner.checks
    assert {check.name[0] for check in checks} == set("ABCD") and failing(checks) == set()
    assert (
        torch.equal(ours.weights, plain.weights)
        and torch.equal(ours.obs, plain.obs)
        and ours.global_step == plain.global_step
    )


def test_the_rare_cases_happen():
    ppo = device_trainer(**CONFIG | {"num_envs": 64})
    state = set_rare_cases(ppo)
    ppo.collect()
    games, fields = ppo.env.games, ppo.buffer.fields
    assert check_games(ppo, state).passed
    ended = (fields["terminated"] & ~fields["has_next"]).nonzero().tolist()
    assert [1, 0] in ended and [0, 1] in ended and fields["rewards"][0, 1] == 60  # the ball falls, the brick is hit
    assert games.elapsed[2] == CONFIG["rollout_steps"] and games.elapsed[3] > 5000  # too long, and not yet
    assert (
        {-1, 1} == set(games.dx[4::8].tolist()) == set(games.dx[5::8].tolist())
    )  # either half of the paddle, as it moved


def always_bounce_left(self):
    """Paddles send every ball to the left."""
    hit = (self.ball_y == 22) & (self.ball_x >= self.paddle_x) & (self.ball_x < self.paddle_x + 7) & (self.lives > 0)
    self.ball_y, self.dy, self.dx = (
        torch.where(hit, x, y) for x, y in ((21, self.ball_y), (-1, self.dy), (-1, self.dx))
    )


def no_points_for_the_last_brick(self):
    reward, brick = Games.break_bricks(self)
    return torch.where(self.bricks_left == 0, 0, reward), brick


@pytest.mark.parametrize(
    "rule, wrong",
    [
        ("bounce_off_paddles", always_bounce_left),
        ("break_bricks", no_points_for_the_last_brick),
        ("bounce_off_walls", lambda self: None),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch, rule, wrong):
    monkeypatch.setattr(TensorGames, rule, wrong)
    ppo = device_trainer(**CONFIG | {"num_envs": 64})
    state = set_rare_cases(ppo)
    ppo.collect()
    assert not check_games(ppo, state).passed


@pytest.mark.parametrize("rule", ["truncated one step late", "paired with others"])
def test_a_wrong_start_of_a_rollout_is_caught(monkeypatch, rule):
    ppo = device_trainer(**CONFIG | {"num_envs": 64})
    state = set_rare_cases(ppo)
    if rule == "paired with others":
        monkeypatch.setattr(ppo.env, "pair", ppo.env.observation)
    else:
        ppo.env.max_episode_steps += 1
    ppo.collect()
    ppo.env.max_episode_steps = 5000
    assert not check_games(ppo, state).passed


def test_a_stale_page_is_caught(monkeypatch):
    draw, calls = TensorGames.draw, []
    skipped = 9, 10  # both of one step
    for name in ("draw", "redraw"):
        monkeypatch.setattr(
            TensorGames, name, lambda self, *args: calls.append(0) or (None if len(calls) in skipped else draw(self))
        )
    assert "A" in failing(checks_of_one_update(device_trainer(**CONFIG)))


def test_a_step_that_ran_twice_is_caught():
    ppo = device_trainer(**CONFIG)
    rollout_step, train_step, calls = ppo.rollout_step, ppo.train_step, []

    def third_twice():
        calls.append(0)
        rollout_step()
        if len(calls) == 3:
            ppo.buffer.position -= 1
            rollout_step()

    ppo.rollout_step = third_twice
    assert failing(checks_of_one_update(ppo)) == {"A"}
    before = update(ppo)
    ppo.train_step = lambda: (train_step(), ppo.buffer.minibatch_position.sub_(1), train_step())
    assert "D" in failing(check_update(ppo, before))


def round_to_tf32(x):
    """To 10 bits, as tensor cores do."""
    return ((x.detach().view(torch.int32) + 4096) & ~8191).view(torch.float32) + (x - x.detach())


def test_rounding_to_tf32_is_caught(monkeypatch):
    table = attention_tables.pair_table
    monkeypatch.setattr("fast.gpu_gpt.pair_table", lambda gpt: tuple(map(round_to_tf32, table(gpt))))
    assert {"B", "C"} <= failing(checks_of_one_update(device_trainer(**CONFIG)))


def test_a_learning_rate_that_was_baked_in_is_caught(monkeypatch):
    """A graph replays Python numbers as they were."""
    use_software_graphs(monkeypatch)
    ppo = checked([GRAPHS])
    step = ppo.optimizer.step

    def baked_in():
        ppo.optimizer.param_groups[0]["lr"] = ppo.lr.item()
        step()

    ppo.optimizer.step = baked_in
    with pytest.warns(UserWarning, match="D weights, lr halved.*going on without CUDA graphs"):
        ppo.learn()
    plain = device_trainer(**CONFIG)
    plain.learn()
    torch.testing.assert_close(ppo.weights, plain.weights)  # the learning rate in float32 and in float64


def test_a_wrong_mask_of_what_follows_is_caught():
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.fields["has_next"].logical_not_()
    assert "A" in failing(check_update(ppo, before))


def test_a_wrong_advantage_is_caught():
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.samples.advantages[5] += 1e-3
    assert failing(check_update(ppo, before)) == {"B"}


def test_pages_of_other_samples_are_caught():
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    pages = ppo.buffer.minibatches.obs.pages
    pages[0, 0], pages[0, 1] = pages[0, 1].clone(), pages[0, 0].clone()
    assert failing(check_update(ppo, before)) == {"C"}


def test_nan_does_not_pass():
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.fields["values"][0] = torch.nan
    assert "B" in failing(check_update(ppo, before))
    gpt = deep_gpt()
    with torch.no_grad():
        gpt.blocks[1].mlp.c_fc.weight[0] = torch.nan
    assert not any(check.passed for check in check_prefixes(gpt))


def deep_gpt():
    gpt = make_gpt(kind=FastGPT, n_layer=2, n_head=2, n_embd=16)
    gpt.bf16 = True
    return gpt


def test_prefixes_in_bf16_pass():
    assert failing(check_prefixes(deep_gpt())) == set()


def test_a_wrong_attention_mask_is_caught(monkeypatch):
    """Each query of a chunk sees the keys from its start up to its own place: aligned to the wrong corner."""

    def upper_left(q, kv, n_head):
        heads = lambda z: z.unflatten(2, (n_head, -1)).transpose(1, 2)
        k, v = kv.chunk(2, dim=2)
        y = torch.nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        return y.transpose(1, 2).flatten(2)

    monkeypatch.setattr(shared_prefixes, "lower_right_attention", upper_left)
    assert failing(check_prefixes(deep_gpt())) == {"E"}


def test_a_gradient_that_misses_a_level_is_caught(monkeypatch):
    backward = shared_prefixes.Paths.backward
    missing = lambda ctx, *gradients: backward(ctx, *(d * (i != 7) for i, d in enumerate(gradients)))
    monkeypatch.setattr(shared_prefixes.Paths, "backward", staticmethod(missing))
    checks = check_prefixes(deep_gpt())
    assert [check.name for check in checks if not check.passed] == ["E gradient of each parameter, 1 - cosine"]


# What fails is left out


def test_graphs_replay_what_eager_steps_do(monkeypatch):
    tapes = use_software_graphs(monkeypatch)
    ours, plain = checked([GRAPHS]), device_trainer(**CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.learn()
    plain.learn()
    assert len(tapes) == 2 and isinstance(ours.runner.train_step, GraphRunner) and failing(ours.runner.checks) == set()
    assert torch.equal(ours.weights, plain.weights) and torch.equal(ours.obs, plain.obs)
    for name, x in plain.buffer.fields.items():
        assert torch.equal(ours.buffer.fields[name], x), name


def test_a_graph_is_recorded_and_checked_again_when_its_tensors_have_moved(monkeypatch):
    tapes, checks = use_software_graphs(monkeypatch), []
    monkeypatch.setattr(gpu_training, "check_update", lambda *args: checks.append(0) or check_update(*args))
    ours, plain = checked([GRAPHS], num_steps=48), device_trainer(**CONFIG)
    ours.learn()
    assert (len(tapes), len(checks)) == (2, 1)
    ours.policy.capacity *= 2
    ours.config.num_steps = plain.config.num_steps
    ours.learn()
    assert (len(tapes), len(checks)) == (3, 2) and failing(ours.runner.checks) == set()


def test_a_recording_that_fails_is_named_and_never_tried_again(monkeypatch):
    use_software_graphs(monkeypatch)
    draw, recorded, recording_now = TensorGames.draw, [], []

    @contextlib.contextmanager
    def recording(graph, stream):
        recorded.append(0)
        recording_now.append(0)
        with Tape() as tape:
            try:
                yield
            except RuntimeError:
                tape.undo()
                raise RuntimeError("operation failed due to a previous error during capture") from None
            finally:
                recording_now.clear()

    monkeypatch.setattr(torch.cuda, "graph", recording)
    # half-way through a step, when the games have moved already
    monkeypatch.setattr(
        TensorGames, "redraw", lambda self, *args: fail_as_if_the_host_waited() if recording_now else draw(self)
    )
    ours, plain = checked([GRAPHS]), device_trainer(**CONFIG)
    with pytest.warns(UserWarning, match="^the host must not wait; going on without CUDA graphs$"):
        ours.learn()
    plain.learn()
    assert (
        len(recorded) == 1
        and torch.equal(ours.weights, plain.weights)
        and torch.equal(ours.env.games.pages, plain.env.games.pages)
    )


def fail_as_if_the_host_waited(*_):
    raise RuntimeError("the host must not wait\nand more")


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    """Compilation fails in the second step of the rollout, when the games have moved already."""

    def compiler(function, fullgraph):
        def compiled(*args):
            function(*args)
            raise RuntimeError("no compiler\nat all")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    ours, plain = checked([COMPILE]), device_trainer(**CONFIG)
    with pytest.warns(UserWarning, match="^no compiler; going on without torch.compile$"):
        ours.learn()
    plain.learn()
    assert torch.equal(ours.weights, plain.weights) and not isinstance(ours.runner.loss, Compiled)


def test_a_backward_pass_that_cannot_be_compiled_is_blamed_on_the_compiler(monkeypatch):
    """It is compiled when it first runs, and not with the loss."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no Triton")

    def compiler(function, fullgraph):
        return lambda *args: (Broken.apply(function(*args)[0]), function(*args)[1]) if args else function()

    monkeypatch.setattr(torch, "compile", compiler)
    ours, plain = checked([COMPILE]), device_trainer(**CONFIG)
    with pytest.warns(UserWarning, match="^no Triton; going on without torch.compile$"):
        ours.learn()
    plain.learn()
    assert torch.equal(ours.weights, plain.weights)


def test_a_rollout_that_is_not_finite_is_blamed_on_the_compiler(monkeypatch):
    def compiler(function, fullgraph):
        def compiled(*args):
            result = function(*args)
            ours.buffer.fields["logprobs"].fill_(torch.nan)
            return result

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    ours = checked([COMPILE])
    with pytest.warns(UserWarning, match="^the logits are not finite.*going on without torch.compile$"):
        ours.learn()
    assert ours.update_count == 2


@pytest.mark.slow
def test_what_torch_compiles_is_right():
    """With its compiler for CPUs."""
    ours, plain = checked([COMPILE]), device_trainer(**CONFIG)
    ours.learn()
    plain.learn()
    assert isinstance(ours.runner.loss, Compiled) and failing(ours.runner.checks) == set()
    assert torch.equal(ours.obs, plain.obs)
    torch.testing.assert_close(ours.weights, plain.weights)


def test_a_deeper_model_goes_on_without_a_compiler(monkeypatch):
    def compiler(function, dynamic):
        return lambda *args: fail_as_if_the_host_waited()

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(
        shared_prefixes, "compiled", shared_prefixes.compiled.__wrapped__
    )  # what other tests have compiled
    config = device_trainer(num_steps=8, rollout_steps=2, batch_size=4, paired_envs=False, prediction_coef=0.0).config
    ppo = PPO(
        make_gpt(kind=FastGPT, n_layer=2, n_head=2, n_embd=8),
        BreakoutAsciiVec(2),
        config,
        runner=GPURunner([COMPILE, BF16]),
    )
    with pytest.warns(UserWarning, match="^the host must not wait; going on without torch.compile$"):
        ppo.learn()
    assert (ppo.policy.compile_blocks, ppo.policy.bf16) == (False, True) and ppo.update_count == 2
    assert failing(ppo.runner.checks) == set() and {check.name[0] for check in ppo.runner.checks} == {"D", "E"}


def test_a_deeper_model_goes_on_without_bfloat16(monkeypatch):
    """Where its rounding is more than what is allowed."""
    monkeypatch.setattr(gpu_checks, "BF16_MARGIN", 0)
    config = device_trainer(num_steps=4, rollout_steps=2, batch_size=4, paired_envs=False, prediction_coef=0.0).config
    ppo = PPO(
        make_gpt(kind=FastGPT, n_layer=2, n_head=2, n_embd=8), BreakoutAsciiVec(2), config, runner=GPURunner([BF16])
    )
    with pytest.warns(UserWarning, match="^wrong results on cpu.*E every token.*going on without bfloat16$"):
        ppo.learn()
    assert not ppo.policy.bf16 and ppo.update_count == 1


def test_lack_of_memory_is_not_blamed_on_a_shortcut(monkeypatch):
    def compiler(function, fullgraph):
        def compiled(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(torch.OutOfMemoryError):
        checked([COMPILE]).learn()


def test_gives_up_where_nothing_is_right(monkeypatch):
    use_software_graphs(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    monkeypatch.setattr(TensorGames, "bounce_off_walls", lambda self: None)
    ppo = checked([GRAPHS, COMPILE], num_envs=32)
    with (
        pytest.warns(UserWarning) as warned,
        pytest.raises(GPUError, match=r"^wrong results on cpu, torch 2.*\(A games .*: error \d+"),
    ):
        ppo.learn()
    assert [str(w.message).split("; ")[-1] for w in warned] == [
        f"going on without {name}" for name in (GRAPHS, COMPILE)
    ]


def test_a_gpu_that_has_failed_is_told_from_a_defect(monkeypatch):
    ppo = checked()
    monkeypatch.setattr(ppo.runner, "unchecked_update", fail_as_if_the_host_waited)
    with pytest.raises(RuntimeError, match="the host must not wait") as error:
        ppo.learn()
    assert not isinstance(error.value, GPUError)
    monkeypatch.setattr(gpu_training, "works", lambda device: False)
    with pytest.raises(GPUError, match=r"the GPU has stopped working \(the host must not wait\)$"):
        ppo.learn()
    monkeypatch.setattr(ppo.runner, "unchecked_update", Compiled(fail_as_if_the_host_waited, backend="eager"))
    with pytest.raises(GPUError, match="the GPU has stopped working"):  # although a shortcut seems to be to blame
        ppo.learn()


def test_numbers_that_are_not_finite_blame_a_gpu_that_nothing_is_known_of(monkeypatch):
    ppo = checked()
    with torch.no_grad():
        ppo.policy.value_head.weight.fill_(torch.inf)
    with pytest.raises(GPUError, match="not finite"):
        ppo.learn()


def test_amd_records_no_graphs_and_several_ranks_take_no_shortcut(monkeypatch):
    ppo = device_trainer()
    assert gpu_training.shortcuts_for(ppo) == [GRAPHS, COMPILE]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_training.shortcuts_for(ppo) == [COMPILE]
    ppo.ranks = 2
    assert gpu_training.shortcuts_for(ppo) == []


def test_a_run_goes_on_with_the_cpu_in_a_fresh_process(monkeypatch, tmp_path, capsys):
    """The state before the update that failed is saved, callbacks are closed, and the command is that of a resume."""
    started, closed = [], []

    class Process:
        def __init__(self, command, env):
            started.append((command, list(closed)))

        def wait(self):
            return 7

    class Closed(Callback):
        def close(self):
            closed.append(0)

    ppo = checked()
    ppo.callbacks = [Closed()]
    ppo.metadata = {"constants": {}}
    ppo.collect_and_update = fail_for_good
    monkeypatch.setattr(supervise.subprocess, "Popen", Process)
    monkeypatch.setattr(supervise.signal, "signal", lambda signum, handler: None)
    assert supervise.train(ppo, tmp_path, "train_ppo.py", {}) == 7
    assert started == [
        (
            [
                sys.executable,
                str(supervise.ROOT / "train_ppo.py"),
                f"--resume={tmp_path}",
                "--device",
                "cpu",
            ],
            [0],
        )
    ]
    assert load_checkpoint(tmp_path)["update_count"] == 0
    assert (
        f"stopped working; going on with: python train_ppo.py --resume {tmp_path} --device cpu"
        in capsys.readouterr().err
    )


def fail_for_good():
    raise GPUError("the GPU has stopped working")


# What can be recorded


def test_nothing_that_a_graph_cannot_hold_is_in_either_step(monkeypatch):
    """No number that the host reads, no random number, no list of indices whose length depends on the data, no tensor made of Python's
    numbers, which would be copied from the host."""
    tapes = use_software_graphs(monkeypatch)
    forbidden = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    checked([GRAPHS]).learn()
    assert len(tapes) == 2 and all(len(tape.calls) > 100 for tape in tapes)
    for tape in tapes:
        for function, args, kwargs, _ in tape.calls:
            assert not forbidden & set(function.tags) and "lift_fresh" not in str(function), function
            indices = args[1] if "aten.index" in str(function) and isinstance(args[1], list) else []
            assert all(i is None or i.dtype in (torch.int32, torch.int64) for i in indices), (
                function
            )  # of masks the host would count


def test_neither_step_touches_the_host():
    """On the meta device, whose tensors hold nothing: whatever asks for a value, or mixes devices, fails."""
    real, ppo = device_trainer(), device_trainer()
    real.collect()
    real.epoch()
    meta = torch.device("meta")
    move = lambda x: x.to(meta) if isinstance(x, torch.Tensor) else type(x)(*map(move, x))
    for name in ("obs", "noise", "in_sync", "lr"):
        setattr(ppo, name, move(getattr(ppo, name)))
    ppo.device = ppo.env.device = meta
    games = ppo.env.games = TensorGames(4, meta)
    ppo.env.numbers, ppo.env.played = move(real.env.numbers), move(ppo.env.played)
    gpt = DeviceGPT(real.policy.config).to(meta)
    ppo.policy, ppo.weights = gpt, torch.nn.Parameter(move(ppo.weights.detach()))
    ppo.weights.grad = torch.zeros_like(ppo.weights)
    ppo.optimizer = SimpleNamespace(step=lambda: None)  # torch's own
    ppo.act = gpt.inference_function()
    ppo.buffer.position, ppo.buffer.minibatch_position = move(ppo.buffer.position), move(ppo.buffer.minibatch_position)
    with Tape() as tape:
        ppo.rollout_step()
        ppo.rollout_step()
        ppo.buffer.minibatches = move(real.buffer.minibatches)
        ppo.train_step()
    assert {name: x.shape for name, x in ppo.buffer.fields.items()} == {
        name: x.shape for name, x in real.buffer.fields.items()
    }
    assert games.pages is games.buffers["pages"]
    made_here = [
        x
        for function, args, kwargs, _ in tape.calls
        if "_to_copy" not in str(function)
        for x in tensors((args, kwargs))
    ]
    assert len(made_here) > 100 and {x.device.type for x in made_here} == {"meta"}


# Runners


def test_what_a_compiled_function_raises():
    function = Compiled(lambda x: 1 / x, plain_calls=1, backend=lambda graph, inputs: graph)
    with pytest.raises(ZeroDivisionError):
        function(0)
    with pytest.raises(ShortcutFailed) as error:
        function(0)
    assert error.value.shortcut == COMPILE
