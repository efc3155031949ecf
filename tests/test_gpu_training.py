"""Training on a GPU: checks catch wrong results, a shortcut that fails is left out, and both steps can be recorded.

All of it runs on the CPU here. A tape of aten calls takes the place of CUDA graphs (software_graph.py).
"""

import contextlib
import dataclasses
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import device_trainer, make_gpt, one_game
from software_graph import Tape, tensors, use_software_graphs

from breakout_ascii import BreakoutAsciiVec, Games
from callbacks import Callback
from fast import FastGPT, GPURunner, attention_tables, gpu_checks, gpu_training, shared_prefixes
from fast.cuda_graphs import BF16, COMPILE, GRAPHS, Compiled, GraphRunner, ShortcutFailed
from fast.gpu_checks import check_games, check_prefixes, check_update, set_rare_cases
from fast.gpu_games import TensorGames
from fast.gpu_gpt import DeviceGPT
from games.game import load_game
from harness import supervise
from harness.checkpoint import load_checkpoint, to_plain
from harness.device import GPUError
from ppo import PPO

CONFIG = dict(num_envs=8, rollout_steps=6, batch_size=8, epochs=1, num_steps=2 * 48)


def checked(shortcuts=(), **changes):
    """Return a PPO that checks itself and has a snapshot to go back to."""
    ppo = device_trainer(runner=GPURunner(shortcuts), **CONFIG | changes)
    ppo.keep_snapshot()
    return ppo


def learned(**changes):
    """Return a PPO without shortcuts and checks that has learned."""
    ppo = device_trainer(**CONFIG | changes)
    ppo.learn()
    return ppo


@pytest.fixture(scope="module")
def plain():
    """A PPO that has learned without shortcuts and checks, to compare with."""
    return learned()


def failing(checks):
    """Return the letters of the checks that have failed."""
    return {check.name[0] for check in checks if not check.passed}


def update(ppo):
    """Make one update, and return the state before it."""
    before = to_plain(ppo.state_dict())
    ppo.collect()
    ppo.update()
    return before


def failing_of_one_update(ppo):
    return failing(check_update(ppo, update(ppo)))


# --- checks -----------------------------------------------------------------------------------------------------------


def test_all_checks_pass_and_leave_the_training_as_it_is(plain):
    """A training that checks itself learns what one without checks learns."""
    ours = checked()
    ours.learn()
    checks = ours.runner.checks
    assert {check.name[0] for check in checks} == set("ABCD") and failing(checks) == set()
    assert torch.equal(ours.weights, plain.weights) and torch.equal(ours.obs, plain.obs)
    assert ours.global_step == plain.global_step


def play_rare_cases():
    """Collect a rollout that begins with the rare cases. Return the PPO, and the games' state before it."""
    ppo = device_trainer(**CONFIG | {"num_envs": 64})
    state = set_rare_cases(ppo)
    ppo.collect()
    return ppo, state


def test_the_rare_cases_happen():
    """The checks of the rules see every rule at work within one rollout."""
    ppo, state = play_rare_cases()
    games, fields = ppo.env.games, ppo.buffer.fields
    assert check_games(ppo, state).passed
    # One ball falls, and another hits the last brick.
    ended = (fields["terminated"] & ~fields["has_next"]).nonzero().tolist()
    assert [1, 0] in ended and [0, 1] in ended and fields["rewards"][0, 1] == 60
    # Games are truncated when a rollout starts: one was too long then, and the other not yet.
    assert games.elapsed[2] == CONFIG["rollout_steps"] and games.elapsed[3] > 5000
    # Balls hit either half of a paddle, depending on how it has moved.
    assert {-1, 1} == set(games.dx[4::8].tolist()) == set(games.dx[5::8].tolist())


def always_bounce_left(self):
    """A wrong rule: paddles send every ball to the left."""
    hit = (self.ball_y == 22) & (self.ball_x >= self.paddle_x) & (self.ball_x < self.paddle_x + 7) & (self.lives > 0)
    self.ball_y = torch.where(hit, 21, self.ball_y)
    self.dy = torch.where(hit, -1, self.dy)
    self.dx = torch.where(hit, -1, self.dx)


def no_points_for_the_last_brick(self):
    """A wrong rule."""
    reward, brick = Games.break_bricks(self)
    return torch.where(self.bricks_left == 0, 0, reward), brick


def pass_walls(self):
    """A wrong rule: walls do nothing."""


