"""Tells an ingress which replicas there are, as Serve tells each request router of their deployment."""

import threading
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from anchortp_sglang.fleet.members import Known

Listener = Callable[[list[Known]], None]

_lock = threading.Lock()
_known: list[Known] = []
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Have ``listener`` called with all replicas, now and whenever they change, on Serve's thread."""
    with _lock:
        _listeners.append(listener)
        known = list(_known)
    listener(known)


class Roster(RequestRouter):
    """The request router of the servers' deployment. Calls through handles are rare, and go to any replica."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Note the replicas that Serve says are running."""
        super().update_replicas(replicas)
        known = [one for replica in replicas if (one := _known_of(replica)) is not None]
        with _lock:
            _known[:] = known
            listeners = list(_listeners)
        for listener in listeners:
            listener(known)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas, as of one rank."""
        return [list(candidate_replicas)]


def _known_of(replica: RunningReplica) -> Known | None:
    about: dict[str, Any] = replica.replica_metadata or {}
    stats: dict[str, Any] = replica.routing_stats or {}
    if "url" not in about:
        return None
    name = replica.replica_id.unique_id
    return Known(name, about["url"], replica.node_id or "", about.get("model", ""), float(stats.get("share", 1.0)))
