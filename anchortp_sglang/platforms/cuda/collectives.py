"""Several ranks on one GPU, for tests: NCCL refuses them, gloo takes CUDA tensors through host memory."""

from collections.abc import Callable
from typing import Any

from anchortp_sglang.rank.attachment import current


def around_backend(original: Callable[[Any], str], platform: Any) -> str:
    """AROUND CudaDeviceMixin.get_torch_distributed_backend_str."""
    attachment = current()
    gpu = None if attachment is None else attachment.assignment.gpu
    return original(platform) if gpu is None or gpu.alone else "gloo"
