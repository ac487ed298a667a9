"""How bytes come into a rank's shard: the interface of all movers, and the one for host memory.

A mover may work behind its caller's back; what was asked of it is done when its ``with`` block has been left.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import torch

from anchortp_sglang.memory.gpu import GpuShare


@dataclass
class Moved:
    """What a mover has done, for the log. Seconds count from its start; ``layer_ready_s`` by layer, None for what
    belongs to no layer."""

    loaded_bytes: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0
    layer_ready_s: dict[int | None, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = (self.loaded_bytes + self.copied_bytes) / max(self.seconds, 1e-9) / 1e9
        return (
            f"{self.loaded_bytes >> 20} MiB loaded and {self.copied_bytes >> 20} MiB copied in {self.seconds:.3f} s "
            f"({rate:.2f} GB/s), the first of {len(self.layer_ready_s)} layers ready after "
            f"{min(self.layer_ready_s.values(), default=0.0):.3f} s"
        )


class Mover(AbstractContextManager["Mover"], Protocol):
    """Fills parts of a device's memory. Targets may be strided; a call's tensors agree in shape, and
    but for loads in dtype."""

    moved: Moved

    def load(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """From host memory, which may be given away at once."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """From device memory, this device's or a peer's, which stays as it is until the end of the block."""

    def clear(self, into: torch.Tensor) -> None:
        """Zeros, in memory that nothing else was ever written to."""

    def layer_done(self, layer: int | None) -> None:
        """All of a layer has been asked for: note when it is there."""


Write = Callable[[torch.Tensor, memoryview], None]
"""Puts bytes where a tensor, contiguous and of as many, has its own."""

_STAGING_BYTES = 1 << 20  # stays in a core's cache


class HostMover(AbstractContextManager["HostMover"]):
    """Copies at once, in the caller's thread. ``write``: a faster way than through the mapping of the target, if there
    is one."""

    def __init__(self, write: Write | None = None) -> None:
        self.moved = Moved()
        self._write = write
        self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.moved.seconds = time.monotonic() - self._started

    def load(self, into: torch.Tensor, source: torch.Tensor) -> None:
        self.moved.loaded_bytes += into.nbytes
        if into.dim() == 2 and into.stride(0) == 1:
            into, source = into.t(), source.t()
        if self._write is None or not into.is_contiguous():
            into.copy_(_quick_to_copy(source))
            return
        for part, piece in pieces(into, source, _STAGING_BYTES):
            staged = self._staging[: part.nbytes]
            staged.view(part.dtype).view(part.shape).copy_(_quick_to_copy(piece))
            self._write(part, staged.numpy().data)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        into.copy_(source)
        self.moved.copied_bytes += into.nbytes

    def clear(self, into: torch.Tensor) -> None:
        """A new memfd holds zeros, and takes no memory for them."""

    def layer_done(self, layer: int | None) -> None:
        self.moved.layer_ready_s[layer] = time.monotonic() - self._started


def _quick_to_copy(source: torch.Tensor) -> torch.Tensor:
    """The same; a transposed matrix without gaps, which torch copies block by block, several times as fast."""
    return source.t().contiguous().t() if source.dim() == 2 and source.stride(0) == 1 else source


def gpu_mover(gpu: GpuShare) -> Mover:
    """The mover of a rank on a GPU."""
    from anchortp_sglang.memory.cuda_driver import device_by_uuid
    from anchortp_sglang.platforms.cuda.mover import CudaMover

    return CudaMover(torch.device("cuda", device_by_uuid(gpu.uuid)))


def pieces(into: torch.Tensor, source: torch.Tensor, limit_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same parts of both, none larger than ``limit_bytes`` (or than an element), the outermost dimension halved."""
    if into.nbytes <= limit_bytes or into.numel() == 1:
        yield into, source
        return
    dim = next(dim for dim, size in enumerate(into.shape) if size > 1)
    half = into.shape[dim] // 2
    for start, length in ((0, half), (half, into.shape[dim] - half)):
        yield from pieces(into.narrow(dim, start, length), source.narrow(dim, start, length), limit_bytes)
