"""Quantized checkpoints: the tensors that replace a weight, and the groups that no cut may divide.

Written against SGLang 0.5.23 (layers/quantization: fp8.py, compressed_tensors, awq, gptq).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from anchortp_sglang.planning.model.rules import Rule
from anchortp_sglang.planning.model.sizes import Size, UnsupportedModel

FP8 = "float8_e4m3fn"
_INT_BITS = 32
"""Width of the integers into which AWQ and GPTQ pack smaller ones."""


@dataclass(frozen=True)
class StandIn:
    """A tensor that a quantized checkpoint has in place of a weight, or beside it.

    ``dims`` are its dimensions: which one of the weight ("out" or "in", or "one" for neither), and how many elements of
    the weight one of its own stands for. Without dimensions it is a scalar, and a parameter that stacks several weights
    has one for each. ``dtype`` None: the model's.
    """

    suffix: str
    dtype: str | None
    dims: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    ``group``: outputs and inputs of a weight that must stay together. ``unquantized``: parts of the names of modules
    that keep plain weights. ``experts``: whether experts are quantized too.
    """

    name: str
    stand_ins: tuple[StandIn, ...]
    group: int
    unquantized: tuple[str, ...]
    experts: bool = False
    unused: tuple[str, ...] = ()
    """Tensors that are not needed (regex, searched)."""

    def rules(self, rule: Rule, prefix: str) -> Iterator[Rule]:
        """Yield the rules that replace ``rule`` in the layer ``prefix``. Raises UnsupportedModel if there are none."""
        skipped = [any(part in prefix + tensor for part in self.unquantized) for tensor, _ in rule.sources]
        if not rule.projection or all(skipped):
            yield rule
            return
        if any(skipped):
            raise UnsupportedModel(f"modules_to_not_convert names a part of {prefix}{rule.name}, which SGLang fuses")
        if rule.over_experts and not self.experts:
            raise UnsupportedModel(f"there is no rule for experts in {self.name}; use a checkpoint without it")
        if len({tensor for tensor, _ in rule.sources}) < len(rule.sources) and not all(
            stand_in.dims for stand_in in self.stand_ins
        ):
            raise UnsupportedModel(f"{rule.name} holds several projections with one scale, for which there is no rule")
        for stand_in in self.stand_ins:
            yield _stand_in(rule, stand_in)


def quantized(rules: Iterable[Rule], quantization: Quantization, prefix: str) -> Iterator[Rule]:
    """Yield the rules that replace those of a layer, or of the part around the layers."""
    for rule in rules:
        yield from quantization.rules(rule, prefix)


def _stand_in(rule: Rule, stand_in: StandIn) -> Rule:
    split, other = ("out", "in") if rule.dim == 0 else ("in", "out")
    sources = tuple((tensor.removesuffix("weight") + stand_in.suffix, size) for tensor, size in rule.sources)
    made = replace(rule, name=rule.name.removesuffix("weight") + stand_in.suffix, sources=sources, dtype=stand_in.dtype)
    if not stand_in.dims:
        return replace(made, sources=tuple((tensor, "scalar") for tensor, _ in sources), dim=0, rest=())
    which = [of for of, _ in stand_in.dims]
    names = {"one": "one", other: rule.rest[0]}
    if split not in which:
        # Its only dimension is the one that is not split: every rank has it whole. Stacked weights have equal ones.
        return replace(
            made,
            sources=((sources[0][0], _scaled(names[which[0]], stand_in.dims[0][1])),),
            dim=0,
            rest=tuple(names[of] for of in which[1:]),
        )
    dim = which.index(split)
    per = stand_in.dims[dim][1]
    return replace(
        made,
        sources=tuple((tensor, _scaled(size, per)) for tensor, size in sources),
        dim=dim,
        rest=tuple(_scaled(names[of], per) for of, per in stand_in.dims if of != split),
    )


def _scaled(size: str, per: int) -> str:
    return size if per == 1 else f"{size}/{per}"


