"""Check what this GPU computes:  python -m benchmarks.gpu_checks

The first update of every training on a GPU makes the checks of fast/gpu_checks.py. This program prints them as a
table for every combination of the shortcuts that suit the GPU, each in a training of its own. It takes the constants
of train_ppo.py, such as --n_layer 6, and with --resume RUN the weights of a run. With --device cpu the CPU does what
a GPU would do, slowly, so add --num_envs 16 --rollout_steps 16 --batch_size 64.
"""

import harness.start  # before the slow imports

import itertools
from types import SimpleNamespace

import torch

from breakout_ascii import BreakoutAsciiVec
from fast import DeviceBreakout, DeviceGPT, FastGPT
from fast.cuda_graphs import ShortcutFailed
from fast.gpu_training import GPURunner, shortcuts_for
from games.game import BREAKOUT
from harness.device import GPUError, choose_device, gpu_name, set_threads
from harness.messages import one_line
from harness.options import CommandLineError
from harness.runs import read_run
from harness.supervise import memory_advice, run_script
from ppo import PPO
from train_ppo import CONSTANTS, KEPT, check, check_board, check_ranks, gpt_config, ppo_config


def gpu_training(c, device, runner, kind=PPO):
    """Return the PPO, or a subclass of it, that a GPU would run with these constants and this runner, on any device.

    Raises CommandLineError for another game than Breakout.
    """
    if c.GAME != BREAKOUT:
        raise CommandLineError(f"plays Breakout alone, not {c.GAME}; leave out --game")
    torch.manual_seed(c.SEED)
    gpt = DeviceGPT if c.N_LAYER == 1 else FastGPT
    policy = gpt(gpt_config(c)).to(device)
    if c.N_LAYER == 1:
        env = DeviceBreakout(c.NUM_ENVS, device, varied_starts=c.VARIED_STARTS)
    else:
        env = BreakoutAsciiVec(c.NUM_ENVS, varied_starts=c.VARIED_STARTS)
    return kind(policy, env, ppo_config(c), runner=runner)


def passes(c, device, state, shortcuts):
    """Print the table of one update that takes these shortcuts, and return whether it passed."""
    ppo = gpu_training(c, device, GPURunner(shortcuts))
    if state:
        ppo.load_state_dict(state)
    ppo.keep_snapshot()
    failure = None
    print(f"\n{' and '.join(shortcuts) or 'no shortcut'}")
    try:
        ppo.runner.checked_update()
    except ShortcutFailed as error:
        failure = error
    except RuntimeError as error:
        raise GPUError(f"{one_line(error)}; nothing more can be tried in this process") from error
    for result in ppo.runner.checks:
        verdict = "ok" if result.passed else "WRONG"
        print(f"  {result.name:<44} {result.error:>9.2g} {result.tolerance:>9.2g}  {verdict}")
    if failure is not None:
        print(f"  {failure}")
    return failure is None


def main(argv=()):
    run = read_run(argv, "-m benchmarks.gpu_checks", __doc__, CONSTANTS, KEPT, check)
    c = SimpleNamespace(**run.constants)
    check_ranks(run, c)
    check_board(run)
    device = choose_device(c.DEVICE)
    set_threads(c.N_LAYER)
    print(gpu_name(device))
    print(f"\n  {'check':<44} {'error':>9} {'tolerance':>9}")
    with memory_advice(f"the model does not fit into the memory of {device}; try a smaller --n_embd or --n_layer"):
        suitable = shortcuts_for(gpu_training(c, device, GPURunner([]))) if device.type == "cuda" else []
        passed = []
        for n in range(len(suitable) + 1):
            for shortcuts in itertools.combinations(suitable, n):
                passed.append(passes(c, device, run.state, shortcuts))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    run_script(main, "-m benchmarks.gpu_checks")
