"""The layout of KV in memory: the heads of each layer that a rank holds, and what moves when ownership changes.

Code that places, copies or mirrors KV asks here, layer by layer. A model whose KV is not split over the ranks, or whose
layers are shared out unequally, differs only in ``held_heads``, ``planes`` and the sizes of ``KVPlan``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from anchortp_sglang.planning.intervals import Intervals, intersect, locate, normalize, subtract, total
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership


@dataclass(frozen=True)
class KVPlan:
    """The number of KV slots: the same on every rank, whatever its share of the heads.

    ``rows`` = slots + page_size, as in SGLang's pools (the first page is padding).
    """

    slots: int
    page_size: int
    dtype_bytes: int

    @property
    def rows(self) -> int:
        return self.slots + self.page_size

    def unit_bytes(self, model: ModelAxes, layer: int) -> int:
        """Return the bytes of one head of one plane of a layer in one slot: the smallest unit that is moved."""
        kv = model.kv[layer]
        return 0 if kv is None else kv.row // planes(model) * self.dtype_bytes

    def slot_bytes(self, model: ModelAxes) -> int:
        """Return the bytes of one slot over all heads and layers, each head counted once."""
        return sum(kv.heads * kv.row for kv in model.kv if kv is not None) * self.dtype_bytes


def planes(model: ModelAxes) -> int:
    """Count the planes of a layer, of equal shape: two for K and V, one for latents."""
    return 1 if model.latent_kv else 2


@dataclass(frozen=True)
class MirrorPlan:
    """The KV mirror in host memory: how many slots it holds, and the bytes per second that may be copied to it."""

    rows: int
    bytes_per_s: float


@dataclass(frozen=True)
class KVGroup:
    """Consecutive layers of equal heads: an array of (layers, planes, rows, heads) units at ``offset_bytes``.

    ``heads`` are units of the axis along which the layers' KV is dealt (``LayerKV``).
    """

    first_layer: int
    layers: int
    heads: Intervals
    unit_bytes: int
    offset_bytes: int


@dataclass(frozen=True)
class KVLayout:
    """One rank's KV segment. Layouts of equal digest store the same slots in the same bytes.

    Layers that read the KV of others are in no group.
    """

    rows: int
    planes: int
    groups: tuple[KVGroup, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.group_bytes(group) for group in self.groups)

    def group_bytes(self, group: KVGroup) -> int:
        return group.layers * self.planes * self.rows * total(group.heads) * group.unit_bytes

    def shape(self, group: KVGroup) -> tuple[int, int, int, int]:
        """Return (layers, planes, rows, heads), in units."""
        return group.layers, self.planes, self.rows, total(group.heads)

    def digest(self) -> str:
        """Return 16 hex characters that identify this layout."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class KVMove:
    """``count`` heads that a rank's new segment takes from elsewhere, in ``layers`` layers from ``first_layer`` on.

    ``device``: the one whose old segment has them, from position ``source_head`` on. None if they are in none that is
    left: ``source_head`` is then the head's number in the model, which is its position in the mirror.
    """

    first_layer: int
    layers: int
    head: int
    count: int
    device: int | None
    source_head: int


def held_heads(model: ModelAxes, ownership: Ownership, rank: int, layer: int) -> Intervals:
    """Return the KV heads of a layer that a rank holds; none of a layer that reads the KV of another."""
    kv = model.kv[layer]
    return () if kv is None else ownership.of(kv.axis, rank, layer)


def kv_layout(model: ModelAxes, plan: KVPlan, ownership: Ownership, rank: int) -> KVLayout:
    """Lay out a rank's KV segment."""
    return _laid_out(model, plan, plan.rows, [held_heads(model, ownership, rank, n) for n in range(model.num_layers)])


def _laid_out(model: ModelAxes, plan: KVPlan, rows: int, heads_of: Sequence[Intervals]) -> KVLayout:
    groups: list[KVGroup] = []
    offset_bytes = first = 0
    alike = groupby((heads, plan.unit_bytes(model, layer)) for layer, heads in enumerate(heads_of))
    for (heads, unit_bytes), layers in alike:
        count = len(list(layers))
        if unit_bytes:
            groups.append(KVGroup(first, count, heads, unit_bytes, offset_bytes))
        offset_bytes += count * planes(model) * rows * total(heads) * unit_bytes
        first += count
    return KVLayout(rows, planes(model), tuple(groups))


