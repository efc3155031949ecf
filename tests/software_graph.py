"""A stand-in for CUDA graphs that runs on the CPU.

It records the aten calls of a function on a tape, and replays them on the storages with which they were recorded.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records the aten calls made inside a `with` block, forward and backward.

    `replay()` makes them again with the recorded arguments. As in a CUDA graph, tensors then have their present values,
    while Python's numbers have the recorded ones.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.created = set()  # addresses of the storages that these calls created
        self.saved = {}  # address of each other storage that they wrote to: the storage, and a copy from before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, x in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.save(x)
        results = function(*args, **kwargs)
        used = {address(x) for x in tensors((args, kwargs))}
        self.created |= {address(x) for x in tensors(results)} - used
        self.calls.append((function, args, kwargs, results))
        return results

    def save(self, written):
        """Copy storages that existed before the recording, before the first write to them."""
        for x in tensors(written):
            if address(x) not in self.created:
                self.saved.setdefault(address(x), (x.untyped_storage(), x.untyped_storage().clone()))

    def undo(self):
        """Undo all writes of the recorded calls."""
        for storage, before in self.saved.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            for kept, x in zip(tensors(results), tensors(function(*args, **kwargs))):
                if kept.data_ptr() != x.data_ptr():  # neither a view nor in place
                    kept.copy_(x)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def address(x):
    return x.untyped_storage().data_ptr()


def use_software_graphs(monkeypatch):
    """Replace torch.cuda's streams and graphs by stand-ins. Return the list to which recorded tapes will be added."""
    tapes = []

    class Graph:
        def replay(self):
            self.tape.replay()

    @contextlib.contextmanager
    def recording(graph, stream):
        graph.tape = Tape()
        with graph.tape:
            yield
        graph.tape.undo()  # because CUDA computes nothing while it records
        tapes.append(graph.tape)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": recording,
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return tapes
