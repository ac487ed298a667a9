"""The mover for host memory."""

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import torch

from anchortp_sglang.platforms.mover import Moved, Write, pieces

_STAGING_BYTES = 1 << 20  # stays in a core's cache


class HostMover(AbstractContextManager["HostMover"]):
    """Copies at once, in the caller's thread. ``write``: a faster way than through the target's mapping, or None."""

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
        """Do nothing: a new memfd holds zeros, and takes no memory for them."""

    def layer_done(self, layer: int | None) -> None:
        self.moved.layer_ready_s[layer] = time.monotonic() - self._started


def _quick_to_copy(source: torch.Tensor) -> torch.Tensor:
    """Return the same values; a transposed matrix without gaps is copied by torch in blocks, several times as fast."""
    return source.t().contiguous().t() if source.dim() == 2 and source.stride(0) == 1 else source
