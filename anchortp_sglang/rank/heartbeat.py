"""Counters in shared memory that a rank moves while it works; main reads them.

One per rank, moved by every turn of its scheduler loop and by every all-reduce, tells hung from busy. Three more are
rank 0's: what resumed requests could reuse, and whether its decode graphs are captured.
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

MAX_RANKS = 61
BYTES = 8 * (MAX_RANKS + 3)
"""Size of the counters at the start of the control segment, int64 each: ranks, reused, recomputed, graphs."""

_counters: np.ndarray | None = None
_rank = 0


def open_counters(memory: mmap.mmap, rank: int) -> None:
    global _counters, _rank
    _counters, _rank = np.frombuffer(memory, np.int64, MAX_RANKS + 3), rank


def beat() -> None:
    if _counters is not None:
        _counters[_rank] += 1


@contextmanager
def beating(limit_s: float, every_s: float = 1.0) -> Iterator[None]:
    """Beat meanwhile, for something long that makes no steps; not after ``limit_s``, when it counts as hung."""
    done = threading.Event()

    def beat_on() -> None:
        for _ in range(int(limit_s / every_s)):
            if done.wait(every_s):
                return
            beat()

    thread = threading.Thread(target=beat_on, name="anchortp-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def count_tokens(reused: int, recomputed: int) -> None:
    """Tokens of a resumed request that were found in kept KV, and that had to be computed again."""
    if _counters is not None:
        _counters[MAX_RANKS : MAX_RANKS + 2] += (reused, recomputed)


def note_graphs() -> None:
    """Rank 0's decode graphs are captured."""
    if _counters is not None and _rank == 0:
        _counters[MAX_RANKS + 2] = 1


def read_graphs(memory: mmap.mmap) -> bool:
    """Whether this generation has captured its decode graphs."""
    return bool(np.frombuffer(memory, np.int64, 1, 8 * (MAX_RANKS + 2))[0])


def read_beats(memory: mmap.mmap, world_size: int) -> tuple[int, ...]:
    return tuple(np.frombuffer(memory, np.int64, world_size).tolist())


def read_tokens(memory: mmap.mmap) -> tuple[int, int]:
    """(reused, recomputed) of this generation so far."""
    reused, recomputed = np.frombuffer(memory, np.int64, 2, 8 * MAX_RANKS).tolist()
    return reused, recomputed
