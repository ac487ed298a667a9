"""Attaches a rank to its share of the model and to the anchors' memory that holds it.

Each rank process has one attachment, which also holds what such a process has only once. Hooks ask ``current()``;
without an attachment (main, the detokenizer, the zygote) they leave SGLang as it is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchortp_sglang.anchor.client import AnchorClient, HandleGrant
from anchortp_sglang.memory.arena import Part, make_writable, map_fd
from anchortp_sglang.planning.layout.extents import ShardExtents, WeightPlacement
from anchortp_sglang.planning.layout.kv_layout import KVLayout, KVPlan, MirrorPlan, kv_layout
from anchortp_sglang.planning.layout.shards import ShardLayout, shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.platforms.base import Platform
from anchortp_sglang.rank.heartbeat import Counters

if TYPE_CHECKING:  # these modules import this one
    from anchortp_sglang.rank.kv.prefixes import Prefixes
    from anchortp_sglang.rank.rehearsal import Rehearsal
    from anchortp_sglang.rank.weights.loader import Filler

HOST_DEVICE = -1

_ANCHOR_TIMEOUT_S = 4.0  # main has just had an answer from it, and opening a handle takes microseconds


@dataclass(frozen=True)
class Assignment:
    """One rank's part of a generation; made by the coordinator, sent to the rank over its pipe.

    ``weights``: where they are, or shall be. ``previous``: the complete weights that the anchors still hold, None when
    there are none; equal to ``weights`` when nothing is to be moved. ``previous_kv``: the slots of its KV.
    ``restore_prefixes``: whether its KV and slot table may be used. ``running``: chain hashes of the open requests'
    tokens, as bytes of uint64. ``random_weights``: made up instead of read (``--load-format dummy``).
    ``standby``: the rank is built while another generation serves. ``leaving``: devices of ``previous`` that this
    generation does without, although their memory is still there. ``fill_bytes_per_s``: bound of the rate at which
    weights are moved; 0 for none.
    """

    generation: int
    rank: int
    device: int
    run_dir: Path
    run_id: str
    checkpoint: Path
    model: ModelAxes
    weights: WeightPlacement
    previous: WeightPlacement | None
    kv: KVPlan
    previous_kv: KVPlan
    restore_prefixes: bool
    mirror: MirrorPlan | None
    platform: Platform
    running: bytes = b""
    random_weights: bool = False
    standby: bool = False
    leaving: tuple[int, ...] = ()
    fill_bytes_per_s: float = 0.0

    @property
    def ownership(self) -> Ownership:
        return self.weights.ownership


def kv_namespace(checkpoint: Path, model: ModelAxes) -> bytes:
    """Tie KV to what it was computed with: the checkpoint and its dtype."""
    return f"{checkpoint}\0{model.dtype}".encode()


def kv_segment(layout: KVLayout) -> str:
    """Name the KV segment by its layout: a device whose heads and slots stay the same keeps its KV where it is."""
    return f"kv-{layout.digest()}"


def slot_table_segment(ownership: Ownership, plan: KVPlan) -> str:
    """Name an ownership's slot table. With another ownership comes another table: the old one stays whole meanwhile."""
    return f"slot-table-{ownership.digest()}-{plan.rows}"


def mirror_segment(plan: MirrorPlan) -> str:
    """Name the mirror, which lives through all ownerships."""
    return f"kv-mirror-{plan.rows}"


def control_segment(generation: int, standby: bool = False) -> str:
    """Name the shared memory of one generation's counters and collectives.

    A standby has its own: ranks that are forked in its stead have the same number.
    """
    return f"control-{generation}-standby" if standby else f"control-{generation}"


