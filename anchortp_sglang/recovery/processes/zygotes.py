"""The zygotes of a server: the one that forks, the one in reserve, and those that did not answer."""

import logging
import threading
import time
from collections.abc import Iterator

from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.stops import has_living_children
from anchortp_sglang.recovery.processes.zygote import Child, ForkFailed, Zygote, ZygoteError, spawn_zygote

log = logging.getLogger(__name__)

_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 600.0
"""First and longest pause between spawned reserves: each imports SGLang, and the last one may have failed at that."""


class Zygotes:
    """The zygotes of a server. Methods may be called from any thread.

    A zygote that does not answer in time is put aside and not killed: ranks and detokenizer may be its children, and
    would die with it. It is asked again later. If it answers then, it becomes the reserve; if not, it is killed as soon
    as it has no living children.
    """

    def __init__(self, zygote: Zygote, reserve: Zygote | None) -> None:
        self._current = zygote
        self._reserve = reserve
        self._aside: list[Zygote] = []
        self._ended = False
        self._spawned_at = -_LONGEST_PAUSE_S
        self._pause_s = _PAUSE_S
        # Guards the zygotes; never held while one is asked; ``kill`` may interrupt a holder.
        self._lock = threading.RLock()

    def fork(self) -> Child:
        """Fork one child.

        A dead or silent zygote is replaced by the reserve; without one, by a new one that imports SGLang first. Raises
        ZygoteError, OSError.
        """
        for _ in range(2):  # the one in use, the one in reserve
            zygote = self._current
            try:
                return zygote.fork()
            except ForkFailed:
                raise
            except ZygoteError as error:
                self._replace(zygote, error)
        return self._current.fork()

    def renew(self) -> None:
        """Ensure one zygote that answers, and one in reserve: a new one imports SGLang in the background."""
        current = self._current
        if not current.answers():
            self._replace(current, ZygoteError(f"the zygote (pid {current.pid}) does not answer"))
        reserve = self._reserve
        if reserve is not None and not reserve.answers():
            log.warning("anchortp: the reserve zygote (pid %d) does not answer and is replaced", reserve.pid)
            self._put_aside(reserve)
        self._end_useless()
        if self._reserve is None:
            again = next((zygote for zygote in self._aside if zygote.answers()), None)
            with self._lock:
                if again is not None:
                    self._aside.remove(again)
                self._reserve = again or self._spawn_reserve()
        elif not self._reserve.importing:
            self._pause_s = _PAUSE_S

    def _spawn_reserve(self) -> Zygote | None:
        """Spawn a reserve, unless the last one was spawned a moment ago."""
        if self._ended or time.monotonic() - self._spawned_at < self._pause_s:
            return None
        self._spawned_at, self._pause_s = time.monotonic(), min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return spawn_zygote()

    def all(self) -> Iterator[Zygote]:
        """Return the zygotes that may be alive."""
        with self._lock:
            zygotes = [self._current, *self._aside]
            return iter(zygotes if self._reserve is None else [*zygotes, self._reserve])

    def kill(self) -> None:
        """Kill all zygotes and, by their parent-death signals, all their children. No other is spawned from now on."""
        self._ended = True
        for zygote in self.all():
            zygote.kill()

    def _replace(self, failed: Zygote, error: ZygoteError) -> None:
        with self._lock:
            if self._ended:
                raise ZygoteError("the server is being shut down")
            if self._current is not failed:
                return  # another thread has done so
            reserve, self._reserve = self._reserve, None
            if reserve is not None and not is_dead(reserve.pidfd):
                log.warning("anchortp: %s; the reserve zygote takes over", error)
                successor = reserve
            else:
                log.warning(
                    "anchortp: %s, and no reserve is ready; forks wait for a new zygote, which imports SGLang", error
                )
                successor = spawn_zygote()
            self._aside.append(failed)
            self._current = successor

    def _put_aside(self, reserve: Zygote) -> None:
        with self._lock:
            if self._reserve is reserve:
                self._reserve = None
                self._aside.append(reserve)

    def _end_useless(self) -> None:
        with self._lock:
            aside = list(self._aside)
        for zygote in aside:
            if not has_living_children(zygote.pid) and not zygote.answers():
                zygote.kill()
            if is_dead(zygote.pidfd):
                with self._lock:
                    self._aside.remove(zygote)
                zygote.close()
