"""A generation: one configuration and its rank processes."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from anchortp_sglang.planning.ownership import Ownership
from anchortp_sglang.recovery.processes import died_within, is_dead
from anchortp_sglang.recovery.zygote import Child

log = logging.getLogger(__name__)


class StartFailed(RuntimeError):
    """A rank did not come up; the text is its own."""


@dataclass
class Generation:
    """One configuration and its rank processes, in rank order."""

    number: int
    ownership: Ownership
    ranks: list[Child]
    infos: list[dict[str, Any]] = field(default_factory=list)

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
    """Until every rank is ready. Raises StartFailed as soon as one fails or dies."""
    deadline = time.monotonic() + timeout_s
    generation.infos = [_wait_one(generation, index, deadline) for index in range(len(generation.ranks))]


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
        raise StartFailed(f"rank {index}: {payload}")
    return dict(payload)