# fmt: off
@pytest.mark.parametrize("rule, wrong", [
    ("bounce_off_paddles", always_bounce_left),
    ("break_bricks", no_points_for_the_last_brick),
    ("bounce_off_walls", pass_walls),
])
# fmt: on
def test_a_wrong_rule_is_caught(monkeypatch, rule, wrong):
    """The games on the GPU are compared with those in NumPy, step by step."""
    monkeypatch.setattr(TensorGames, rule, wrong)
    ppo, state = play_rare_cases()
    assert not check_games(ppo, state).passed


@pytest.mark.parametrize("wrong", ["truncated one step late", "paired with others"])
def test_a_wrong_start_of_a_rollout_is_caught(monkeypatch, wrong):
    """When a rollout starts, long games are truncated and all are paired; both are checked."""
    ppo = device_trainer(**CONFIG | {"num_envs": 64})
    state = set_rare_cases(ppo)
    if wrong == "paired with others":
        monkeypatch.setattr(ppo.env, "pair", ppo.env.observation)
    else:
        ppo.env.max_episode_steps += 1
    ppo.collect()
    ppo.env.max_episode_steps = 5000
    assert not check_games(ppo, state).passed


def test_a_stale_page_is_caught(monkeypatch):
    """A page that was not drawn in one step shows the state before it."""
    draw, calls = TensorGames.draw, 0

    def draw_most(self, *args):
        nonlocal calls
        calls += 1
        if calls not in (9, 10):  # both calls of one step
            draw(self)

    for name in ("draw", "redraw"):
        monkeypatch.setattr(TensorGames, name, draw_most)
    assert "A" in failing_of_one_update(device_trainer(**CONFIG))


def test_a_step_that_ran_twice_is_caught():
    """No step of a rollout or of the optimizer may be repeated, as by a warm-up that is not undone."""
    ppo = device_trainer(**CONFIG)
    rollout_step, train_step, calls = ppo.rollout_step, ppo.train_step, 0

    def third_step_twice():
        nonlocal calls
        calls += 1
        rollout_step()
        if calls == 3:
            ppo.buffer.position -= 1
            rollout_step()

    def every_step_twice():
        train_step()
        ppo.buffer.minibatch_position -= 1
        train_step()

    ppo.rollout_step = third_step_twice
    assert failing_of_one_update(ppo) == {"A"}
    before = update(ppo)
    ppo.train_step = every_step_twice
    assert "D" in failing(check_update(ppo, before))


def round_to_tf32(x):
    """Round to 10 bits, as tensor cores do, and pass gradients on."""
    rounded = ((x.detach().view(torch.int32) + 4096) & ~8191).view(torch.float32)
    return rounded + (x - x.detach())


def test_rounding_to_tf32_is_caught(monkeypatch):
    """A library that uses tensor cores for float32 in silence would be less exact than the training assumes."""
    table = attention_tables.pair_table
    monkeypatch.setattr("fast.gpu_gpt.pair_table", lambda *args: tuple(map(round_to_tf32, table(*args))))
    assert {"B", "C"} <= failing_of_one_update(device_trainer(**CONFIG))


def test_a_learning_rate_that_was_baked_in_is_caught(monkeypatch, plain):
    """A graph replays Python numbers as they were, so a learning rate must be a tensor."""
    use_software_graphs(monkeypatch)
    ppo = checked([GRAPHS])
    step = ppo.optimizer.step

    def baked_in():
        ppo.optimizer.param_groups[0]["lr"] = ppo.lr.item()
        step()

    ppo.optimizer.step = baked_in
    with pytest.warns(UserWarning, match="D weights, lr halved.*going on without CUDA graphs"):
        ppo.learn()
    # Not equal, because one learning rate is a float32 and the other a Python float.
    torch.testing.assert_close(ppo.weights, plain.weights)


def test_a_wrong_mask_of_what_follows_is_caught():
    """`has_next` says which pages are followed by one of the same episode."""
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.fields["has_next"].logical_not_()
    assert "A" in failing(check_update(ppo, before))


def test_a_wrong_advantage_is_caught():
    """It is enough that one of them is off by a thousandth."""
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.samples.advantages[5] += 1e-3
    assert failing(check_update(ppo, before)) == {"B"}


def test_pages_of_other_samples_are_caught():
    """The pages of a minibatch must belong to its actions."""
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    pages = ppo.buffer.minibatches.obs.pages
    pages[0, 0], pages[0, 1] = pages[0, 1].clone(), pages[0, 0].clone()
    assert failing(check_update(ppo, before)) == {"C"}


