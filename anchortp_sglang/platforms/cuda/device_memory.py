"""Maps segments of a GPU's memory as tensors of their bytes, without a copy."""

from collections.abc import Callable

import torch

from anchortp_sglang.memory import cuda_ipc, cuda_vmm
from anchortp_sglang.memory.arena import Part
from anchortp_sglang.memory.cuda_driver import device_by_uuid
from anchortp_sglang.memory.gpu import GpuShare


def map_whole(part: Part, gpu: GpuShare) -> tuple[torch.Tensor, Callable[[], None]]:
    """Map a whole segment for the GPU of this rank; return its bytes and a function that ends the mapping."""
    torch.cuda.init()  # otherwise the first tensor of a thread may find torch without a context
    device = device_by_uuid(gpu.uuid)
    sharing = cuda_ipc if gpu.sharing == "ipc" else cuda_vmm
    mapping = sharing.map_fd(part.fd, part.nbytes, device, part.writable)
    return tensor_at(mapping.address, part.nbytes, torch.device("cuda", device)), mapping.unmap


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """View ``nbytes`` bytes of mapped memory; the caller must keep them mapped."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,))
