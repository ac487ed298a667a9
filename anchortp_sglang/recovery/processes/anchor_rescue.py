"""Rescues the memory of an anchor that does not answer, before it is killed."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.anchor.launch import AnchorProcess
from anchortp_sglang.recovery.processes.pidfd import died_within, fetch_descriptor
from anchortp_sglang.recovery.processes.stops import end

log = logging.getLogger(__name__)

_DEATH_TIMEOUT_S = 5.0
_MEMFD = "/memfd:"
_DELETED = " (deleted)"


@contextmanager
def taken_out_of(anchor: AnchorProcess, device: int, seal_travels: bool) -> Iterator[dict[str, int]]:
    """Kill an anchor that does not answer; yield the descriptors of its segments by name, open until the block ends.

    A duplicate of a memfd's descriptor (pidfd_getfd) keeps the memory, even if the process is stuck. Descriptors of
    other arenas (not ``seal_travels``) do not tell which segment they are. With those, or where the kernel forbids
    pidfd_getfd, the memory goes with the anchor, and the device is lost. Raises AnchorError.
    """
    with ExitStack() as held:
        segments: dict[str, int] = {}
        try:
            for name, remote_fd in _segments(anchor.pid).items() if seal_travels else ():
                segments[name] = fetch_descriptor(anchor.pidfd, remote_fd)
                held.callback(os.close, segments[name])
        except OSError as error:
            log.error("anchortp: the memory of the anchor of device %d cannot be fetched: %s", device, error)
            segments = {}
        end(anchor.pidfd)
        if not died_within(anchor.pidfd, _DEATH_TIMEOUT_S):
            raise AnchorError(f"the anchor of device {device} (pid {anchor.pid}) has been killed, but is not dead yet")
        if not segments:
            raise AnchorError(f"the anchor of device {device} did not answer and was killed; its memory is gone")
        yield segments


def _segments(pid: int) -> dict[str, int]:
    """Find the descriptors of the memfds that a process has open, by name."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith(_MEMFD):
            found[target.removeprefix(_MEMFD).removesuffix(_DELETED)] = int(link.name)
    return found
