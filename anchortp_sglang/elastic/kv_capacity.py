"""How many KV slots fit, with heads alike in all layers and with heads that rotate over them.

Every rank has the same slots, so the fullest device bounds their number. With four KV heads on three devices one of
them has twice the KV of the others, unless the fourth head is another device's in each layer.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

from anchortp_sglang.elastic.attachment import KVPlan
from anchortp_sglang.planning.model_axes import ModelAxes
from anchortp_sglang.planning.ownership import Ownership, split
from anchortp_sglang.planning.reconfiguration import rotating_split
from anchortp_sglang.planning.shards import block_extent


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
    weights = weight_bytes(model, ownership)
    device_bytes = max(nbytes + kv.nbytes(model, ownership, rank) for rank, nbytes in enumerate(weights))
    other = split(model, ownership.devices) if rotating else rotating_split(model, ownership.devices)
    fit = _slots_in(device_bytes, model, kv, other)
    alike, rotated = (fit, kv.slots) if rotating else (kv.slots, fit)
    return KVCapacity(kv.slots, rotating, device_bytes, alike, rotated)


def weight_bytes(model: ModelAxes, ownership: Ownership) -> tuple[int, ...]:
    """By rank; without the gaps between parameters."""
    of_unit: Counter[tuple[str, int | None]] = Counter()
    whole = 0
    for spec in model.params:
        for block in spec.blocks:
            row_bytes = prod(spec.rest) * spec.element_bytes
            if spec.expert is not None:
                if spec.expert == 0:  # the others are as large
                    of_unit["expert", spec.layer] += row_bytes * block_extent(model, block)
            elif block.axis is None:
                whole += row_bytes * block.elements_per_unit
            else:
                of_unit[block.axis, spec.layer] += row_bytes * block.elements_per_unit
    return tuple(
        whole + sum(ownership.units(axis, rank, layer) * nbytes for (axis, layer), nbytes in of_unit.items())
        for rank in range(ownership.tp_size)
    )


def _slots_in(device_bytes: int, model: ModelAxes, kv: KVPlan, ownership: Ownership) -> int:
    """How many slots fit where every device has so much memory."""
    one = KVPlan(1, 0, kv.dtype_bytes)
    rows = min(
        (device_bytes - nbytes) // one.nbytes(model, ownership, rank)
        for rank, nbytes in enumerate(weight_bytes(model, ownership))
    )
    return max(0, (rows - kv.page_size) // kv.page_size * kv.page_size)
