"""How many units each rank gets, and which: evenly, in proportion, or on top of what it keeps."""

from bisect import bisect_right
from collections.abc import Sequence

from anchortp_sglang.planning.intervals import Intervals, deal, normalize, scale, subtract, total


def even(units: int, ranks: int) -> tuple[int, ...]:
    """As even as possible, the larger shares first: 4 over 3 ranks is 2, 1, 1."""
    return tuple(units // ranks + (rank < units % ranks) for rank in range(ranks))


def proportional(units: int, weights: Sequence[int]) -> tuple[int, ...]:
    """In proportion to positive weights, by largest remainder; ties go to the lowest rank."""
    whole = sum(weights)
    shares = [units * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (-(units * weights[rank] % whole), rank))
    for rank in by_remainder[: units - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


def level(held: Sequence[int], extra: int) -> tuple[int, ...]:
    """How to hand out ``extra`` units so that what each holds evens out, taking from nobody."""

    def poured(height: int) -> int:
        return sum(max(0, height - units) for units in held)

    # The greatest height that `extra` fills; what is left raises the lowest ranks by one.
    height = bisect_right(range(max(held) + extra + 1), extra, key=poured) - 1
    gains = [max(0, height - units) for units in held]
    lowest = [rank for rank, units in enumerate(held) if units <= height]
    for rank in lowest[: extra - sum(gains)]:
        gains[rank] += 1
    return tuple(gains)


def split_heads(
    kv_heads: int, group_size: int, tp_size: int, widths: Sequence[int] | None
) -> tuple[tuple[Intervals, ...], tuple[Intervals, ...]]:
    """KV heads and query heads of each rank, contiguous.

    With fewer KV heads than ranks each KV head is served by several ranks, which share its ``group_size``
    query heads (at least one each).
    """
    if tp_size <= kv_heads:
        kv_head = deal(((0, kv_heads),), widths or even(kv_heads, tp_size))
        return kv_head, tuple(scale(runs, group_size) for runs in kv_head)
    replicas = even(tp_size, kv_heads)
    served = tuple(((kv, kv + 1),) for kv, ranks in enumerate(replicas) for _ in range(ranks))
    queries = [count for ranks in replicas for count in even(group_size, ranks)]
    return served, deal(((0, kv_heads * group_size),), queries)


def adopt_heads(heads: int, kept: Sequence[Intervals]) -> tuple[Intervals, ...]:
    """Each head that nobody kept goes to the rank with the fewest, ties to the lowest rank."""
    shares = list(kept)
    for start, stop in _lost(heads, kept):
        for head in range(start, stop):
            taker = min(range(len(shares)), key=lambda rank: total(shares[rank]))
            shares[taker] = normalize((*shares[taker], (head, head + 1)))
    return tuple(shares)


def adopt_even(units: int, kept: Sequence[Intervals]) -> tuple[Intervals, ...]:
    """Units that nobody kept, dealt in runs as long as possible so that the totals even out."""
    lost = _lost(units, kept)
    gains = deal(lost, level([total(runs) for runs in kept], total(lost)))
    return tuple(normalize(runs + gained) for runs, gained in zip(kept, gains, strict=True))


def _lost(units: int, kept: Sequence[Intervals]) -> Intervals:
    return subtract(((0, units),), normalize(run for runs in kept for run in runs))
