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
    ``gpu``: where the device's memory is, None for the host's.
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
    gpu: GpuShare | None = None


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
        self.fds: dict[tuple[int, str], tuple[int, int]] = {}
        """(descriptor, bytes) of what is mapped, so that an anchor that dies can be given its segments back."""
        self._kv_memory: mmap.mmap | None = None

    def kv_memory(self) -> mmap.mmap:
        """This rank's KV segment in host memory, writable; mapped once."""
        if self._kv_memory is None:
            self._kv_memory = self.map(self.assignment.device, kv_segment(self.kv_layout), writable=True)
        return self._kv_memory

    def kv_tensor(self) -> torch.Tensor:
        """The bytes of this rank's KV segment, in whichever memory."""
        if self.assignment.gpu is None:
            return torch.frombuffer(self.kv_memory(), dtype=torch.uint8)
        return self.tensor(self.assignment.device, kv_segment(self.kv_layout), writable=True)

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