def test_nan_does_not_pass():
    """NaN compares as false with every tolerance, so a check must ask whether the error is small, not large."""
    ppo = device_trainer(**CONFIG)
    before = update(ppo)
    ppo.buffer.fields["values"][0] = torch.nan
    assert "B" in failing(check_update(ppo, before))
    gpt = deep_gpt()
    with torch.no_grad():
        gpt.blocks[1].mlp.c_fc.weight[0] = torch.nan
    assert not any(check.passed for check in check_prefixes(gpt, one_game()[:4]))


def deep_gpt():
    """Return a GPT of two layers that computes in bfloat16."""
    gpt = make_gpt(kind=FastGPT, n_layer=2, n_head=2, n_embd=16)
    gpt.bf16 = True
    return gpt


def test_prefixes_in_bf16_pass():
    """The rounding of bfloat16 stays within what the check allows."""
    assert failing(check_prefixes(deep_gpt(), one_game()[:4])) == set()


def test_a_wrong_attention_mask_is_caught(monkeypatch):
    """If queries and keys are aligned at their starts instead of their ends, a query sees too few keys."""

    def upper_left(q, kv, n_head):
        q, k, v = (x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=2)))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)

    monkeypatch.setattr(shared_prefixes, "lower_right_attention", upper_left)
    assert failing(check_prefixes(deep_gpt(), one_game()[:4])) == {"E"}


def test_a_gradient_that_misses_a_level_is_caught(monkeypatch):
    """Every prefix must add its part to the gradients."""
    backward = shared_prefixes.Paths.backward

    def missing(ctx, *gradients):
        return backward(ctx, *(d * (i != 7) for i, d in enumerate(gradients)))

    monkeypatch.setattr(shared_prefixes.Paths, "backward", staticmethod(missing))
    checks = check_prefixes(deep_gpt(), one_game()[:4])
    assert [check.name for check in checks if not check.passed] == ["E gradient of each parameter, 1 - cosine"]


# --- a shortcut that fails is left out --------------------------------------------------------------------------------


