"""torch.compile and CUDA graphs, for functions that are called again and again.

Both raise `ShortcutFailed` where they do not work; gpu_training.py then goes on without.

A training of one layer launches some hundred small kernels a step, and launching them takes longer than running them. A CUDA graph
is recorded once and replayed without Python. What it reads and writes must keep its address: the games and their random numbers, the
noise, the policy's table, the rollout buffer and its minibatches, weights, gradient, optimizer state and learning rate. Python
numbers are baked in: coefficients of the loss and `varied_starts` must not change after the recording.
"""

import torch

from harness.device import out_of_memory
from harness.messages import one_line


class ShortcutFailed(RuntimeError):
    """What failed, and why, in one line. shortcut: COMPILE or GRAPHS, or None if it is not known which is to blame."""

    def __init__(self, message, shortcut=None):
        super().__init__(message)
        self.shortcut = shortcut


COMPILE, GRAPHS, BF16 = "torch.compile", "CUDA graphs", "bfloat16"


class Blamed:
    """function(*args), whose errors become ShortcutFailed and blame a shortcut; but lack of memory passes through."""

    def __init__(self, function, shortcut):
        self.function, self.shortcut = function, shortcut

    def __call__(self, *args):
        try:
            return self.function(*args)
        except ShortcutFailed:
            raise
        except Exception as error:  # no compiler, no Triton: whatever it is, without the shortcut it may work
            if out_of_memory(error):
                raise
            raise ShortcutFailed(one_line(error), self.shortcut) from error


class Compiled:
    """function(*args): as it stands for the first `plain_calls` calls, then compiled, and `Blamed`."""

    def __init__(self, function, plain_calls=0, **options):
        self.function, self.plain_calls = function, plain_calls
        self.compiled = Blamed(torch.compile(function, **options), COMPILE)

    def __call__(self, *args):
        if self.plain_calls > 0:
            self.plain_calls -= 1
            return self.function(*args)
        return self.compiled(*args)


class GraphRunner:
    """function(), which reads and writes tensors that keep their addresses. On a side stream its first calls warm up, as a recording
    requires; then it is recorded as a CUDA graph and replayed. Raises ShortcutFailed where it cannot be recorded.

    recorded_with() -> the objects whose tensors the graph uses; when one is replaced, the function is recorded again.
    """

    WARM_UP = 3  # calls: one as it stands, one that compiles, one compiled

    def __init__(self, function, stream, recorded_with=lambda: ()):
        self.function, self.stream, self.recorded_with, self.recordings = function, stream, recorded_with, 0
        self.graph, self.calls, self.objects = None, 0, ()

    def __call__(self):
        objects = self.recorded_with()
        if len(objects) != len(self.objects) or any(x is not y for x, y in zip(objects, self.objects)):
            self.graph, self.calls, self.objects = None, 0, objects
        if self.graph is not None:
            self.graph.replay()
            return
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        try:
            with torch.cuda.stream(self.stream):
                self.function()
        finally:
            before.wait_stream(self.stream)
        self.calls += 1
        if self.calls == self.WARM_UP:
            self.record(before)

    def record(self, before):
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph, stream=self.stream):  # records, computes nothing
                try:
                    self.function()
                except Exception as error:
                    cause = error  # ending a failed recording raises another, which says less
                    raise
        except Exception as error:
            torch.cuda.set_stream(before)  # a failed recording leaves its own stream current
            if out_of_memory(cause or error):
                raise
            raise ShortcutFailed(one_line(cause or error), GRAPHS) from error
        self.graph = graph
        self.recordings += 1
