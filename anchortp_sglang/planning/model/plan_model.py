"""A model as the planner sees it: per layer, what can be split, into how many units, of how many bytes.

It knows nothing of what can be served with unequal shards today, so that any model can be planned for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from anchortp_sglang.planning.intervals import Intervals, total

AxisKind = Literal["split", "shared", "replicated"]
"""Each unit on exactly one device; on at least one (KV heads, redundant experts); or on every device."""

MoeSplit = Literal["tp", "ep"]
"""Experts cut along their columns over all devices, as SGLang does by default, or dealt whole (``--ep-size``)."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A checkpoint tensor on an axis: unit ``u`` is ``[u * per_unit, (u + 1) * per_unit)`` along ``dim``.

    The last unit is cut short where ``shape`` ends. With ``dim`` None the tensor is whole wherever it is.
    ``name`` may hold ``{unit}`` (one whole tensor per unit) or ``{expert}`` (``experts`` tensors, all cut
    alike).
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    dim: int | None = None
    per_unit: int = 0
    experts: int = 1

    def unit_bytes(self, start: int, stop: int) -> int:
        """Bytes of the units ``[start, stop)``."""
        return self.row_bytes * self.rows(start, stop) * self.experts

    def rows(self, start: int, stop: int) -> int:
        """Elements along ``dim`` of the units ``[start, stop)``; without ``dim``, whole tensors."""
        if self.dim is None:
            return stop - start if "{unit}" in self.name else 1
        extent = self.shape[self.dim]
        return min(stop * self.per_unit, extent) - min(start * self.per_unit, extent)

    @property
    def row_bytes(self) -> int:
        """Bytes of one element along ``dim`` and all of the other dimensions."""
        sizes = self.shape if self.dim is None else (*self.shape[: self.dim], *self.shape[self.dim + 1 :])
        return prod(sizes) * self.element_bytes


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """One axis of one layer (``layer`` None: outside of the layers).

    ``stage`` is its place in the order of execution. Shares are cut at multiples of ``grain`` units as long
    as there are enough of them for all devices. An axis that ``follows`` another is held where any of the
    ``grain`` units of that one that belong to its unit is held: KV heads follow query heads.
    ``kv_bytes_per_token`` is what a token of context costs per unit.
    """

    name: str
    axis: str
    kind: AxisKind
    layer: int | None
    stage: int
    units: int
    prefix: str
    parts: tuple[TensorPart, ...]
    unit_bytes: int
    last_unit_bytes: int
    grain: int = 1
    follows: str | None = None
    kv_bytes_per_token: int = 0

    def nbytes(self, runs: Intervals) -> int:
        """Bytes of weights in the units of ``runs``."""
        whole = total(runs) * self.unit_bytes
        return whole - (self.unit_bytes - self.last_unit_bytes if runs and runs[-1][1] == self.units else 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of weights of all units, each once."""
        return self.nbytes(((0, self.units),))

    @property
    def shape_key(self) -> tuple[object, ...]:
        """Equal for the same axis of layers that are built alike: over those, extra units rotate."""
        return (self.axis, self.kind, self.units, self.unit_bytes, self.last_unit_bytes, self.grain, self.follows)


@dataclass(frozen=True)
class PlanModel:
    """``groups`` in the order of execution; ``left_out`` names parts of the checkpoint that are not served."""

    architecture: str
    num_layers: int
    dtype: str
    quantization: str
    moe: MoeSplit | None
    groups: tuple[AxisGroup, ...]
    left_out: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, AxisGroup]:
        """The groups by their names."""
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

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """``(name, shape, bytes per element)`` of each checkpoint tensor that the model needs."""
        for group in self.groups:
            for part in group.parts:
                for name in tensor_names(group, part):
                    yield name, part.shape, part.element_bytes


def tensor_names(group: AxisGroup, part: TensorPart) -> list[str]:
    """The checkpoint tensors that a part stands for."""
    if "{unit}" in part.name:
        return [group.prefix + part.name.format(unit=unit) for unit in range(group.units)]
    if "{expert}" in part.name:
        return [group.prefix + part.name.format(expert=expert) for expert in range(part.experts)]
    return [group.prefix + part.name]


def axis_group(
    name: str,
    axis: str,
    units: int,
    parts: tuple[TensorPart, ...],
    *,
    kind: AxisKind = "split",
    layer: int | None = None,
    stage: int = 0,
    prefix: str = "",
    grain: int = 1,
    follows: str | None = None,
    kv_bytes_per_token: int = 0,
) -> AxisGroup:
    """An axis group, its bytes summed from its parts."""
    first = sum(part.unit_bytes(0, 1) for part in parts)
    last = sum(part.unit_bytes(units - 1, units) for part in parts)
    return AxisGroup(
        name, axis, kind, layer, stage, units, prefix, parts, first, last, grain, follows, kv_bytes_per_token
    )  # fmt: skip
