"""The number of KV slots that fit, with heads placed alike in all layers or rotating over them.

Every rank has the same slots, so the fullest device bounds their number. With four KV heads on three devices, one has
twice the KV of the others, unless another device holds the fourth head in each layer.
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
    """KV slots of a server, and with heads placed the other way.

    ``device_bytes``: weights and KV of the fullest device. ``slots_alike``, ``slots_rotating``: slots that fit in
    ``device_bytes`` on every device with either placement; one of them equals ``slots``.
    """

    slots: int
    rotating: bool
    device_bytes: int
    slots_alike: int
    slots_rotating: int

    @property
    def gain(self) -> float:
        """Additional slots by rotating, as a share of the slots without."""
        return self.slots_rotating / self.slots_alike - 1 if self.slots_alike else 0.0

    def __str__(self) -> str:
        text = f"{self.slots} KV slots; the fullest device has {self.device_bytes / 2**20:.1f} MiB of weights and KV"
        if self.rotating:
            return f"{text}, in which {self.slots_alike} would fit without --anchor-rotate-heads ({self.gain:+.0%})"
        if self.slots_rotating <= self.slots:
            return f"{text}; --anchor-rotate-heads would gain nothing"
        return f"{text}, in which {self.slots_rotating} would fit with --anchor-rotate-heads ({self.gain:+.0%})"


def kv_capacity(model: ModelAxes, kv: KVPlan, ownership: Ownership, rotating: bool) -> KVCapacity:
    """Compute the capacity of ``ownership``, and of the other placement on the same devices."""
    device_bytes = max(
        shard_layout(model, ownership, rank).total_bytes + kv_layout(model, kv, ownership, rank).total_bytes
        for rank in range(ownership.tp_size)
    )
    other = split(model, ownership.devices) if rotating else rotating_split(model, ownership.devices)
    fit = _slots_in(device_bytes, model, kv, other)
    alike, rotated = (fit, kv.slots) if rotating else (kv.slots, fit)
    return KVCapacity(kv.slots, rotating, device_bytes, alike, rotated)


def _slots_in(device_bytes: int, model: ModelAxes, kv: KVPlan, ownership: Ownership) -> int:
    """Return the slots that fit if every device has ``device_bytes``."""
    try:
        return fit_slots(model, replace(kv, slots=sys.maxsize), ownership, device_bytes).slots
    except InvalidOwnership:
        return 0
