"""What every training has: counters, a clock, callbacks, evaluations, and a way to stop. See callbacks.py for who reads
what.
"""

import math
import time

import torch

from harness.checkpoint import check_like, load_weights, to_plain
from harness.supervise import InputNotFinite, StopTraining

REMEDIES = {
    "rewards": "mend what gives them, the environment or the reward's function or model",
    "observations": "mend the environment",
}


def check_finite(when, **quantities):
    """Raise FloatingPointError for the first of these tensors, arrays or numbers that is not finite, and say what may
    help.

    List the quantities in the order in which one spoils the next, so that the error names the cause and not a
    consequence.
    """
    for name, x in quantities.items():
        if not torch.as_tensor(x).isfinite().all():
            verb = "is" if name in ("loss", "gradient") else "are"
            reason = f"the {name} {verb} not finite {when}"
            if name in REMEDIES:
                raise InputNotFinite(f"{reason}; {REMEDIES[name]}")
            raise FloatingPointError(f"{reason}; try a lower learning rate")


class Trainer:
    """The loop of a training.

    A subclass has `num_steps`, `state_dict()`, `load_state_dict()`, and `collect_and_update()`, which returns
    statistics and advances `global_step` and `update_count`.
    """

    def __init__(self, policy, callbacks=(), metadata=None):
        """metadata: plain values that go into every checkpoint."""
        self.policy = policy
        self.callbacks = callbacks
        self.metadata = metadata or {}
        self.update_count = self.global_step = 0
        self.seconds = 0.0  # of training so far
        self.clock = time.perf_counter()  # when `seconds` was last updated
        self.stats = {}  # of the last update
        self.snapshot = None  # the state before the present update, from which an interrupted run goes on
        self.stop_requested = False
        self.pending = []  # copies of policy_state() that a callback is evaluating
        self.evaluated = None  # the last of them that was evaluated, with its "evaluation"
        self.best_score = -math.inf
        self.is_best = False  # whether the last evaluation reached best_score

    @torch.enable_grad()  # whatever a notebook has set
    def learn(self):
        """Train to the end.

        Raises StopTraining after `request_stop`, and FloatingPointError if numbers are no longer finite.
        """
        self.clock = time.perf_counter()
        self.keep_snapshot()
        self.emit("on_training_start")
        while self.global_step < self.num_steps:
            self.stop_together()
            start = time.perf_counter()
            before = self.global_step
            self.stats = self.collect_and_update()
            self.check_weights()
            self.stats["steps_per_second"] = (self.global_step - before) / (time.perf_counter() - start)
            self.tick()
            self.emit("on_update_end")
            self.keep_snapshot()
        self.emit("on_training_end")

    def keep_snapshot(self):
        """Keep a copy of the present state. On the CPU it takes the memory of the copy before."""
        state = self.state_dict()
        pending = list(state.pop("evaluations"))  # these are copies already, which nobody changes
        on_cpu = all(weights.device.type == "cpu" for weights in self.policy.parameters())
        old = self.snapshot if on_cpu else None  # a GPU may fail while its tensors are copied
        self.snapshot = to_plain(state, old) | {"evaluations": pending}

    def check_weights(self):
        """Raise FloatingPointError before anybody plays or saves weights that are not finite."""
        for weights in self.policy.parameters():
            check_finite(f"after update {self.update_count}", weights=weights)

    def emit(self, event):
        for callback in self.callbacks:
            callback.hear(event, self)

    def tick(self):
        """Update `seconds`: everything since `learn` started counts, also callbacks and waiting."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def evaluation_end(self, state, evaluation):
        """Take the result of evaluating `state`, an earlier policy_state(). The evaluation has at least a "score"."""
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
        """Stop between two updates; a training of several processes stops all of them here."""
        self.check_stop()

    def counters(self):
        return {"update_count": self.update_count, "global_step": self.global_step, "seconds": self.seconds}

    def policy_state(self):
        """A copy of what playing needs, on the CPU: weights, counters and metadata."""
        return to_plain({**self.metadata, **self.counters(), "model": self.policy.state_dict()})

    def training_state(self, **more):
        """What resuming any training needs, and `more`. Refers to tensors and arrays that the training goes on
        changing.
        """
        return {
            **self.metadata,
            **self.counters(),
            "model": self.policy.state_dict(),
            "evaluations": self.pending,
            "best_score": self.best_score,
            **more,
        }

    def check_state(self, state):
        """Raise ValueError, naming the place, unless `state`, from a file, is built as the state of this new trainer
        is.
        """
        own = to_plain(self.state_dict()) | {"evaluations": (self.policy_state(),)}
        del own["optimizer"]  # it has no state before its first step; `load_optimizer` checks it
        for name in self.metadata:  # of a file it is not used
            del own[name], own["evaluations"][0][name]
        check_like(state, own)

    def load_training_state(self, state):
        """Go on from what `training_state` returned, without `more`."""
        load_weights(self.policy, state["model"])
        self.pending = [saved | self.metadata for saved in state["evaluations"]]
        for name in ("update_count", "global_step", "seconds", "best_score"):
            setattr(self, name, state[name])
