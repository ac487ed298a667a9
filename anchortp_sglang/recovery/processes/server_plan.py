"""The plan of a server: what does not change over its life."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.kv.chain_hash import root_hash
from anchortp_sglang.kv.mirror import MirrorShape
from anchortp_sglang.memory.arena_kinds import HOST_MEMORY, ArenaSpec
from anchortp_sglang.planning.layout.extents import WeightPlacement, hold
from anchortp_sglang.planning.layout.kv_layout import KVLayout, KVPlan, MirrorPlan, fit_slots, kv_layout, whole_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.planning.placement.expert_load import ExpertCounts
from anchortp_sglang.platforms.base import Platform
from anchortp_sglang.rank.attachment import HOST_DEVICE, kv_namespace


@dataclass(frozen=True)
class ServerPlan:
    """The plan of a server: what does not change over its life.

    ``kv``: the most slots that any generation has. ``device_bytes``: memory of a device for weights and KV; None
    without a limit. ``rotate_heads``: heads and experts that do not divide rotate over the layers. ``expert_counts``:
    counts by which experts are dealt. ``mirror``: None without one. ``server_args``: tp_size -> resolved ServerArgs.
    ``stale_anchors``: devices whose anchors linger in the run directory from a server that died. ``graph_batch_sizes``:
    for which decode graphs are captured; none if ranks stay eager. ``random_weights``: as in Assignment.
    ``change_bytes_per_s``: bound of the rate at which weights are moved for a planned change, over all devices; 0 for
    none.
    """

    run_dir: Path
    run_id: str
    identity: str
    checkpoint: Path
    model: ModelAxes
    kv: KVPlan
    rotate_heads: bool
    expert_counts: ExpertCounts | None
    device_bytes: int | None
    mirror: MirrorPlan | None
    linger_s: float
    server_args: Callable[[int], Any]
    controller_pid: int
    platform: Platform
    stale_anchors: tuple[int, ...] = ()
    graph_batch_sizes: tuple[int, ...] = ()
    random_weights: bool = False
    change_bytes_per_s: float = 0.0

    def arena(self, device: int) -> ArenaSpec:
        """Return the arena of a device's anchor (HOST_DEVICE: the host anchor)."""
        return HOST_MEMORY if device == HOST_DEVICE else self.platform.arena(device)

    def kv_of(self, ownership: Ownership) -> KVPlan:
        """Return the slots of a generation with this ownership. Raises InvalidOwnership if there is no room for any."""
        return fit_slots(self.model, self.kv, ownership, self.device_bytes)

    def kv_layout(self, ownership: Ownership, rank: int) -> KVLayout:
        """Return the layout of a rank's KV segment."""
        return kv_layout(self.model, self.kv_of(ownership), ownership, rank)

    def hold(self, ownership: Ownership, before: WeightPlacement | None) -> WeightPlacement:
        """Plan where the weights of an ownership lie: those in ``before`` stay in place where that is possible."""
        return hold(self.model, ownership, before if self.platform.maps_parts else None)

    @property
    def namespace(self) -> bytes:
        """The namespace of slot tables."""
        return kv_namespace(self.checkpoint, self.model)

    def mirror_shape(self) -> MirrorShape | None:
        """Return the shape of the mirror; None without one."""
        if self.mirror is None:
            return None
        layout = whole_layout(self.model, self.kv, self.mirror.rows)
        return MirrorShape(layout, root_hash(self.namespace))
