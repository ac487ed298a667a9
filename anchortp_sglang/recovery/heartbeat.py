"""Counters in shared memory that a rank moves while it works; main reads them.

One per rank, moved by every turn of its scheduler loop and by every all-reduce, tells hung from busy. Two more are
rank 0's account of what resumed requests could reuse.
"""

import mmap

import numpy as np

MAX_RANKS = 62
BYTES = 8 * (MAX_RANKS + 2)
"""Size of the counters at the start of the lanes segment, int64 each: ranks, then reused, then recomputed."""

_counters: np.ndarray | None = None
_rank = 0


def open_counters(memory: mmap.mmap, rank: int) -> None:
    global _counters, _rank
    _counters, _rank = np.frombuffer(memory, np.int64, MAX_RANKS + 2), rank


def beat() -> None:
    if _counters is not None:
        _counters[_rank] += 1


def count_tokens(reused: int, recomputed: int) -> None:
    """Tokens of a resumed request that were found in kept KV, and that had to be computed again."""
    if _counters is not None:
        _counters[MAX_RANKS:] += (reused, recomputed)


def read_beats(memory: mmap.mmap, world_size: int) -> tuple[int, ...]:
    return tuple(np.frombuffer(memory, np.int64, world_size).tolist())


def read_tokens(memory: mmap.mmap) -> tuple[int, int]:
    """(reused, recomputed) of this generation so far."""
    reused, recomputed = np.frombuffer(memory, np.int64, 2, 8 * MAX_RANKS).tolist()
    return reused, recomputed
