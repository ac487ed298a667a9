"""The mover of GPU ranks: streams of its own, and pinned buffers that the checkpoint passes through.

torch chooses the copies: cudaMemcpyAsync where both sides are contiguous, else a kernel that gathers and scatters (for
loads, from a contiguous copy on the device). A peer's memory is mapped for this rank's device (cuda_vmm), so a copy
that torch takes for one within the device crosses NVLink or PCIe.
"""

import itertools
import os
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import torch

from anchortp_sglang.platforms.mover import Moved, pieces

STAGING_BYTES = 32 << 20
"""Size of each pinned buffer: large against the cost of a call, small against a GPU's host memory."""

_READERS = 8
"""Threads that copy from the mapped checkpoint into a pinned buffer: a single one cannot keep up with a link."""

_BUFFERS = 3  # one is being filled, one on its way, one about to be free


class _Staging:
    """A pinned buffer, and when its last content has left it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        self._left = torch.cuda.Event()

    def fill(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Copy ``source`` into the buffer, contiguous and in ``dtype``; valid until the next call."""
        self._left.synchronize()
        copy = self._bytes[: source.numel() * dtype.itemsize].view(dtype).view(source.shape)
        return copy.copy_(source)

    def leaves(self) -> None:
        """Note that the copies out of it are on the current stream."""
        self._left.record()


class CudaMover(AbstractContextManager["CudaMover"]):
    """Runs loads and copies beside each other, each kind in the order of its calls."""

    def __init__(self, device: torch.device) -> None:
        self.moved = Moved()
        self._device = device

    def __enter__(self) -> Self:
        torch.cuda.set_device(self._device)  # both apply to this thread alone (OpenMP's pools do)
        torch.set_num_threads(min(_READERS, len(os.sched_getaffinity(0))))
        self._loads, self._copies = torch.cuda.Stream(), torch.cuda.Stream()
        self._staging = itertools.cycle([_Staging() for _ in range(_BUFFERS)])
        self._layers: list[tuple[int | None, list[torch.cuda.Event]]] = []
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record(self._loads)
        self._copies.wait_event(self._start)
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loads.synchronize()
        self._copies.synchronize()
        self.moved.seconds = time.monotonic() - self._started
        for layer, events in self._layers:
            self.moved.layer_ready_s[layer] = max(self._start.elapsed_time(event) for event in events) / 1000

    def load(self, into: torch.Tensor, source: torch.Tensor) -> None:
        for part, piece in pieces(into, source, STAGING_BYTES):
            staging = next(self._staging)
            pinned = staging.fill(piece, into.dtype)
            with torch.cuda.stream(self._loads):
                part.copy_(pinned, non_blocking=True)
                staging.leaves()
        self.moved.loaded_bytes += into.nbytes

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._copies):
            into.copy_(source, non_blocking=True)
        self.moved.copied_bytes += into.nbytes

    def clear(self, into: torch.Tensor) -> None:
        with torch.cuda.stream(self._copies):
            into.zero_()

    def layer_done(self, layer: int | None) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for event, stream in zip(events, (self._loads, self._copies), strict=True):
            event.record(stream)
        self._layers.append((layer, events))
