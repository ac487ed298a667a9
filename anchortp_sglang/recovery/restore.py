"""A dead anchor on a healthy device: its memory is still held by the device's rank; a new anchor takes it back."""

import ctypes
import os
from typing import Any

from anchortp_sglang.elastic.attachment import HOST_DEVICE
from anchortp_sglang.recovery.cluster import Cluster
from anchortp_sglang.recovery.generation import Generation

_SYS_PIDFD_GETFD = 438  # Linux 5.6, the same on all architectures


def restore_anchor(cluster: Cluster, generation: Generation, device: int) -> list[str]:
    """Start the anchor of ``device`` anew and hand it its segments; their names.

    The rank need not cooperate: its descriptors are fetched with pidfd_getfd. Raises OSError, AnchorError.
    """
    cluster.start_one_anchor(device, generation.number)
    rank = 0 if device == HOST_DEVICE else generation.ownership.devices.index(device)
    child, fds = generation.ranks[rank], generation.infos[rank]["fds"]
    restored = []
    for (owner, segment), remote_fd in fds.items():
        if owner == device and segment in cluster.segments_of(generation):
            _give_back(cluster, generation.number, device, segment, _fetch(child.pidfd, remote_fd))
            restored.append(segment)
    return restored


def _give_back(cluster: Cluster, generation: int, device: int, segment: str, fd: int) -> None:
    try:
        nbytes = os.fstat(fd).st_size
        cluster.client(device).adopt_handle(generation, segment, fd, nbytes, sealed=segment.startswith("weights-"))
    finally:
        os.close(fd)


def _fetch(pidfd: int, remote_fd: int) -> int:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, remote_fd, 0))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return fd
