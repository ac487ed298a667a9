"""What a rank is attached to: its share of the model and the anchors' memory that holds it.

One rank process is one attachment. Hooks ask ``current()``; without an attachment (main, the detokenizer, the
zygote) they leave SGLang as it is.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from anchortp_sglang.anchor.client import AnchorClient
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.planning.kv_layout import KVLayout, KVPlan, kv_layout
from anchortp_sglang.planning.layout import ShardLayout, shard_layout
from anchortp_sglang.planning.model_axes import ModelAxes
from anchortp_sglang.planning.ownership import Ownership

HOST_DEVICE = -1

_ANCHOR_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class MirrorPlan:
    """The KV mirror in host memory: slots it can hold, and the bytes per second that may be copied to it."""

    rows: int
    bytes_per_s: float


@dataclass(frozen=True)
class Assignment:
    """One rank's part of a generation; made by the coordinator, sent to the rank over its pipe.

    ``previous``: the ownership whose complete weights the anchors still hold, None when there are none; equal to
    ``ownership`` when nothing is to be moved. ``previous_kv``: the slots of its KV. ``restore_prefixes``: whether its
    KV and page table may be used. ``running``: chain hashes of the open requests' tokens, as bytes of uint64.
    """

    generation: int
    rank: int
    device: int
    run_dir: Path
    run_id: str
    checkpoint: Path
    model: ModelAxes
    ownership: Ownership
    previous: Ownership | None
    kv: KVPlan
    previous_kv: KVPlan
    restore_prefixes: bool
    mirror: MirrorPlan | None
    running: bytes = b""


def kv_namespace(checkpoint: Path, model: ModelAxes) -> bytes:
    """Ties KV to what it was computed with: the checkpoint and its dtype."""
    return f"{checkpoint}\0{model.dtype}".encode()


def weights_segment(ownership: Ownership) -> str:
    return f"weights-{ownership.digest()}"


def kv_segment(layout: KVLayout) -> str:
    """Named by its layout: a device whose heads and slots stay the same keeps its KV where it is."""
    return f"kv-{layout.digest()}"


def page_table_segment(ownership: Ownership, plan: KVPlan) -> str:
    """Of the KV of this ownership. With another one comes another table: the old one stays whole until it is ready."""
    return f"page-table-{ownership.digest()}-{plan.rows}"


def mirror_segment(plan: MirrorPlan) -> str:
    """Lives through all ownerships."""
    return f"kv-mirror-{plan.rows}"


def lanes_segment(generation: int) -> str:
    """Shared memory of one generation's collectives and heartbeats."""
    return f"lanes-{generation}"


class Attachment:
    """A rank's open segments. Mappings live as long as the process."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        at = assignment
        self.layout: ShardLayout = shard_layout(at.model, at.ownership, at.rank)
        self.kv_layout: KVLayout = kv_layout(at.model, at.kv, at.ownership, at.rank)
        self.fds: dict[tuple[int, str], int] = {}
        self._kv_memory: mmap.mmap | None = None

    def kv_memory(self) -> mmap.mmap:
        """This rank's KV segment, writable; mapped once."""
        if self._kv_memory is None:
            self._kv_memory = self.map(self.assignment.device, kv_segment(self.kv_layout), writable=True)
        return self._kv_memory

    @property
    def namespace(self) -> bytes:
        return kv_namespace(self.assignment.checkpoint, self.assignment.model)

    def map(self, device: int, segment: str, writable: bool) -> mmap.mmap:
        """Map a segment of a device's anchor (HOST_DEVICE: the host anchor's). Its descriptor is kept, so that an
        anchor that dies can be given the segment back.

        Raises AnchorError when the anchor refuses or does not answer.
        """
        fd, nbytes = self._open(device, segment)
        self.fds[device, segment] = fd
        return map_fd(fd, nbytes, writable=writable)

    def map_briefly(self, device: int, segment: str) -> mmap.mmap:
        """The same, read-only, of a segment that is about to be freed: when the mapping goes, nothing holds it."""
        fd, nbytes = self._open(device, segment)
        try:
            return map_fd(fd, nbytes, writable=False)
        finally:
            os.close(fd)

    def _open(self, device: int, segment: str) -> tuple[int, int]:
        at = self.assignment
        client = AnchorClient(at.run_dir, at.run_id, device, _ANCHOR_TIMEOUT_S)
        fd, nbytes, _sealed = client.open_handle(at.generation, segment)
        return fd, nbytes


_current: Attachment | None = None


def attach(assignment: Assignment) -> Attachment:
    global _current
    if _current is not None:
        raise RuntimeError("this process is already attached: a new generation needs new processes")
    _current = Attachment(assignment)
    return _current


def current() -> Attachment | None:
    return _current
