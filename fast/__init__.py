"""The same GPT and the same games, faster. Delete this folder and everything still trains, slowly.

one layer, CPU            FastGPT shares lines and pieces of lines      line_index.py attention_tables.py shared_attention.py fast_gpt.py
one layer, CUDA           DeviceGPT shares lines, and the games run on  attention_tables.py gpu_gpt.py gpu_games.py
                          the GPU: DeviceBreakout
more layers, CPU or CUDA  FastGPT shares prefixes of pages              line_index.py shared_prefixes.py fast_gpt.py
training on CUDA          checks itself against the CPU; more layers    cuda_graphs.py gpu_training.py self_test.py
                          take bf16; in one process it is compiled, and
                          one layer is recorded as CUDA graphs
"""

from fast.fast_gpt import FastGPT
from fast.gpu_games import DeviceBreakout as DeviceBreakout
from fast.gpu_gpt import DeviceGPT
from fast.gpu_training import GPURunner as GPURunner
from model import GPT


def gpt_for(config, device):
    """An untrained GPT, on the CPU, of the class whose shortcuts suit the device."""
    if device.type == "cuda" and config.n_layer == 1:
        return DeviceGPT(config)
    if device.type in ("cpu", "cuda"):
        return FastGPT(config)
    return GPT(config)  # no shortcut has been tried on other devices
