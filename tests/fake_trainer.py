"""A trainer that trains nothing, and a stand-in for W&B.

The trainer emits the events of a training, in their order, with numbers that are known.
"""

import csv
import errno
import math

import torch

STATS = (
    "policy_loss value_loss entropy prediction_loss approx_kl approx_kl_max clipfrac explained_variance grad_norm lr"
).split()
EVALUATED = ("score", "min", "max", "cleared", "length", "varied", "returned")
SCORES = {2: 90.0, 4: 300.0, 6: 250.0, 8: 400.0}  # {update: score of its evaluation}; other updates are not evaluated
UPDATES = 8


class FakeTrainer:
    """Every number follows from the update, except timings.

    Args:
        updates: the length of the training.
        start: the update of the checkpoint from which it resumes.
        delay: how many updates an evaluation takes.
        scores, stats: stand in for SCORES and STATS.
    """

    def __init__(
        self, callbacks, updates=UPDATES, start=0, seconds_per_update=1.5, delay=0, scores=SCORES, stats=STATS
    ):
        self.callbacks = callbacks
        self.num_steps = self.total_steps = 100 * updates
        self.doing = ""
        self.unfinished_steps = 0.0
        self.prepared = None
        self.seconds_per_update = seconds_per_update
        self.scores = scores
        self.stats_names = stats
        self.delay = delay
        self.evaluating = None
        self.update_count = start
        self.global_step = 100 * start
        self.seconds = start * 1.5
        self.evaluated = None
        self.stats = {}
        self.is_best = False
        self.pending = []
        self.best_score = max([score for update, score in scores.items() if update <= start], default=-math.inf)

    def emit(self, event):
        for callback in self.callbacks:
            callback.hear(event, self)

    def learn(self, until=None):
        """Train to the end, or to this update, after which nothing more happens, as after a kill."""
        self.keep_snapshot()
        self.emit("on_training_start")
        for update in range(self.update_count + 1, self.num_steps // 100 + 1):
            self.update(update)
            if update == until:
                return self
        self.finish_evaluation()
        self.emit("on_training_end")
        for callback in self.callbacks:
            callback.hear("close")
        return self

    def update(self, update):
        self.emit("on_rollout_start")
        self.emit("on_rollout_end")
        self.update_count = update
        self.global_step = 100 * update
        self.seconds += self.seconds_per_update
        self.stats = {name: update / (i + 3) for i, name in enumerate(self.stats_names)}
        self.stats["steps_per_second"] = 1 / self.seconds
        self.stats["episode_return"] = 10.0 * update if update > 1 else math.nan
        if update in self.scores:
            self.finish_evaluation()
            self.begin_evaluation()
        self.emit("on_update_end")
        if self.evaluating and update >= self.evaluating["update_count"] + self.delay:
            self.finish_evaluation()

    def begin_evaluation(self):
        score = self.scores[self.update_count]
        evaluation = {"score": score, "min": score - 80, "max": score + 90, "cleared": 0, "games": 32}
        evaluation |= {"length": 812.5, "varied": 0.25, "returned": 0.71}
        self.evaluating = self.policy_state() | {"seconds": self.seconds, "evaluation": evaluation}
        self.pending = [self.evaluating]

    def finish_evaluation(self):
        if self.evaluating:
            self.evaluated = self.evaluating
            self.evaluating = None
            self.pending = []
            score = self.evaluated["evaluation"]["score"]
            self.is_best = score > self.best_score
            self.best_score = max(self.best_score, score)
            self.emit("on_evaluation_end")

    def policy_state(self):
        counters = {"update_count": self.update_count, "global_step": self.global_step}
        return counters | {"model": {"w": torch.ones(2)}}

    def keep_snapshot(self):
        self.snapshot = {**self.policy_state(), "best_score": self.best_score}


class FakeWandb:
    """Stands in for the package, and for its runs: it keeps what is logged."""

    def __init__(self):
        self.inits, self.metrics, self.rows, self.finished = [], [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, *args, **options):
        self.metrics.append((args, options))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def table(path):
    """Return metrics.csv as a list of dicts of text, without the timings."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["steps_per_second"]
    return rows
