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
from anchortp_sglang.planning.layout import ShardLayout, shard_layout
from anchortp_sglang.planning.model_axes import ModelAxes
from anchortp_sglang.planning.ownership import Ownership

HOST_DEVICE = -1

_ANCHOR_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class KVPlan:
    """KV slots of every rank: the same number everywhere, whatever the rank's share of the heads.

    ``rows`` = slots + page_size, as ``MHATokenToKVPool`` lays them out (the first page is padding).
    """

    slots: int
    page_size: int
    dtype_bytes: int

    @property
    def rows(self) -> int:
        return self.slots + self.page_size

    def nbytes(self, model: ModelAxes, kv_heads: int) -> int:
        """Bytes of one rank's K and V over all layers."""
        return 2 * model.num_layers * self.rows * kv_heads * model.head_dim * self.dtype_bytes


@dataclass(frozen=True)
class Assignment:
    """One rank's part of a generation; made by the coordinator, sent to the rank over its pipe.

    ``previous``: the ownership whose complete weights this device's anchor still holds, None when there are
    none; equal to ``ownership`` when nothing is to be moved.
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
    restore_prefixes: bool


def weights_segment(ownership: Ownership) -> str:
    return f"weights-{ownership.digest()}"


def kv_segment(ownership: Ownership) -> str:
    return f"kv-{ownership.digest()}"


PAGE_TABLE_SEGMENT = "page-table"


def lanes_segment(generation: int) -> str:
    """Shared memory of one generation's collectives and heartbeats."""
    return f"lanes-{generation}"


class Attachment:
    """A rank's open segments. Mappings live as long as the process."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.layout: ShardLayout = shard_layout(assignment.model, assignment.ownership, assignment.rank)
        self.fds: dict[tuple[int, str], int] = {}

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
