"""Describes the GPUs of this machine for ``anchortp doctor``."""

from __future__ import annotations

import os
from typing import Literal

from anchortp_sglang.platforms.cuda.probe import ProbeError, visible_gpus

__all__ = ["report"]


def report() -> tuple[Literal["PASS", "WARN"], str, str]:
    """Ask the GPUs, in another process. Return (level, what they are, what to do if that is not enough)."""
    if not os.path.exists("/dev/nvidiactl"):
        return "PASS", "none: --device cpu", ""
    try:
        gpus = visible_gpus()
    except ProbeError as error:
        return "WARN", str(error), "see nvidia-smi, or use --device cpu"
    detail = ", ".join(f"{gpu.name} ({gpu.total_bytes / 2**30:.0f} GiB, {gpu.sharing})" for gpu in gpus)
    if any(gpu.sharing == "ipc" for gpu in gpus):
        return "WARN", detail, "the driver refuses VMM export: memory is lost with its anchor; see docs/cuda.md"
    if any(len(gpu.peers) < len(gpus) for gpu in gpus):
        return "WARN", f"{detail}; not all have peer access", "choose GPUs that have, with CUDA_VISIBLE_DEVICES"
    return "PASS", detail, ""
