"""Plans how a rank's new shard is filled when the ownership changes: from old shards, its own first, or reloaded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from anchortp_sglang.planning.intervals import intersect, subtract
from anchortp_sglang.planning.layout.shards import Span, is_held, spans
from anchortp_sglang.planning.model.axes import ModelAxes, ParamSpec
from anchortp_sglang.planning.ownership.ownership import Ownership

Holders = tuple[tuple[int, int], ...]
"""Devices, each with its rank in the old ownership."""

MoveKind = Literal["copy", "p2p", "reload"]


@dataclass(frozen=True)
class Move:
    """Fills elements ``[start, start + length)`` of a parameter along ``dim``; other dimensions are whole.

    "copy": from the parameter ``source`` of the same device's old shard, at ``source_start`` along dim.
    "p2p": the same from the old shard of another device.
    "reload": from the checkpoint tensor ``source``, at ``source_start`` along dim; ``device`` is None. With
    ``transposed`` its last two dimensions are swapped first.
    """

    kind: MoveKind
    param: str
    dim: int
    start: int
    length: int
    device: int | None
    source: str
    source_start: int
    nbytes: int
    transposed: bool = False


def fill_moves(
    model: ModelAxes, new: Ownership, rank: int, old: Ownership | None, leaving: Sequence[int] = ()
) -> tuple[Move, ...]:
    """Return all moves that fill a rank's new shard, layers in the order of execution.

    Elements that the same device (by id) holds in ``old`` are copied from its old shard, elements of other devices of
    ``new`` from theirs, then those of ``leaving`` devices (in ``old``, not in ``new``, their memory still there). The
    rest is reloaded; without ``old`` everything is. Padding rows are not moved: zero them (``ShardLayout.padding``).
    """
    holders = _holders(new, rank, old, leaving)
    moves: list[Move] = []
    known: dict[tuple[object, ...], tuple[ParamSpec, tuple[Move, ...]]] = {}
    for spec in model.params:
        if is_held(spec, new, rank):
            holding = tuple(holder for holder in holders if old is not None and is_held(spec, old, holder[1]))
            cut = (new.layout_of(spec.layer), old.layout_of(spec.layer) if old is not None else 0)
            key = (spec.likeness, cut, holding)
            if key not in known:
                known[key] = spec, _fill(model, spec, new, rank, old, holding)
            moves += _renamed(*known[key], spec)
    return tuple(moves)


def _fill(
    model: ModelAxes, spec: ParamSpec, new: Ownership, rank: int, old: Ownership | None, holding: Holders
) -> tuple[Move, ...]:
    unit_bytes = prod(spec.rest) * spec.element_bytes
    before = [(device, spans(model, spec, old, old_rank)) for device, old_rank in holding if old is not None]
    moves: list[Move] = []
    for index, span in enumerate(spans(model, spec, new, rank)):
        held = [(device, blocks[index]) for device, blocks in before]
        parts = _parts(spec, span, held, new.devices[rank], unit_bytes)
        moves.extend(sorted(parts, key=lambda move: move.start))
    return tuple(_coalesced(moves))


def _renamed(like: ParamSpec, moves: Iterable[Move], spec: ParamSpec) -> Iterator[Move]:
    """Rename the moves of ``like``, a parameter that differs from ``spec`` only in names."""
    sources = {old.source: new.source for old, new in zip(like.blocks, spec.blocks, strict=True)}
    for move in moves:
        source = sources[move.source] if move.device is None else spec.name
        yield Move(
            move.kind,
            spec.name,
            move.dim,
            move.start,
            move.length,
            move.device,
            source,
            move.source_start,
            move.nbytes,
            move.transposed,
        )


def _holders(new: Ownership, rank: int, old: Ownership | None, leaving: Sequence[int]) -> Holders:
    """Return the devices to copy from, with their ranks in ``old``: this rank's own first.

    Each rank starts with another device, so that ranks do not all copy from the same one.
    """
    if old is None:
        return ()
    in_turn = (*new.devices[rank:], *new.devices[:rank], *leaving)
    return tuple((device, old.devices.index(device)) for device in in_turn if device in old.devices)


def moved_bytes(moves: Iterable[Move]) -> dict[str, int]:
    """Sum the bytes of each kind; all kinds are present."""
    moved = {"copy": 0, "p2p": 0, "reload": 0}
    for move in moves:
        moved[move.kind] += move.nbytes
    return moved


def _parts(
    spec: ParamSpec, span: Span, before: Sequence[tuple[int, Span]], device: int, unit_bytes: int
) -> Iterator[Move]:
    missing = span.filled
    for holder, held in before:
        for start, stop in intersect(missing, held.filled):
            kind: MoveKind = "copy" if holder == device else "p2p"
            yield _move(kind, spec, span, (start, stop), (holder, spec.name, held.position(start)), unit_bytes)
        missing = subtract(missing, held.filled)
    for start, stop in missing:
        yield _move(
            "reload", spec, span, (start, stop), (None, span.block.source, span.block.offset + start), unit_bytes
        )


def _move(
    kind: MoveKind,
    spec: ParamSpec,
    span: Span,
    run: tuple[int, int],
    source: tuple[int | None, str, int],
    unit_bytes: int,
) -> Move:
    start, stop = run
    position, length = span.position(start), stop - start
    transposed = spec.transposed and kind == "reload"
    return Move(kind, spec.name, spec.dim, position, length, *source, length * unit_bytes, transposed)


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
    return (last.device, last.param, last.source) == (move.device, move.param, move.source) and (
        last.start + last.length == move.start and last.source_start + last.length == move.source_start
    )
