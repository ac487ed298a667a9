"""A counter per rank in shared memory, moved by every turn of its scheduler loop: it tells hung from busy."""

import mmap

import numpy as np

MAX_RANKS = 64
BYTES = 8 * MAX_RANKS
"""Size of the counters at the start of the lanes segment, int64 each."""

_beats: np.ndarray | None = None
_rank = 0


def open_beats(memory: mmap.mmap, rank: int) -> None:
    global _beats, _rank
    _beats, _rank = np.frombuffer(memory, np.int64, MAX_RANKS), rank


def beat() -> None:
    if _beats is not None:
        _beats[_rank] += 1


def read(memory: mmap.mmap, world_size: int) -> tuple[int, ...]:
    return tuple(np.frombuffer(memory, np.int64, world_size).tolist())
