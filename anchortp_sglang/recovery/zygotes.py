"""The zygote that forks, the one in reserve, and those that did not answer."""

import logging
import os
import threading
from collections.abc import Iterator

from anchortp_sglang.recovery.processes import is_dead
from anchortp_sglang.recovery.stops import has_living_children
from anchortp_sglang.recovery.zygote import Child, Zygote, ZygoteError, spawn_zygote

log = logging.getLogger(__name__)


class Zygotes:
    """Methods may be called from any thread.

    One that does not answer in time is put aside and not killed: ranks and detokenizer may be its children, and would
    die with it. It is asked again later. If it answers then, it waits in reserve; if not, it is killed as soon as none
    of its children is left.
    """

    def __init__(self, zygote: Zygote, reserve: Zygote | None) -> None:
        self._current = zygote
        self._reserve = reserve
        self._aside: list[Zygote] = []
        self._lock = (
            threading.RLock()
        )  # guards the three; never held while a zygote is asked; ``kill`` may interrupt us

    def fork(self) -> Child:
        """Fork one child. A zygote that is dead or silent is replaced by the one in reserve, that one by a new one, for
        which SGLang is imported first. Raises ZygoteError."""
        for _ in range(2):  # the one in use, the one in reserve
            zygote = self._current
            try:
                return zygote.fork()
            except ZygoteError as error:
                self._replace(zygote, error)
        return self._current.fork()

    def renew(self) -> None:
        """Have one that answers, and one in reserve: a new one imports SGLang in the background."""
        current = self._current
        if not current.answers():
            self._replace(current, ZygoteError(f"the zygote (pid {current.pid}) does not answer"))
        reserve = self._reserve
        if reserve is not None and not reserve.answers():
            log.warning("anchortp: the zygote in reserve (pid %d) does not answer", reserve.pid)
            self._put_aside(reserve)
        self._end_useless()
        if self._reserve is None:
            again = next((zygote for zygote in self._aside if zygote.answers()), None)
            with self._lock:
                if again is not None:
                    self._aside.remove(again)
                self._reserve = again or spawn_zygote()

    def all(self) -> Iterator[Zygote]:
        """Those that may live."""
        with self._lock:
            zygotes = [self._current, *self._aside]
            return iter(zygotes if self._reserve is None else [*zygotes, self._reserve])

    def kill(self) -> None:
        """End them all and, by their parent-death signals, all their children."""
        for zygote in self.all():
            zygote.kill()

    def _replace(self, failed: Zygote, error: ZygoteError) -> None:
        with self._lock:
            if self._current is not failed:
                return  # another thread has done so
            self._aside.append(failed)
            reserve, self._reserve = self._reserve, None
            if reserve is not None and not is_dead(reserve.pidfd):
                log.warning("anchortp: %s; the one in reserve takes over", error)
                self._current = reserve
            else:
                log.warning("anchortp: %s; forks wait for another one, which imports SGLang anew", error)
                self._current = spawn_zygote()

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
                os.close(zygote.pidfd)
