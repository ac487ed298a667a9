"""What a rank is attached to: its share of the model and the anchors' memory that holds it.

One rank process is one attachment. Hooks ask ``current()``; without an attachment (main, the detokenizer, the
zygote) they leave SGLang as it is.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from anchortp_sglang.anchor.client import AnchorClient, HandleGrant
from anchortp_sglang.memory.arena import Part, map_fd
from anchortp_sglang.planning.layout.extents import ShardExtents, WeightPlacement
from anchortp_sglang.planning.layout.kv_layout import KVLayout, KVPlan, MirrorPlan, kv_layout
from anchortp_sglang.planning.layout.shards import ShardLayout, shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.platforms.base import Platform

HOST_DEVICE = -1

_ANCHOR_TIMEOUT_S = 4.0  # it has answered main a moment ago, and a handle takes it microseconds


@dataclass(frozen=True)
class Assignment:
    """One rank's part of a generation; made by the coordinator, sent to the rank over its pipe.

    ``weights``: where they are, or shall be. ``previous``: the complete weights that the anchors still hold, None when
    there are none; equal to ``weights`` when nothing is to be moved. ``previous_kv``: the slots of its KV.
    ``restore_prefixes``: whether its KV and slot table may be used. ``running``: chain hashes of the open requests'
    tokens, as bytes of uint64.
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

    @property
    def ownership(self) -> Ownership:
        return self.weights.ownership


def kv_namespace(checkpoint: Path, model: ModelAxes) -> bytes:
    """Ties KV to what it was computed with: the checkpoint and its dtype."""
    return f"{checkpoint}\0{model.dtype}".encode()


def kv_segment(layout: KVLayout) -> str:
    """Named by its layout: a device whose heads and slots stay the same keeps its KV where it is."""
    return f"kv-{layout.digest()}"


def slot_table_segment(ownership: Ownership, plan: KVPlan) -> str:
    """Of the KV of this ownership. With another one comes another table: the old one stays whole until it is ready."""
    return f"slot-table-{ownership.digest()}-{plan.rows}"


def mirror_segment(plan: MirrorPlan) -> str:
    """Lives through all ownerships."""
    return f"kv-mirror-{plan.rows}"


def control_segment(generation: int) -> str:
    """Shared memory of one generation's collectives and heartbeats."""
    return f"control-{generation}"


class Attachment:
    """A rank's open segments. Mappings live as long as the process."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        at = assignment
        self.layout: ShardLayout = shard_layout(at.model, at.ownership, at.rank)
        self.kv_layout: KVLayout = kv_layout(at.model, at.kv, at.ownership, at.rank)
        self.fds: dict[tuple[int, str], tuple[int, int]] = {}
        """(descriptor, bytes) of what is mapped, so that an anchor that dies can be given its segments back."""
        self._kv_bytes: torch.Tensor | None = None

    def kv_tensor(self) -> torch.Tensor:
        """The bytes of this rank's KV segment, writable; mapped once."""
        if self._kv_bytes is None:
            at = self.assignment
            fd, nbytes, _ = self._keep(at.device, kv_segment(self.kv_layout))
            self._kv_bytes, _ = at.platform.byte_tensor(at.device, [Part(fd, 0, nbytes, writable=True)])
        return self._kv_bytes

    def kv_memory(self) -> memoryview:
        """The same for host code, where the platform has it in host memory."""
        return memoryview(self.kv_tensor().numpy())

    @property
    def namespace(self) -> bytes:
        return kv_namespace(self.assignment.checkpoint, self.assignment.model)

    def map(self, device: int, segment: str, writable: bool) -> mmap.mmap:
        """Map a segment in host memory (HOST_DEVICE: the host anchor's).

        Raises AnchorError when the anchor refuses or does not answer.
        """
        fd, nbytes, _ = self._keep(device, segment)
        return map_fd(fd, nbytes, writable=writable)

    def map_briefly(self, device: int, segment: str) -> mmap.mmap:
        """The same, read-only, of a segment that is about to be freed: when the mapping goes, nothing holds it."""
        fd, nbytes, _ = self._open(device, segment)
        try:
            return map_fd(fd, nbytes, writable=False)
        finally:
            os.close(fd)

    def weights(self) -> torch.Tensor:
        """The bytes of this rank's shard, read-only. Raises like ``map``."""
        at = self.assignment
        shard = at.weights.shards[at.rank]
        return self._shard_tensor(shard, {name: self._keep(at.device, name).fd for name in shard.sizes}, False)[0]

    @contextmanager
    def shard_briefly(self, device: int, shard: ShardExtents, writable: bool) -> Iterator[torch.Tensor]:
        """The bytes of a shard for the time of a block: when it has been left and the tensor is gone, nothing here
        holds it. ``writable``: those that were added for it; what was there before must not be written to."""
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
        """For the time of a block: what writes bytes at an offset of a shard in host memory, into what was added for
        it. It goes past all mappings, as pages that are new to the kernel cost less so. Raises RuntimeError where the
        shard is to stay as it is."""
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

    def _keep(self, device: int, segment: str) -> HandleGrant:
        grant = self._open(device, segment)
        self.fds[device, segment] = grant.fd, grant.nbytes
        return grant

    def _open(self, device: int, segment: str) -> HandleGrant:
        at = self.assignment
        client = AnchorClient(at.run_dir, at.run_id, device, _ANCHOR_TIMEOUT_S)
        return client.open_handle(at.generation, segment)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


_current: Attachment | None = None


def attach(assignment: Assignment) -> Attachment:
    global _current
    if _current is not None:
        raise RuntimeError("this process is already attached: a new generation needs new processes")
    _current = Attachment(assignment)
    return _current


def current() -> Attachment | None:
    return _current
