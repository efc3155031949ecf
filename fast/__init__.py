"""The same GPT and the same games, thousands of times faster. Delete this folder and everything still trains, slowly.

FastGPT computes what the pages of a batch have in common once, on the CPU and, for deeper models, on a GPU. DeviceGPT and
DeviceBreakout keep a one-layer training on the GPU, where run_as_cuda_graphs replays its two repeated steps.
"""

from fast.cuda_graphs import run_as_cuda_graphs
from fast.device_breakout import DeviceBreakout
from fast.device_gpt import DeviceGPT
from fast.fast_gpt import FastGPT
from model import GPT


def fast_gpt(config, device):
    """An untrained GPT with the shortcuts that suit the device."""
    if device.type == "cuda" and config.n_layer == 1:
        return DeviceGPT(config)
    return FastGPT(config) if device.type in ("cpu", "cuda") else GPT(config)
