"""Chooses the device, the number of threads and, under torchrun, the other processes that a training computes with."""

import contextlib
import ctypes
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.messages import one_line, tell

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
# Only rank 0 writes files and prints.
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
RANKS = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1


class DeviceError(ValueError):
    """The device that was asked for does not work; the message is one line."""


class GPUError(RuntimeError):
    """A GPU has failed or computes wrong results, and the CPU can go on with the run; the message is one line."""


def choose_device(name, kinds=("cuda", "cpu")):
    """Return the torch.device with this name, after trying it out.

    "auto" takes CUDA if a small product runs on it, then Apple's MPS, and otherwise the CPU. If there seems to be a GPU
    that does not work, a warning gives the reason. Several ranks on one machine take CUDA only if each of them gets a
    GPU of its own.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1" or "mps".
        kinds: the types of devices that the program supports; only with "mps" among them may Apple's GPUs be chosen.

    Raises:
        DeviceError: the device that was named does not work.
    """
    # The environment can ask for products that are rounded to TF32's 10 bits (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), after
    # which probabilities would be wrong by 4 %.
    torch.set_float32_matmul_precision("highest")
    try:
        device = named_device(name, kinds)
        try_out(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and collectives use the current device
        return device
    except Exception as error:  # PyTorch, a driver and a missing build raise errors of many types.
        reason = one_line(error)
    if name != "auto":
        raise DeviceError(f"--device {name} does not work here ({reason}); try --device cpu")
    if gpu_is_there():
        tell(
            f"warning: the GPU cannot be used ({reason}); going on with the CPU. "
            "Most often PyTorch and the GPU's driver do not match: see https://pytorch.org/get-started"
        )
    return torch.device("cpu")


def has_bf16(device):
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        return hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def named_device(name, kinds):
    """Return the torch.device that a name means. With several ranks on a machine, each has a GPU of its own, or all
    use the CPU."""
    cuda = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if RANKS > 1 else "cuda")
    if name == "auto":
        if "mps" in kinds and torch.backends.mps.is_available() and not torch.cuda.is_available():
            device = torch.device("mps")
        elif RANKS > 1 and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
            device = torch.device("cpu")
        else:
            device = cuda
    else:
        device = cuda if name == "cuda" else torch.device(name)
    if device.type not in kinds:
        raise ValueError(f"this program runs on {' and '.join(kinds)}, for which it has been made fast")
    return device


def try_out(device):
    """Compute a small product on the device, which raises an error of PyTorch's if the device does not work."""
    (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()


def works(device):
    """Return whether a small product runs on the device."""
    try:
        try_out(device)
        return True
    except RuntimeError:
        return False


def memory_of(device):
    """Return how many bytes of memory the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if sys.platform == "win32":
        return windows_memory().total
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device):
    """Return how many bytes of memory are free, or on a Mac, which does not say, all that it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        return windows_memory().free
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return memory_of(device)


class WindowsMemory(ctypes.Structure):
    """The structure MEMORYSTATUSEX, which Windows fills with numbers of bytes."""

    _fields_ = [("length", ctypes.c_uint32), ("percent_used", ctypes.c_uint32)]
    _fields_ += [(name, ctypes.c_uint64) for name in ("total", "free", "page_file", "page_file_free")]
    _fields_ += [(name, ctypes.c_uint64) for name in ("virtual", "virtual_free", "reserved")]


def windows_memory():
    """Return the `WindowsMemory` of now."""
    memory = WindowsMemory(length=ctypes.sizeof(WindowsMemory))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(memory))
    return memory


def gpu_name(device):
    """Return the name of the device and PyTorch's version, for reports of errors."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}"


def gpu_is_there():
    """Return whether the machine seems to have an NVIDIA GPU, even if PyTorch cannot use it."""
    return torch.cuda.is_available() or Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def set_threads(n_layer):
    """Use one thread for one layer, whose kernels are too small for two, unless OMP_NUM_THREADS is set."""
    if n_layer == 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def available_cores():
    """Return how many cores this process may use; under taskset and in some containers these are not all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def out_of_memory(error):
    """Return whether an error means that memory ran out.

    PyTorch and Python have classes for this, but PyTorch's allocator for the CPU raises a plain RuntimeError.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def unavailable(error):
    """Return whether an error means that memory ran out, the GPU has failed, or another process has it to itself."""
    return out_of_memory(error) or isinstance(error, torch.AcceleratorError)


@contextlib.contextmanager
def joined_ranks(device):
    """Belong to the process group within this context under torchrun; otherwise do nothing."""
    if RANKS == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The other ranks may wait long for an evaluation of rank 0.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()
        # If Python ends before gloo's thread has released the last collective, that thread aborts.
        time.sleep(0.2)
