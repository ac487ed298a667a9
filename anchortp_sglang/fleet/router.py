"""How an ingress hears of replicas: Serve tells the request router of their deployment, in each process with a handle.

Serve sends this module by value, so it holds no state: a copy of it would not be the one that others import.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from anchortp_sglang.fleet import roster
from anchortp_sglang.fleet.members import Known


class Router(RequestRouter):
    """The request router of the servers' deployment. Calls through handles are rare, and go to any replica."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Note the replicas that Serve says are running."""
        super().update_replicas(replicas)
        roster.publish([known for replica in replicas if (known := _known_of(replica)) is not None])

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