def test_graphs_replay_what_eager_steps_do(monkeypatch, plain):
    """A training from graphs learns what one without them learns, and nothing warns."""
    tapes = use_software_graphs(monkeypatch)
    ours = checked([GRAPHS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.learn()
    assert len(tapes) == 2 and isinstance(ours.runner.train_step, GraphRunner) and failing(ours.runner.checks) == set()
    assert torch.equal(ours.weights, plain.weights) and torch.equal(ours.obs, plain.obs)
    for name, x in plain.buffer.fields.items():
        assert torch.equal(ours.buffer.fields[name], x), name


def test_rare_cases_are_played_from_the_recorded_graph(monkeypatch):
    """They are checked once, so it has to be with what the training will use."""
    tapes = use_software_graphs(monkeypatch)
    recordings = []

    def noting(ppo):
        recordings.append(len(tapes))
        return set_rare_cases(ppo)

    monkeypatch.setattr(gpu_training, "set_rare_cases", noting)
    ppo = checked([GRAPHS], num_steps=48)
    ppo.learn()
    assert recordings == [1] and "A games in rare cases" in ppo.runner.checks[0].name


@pytest.mark.parametrize("game_id", ["games.catch:Catch-v0", "CliffWalking-v1"])
def test_games_on_the_host_are_checked_too(monkeypatch, game_id):
    """Another game is not played on a GPU. So only the training step is recorded, and all checks but A are made."""
    learned = []
    tapes = use_software_graphs(monkeypatch)
    for runner in (None, GPURunner([GRAPHS])):
        game = load_game(game_id)
        policy = make_gpt(0, DeviceGPT, **game.page_sizes(), n_head=4, n_embd=16)
        config = dataclasses.replace(device_trainer(**CONFIG).config, paired_envs=False, normalize_rewards=True)
        ppo = PPO(policy, game.make_vec(8), config, runner=runner)
        ppo.keep_snapshot()
        ppo.learn()
        learned.append(ppo)
    checks = learned[1].runner.checks
    assert len(tapes) == 1 and {check.name[0] for check in checks} == set("BCD") and failing(checks) == set()
    assert torch.equal(learned[0].weights, learned[1].weights)


def test_a_graph_is_recorded_and_checked_again_when_its_tensors_have_moved(monkeypatch):
    """A graph holds addresses, so one whose tensors have grown is useless."""
    tapes, checks = use_software_graphs(monkeypatch), 0

    def counting(*args):
        nonlocal checks
        checks += 1
        return check_update(*args)

    monkeypatch.setattr(gpu_training, "check_update", counting)
    ours = checked([GRAPHS], num_steps=48)
    ours.learn()
    assert (len(tapes), checks) == (2, 1)
    ours.policy.capacity *= 2
    ours.config.num_steps = CONFIG["num_steps"]
    ours.learn()
    assert (len(tapes), checks) == (3, 2) and failing(ours.runner.checks) == set()


def test_a_recording_that_fails_is_named_and_never_tried_again(monkeypatch, plain):
    """It fails in the middle of a step, when the games have moved already; the training goes on as if it had not."""
    use_software_graphs(monkeypatch)
    draw, recordings, recording_now = TensorGames.draw, 0, False

    @contextlib.contextmanager
    def recording(graph, stream):
        nonlocal recordings, recording_now
        recordings += 1
        recording_now = True
        with Tape() as tape:
            try:
                yield
            except RuntimeError:
                tape.undo()
                raise RuntimeError("operation failed due to a previous error during capture") from None
            finally:
                recording_now = False

    def redraw(self, *args):
        if recording_now:
            fail_as_if_the_host_waited()
        draw(self)

    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(TensorGames, "redraw", redraw)
    ours = checked([GRAPHS])
    with pytest.warns(UserWarning, match="^the host must not wait; going on without CUDA graphs$"):
        ours.learn()
    assert recordings == 1
    assert torch.equal(ours.weights, plain.weights) and torch.equal(ours.env.games.pages, plain.env.games.pages)


def fail_as_if_the_host_waited(*_):
    raise RuntimeError("the host must not wait\nand more")


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, plain):
    """Compilation fails in the second step of the rollout, when the games have moved already."""

    def compiler(function, fullgraph):
        def compiled(*args):
            function(*args)
            raise RuntimeError("no compiler\nat all")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    ours = checked([COMPILE])
    with pytest.warns(UserWarning, match="^no compiler; going on without torch.compile$"):
        ours.learn()
    assert torch.equal(ours.weights, plain.weights) and not isinstance(ours.runner.loss, Compiled)


def test_a_backward_pass_that_cannot_be_compiled_is_blamed_on_the_compiler(monkeypatch, plain):
    """The backward pass is compiled when it first runs, long after the loss."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no Triton")

    def compiler(function, fullgraph):
        def compiled(*args):
            if not args:  # the rollout step
                return function()
            loss, stats = function(*args)
            return Broken.apply(loss), stats

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    ours = checked([COMPILE])
    with pytest.warns(UserWarning, match="^no Triton; going on without torch.compile$"):
        ours.learn()
    assert torch.equal(ours.weights, plain.weights)


def test_a_rollout_that_is_not_finite_is_blamed_on_the_compiler(monkeypatch):
    """Until the first update is checked, such numbers are a shortcut's fault, and not the learning rate's."""

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
def test_what_torch_compiles_is_right(plain):
    """Its compiler for CPUs gives the same training, except for rounding."""
    ours = checked([COMPILE])
    ours.learn()
    assert isinstance(ours.runner.loss, Compiled) and failing(ours.runner.checks) == set()
    assert torch.equal(ours.obs, plain.obs)
    torch.testing.assert_close(ours.weights, plain.weights)


def deep_ppo(shortcuts, num_steps):
    """Return a PPO with two layers and two games, whose updates have four samples."""
    changes = dict(rollout_steps=2, batch_size=4, paired_envs=False, prediction_coef=0.0)
    config = device_trainer(num_steps=num_steps, **changes).config
    policy = make_gpt(kind=FastGPT, n_layer=2, n_head=2, n_embd=8)
    return PPO(policy, BreakoutAsciiVec(2), config, runner=GPURunner(shortcuts))


def test_a_deeper_model_goes_on_without_a_compiler(monkeypatch):
    """Only the compiled blocks are given up, not bfloat16."""

    def compiler(function, dynamic):
        return fail_as_if_the_host_waited

    monkeypatch.setattr(torch, "compile", compiler)
    # Without the cache, which holds what other tests have compiled.
    monkeypatch.setattr(shared_prefixes, "compiled", shared_prefixes.compiled.__wrapped__)
    ppo = deep_ppo([COMPILE, BF16], num_steps=8)
    with pytest.warns(UserWarning, match="^the host must not wait; going on without torch.compile$"):
        ppo.learn()
    assert (ppo.policy.compile_blocks, ppo.policy.bf16) == (False, True) and ppo.update_count == 2
    assert failing(ppo.runner.checks) == set() and {check.name[0] for check in ppo.runner.checks} == {"D", "E"}


def test_a_deeper_model_goes_on_without_bfloat16(monkeypatch):
    """It is given up where its rounding exceeds what the checks allow."""
    monkeypatch.setattr(gpu_checks, "BF16_MARGIN", 0)
    ppo = deep_ppo([BF16], num_steps=4)
    with pytest.warns(UserWarning, match="^wrong results on cpu.*E every token.*going on without bfloat16$"):
        ppo.learn()
    assert not ppo.policy.bf16 and ppo.update_count == 1


def test_lack_of_memory_is_not_blamed_on_a_shortcut(monkeypatch):
    """The user needs advice on memory then, not a slower training."""

    def compiler(function, fullgraph):
        def compiled(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(torch.OutOfMemoryError):
        checked([COMPILE]).learn()


def test_gives_up_where_nothing_is_right(monkeypatch):
    """Once every shortcut is left out and the results are still wrong, the GPU is to blame."""
    use_software_graphs(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    monkeypatch.setattr(TensorGames, "bounce_off_walls", pass_walls)
    ppo = checked([GRAPHS, COMPILE], num_envs=32)
    wrong = r"^wrong results on cpu, torch 2.*\(A games .*: error \d+"
    with pytest.warns(UserWarning) as warned, pytest.raises(GPUError, match=wrong):
        ppo.learn()
    remarks = [str(warning.message).split("; ")[-1] for warning in warned]
    assert remarks == [f"going on without {name}" for name in (GRAPHS, COMPILE)]


def test_a_gpu_that_has_failed_is_told_from_a_defect(monkeypatch):
    """An error of a GPU that still works is raised as it is; one that has stopped working raises a GPUError."""
    ppo = checked()
    monkeypatch.setattr(ppo.runner, "unchecked_update", fail_as_if_the_host_waited)
    with pytest.raises(RuntimeError, match="the host must not wait") as error:
        ppo.learn()
    assert not isinstance(error.value, GPUError)
    monkeypatch.setattr(gpu_training, "works", lambda device: False)
    with pytest.raises(GPUError, match=r"the GPU has stopped working \(the host must not wait\)$"):
        ppo.learn()
    # This holds even if a shortcut seems to be to blame.
    monkeypatch.setattr(ppo.runner, "unchecked_update", Compiled(fail_as_if_the_host_waited, backend="eager"))
    with pytest.raises(GPUError, match="the GPU has stopped working"):
        ppo.learn()


def test_numbers_that_are_not_finite_are_blamed_on_a_gpu_that_was_not_checked():
    """Until its first update is checked, the GPU is the likely cause, and not the learning rate."""
    ppo = checked()
    with torch.no_grad():
        ppo.policy.value_head.weight.fill_(torch.inf)
    with pytest.raises(GPUError, match="not finite"):
        ppo.learn()


def test_amd_records_no_graphs_and_several_ranks_take_no_shortcut(monkeypatch):
    """Graphs were never recorded on ROCm, and ranks would have to agree on which shortcut had failed."""
    ppo = device_trainer()
    assert gpu_training.shortcuts_for(ppo) == [GRAPHS, COMPILE]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_training.shortcuts_for(ppo) == [COMPILE]
    ppo.ranks = 2
    assert gpu_training.shortcuts_for(ppo) == []


def test_going_back_to_a_snapshot_keeps_the_best_evaluation_and_the_time():
    """A snapshot has its score alone, with which any model of the same score would be the best."""
    ppo = checked()
    ppo.best = best = {"score": 960.0, "varied": 0.8}
    ppo.seconds = ppo.snapshot["seconds"] + 7
    ppo.runner.ppo = ppo
    ppo.runner.restore()
    assert ppo.best == best and ppo.seconds == ppo.snapshot["seconds"] > 6


def test_a_run_goes_on_with_the_cpu_in_a_fresh_process(monkeypatch, tmp_path, capsys):
    """Before it starts, the state before the failed update is saved and the callbacks are closed."""
    started, closed = [], 0

    class Process:
        def __init__(self, command, env):
            started.append((command, closed))

        def wait(self):
            return 7

    class CountsClosing(Callback):
        def close(self):
            nonlocal closed
            closed += 1

    def fail_for_good():
        raise GPUError("the GPU has stopped working")

    ppo = checked()
    ppo.callbacks = [CountsClosing()]
    ppo.metadata = {"constants": {"GAME": "my_game:Catch-v0"}}
    ppo.collect_and_update = fail_for_good
    monkeypatch.setattr(supervise.subprocess, "Popen", Process)
    monkeypatch.setattr(supervise.signal, "signal", lambda signum, handler: None)
    assert supervise.train(ppo, tmp_path, "train_ppo.py", {}) == 7
    script = str(supervise.ROOT / "train_ppo.py")
    named = ["--game", "my_game:Catch-v0"]  # or the run would not import it
    assert started == [([sys.executable, script, f"--resume={tmp_path}", "--device", "cpu", *named], 1)]
    assert load_checkpoint(tmp_path)["update_count"] == 0
    go_on = f"stopped working; going on with: python train_ppo.py --resume {tmp_path} {' '.join(named)} --device cpu"
    assert go_on in capsys.readouterr().err


# --- what a graph can record ------------------------------------------------------------------------------------------


def test_nothing_that_a_graph_cannot_hold_is_in_either_step(monkeypatch):
    """A graph can hold no number that the host reads, no random number, and no tensor made of Python's numbers.

    Nor can it index with a mask, because the host would have to count what the mask selects.
    """
    tapes = use_software_graphs(monkeypatch)
    forbidden = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    checked([GRAPHS], num_steps=48).learn()
    assert len(tapes) == 2 and all(len(tape.calls) > 100 for tape in tapes)
    for function, args, *_ in (call for tape in tapes for call in tape.calls):
        assert not forbidden & set(function.tags) and "lift_fresh" not in str(function), function
        indices = args[1] if "aten.index" in str(function) and isinstance(args[1], list) else []
        assert all(i is None or i.dtype in (torch.int32, torch.int64) for i in indices), function


def test_neither_step_touches_the_host():
    """On the meta device, whose tensors hold no values, whatever reads a value or mixes devices fails."""
    real, ppo = device_trainer(), device_trainer()
    real.collect()
    real.epoch()
    meta = torch.device("meta")

    def move(x):
        """Move a tensor, or a named tuple of tensors, to the meta device."""
        return x.to(meta) if isinstance(x, torch.Tensor) else type(x)(*map(move, x))

    for name in ("obs", "noise", "in_sync", "lr"):
        setattr(ppo, name, move(getattr(ppo, name)))
    ppo.device = ppo.env.device = meta
    games = ppo.env.games = TensorGames(4, meta)
    ppo.env.numbers = move(real.env.numbers)
    ppo.env.played = move(ppo.env.played)
    ppo.policy = DeviceGPT(real.policy.config).to(meta)
    ppo.weights = torch.nn.Parameter(move(ppo.weights.detach()))
    ppo.weights.grad = torch.zeros_like(ppo.weights)
    ppo.optimizer = SimpleNamespace(step=lambda: None)  # the step is PyTorch's own
    ppo.act = ppo.policy.inference_function()
    ppo.buffer.position = move(ppo.buffer.position)
    ppo.buffer.minibatch_position = move(ppo.buffer.minibatch_position)
    with Tape() as tape:
        ppo.rollout_step()
        ppo.rollout_step()
        ppo.buffer.minibatches = move(real.buffer.minibatches)
        ppo.train_step()
    shapes, real_shapes = ({name: x.shape for name, x in of.buffer.fields.items()} for of in (ppo, real))
    assert shapes == real_shapes
    assert games.pages is games.buffers["pages"]
    calls = [(args, kwargs) for function, args, kwargs, _ in tape.calls if "_to_copy" not in str(function)]
    used = tensors(calls)
    assert len(used) > 100 and {x.device.type for x in used} == {"meta"}


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_an_error_in_a_compiled_function_is_blamed_on_the_compiler_after_its_plain_calls():
    """As long as it runs plainly, the error is the function's own."""
    function = Compiled(lambda x: 1 / x, plain_calls=1, backend=lambda graph, inputs: graph)
    with pytest.raises(ZeroDivisionError):
        function(0)
    with pytest.raises(ShortcutFailed) as error:
        function(0)
    assert error.value.shortcut == COMPILE
