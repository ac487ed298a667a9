"""A generation: one configuration and its rank processes."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.planning.residence import Holding
from anchortp_sglang.recovery.processes import died_within, is_dead
from anchortp_sglang.recovery.zygote import Child

log = logging.getLogger(__name__)


class StartFailed(RuntimeError):
    """A rank did not come up; the text is its own."""


class KVUnusable(StartFailed):
    """The KV of the last generation cannot be used, or ranks disagree about it: to be tried again without."""


@dataclass
class Generation:
    """One configuration and its rank processes, in rank order."""

    number: int
    weights: Holding
    ranks: list[Child]
    infos: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ownership(self) -> Ownership:
        return self.weights.ownership

    def kill(self) -> None:
        for child in self.ranks:
            child.kill()

    def dead(self) -> tuple[int, ...]:
        """Ranks whose process is dead right now."""
        return tuple(rank for rank, child in enumerate(self.ranks) if is_dead(child.pidfd))

    def close(self) -> None:
        for child in self.ranks:
            child.close()


def wait_dead(generation: Generation) -> None:
    """Until every rank of a killed generation is dead, so that nothing can write to kept memory any more."""
    for child in generation.ranks:
        while not died_within(child.pidfd, 1.0):
            log.warning("anchortp: process %d is not dead yet", child.pid)


def wait_ready(generation: Generation, timeout_s: float) -> None:
    """Until every rank is ready. Raises StartFailed as soon as one fails or dies.

    Raises KVUnusable unless all have kept the same slots, in the same order of what is free.
    """
    deadline = time.monotonic() + timeout_s
    generation.infos = [_wait_one(generation, index, deadline) for index in range(len(generation.ranks))]
    digests = {info["rebuilt"].get("digest") for info in generation.infos}
    if len(digests) > 1:
        raise KVUnusable(f"ranks kept different slots: {sorted(map(str, digests))}")


def _wait_one(generation: Generation, index: int, deadline: float) -> dict[str, Any]:
    pipe = generation.ranks[index].pipe
    while not pipe.poll(0.02):
        for dead in generation.dead():
            _receive(generation, dead)  # a dead rank's pipe ends, after its last words if it had any
        if time.monotonic() > deadline:
            raise StartFailed(f"rank {index} was not ready in time")
    return _receive(generation, index)


def _receive(generation: Generation, index: int) -> dict[str, Any]:
    try:
        status, payload = generation.ranks[index].pipe.recv()
    except EOFError:
        raise StartFailed(f"rank {index} died while it was starting") from None
    if status != "ready":
        kind = KVUnusable if status == "unrestored" else StartFailed
        raise kind(f"rank {index}: {payload}")
    return dict(payload)
