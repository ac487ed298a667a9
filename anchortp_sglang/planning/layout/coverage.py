"""Proves that shards are complete: no element missing, doubled, or read from an unknown tensor.

SGLang's own weight loaders do not notice every tensor that they could not place, so every element is checked.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from anchortp_sglang.planning.intervals import normalize, subtract
from anchortp_sglang.planning.layout.shards import ShardLayout, Source, sources
from anchortp_sglang.planning.model.axes import ModelAxes

Runs = list[tuple[int, int]]


class CoverageError(ValueError):
    """Weights that would be missing, doubled or misplaced; the text names the tensor and the elements."""


def check_coverage(layout: ShardLayout) -> None:
    """Check that pieces and padding cover every parameter exactly once, and that no two parameters overlap.

    Raises CoverageError.
    """
    dims = {placed.name: placed.dim for placed in layout.params}
    runs: defaultdict[str, Runs] = defaultdict(list)
    for piece in layout.pieces:
        if dims.get(piece.param) != piece.dim:
            raise CoverageError(f"{piece.source} fills {piece.param} along dim {piece.dim}, where it is not split")
        runs[piece.param].append((piece.start, piece.start + piece.length))
    for param, start, length in layout.padding:
        runs[param].append((start, start + length))
    if strangers := runs.keys() - dims.keys():
        raise CoverageError(f"{sorted(strangers)} are filled but have no place in the shard")
    for placed in layout.params:
        _check_exactly_once(placed.name, placed.shape[placed.dim], runs[placed.name])
    _check_places(layout)


def check_sources(
    model: ModelAxes,
    layouts_of_all_ranks: Sequence[ShardLayout],
    checkpoint_names: Iterable[str],
    source_shapes: Mapping[str, tuple[int, ...]],
) -> tuple[str, ...]:
    """Check that the shards of all ranks together read the whole checkpoint, and return its unused tensors, sorted.

    ``source_shapes``: the shapes found in the checkpoint. Raises CoverageError if a tensor is missing, has another
    shape than the model needs, or belongs to the model but is unknown; or if some of its elements are on no rank, or
    twice on one.
    """
    expected = sources(model)
    unused = _check_names(model, expected, set(checkpoint_names))
    for source, needed in expected.items():
        found = tuple(source_shapes.get(source, ()))
        if found != needed.shape and (found, needed.shape) != ((1,), ()):
            raise CoverageError(f"{source} has shape {found} in the checkpoint; config.json says {needed.shape}")
    read = _reads(layouts_of_all_ranks, _times_read(model))
    for source, needed in expected.items():
        _check_read(source, needed.extent, read.get(source, []))
    if strangers := read.keys() - expected.keys():
        raise CoverageError(f"shards are filled from {sorted(strangers)}, which the model does not have")
    return unused


def _check_exactly_once(name: str, extent: int, runs: Runs) -> None:
    end = 0
    for start, stop in sorted(runs):
        if stop <= start:
            raise CoverageError(f"{name}: a run of {stop - start} elements at {start}")
        if start != end:
            what = "are filled by nothing" if start > end else "are filled twice"
            raise CoverageError(f"{name}: elements [{min(start, end)}, {max(start, end)}) {what}")
        end = stop
    if end != extent:
        raise CoverageError(f"{name}: filled up to element {end} of {extent}")


def _check_places(layout: ShardLayout) -> None:
    end = 0
    for placed in layout.params:
        if placed.offset_bytes < end:
            raise CoverageError(f"{placed.name} starts at byte {placed.offset_bytes}, inside its neighbour")
        end = placed.offset_bytes + placed.nbytes
    if end > layout.total_bytes:
        raise CoverageError(f"the parameters end at byte {end} of a shard of {layout.total_bytes}")


def foreign_sources(model: ModelAxes, unused: Iterable[str]) -> tuple[str, ...]:
    """Return the unused tensors that no family knows, such as the value head of a reward model (``v_head.…``).

    SGLang's ``load_weights`` leaves them out with a warning.
    """
    known = [re.compile(pattern) for pattern in model.unused_sources]
    return tuple(name for name in unused if not any(pattern.search(name) for pattern in known))


def check_names(model: ModelAxes, checkpoint_names: Iterable[str]) -> tuple[str, ...]:
    """Check only the names of a checkpoint's tensors. Returns and raises like ``check_sources``."""
    return _check_names(model, sources(model), set(checkpoint_names))


def _check_names(model: ModelAxes, expected: Mapping[str, Source], names: set[str]) -> tuple[str, ...]:
    """Check names: SGLang ignores tensors that it has no parameter for.

    An ignored tensor of the model itself would mean a wrong rule in its family, or wrong answers.
    """
    for source in expected:
        if source not in names:
            raise CoverageError(f"the checkpoint has no {source}, which {model.architecture} needs")
    others = names - expected.keys()
    strangers = sorted(name for name in foreign_sources(model, others) if name.startswith("model."))
    if strangers:
        raise CoverageError(
            f"the checkpoint has {len(strangers)} tensors that {model.architecture} has no place for: "
            f"{', '.join(strangers[:8])}"
        )
    return tuple(sorted(others))


def _times_read(model: ModelAxes) -> Mapping[str, int]:
    """Count how often a rank reads the elements that it needs of a source, where that is not once (K that is V too)."""
    return Counter(block.source for spec in model.params if spec.repeats for block in spec.blocks)


def _reads(layouts: Sequence[ShardLayout], times: Mapping[str, int]) -> dict[str, Runs]:
    """Return the runs of each source that the ranks read. Raises CoverageError if a rank reads an element too often."""
    read: defaultdict[str, Runs] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        mine: defaultdict[str, Runs] = defaultdict(list)
        for piece in layout.pieces:
            mine[piece.source].append((piece.source_start, piece.source_start + piece.length))
        for source, runs in mine.items():
            ordered = sorted(runs)
            if set(Counter(ordered).values()) == {times.get(source)}:
                ordered = sorted(set(ordered))
            if any(left[1] > right[0] for left, right in pairwise(ordered)):
                raise CoverageError(f"rank {rank} reads elements of {source} twice: {ordered}")
            read[source].extend(runs)
    return read


def _check_read(source: str, extent: int, runs: Runs) -> None:
    together = normalize(runs)
    if together == ((0, extent),):
        return
    missing = subtract(((0, extent),), together)
    if missing:
        raise CoverageError(f"{source}: no rank reads elements {missing} of {extent} along its split dim")
    raise CoverageError(f"{source}: ranks read beyond its {extent} elements")
