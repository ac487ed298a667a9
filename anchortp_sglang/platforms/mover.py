"""How bytes come into a rank's shard: the interface of all movers.

A mover may work behind its caller's back; what was asked of it is done when its ``with`` block has been left.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch


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


def pieces(into: torch.Tensor, source: torch.Tensor, limit_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same parts of both, none larger than ``limit_bytes`` (or than an element), the outermost dimension halved."""
    if into.nbytes <= limit_bytes or into.numel() == 1:
        yield into, source
        return
    dim = next(dim for dim, size in enumerate(into.shape) if size > 1)
    half = into.shape[dim] // 2
    for start, length in ((0, half), (half, into.shape[dim] - half)):
        yield from pieces(into.narrow(dim, start, length), source.narrow(dim, start, length), limit_bytes)
