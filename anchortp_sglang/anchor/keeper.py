"""Restores the run directory of a live server if the end of a login or a cleaner of /tmp has removed it."""

from __future__ import annotations

import logging
import threading

from anchortp_sglang.anchor.outside import note_outside
from anchortp_sglang.anchor.rundir import RunDir, RunDirError, make_again

__all__ = ["RunDirKeeper"]

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class RunDirKeeper:
    """A thread that checks the run directory every second; anchors do the same for their sockets.

    ``lost``: why the directory is missing and cannot be made, so that no fault can be survived; else None.
    ``made_again``: how often it was made again.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.lost: str | None = None
        self.made_again = 0
        self._outside: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="anchortp-run-dir", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait until the thread no longer touches the directory."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def note_outside(self, paths: list[str]) -> None:
        """Note files in the directory that the next server removes if this one is killed."""
        self._outside += paths
        note_outside(self.run_dir.path, paths)

    def look(self) -> None:
        try:
            made = make_again(self.run_dir)
            if made:
                note_outside(self.run_dir.path, self._outside)
        except (OSError, RunDirError) as error:
            if self.lost is None:
                log.error(
                    "anchortp: %s; the next fault cannot be survived: restart the server with another --anchor-run-dir",
                    error,
                )
            self.lost = str(error)
            return
        if made or self.lost is not None:
            log.warning("anchortp: the run directory %s had vanished, and was made again", self.run_dir.path)
            self.made_again += 1
        self.lost = None

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_S):
            self.look()
