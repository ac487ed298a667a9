"""How a rank's new shard is filled when the ownership changes: from the device's old shard, or reloaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from anchortp_sglang.planning.intervals import Intervals, intersect, subtract
from anchortp_sglang.planning.model_axes import ModelAxes, ParamSpec
from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.planning.shards import Span, spans

MoveKind = Literal["copy", "reload"]


@dataclass(frozen=True)
class Move:
    """Fill elements ``[start, start + length)`` of a parameter along ``dim``; other dimensions are whole.

    "copy": from the parameter ``source`` of the same device's old shard, at ``source_start`` along dim.
    "reload": from the checkpoint tensor ``source``, at ``source_start`` along dim.
    """

    kind: MoveKind
    param: str
    dim: int
    start: int
    length: int
    source: str
    source_start: int
    nbytes: int


def fill_moves(model: ModelAxes, new: Ownership, rank: int, old: Ownership | None) -> tuple[Move, ...]:
    """All moves that fill a rank's new shard, in the order of execution of the layers.

    What the same device (by id) holds in ``old`` is copied from its old shard, the rest is reloaded; without
    ``old`` everything is. Rows of padding are not moved: zero them (``ShardLayout.padding``).
    """
    device = new.devices[rank]
    old_rank = old.devices.index(device) if old is not None and device in old.devices else None
    moves: list[Move] = []
    for spec in model.params:
        before: tuple[Span | None, ...] = (None,) * len(spec.blocks)
        if old is not None and old_rank is not None:
            before = spans(model, spec, old, old_rank)
        unit_bytes = prod(spec.rest) * model.dtype_bytes
        for span, span_before in zip(spans(model, spec, new, rank), before, strict=True):
            parts = sorted(_parts(spec, span, span_before, unit_bytes), key=lambda move: move.start)
            moves.extend(parts)
    return tuple(_coalesced(moves))


def moved_bytes(moves: Iterable[Move]) -> dict[str, int]:
    """Bytes by kind; both kinds are always named."""
    moved = {"copy": 0, "reload": 0}
    for move in moves:
        moved[move.kind] += move.nbytes
    return moved


def _parts(spec: ParamSpec, span: Span, before: Span | None, unit_bytes: int) -> Iterator[Move]:
    kept: Intervals = ()
    if before is not None:
        kept = intersect(span.filled, before.held)
        for start, stop in kept:
            yield _move("copy", spec, span, (start, stop), (spec.name, before.position(start)), unit_bytes)
    for start, stop in subtract(span.filled, kept):
        yield _move("reload", spec, span, (start, stop), (span.block.source, start), unit_bytes)


def _move(
    kind: MoveKind,
    spec: ParamSpec,
    span: Span,
    run: tuple[int, int],
    source: tuple[str, int],
    unit_bytes: int,
) -> Move:
    start, stop = run
    position, length = span.position(start), stop - start
    return Move(kind, spec.name, spec.dim, position, length, *source, length * unit_bytes)


def _coalesced(moves: Iterable[Move]) -> Iterator[Move]:
    last: Move | None = None
    for move in moves:
        if last is not None and _follows(last, move):
            last = replace(last, length=last.length + move.length, nbytes=last.nbytes + move.nbytes)
            continue
        if last is not None:
            yield last
        last = move
    if last is not None:
        yield last


def _follows(last: Move, move: Move) -> bool:
    return (last.kind, last.param, last.source) == (move.kind, move.param, move.source) and (
        last.start + last.length == move.start and last.source_start + last.length == move.source_start
    )
