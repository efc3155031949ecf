"""The same GPT and the same games as in model.py and breakout_ascii.py, much faster.

FastGPT is the model on a CPU, and with more than one layer also on a GPU. With one layer DeviceGPT is the model on a
GPU, and DeviceBreakout plays the games there, so that nothing leaves it. GPURunner adds compilation, CUDA graphs and
bf16 to a training on a GPU, and compares the results with the CPU's.

Delete this folder and everything still trains, slowly.
"""

from fast.fast_gpt import FastGPT
from fast.gpu_games import DeviceBreakout
from fast.gpu_gpt import DeviceGPT
from fast.gpu_training import GPURunner
from model import GPT

__all__ = ["DeviceBreakout", "DeviceGPT", "FastGPT", "GPURunner", "gpt_for"]


def gpt_for(config, device):
    """Return an untrained GPT, on the CPU, of the class that is fastest on a device."""
    if device.type == "cuda" and config.n_layer == 1:
        return DeviceGPT(config)
    if device.type in ("cpu", "cuda"):
        return FastGPT(config)
    return GPT(config)  # because no shortcut has been tried on other devices
