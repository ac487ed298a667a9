"""Checks that a server has recovered from a storm's faults."""

import time
from collections.abc import Callable, Sequence
from http.client import HTTPException

from anchortp_sglang.bench.storm.clients import Clients
from anchortp_sglang.bench.storm.faults import Struck
from anchortp_sglang.testing.process_tree import Tree, is_gone, is_stopped
from anchortp_sglang.testing.server import Server

UNANSWERED = (OSError, ValueError, HTTPException)
"""Exceptions of testing.server.Server when the server does not answer, or breaks off."""

_POLL_S = 0.05


def is_calm(tree: Tree, clients: Clients, struck_all: Sequence[Struck], moment: float) -> bool:
    """Return whether pauses and changes are over, all ranks run, and a client got a token since.

    ``moment``: the end of the blows (time.monotonic()).
    """
    if any(is_stopped(pid) for struck in struck_all if struck.blow.manner == "pause" for pid in struck.pids):
        return False
    if any(struck.under_way for struck in struck_all):
        return False
    status = tree.server.status()
    if status["state"] not in ("serving", "degraded"):
        return False
    ranks = [device["rank_pid"] for device in status["devices"] if device["rank_pid"]]
    return all(not is_gone(pid) and not is_stopped(pid) for pid in ranks) and clients.last_token_at() > moment


def is_up(server: Server) -> bool:
    """Return whether the server's status says that it serves."""
    try:
        return bool(server.status()["state"] in ("serving", "degraded"))
    except UNANSWERED:
        return False


def state_of(server: Server) -> str:
    """Describe the server's state, or why it has no answer."""
    try:
        status = server.status()
        return f"{status['state']}, generation {status['generation']}, {status['tp_size']} ranks"
    except UNANSWERED as error:
        return f"no status: {error}"


def within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    """Wait for ``condition()``; return whether it became true in time. Goes on if the server does not answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return True
        except UNANSWERED:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
