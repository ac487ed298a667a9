"""From tensor rules and sizes to axis groups: how large a unit must be, and which tensors lie on which axis."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, lcm

from anchortp_sglang.planning.model.axes import UnsupportedModel
from anchortp_sglang.planning.model.plan_model import AxisGroup, AxisKind, TensorPart, axis_group
from anchortp_sglang.planning.model.tensor_rules import TensorRule
from anchortp_sglang.planning.model.weight_format import WeightFormat

_KINDS: dict[str, AxisKind] = {"kv_head": "shared", "expert": "shared"}
_HEADS = ("q_head", "kv_head", "expert")
"""Axes whose elements cannot be cut short: their last unit must be whole."""


@dataclass(frozen=True)
class Dimensions:
    """``sizes`` of tensor dimensions by name; per axis its ``extents`` in elements (heads, columns, rows) and the
    elements of a ``unit`` before alignment (1 if not named); ``kv_bytes`` per element of an axis and token."""

    sizes: Mapping[str, int]
    extents: Mapping[str, int]
    unit: Mapping[str, int]
    kv_bytes: Mapping[str, int]


def assemble(
    rules: tuple[TensorRule, ...],
    dims: Dimensions,
    fmt: WeightFormat,
    scope: str,
    layer: int | None = None,
    stage: int = 0,
) -> Iterator[AxisGroup]:
    """The axis groups of one layer (or of what lies outside of the layers): replicated first, then the axes in
    the order of their first tensor. Raises UnsupportedModel for sizes that do not fit together."""
    prefix = "" if layer is None else f"model.layers.{layer}."
    axes = list(dict.fromkeys(rule.axis for rule in rules if rule.axis))
    factors = {axis: _factor(axis, rules, dims, fmt) for axis in axes}
    parts: defaultdict[str, list[TensorPart]] = defaultdict(list)
    for rule in rules:
        for part in _parts(rule, dims, fmt, factors):
            whole = part.dim is None and "{unit}" not in part.name
            parts["replicated" if whole or rule.axis is None else rule.axis].append(part)
    units = {axis: -(-dims.extents[axis] // factors[axis]) for axis in axes}
    if whole_parts := parts.pop("replicated", None):
        kv = dims.kv_bytes.get("replicated", 0) if layer is not None else 0
        yield axis_group(
            f"{scope}.replicated", "replicated", 1, tuple(whole_parts), kind="replicated",
            layer=layer, stage=stage, prefix=prefix, kv_bytes_per_token=kv,
        )  # fmt: skip
    for axis in axes:
        yield axis_group(
            f"{scope}.{axis}", axis, units[axis], tuple(parts[axis]), kind=_KINDS.get(axis, "split"),
            layer=layer, stage=stage, prefix=prefix, grain=_grain(axis, units),
            follows=f"{scope}.q_head" if axis == "kv_head" else None,
            kv_bytes_per_token=dims.kv_bytes.get(axis, 0) * factors[axis],
        )  # fmt: skip


def _factor(axis: str, rules: tuple[TensorRule, ...], dims: Dimensions, fmt: WeightFormat) -> int:
    """Elements of the axis in one unit: the preferred size, enlarged until every quantized tensor is cut at the
    edges of its scale blocks."""
    factor = dims.unit.get(axis, 1)
    for rule in rules:
        if rule.axis == axis and rule.dim is not None and rule.quantized:
            per_element = _per_element(rule, dims)
            block = fmt.aligned(rule.name, rule.dim, per_element)
            factor = lcm(factor, block // gcd(block, per_element))
    if axis in _HEADS and dims.extents[axis] % factor:
        raise UnsupportedModel(
            f"quantization_config.weight_block_size: {dims.extents[axis]} x {axis} cannot be cut in units of {factor}, "
            "which the blocks of the scales ask for"
        )
    return factor


def _per_element(rule: TensorRule, dims: Dimensions) -> int:
    assert rule.axis is not None and rule.dim is not None
    size, extent = dims.sizes[rule.shape[rule.dim]], dims.extents[rule.axis]
    if size % extent:
        raise UnsupportedModel(f"{rule.name}: {size} elements do not divide over {extent} x {rule.axis}")
    return size // extent


def _parts(rule: TensorRule, dims: Dimensions, fmt: WeightFormat, factors: Mapping[str, int]) -> tuple[TensorPart, ...]:
    shape = tuple(dims.sizes[size] for size in rule.shape)
    per_unit = _per_element(rule, dims) * factors[rule.axis] if rule.axis and rule.dim is not None else 0
    dim = rule.dim if rule.axis else None
    experts = dims.sizes["experts"] if "{expert}" in rule.name else 1
    part = TensorPart(rule.name, shape, rule.element_bytes or fmt.element_bytes, dim, per_unit, experts)
    return fmt.parts(part) if rule.quantized else (part,)


def _grain(axis: str, units: Mapping[str, int]) -> int:
    """Query units of one KV unit."""
    if axis not in ("q_head", "kv_head") or "kv_head" not in units:
        return 1
    grain, rest = divmod(units["q_head"], units["kv_head"])
    if rest:
        raise UnsupportedModel(f"{units['q_head']} units of query heads cannot follow {units['kv_head']} of KV heads")
    return grain
