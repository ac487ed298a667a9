"""What a recovery was, stage by stage: for the status page, the log and the command line."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchortp_sglang.recovery.machine import Cause

log = logging.getLogger(__name__)

_RING = 32


@dataclass
class Recovery:
    """Times are seconds since ``began`` (monotonic). ``tfs_s``: to the first new token handed to a client."""

    began: float
    generation: int = 0
    cause: Cause = "process"
    device: int = -1
    reason: str = ""
    stages: list[tuple[str, float]] = field(default_factory=list)
    tfs_s: float | None = None
    bytes_moved: dict[str, int] = field(default_factory=dict)
    requests_replayed: int = 0
    tokens: Callable[[], tuple[int, int] | None] = lambda: None
    """(reused, recomputed) so far; asked until the generation is replaced."""
    failed: str | None = None
    _last_tokens: tuple[int, int] = (0, 0)

    def stage(self, name: str, at: float | None = None) -> None:
        """Stamp a stage (``at``: monotonic seconds, default now) and log it in one line."""
        seconds = (at if at is not None else time.monotonic()) - self.began
        self.stages.append((name, seconds))
        log.info("anchortp recovery: %s after %.3f s", name, seconds)

    def add_ranks(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Take the stages and moved bytes that the new ranks report; a stage is done when the last rank is."""
        for name, label in (("groups", "groups_ready"), ("moved", "bytes_moved"), ("bound", "bound")):
            times = [info["stamps"][name] for info in infos if name in info["stamps"]]
            if times:
                self.stage(label, max(times))
        for info in infos:
            for kind, nbytes in info["moved_bytes"].items():
                self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + nbytes
        self.stage("ready")

    def close(self) -> None:
        """Its generation is about to be replaced: what it counted so far is final."""
        self._last_tokens = self.tokens() or self._last_tokens
        self.tokens = lambda: None

    def to_json(self) -> dict[str, Any]:
        reused, recomputed = self._last_tokens = self.tokens() or self._last_tokens
        return {
            "generation": self.generation,
            "cause": self.cause,
            "device": self.device,
            "reason": self.reason,
            "stages": [{"name": name, "at_s": round(at, 4)} for name, at in sorted(self.stages, key=_at)],
            "tfs_s": None if self.tfs_s is None else round(self.tfs_s, 4),
            "reload_bytes": self.bytes_moved.get("reload", 0),
            "p2p_bytes": self.bytes_moved.get("p2p", 0),
            "copied_bytes": self.bytes_moved.get("copy", 0),
            "requests_replayed": self.requests_replayed,
            "tokens_reused": reused,
            "tokens_recomputed": recomputed,
            "failed": self.failed,
        }


def _at(stage: tuple[str, float]) -> float:
    return stage[1]


class Recoveries:
    """The last recoveries, newest last."""

    def __init__(self) -> None:
        self._ring: deque[Recovery] = deque(maxlen=_RING)

    def begin(self) -> Recovery:
        if self._ring:
            self._ring[-1].close()
        recovery = Recovery(began=time.monotonic())
        self._ring.append(recovery)
        return recovery

    def to_json(self) -> list[dict[str, Any]]:
        return [recovery.to_json() for recovery in self._ring]
