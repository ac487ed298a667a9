"""How many KV slots fit, with heads alike in all layers and with heads that rotate over them.

Every rank has the same slots, so the fullest device bounds their number. With four KV heads on three devices one of
them has twice the KV of the others, unless the fourth head is another device's in each layer.
"""

import sys
from dataclasses import dataclass, replace

from anchortp_sglang.planning.layout.kv_layout import KVPlan, fit_slots, kv_layout
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import rotating_split


@dataclass(frozen=True)
class KVCapacity:
    """``device_bytes``: weights and KV of the fullest device. ``slots_alike`` and ``slots_rotating``: what would fit
    if every device had as much memory; one of the two is what is served."""

    slots: int
    rotating: bool
    device_bytes: int
    slots_alike: int
    slots_rotating: int

    @property
    def gain(self) -> float:
        """Slots that rotating brings, as a share of those without."""
        return self.slots_rotating / self.slots_alike - 1 if self.slots_alike else 0.0

    def __str__(self) -> str:
        told = f"{self.slots} KV slots; the fullest device has {self.device_bytes / 2**20:.1f} MiB of weights and KV"
        if self.rotating:
            return f"{told}, in which {self.slots_alike} would fit without --anchor-rotate-heads ({self.gain:+.0%})"
        if self.slots_rotating <= self.slots:
            return f"{told}; --anchor-rotate-heads would gain nothing"
        return f"{told}, in which {self.slots_rotating} would fit with --anchor-rotate-heads ({self.gain:+.0%})"


def kv_capacity(model: ModelAxes, kv: KVPlan, ownership: Ownership, rotating: bool) -> KVCapacity:
    """Of an ownership that serves, beside the other kind on the same devices."""
    device_bytes = max(
        shard_layout(model, ownership, rank).total_bytes + kv_layout(model, kv, ownership, rank).total_bytes
        for rank in range(ownership.tp_size)
    )
    other = split(model, ownership.devices) if rotating else rotating_split(model, ownership.devices)
    fit = _slots_in(device_bytes, model, kv, other)
    alike, rotated = (fit, kv.slots) if rotating else (kv.slots, fit)
    return KVCapacity(kv.slots, rotating, device_bytes, alike, rotated)


def _slots_in(device_bytes: int, model: ModelAxes, kv: KVPlan, ownership: Ownership) -> int:
    """How many slots fit where every device has so much memory."""
    try:
        return fit_slots(model, replace(kv, slots=sys.maxsize), ownership, device_bytes).slots
    except InvalidOwnership:
        return 0
