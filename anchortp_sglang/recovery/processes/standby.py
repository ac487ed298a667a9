"""Main's end of a standby: a generation that is built while the current one serves, to take its place after a fault.

It is as wide as the serving one and shares its weights and KV (``rank/standby.py`` says how it keeps away from them).
It is of use if only processes died. Then its ranks read the slot table and go on; otherwise it is ended, and the next
generation is forked as without one. A standby that dies, hangs or cannot be built costs nothing but that.

While devices are to join or leave, the standby is the generation of those devices instead: its weights are moved while
it is built, and it takes its place when main stops the serving ranks (``recovery/reconfiguration.py``).
"""

import logging
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.spares import answering, end
from anchortp_sglang.recovery.processes.stops import resume
from anchortp_sglang.recovery.processes.zygote import Child

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 4.0, 600.0


@dataclass
class Standby:
    """A generation that stands by, or is being built to: its ranks in order, and what main needs of it later.

    ``store``: where the ranks meet. ``control``: its control segment, mapped read-only. ``leaving``: devices besides
    its own whose KV it takes over.
    """

    number: int
    weights: WeightPlacement
    store: Any
    control: mmap.mmap
    ranks: list[Child] = field(default_factory=list)
    leaving: tuple[int, ...] = ()
    build_timeout_s: float = 120.0
    _began: float = field(default_factory=time.monotonic)
    _reported: set[int] = field(default_factory=set)
    _failure: str = ""

    @property
    def ready(self) -> bool:
        """Whether all ranks have reported that they stand by."""
        return len(self._reported) == len(self.ranks)

    def look(self) -> str:
        """Take the ranks' reports; return why the standby is of no use, or an empty text."""
        self._failure = self._failure or self._found()
        return self._failure

    def _found(self) -> str:
        for rank, child in enumerate(self.ranks):
            if is_dead(child.pidfd):
                return f"rank {rank} died"
            if rank in self._reported or not child.pipe.poll():
                continue
            try:
                report = child.pipe.recv()
            except (EOFError, OSError):
                return f"rank {rank} died"
            if report is not None:
                return f"rank {rank}: {report[1]}"
            self._reported.add(rank)
        if not self.ready and time.monotonic() > self._began + self.build_timeout_s:
            return f"it was not built within {self.build_timeout_s:g} s"
        return ""

    def end(self) -> None:
        """Kill the ranks; the kernel tears them down by itself."""
        end(self.ranks)


class Standbys:
    """Keeps one standby ready. Its methods may be called from any thread.

    One that turns out to be of no use in a recovery is not ended at once: the kernel would tear it down on the cores
    that the recovery needs. It does nothing and is ended by the next ``prepare``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._standby: Standby | None = None
        self._useless: list[Standby] = []
        self._least_number = 0
        """Lower numbers are those of generations that have been started, by whatever means."""
        self._pause_s = _FIRST_PAUSE_S
        self._not_before = 0.0
        self._failure = ""

    def prepare(self, number: int, weights: WeightPlacement, make: Callable[[], Standby]) -> None:
        """Begin to build a standby as generation ``number`` with ``weights``, unless it is there.

        One that is of no use is replaced; after failures in a row with growing pauses.
        """
        self.end_useless()
        with self._lock:
            if number < self._least_number:
                return  # a recovery has begun since the caller looked
            standby = self._standby
            if standby is not None:
                failure = standby.look()
                fits = (standby.number, standby.weights) == (number, weights)
                if fits and not failure:
                    if standby.ready:
                        self._failure, self._pause_s = "", _FIRST_PAUSE_S
                    return
                standby.end()
                self._standby = None
                if failure and fits:
                    self._fail(failure)
        if time.monotonic() < self._not_before:
            return
        try:
            made = make()  # a recovery that begins meanwhile does not wait for it
        except Exception as error:  # of whatever kind, it is no reason to serve no more
            self._fail(f"{type(error).__name__}: {error}")
            return
        with self._lock:
            if number >= self._least_number:
                self._standby = made
                return
        made.end()

    def progress(self, number: int, weights: WeightPlacement) -> tuple[bool, str]:
        """Return whether a standby of these is ready, and why the last attempt to build one failed. Does not block."""
        if not self._lock.acquire(blocking=False):
            return False, ""
        try:
            standby = self._standby
            if standby is None or (standby.number, standby.weights) != (number, weights):
                return False, self._failure
            failure = standby.look()
            return standby.ready and not failure, failure
        finally:
            self._lock.release()

    def forget_failures(self) -> None:
        """Let the next attempt begin at once, as what is to be built is another standby than before."""
        self._failure, self._pause_s, self._not_before = "", _FIRST_PAUSE_S, 0.0

    def discard(self) -> None:
        """End the standby, if there is one: another is to be built in its place."""
        with self._lock:
            standby, self._standby = self._standby, None
        if standby is not None:
            standby.end()

    def take(self, number: int, weights: WeightPlacement, leaving: tuple[int, ...] = ()) -> Standby | None:
        """Take the standby for good if it is ready and fits; put it aside or end it otherwise.

        ``leaving``: devices whose memory is still there, although they are not in ``weights``.
        """
        standby = self._withdrawn(number)
        if standby is None:
            return None
        why = standby.look()
        if not why and (standby.number, standby.weights, standby.leaving) != (number, weights, leaving):
            why = "it has other weights, or attempts have failed since"
        if not why and not standby.ready:
            why = "it is not ready"
        if not why and len(answering(standby.ranks)) < len(standby.ranks):
            why = "a rank of it does not answer"
        if not why:
            return standby
        log.info("anchortp: the standby is not used: %s", why)
        self._put_aside(standby)
        return None

    def put_aside(self, number: int) -> None:
        """Do without the standby, if there is one, as generation ``number`` is started in another way."""
        standby = self._withdrawn(number)
        if standby is not None:
            standby.look()
            self._put_aside(standby)

    def end(self, number: int) -> None:
        """End the standby, and those that were put aside, after generation ``number``."""
        self.put_aside(number)
        self.end_useless()

    def end_useless(self) -> None:
        """End what was put aside; its memory is free a moment later."""
        while self._useless:
            self._useless.pop().end()

    def _withdrawn(self, number: int) -> Standby | None:
        """Return the standby, which is there no more; one that is being made for ``number`` will not be used."""
        with self._lock:
            self._least_number = number + 1
            standby, self._standby = self._standby, None
            return standby

    def _put_aside(self, standby: Standby) -> None:
        if standby.ready:
            self._useless.append(standby)
        else:
            standby.end()  # it would go on building

    def resume(self) -> int:
        """Resume stopped ranks of the standby (SIGSTOP) and count them; 0 while it is made or taken."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            return 0 if self._standby is None else sum(resume(c.pid, c.pidfd) for c in self._standby.ranks)
        finally:
            self._lock.release()

    @property
    def state(self) -> str:
        """Describe the standby for the status: ready, building, failed or none. Does not block."""
        if not self._lock.acquire(blocking=False):
            return "building"  # it is made, looked at or taken
        try:
            if self._standby is None:
                return "failed" if self._failure else "none"
            if self._standby.look():
                return "failed"
            return "ready" if self._standby.ready else "building"
        finally:
            self._lock.release()

    def _fail(self, why: str) -> None:
        log.warning(
            "anchortp: no standby: %s; the next attempt is in %g s, and a fault until then takes a little longer",
            why,
            self._pause_s,
        )
        self._failure = why
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