class Attachment:
    """A rank's open segments, and what else it has only once. Mappings live as long as the process.

    ``rank/main.py`` sets ``filler``, ``counters`` and ``prefixes``, in this order, before SGLang's scheduler is made.
    In a rank that stands by it replaces ``prefixes`` when its generation is to run.
    """

    counters: Counters
    filler: Filler
    """Fills this rank's weights."""
    prefixes: Prefixes

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.standing_by = assignment.standby
        """Whether another generation still serves with the KV and slot table that this rank is to take over."""
        self.title = ""
        """The process title that SGLang chose, while a rank that stands by has another."""
        self.cache: Any = None
        """SGLang's pools, allocator and prefix tree, as kv_cache_builder.build_kv_cache returned them; None before."""
        self.layout: ShardLayout = shard_layout(assignment.model, assignment.ownership, assignment.rank)
        self.kv_layout: KVLayout = kv_layout(assignment.model, assignment.kv, assignment.ownership, assignment.rank)
        self.fds: dict[tuple[int, str], tuple[int, int]] = {}
        """(descriptor, bytes) of what is mapped, so that an anchor that dies can be given its segments back."""
        self._kv_bytes: torch.Tensor | None = None
        self.collectives: Any = None
        """The platform's replacement of SGLang's collectives; None where those stay."""
        self.groups: Any = None
        """The process groups that SGLang's coordinators share, where the platform has them do so."""
        self.built_config: Any = None
        """The ModelConfig of the model that is being built; None before and after."""
        self.serving = False
        """Whether all ranks of the generation are ready, so that requests are taken; set on rank 0 only."""
        self.leaving = False
        """Whether the loop has ended because another generation takes over."""
        self.rehearsal: Rehearsal | None = None
        """Set while this rank, which stands by, serves requests of its own."""

    def kv_tensor(self) -> torch.Tensor:
        """Map this rank's KV segment, writable unless the rank stands by, once; return its bytes."""
        if self._kv_bytes is None:
            assignment = self.assignment
            fd, nbytes, _ = self._open_recorded(assignment.device, kv_segment(self.kv_layout))
            parts = [Part(fd, 0, nbytes, writable=not self.standing_by)]
            self._kv_bytes, _ = assignment.platform.byte_tensor(assignment.device, parts)
        return self._kv_bytes

    def stand_by_no_more(self) -> None:
        """Make the KV writable: the generation that wrote to it is dead or has left. Raises OSError."""
        kv = self.kv_tensor()
        make_writable(kv.data_ptr(), kv.numel())
        self.standing_by = False

    def kv_memory(self) -> memoryview:
        """Return this rank's KV segment for host code. Only where the platform has it in host memory."""
        return memoryview(self.kv_tensor().numpy())

    @property
    def namespace(self) -> bytes:
        return kv_namespace(self.assignment.checkpoint, self.assignment.model)

    def map(self, device: int, segment: str, writable: bool) -> mmap.mmap:
        """Map a segment in host memory (HOST_DEVICE: the host anchor's).

        Raises AnchorError when the anchor refuses or does not answer.
        """
        fd, nbytes, _ = self._open_recorded(device, segment)
        return map_fd(fd, nbytes, writable=writable)

    def map_briefly(self, device: int, segment: str) -> mmap.mmap:
        """Map a segment read-only that is about to be freed: once the mapping goes, nothing here holds it."""
        return self.map_identified(device, segment)[0]

    def map_identified(self, device: int, segment: str) -> tuple[mmap.mmap, tuple[int, int]]:
        """Map a segment as ``map_briefly`` does; return its ``identity``, too."""
        fd, nbytes, _ = self._open(device, segment)
        try:
            return map_fd(fd, nbytes, writable=False), _identity(fd)
        finally:
            os.close(fd)

    def identity(self, device: int, segment: str) -> tuple[int, int]:
        """Return what a mapped segment shares with no other one: another of the same name is other memory."""
        return _identity(self.fds[device, segment][0])

    def weights(self) -> torch.Tensor:
        """Return the bytes of this rank's shard, read-only. Raises like ``map``."""
        assignment = self.assignment
        shard = assignment.weights.shards[assignment.rank]
        fds = {name: self._open_recorded(assignment.device, name).fd for name in shard.sizes}
        return self._shard_tensor(shard, fds, writable=False)[0]

    @contextmanager
    def shard_briefly(self, device: int, shard: ShardExtents, writable: bool) -> Iterator[torch.Tensor]:
        """Map a shard for the time of a block, and yield its bytes.

        When the block has been left and the tensor is gone, this process holds the shard no longer.
        ``writable``: what was added for the shard may be written to; the rest must stay as it is.
        """
        with ExitStack() as stack:
            fds = {}
            for name in shard.sizes:
                fds[name] = self._open(device, name).fd
                stack.callback(os.close, fds[name])
            tensor, unmap = self._shard_tensor(shard, fds, writable)
        try:
            yield tensor
        finally:
            unmap()

    @contextmanager
    def shard_writer(self, device: int, shard: ShardExtents) -> Iterator[Callable[[int, memoryview], None]]:
        """Yield, for the time of a block, a function that writes bytes at an offset of a shard in host memory.

        It writes past all mappings, which is cheaper for pages that are new to the kernel. It raises RuntimeError
        outside of what was added for the shard, as the rest must stay.
        """
        fd = self._open(device, shard.added).fd

        def write(start: int, data: memoryview) -> None:
            for segment, offset, nbytes in shard.find(start, start + len(data)):
                if segment != shard.added:
                    raise RuntimeError(f"bytes {start} to {start + len(data)} of the shard are to stay as they are")
                _write_all(fd, data[:nbytes], offset)
                data = data[nbytes:]

        try:
            yield write
        finally:
            os.close(fd)

    def _shard_tensor(
        self, shard: ShardExtents, fds: dict[str, int], writable: bool
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        parts = [
            Part(fds[extent.segment], extent.offset, extent.nbytes, writable and extent.segment == shard.added)
            for extent in shard.extents
        ]
        return self.assignment.platform.byte_tensor(self.assignment.device, parts)

    def _open_recorded(self, device: int, segment: str) -> HandleGrant:
        grant = self._open(device, segment)
        self.fds[device, segment] = grant.fd, grant.nbytes
        return grant

    def _open(self, device: int, segment: str) -> HandleGrant:
        assignment = self.assignment
        client = AnchorClient(assignment.run_dir, assignment.run_id, device, _ANCHOR_TIMEOUT_S)
        return client.open_handle(assignment.generation, segment)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


_current: Attachment | None = None


def attach(assignment: Assignment) -> Attachment:
    """Attach this process, once and for good. Raises RuntimeError if it is attached."""
    global _current
    if _current is not None:
        raise RuntimeError("this process is already attached: a new generation needs new processes")
    _current = Attachment(assignment)
    return _current


def current() -> Attachment | None:
    """Return this process's attachment; None if it is no rank."""
    return _current
