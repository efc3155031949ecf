"""A training on a GPU: with the shortcuts that work there, and checked.

The first update checks itself against the CPU (self_test.py), and so does every one after which a CUDA graph was recorded again. What
fails, or computes something else, is left out: a warning says so, and the update starts over from the state before it. If the GPU is
wrong without any shortcut, or has stopped working, `GPUError` tells the program to go on with the CPU.
"""

import warnings

import torch

from device import GPUError, first_line, gpu_name, works
from fast.cuda_graphs import BF16, COMPILE, GRAPHS, Compiled, GraphRunner, ShortcutFailed
from fast.fast_gpt import FastGPT
from fast.self_test import check_games, check_prefixes, check_update, set_rare_cases


def run_on_gpu(ppo, shortcuts=None):
    """Make `ppo.collect_and_update` one that uses `shortcuts` (default: all that suit), and checks itself."""
    ppo.collect_and_update = CheckedUpdates(ppo, shortcuts_for(ppo) if shortcuts is None else shortcuts)


def shortcuts_for(ppo):
    """-> the shortcuts to try, the first of which is left out first if it is not known which is to blame."""
    if isinstance(ppo.policy, FastGPT):  # more than one layer
        return [COMPILE] + ([BF16] if torch.cuda.is_bf16_supported(including_emulation=False) else [])
    # Several ranks average their gradients in every train_step, which no graph has been tried with; nor has AMD's ROCm, which calls
    # itself CUDA.
    return [COMPILE] if ppo.ranks > 1 or torch.version.hip else [GRAPHS, COMPILE]


class CheckedUpdates:
    def __init__(self, ppo, shortcuts):
        self.ppo, self.plain, self.shortcuts = ppo, ppo.collect_and_update, list(shortcuts)
        self.deep = isinstance(ppo.policy, FastGPT)
        self.checks = []  # since the shortcuts changed last
        self.set_up()

    def set_up(self):
        """Let ppo take the shortcuts that are left."""
        ppo, self.runners = self.ppo, []
        self.recordings_checked = None  # how often there had been a recording when all was checked last; None: never
        for name in ("loss", "rollout_step", "train_step"):
            vars(ppo).pop(name, None)  # back to PPO's own
        if self.deep:
            ppo.policy.compile_blocks, ppo.policy.bf16 = COMPILE in self.shortcuts, BF16 in self.shortcuts
            return
        if COMPILE in self.shortcuts:  # the first calls allocate tensors that stay
            # torch advises TF32, which is too coarse here
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            ppo.loss = Compiled(ppo.loss, plain_calls=1, fullgraph=True)
            ppo.rollout_step = Compiled(ppo.rollout_step, plain_calls=1, fullgraph=True)
        if GRAPHS in self.shortcuts:
            # Adam wants to know, and then complains of the first steps, which no graph runs yet
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            ppo.optimizer.param_groups[0]["capturable"] = True
            stream = torch.cuda.Stream(ppo.device)
            ppo.rollout_step = GraphRunner(ppo.rollout_step, stream)
            ppo.train_step = GraphRunner(ppo.train_step, stream, lambda: (ppo.buffer.minibatches, ppo.optimizer.state))
            self.runners = [ppo.rollout_step, ppo.train_step]

    def __call__(self):
        """Collect, update, check -> the statistics of the update. Raises GPUError, and whatever no shortcut is to blame for."""
        while True:
            failure = None
            try:
                stats = self.collect_update_check()
            except ShortcutFailed as error:
                failure = error
            except RuntimeError as error:
                self.raise_if_broken(error)
                raise
            if not self.in_any_rank(failure):
                return stats
            self.raise_if_broken(failure)
            self.leave_out(failure)
            self.ppo.load_state_dict(self.ppo.snapshot)

    def collect_update_check(self):
        if self.recordings_checked is None:
            self.check_alone()
        try:
            stats = self.plain()
        except FloatingPointError as error:
            if self.recordings_checked is not None:
                raise
            raise ShortcutFailed(str(error)) from None  # on a GPU that nothing is known of yet
        recordings = self.recordings()
        if recordings != self.recordings_checked:
            self.judge(check_update(self.ppo, self.ppo.snapshot))
            self.recordings_checked = recordings
        return stats

    def check_alone(self):
        """What the first update might not show: every token of deeper models; rare moments of the games."""
        ppo, self.checks = self.ppo, []
        if self.deep:
            self.judge(check_prefixes(ppo.policy))
            return
        for _ in range(2):  # the second time from a recorded graph
            state = set_rare_cases(ppo)
            ppo.collect()
            self.judge([check_games(ppo, state, "A games in rare cases, values that differ")])
        ppo.load_state_dict(ppo.snapshot)

    def judge(self, checks):
        """Raises ShortcutFailed for the first that has not passed."""
        self.checks += checks
        for check in checks:
            if not check.passed:
                raise ShortcutFailed(f"wrong results on {gpu_name(self.ppo.device)} ({check})")

    def recordings(self):
        return sum(runner.recordings for runner in self.runners)

    def in_any_rank(self, failure):
        return self.ppo.average(torch.tensor(float(failure is not None), device=self.ppo.device)).item() > 0

    def raise_if_broken(self, error):
        """After an illegal memory access, for one, nothing works on the GPU any more in this process."""
        if not works(self.ppo.device):
            raise GPUError(f"the GPU has stopped working ({first_line(error)})") from error

    def leave_out(self, failure):
        """The shortcut that has failed, or the first that is left. Raises GPUError if none is."""
        reason = "another rank's checks have failed" if failure is None else str(failure)
        if not self.shortcuts:
            raise GPUError(reason) from failure
        shortcut = getattr(failure, "shortcut", None) or self.shortcuts[0]
        warnings.warn(f"{reason}; going on without {shortcut}", stacklevel=2)
        self.shortcuts.remove(shortcut)
        self.set_up()
