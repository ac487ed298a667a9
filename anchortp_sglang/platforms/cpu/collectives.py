"""Collectives over shared memory for ranks on one machine.

They replace gloo, which costs about a millisecond for the few hundred floats that a decode step reduces, for CPU
tensors of any size. A payload larger than a slot passes through in pieces, so the path depends only on the call itself,
and ranks cannot disagree about it.
"""

import ctypes
import struct
from enum import IntEnum

import torch

from anchortp_sglang.platforms.cpu import futex
from anchortp_sglang.platforms.cpu.steps import COUNTER_STRIDE_BYTES, StepCounters

_PAGE_BYTES = 4096
_MAX_RANKS = _PAGE_BYTES // COUNTER_STRIDE_BYTES
_CACHED_SHAPES = 256
_LENGTH = struct.Struct("<q")
_SIXTEEN_BIT_FLOATS = (torch.bfloat16, torch.float16)


class Lane(IntEnum):
    """Independent parts of a region. Each has its own counters and slots."""

    TENSORS = 0
    OBJECTS = 1


_SLOT_BYTES = {Lane.TENSORS: 512 << 10, Lane.OBJECTS: 128 << 10}


def region_bytes(world_size: int) -> int:
    """Return the size of the region that all ranks of a generation map, zeroed: 1.25 MiB a rank and two pages.

    The kernel never allocates pages that no payload has reached.
    """
    return sum(_lane_bytes(lane, world_size) for lane in Lane)


def _lane_bytes(lane: Lane, world_size: int) -> int:
    return _PAGE_BYTES + 2 * world_size * _SLOT_BYTES[lane]


class SharedMemoryGroup:
    """The ranks 0 … world_size - 1 that map one region, on one of its lanes.

    ``buffer`` is the writable region (an mmap of a memfd, of at least region_bytes(world_size)). It must start zeroed,
    and stays mapped as long as the group lives. All ranks must make the same calls in the same order, each from one
    thread; shapes and dtypes must agree. There is no timeout: a group with a dead peer waits, asleep, until its process
    is killed with the rest of its generation.
    """

    def __init__(self, buffer: object, rank: int, world_size: int, lane: Lane = Lane.TENSORS) -> None:
        """Join the group. Raises RuntimeError where futex.supported() is false, ValueError for a wrong size."""
        if not futex.supported():
            raise RuntimeError("shared-memory collectives rely on the store order of x86-64, on Linux")
        memory = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if not 0 <= rank < world_size <= _MAX_RANKS or len(memory) < region_bytes(world_size):
            raise ValueError(
                f"rank {rank} of {world_size} with a region of {len(memory)} bytes: need "
                f"0 <= rank < world_size <= {_MAX_RANKS} and region_bytes(world_size) bytes"
            )
        self.rank, self.world_size = rank, world_size
        start = sum(_lane_bytes(earlier, world_size) for earlier in Lane if earlier < lane)
        self._bytes = memory[start : start + _lane_bytes(lane, world_size)]
        self._torch_bytes = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._address = self._torch_bytes.data_ptr()
        self._slot_bytes = _SLOT_BYTES[lane]
        counters = self._bytes[: world_size * COUNTER_STRIDE_BYTES].cast("q")
        self._steps = StepCounters(counters, self._address, rank, world_size)
        self._views: dict[tuple[int, torch.dtype, torch.Size], tuple[torch.Tensor, ...]] = {}

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; return ``tensor``.

        Ranks are added in the same order on every rank, so the result is equal to the last bit on all of them. Three or
        more 16-bit floats are added in float32 and rounded once.
        """
        if self.world_size == 1:
            return tensor
        if not tensor.is_contiguous():
            return tensor.copy_(self.all_reduce(tensor.contiguous()))
        for piece in self._pieces(tensor):
            _add_in_order(self._exchange(piece), piece)
            self._steps.note_read()
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors along ``dim`` in the order of ranks."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.contiguous()
        if tensor.nbytes > self._slot_bytes:
            by_rank = tensor.new_empty((self.world_size, *tensor.shape))
            self.all_gather_into(by_rank, tensor)
            return torch.cat(by_rank.unbind(), dim)
        gathered = torch.cat(self._exchange(tensor), dim)
        self._steps.note_read()
        return gathered

    def all_gather_into(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write the ranks' tensors, flattened, one after the other into ``output`` (contiguous)."""
        by_rank = output.view(self.world_size, tensor.numel())
        start = 0
        for piece in self._pieces(tensor.reshape(-1)):
            stop = start + piece.numel()
            for part, row in zip(self._exchange(piece), by_rank, strict=True):
                row[start:stop].copy_(part)
            self._steps.note_read()
            start = stop

    def broadcast_bytes(self, payload: bytes | None, src: int) -> bytes:
        """Return ``payload`` of rank ``src`` on every rank; the other ranks pass None.

        ``src`` returns at once, up to two pieces ahead of the slowest reader.
        """
        if self.rank != src:
            return self._receive(src)
        if payload is None:
            raise ValueError(f"rank {src} broadcasts and must pass the payload")
        message = memoryview(_LENGTH.pack(len(payload)) + payload)
        for start in range(0, len(message), self._slot_bytes):
            piece = message[start : start + self._slot_bytes]
            slot = self._steps.enter()
            self._steps.await_slot_free()
            offset = self._offset(slot, src)
            self._bytes[offset : offset + len(piece)] = piece
            self._steps.publish_read()  # implies "written": a source has nothing to read
        return payload

    def _receive(self, src: int) -> bytes:
        received, total = bytearray(), _LENGTH.size
        while len(received) < total:
            offset = self._offset(self._steps.enter(), src)
            self._steps.await_written(src)
            if not received:
                total += _LENGTH.unpack_from(self._bytes, offset)[0]
            received += self._bytes[offset : offset + min(self._slot_bytes, total - len(received))]
            self._steps.publish_read()
        return bytes(received[_LENGTH.size :])

    def _exchange(self, piece: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every rank's ``piece`` (contiguous, at most a slot), as views that are valid until note_read()."""
        steps = self._steps
        slot = steps.enter()
        steps.await_slot_free()
        # memmove and cached views: building a torch view for each call would cost more than a small copy.
        ctypes.memmove(self._address + self._offset(slot, self.rank), piece.data_ptr(), piece.nbytes)
        steps.publish_written()
        views = self._views.get((slot, piece.dtype, piece.shape)) or self._make_views(slot, piece)
        steps.await_written()
        return views

    def _make_views(self, slot: int, piece: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(self._views) >= _CACHED_SHAPES:
            self._views.clear()
        offsets = [self._offset(slot, rank) for rank in range(self.world_size)]
        flat = [self._torch_bytes[offset : offset + piece.nbytes].view(piece.dtype) for offset in offsets]
        views = tuple(part.view(piece.shape) for part in flat)
        self._views[slot, piece.dtype, piece.shape] = views
        return views

    def _offset(self, slot: int, rank: int) -> int:
        return _PAGE_BYTES + (slot * self.world_size + rank) * self._slot_bytes

    def _pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a contiguous tensor itself if it fits a slot, else flat views of it that do."""
        if tensor.nbytes <= self._slot_bytes:
            return (tensor,)
        return tensor.view(-1).split(self._slot_bytes // tensor.element_size())


def _add_in_order(parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    if len(parts) > 2 and out.dtype in _SIXTEEN_BIT_FLOATS:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
