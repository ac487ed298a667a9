"""The shard of one rank: where each parameter lies in memory, and from which checkpoint elements it is filled."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod

from anchortp_sglang.planning.intervals import Intervals, intersect, locate, scale, subtract, total
from anchortp_sglang.planning.model.axes import Block, ModelAxes, ParamSpec
from anchortp_sglang.planning.ownership.ownership import Ownership

PARAM_ALIGN_BYTES = 64
PAGE_BYTES = 4096
_PAGED_BYTES = 16 * PAGE_BYTES
"""Size from which a parameter starts on a page, so that parts of it can be mapped."""


@dataclass(frozen=True)
class ParamSlot:
    """A parameter of one rank, contiguous at ``offset_bytes``, split along ``dim``.

    Row-major, or with ``column_major`` the transpose of a matrix in row-major order.
    """

    name: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int
    layer: int | None
    dim: int
    dtype: str
    column_major: bool

    def run(self, start: int, length: int) -> tuple[int, int] | None:
        """Return the bytes [start, stop) of the shard with these elements along dim; None unless contiguous."""
        if self.dim and not self.column_major:
            return None
        unit_bytes = self.nbytes // self.shape[self.dim]
        first = self.offset_bytes + start * unit_bytes
        return first, first + length * unit_bytes


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter along ``dim`` and their source; all other dimensions are whole.

    ``param[start : start + length]`` is ``checkpoint[source][source_start : source_start + length]``, of which the last
    two dimensions are swapped first if ``transposed``.
    """

    param: str
    dim: int
    start: int
    length: int
    source: str
    source_start: int
    transposed: bool = False


@dataclass(frozen=True)
class ShardLayout:
    """One rank's parameters, in the order of execution.

    ``padding`` is ``(param, start, length)`` along its dim: rows that no checkpoint tensor fills and that must be zero.
    ``total_bytes`` is a multiple of 4096.
    """

    params: tuple[ParamSlot, ...]
    pieces: tuple[Piece, ...]
    padding: tuple[tuple[str, int, int], ...]
    total_bytes: int


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor as the model expects it; ``dim`` is the parameter's dimension along which it is split."""

    shape: tuple[int, ...]
    dim: int
    transposed: bool = False

    @property
    def extent(self) -> int:
        """Number of elements along the split dimension."""
        return swapped(self.shape, self.transposed)[self.dim] if self.shape else 1


@dataclass(frozen=True)
class Span:
    """A block of a rank's parameter.

    ``held``: the block's elements along dim that the rank has, stored from ``base`` on; those from ``extent`` on are
    padding.
    """

    block: Block
    base: int
    held: Intervals
    extent: int

    @property
    def filled(self) -> Intervals:
        """Elements that come from the checkpoint, where they start at ``block.offset``."""
        return intersect(self.held, ((0, self.extent),))

    def position(self, element: int) -> int:
        """Return the position of a block's element in the parameter, along dim."""
        return self.base + locate(self.held, element)


def is_held(spec: ParamSpec, ownership: Ownership, rank: int) -> bool:
    """Return whether a rank has any of a parameter; it has whole experts only if they are its own."""
    return spec.expert is None or any(a <= spec.expert < b for a, b in ownership.of("expert", rank, spec.layer))


def spans(model: ModelAxes, spec: ParamSpec, ownership: Ownership, rank: int) -> tuple[Span, ...]:
    """Return a parameter's blocks as a rank holds them."""
    held = [_held(block, ownership, rank, spec.layer) for block in spec.blocks]
    bases = accumulate((total(runs) for runs in held[:-1]), initial=0)
    return tuple(
        Span(block, base, runs, _filled_extent(model, block, rank))
        for block, base, runs in zip(spec.blocks, bases, held, strict=True)
    )


