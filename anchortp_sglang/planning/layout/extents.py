"""The segments in which the bytes of a shard lie, page by page: what a device keeps stays in place.

A new ownership's shard consists of pages of the old one, which stay in their segments, and a new segment for the rest.
So a device needs memory only for what it is given, and nothing else is copied. A shard is made anew if too little of it
would stay, or in too many pieces.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from anchortp_sglang.planning.intervals import Intervals, subtract
from anchortp_sglang.planning.layout.moves import fill_moves
from anchortp_sglang.planning.layout.shards import PAGE_BYTES, shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership

_MOST_EXTENTS = 5000
"""Most extents of a shard. A process may have 65530 mappings (vm.max_map_count); a rank that fills its shard maps it
twice, and the old ones of up to eight devices."""
_MOST_PARAMS = 2048
"""Most parameters of a model for which pages are kept. A parameter with a slice per expert takes several extents;
finding them takes too long beyond this."""
_WORTH_KEEPING = 7 / 8
"""Share of a segment's bytes that must stay for it to be kept; the rest of it stays allocated too."""


@dataclass(frozen=True)
class Extent:
    """Bytes ``[start, start + nbytes)`` of a shard, which lie in a segment from ``offset`` on; all are whole pages."""

    start: int
    nbytes: int
    segment: str
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class ShardExtents:
    """A shard's extents, in order and without gaps.

    ``sizes``: bytes of each segment that has some of them. ``added``: the segment made for this shard.
    """

    extents: tuple[Extent, ...]
    sizes: dict[str, int]
    added: str

    @property
    def total_bytes(self) -> int:
        return self.extents[-1].stop

    @property
    def added_bytes(self) -> int:
        """Bytes to allocate for this shard."""
        return self.sizes[self.added]

    @property
    def reused_bytes(self) -> int:
        """Bytes that were there before."""
        return sum(extent.nbytes for extent in self.extents if extent.segment != self.added)

    def to_fill(self, run: tuple[int, int]) -> Intervals:
        """Return the part of a run of bytes that still has to be filled."""
        return subtract((run,), tuple((e.start, e.stop) for e in self._within(run) if e.segment != self.added))

    def find(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield (segment, offset, bytes) of a run of bytes."""
        for extent in self._within((start, stop)):
            first = max(start, extent.start)
            yield extent.segment, extent.offset + first - extent.start, min(stop, extent.stop) - first

    def _within(self, run: tuple[int, int]) -> Iterator[Extent]:
        for index in range(bisect_right(self._starts, run[0]) - 1, len(self.extents)):
            extent = self.extents[index]
            if extent.start >= run[1]:
                return
            yield extent

    @cached_property
    def _starts(self) -> list[int]:
        return [extent.start for extent in self.extents]


@dataclass(frozen=True)
class WeightPlacement:
    """The weights of an ownership in the anchors' memory, ``shards`` by rank."""

    ownership: Ownership
    shards: tuple[ShardExtents, ...]

    def shard_of(self, device: int) -> ShardExtents:
        return self.shards[self.ownership.devices.index(device)]


def hold(model: ModelAxes, ownership: Ownership, before: WeightPlacement | None = None) -> WeightPlacement:
    """Plan where an ownership's weights lie, given the memory of the anchors that stays in place."""
    if before is not None and before.ownership == ownership:
        return before
    segment = _segment_name(ownership, before)
    return WeightPlacement(
        ownership, tuple(_shard(model, ownership, rank, before, segment) for rank in range(ownership.tp_size))
    )


def _segment_name(ownership: Ownership, before: WeightPlacement | None) -> str:
    """Name the segment that is added for an ownership, by it and by the segments there before.

    Segments of equal name have the same bytes in the same places, so one that was filled in part can be filled again.
    """
    name = f"weights-{ownership.digest()}"
    if before is None:
        return name
    others = sorted({segment for shard in before.shards for segment in shard.sizes})
    return f"{name}-{hashlib.sha256(' '.join(others).encode()).hexdigest()[:8]}"


def _shard(
    model: ModelAxes, ownership: Ownership, rank: int, before: WeightPlacement | None, segment: str
) -> ShardExtents:
    total_bytes = shard_layout(model, ownership, rank).total_bytes
    device = ownership.devices[rank]
    whole = ShardExtents((Extent(0, total_bytes, segment, 0),), {segment: total_bytes}, segment)
    if before is None or device not in before.ownership.devices or len(model.params) > _MOST_PARAMS:
        return whole
    old = before.shard_of(device)
    stays = _worth_keeping(_pages_that_stay(model, ownership, rank, before.ownership, old), old)
    extents, added_bytes, end = [], 0, 0
    for extent in (*stays, Extent(total_bytes, 0, "", 0)):
        if end < extent.start:
            extents.append(Extent(end, extent.start - end, segment, added_bytes))
            added_bytes += extent.start - end
        if extent.nbytes:
            extents.append(extent)
        end = extent.stop
    joined = tuple(_joined(extents))
    if len(joined) > _MOST_EXTENTS:
        return whole
    reused = {extent.segment: old.sizes[extent.segment] for extent in stays}
    return ShardExtents(joined, reused | {segment: max(added_bytes, PAGE_BYTES)}, segment)


def _worth_keeping(stays: Iterable[Extent], old: ShardExtents) -> list[Extent]:
    """Return what stays, in the order of the shard, without the segments of which too little stays."""
    extents = sorted(stays, key=lambda extent: extent.start)
    used: defaultdict[str, int] = defaultdict(int)
    for extent in extents:
        used[extent.segment] += extent.nbytes
    return [extent for extent in extents if used[extent.segment] >= _WORTH_KEEPING * old.sizes[extent.segment]]


def _pages_that_stay(
    model: ModelAxes, new: Ownership, rank: int, old: Ownership, before: ShardExtents
) -> Iterator[Extent]:
    """Yield the whole pages of the new shard that are whole pages of the old one."""
    device = new.devices[rank]
    placed = {each.name: each for each in shard_layout(model, new, rank).params}
    old_placed = {each.name: each for each in shard_layout(model, old, old.devices.index(device)).params}
    for move in fill_moves(model, new, rank, old):
        if move.kind != "copy":
            continue
        into = placed[move.param].run(move.start, move.length)
        source = old_placed[move.source].run(move.source_start, move.length)
        if into is None or source is None or (into[0] - source[0]) % PAGE_BYTES:
            continue
        start, stop = -(-into[0] // PAGE_BYTES) * PAGE_BYTES, into[1] // PAGE_BYTES * PAGE_BYTES
        moved_by = into[0] - source[0]
        if start < stop:
            for segment, offset, nbytes in before.find(start - moved_by, stop - moved_by):
                yield Extent(start, nbytes, segment, offset)
                start += nbytes


def _joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that are also neighbours in their segment."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.segment == extent.segment and last.offset + last.nbytes == extent.offset:
            last = Extent(last.start, last.nbytes + extent.nbytes, last.segment, last.offset)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
