"""A generation: one configuration, its rank processes, and all that main knows of them."""

import logging
import mmap
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.rank import heartbeat
from anchortp_sglang.rank.crash import Crash
from anchortp_sglang.rank.leave import LEFT
from anchortp_sglang.recovery.processes.pidfd import died_within, is_dead, process_state, usage
from anchortp_sglang.recovery.processes.stall import STOPPED, StallWatch
from anchortp_sglang.recovery.processes.zygote import Child
from anchortp_sglang.recovery.report.kv_usage import KVUsage

log = logging.getLogger(__name__)


class StartFailed(RuntimeError):
    """Ranks did not start. ``own``: the failure that one of them reported; empty if none did."""

    def __init__(self, text: str, own: str = "") -> None:
        super().__init__(text)
        self.own = own


class KVUnusable(StartFailed):
    """KV of the last generation cannot be used, or ranks retained different slots: try again without it."""


@dataclass
class Generation:
    """One configuration and its rank processes, in rank order.

    Set once all ranks are ready, if not before: ``infos`` (each rank's own), ``control`` (the control segment) and
    ``kv_usage``, both mapped read-only. ``died``, ``hung``: ranks found so before the others were killed.
    ``hung_since``: when they last made progress (monotonic), if they hang.
    """

    number: int
    weights: WeightPlacement
    ranks: list[Child]
    infos: list[dict[str, Any]] = field(default_factory=list)
    control: mmap.mmap | None = None
    kv_usage: KVUsage | None = None
    died: set[int] = field(default_factory=set)
    hung: set[int] = field(default_factory=set)
    hung_since: float | None = None
    crashes: dict[int, Crash] = field(default_factory=dict)
    """Reports of ranks that failed, as far as they were read before it was known that they died."""
    left: bool = False
    """Whether all ranks have reported that they write and send nothing any more, although they live."""

    @property
    def ownership(self) -> Ownership:
        return self.weights.ownership

    def kill(self) -> None:
        for child in self.ranks:
            child.kill()

    def dead(self) -> tuple[int, ...]:
        """Return the ranks whose process is dead now."""
        return tuple(rank for rank, child in enumerate(self.ranks) if is_dead(child.pidfd))

    def note_deaths(self) -> None:
        """Remember which ranks are dead now; call it before the others are killed."""
        self.died.update(self.dead())

    def note_hang(self, ranks: set[int], since: float) -> None:
        """Remember that these ranks make no progress, and since when (monotonic)."""
        self.hung, self.hung_since = ranks, since

    def beats(self) -> tuple[int, ...] | None:
        """Return how far each rank's counter is; None before they are ready."""
        return None if self.control is None else heartbeat.read_beats(self.control, self.ownership.tp_size)

    def tokens_reused(self) -> tuple[int, int] | None:
        """Return (reused, recomputed) tokens of the requests that this generation has resumed so far."""
        return None if self.control is None else heartbeat.read_tokens(self.control)

    def measured(self, number: int) -> tuple[list[int], list[int]] | None:
        """Return bytes per second and free bytes by rank, as measured for this request; None until all have."""
        if self.control is None:
            return None
        return heartbeat.read_measured(self.control, self.ownership.tp_size, number)

    def graphs_captured(self) -> bool:
        """Return whether its decode graphs are captured."""
        return self.control is not None and heartbeat.read_graphs(self.control)

    def close(self) -> None:
        """Close the descriptors of dead ranks, and the control segment."""
        for child in self.ranks:
            child.close()
        self.control = None


def note_left(generation: Generation, reported: set[int]) -> bool:
    """Add the ranks that have reported since that they have left; return whether all have. Does not block."""
    for index, child in enumerate(generation.ranks):
        if index not in reported and child.pipe.poll():
            try:
                status, payload = child.pipe.recv()
            except (EOFError, OSError):
                continue  # it died, which is noticed elsewhere
            if status == LEFT:
                reported.add(index)
            elif status == "crashed":
                generation.crashes[index] = payload
    generation.left = len(reported) == len(generation.ranks)
    return generation.left


def wait_dead(generation: Generation) -> None:
    """Wait until every rank of a killed generation is dead, so that none can write to retained memory any more."""
    for child in generation.ranks:
        while not died_within(child.pidfd, 1.0):
            log.warning("anchortp: process %d is not dead yet", child.pid)


def wait_ready(generation: Generation, timeout_s: float, stall: StallWatch | None = None) -> None:
    """Wait until every rank is ready. ``stall`` judges whether they make progress; None: only the timeout counts.

    Raises StartFailed as soon as one fails or dies, or when they make no progress; KVUnusable unless all have
    retained the same slots, and have the same free ones in the same order.
    """
    deadline = time.monotonic() + timeout_s
    generation.infos = [_wait_one(generation, index, deadline, stall) for index in range(len(generation.ranks))]
    digests = {info["rebuilt"].get("digest") for info in generation.infos}
    if len(digests) > 1:
        raise KVUnusable(f"ranks retained different KV slots: {sorted(map(str, digests))}")


def _wait_one(generation: Generation, index: int, deadline: float, stall: StallWatch | None) -> dict[str, Any]:
    pipe = generation.ranks[index].pipe
    while not pipe.poll(0.02):
        for dead in generation.dead():
            _receive(generation, dead)  # a dead rank's pipe ends, after its last message if it sent one
        if stall is not None and stall.stalled([usage(child.pid) for child in generation.ranks], time.monotonic()):
            stopped = [rank for rank, child in enumerate(generation.ranks) if process_state(child.pid) in STOPPED]
            who = f"rank {stopped[0]} is stopped" if stopped else "all of them sleep"
            raise StartFailed(f"the ranks make no progress with their start: {who}")
        if time.monotonic() > deadline:
            raise StartFailed(f"rank {index} was not ready in time")
    return _receive(generation, index)


def _receive(generation: Generation, index: int) -> dict[str, Any]:
    try:
        status, payload = generation.ranks[index].pipe.recv()
    except (EOFError, OSError):
        crash = generation.ranks[index].crash()
        own = "a crash" if crash else ""  # the handler of one signal may die of another
        raise StartFailed(f"rank {index} died while it was starting {crash}".rstrip(), own=own) from None
    if status != "ready":
        kind = KVUnusable if status == "unrestored" else StartFailed
        raise kind(f"rank {index}: {payload}", own=str(payload))
    return dict(payload)


def last_words(generation: Generation) -> list[Crash | None]:
    """Read the Crash of each rank that died, None if it reported none. Can be read once."""
    heard = generation.crashes
    return [heard.get(rank) or _crash(generation.ranks[rank].pipe) for rank in sorted(generation.died)]


def _crash(pipe: Connection) -> Crash | None:
    try:
        status, payload = pipe.recv() if pipe.poll() else ("", None)
    except (EOFError, OSError):
        return None
    return payload if status == "crashed" else None
