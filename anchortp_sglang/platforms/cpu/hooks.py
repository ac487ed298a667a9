"""Replaces gloo inside SGLang 0.5.23 by the shared-memory collectives, on CPU.

Functions for HookType.AROUND: the original first, then its own arguments. Each takes the shared-memory path if the call
is for all ranks of the generation and on CPU tensors; else it calls the original. The choice depends only on what is
equal on all ranks. Where the attachment has no ``collectives`` stock code runs.

On CPU these four cover a dense or MoE forward pass. ``RowParallelLinear``, ``VocabParallelEmbedding``,
``ColumnParallelLinear(gather_output=True)`` and ``LogitsProcessor._logits_gatherer`` (which falls back to
``tensor_model_parallel_all_gather``) all end in the TP ``GroupCoordinator``; ``SchedulerRequestReceiver`` uses
``broadcast_pyobj`` to share the requests of each scheduler step.
"""

import logging
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from anchortp_sglang.platforms.cpu import futex
from anchortp_sglang.platforms.cpu.collectives import Lane, SharedMemoryGroup
from anchortp_sglang.rank.attachment import current

logger = logging.getLogger(__name__)

_SUMMABLE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64))


@dataclass(frozen=True)
class SharedMemoryCollectives:
    """A rank's collectives over all ranks of its generation, for calls of its scheduler's thread."""

    tensors: SharedMemoryGroup
    objects: SharedMemoryGroup
    thread: int
    on_progress: Callable[[], None]

    def spans(self, world_size: int) -> bool:
        """Return whether this call of a group of that size is made by all ranks in the same order.

        Calls of other threads are not (HiCache's prefetch thread calls broadcast_pyobj, too).
        """
        return world_size == self.tensors.world_size and threading.get_ident() == self.thread


def share(
    buffer: object, rank: int, world_size: int, on_progress: Callable[[], None] = lambda: None
) -> SharedMemoryCollectives | None:
    """Make a rank's collectives over ``buffer`` (region_bytes(world_size), zeroed, mapped by all ranks).

    Call it in every rank, in the thread that runs the scheduler, before the process groups are built. Returns
    None, so that gloo is used, for a single rank and on machines that futex.supported() refuses.
    """
    if world_size == 1:
        return None
    if not futex.supported():
        logger.warning("shared-memory collectives need Linux on x86-64; gloo is used instead, and decoding is slow")
        return None
    return SharedMemoryCollectives(
        tensors=SharedMemoryGroup(buffer, rank, world_size, Lane.TENSORS),
        objects=SharedMemoryGroup(buffer, rank, world_size, Lane.OBJECTS),
        thread=threading.get_ident(),
        on_progress=on_progress,
    )


def _shared() -> SharedMemoryCollectives | None:
    attachment = current()
    return None if attachment is None else attachment.collectives


def all_reduce(original: Callable[..., torch.Tensor], group: Any, input_: torch.Tensor) -> torch.Tensor:
    """AROUND GroupCoordinator.all_reduce(self, input_): in place on CPU, like the original."""
    shared = _shared()
    if shared is None or input_.dtype not in _SUMMABLE or not _applies(shared, group, input_):
        return original(group, input_)
    shared.on_progress()
    return shared.tensors.all_reduce(input_)


def all_gather(
    original: Callable[..., torch.Tensor | None],
    group: Any,
    input_: torch.Tensor,
    dim: int = -1,
    output_tensor_list: list[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """AROUND GroupCoordinator.all_gather(self, input_, dim, output_tensor_list)."""
    shared = _shared()
    # output_tensor_list comes with attention DP only (attn_tp_all_gather), where sizes may differ by rank.
    if shared is None or output_tensor_list is not None or not _applies(shared, group, input_):
        return original(group, input_, dim, output_tensor_list)
    return shared.tensors.all_gather(input_, dim)


def all_gather_into_tensor(
    original: Callable[..., None], group: Any, output: torch.Tensor, input: torch.Tensor
) -> None:
    """AROUND GroupCoordinator.all_gather_into_tensor(self, output, input)."""
    shared = _shared()
    if shared is None or not output.is_contiguous() or not _applies(shared, group, input):
        return original(group, output, input)
    return shared.tensors.all_gather_into(output, input)


def broadcast_pyobj(
    original: Callable[..., list[Any]],
    data: list[Any] | None,
    rank: int,
    dist_group: torch.distributed.ProcessGroup | None = None,
    src: int = 0,
    force_cpu_device: bool = True,
) -> list[Any]:
    """AROUND srt.utils.common.broadcast_pyobj. ``rank`` and ``src`` are global ranks.

    ``src`` gets back its own ``data``, the others a copy.
    """
    shared = _shared()
    if shared is None or not shared.spans(_size(dist_group)) or not force_cpu_device:
        return original(data, rank, dist_group, src, force_cpu_device)
    if rank == src:
        # Nearly every step of a scheduler has nothing to share: an empty message stands for that.
        shared.objects.broadcast_bytes(pickle.dumps(data) if data else b"", src)
        return data if data is not None else []
    payload = shared.objects.broadcast_bytes(None, src)
    return pickle.loads(payload) if payload else []


def _applies(shared: SharedMemoryCollectives, group: Any, tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and shared.spans(group.world_size) and not torch.compiler.is_compiling()


def _size(dist_group: torch.distributed.ProcessGroup | None) -> int:
    return torch.distributed.get_world_size() if dist_group is None else dist_group.size()


_COORDINATOR = "sglang.srt.distributed.parallel_state.GroupCoordinator"

HOOKS: tuple[tuple[str, str, Callable[..., Any], str], ...] = (
    (f"{_COORDINATOR}.all_reduce", "around", all_reduce, "gloo needs ~1 ms for a decode step's floats"),
    (f"{_COORDINATOR}.all_gather", "around", all_gather, "the same, for logits"),
    (f"{_COORDINATOR}.all_gather_into_tensor", "around", all_gather_into_tensor, "the same"),
    ("sglang.srt.utils.common.broadcast_pyobj", "around", broadcast_pyobj, "runs in every scheduler step"),
)
"""Target, kind (a value of sglang's HookType), hook, reason."""
