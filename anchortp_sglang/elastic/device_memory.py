"""A segment of a device's memory as a tensor of its bytes, without a copy, on whatever platform."""

import warnings
from collections.abc import Callable

import torch

from anchortp_sglang.memory import cuda_ipc, cuda_vmm
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.memory.cuda_driver import device_by_uuid
from anchortp_sglang.memory.gpu import GpuShare


def byte_tensor(fd: int, nbytes: int, writable: bool, gpu: GpuShare | None) -> tuple[torch.Tensor, Callable[[], None]]:
    """The segment behind ``fd``, for use by this rank's device, and what ends its mapping.

    In host memory a mapping ends by itself, with the last tensor that uses it; on a GPU nothing keeps track.
    """
    if gpu is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a read-only mapping is what we want; torch warns about it
            return torch.frombuffer(map_fd(fd, nbytes, writable), dtype=torch.uint8), lambda: None
    torch.cuda.init()  # lest the first tensor of a thread finds torch without a context
    device = device_by_uuid(gpu.uuid)
    sharing = cuda_ipc if gpu.sharing == "ipc" else cuda_vmm
    mapping = sharing.map_fd(fd, nbytes, device, writable)
    return tensor_at(mapping.address, nbytes, torch.device("cuda", device)), mapping.unmap


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` bytes of mapped memory; whoever mapped it sees to it that it stays."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,))
