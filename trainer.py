"""What every training has: counters and a clock, callbacks, evaluations, and a way to stop. callbacks.py says who reads what."""

import math
import time

import torch

from harness.checkpoint import check_like, load_weights, to_plain
from harness.supervise import InputNotFinite, StopTraining

INPUTS = {
    "rewards": "mend what gives them, the environment or the reward's function or model",
    "observations": "mend the environment",
}


def check_finite(when, **quantities):
    """Raises FloatingPointError for the first of these tensors, arrays or numbers that is not finite, and says what may help.

    quantities: in the order in which one spoils the next, so that the cause is named and not what followed from it.
    """
    for name, x in quantities.items():
        if not torch.as_tensor(x).isfinite().all():
            reason = f"the {name} {'is' if name in ('loss', 'gradient') else 'are'} not finite {when}"
            if name in INPUTS:
                raise InputNotFinite(f"{reason}; {INPUTS[name]}")
            raise FloatingPointError(f"{reason}; try a lower learning rate")


class Trainer:
    """A subclass has `num_steps`, `state_dict()`, `load_state_dict()` and `collect_and_update() -> stats`, which advances `global_step`
    and `update_count`."""

    def __init__(self, policy, callbacks=(), metadata=None):
        """metadata: plain values that go into every checkpoint."""
        self.policy, self.callbacks, self.metadata = policy, callbacks, metadata or {}
        self.update_count = self.global_step = 0
        self.seconds, self.clock = 0.0, time.perf_counter()  # of training so far; when that was last counted
        self.stats = {}  # of the last update
        self.snapshot = None  # state_dict() before the current update, which an interruption goes back to
        self.stop_requested = False
        self.pending = []  # copies of policy_state() that a callback is evaluating
        self.evaluated = None  # the last of them, with its "evaluation"
        self.best_score, self.is_best = -math.inf, False  # the highest so far; did the last evaluation reach it?

    @torch.enable_grad()  # whatever a notebook has set
    def learn(self):
        """Train to the end. Raises StopTraining after `request_stop`, FloatingPointError if the numbers are no longer finite."""
        self.clock = time.perf_counter()
        self.keep_snapshot()
        self.emit("on_training_start")
        while self.global_step < self.num_steps:
            self.stop_together()
            start, before = time.perf_counter(), self.global_step
            self.stats = self.collect_and_update()
            self.check_weights()
            self.stats["steps_per_second"] = (self.global_step - before) / (time.perf_counter() - start)
            self.tick()
            self.emit("on_update_end")
            self.keep_snapshot()
        self.emit("on_training_end")

    def keep_snapshot(self):
        """Keep a copy of the present state, from which a run that is interrupted in the next update can go on."""
        self.snapshot = self.state_dict()

    def check_weights(self):
        """Raises FloatingPointError before anybody plays or saves weights that are not finite."""
        for weights in self.policy.parameters():
            check_finite(f"after update {self.update_count}", weights=weights)

    def emit(self, event):
        for callback in self.callbacks:
            callback.hear(event, self)

    def tick(self):
        """Update the clock: everything since `learn` started counts, callbacks and waiting too."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def evaluation_end(self, state, evaluation):
        """A callback has evaluated `state`, an earlier policy_state(); evaluation has at least a "score"."""
        self.evaluated = state | {"evaluation": evaluation}
        self.is_best = evaluation["score"] > self.best_score
        self.best_score = max(self.best_score, evaluation["score"])
        self.tick()
        self.emit("on_evaluation_end")

    def request_stop(self):
        self.stop_requested = True

    def check_stop(self):
        if self.stop_requested:
            raise StopTraining

    def stop_together(self):
        """Between two updates; a training of several processes stops all of them here."""
        self.check_stop()

    def policy_state(self):
        """What playing needs: weights, counters and metadata; a copy, on the CPU."""
        counters = {"update_count": self.update_count, "global_step": self.global_step, "seconds": self.seconds}
        return to_plain({**self.metadata, **counters, "model": self.policy.state_dict()})

    def training_state(self, **more):
        """What any resume needs, and `more`; a copy, on the CPU."""
        return self.policy_state() | to_plain({"evaluations": self.pending, "best_score": self.best_score, **more})

    def check_state(self, state):
        """Raises ValueError, naming the place, unless `state`, from a file, is built as that of this trainer, which must be new."""
        own = self.state_dict() | {"evaluations": (self.policy_state(),)}
        del own["optimizer"]  # which has no state before its first step: `load_optimizer` compares it
        for name in self.metadata:  # what is in a file is not used
            del own[name], own["evaluations"][0][name]
        check_like(state, own)

    def load_training_state(self, state):
        """The way back, but for `more`."""
        load_weights(self.policy, state["model"])
        self.pending = [saved | self.metadata for saved in state["evaluations"]]
        for name in ("update_count", "global_step", "seconds", "best_score"):
            setattr(self, name, state[name])
