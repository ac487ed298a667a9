"""Whether starting ranks still get on: as seen from outside, by the processor time that they take."""

from collections.abc import Sequence

from anchortp_sglang.recovery.processes.pidfd import Usage

_ASLEEP = ("S", "T", "t")
_POLLS = 10
"""The least looks that must agree: time in which main itself did not run does not count."""


class StallWatch:
    """Judges the ranks of one start. Pure: fed with what is seen, and when (seconds).

    Ranks that are runnable but get no processor time (a throttled container), or wait for a disk, are not stalled.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._ticks = -1
        self._since = 0.0
        self._polls = 0

    def stalled(self, ranks: Sequence[Usage | None], now: float) -> bool:
        """Whether all ranks have slept for the limit, without a moment of processor time."""
        ticks = sum(rank.ticks for rank in ranks if rank is not None)
        if ticks != self._ticks or any(rank is not None and rank.state not in _ASLEEP for rank in ranks):
            self._ticks, self._since, self._polls = ticks, now, 0
        self._polls += 1
        return self._polls > _POLLS and now - self._since > self.limit_s
