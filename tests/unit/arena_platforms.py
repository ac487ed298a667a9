"""The platforms that the arena contract is tested on, and why one may be missing here."""

from __future__ import annotations

import os

from anchortp_sglang.memory.gpu import GpuShare, Sharing

BUDGET_BYTES = 64 << 20
STAND_IN = "ANCHORTP_TEST_STAND_IN_DRIVER"
"""Set by test_cuda_stand_in.py, which runs the contract on a driver that is none."""


def gpu_uuid() -> str | None:
    """A GPU to test with."""
    if not (os.path.exists("/dev/nvidiactl") or os.environ.get(STAND_IN)):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError:
        return None


def share(sharing: Sharing) -> GpuShare | None:
    """A share of it, for one anchor; None if there is none."""
    uuid = gpu_uuid()
    return None if uuid is None else GpuShare(uuid, BUDGET_BYTES, sharing)
