"""Shows main that a rank works: counters in shared memory that the rank moves.

Each rank has one, moved by every turn of its scheduler loop and every all-reduce, which tells hung from busy. Three
more are rank 0's: the tokens that resumed requests reused and recomputed, and whether its decode graphs are captured.
After them each rank reports what it measured of its device, when it is asked to.
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

MAX_RANKS = 61
_ROW = MAX_RANKS + 3
_ROWS = 4
BYTES = 8 * _ROW * _ROWS
"""Size of the counters at the start of the control segment, int64 each, in rows of one by rank.

Ranks, then reused, recomputed, graphs; after them speeds, free memory, and the number of the request for both.
"""


class Counters:
    """One rank's side of the counters. ``memory``: the generation's control segment, writable."""

    def __init__(self, memory: mmap.mmap, rank: int) -> None:
        self._counters, self._rank = np.frombuffer(memory, np.int64, _ROW), rank
        self._measured = _measured(memory)

    def beat(self) -> None:
        self._counters[self._rank] += 1

    @contextmanager
    def beating(self, limit_s: float, every_s: float = 1.0) -> Iterator[None]:
        """Beat during long work that makes no steps; not after ``limit_s``, when it counts as hung."""
        done = threading.Event()

        def beat_on() -> None:
            for _ in range(int(limit_s / every_s)):
                if done.wait(every_s):
                    return
                self.beat()

        thread = threading.Thread(target=beat_on, name="anchortp-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def count_tokens(self, reused: int, recomputed: int) -> None:
        """Add tokens of a resumed request that were found in retained KV, and that had to be computed again."""
        self._counters[MAX_RANKS : MAX_RANKS + 2] += (reused, recomputed)

    def note_graphs(self) -> None:
        """Note that decode graphs are captured; only rank 0 writes it."""
        if self._rank == 0:
            self._counters[MAX_RANKS + 2] = 1

    def report(self, number: int, bytes_per_s: int, free_bytes: int) -> None:
        """Report what this rank measured of its device, for request ``number``."""
        speeds, free, numbers = self._measured
        speeds[self._rank], free[self._rank] = bytes_per_s, free_bytes
        numbers[self._rank] = number


def read_measured(memory: mmap.mmap, world_size: int, number: int) -> tuple[list[int], list[int]] | None:
    """Return bytes per second and free bytes by rank, as measured for request ``number``; None until all have."""
    speeds, free, numbers = _measured(memory)
    if (numbers[:world_size] != number).any():
        return None
    return speeds[:world_size].tolist(), free[:world_size].tolist()


def _measured(memory: mmap.mmap) -> NDArray[np.int64]:
    return np.frombuffer(memory, np.int64, 3 * _ROW, 8 * _ROW).reshape(3, _ROW)


def read_graphs(memory: mmap.mmap) -> bool:
    """Return whether a generation has captured its decode graphs."""
    return bool(np.frombuffer(memory, np.int64, 1, 8 * (MAX_RANKS + 2))[0])


def read_beats(memory: mmap.mmap, world_size: int) -> tuple[int, ...]:
    """Return how far each rank's counter is."""
    return tuple(np.frombuffer(memory, np.int64, world_size).tolist())


def read_tokens(memory: mmap.mmap) -> tuple[int, int]:
    """Return a generation's (reused, recomputed) tokens of resumed requests so far."""
    reused, recomputed = np.frombuffer(memory, np.int64, 2, 8 * MAX_RANKS).tolist()
    return reused, recomputed
