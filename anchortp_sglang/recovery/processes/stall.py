"""Judges from outside whether starting ranks make progress, by the CPU time that they take."""

from collections.abc import Sequence

from anchortp_sglang.recovery.processes.pidfd import Usage

_ASLEEP = ("S", "T", "t")
_POLLS = 10
"""Fewest looks that must agree: time in which main itself did not run does not count."""


class StallWatch:
    """Judges the ranks of one start. Pure: states and times (seconds) are arguments.

    Ranks that are runnable but get no CPU time (a throttled container), or wait for a disk, are not stalled.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._ticks = -1
        self._since = 0.0
        self._polls = 0

    def stalled(self, ranks: Sequence[Usage | None], now: float) -> bool:
        """Return whether all ranks have slept for the limit without any CPU time."""
        ticks = sum(rank.ticks for rank in ranks if rank is not None)
        if ticks != self._ticks or any(rank is not None and rank.state not in _ASLEEP for rank in ranks):
            self._ticks, self._since, self._polls = ticks, now, 0
        self._polls += 1
        return self._polls > _POLLS and now - self._since > self.limit_s
