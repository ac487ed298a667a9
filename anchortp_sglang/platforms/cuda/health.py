"""Watches GPUs by NVML, in a process of its own: NVML calls may hang when a GPU has fallen off the bus.

``python -m anchortp_sglang.platforms.cuda.health GPU-… GPU-…`` writes a line of JSON for each GPU that is lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import msgspec

__all__ = ["LOST", "GpuLost", "command", "reason_of_xid"]

_WAIT_MS = 1000
_PR_SET_PDEATHSIG = 1

LOST: dict[int, str] = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "rows could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered ECC error",
}
"""Xids after which a GPU's memory cannot be trusted or reached (NVIDIA's list of Xid errors). All others (13, 31, 43,
45, 94, …) are an application's: its process dies, the GPU goes on."""


class GpuLost(msgspec.Struct, frozen=True):
    """A line of output: a lost GPU and why."""

    uuid: str
    reason: str


def reason_of_xid(xid: int) -> str | None:
    """Return why a GPU with this Xid is lost; None if it is not."""
    return None if xid not in LOST else f"Xid {xid}: {LOST[xid]}"


def command(uuids: tuple[str, ...]) -> list[str]:
    """Return the command that starts the watch; it ends with the thread that started it."""
    return [sys.executable, "-m", "anchortp_sglang.platforms.cuda.health", str(os.getpid()), *uuids]


class _Watch:
    """Waits for events, and asks each GPU once in a while."""

    def __init__(self, uuids: list[str]) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handles: dict[str, Any] = {}
        self._missing: list[GpuLost] = []
        self._events = pynvml.nvmlEventSetCreate()
        for uuid in uuids:
            try:
                self._handles[uuid] = self._registered(uuid)
            except pynvml.NVMLError as error:
                self._missing.append(GpuLost(uuid, f"NVML: {error}"))

    def _registered(self, uuid: str) -> Any:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        events = nvml.nvmlEventTypeXidCriticalError & nvml.nvmlDeviceGetSupportedEventTypes(handle)
        if events:
            nvml.nvmlDeviceRegisterEvents(handle, events, self._events)
        return handle

    def next(self) -> list[GpuLost]:
        """Return the GPUs that were lost within a second; at first those that NVML does not find."""
        nvml = self._nvml
        if self._missing:
            missing, self._missing = self._missing, []
            return missing
        try:
            event = nvml.nvmlEventSetWait_v2(self._events, _WAIT_MS)
            uuid = nvml.nvmlDeviceGetUUID(event.device)
        except nvml.NVMLError:  # a timeout; or a GPU is lost, and NVML does not say which
            return [lost for uuid in self._handles if (lost := self._ask(uuid))]
        reason = reason_of_xid(event.eventData)
        return [GpuLost(uuid, reason)] if reason else []

    def _ask(self, uuid: str) -> GpuLost | None:
        nvml = self._nvml
        try:
            nvml.nvmlDeviceGetMemoryInfo(self._handles[uuid])
        except nvml.NVMLError as error:
            return GpuLost(uuid, f"NVML: {error}")
        return None


def _main(parent: int, uuids: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    watch, reported = _Watch(uuids), set[str]()
    while True:
        for lost in watch.next():
            if lost.uuid not in reported:
                reported.add(lost.uuid)
                print(msgspec.json.encode(lost).decode(), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
