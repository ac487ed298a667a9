"""Fetches a rank's descriptors of its memory when their anchor has died: by the kernel, or from the rank.

The kernel's way (pidfd_getfd) does not need the rank, but Docker's default seccomp profile and yama forbid it. Then the
rank is asked (rank/handover.py). Main keeps no descriptor: outside a move, only its anchor and its rank hold memory.
"""

import errno
import logging
import os

from anchortp_sglang.rank.handover import ANSWER_TIMEOUT_S, ask
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.pidfd import fetch_descriptor
from anchortp_sglang.recovery.processes.zygote import Child

log = logging.getLogger(__name__)

_FORBIDDEN = {errno.EPERM, errno.EACCES, errno.ENOSYS}


def fetch(child: Child, number: int, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
    """Duplicate the rank's descriptor ``number``: by the kernel or, where that is forbidden, by asking the rank.

    Raises OSError.
    """
    try:
        return fetch_descriptor(child.pidfd, number)
    except OSError as refused:
        if refused.errno not in _FORBIDDEN:
            raise
        try:
            return ask(child.pipe, number, timeout_s)
        except OSError as error:
            raise OSError(f"{refused.strerror}; asking the rank failed, too: {error}") from error


def log_ways(generation: Generation) -> None:
    """Find out how a rank's descriptors can be fetched here, and log it unless the kernel does it."""
    child, (number, _) = generation.ranks[0], next(iter(generation.infos[0]["fds"].values()))
    try:
        os.close(fetch_descriptor(child.pidfd, number))
    except OSError as refused:
        try:
            os.close(ask(child.pipe, number))
        except OSError as error:
            log.warning(
                "anchortp: %s, and ranks do not send descriptors (%s): if an anchor dies, its device is lost; "
                "see anchortp doctor",
                refused.strerror,
                error,
            )
        else:
            log.info(
                "anchortp: %s: when an anchor dies alone, its rank is asked for the memory; a rank that hangs cannot "
                "send it",
                refused.strerror,
            )
