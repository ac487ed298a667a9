"""The planner's ownership: which device holds which units of each axis of each layer.

``ownership.Ownership`` is what a server runs: shares of the axes that SGLang knows, with the vocabulary cut equally.
Here each group of a ``PlanModel`` has its own shares: layers one by one or all together, and the rows of the vocabulary
before and after the layers like any other axis. ``placement/reconfiguration.py`` converts between the two.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from anchortp_sglang.planning.intervals import Intervals, normalize, subtract, total
from anchortp_sglang.planning.model.plan_model import AxisGroup, PlanModel
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership

Layout = tuple[Intervals, ...]
"""The units of one axis group that rank 0, 1, … hold."""


@dataclass(frozen=True)
class LayerOwnership:
    """Shares of each sharded group of a model. Equal ownerships are equal values.

    ``devices`` are in rank order. ``shares`` pairs the name of each sharded group with the index of its layout in
    ``layouts``, which are distinct and in the order of their first use.
    """

    devices: tuple[int, ...]
    layouts: tuple[Layout, ...]
    shares: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise InvalidOwnership(f"devices {list(self.devices)} must be distinct, and at least one")
        for layout in self.layouts:
            if len(layout) != len(self.devices):
                raise InvalidOwnership(f"a layout of {len(layout)} shares for {len(self.devices)} devices")
            if any(runs != normalize(runs) for runs in layout):
                raise InvalidOwnership(f"intervals must be sorted, disjoint and coalesced: {layout}")
        first_uses = list(dict.fromkeys(index for _, index in self.shares))
        if first_uses != list(range(len(self.layouts))) or len(set(self.layouts)) != len(self.layouts):
            raise InvalidOwnership("layouts must be distinct, and listed in the order of their first use")

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Rank of each device."""
        return {device: rank for rank, device in enumerate(self.devices)}

    @cached_property
    def _index(self) -> dict[str, int]:
        return dict(self.shares)

    def layout(self, group: str) -> Layout:
        """Return the shares of all ranks. Raises KeyError for a group that is unknown or not sharded."""
        return self.layouts[self._index[group]]

    def of(self, group: str, device: int) -> Intervals:
        """Return the units of a group that a device holds; none for a device that is not part of this ownership."""
        rank = self.ranks.get(device)
        return () if rank is None else self.layout(group)[rank]


def layer_ownership(devices: Iterable[int], shares: Mapping[str, Layout]) -> LayerOwnership:
    """Make the canonical value of these shares. Raises InvalidOwnership."""
    known: dict[Layout, int] = {}
    indices = tuple((group, known.setdefault(layout, len(known))) for group, layout in shares.items())
    return LayerOwnership(tuple(devices), tuple(known), indices)


def check_layer_ownership(model: PlanModel, ownership: LayerOwnership) -> None:
    """Check that the shares fit the model. Raises InvalidOwnership.

    Each unit of a split axis must be on exactly one device, each of a shared one on at least one, and an axis that
    follows another exactly where the leader needs it.
    """
    if [group.name for group in model.sharded] != [name for name, _ in ownership.shares]:
        raise InvalidOwnership(f"the shares do not name the axes of this {model.architecture} in its order")
    checked: set[tuple[object, ...]] = set()
    for group in model.sharded:
        layout = ownership.layout(group.name)
        leader = ownership.layout(group.follows) if group.follows else ()
        # Layers are alike: each distinct pair of layouts is checked once.
        key = (group.kind, group.units, group.grain, id(layout), id(leader))
        if key not in checked:
            _check_layout(group, layout)
            _check_follows(group, layout, leader)
            checked.add(key)


def weight_bytes(model: PlanModel, ownership: LayerOwnership) -> tuple[int, ...]:
    """Return the bytes of weights by rank, replicated parts included."""
    held = [model.replicated_bytes] * len(ownership.devices)
    for group in model.sharded:
        for rank, runs in enumerate(ownership.layout(group.name)):
            held[rank] += group.nbytes(runs)
    return tuple(held)


def kv_bytes_per_token(model: PlanModel, ownership: LayerOwnership) -> tuple[int, ...]:
    """Return the KV bytes of one token by rank. Layers with a sliding window count like any other."""
    latent = sum(group.kv_bytes_per_token for group in model.replicated)
    held = [latent] * len(ownership.devices)
    for group in model.sharded:
        if group.kv_bytes_per_token:
            for rank, runs in enumerate(ownership.layout(group.name)):
                held[rank] += total(runs) * group.kv_bytes_per_token
    return tuple(held)


def followed(leader: Layout, grain: int) -> Layout:
    """Derive the shares of an axis whose unit is held wherever any of its ``grain`` units of the leader is."""
    return tuple(normalize((start // grain, -(-stop // grain)) for start, stop in runs) for runs in leader)


def _check_layout(group: AxisGroup, layout: Sequence[Intervals]) -> None:
    together = normalize(run for runs in layout for run in runs)
    if missing := subtract(((0, group.units),), together):
        raise InvalidOwnership(f"{group.name}: units {missing} are on no device")
    if together != ((0, group.units),):
        raise InvalidOwnership(f"{group.name}: units beyond the {group.units} of the model")
    if group.kind == "split" and sum(map(total, layout)) != group.units:
        raise InvalidOwnership(f"{group.name}: units are on two devices")


def _check_follows(group: AxisGroup, layout: Layout, leader: Layout) -> None:
    if group.follows and layout != followed(leader, group.grain):
        raise InvalidOwnership(f"{group.name} does not follow {group.follows}")
