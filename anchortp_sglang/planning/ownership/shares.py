"""Shares at a start: how many units each rank gets, and which; evenly, or in proportion."""

from collections.abc import Sequence

from anchortp_sglang.planning.intervals import Intervals, deal, scale


def even(units: int, ranks: int) -> tuple[int, ...]:
    """Divide as evenly as possible, the larger shares first: 4 over 3 ranks is 2, 1, 1."""
    return tuple(units // ranks + (rank < units % ranks) for rank in range(ranks))


def proportional(units: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Divide in proportion to positive weights, by largest remainder; ties go to the lowest rank."""
    whole = sum(weights)
    shares = [units * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (-(units * weights[rank] % whole), rank))
    for rank in by_remainder[: units - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


def split_heads(
    kv_heads: int, group_size: int, tp_size: int, widths: Sequence[int] | None
) -> tuple[tuple[Intervals, ...], tuple[Intervals, ...]]:
    """Return the KV heads and query heads of each rank, contiguous.

    With fewer KV heads than ranks, several ranks serve the same KV head and share its ``group_size`` query heads (at
    least one each).
    """
    if tp_size <= kv_heads:
        kv_head = deal(((0, kv_heads),), widths or even(kv_heads, tp_size))
        return kv_head, tuple(scale(runs, group_size) for runs in kv_head)
    replicas = even(tp_size, kv_heads)
    served = tuple(((kv, kv + 1),) for kv, ranks in enumerate(replicas) for _ in range(ranks))
    queries = [count for ranks in replicas for count in even(group_size, ranks)]
    return served, deal(((0, kv_heads * group_size),), queries)
