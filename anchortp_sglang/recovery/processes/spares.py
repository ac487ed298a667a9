"""Spare ranks: children forked ahead of the next fault, warmed up and joined in a process group.

A generation as wide as the serving one can use them as they are. For another width they leave their group and join the
others in a new one.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist

from anchortp_sglang.rank.spare import ARE_YOU_THERE, STORE_HOST, SpareSpec, stand_by
from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.stops import resume
from anchortp_sglang.recovery.processes.zygote import Child

_ANSWER_TIMEOUT_S = 1.0


def make_store() -> dist.TCPStore:
    """Make a generation's rendezvous, served by main, so that no rank has to listen first.

    On loopback only: a store that makes its own socket listens on all interfaces, and no store authenticates clients.
    Raises OSError.
    """
    with socket.create_server((STORE_HOST, 0), backlog=socket.SOMAXCONN) as listener:
        port = listener.getsockname()[1]
        fd = listener.detach()  # the store closes it
    try:
        return dist.TCPStore(STORE_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    except RuntimeError as error:  # DistStoreError: no descriptors, no threads
        raise OSError(f"the store in which ranks meet could not be made: {error}") from error


class Spares:
    """Main's end of spare ranks. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._store: dist.TCPStore | None = None

    def prepare(self, fork: Callable[[], Child], world_size: int, joining: bool, timeout_s: float | None) -> None:
        """Fork spares for ``world_size`` ranks, unless they are there. Without ``joining`` they form no group."""
        with self._lock:
            if len(self._children) == world_size and not any(is_dead(child.pidfd) for child in self._children):
                return
            end(self._children)
            self._children = []
            self._store = make_store() if joining else None
            for rank in range(world_size):
                child = fork()
                self._children.append(child)
                spec = self._store and SpareSpec(rank, world_size, self._store.port, timeout_s)
                child.start(stand_by, spec)

    def take(self, world_size: int) -> tuple[list[Child], dist.TCPStore]:
        """Take at most ``world_size`` spares in rank order, and the store of the generation that they will be part of.

        If one has died or does not answer, the group it joined is of no use, and the others join anew.
        """
        with self._lock:
            children, self._children = self._children, []
            store, self._store = self._store, None
        ready = answering([child for child in children if _stands_by(child)])
        if store is None or not len(ready) == len(children) == world_size:
            store = make_store()
        end(child for child in children if child not in ready[:world_size])
        return ready[:world_size], store

    def resume(self) -> int:
        """Resume stopped spares (SIGSTOP) and count them; 0 while spares are being forked or taken."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            return sum(resume(child.pid, child.pidfd) for child in self._children)
        finally:
            self._lock.release()


def end(children: Iterable[Child]) -> None:
    """Kill children and close their descriptors."""
    for child in children:
        child.kill()
        child.close()


def _stands_by(child: Child) -> bool:
    """Return whether a child lives and reported that it is ready; the report alone may outlive it."""
    try:
        return child.pipe.poll() and child.pipe.recv() is None and not is_dead(child.pidfd)
    except (EOFError, OSError):
        return False


def answering(children: Sequence[Child]) -> list[Child]:
    """Return the children that answer at once (``await_order``): the others are stopped or stuck."""
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    reached = [child for child in children if _sent(child, ARE_YOU_THERE)]
    return [child for child in reached if _answers(child, deadline - time.monotonic())]


def _sent(child: Child, message: str) -> bool:
    try:
        child.pipe.send(message)
        return True
    except OSError:
        return False


def _answers(child: Child, timeout_s: float) -> bool:
    try:
        return child.pipe.poll(max(0.0, timeout_s)) and child.pipe.recv() is None
    except (EOFError, OSError):
        return False
