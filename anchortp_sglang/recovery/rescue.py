"""An anchor that does not answer: its memory is taken out of it before it is killed."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from anchortp_sglang.anchor.client import AnchorError
from anchortp_sglang.recovery.processes import died_within, fetch_descriptor
from anchortp_sglang.recovery.stops import end

if TYPE_CHECKING:
    from anchortp_sglang.recovery.anchors import Anchors

log = logging.getLogger(__name__)

_DEATH_TIMEOUT_S = 5.0
_MEMFD = "/memfd:"
_DELETED = " (deleted)"


def replace_silent(anchors: "Anchors", device: int, generation: int) -> list[str]:
    """Kill the anchor of ``device``, and give all it holds to a new one, fenced at ``generation``; the names.

    Its segments are memfds of the same names; a duplicate of a descriptor (pidfd_getfd) keeps the memory, even of a
    process that does nothing any more. Memory of a GPU has no such descriptor, and where the kernel forbids pidfd_getfd
    there is none either: the memory goes with the anchor, and the device is lost. Raises AnchorError, AnchorStartError.
    """
    anchor = anchors.processes[device]
    with ExitStack() as held:
        segments: dict[str, int] = {}
        try:
            for name, remote_fd in _segments(anchor.pid).items() if anchors.plan.gpu(device) is None else ():
                segments[name] = fetch_descriptor(anchor.pidfd, remote_fd)
                held.callback(os.close, segments[name])
        except OSError as error:
            log.error("anchortp: the memory of the anchor of device %d is out of reach: %s", device, error)
            segments = {}
        end(anchor.pidfd)
        if not died_within(anchor.pidfd, _DEATH_TIMEOUT_S):
            raise AnchorError(f"the anchor of device {device} (pid {anchor.pid}) has been killed, but is not dead yet")
        if not segments:
            raise AnchorError(f"the anchor of device {device} did not answer and was killed; its memory is gone")
        anchors.start_one(device, generation)
        for name, fd in segments.items():
            anchors.client(device).adopt_handle(generation, name, fd, os.fstat(fd).st_size, sealed=False)
    return sorted(segments)


def _segments(pid: int) -> dict[str, int]:
    """Descriptors of the memfds that a process has open, by name."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith(_MEMFD):
            found[target.removeprefix(_MEMFD).removesuffix(_DELETED)] = int(link.name)
    return found
