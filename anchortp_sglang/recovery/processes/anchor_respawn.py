"""Replaces a dead anchor on a healthy device: the device's rank still holds its memory, a new anchor takes it back."""

import contextlib
import os
import signal

from anchortp_sglang.rank.attachment import HOST_DEVICE
from anchortp_sglang.recovery.processes.anchors import ANCHOR_TIMEOUT_S, Anchors
from anchortp_sglang.recovery.processes.descriptors import fetch
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import died_within


def restore_anchor(anchors: Anchors, generation: Generation, device: int) -> list[str]:
    """Start the anchor of ``device`` anew and hand it its segments; return their names.

    Where the kernel allows fetching its descriptors, the rank need not cooperate. Raises OSError, AnchorError, and ends
    the new anchor then. It joins ``anchors`` only once it has everything, as an empty one must not replace the old one.
    """
    anchor = anchors.launch(device, generation.number)
    try:
        restored = _hand_over(anchors, generation, device)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(anchor.pidfd, signal.SIGKILL)
        died_within(anchor.pidfd, ANCHOR_TIMEOUT_S)
        os.close(anchor.pidfd)
        raise
    anchors.replace(device, anchor)
    return restored


def _hand_over(anchors: Anchors, generation: Generation, device: int) -> list[str]:
    rank = 0 if device == HOST_DEVICE else generation.ownership.devices.index(device)
    child, fds = generation.ranks[rank], generation.infos[rank]["fds"]
    wanted = anchors.segments_of(generation.number, generation.weights)[device]
    restored = []
    for (owner, segment), (remote_fd, nbytes) in fds.items():
        if owner == device and segment in wanted:
            _give_back(anchors, generation.number, device, segment, fetch(child, remote_fd), nbytes)
            restored.append(segment)
    return restored


def _give_back(anchors: Anchors, generation: int, device: int, segment: str, fd: int, nbytes: int) -> None:
    # Where a descriptor does not carry its seal, the message does: weights of a serving generation are complete.
    sealed = not anchors.plan.arena(device).seal_travels and segment.startswith("weights-")
    try:
        anchors.client(device).adopt_handle(generation, segment, fd, nbytes, sealed)
    finally:
        os.close(fd)
