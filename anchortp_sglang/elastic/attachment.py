"""What a rank is attached to: its share of the model and the anchors' memory that holds it.

One rank process is one attachment. Hooks ask ``current()``; without an attachment (main, the detokenizer, the
zygote) they leave SGLang as it is.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from anchortp_sglang.anchor.client import AnchorClient, HandleGrant
from anchortp_sglang.elastic.device_memory import byte_tensor
from anchortp_sglang.memory.arena import map_fd
from anchortp_sglang.memory.gpu import GpuShare
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
    none; equal to ``ownership`` when nothing is to be moved. ``gpu``: where the device's memory is, None for the
    host's.
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
    gpu: GpuShare | None = None

    @property
    def fills(self) -> bool:
        """Whether this rank's memory is new: weights are to be moved there, and its KV holds nothing."""
        return self.previous != self.ownership


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
        self.fds: dict[tuple[int, str], tuple[int, int]] = {}
        """(descriptor, bytes) of what is mapped, so that an anchor that dies can be given its segments back."""

    def map(self, device: int, segment: str, writable: bool) -> mmap.mmap:
        """Map a segment in host memory (HOST_DEVICE: the host anchor's).

        Raises AnchorError when the anchor refuses or does not answer.
        """
        fd, nbytes, _ = self._keep(device, segment)
        return map_fd(fd, nbytes, writable=writable)

    def tensor(self, device: int, segment: str, writable: bool) -> torch.Tensor:
        """A segment in a device's memory, as bytes. Raises like ``map``."""
        fd, nbytes, _ = self._keep(device, segment)
        return byte_tensor(fd, nbytes, writable, self.assignment.gpu)[0]

    @contextmanager
    def tensor_briefly(self, device: int, segment: str, writable: bool) -> Iterator[torch.Tensor]:
        """The same for the time of a block: when it has been left and the tensor is gone, nothing here holds it."""
        fd, nbytes, _ = self._open(device, segment)
        try:
            tensor, unmap = byte_tensor(fd, nbytes, writable, self.assignment.gpu)
        finally:
            os.close(fd)
        try:
            yield tensor
        finally:
            unmap()

    def _keep(self, device: int, segment: str) -> HandleGrant:
        grant = self._open(device, segment)
        self.fds[device, segment] = grant.fd, grant.nbytes
        return grant

    def _open(self, device: int, segment: str) -> HandleGrant:
        at = self.assignment
        client = AnchorClient(at.run_dir, at.run_id, device, _ANCHOR_TIMEOUT_S)
        return client.open_handle(at.generation, segment)


_current: Attachment | None = None


def attach(assignment: Assignment) -> Attachment:
    global _current
    if _current is not None:
        raise RuntimeError("this process is already attached: a new generation needs new processes")
    _current = Attachment(assignment)
    return _current


def current() -> Attachment | None:
    return _current