def shard_layout(model: ModelAxes, ownership: Ownership, rank: int) -> ShardLayout:
    """Lay out a rank's shard: each layer and every large parameter starts on a page, the others on 64 bytes."""
    params: list[ParamSlot] = []
    pieces: list[Piece] = []
    padding: list[tuple[str, int, int]] = []
    known: dict[tuple[object, ...], _Form] = {}
    end, layer, before = 0, None, ""
    for spec in model.params:
        if not is_held(spec, ownership, rank):
            continue
        key = (spec.likeness, ownership.layout_of(spec.layer))
        if key not in known:
            known[key] = _form(model, spec, ownership, rank)
        form = known[key]
        start, parameter = end, spec.name.partition("[")[0]
        if parameter != before:
            paged = spec.layer != layer or form.nbytes >= _PAGED_BYTES
            start = _align(end, PAGE_BYTES if paged else PARAM_ALIGN_BYTES)
        params.append(
            ParamSlot(spec.name, form.shape, start, form.nbytes, spec.layer, spec.dim, spec.dtype, form.column_major)
        )
        end, layer, before = start + form.nbytes, spec.layer, parameter
        for block, at, length, source_start in form.pieces:
            source = spec.blocks[block].source
            pieces.append(Piece(spec.name, spec.dim, at, length, source, source_start, spec.transposed))
        for at, length in form.padding:
            padding.append((spec.name, at, length))
    return ShardLayout(tuple(params), tuple(pieces), tuple(padding), _align(end, PAGE_BYTES))


@dataclass(frozen=True)
class _Form:
    """Layout that parameters of one likeness share in layers that are cut alike.

    ``pieces`` are (block, start, length, start in its source), ``padding`` (start, length).
    """

    shape: tuple[int, ...]
    nbytes: int
    column_major: bool
    pieces: tuple[tuple[int, int, int, int], ...]
    padding: tuple[tuple[int, int], ...]


def _form(model: ModelAxes, spec: ParamSpec, ownership: Ownership, rank: int) -> _Form:
    blocks = spans(model, spec, ownership, rank)
    shape = _shape(spec, sum(total(span.held) for span in blocks))
    return _Form(
        shape,
        prod(shape) * spec.element_bytes,
        _column_major(model, spec),
        tuple(
            (index, span.position(start), stop - start, span.block.offset + start)
            for index, span in enumerate(blocks)
            for start, stop in span.filled
        ),
        tuple(
            (span.position(start), stop - start)
            for span in blocks
            for start, stop in subtract(span.held, ((0, span.extent),))
        ),
    )


def _column_major(model: ModelAxes, spec: ParamSpec) -> bool:
    """Return whether a matrix is stored with its columns contiguous.

    Matrices split by columns are, so that a rank's columns stay in place when it is given more. Only plain float32: the
    CPU's matrix products take it as it is, but reorder other types each time (measured: oneDNN, bfloat16, up to twice
    as slow).
    """
    plain = spec.dtype == "float32" and model.quantization is None
    return plain and spec.dim == 1 and len(spec.rest) == 1


def _filled_extent(model: ModelAxes, block: Block, rank: int) -> int:
    empty = not block.source or (block.first_rank_only and rank > 0)
    return 0 if empty else block_extent(model, block)


def block_extent(model: ModelAxes, block: Block) -> int:
    """Count a block's elements along the split dimension, over all ranks."""
    if block.axis is None:
        return block.elements_per_unit
    units = model.vocab_size if block.axis == "vocab" else model.axes[block.axis]
    return units * block.elements_per_unit


def sources(model: ModelAxes) -> dict[str, Source]:
    """Return every checkpoint tensor that the model needs, by name."""
    found: dict[str, Source] = {}
    for spec in model.params:
        for block in (block for block in spec.blocks if block.source):
            # The last of several blocks of a source reaches to its end.
            extent = block.offset + block_extent(model, block)
            shape = swapped(_shape(spec, extent), spec.transposed)
            found[block.source] = Source(() if spec.scalars else shape, spec.dim, spec.transposed)
    return found


def swapped(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Swap the last two dimensions of a shape if ``transposed``."""
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape


def source_shape(model: ModelAxes, source: str) -> tuple[int, ...]:
    """Return the full shape expected of a checkpoint tensor. Raises KeyError for one the model does not have."""
    return sources(model)[source].shape


def _held(block: Block, ownership: Ownership, rank: int, layer: int | None) -> Intervals:
    # A replicated extent is an axis of a single unit that every rank holds.
    units = ((0, 1),) if block.axis is None else ownership.of(block.axis, rank, layer)
    return scale(units, block.elements_per_unit)


def _shape(spec: ParamSpec, extent: int) -> tuple[int, ...]:
    return (*spec.rest[: spec.dim], extent, *spec.rest[spec.dim :])


def _align(offset_bytes: int, alignment: int) -> int:
    return (offset_bytes + alignment - 1) // alignment * alignment
