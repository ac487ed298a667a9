"""The files of a run directory, and the records of its processes."""

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
    """Return ``host`` for the host anchor, else the device's number."""
    return "host" if device == HOST_DEVICE else str(device)


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a process: ``start_ticks`` distinguishes it from a later one with the same pid."""

    pid: int
    start_ticks: int
    run_id: str

    def alive(self) -> bool:
        """Return whether this process still runs."""
        return is_alive(self.pid, self.start_ticks)

    def write(self, path: str) -> None:
        """Write the record atomically."""
        scratch = f"{path}.{os.getpid()}.tmp"
        with open(scratch, "wb") as file:
            file.write(msgspec.json.encode(self))
        os.replace(scratch, path)

    @classmethod
    def read(cls: type[Record], path: str) -> Record | None:
        """Read the record at ``path``; None if there is none or it cannot be decoded."""
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None


class ServerRecord(ProcessRecord, frozen=True, kw_only=True):
    """The record ``server.json`` of the main process that owns the run directory."""


class AnchorRecord(ProcessRecord, frozen=True, kw_only=True):
    """The record ``anchor-<device>.json`` of a running anchor."""

    device: int


class AnchorFiles(msgspec.Struct, frozen=True):
    """Paths of an anchor's sockets and files. Raises ``ValueError`` if one is too long for a Unix socket."""

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
        """Path of the ZeroMQ control socket."""
        return self._path("ctl")

    @property
    def handles(self) -> str:
        """Path of the Unix socket for memory handles."""
        return self._path("fds")

    @property
    def record(self) -> str:
        """Path of the ``AnchorRecord``."""
        return self._path("json")

    @property
    def log(self) -> str:
        """Path of the log, which outlives the anchor. A lock on it ensures that a device has one anchor."""
        return self._path("log")

    def complete(self) -> bool:
        """Return whether all files exist by which a live anchor is found and reached."""
        return all(map(os.path.exists, (self.record, self.control, self.handles)))

    def remove(self) -> None:
        """Remove all files except the log."""
        for path in (self.record, self.control, self.handles):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _path(self, suffix: str) -> str:
        return os.path.join(self.run_dir, f"anchor-{device_name(self.device)}.{suffix}")
