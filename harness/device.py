"""Which device computes, with how many threads, and together with which other processes."""

import contextlib
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.messages import one_line, tell

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, RANKS = (
    (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if UNDER_TORCHRUN else (0, 1)
)  # rank 0 alone writes


class DeviceError(ValueError):
    """A device that does not work, in one line."""


class GPUError(RuntimeError):
    """A GPU that has failed, or that computes something wrong, in one line. The CPU can go on with the run."""


def choose_device(name, kinds=("cuda", "cpu")):
    """One of "auto", "cpu", "cuda", "cuda:1" -> torch.device. Raises DeviceError if a device that was named does not work.

    kinds: of devices to choose from; "mps", Apple's GPUs, may be one.
    "auto" takes CUDA if a small product runs on it, then MPS, and otherwise the CPU; if there seems to be a GPU, it prints why. Several
    ranks on a machine take CUDA only if there is a GPU for each. From here on products of float32 there keep float32's precision.
    """
    # Not to TF32's 10 bits, which the environment can ask for (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE): probabilities would be off by 4 %
    torch.set_float32_matmul_precision("highest")
    try:
        return working_device(name, kinds)
    except Exception as error:  # whatever torch, a driver or a missing build raises
        reason = one_line(error)
    if name != "auto":
        raise DeviceError(f"--device {name} does not work here ({reason}); try --device cpu")
    if gpu_is_there():
        tell(
            f"warning: the GPU cannot be used ({reason}); going on with the CPU. Most often torch and the GPU's driver do not fit: "
            "see https://pytorch.org/get-started"
        )
    return torch.device("cpu")


def working_device(name, kinds):
    if name == "auto" and "mps" in kinds and not torch.cuda.is_available() and torch.backends.mps.is_available():
        name = "mps"
    own = f"cuda:{os.environ['LOCAL_RANK']}" if RANKS > 1 else "cuda"
    if name == "auto" and RANKS > 1 and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        own = "cpu"  # all ranks of a machine alike
    device = torch.device(own if name in ("auto", "cuda") else name)
    if device.type not in kinds:
        raise ValueError(f"this program runs on {' and '.join(kinds)}, for which it has been made fast")
    try_out(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and collectives ask for the current one
    return device


def try_out(device):
    """Raises whatever torch raises where the device does not work."""
    (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()


def works(device):
    """Whether a small product runs on the device."""
    try:
        try_out(device)
        return True
    except RuntimeError:
        return False


def memory_of(device):
    """-> bytes of memory that the device has, infinity where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else float("inf")


def free_memory(device):
    """-> bytes of memory that are left, all that the device has where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), memory_of(device))


def gpu_name(device):
    """-> the device and torch's version, for reports of errors."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}"


def gpu_is_there():
    return torch.cuda.is_available() or Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def set_threads(n_layer):
    """One thread for one layer, whose kernels on a CPU are too small for two (docs/performance.md). OMP_NUM_THREADS overrules."""
    if n_layer == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def available_cores():
    """How many cores this process may use: fewer than the machine has, under taskset or in some containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def out_of_memory(error):
    """Whether memory ran out: torch and Python have errors of their own; that of torch's CPU allocator is a RuntimeError that its text
    tells apart."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def unavailable(error):
    """Whether memory ran out, or another process has the GPU to itself, or it has failed."""
    return out_of_memory(error) or isinstance(error, torch.AcceleratorError)


@contextlib.contextmanager
def joined_ranks(device):
    """Joins the process group under torchrun; otherwise does nothing."""
    if RANKS == 1:
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1)
    )  # an evaluation may take long
    try:
        yield
    finally:
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's thread aborts if Python ends before it has let go of the last collective
