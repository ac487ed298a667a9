"""Where a rank's part of a parameter lies in the whole parameter, for tensors that are cut like it: adapters."""

from collections.abc import Iterator

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.layout.shards import ShardLayout, sources
from anchortp_sglang.planning.model.axes import ModelAxes

__all__ = ["runs_of_whole", "whole_shape"]


def runs_of_whole(model: ModelAxes, layout: ShardLayout, param: str) -> Intervals:
    """Return the elements of the whole parameter ``param``, along its split dimension, that a rank holds, in order.

    The whole one stacks its checkpoint tensors, each of them whole (q, k and v, or gate and up). Raises KeyError if the
    rank has no such parameter, ValueError for one with padding.
    """
    pieces = sorted((piece for piece in layout.pieces if piece.param == param), key=lambda piece: piece.start)
    if not pieces:
        raise KeyError(param)
    if any(name == param for name, _, _ in layout.padding):
        raise ValueError(f"{param} has padding, which no checkpoint tensor fills")
    bases = dict(_bases(model, param))
    return tuple(
        (bases[piece.source] + piece.source_start, bases[piece.source] + piece.source_start + piece.length)
        for piece in pieces
    )


def whole_shape(model: ModelAxes, param: str) -> tuple[int, ...]:
    """Return the shape of the whole parameter ``param``, with its checkpoint tensors stacked. Raises KeyError."""
    known = sources(model)
    for spec in model.params:
        if spec.name == param:
            extent = sum(known[source].extent for source in {block.source for block in spec.blocks})
            return (*spec.rest[: spec.dim], extent, *spec.rest[spec.dim :])
    raise KeyError(param)


def _bases(model: ModelAxes, param: str) -> Iterator[tuple[str, int]]:
    """Yield where each checkpoint tensor of a parameter begins in the whole parameter."""
    spec, known, base = next(spec for spec in model.params if spec.name == param), sources(model), 0
    for source in dict.fromkeys(block.source for block in spec.blocks):
        yield source, base
        base += known[source].extent
