"""The CPU platform: a device is an anchor process and the host memory that it holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.memory.arena import Part, map_together
from anchortp_sglang.memory.arena_kinds import HOST_MEMORY, ArenaSpec
from anchortp_sglang.memory.cgroups import cpu_quota, memory_room
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.platforms.base import Defaults, MemoryPlan
from anchortp_sglang.platforms.cpu.environment import cpu_defaults

if TYPE_CHECKING:
    import torch

    from anchortp_sglang.platforms.mover import Mover, Write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CpuPlatform:
    """The CPU platform: all devices share the host's memory, so there is nothing to know about each of them."""

    rules: ClassVar[DeviceRules] = DeviceRules(
        device="cpu",
        attention_backends=("torch_native",),
        lora_backends=("torch_native",),
        why_no_fp8_kv="SGLang has it on CPUs with AMX only, whose kernels are not supported",
    )
    identity: ClassVar[tuple[str, ...]] = ()
    rank_overrides: ClassVar[Mapping[str, Any]] = {}
    maps_parts: ClassVar[bool] = True
    lazy_memory: ClassVar[bool] = True
    new_memory_is_zero: ClassVar[bool] = True
    moves_kv: ClassVar[bool] = True
    spares_join_early: ClassVar[bool] = True

    def defaults(self, given: Mapping[str, object], environ: Mapping[str, str], tp_size: int) -> Defaults:
        """Work out settings for as many cores and as much memory as this process may use."""
        return cpu_defaults(given, environ, tp_size, sorted(os.sched_getaffinity(0)), cpu_quota(), _limited_bytes())

    def plan_memory(
        self,
        model: ModelAxes,
        ownership: Ownership,
        view: Any,
        options: AnchorOptions,
        spreads_experts: bool,
        adapter_bytes: int,
    ) -> MemoryPlan:
        """Plan slots and mirror within the memory that is available now, beside this server's processes."""
        from anchortp_sglang.platforms.cpu.kv_sizes import plan_kv, plan_mirror, plan_standby, process_bytes

        room = memory_room(psutil.virtual_memory().available)
        log.info("anchortp: %s", room)
        available = room.less(process_bytes(ownership.tp_size) + adapter_bytes)
        kv = plan_kv(model, ownership, view, options.device_bytes, available, options.standby in (None, "warm"))
        mirror, mirror_text = plan_mirror(model, ownership, kv, options, available)
        standby, standby_text = plan_standby(model, ownership, kv, mirror, options, view, available)
        return MemoryPlan(self, kv, mirror, mirror_text, standby, standby_text, options.min_devices or 1)

    def graph_batch_sizes(self, view: Any) -> tuple[int, ...]:
        """Return none: there are no graphs on CPU."""
        return ()

    def arena(self, device: int) -> ArenaSpec:
        """Choose memfds."""
        return HOST_MEMORY

    def byte_tensor(self, device: int, parts: Sequence[Part]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Map parts of segments; the mapping ends with the last tensor that uses it."""
        import torch

        return torch.frombuffer(map_together(parts), dtype=torch.uint8), _nothing

    def mover(self, device: int, open_writer: Callable[[], Write]) -> Mover:
        """Make a mover that writes past the mapping, which is cheaper for pages that are new to the kernel."""
        from anchortp_sglang.platforms.cpu.mover import HostMover

        return HostMover(open_writer())

    def gpu_id(self, device: int, rank: int) -> int:
        """Return the rank, which SGLang uses as an index of thread bindings."""
        return rank

    def make_collectives(self, buffer: object, rank: int, world_size: int, on_progress: Callable[[], None]) -> Any:
        """Make the collectives of a step, over shared memory."""
        from anchortp_sglang.platforms.cpu import hooks

        return hooks.share(buffer, rank, world_size, on_progress)

    def collectives_bytes(self, world_size: int) -> int:
        """Return the bytes of the region that all ranks map."""
        from anchortp_sglang.platforms.cpu.collectives import region_bytes

        return region_bytes(world_size)

    def wait_for_forward(self) -> None:
        """Do nothing: a forward pass that has returned is complete."""

    def free_bytes(self, device: int) -> int:
        """Return 0: devices share the host's memory."""
        return 0

    def watch(self, on_fault: Callable[[str], None]) -> NothingToWatch:
        """Watch nothing: a device dies with its anchor."""
        return NothingToWatch()


class NothingToWatch:
    """A DeviceWatch of devices that fail only with their anchors."""

    errors: Mapping[int, str] = {}

    async def watch(self) -> None:
        """Return at once."""

    async def recheck(self, device: int) -> str:
        """Find nothing."""
        return ""

    async def probe(self) -> None:
        """Ask nothing."""


def _nothing() -> None:
    pass


def _limited_bytes() -> int | None:
    """Return the memory that the cgroup leaves; None if the host sets the limit."""
    of_host = psutil.virtual_memory().available
    room = memory_room(of_host)
    return room.nbytes if room.nbytes < of_host else None
