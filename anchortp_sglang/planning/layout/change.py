"""Sums up what a change of devices moves."""

from typing import Any

from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.layout.moves import fill_moves, moved_bytes
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership


def change_of(model: ModelAxes, before: WeightPlacement, after: WeightPlacement) -> dict[str, Any]:
    """Return the bytes of weights that a change moves, by device and in all, as JSON. All of ``before`` is readable.

    By device: ``weight_bytes`` it then has; ``stay_bytes``, never touched; ``local_bytes``, copied within its memory;
    ``p2p_bytes`` from other devices; ``reload_bytes`` from the checkpoint. ``least_bytes``: what devices must be given
    at least, for shares of that size.
    """
    old, new = before.ownership, after.ownership
    leaving = tuple(device for device in old.devices if device not in new.devices)
    devices, least = [], 0
    for rank, device in enumerate(new.devices):
        moved = moved_bytes(fill_moves(model, new, rank, old, leaving))
        stay, size = after.shards[rank].reused_bytes, shard_layout(model, new, rank).total_bytes
        had = _bytes_held(model, old, old.devices.index(device)) if device in old.devices else 0
        least += max(0, sum(moved.values()) - had)
        devices.append(
            {
                "id": device,
                "weight_bytes": size,
                "stay_bytes": stay,
                "local_bytes": max(0, moved["copy"] - stay),
                "p2p_bytes": moved["p2p"],
                "reload_bytes": moved["reload"],
            }
        )
    moved_total = sum(each["p2p_bytes"] + each["reload_bytes"] for each in devices)
    return {"moved_bytes": moved_total, "least_bytes": least, "devices": devices}


def _bytes_held(model: ModelAxes, ownership: Ownership, rank: int) -> int:
    """Return the bytes of a rank's shard, without padding."""
    return sum(moved_bytes(fill_moves(model, ownership, rank, None)).values())
