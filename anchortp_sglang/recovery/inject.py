"""Injects faults: sends real signals to real processes, and checks that they took effect."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.processes.pidfd import is_dead, process_state
from anchortp_sglang.recovery.state_machine import Phase

_EFFECT_TIMEOUT_S = 5.0


class InjectionError(RuntimeError):
    """A fault that could not be injected, or had no effect."""


async def inject(coordinator: Coordinator, device: int, kind: Any) -> str:
    """Kill or stop the processes of ``device``; return what was done, once it has taken effect."""
    if kind not in ("process", "device", "hang"):
        raise InjectionError(f"kind must be process, device or hang, not {kind!r}")
    generation = coordinator.generation
    if generation is None or coordinator.state.phase is not Phase.SERVING:
        raise InjectionError("the server is not serving; wait until its recovery is over")
    if device not in generation.ownership.devices:
        raise InjectionError(f"device {device} is not serving; these are: {generation.ownership.devices}")
    child = generation.ranks[generation.ownership.devices.index(device)]
    # Duplicated: the coordinator closes the child's descriptor once the rank is reaped.
    rank_fd, anchor = os.dup(child.pidfd), coordinator.processes.anchors.processes[device]
    try:
        if kind == "hang":
            signal.pidfd_send_signal(rank_fd, signal.SIGSTOP)
            await _seen(lambda: process_state(child.pid) == "T", f"rank process {child.pid} did not stop")
            return f"rank process {child.pid} is stopped"
        if kind == "device":
            signal.pidfd_send_signal(anchor.pidfd, signal.SIGKILL)
        signal.pidfd_send_signal(rank_fd, signal.SIGKILL)
        await _seen(lambda: is_dead(rank_fd), f"rank process {child.pid} did not die")
        if kind == "process":
            return f"rank process {child.pid} is dead"
        await _seen(lambda: is_dead(anchor.pidfd), f"anchor {anchor.pid} did not die")
        return f"rank process {child.pid} and anchor {anchor.pid} are dead: the device's memory is gone"
    finally:
        os.close(rank_fd)


async def _seen(effect: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _EFFECT_TIMEOUT_S
    while not effect():
        if time.monotonic() > deadline:
            raise InjectionError(failure)
        await asyncio.sleep(0.005)
