"""Moves retained KV to a rank's new segment, from old segments, and from the mirror if no survivor has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anchortp_sglang.kv.copy import BRIDGED_SLOTS, KVSegment, copy_move
from anchortp_sglang.kv.mirror import KVMirror
from anchortp_sglang.kv.prefix_forest import Mask
from anchortp_sglang.kv.retained_slots import Entries, RetainedSlots
from anchortp_sglang.planning.layout.kv_layout import KVMove


def restorable_slots(entries: Entries, mirror: KVMirror | None) -> Mask:
    """Return bool[slots]: the slots that the mirror holds completely."""
    if mirror is None:
        return np.zeros(len(entries.hashes), np.bool_)
    return mirror.rows_of(entries.hashes) >= 0


def move_retained(
    retained: RetainedSlots,
    into: KVSegment,
    moves: Sequence[KVMove],
    old_segment: Callable[[int], KVSegment],
    mirror: KVMirror | None,
) -> dict[str, int]:
    """Fill ``into`` with the retained slots, layer by layer.

    ``moves``: from ``kv_layout.kv_moves``. ``old_segment``: opens a device's segment, called once for each. ``mirror``
    must hold all retained slots if a move needs it, else ValueError without one. Returns the bytes copied from devices
    ("kept") and from the mirror ("restored").
    """
    moved = {"kept": 0, "restored": 0}
    opened: dict[int, KVSegment] = {}
    rows = None
    for move in sorted(moves, key=lambda move: (move.first_layer, move.head)):
        # Free slots between retained ones may be overwritten, so gaps may be bridged.
        if move.device is not None:
            if move.device not in opened:
                opened[move.device] = old_segment(move.device)
            source = opened[move.device]
            moved["kept"] += copy_move(into, retained.numbers, source, retained.slots, move, BRIDGED_SLOTS)
            continue
        if mirror is None:
            raise ValueError("heads are lost and there is no mirror: no slot can be retained")
        if rows is None:
            rows = mirror.rows_of(retained.entries.hashes[retained.numbers])
        moved["restored"] += copy_move(into, retained.numbers, mirror.kv, rows, move, BRIDGED_SLOTS)
    return moved
