"""torch.compile and CUDA graphs for functions that are called again and again.

Both raise `ShortcutFailed` where they do not work, and gpu_training.py goes on without them.

A training of one layer launches some hundred small kernels in a step, and launching them takes longer than running
them. A CUDA graph is recorded once and then replayed without Python. All that it reads and writes must keep its
address: the games and their random numbers, the noise, the policy's table, the rollout buffer and its minibatches,
weights, gradient, optimizer state and learning rate. Python's numbers become part of the graph, so the coefficients of
the loss and `varied_starts` must not change after the recording.
"""

import torch

from harness.device import out_of_memory
from harness.messages import one_line

COMPILE, GRAPHS, BF16 = "torch.compile", "CUDA graphs", "bfloat16"


class ShortcutFailed(RuntimeError):
    """Says what failed and why, in one line. shortcut: the one to blame, or None if that is not known."""

    def __init__(self, message, shortcut=None):
        super().__init__(message)
        self.shortcut = shortcut


class Blamed:
    """Calls a function, and turns its errors, except lack of memory, into a ShortcutFailed that blames a shortcut."""

    def __init__(self, function, shortcut):
        self.function = function
        self.shortcut = shortcut

    def __call__(self, *args):
        try:
            return self.function(*args)
        except ShortcutFailed:
            raise
        except Exception as error:  # no compiler, no Triton: whatever it is, it may work without the shortcut
            if out_of_memory(error):
                raise
            raise ShortcutFailed(one_line(error), self.shortcut) from error


class Compiled:
    """Calls a function as it stands for the first `plain_calls` times, and from then on compiled and `Blamed`."""

    def __init__(self, function, plain_calls=0, **options):
        self.function = function
        self.plain_calls = plain_calls
        self.compiled = Blamed(torch.compile(function, **options), COMPILE)

    def __call__(self, *args):
        if self.plain_calls > 0:
            self.plain_calls -= 1
            return self.function(*args)
        return self.compiled(*args)


class GraphRunner:
    """Calls a function without arguments, first as it stands and then as a CUDA graph.

    The function reads and writes tensors that keep their addresses. The first calls run on a side stream, as CUDA
    requires before a recording. Then the function is recorded, and every later call replays the graph.
    """

    WARM_UP = 3  # calls before the recording: one as the function stands, one that compiles it, one compiled

    def __init__(self, function, stream, recorded_with=tuple):
        """
        Args:
            recorded_with: a function that returns a tuple of the objects whose tensors the graph uses, by default an
                empty one. If one of them is replaced by another, the function is recorded again.
        """
        self.function = function
        self.stream = stream
        self.recorded_with = recorded_with
        self.recordings = 0  # so far
        self.start_again(())

    def start_again(self, objects):
        self.graph = None
        self.calls = 0
        self.objects = objects

    def __call__(self):
        """Call the function or replay its graph. Raises ShortcutFailed if the function cannot be recorded."""
        objects = self.recorded_with()
        same = len(objects) == len(self.objects) and all(x is y for x, y in zip(objects, self.objects))
        if not same:
            self.start_again(objects)
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
        """Record the graph, during which nothing is computed. before: the stream to return to."""
        graph = torch.cuda.CUDAGraph()
        cause = None
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                try:
                    self.function()
                except Exception as error:
                    cause = error  # ending a failed recording raises another error, which says less
                    raise
        except Exception as error:
            torch.cuda.set_stream(before)  # a failed recording leaves its own stream current
            if out_of_memory(cause or error):
                raise
            raise ShortcutFailed(one_line(cause or error), GRAPHS) from error
        self.graph = graph
        self.recordings += 1
