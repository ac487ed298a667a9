"""Sees to it that the run directory of a live server stays: a login's end, or a cleaner of /tmp, may take it away."""

from __future__ import annotations

import logging
import threading

from anchortp_sglang.anchor.outside import note_outside
from anchortp_sglang.anchor.rundir import RunDir, RunDirError, make_again

__all__ = ["RunDirKeeper"]

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class RunDirKeeper:
    """Looks every second, from a thread of its own; anchors do the same for their sockets.

    ``lost``: why the directory is not there and cannot be made, None while all is well: a fault could not be survived.
    ``made_again``: how often that was necessary.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.lost: str | None = None
        self.made_again = 0
        self._outside: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="anchortp-run-dir", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when it will not touch the directory any more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def note_outside(self, paths: list[str]) -> None:
        """Files that the next server removes, should this one be killed; they are noted in the directory."""
        self._outside += paths
        note_outside(self.run_dir.path, paths)

    def look(self) -> None:
        try:
            made = make_again(self.run_dir)
            if made:
                note_outside(self.run_dir.path, self._outside)
        except (OSError, RunDirError) as error:
            if self.lost is None:
                log.error("anchortp: %s; the next fault cannot be survived: restart the server", error)
            self.lost = str(error)
            return
        if made or self.lost is not None:
            log.warning("anchortp: the run directory %s had vanished, and was made again", self.run_dir.path)
            self.made_again += 1
        self.lost = None

    def _keep(self) -> None:
        while not self._end.wait(_LOOK_S):
            self.look()
