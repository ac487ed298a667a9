"""Keeps the ranks of a group in step while they pass data through shared memory.

Every collective is a sequence of steps, numbered alike on all ranks. Step k uses one of two slots (k odd or even) of
each rank that writes. A rank owns one 64-bit counter, alone on its cache line, which no other rank writes: 2k says "my
part of step k is written", 2k+1 says "I have read all that I need of step k".

Assumes x86-64, where stores become visible in program order (TSO), and where an aligned 8-byte store, as an assignment
to a memoryview of format "q" is, is never seen half done.
"""

import os

from anchortp_sglang.platforms.cpu import futex

COUNTER_STRIDE_BYTES = 64
_YIELDS_BEFORE_SLEEP = 300
"""Yields before a wait sleeps. A collective inside a forward pass is answered within them (0.1 ms on an idle core); a
rank without work, which waits for the next request, is soon asleep and costs nothing."""


class StepCounters:
    """One rank's view of a group's counters.

    ``counters`` is a memoryview of format "q" over ``world_size`` lines of COUNTER_STRIDE_BYTES, all zero at first,
    which starts at ``address``. Not thread-safe: one thread of a rank takes part in a group.
    """

    def __init__(self, counters: memoryview, address: int, rank: int, world_size: int) -> None:
        per_line = COUNTER_STRIDE_BYTES // counters.itemsize
        self._counters = counters
        self._address = address
        self._own = rank * per_line
        self._of_rank = tuple(other * per_line for other in range(world_size))
        self._peers = tuple(index for index in self._of_rank if index != self._own)
        self._step = 0
        if counters[self._own] != 0:
            raise RuntimeError(
                f"shared-memory region already used by rank {rank} (counter {counters[self._own]}): "
                "every generation needs a fresh, zeroed region"
            )

    def enter(self) -> int:
        """Go to the next step; return its slot, 0 or 1."""
        self._step += 1
        return self._step & 1

    def await_slot_free(self) -> None:
        """Wait until every peer has read what this step's slot held two steps ago."""
        self._await(self._peers, 2 * (self._step - 2) + 1)

    def publish_written(self) -> None:
        """Publish that this rank's part of the step is in its slot."""
        self._publish(2 * self._step)

    def await_written(self, rank: int | None = None) -> None:
        """Wait for the part of one rank, or of all."""
        self._await(self._peers if rank is None else (self._of_rank[rank],), 2 * self._step)

    def publish_read(self) -> None:
        """Publish that this rank is done with the step, and wake a writer that waits for the slot."""
        self._publish(2 * self._step + 1)

    def note_read(self) -> None:
        """Publish like publish_read, but without the system call; for steps in which every rank writes.

        A rank that writes two steps later has seen this rank write the step between, and so does not wait. If that step
        is a broadcast, a writer may sleep here until this rank takes part in it, not longer.
        """
        self._counters[self._own] = 2 * self._step + 1

    def _publish(self, value: int) -> None:
        self._counters[self._own] = value
        futex.wake(self._address + 8 * self._own)

    def _await(self, indices: tuple[int, ...], target: int) -> None:
        counters = self._counters
        for index in indices:
            if counters[index] < target:
                self._wait_for(index, target)

    def _wait_for(self, index: int, target: int) -> None:
        counters, address = self._counters, self._address + 8 * index
        for _ in range(_YIELDS_BEFORE_SLEEP):
            os.sched_yield()
            if counters[index] >= target:
                return
        while (seen := counters[index]) < target:
            futex.sleep_while(address, seen)
