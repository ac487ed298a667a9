"""Records a recovery, stage by stage: for the status, the timeline, the metrics, the log and the command line."""

import copy
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchortp_sglang.recovery.state_machine import Cause, Verdict

log = logging.getLogger(__name__)

_RING = 32

_RANK_STAGES = {
    "attached": "attached",
    "groups": "groups_ready",
    "moved": "bytes_moved",
    "kv_kept": "kv_kept",
    "weights_bound": "weights_bound",
    "prefixes": "prefixes_rebuilt",
    "bound": "bound",
}
"""Stamps of ranks, and the name of the stage that ends when the last rank has it."""

_KV_FIELDS = ("slots_kept", "slots_restored", "slots_dropped", "kept_bytes", "restored_bytes")


@dataclass
class Recovery:
    """One recovery. Times are seconds since ``began`` (monotonic). ``tfs_s``: to the first new token for a client.

    ``ttp_s``: from then to the full throughput. ``lost``: devices whose memory is gone. ``ranks``: each new rank's
    stamps, as in the status. ``finished``: a first token was delivered, no client waits for one, or it was given up.
    """

    began: float
    generation: int = 0
    cause: Cause = "process"
    device: int = -1
    lost: list[int] = field(default_factory=list)
    reason: str = ""
    exception: str = ""
    """The error of a rank, if it reported one."""
    stages: list[tuple[str, float]] = field(default_factory=list)
    tfs_s: float | None = None
    ttp_s: float | None = None
    ranks: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    bytes_moved: dict[str, int] = field(default_factory=dict)
    kv: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_KV_FIELDS, 0) | {"dropped": {}})
    requests_replayed: int = 0
    tokens: Callable[[], tuple[int, int] | None] = lambda: None
    """Returns (reused, recomputed) so far; called until the generation is replaced."""
    failed: str | None = None
    _last_tokens: tuple[int, int] = (0, 0)

    def stage(self, name: str, at: float | None = None) -> None:
        """Stamp a stage (``at``: monotonic seconds, default now) and log it in one line."""
        seconds = (at if at is not None else time.monotonic()) - self.began
        self.stages.append((name, seconds))
        log.info("anchortp recovery: %s after %.3f s", name, seconds)

    def add_ranks(self, infos: Sequence[Mapping[str, Any]]) -> None:
        """Add the stages and moved bytes that the new ranks report; a stage is done when the last rank is."""
        for name, label in _RANK_STAGES.items():
            times = [info["stamps"][name] for info in infos if name in info["stamps"]]
            if times:
                self.stage(label, max(times))
        self.ranks = [self._rank(info) for info in infos]
        for info in infos:
            for kind, nbytes in info["moved_bytes"].items():
                self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + nbytes
            for kind, nbytes in info["rebuilt"].get("moved_bytes", {}).items():
                self.kv[f"{kind}_bytes"] += nbytes
        rebuilt = [info["rebuilt"] for info in infos if "kept" in info["rebuilt"]]
        if rebuilt:  # all ranks retain the same slots
            self.kv["slots_kept"] = rebuilt[0]["kept"]
            self.kv["slots_dropped"] = sum(rebuilt[0]["dropped"].values())
            self.kv["dropped"] = {reason: n for reason, n in rebuilt[0]["dropped"].items() if n}
            self.kv["slots_restored"] = max(each["restored"] for each in rebuilt)
        self.stage("ready")

    def _rank(self, info: Mapping[str, Any]) -> dict[str, Any]:
        stamps = sorted((at, _RANK_STAGES[name]) for name, at in info["stamps"].items() if name in _RANK_STAGES)
        return {
            "rank": info["rank"],
            "device": info["device"],
            "stages": [{"name": name, "at_s": round(at - self.began, 4)} for at, name in stamps],
            "moved_bytes": sum(info["moved_bytes"].values()),
        }

    def take_verdict(self, verdict: Verdict) -> None:
        """Note what has failed; devices lost in earlier attempts stay lost."""
        self.cause, self.device, self.reason = verdict.cause, verdict.device, verdict.reason
        if self.exception:
            self.reason += f"; it failed with {self.exception}"
        self.lost = sorted({*self.lost, *verdict.lost})

    def close(self) -> None:
        """Make the token counts final: the generation is about to be replaced."""
        self.token_counts()
        self.tokens = lambda: None

    def token_counts(self) -> tuple[int, int]:
        """Return tokens of resumed requests: (found in retained KV, computed again)."""
        self._last_tokens = self.tokens() or self._last_tokens
        return self._last_tokens

    def to_json(self) -> dict[str, Any]:
        reused, recomputed = self.token_counts()
        return {
            "generation": self.generation,
            "cause": self.cause,
            "device": self.device,
            "lost": self.lost,
            "reason": self.reason,
            "stages": [{"name": name, "at_s": round(at, 4)} for name, at in sorted(self.stages, key=_at)],
            "ranks": self.ranks,
            "tfs_s": None if self.tfs_s is None else round(self.tfs_s, 4),
            "ttp_s": None if self.ttp_s is None else round(self.ttp_s, 2),
            "reload_bytes": self.bytes_moved.get("reload", 0),
            "p2p_bytes": self.bytes_moved.get("p2p", 0),
            "copied_bytes": self.bytes_moved.get("copy", 0),
            "kv": self.kv,
            "requests_replayed": self.requests_replayed,
            "tokens_reused": reused,
            "tokens_recomputed": recomputed,
            "failed": self.failed,
        }


