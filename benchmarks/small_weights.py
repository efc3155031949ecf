"""Train the GPT from nanoGPT's initial weights:  python -m benchmarks.small_weights --seed 0 --run_dir RUN

It takes the constants of train_ppo.py, and `train_ppo.py --resume` goes on with its runs. If RUN is
runs/sweep/train_ppo/small_weights,seed=0 then benchmarks/learning.py lists it beside the runs of a sweep.
"""

import harness.start  # before the slow imports

import math

import torch

import train_ppo
from harness.supervise import run_script
from model import GPT


@torch.no_grad()
def small_weights(gpt):
    """Draw nanoGPT's weights: standard deviation 0.02, and less in layers that write into the residual stream."""
    for name, parameter in gpt.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02 / math.sqrt(2 * gpt.config.n_layer) if "c_proj" in name else 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def main(argv=()):
    GPT.init_weights = small_weights  # evaluations load weights, so their processes need not know of it
    return train_ppo.main(argv)


if __name__ == "__main__":
    run_script(main, "-m benchmarks.small_weights")
