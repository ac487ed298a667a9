"""The files of a run directory, and the records in them of who runs there."""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec

from anchortp_sglang.anchor.pids import is_alive

__all__ = [
    "HOST_DEVICE",
    "AnchorFiles",
    "AnchorRecord",
    "ServerRecord",
    "device_name",
]

HOST_DEVICE = -1  # the anchor of host memory
_SOCKET_PATH_LIMIT = 107  # sockaddr_un.sun_path without its terminating zero

Record = TypeVar("Record", bound="ProcessRecord")


def device_name(device: int) -> str:
    """``host`` for the host anchor, else the device's number."""
    return "host" if device == HOST_DEVICE else str(device)


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Names one process for good: ``start_ticks`` tells it from a later one with the same pid."""

    pid: int
    start_ticks: int
    run_id: str

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return is_alive(self.pid, self.start_ticks)

    def write(self, path: str) -> None:
        """Write the record so that a reader sees all of it or none."""
        scratch = f"{path}.{os.getpid()}.tmp"
        with open(scratch, "wb") as file:
            file.write(msgspec.json.encode(self))
        os.replace(scratch, path)

    @classmethod
    def read(cls: type[Record], path: str) -> Record | None:
        """The record at ``path``; None if there is none or it cannot be understood."""
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None


class ServerRecord(ProcessRecord, frozen=True, kw_only=True):
    """``server.json``: the main process that owns the run directory."""


class AnchorRecord(ProcessRecord, frozen=True, kw_only=True):
    """``anchor-<device>.json``: a running anchor."""

    device: int


class AnchorFiles(msgspec.Struct, frozen=True):
    """Where an anchor's sockets and files are. ``ValueError`` if the path is too long for a Unix socket."""

    run_dir: str
    device: int

    def __post_init__(self) -> None:
        if self.device < HOST_DEVICE:
            raise ValueError(f"device {self.device}: devices are numbered from 0, {HOST_DEVICE} is the host")
        length = len(os.fsencode(self.control))
        if not os.path.isabs(self.run_dir) or length > _SOCKET_PATH_LIMIT:
            raise ValueError(
                f"run directory {self.run_dir!r} must be absolute and short: {self.control!r} has {length}"
                f" bytes, a Unix socket path at most {_SOCKET_PATH_LIMIT}; choose another run directory"
            )

    @property
    def control(self) -> str:
        """The ZeroMQ control socket."""
        return self._path("ctl")

    @property
    def handles(self) -> str:
        """The Unix socket over which memory handles travel."""
        return self._path("fds")

    @property
    def record(self) -> str:
        """The ``AnchorRecord``."""
        return self._path("json")

    @property
    def log(self) -> str:
        """The log; stays when the anchor is gone. A lock on it sees to it that a device has one anchor."""
        return self._path("log")

    def complete(self) -> bool:
        """Whether an anchor that lives can be found and reached by them."""
        return all(map(os.path.exists, (self.record, self.control, self.handles)))

    def remove(self) -> None:
        """Remove all but the log."""
        for path in (self.record, self.control, self.handles):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _path(self, suffix: str) -> str:
        return os.path.join(self.run_dir, f"anchor-{device_name(self.device)}.{suffix}")