def scaled_size(name: str, size: Size, per: int) -> Size:
    """Return a size of which one element stands for ``per``. Raises UnsupportedModel if units end inside a group."""
    if size.axis is None:
        return Size(None, -(-size.per_unit // per))
    if size.per_unit % per:
        raise UnsupportedModel(
            f"{size.per_unit} elements of {name} belong together, but groups of {per} are quantized together: "
            "no cut falls between both"
        )
    return Size(size.axis, size.per_unit // per, size.units)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Read config.json; None if the checkpoint is not quantized. Raises UnsupportedModel."""
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UnsupportedModel(f"quantization_config: expected an object, found {given!r}")
    method = given.get("quant_method")
    readers = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}
    if method not in readers:
        raise UnsupportedModel(
            f"the checkpoint is quantized by {method!r}, for which there is no rule; there are rules for "
            f"{', '.join(sorted(readers))}. Use the unquantized one"
        )
    return readers[method](given)


_WEIGHT = StandIn("weight", FP8, (("out", 1), ("in", 1)))


def _fp8(given: Mapping[str, Any]) -> Quantization:
    unquantized = _names(given, "modules_to_not_convert", "ignored_layers")
    block = given.get("weight_block_size")
    if block is None:
        return _per_tensor(unquantized, static=given.get("activation_scheme") == "static")
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise UnsupportedModel(f"quantization_config.weight_block_size: expected two sizes, found {block!r}")
    scale = StandIn("weight_scale_inv", "float32", (("out", block[0]), ("in", block[1])))
    return Quantization("block FP8", (_WEIGHT, scale), lcm(*block), unquantized, experts=True)


def _per_tensor(unquantized: tuple[str, ...], static: bool) -> Quantization:
    scales = [StandIn(name, "float32", ()) for name in ("weight_scale", *(("input_scale",) if static else ()))]
    return Quantization("per-tensor FP8", (_WEIGHT, *scales), 1, unquantized)


def _compressed_tensors(given: Mapping[str, Any]) -> Quantization:
    unquantized = _names(given, "ignore")
    if patterns := [name for name in unquantized if name.startswith("re:")]:
        raise UnsupportedModel(f"quantization_config.ignore: there is no rule for patterns such as {patterns[0]}")
    groups = list((given.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    kinds = {(one.get("type"), one.get("num_bits"), one.get("strategy")) for one in weights}
    if kinds == {("float", 8, "channel")}:
        scale = StandIn("weight_scale", "float32", (("out", 1), ("one", 1)))
        return Quantization("per-channel FP8", (_WEIGHT, scale), 1, unquantized)
    if kinds == {("float", 8, "tensor")}:
        static = any((group.get("input_activations") or {}).get("dynamic") is False for group in groups)
        return _per_tensor(unquantized, static)
    raise UnsupportedModel(
        f"compressed-tensors with weights of {sorted(map(str, kinds))}: there are rules for 8-bit floats with a scale "
        "per tensor or per channel"
    )


def _awq(given: Mapping[str, Any]) -> Quantization:
    packed, group = _packing(given, "bits", "group_size")
    if given.get("version", "gemm") != "gemm":
        raise UnsupportedModel(f"AWQ version {given['version']}: there is a rule for gemm")
    stand_ins = (
        StandIn("qweight", "int32", (("in", 1), ("out", packed))),
        StandIn("qzeros", "int32", (("in", group), ("out", packed))),
        StandIn("scales", None, (("in", group), ("out", 1))),
    )
    return Quantization("AWQ", stand_ins, lcm(packed, group), _names(given, "modules_to_not_convert"))


def _gptq(given: Mapping[str, Any]) -> Quantization:
    packed, group = _packing(given, "bits", "group_size")
    if given.get("desc_act"):
        raise UnsupportedModel("GPTQ with desc_act orders inputs over all ranks: there is no rule for it")
    if given.get("dynamic") or given.get("lm_head"):
        raise UnsupportedModel("GPTQ with dynamic rules or a quantized lm_head: there is no rule for it")
    stand_ins = (
        StandIn("qweight", "int32", (("in", packed), ("out", 1))),
        StandIn("qzeros", "int32", (("in", group), ("out", packed))),
        StandIn("scales", None, (("in", group), ("out", 1))),
        StandIn("g_idx", "int32", (("in", 1),)),
    )
    return Quantization("GPTQ", stand_ins, lcm(packed, group), (), unused=(r"\.g_idx$",))


def _packing(given: Mapping[str, Any], bits: str, group: str) -> tuple[int, int]:
    if given.get(bits) not in (4, 8) or not isinstance(given.get(group), int) or given[group] < 1:
        raise UnsupportedModel(
            f"quantization_config: there is a rule for {bits} 4 or 8 and a positive {group}, "
            f"found {given.get(bits)!r} and {given.get(group)!r}"
        )
    return _INT_BITS // given[bits], given[group]


def _names(given: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    found: Iterable[Any] = next((given[key] for key in keys if given.get(key)), ())
    return tuple(map(str, found))
