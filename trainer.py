"""The loop that every training has: counters, a clock, callbacks, evaluations, and a way to stop."""

import math
import time

import torch

from harness.checkpoint import check_like, load_weights, to_plain
from harness.supervise import InputNotFinite, StopTraining

REMEDIES = {
    "rewards": "check the environment, or the reward function or model",
    "observations": "check the environment",
}


def check_finite(when, **quantities):
    """Raise FloatingPointError for the first of these tensors, arrays or numbers that is not finite.

    List a cause before its consequences, so that the error names the cause. `when` says when it happened.
    """
    for name, x in quantities.items():
        if not torch.as_tensor(x).isfinite().all():
            verb = "is" if name in ("loss", "gradient") else "are"
            reason = f"the {name} {verb} not finite {when}"
            if name in REMEDIES:
                raise InputNotFinite(f"{reason}; {REMEDIES[name]}")
            raise FloatingPointError(f"{reason}; try a lower learning rate")


def quality(evaluation):
    """Return what makes one evaluation better than another: its score, and then its share of varied games cleared.

    Only evaluations of Breakout have varied games. Many models reach the highest score, and not all play equally well.
    """
    return evaluation["score"], evaluation.get("varied", 0.0)


REPORT_INTERVAL = 0.1  # seconds between two reports of an update's progress, at least


class Trainer:
    """Runs the loop of a training.

    A subclass has `num_steps`, `state_dict()`, `load_state_dict()`, and `collect_and_update()`, which returns
    statistics and advances `global_step` and `update_count`.

    Args:
        callbacks: watch the training (callbacks.py).
        metadata: plain values that go into every checkpoint.
    """

    def __init__(self, policy, callbacks=(), metadata=None):
        self.policy = policy
        self.callbacks = callbacks
        self.metadata = metadata or {}
        self.update_count = self.global_step = 0
        self.seconds = 0.0  # of training so far
        self.clock = time.perf_counter()  # when `seconds` was last updated
        self.stats = {}  # {name: float} of the last update, the same names in each
        self.snapshot = None  # a copy of the state before this update, from which an interrupted run is resumed
        self.doing = ""  # what the current update does, and how far it is, such as "learning 12/64"; "" between updates
        self.unfinished_steps = 0.0  # environment steps that the work of the current update is worth so far
        self.prepared = None  # while the update does what no steps count for: the share of it that is done
        self.reported_at = -math.inf
        self.stop_requested = False
        self.pending = []  # the policy states that are being evaluated
        self.evaluated = None  # the policy state that was evaluated last, with its "evaluation"
        self.best = {"score": -math.inf}  # the best evaluation so far
        self.is_best = False  # whether the last evaluation was better than all before

    @torch.enable_grad()  # even if a notebook has disabled gradients
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
            self.doing = ""
            self.unfinished_steps = 0.0
            self.prepared = None
            self.tick()
            self.emit("on_update_end")
            self.keep_snapshot()
        self.emit("on_training_end")

    def keep_snapshot(self):
        """Keep a copy of the current state. On the CPU it takes over the memory of the previous copy.

        An evaluation of this very update shares its weights, so that a checkpoint holds them once.
        """
        state = self.state_dict()
        pending = state.pop("evaluations")  # copies already, which nobody changes
        on_cpu = all(weights.device.type == "cpu" for weights in self.policy.parameters())
        old = self.snapshot if on_cpu else None  # a GPU may fail in the middle, and then the previous copy is needed
        self.snapshot = to_plain(state, old)
        same = {"model": self.snapshot["model"]}
        now = self.update_count
        self.snapshot["evaluations"] = [saved | same if saved["update_count"] == now else saved for saved in pending]

    def check_weights(self):
        """Raise FloatingPointError before anybody plays or saves weights that are not finite."""
        for weights in self.policy.parameters():
            check_finite(f"after update {self.update_count}", weights=weights)

    def emit(self, event):
        for callback in self.callbacks:
            callback.hear(event, self)

    def report(self, doing, done, total, unfinished_steps=0.0, preparing=False):
        """Tell the callbacks how far the current update is. Call it as often as you like; most calls do nothing.

        Args:
            doing: what the update does now, such as "learning".
            done, total: of the things that it does, such as minibatches.
            unfinished_steps: how many of the update's environment steps its work so far is worth, if `global_step` does
                not count them yet.
            preparing: whether no steps will ever count for this work, such as filling a replay memory.
        """
        now = time.perf_counter()
        if now - self.reported_at < REPORT_INTERVAL:
            return
        self.reported_at = now
        self.doing = f"{doing} {done:,}/{total:,}"
        self.unfinished_steps = unfinished_steps
        self.prepared = min(done / total, 1.0) if preparing else None
        self.tick()
        self.emit("on_progress")

    @property
    def total_steps(self):
        """The environment steps after which training ends: `num_steps`, or more if its last update is a whole one."""
        return self.num_steps

    def tick(self):
        """Update `seconds`. Everything since the start of `learn` counts, including callbacks and waiting."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def evaluation_end(self, state, evaluation):
        """Take the result of evaluating `state`, an earlier policy_state(): a dict with at least a "score"."""
        self.evaluated = state | {"evaluation": evaluation}
        self.is_best = quality(evaluation) > quality(self.best)
        if self.is_best:
            self.best = evaluation
        self.tick()
        self.emit("on_evaluation_end")

    @property
    def best_score(self):
        return self.best["score"]

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
        """Return a copy of what playing needs, on the CPU: weights, counters and metadata."""
        return to_plain({**self.metadata, **self.counters(), "model": self.policy.state_dict()})

    def training_state(self, **more):
        """Return what resuming any training needs, and `more`. These are no copies: the training changes them."""
        return {
            **self.metadata,
            **self.counters(),
            "model": self.policy.state_dict(),
            "evaluations": self.pending,
            "best_score": self.best_score,
            **more,
        }

    def check_state(self, state):
        """Raise ValueError, naming the place, unless `state`, read from a file, has the structure of this trainer's."""
        own = to_plain(self.state_dict()) | {"evaluations": (self.policy_state(),)}
        del own["optimizer"]  # empty before the first step; `load_optimizer` checks it
        for name in self.metadata:  # not read from the file
            del own[name], own["evaluations"][0][name]
        check_like(state, own)

    def load_training_state(self, state):
        """Load what `training_state` returned. The subclass loads `more`."""
        load_weights(self.policy, state["model"])
        self.pending = [saved | self.metadata for saved in state["evaluations"]]
        self.best = {"score": state["best_score"]}
        for name in ("update_count", "global_step", "seconds"):
            setattr(self, name, state[name])
