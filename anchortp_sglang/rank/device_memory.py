"""Segments of a device's memory as a tensor of their bytes, without a copy, on whatever platform."""

from collections.abc import Callable, Sequence

import torch

from anchortp_sglang.memory import cuda_ipc, cuda_vmm
from anchortp_sglang.memory.arena import Part, map_together
from anchortp_sglang.memory.cuda_driver import device_by_uuid
from anchortp_sglang.memory.gpu import GpuShare


def byte_tensor(parts: Sequence[Part], gpu: GpuShare | None) -> tuple[torch.Tensor, Callable[[], None]]:
    """Parts of segments one after the other, for use by this rank's device, and what ends their mapping.

    In host memory a mapping ends by itself, with the last tensor that uses it; on a GPU nothing keeps track. There a
    single part is mapped, a whole segment.
    """
    if gpu is None:
        return torch.frombuffer(map_together(parts), dtype=torch.uint8), lambda: None
    ((fd, _, nbytes, writable),) = parts
    torch.cuda.init()  # lest the first tensor of a thread finds torch without a context
    device = device_by_uuid(gpu.uuid)
    sharing = cuda_ipc if gpu.sharing == "ipc" else cuda_vmm
    mapping = sharing.map_fd(fd, nbytes, device, writable)
    return tensor_at(mapping.address, nbytes, torch.device("cuda", device)), mapping.unmap


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` bytes of mapped memory; whoever mapped it sees to it that it stays."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,))
