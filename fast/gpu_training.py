"""Training on a GPU, with the shortcuts that work there, and checked.

The first update checks itself against the CPU (gpu_checks.py), and so does every update that records a CUDA graph anew. A shortcut that
fails, or computes something else, is dropped: a warning says so, and the update starts over from the state before it. If results are
wrong without any shortcut, or the GPU has stopped working, `GPUError` tells the program to go on with the CPU.
"""

import warnings

import torch

from fast.cuda_graphs import BF16, COMPILE, GRAPHS, Blamed, Compiled, GraphRunner, ShortcutFailed
from fast.fast_gpt import FastGPT
from fast.gpu_checks import check_games, check_prefixes, check_update, set_rare_cases
from harness.device import GPUError, gpu_name, works
from harness.messages import first_line


def run_on_gpu(ppo, shortcuts=None):
    """Make `ppo.collect_and_update` one that uses `shortcuts` (default: all that suit), and checks itself."""
    ppo.collect_and_update = CheckedUpdates(ppo, shortcuts_for(ppo) if shortcuts is None else shortcuts)


def shortcuts_for(ppo):
    """-> the shortcuts to try, in the order in which they are dropped if it is not known which is to blame."""
    # Ranks would have to agree on what failed in one of them; ROCm, which torch also calls CUDA, has never recorded this.
    compiled, recorded = ppo.ranks == 1, ppo.ranks == 1 and not torch.version.hip
    if isinstance(ppo.policy, FastGPT):  # more than one layer
        return [COMPILE] * compiled + [BF16] * torch.cuda.is_bf16_supported(including_emulation=False)
    return [GRAPHS] * recorded + [COMPILE] * compiled


class CheckedUpdates:
    """`ppo.collect_and_update()` with shortcuts, checked."""

    def __init__(self, ppo, shortcuts):
        self.ppo, self.unchecked_update, self.shortcuts = ppo, ppo.collect_and_update, list(shortcuts)
        self.more_layers = isinstance(ppo.policy, FastGPT)
        self.checks = []  # since the shortcuts changed last
        # Adam's first steps run outside a graph, of which it warns; and torch advises TF32, which is too coarse here
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", module=r"torch\._inductor")  # how it compiles
        self.set_up()

    def set_up(self):
        """Let ppo take the shortcuts that are left."""
        ppo, self.runners = self.ppo, []
        self.recordings_checked = None  # how many there had been at the last check; None: not checked yet
        for name in ("loss", "rollout_step", "train_step"):
            vars(ppo).pop(name, None)  # back to PPO's own
        if COMPILE in self.shortcuts:
            ppo.train_step = Blamed(ppo.train_step, COMPILE)  # the backward pass is compiled when it first runs
        if self.more_layers:
            ppo.policy.compile_blocks, ppo.policy.bf16 = COMPILE in self.shortcuts, BF16 in self.shortcuts
            return
        if COMPILE in self.shortcuts:
            ppo.loss = Compiled(ppo.loss, fullgraph=True)
            ppo.rollout_step = Compiled(ppo.rollout_step, plain_calls=1, fullgraph=True)  # which allocates the buffer
        if GRAPHS in self.shortcuts:
            ppo.optimizer.param_groups[0]["capturable"] = True
            stream = torch.cuda.Stream(ppo.device)
            ppo.rollout_step = GraphRunner(ppo.rollout_step, stream)
            ppo.train_step = GraphRunner(ppo.train_step, stream, lambda: (ppo.buffer.minibatches, ppo.optimizer.state))
            self.runners = [ppo.rollout_step, ppo.train_step]

    def __call__(self):
        """Collect, update, check -> the statistics of the update. Raises GPUError, and errors that no shortcut is to blame for."""
        while True:
            try:
                return self.checked_update()
            except RuntimeError as error:
                if not works(self.ppo.device):  # after an illegal memory access, for one, nothing does in this process
                    raise GPUError(f"the GPU has stopped working ({first_line(error)})") from error
                if not isinstance(error, ShortcutFailed):
                    raise
                self.drop_shortcut(error)
                self.restore()

    def checked_update(self):
        try:
            if self.recordings_checked is None:
                self.check_before()
            stats = self.unchecked_update()
        except FloatingPointError as error:
            if self.recordings_checked is not None or self.ppo.ranks > 1:
                raise
            raise ShortcutFailed(str(error)) from None  # on a GPU that nothing is known of yet
        recordings = sum(runner.recordings for runner in self.runners)
        if recordings != self.recordings_checked:
            self.judge(check_update(self.ppo, self.ppo.snapshot))
            self.recordings_checked = recordings
        return stats

    def check_before(self):
        """What the first update might not show: every token of deeper models; rare moments of the games."""
        ppo, self.checks = self.ppo, []
        if self.more_layers:
            self.judge(
                Blamed(check_prefixes, COMPILE)(ppo.policy) if COMPILE in self.shortcuts else check_prefixes(ppo.policy)
            )
            return
        for _ in range(2):  # the second time from a recorded graph
            state = set_rare_cases(ppo)
            ppo.collect()
            self.judge([check_games(ppo, state, "A games in rare cases, values that differ")])
        self.restore()

    def judge(self, checks):
        """Raises ShortcutFailed for the first that has not passed, in all ranks if in one."""
        self.checks += checks
        wrong = [check for check in checks if not check.passed]
        if self.ppo.average(torch.tensor(float(len(wrong)), device=self.ppo.device)).item() > 0:
            raise ShortcutFailed(
                f"wrong results on {gpu_name(self.ppo.device)} ({wrong[0] if wrong else 'in another rank'})"
            )

    def restore(self):
        """The state before the update."""
        self.ppo.load_state_dict(self.ppo.snapshot)
        self.ppo.snapshot = self.ppo.state_dict()  # ranks other than the first have new games

    def drop_shortcut(self, failure):
        """Drop the shortcut that has failed, or the first that is left. Raises GPUError if none is."""
        if not self.shortcuts:
            raise GPUError(str(failure)) from failure
        shortcut = failure.shortcut or self.shortcuts[0]
        warnings.warn(f"{failure}; going on without {shortcut}", stacklevel=2)
        self.shortcuts.remove(shortcut)
        self.set_up()
