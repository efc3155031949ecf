"""The device that was asked for is chosen, or an error or a warning of one line says why not."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from harness import device
from harness.device import DeviceError, available_cores, choose_device, out_of_memory


def broken(*args, **kwargs):
    """Fail like a product on a GPU that PyTorch has no code for."""
    raise RuntimeError("CUDA error: no kernel image\nmore lines")


def broken_pipe(text):
    """Fail like a write to a pipe that nobody reads."""
    raise BrokenPipeError


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch, capsys):
    """Without a GPU there is nothing to warn of."""
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(device, "try_out", broken)
    monkeypatch.setattr(device, "gpu_is_there", lambda: False)
    assert choose_device("auto") == torch.device("cpu") and capsys.readouterr().err == ""


def test_apples_gpu_is_taken_where_a_program_can_use_it(monkeypatch):
    """MPS is chosen only by a program that lists it among its kinds of devices."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "try_out", lambda device: None)
    assert choose_device("auto", ("cuda", "mps", "cpu")) == choose_device("mps", ("mps",)) == torch.device("mps")
    with pytest.raises(DeviceError, match="--device mps does not work here .this program runs on cuda and cpu"):
        choose_device("mps")


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch, capsys):
    """The name "auto" goes on with the CPU after a warning, even an unwritable one; "cuda" is an error."""
    monkeypatch.setattr(torch, "ones", broken)
    monkeypatch.setattr(device, "gpu_is_there", lambda: True)
    assert choose_device("auto") == torch.device("cpu")
    err = capsys.readouterr().err
    assert err.startswith("warning: the GPU cannot be used (CUDA error: no kernel image)") and err.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=broken_pipe, isatty=lambda: False))
        assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"--device cuda does not work here .*no kernel image\); try --device cpu$"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta:x", "", "mps", "xpu:0"])
def test_devices_that_do_not_work(name):
    """Names of no device, and of devices that are not there, give one line."""
    with pytest.raises(DeviceError, match="does not work here") as error:
        choose_device(name)
    assert "\n" not in str(error.value) and "attribute" not in str(error.value)


def test_products_are_not_rounded_to_tf32():
    """Choosing a device turns TF32 off, whatever was set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    choose_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


def test_what_is_lack_of_memory():
    """The errors of Python, of CUDA and of PyTorch's allocator for the CPU are recognised, and no others."""
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    """Where the system does not say which cores these are, all cores count."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert available_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()


def test_one_layer_trains_on_one_thread(monkeypatch):
    """Two layers, or OMP_NUM_THREADS, leave PyTorch's number of threads as it is."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.set_threads(n_layer=1)
    device.set_threads(n_layer=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device.set_threads(n_layer=1)
    assert threads == [1]


def test_each_rank_has_a_gpu_of_its_own_or_all_have_the_cpu(monkeypatch):
    """Two ranks on a machine with one GPU both use the CPU; with two GPUs rank 1 gets the second."""
    monkeypatch.setattr(device, "RANKS", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(device, "try_out", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for gpus, chosen in ((1, "cpu"), (2, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert choose_device("auto") == torch.device(chosen)
