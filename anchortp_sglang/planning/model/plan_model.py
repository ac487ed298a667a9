"""A model for the planner: what can be split, into how many units, of how many bytes.

It is made from the parameters that a server would hold, so its bytes are those of the shards.
"""

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from anchortp_sglang.planning.intervals import Intervals, total
from anchortp_sglang.planning.model.axes import ModelAxes

AxisKind = Literal["split", "shared", "replicated"]
"""Where a unit is: on exactly one device; on at least one (KV heads); on every device."""

VOCAB_UNIT_ROWS = 8
"""Rows in a vocabulary unit. SGLang pads to a multiple of 64, so equal cuts over up to 8 devices fall between units."""

EMBED, HEAD = "embed", "head"
"""Names of the parts before and after the layers."""

_Place = int | str
"""A layer, ``EMBED`` or ``HEAD``."""


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """One axis of one layer, or of all layers together (``layer`` None, also outside of the layers).

    ``stage`` is its place in the order of execution. Shares are cut at multiples of ``grain`` units as long as there
    are enough of them for all devices. A unit of an axis that ``follows`` another is held wherever any of the leader's
    ``grain`` units that belong to it is: KV heads follow query heads. ``unit_bytes`` are weights;
    ``kv_bytes_per_token`` is the KV of one token per unit.
    """

    name: str
    axis: str
    kind: AxisKind
    layer: int | None
    stage: int
    units: int
    unit_bytes: int
    grain: int = 1
    follows: str | None = None
    kv_bytes_per_token: int = 0

    def nbytes(self, runs: Intervals) -> int:
        """Return the bytes of weights in the units of ``runs``."""
        return total(runs) * self.unit_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of weights of all units, each counted once."""
        return self.units * self.unit_bytes

    @property
    def shape_key(self) -> tuple[object, ...]:
        """Key that is equal for the same axis of layers that are built alike: extra units rotate over those."""
        return (self.axis, self.kind, self.units, self.unit_bytes, self.grain, self.follows)


@dataclass(frozen=True)
class PlanModel:
    """A model's axis groups, in the order of execution."""

    architecture: str
    num_layers: int
    groups: tuple[AxisGroup, ...]

    @cached_property
    def by_name(self) -> dict[str, AxisGroup]:
        """Groups by their names."""
        return {group.name: group for group in self.groups}

    @cached_property
    def sharded(self) -> tuple[AxisGroup, ...]:
        """Groups that an ownership has shares of."""
        return tuple(group for group in self.groups if group.kind != "replicated")

    @cached_property
    def replicated(self) -> tuple[AxisGroup, ...]:
        """Groups that every device holds."""
        return tuple(group for group in self.groups if group.kind == "replicated")

    @cached_property
    def sharded_bytes(self) -> int:
        """Bytes of the sharded groups, each unit once."""
        return sum(group.total_bytes for group in self.sharded)

    @cached_property
    def replicated_bytes(self) -> int:
        """Bytes of weights that every device holds."""
        return sum(group.total_bytes for group in self.replicated)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model, each weight once: what a single device would hold."""
        return self.sharded_bytes + self.replicated_bytes


def plan_model(model: ModelAxes) -> PlanModel:
    """Group all parameters by axis, in each layer and in what is before and after the layers."""
    unit_bytes = _unit_bytes(model)
    groups = []
    for stage, place in enumerate((EMBED, *range(model.num_layers), HEAD)):
        layer = place if isinstance(place, int) else None
        scope = place if isinstance(place, str) else f"layers.{place}"
        for axis in ("replicated", *model.axes):
            if (place, axis) in unit_bytes:
                groups.append(_group(model, axis, f"{scope}.", layer, stage, unit_bytes[place, axis]))
    return PlanModel(model.architecture, model.num_layers, tuple(groups))


def served_plan_model(model: ModelAxes, by_layer: Container[str] = ()) -> PlanModel:
    """List what a server is free to cut: heads, columns, experts.

    An axis is one group for all layers together; an axis in ``by_layer`` is one group in each layer that has it.
    """
    together: defaultdict[tuple[str, int | None], int] = defaultdict(int)
    for (place, axis), nbytes in _unit_bytes(model).items():
        if axis not in ("replicated", "vocab"):
            assert isinstance(place, int), f"{axis} outside of the layers"
            leader = "q_head" if axis == "kv_head" else axis
            together[axis, place if leader in by_layer else None] += nbytes
    groups = [
        _group(model, axis, "" if layer is None else f"layers.{layer}.", layer, 0, nbytes)
        for axis in model.axes
        for (one, layer), nbytes in together.items()
        if one == axis
    ]
    return PlanModel(model.architecture, model.num_layers, tuple(groups))


def _unit_bytes(model: ModelAxes) -> dict[tuple[_Place, str], int]:
    """Return the bytes of one unit of each axis in each place; of "replicated", all that every device holds."""
    found: defaultdict[tuple[_Place, str], int] = defaultdict(int)
    place: _Place = EMBED
    for spec in model.params:
        if spec.layer is not None:
            place = spec.layer
        elif place != EMBED:
            place = HEAD
        if spec.expert:
            continue  # whole experts are of one size: the first one stands for all
        element_bytes = prod(spec.rest) * spec.element_bytes
        for block in spec.blocks:
            axis = "expert" if spec.expert is not None else block.axis or "replicated"
            found[place, axis] += block.elements_per_unit * element_bytes
    return dict(found)


def _group(model: ModelAxes, axis: str, scope: str, layer: int | None, stage: int, unit_bytes: int) -> AxisGroup:
    """Make a group. ``unit_bytes`` are those of the model's axis, where a unit of the vocabulary is one row."""
    kv = None if layer is None else model.kv[layer]
    token_bytes = 0 if kv is None else kv.row * model.dtype_bytes
    if axis == "replicated":
        # Latent attention has one row of KV for all heads, on every device; its layers have replicated projections.
        latent = token_bytes if model.latent_kv else 0
        return AxisGroup(scope + axis, axis, "replicated", layer, stage, 1, unit_bytes, kv_bytes_per_token=latent)
    units = model.axes[axis]
    if axis == "vocab" and units >= 512 * VOCAB_UNIT_ROWS:
        units, unit_bytes = units // VOCAB_UNIT_ROWS, unit_bytes * VOCAB_UNIT_ROWS
    grouped = axis in ("q_head", "kv_head") and not model.latent_kv
    follows = f"{scope}q_head" if axis == "kv_head" else None
    return AxisGroup(
        name=scope + axis,
        axis=axis,
        kind="shared" if follows else "split",
        layer=layer,
        stage=stage,
        units=units,
        unit_bytes=unit_bytes,
        grain=model.group_size if grouped else 1,
        follows=follows,
        kv_bytes_per_token=token_bytes if kv is not None and axis == kv.axis else 0,
    )
