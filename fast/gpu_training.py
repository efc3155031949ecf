"""PPO's runner on a GPU: it takes shortcuts, checks their results, and drops those that are wrong.

The first update is checked against the CPU (gpu_checks.py), and so is every update that records a CUDA graph anew. If a
shortcut fails, or its results differ from the CPU's, it is dropped with a warning, and the update starts again from the
state before it. If results are wrong without any shortcut, or the GPU no longer works, `GPUError` tells the program to
go on with the CPU.

An example: one layer, on a GPU whose CUDA graphs compute wrong gradients.

    attach        the shortcuts are CUDA graphs and torch.compile; both steps are wrapped to be compiled and recorded
    check_before  games in rare situations play as they do on the CPU
    update 1      collects and learns; after its third call each step is recorded, and from then on replayed
    check_update  finds "C gradient: error 0.3, tolerance 2e-05", and the first shortcut, CUDA graphs, is dropped
    restore       brings back the state before update 1
    update 1      runs again, now with torch.compile alone; check_before and check_update pass
    update 2 ...  run without checks, because no graph is recorded any more
"""

import warnings

import torch

from fast.cuda_graphs import BF16, COMPILE, GRAPHS, Blamed, Compiled, GraphRunner, ShortcutFailed
from fast.fast_gpt import FastGPT
from fast.gpu_checks import check_games, check_prefixes, check_update, set_rare_cases
from harness.device import GPUError, gpu_name, works
from harness.messages import one_line


def shortcuts_for(ppo):
    """The shortcuts to try. If one fails and it is not known which, they are dropped in this order."""
    shortcuts = []
    one_process = ppo.ranks == 1  # several would have to agree on what failed in one of them
    if isinstance(ppo.policy, FastGPT):  # more than one layer
        if one_process:
            shortcuts.append(COMPILE)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            shortcuts.append(BF16)
    elif one_process:
        if not torch.version.hip:  # PyTorch calls ROCm CUDA too, but this has never been recorded there
            shortcuts.append(GRAPHS)
        shortcuts.append(COMPILE)
    return shortcuts


class GPURunner:
    """Runs PPO's functions with shortcuts, and checks them; see `EagerRunner` in ppo.py."""

    def __init__(self, shortcuts=None):
        """shortcuts: those to try, by default all that suit the GPU and the policy."""
        self.shortcuts = shortcuts
        self.checks = []  # the results since the last time a shortcut was dropped

    def attach(self, ppo):
        self.ppo = ppo
        self.more_layers = isinstance(ppo.policy, FastGPT)
        self.shortcuts = shortcuts_for(ppo) if self.shortcuts is None else list(self.shortcuts)
        # Adam warns that its first steps run outside a graph. PyTorch advises TF32, which is too coarse here.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", module=r"torch\._inductor")  # how it compiles
        self.wrap_functions()

    def wrap_functions(self):
        """Prepare the functions that PPO calls for the shortcuts that are left."""
        ppo = self.ppo
        self.rollout_step = ppo.rollout_step
        self.train_step = ppo.train_step
        self.loss = ppo.loss
        self.recorded = []
        self.recordings_checked = None  # how many recordings there were at the last check, None before the first
        if COMPILE in self.shortcuts:
            self.train_step = Blamed(self.train_step, COMPILE)  # because the backward pass is compiled in its first run
        if self.more_layers:
            ppo.policy.compile_blocks = COMPILE in self.shortcuts
            ppo.policy.bf16 = BF16 in self.shortcuts
            return
        games_on_gpu = ppo.env_can.on_device  # otherwise a step of the rollout cannot be compiled or recorded
        if COMPILE in self.shortcuts:
            self.loss = Compiled(self.loss, fullgraph=True)
            if games_on_gpu:
                # The first call, which is not compiled, creates the tensors of the rollout buffer.
                self.rollout_step = Compiled(self.rollout_step, plain_calls=1, fullgraph=True)
        if GRAPHS in self.shortcuts:
            ppo.optimizer.param_groups[0]["capturable"] = True
            stream = torch.cuda.Stream(ppo.device)
            self.train_step = GraphRunner(
                self.train_step, stream, lambda: (ppo.buffer.minibatches, ppo.optimizer.state)
            )
            self.recorded = [self.train_step]
            if games_on_gpu:
                self.rollout_step = GraphRunner(self.rollout_step, stream)
                self.recorded.append(self.rollout_step)

    def collect_and_update(self):
        """Collect, update and check. Returns the statistics of the update.

        Raises GPUError, and any error that no shortcut is to blame for.
        """
        while True:
            try:
                return self.checked_update()
            except RuntimeError as error:
                # After an illegal memory access, for example, nothing works any more in this process.
                if not works(self.ppo.device):
                    raise GPUError(f"the GPU has stopped working ({one_line(error)})") from error
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
            raise ShortcutFailed(str(error)) from None  # nothing is known of this GPU yet
        recordings = sum(function.recordings for function in self.recorded)
        if recordings != self.recordings_checked:
            self.judge(check_update(self.ppo, self.ppo.snapshot))
            self.recordings_checked = recordings
        return stats

    def unchecked_update(self):
        self.ppo.collect()
        return self.ppo.update()

    def check_before(self):
        """Check what the first update might not show: rare situations in the games, every token of deeper models."""
        self.checks = []
        if self.more_layers:
            check = Blamed(check_prefixes, COMPILE) if COMPILE in self.shortcuts else check_prefixes
            self.judge(check(self.ppo.policy, self.ppo.obs[:4].cpu()))
            return
        if not self.ppo.env_can.on_device:
            return
        self.ppo.collect()  # this compiles and records the rollout's step, so that it is replayed from now on
        state = set_rare_cases(self.ppo)
        self.ppo.collect()
        self.judge([check_games(self.ppo, state, "A games in rare cases, values that differ")])
        self.restore()

    def judge(self, checks):
        """Raise ShortcutFailed for the first check that has not passed, in all ranks if it is so in one."""
        self.checks += checks
        wrong = [check for check in checks if not check.passed]
        wrong_anywhere = self.ppo.average(torch.tensor(float(len(wrong)), device=self.ppo.device)).item() > 0
        if wrong_anywhere:
            what = wrong[0] if wrong else "in another rank"
            raise ShortcutFailed(f"wrong results on {gpu_name(self.ppo.device)} ({what})")

    def restore(self):
        """Go back to the state before the update. The best evaluation, and the time that has passed, remain."""
        best, seconds = self.ppo.best, self.ppo.seconds
        self.ppo.load_state_dict(self.ppo.snapshot)
        self.ppo.best, self.ppo.seconds = best, seconds  # a snapshot has the best score alone
        self.ppo.keep_snapshot()  # because ranks other than the first have started new games

    def drop_shortcut(self, failure):
        """Drop the shortcut that has failed, or else the first that is left. Raises GPUError if none is."""
        if not self.shortcuts:
            raise GPUError(str(failure)) from failure
        shortcut = failure.shortcut or self.shortcuts[0]
        warnings.warn(f"{failure}; going on without {shortcut}", stacklevel=2)
        self.shortcuts.remove(shortcut)
        self.wrap_functions()
