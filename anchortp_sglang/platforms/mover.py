"""The interface of movers, which bring bytes into a rank's shard.

A mover may work asynchronously; all its work is done when its ``with`` block has been left.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class Moved:
    """Record of a mover's work, for the log.

    Seconds count from its start; ``layer_ready_s`` is by layer, None for what belongs to no layer.
    """

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
    """Fills parts of a device's memory.

    Targets may be strided; the tensors of a call agree in shape and, except for loads, in dtype.
    """

    moved: Moved

    def load(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Load from host memory, which may be reused at once."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from memory of this device or a peer, which must not change until the end of the block."""

    def clear(self, into: torch.Tensor) -> None:
        """Zero memory that nothing else was ever written to."""

    def layer_done(self, layer: int | None) -> None:
        """Note that all of a layer has been requested, to record when it is there."""


Write = Callable[[torch.Tensor, memoryview], None]
"""Writes bytes to the memory of a contiguous tensor of the same size."""


def pieces(into: torch.Tensor, source: torch.Tensor, limit_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split both tensors alike into parts of at most ``limit_bytes`` (or one element), by halving outer dimensions."""
    if into.nbytes <= limit_bytes or into.numel() == 1:
        yield into, source
        return
    dim = next(dim for dim, size in enumerate(into.shape) if size > 1)
    half = into.shape[dim] // 2
    for start, length in ((0, half), (half, into.shape[dim] - half)):
        yield from pieces(into.narrow(dim, start, length), source.narrow(dim, start, length), limit_bytes)
