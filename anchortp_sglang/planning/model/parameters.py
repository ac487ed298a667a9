"""The parameters of a model: what SGLang creates, from which checkpoint tensors, and where it is split."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from anchortp_sglang.planning.model.quantization import FP8, Quantization, quantized, scaled_size
from anchortp_sglang.planning.model.rules import Family, Rule
from anchortp_sglang.planning.model.sizes import LayerShape, Size

DTYPE_BYTES = {FP8: 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}
"""Bytes per element, by torch's names of dtypes."""


@dataclass(frozen=True)
class Block:
    """A run of a parameter along its split dimension, filled from one checkpoint tensor from element ``offset`` on.

    ``axis`` None: every rank holds the whole extent, which is ``elements_per_unit``; with ``first_rank_only`` it is
    zero on all but the first. ``source`` "": nothing reads these elements, and they are zero.
    """

    source: str
    axis: str | None
    elements_per_unit: int
    offset: int = 0
    first_rank_only: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """An SGLang parameter: its blocks stacked along ``dim``; ``rest`` are the sizes of its other dimensions.

    A rank's shape is ``rest`` with the extent of its units inserted at ``dim``. ``layer`` is None outside of the
    decoder layers. A parameter over experts has one spec per expert, named ``parameter[expert]`` and in order: a rank's
    slices lie side by side. ``expert`` is set where experts are dealt whole: a rank holds the slice if it holds that
    unit of the axis "expert". ``transposed``: the checkpoint has the last two dimensions swapped. ``scalars``: each
    element is a checkpoint tensor without dimensions. ``repeats``: blocks of one source hold the same elements.
    """

    name: str
    blocks: tuple[Block, ...]
    dim: int
    rest: tuple[int, ...]
    layer: int | None
    dtype: str
    expert: int | None = None
    transposed: bool = False
    scalars: bool = False
    repeats: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in the anchors' memory."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """Key that is equal for parameters that differ only in names, such as those of layers and experts."""
        blocks = tuple(
            (one.axis, one.elements_per_unit, one.offset, one.first_rank_only, bool(one.source)) for one in self.blocks
        )
        return blocks, self.dim, self.rest, self.dtype, self.transposed


def param_specs(
    family: Family,
    config: Mapping[str, Any],
    sizes: Mapping[str, Size],
    layers: Sequence[LayerShape],
    dtype: str,
    whole_experts: bool,
    quantization: Quantization | None,
) -> tuple[ParamSpec, ...]:
    """List a model's parameters in the order of execution, from its family's rules and the numbers of ``sizes``."""
    whole = LayerShape(config, sizes, None)

    def specs(
        rules: Iterable[Rule], prefix: str = "", layer: int | None = None, shape: LayerShape = whole
    ) -> Iterator[ParamSpec]:
        present, sizes = [rule for rule in rules if rule.exists(shape.config)], shape.sizes
        for rule in present if quantization is None else quantized(present, quantization, prefix):
            if rule.rest[:1] == ("experts",):
                yield _stacked(rule, sizes, prefix, layer, dtype, whole_experts)
            elif rule.over_experts:
                yield from _per_expert(rule, sizes, prefix, layer, dtype, whole_experts)
            else:
                yield _spec(rule, sizes, prefix, layer, dtype)

    def layer_rules(layer: int) -> Iterable[Rule]:
        return (*family.layer, *(family.sparse if family.is_sparse(config, layer) else family.dense))

    return (
        *specs(family.before),
        *(spec for n, shape in enumerate(layers) for spec in specs(layer_rules(n), f"model.layers.{n}.", n, shape)),
        *specs(family.after),
    )


def _spec(rule: Rule, sizes: Mapping[str, Size], prefix: str, layer: int | None, dtype: str) -> ParamSpec:
    blocks, ends = [], defaultdict[str, int](int)
    for tensor, name in rule.sources:
        source, size = prefix + tensor if tensor else "", _size(sizes, name)
        blocks.append(Block(source, size.axis, size.per_unit, ends[source], rule.first_rank_only))
        ends[source] += 0 if rule.repeats else size.elements
    return ParamSpec(
        prefix + rule.name,
        tuple(blocks),
        rule.dim,
        tuple(_size(sizes, name).elements for name in rule.rest),
        layer,
        rule.dtype or dtype,
        transposed=rule.transposed,
        scalars=rule.sources[0][1] == "scalar",
        repeats=rule.repeats,
    )


def _size(sizes: Mapping[str, Size], name: str) -> Size:
    """Look up a size; "mlp/128", for instance, is that of a tensor with one element per 128 columns."""
    whole, _, per = name.partition("/")
    return scaled_size(whole, sizes[whole], int(per)) if per else sizes[whole]


def _per_expert(
    rule: Rule, sizes: Mapping[str, Size], prefix: str, layer: int | None, dtype: str, whole_experts: bool
) -> Iterator[ParamSpec]:
    like = _spec(rule, sizes, prefix, layer, dtype)
    for expert in range(sizes["experts"].elements):
        blocks = tuple(
            Block(one.source.format(expert=expert), one.axis, one.elements_per_unit, one.offset) for one in like.blocks
        )
        dealt = expert if whole_experts else None
        yield ParamSpec(
            f"{like.name}[{expert}]", blocks, like.dim, like.rest, layer, like.dtype, dealt, scalars=like.scalars
        )


def _stacked(
    rule: Rule, sizes: Mapping[str, Size], prefix: str, layer: int | None, dtype: str, whole_experts: bool
) -> ParamSpec:
    """Make the spec of a tensor of all experts; dealt whole, it is split along them."""
    spec = _spec(rule, sizes, prefix, layer, dtype)
    if not whole_experts:
        return spec
    columns = sum(block.elements_per_unit for block in spec.blocks)
    shape = (*spec.rest[1 : spec.dim], columns, *spec.rest[spec.dim :])
    return replace(spec, blocks=(Block(spec.blocks[0].source, "expert", 1),), dim=0, rest=shape)
