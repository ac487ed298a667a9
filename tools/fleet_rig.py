"""A fleet on several Ray nodes of this machine (``ray.cluster_utils.Cluster``), and what can happen to it.

The head node has Serve's proxy and the ingresses; each other node has room for one server.
"""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import ray
from ray import serve
from ray.cluster_utils import Cluster

from anchortp_sglang.fleet.app import build

APPLICATION = "fleet"
_STORE_BYTES = 80 * 2**20
"""Ray's object store; nothing of ours goes through it."""
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LocalFleet:
    """A cluster with ``nodes`` nodes for servers, and the application on it. ``config``: of the application."""

    def __init__(self, nodes: int, **config: Any) -> None:
        self.config = config
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "resources": {"ingress": 8},
                "object_store_memory": _STORE_BYTES,
                "include_dashboard": False,
            },
        )
        self.nodes: dict[str, Any] = {}
        for _ in range(nodes):
            self.add_node()
        ray.init(address=self.cluster.address, namespace="fleet", log_to_driver=False)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"

    def add_node(self) -> str:
        """Add a node with room for one server; return its id."""
        node = self.cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)
        self.nodes[node.node_id] = node
        return str(node.node_id)

    def deploy(self, wait: bool = True, **changes: Any) -> None:
        """Deploy the application with these changes of its config."""
        self.config |= changes
        made = build({"ingress_resources": {"ingress": 1}, "per_node": 1, **self.config})
        if wait:
            serve.run(made, name=APPLICATION, route_prefix="/")
        else:
            serve._run(made, name=APPLICATION, route_prefix="/", _blocking=False)

    def get(self, path: str) -> Any:
        with _opener.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=30) as answer:
            return json.load(answer)

    def servers(self) -> list[dict[str, Any]]:
        """Return the servers that an ingress knows and that answer."""
        try:
            found = self.get("/anchortp/status")["servers"]
        except (OSError, ValueError, urllib.error.URLError):
            return []
        return [one for one in found if one["up"] and "status" in one]

    def wait_servers(self, count: int, timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """Wait until just ``count`` servers serve, and return them. Raises TimeoutError."""
        until(lambda: len(self.servers()) == count, f"{count} servers", timeout_s)
        return self.servers()

    def lose_node(self, node: str) -> None:
        """Kill all that runs on a node, without notice."""
        self.cluster.remove_node(self.nodes.pop(node), allow_graceful=False)

    def signal_main(self, server: dict[str, Any], number: int = signal.SIGKILL) -> None:
        """Send a signal to the main process of a server."""
        os.kill(main_of(server).pid, number)

    def ingresses(self) -> list[psutil.Process]:
        """Return the processes of the ingresses."""
        title = f"ray::ServeReplica:{APPLICATION}:Ingress"
        return [one for one in psutil.process_iter(["cmdline"]) if title in " ".join(one.info["cmdline"] or ())]

    def close(self) -> None:
        """End the application and the cluster."""
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()

    def __enter__(self) -> "LocalFleet":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main_of(server: dict[str, Any]) -> psutil.Process:
    """Return a server's main process."""
    port = server["url"].rpartition(":")[2]
    for one in psutil.process_iter(["cmdline"]):
        line = one.info["cmdline"] or []
        if "anchortp_sglang.launch_server" in line and port in line:
            return one
    raise LookupError(f"no process of {server['name']}")


def until(what: Callable[[], bool], name: str, timeout_s: float) -> None:
    """Wait until something is so. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {timeout_s:g} s: {name}")
        time.sleep(0.1)
