"""The same GPT and the same games as in model.py and breakout_ascii.py, much faster.

FastGPT reads pages on a CPU, and deeper models on a GPU too. DeviceGPT reads them, and DeviceBreakout plays the games,
when a training of one layer stays on a GPU. `GPURunner` adds compilation, CUDA graphs and bf16 to a training, and
checks the results against the CPU.

Delete this folder and everything still trains, slowly.
"""

from fast.fast_gpt import FastGPT
from fast.gpu_games import DeviceBreakout as DeviceBreakout
from fast.gpu_gpt import DeviceGPT
from fast.gpu_training import GPURunner as GPURunner
from model import GPT


def gpt_for(config, device):
    """Return an untrained GPT, on the CPU, of the class that is fastest on a device."""
    if device.type == "cuda" and config.n_layer == 1:
        return DeviceGPT(config)
    if device.type in ("cpu", "cuda"):
        return FastGPT(config)
    return GPT(config)  # because no shortcut has been tried on other devices