def _at(stage: tuple[str, float]) -> float:
    return stage[1]


@dataclass
class Totals:
    """Sums over all finished recoveries of a server: ``causes`` and ``bytes_moved`` by name."""

    causes: Counter[str] = field(default_factory=Counter)
    bytes_moved: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    requests_replayed: int = 0
    tokens_reused: int = 0
    tokens_recomputed: int = 0

    def add(self, recovery: Recovery) -> None:
        reused, recomputed = recovery.token_counts()
        self.causes[recovery.cause] += 1
        self.bytes_moved.update(recovery.bytes_moved)
        self.bytes_moved.update(kv_copy=recovery.kv["kept_bytes"], kv_restore=recovery.kv["restored_bytes"])
        self.failed += recovery.failed is not None
        self.requests_replayed += recovery.requests_replayed
        self.tokens_reused += reused
        self.tokens_recomputed += recomputed


class Recoveries:
    """The last recoveries, newest last. ``on_finished``: functions that are called with each finished recovery."""

    def __init__(self) -> None:
        self.on_finished: list[Callable[[Recovery], None]] = []
        self._ring: deque[Recovery] = deque()
        self._forgotten = Totals()

    def begin(self) -> Recovery:
        if self._ring:
            self._ring[-1].close()
        if len(self._ring) == _RING:
            self._forgotten.add(self._ring.popleft())
        recovery = Recovery(began=time.monotonic())
        self._ring.append(recovery)
        return recovery

    def finish(self, recovery: Recovery) -> None:
        """Report a recovery of which only TTP and token counts will still change. Observers must not disturb it."""
        recovery.finished = True
        for observe in self.on_finished:
            try:
                observe(recovery)
            except Exception:  # a failing metric or trace must not fail the recovery
                log.exception("anchortp: a recovery is missing in metrics or traces")

    def last(self) -> Recovery | None:
        return self._ring[-1] if self._ring else None

    def loss_of(self, device: int) -> str:
        """Return why a device was lost, as the newest recovery that lost it says; empty if none that is listed did."""
        return next((each.reason for each in reversed(self._ring) if device in each.lost), "")

    def totals(self) -> Totals:
        """Sum over all recoveries, also over those that are no longer listed."""
        totals = copy.deepcopy(self._forgotten)
        for recovery in self._ring:
            if recovery.finished:
                totals.add(recovery)
        return totals

    def to_json(self) -> list[dict[str, Any]]:
        return [recovery.to_json() for recovery in self._ring]
