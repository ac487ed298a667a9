"""A replica of the fleet: the actor that Ray places, restarts and asks for its health, and the server that it runs."""

from typing import Any

import ray

from anchortp_sglang.fleet.config import FleetConfig
from anchortp_sglang.fleet.server_process import ServerFailed, ServerProcess


class Replica:
    """Serve's hooks of a deployment, answered by what the server says of itself."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._server = ServerProcess(config, ray.util.get_node_ip_address())
        self._server.start()
        self._share = 1.0

    def check_health(self) -> None:
        """Raise if a restart is what helps: the server is gone, or down for good. A recovery is no reason."""
        if not self._server.alive:
            raise ServerFailed("the server of this replica has ended")
        code, _ = self._server.get("/health")
        if code != 200:
            raise ServerFailed(f"the server of this replica answers /health with {code or 'nothing'}")

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return what ingresses need, once."""
        return {"url": self._server.url, "model": self._config.model}

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what ingresses need, again and again: the part of the devices that serves."""
        code, status = self._server.get("/anchortp/status")
        if code == 200:
            self._share = round(status["tp_size"] / len(status["devices"]), 3)
        return {"share": self._share}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load, which Serve does not see: requests go from ingress to server."""
        code, status = self._server.get("/anchortp/status")
        return {"open": float(status["open_requests"]) if code == 200 else 0.0}

    def ping(self) -> str:
        """Return the server's url."""
        return self._server.url

    def __del__(self) -> None:
        """End the server as Serve takes the replica out."""
        if (server := getattr(self, "_server", None)) is not None:
            server.stop(self._config.drain_s)
