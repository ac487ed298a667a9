"""Copies KV between segments, slot by slot, as fast as memory allows.

A unit (one head of one plane of one layer in one slot) is an opaque numpy item, so numpy copies it with memcpy and
without the GIL. Slots are copied in runs that are consecutive on both sides. SGLang allocates slots in order, so a
prompt is a few runs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang.kv.chain_hash import Ids
from anchortp_sglang.planning.layout.kv_layout import KVGroup, KVLayout, KVMove

Units = NDArray[np.void]
"""Units of shape (layers, planes, rows, heads)."""

Buffer = bytes | bytearray | memoryview | mmap.mmap

BRIDGED_SLOTS = 8
"""Longest gap, in slots, that costs less to copy than to begin another run."""

_STEP_BYTES = 1 << 22
"""Bytes copied at a time; other threads may run between two steps."""


class KVSegment:
    """A mapped KV segment as arrays, which keep the mapping alive."""

    def __init__(self, memory: Buffer, layout: KVLayout, offset_bytes: int = 0) -> None:
        self.layout = layout
        self._groups: list[tuple[KVGroup, Units]] = []
        for group in layout.groups:
            shape = layout.shape(group)
            start = offset_bytes + group.offset_bytes
            units = np.frombuffer(memory, f"V{group.unit_bytes}", int(np.prod(shape)), start)
            self._groups.append((group, units.reshape(shape)))

    def heads(self, first_layer: int, layers: int, head: int, count: int) -> Iterator[tuple[int, Units]]:
        """Yield views of consecutive heads: (first layer, units) for each group with some of the layers."""
        for group, units in self._groups:
            start = max(first_layer, group.first_layer)
            stop = min(first_layer + layers, group.first_layer + group.layers)
            if start < stop:
                inside = slice(start - group.first_layer, stop - group.first_layer)
                yield start, units[inside, :, :, head : head + count]


def pairs(target: KVSegment, source: KVSegment, move: KVMove) -> Iterator[tuple[Units, Units]]:
    """Yield (target, source) views of a move, cut where a group of either side ends."""
    for start, into in target.heads(move.first_layer, move.layers, move.head, move.count):
        for first, units in source.heads(start, len(into), move.source_head, move.count):
            yield into[first - start : first - start + len(units)], units


def runs(into: Ids, source: Ids, bridged: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, first source row, length) of runs that are consecutive on both sides.

    ``into`` and ``source`` are int64[n], paired. A run goes on over gaps of up to ``bridged`` rows: allow this only if
    the target's rows in the gaps may be overwritten.
    """
    if not len(into):
        return
    step = np.diff(into)
    joins = (step == np.diff(source)) & (step > 0) & (step <= 1 + bridged)
    starts = np.concatenate(([0], np.flatnonzero(~joins) + 1))
    ends = np.concatenate((starts[1:], [len(into)])) - 1
    columns = (into[starts].tolist(), source[starts].tolist(), (into[ends] - into[starts] + 1).tolist())
    yield from zip(*columns, strict=True)


def copy_slots(into: Units, rows: Ids, source: Units, source_rows: Ids, bridged: int = 0) -> int:
    """Copy slots ``source_rows`` to ``rows`` (int64[n] each, in range). Return the bytes of these slots."""
    slot_bytes = int(into.itemsize * into.shape[0] * into.shape[1] * into.shape[3])
    most = max(1, _STEP_BYTES // max(1, slot_bytes))
    for row, source_row, length in runs(rows, source_rows, bridged):
        for start in range(0, length, most):
            n = min(most, length - start)
            into[:, :, row + start : row + start + n] = source[:, :, source_row + start : source_row + start + n]
    return slot_bytes * len(rows)


def copy_move(target: KVSegment, rows: Ids, source: KVSegment, source_rows: Ids, move: KVMove, bridged: int = 0) -> int:
    """Carry out a move for these slots. Return the bytes copied."""
    return sum(copy_slots(into, rows, units, source_rows, bridged) for into, units in pairs(target, source, move))
