"""Lets several ranks share a GPU, for tests: NCCL by default refuses that, gloo copies through host memory."""

from collections.abc import Callable
from typing import Any

from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.rank.attachment import current


def around_backend(original: Callable[[Any], str], platform: Any) -> str:
    """AROUND CudaDeviceMixin.get_torch_distributed_backend_str."""
    attachment = current()
    if attachment is None or not isinstance(attachment.assignment.platform, CudaPlatform):
        return original(platform)
    share = attachment.assignment.platform.shares[attachment.assignment.device]
    return original(platform) if share.alone else "gloo"