def fit_slots(model: ModelAxes, most: KVPlan, ownership: Ownership, device_bytes: int | None) -> KVPlan:
    """Reduce the slots to what the fullest device has room for beside its weights; None: no limit.

    Raises InvalidOwnership if there is no room for a page.
    """
    if device_bytes is None:
        return most
    slots = most.slots
    for rank, device in enumerate(ownership.devices):
        free = device_bytes - shard_layout(model, ownership, rank).total_bytes
        rows = free // kv_layout(model, replace(most, slots=1, page_size=0), ownership, rank).total_bytes
        slots = min(slots, (rows // most.page_size - 1) * most.page_size)
        if slots < most.page_size:
            raise InvalidOwnership(
                f"device {device} has no room for KV: weights leave {max(0, free) >> 20} of {device_bytes >> 20} MiB"
            )
    return replace(most, slots=slots)


def whole_layout(model: ModelAxes, plan: KVPlan, rows: int) -> KVLayout:
    """Lay out ``rows`` slots of all heads of all layers, as in the mirror."""
    return _laid_out(model, plan, rows, [((0, kv.heads),) if kv is not None else () for kv in model.kv])


def kv_moves(
    model: ModelAxes, new: Ownership, rank: int, old: Ownership, leaving: Sequence[int] = ()
) -> tuple[KVMove, ...]:
    """Return what fills a rank's new KV segment, from its device's old one, another's, or the mirror.

    ``leaving``: devices of ``old`` that are not in ``new``, but whose memory is still there.
    """
    sources = _in_turn(new, rank, old, leaving)
    by_layer = [tuple(_layer_moves(model, new, rank, old, sources, layer)) for layer in range(model.num_layers)]
    return _merged(model, by_layer)


def lost_heads(model: ModelAxes, new: Ownership, old: Ownership, leaving: Sequence[int] = ()) -> bool:
    """Return whether some KV heads were held only by devices whose memory is gone. ``leaving``: as in ``kv_moves``."""
    return any(move.device is None for rank in range(new.tp_size) for move in kv_moves(model, new, rank, old, leaving))


def mirrored_heads(model: ModelAxes, ownership: Ownership, rank: int, layer: int) -> Intervals:
    """Return the heads of a layer that a rank copies to the mirror: those that no lower rank holds."""
    lower = normalize(run for other in range(rank) for run in held_heads(model, ownership, other, layer))
    return subtract(held_heads(model, ownership, rank, layer), lower)


def mirror_moves(model: ModelAxes, ownership: Ownership, rank: int) -> tuple[KVMove, ...]:
    """Return what a rank copies to the mirror. ``head``: the position there; ``device``: the rank's own."""
    device = ownership.devices[rank]
    by_layer = []
    for layer in range(model.num_layers):
        held = held_heads(model, ownership, rank, layer)
        mine = mirrored_heads(model, ownership, rank, layer)
        by_layer.append(tuple((start, stop - start, device, locate(held, start)) for start, stop in mine))
    return _merged(model, by_layer)


_Part = tuple[int, int, int | None, int]  # head, count, device, source_head


def _merged(model: ModelAxes, by_layer: Sequence[tuple[_Part, ...]]) -> tuple[KVMove, ...]:
    """Merge the moves of consecutive layers that are alike."""
    moves: list[KVMove] = []
    first = 0
    for (parts, _), layers in groupby(zip(by_layer, model.kv, strict=True)):
        count = len(list(layers))
        moves += [KVMove(first, count, *part) for part in parts]
        first += count
    return tuple(moves)


def _layer_moves(
    model: ModelAxes, new: Ownership, rank: int, old: Ownership, sources: Sequence[int], layer: int
) -> Iterator[_Part]:
    mine = held_heads(model, new, rank, layer)
    missing = mine
    for device in sources:
        held = held_heads(model, old, old.devices.index(device), layer)
        for start, stop in intersect(missing, held):
            yield locate(mine, start), stop - start, device, locate(held, start)
        missing = subtract(missing, held)
    for start, stop in missing:
        yield locate(mine, start), stop - start, None, start


def _in_turn(new: Ownership, rank: int, old: Ownership, leaving: Sequence[int]) -> tuple[int, ...]:
    """Return the devices to copy from, in order: itself first; each rank starts with another one."""
    in_turn = (*new.devices[rank:], *new.devices[:rank], *leaving)
    return tuple(device for device in in_turn if device in old.devices)
