"""A device that is a GPU or a share of one: the facts by which its anchor and ranks use the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["GpuShare", "Sharing"]

Sharing = Literal["vmm", "ipc"]
"""How processes share memory. ``vmm``: by file descriptor; it outlives the process that made it. ``ipc``: by CUDA IPC
handle; it ends with that process."""


@dataclass(frozen=True)
class GpuShare:
    """A GPU, or a share of one. ``uuid``: as NVML writes it (``GPU-…``), since ordinals differ between processes.

    ``budget_bytes``: how much the device's anchor may allocate. ``alone``: no other device is on the same GPU.
    """

    uuid: str
    budget_bytes: int
    sharing: Sharing = "vmm"
    alone: bool = True

    def __post_init__(self) -> None:
        if not self.uuid.startswith("GPU-"):
            raise ValueError(
                f"{self.uuid!r} is no GPU's UUID, as nvidia-smi -L lists them (MIG parts are not supported)"
            )
        if self.budget_bytes <= 0:
            raise ValueError(f"the memory budget of {self.uuid} is {self.budget_bytes} bytes: it must be above 0")
        if self.sharing not in get_args(Sharing):
            raise ValueError(f"sharing is one of {', '.join(get_args(Sharing))}, not {self.sharing!r}")
