"""PPO's two repeated steps as CUDA graphs: recorded once, then replayed without Python.

A one-layer training launches some hundred small kernels a step, and launching them takes longer than running them. This file has
not been run on a GPU yet.

What a graph reads and writes must keep its address: the games and their random numbers, the noise, the policy's table, the rollout
buffer and its minibatches, weights, gradient, optimizer state and learning rate. Python numbers are baked in: coefficients of the
loss and `varied_starts` must not change after the recording.
"""

import warnings

import torch


def run_as_cuda_graphs(ppo):
    """Compile `ppo.rollout_step` and `ppo.loss`, and record `ppo.rollout_step` and `ppo.train_step`.

    With several ranks, which average their gradients in every train_step, nothing is recorded.
    """
    stream = torch.cuda.Stream(ppo.device) if ppo.device.type == "cuda" and ppo.ranks == 1 else None
    ppo.loss = Compiled(ppo.loss)
    ppo.rollout_step = GraphRunner(Compiled(ppo.rollout_step), stream, recorded_with=lambda: ())
    ppo.train_step = GraphRunner(ppo.train_step, stream, recorded_with=lambda: (ppo.buffer.minibatches, ppo.optimizer.state))


class Compiled:
    """function(*args), compiled from its second call on, for the first allocates the tensors that stay. If the second call fails,
    which is when it is compiled and before it has run, it warns and goes on uncompiled."""

    def __init__(self, function):
        self.plain, self.compiled, self.calls = function, torch.compile(function, fullgraph=True), 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 1 or self.compiled is None:
            return self.plain(*args)
        try:
            return self.compiled(*args)
        except Exception as error:  # no compiler, no Triton: whatever it is, the function itself may work
            if self.calls > 2:
                raise
            warn("torch.compile does not work", error)
            self.compiled = None
            return self.plain(*args)


class GraphRunner:
    """function(), which reads and writes tensors that keep their addresses. On a side stream of CUDA its first calls warm up, as a
    recording requires; then it is recorded as a CUDA graph and replayed. Without a stream, or where recording fails, it is called.

    recorded_with() -> objects; when one is no longer the same, its tensors have moved, and the function is recorded again.
    """

    WARM_UP = 3  # calls: as it is, compiling, compiled

    def __init__(self, function, stream, recorded_with):
        self.function, self.stream, self.recorded_with = function, stream, recorded_with
        self.invalidate()

    def invalidate(self):
        self.graph, self.calls, self.objects = None, 0, ()

    def __call__(self):
        if self.stream is None:
            self.function()
            return
        objects = self.recorded_with()
        if len(objects) != len(self.objects) or any(x is not y for x, y in zip(objects, self.objects)):
            self.invalidate()
            self.objects = objects
        if self.graph is not None:
            self.graph.replay()
            return
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            self.function()
        before.wait_stream(self.stream)
        self.calls += 1
        if self.calls == self.WARM_UP:
            self.record(before)

    def record(self, before):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):  # records, computes nothing
                self.function()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that fails may leave its own
            warn("CUDA graphs do not work", error)


def warn(what, error):
    reason = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(f"{what} here, going on without: {reason[0]}", stacklevel=3)
