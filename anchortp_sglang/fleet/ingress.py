"""The ingress as Serve runs it: the gateway, with the servers that Serve knows."""

import asyncio
import logging
import time
from typing import Any

import aiohttp
from ray import serve
from ray.util import metrics

from anchortp_sglang.fleet import roster
from anchortp_sglang.fleet.gateway import Gateway, Receive, Scope, Send
from anchortp_sglang.fleet.members import Known, Members

log = logging.getLogger(__name__)

SERVERS = "Server"
"""The deployment of the servers; Serve's commands show it by this name."""
_CONNECT_TIMEOUT_S = 2.0
_KEEP_ALIVE_S = 3.0
"""Below the time after which SGLang's HTTP server closes an idle connection, which would look like a lost server."""
_DETAILS_EVERY_S = 2.0
_PAUSES_S = [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]


class Ingress:
    """An ASGI application. What needs the event loop is made on it, with the first message."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._making: asyncio.Task[Gateway] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._details: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._making is None:
            self._making = asyncio.ensure_future(self._make())
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        await (await asyncio.shield(self._making))(scope, receive, send)

    async def _make(self) -> Gateway:
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=timeout,
            auto_decompress=False,
        )
        members = Members(session)

        def take(known: list[Known]) -> None:
            loop.call_soon_threadsafe(members.update, known)

        roster.listen(take)
        application = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle(SERVERS, application)
        for work in (_subscribe(handle), members.watch(), self._look(application)):
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        gateway = Gateway(members, session, lambda: self._details, self._max_body_bytes)
        _export(gateway)
        return gateway

    async def _look(self, application: str) -> None:
        """Keep what Serve says of the application, for the status."""
        while True:
            try:
                self._details = await asyncio.to_thread(_details, application)
            except Exception as error:  # Serve's controller may be restarting
                self._details = {"serve": {"error": f"{type(error).__name__}: {error}"}}
            await asyncio.sleep(_DETAILS_EVERY_S)


def _export(gateway: Gateway) -> None:
    """Count what the gateway does in Ray's metrics, of which each ingress has its own series."""
    moves = metrics.Histogram(
        "anchortp_fleet_move_seconds", "Pauses of requests that moved to another server", boundaries=_PAUSES_S
    )
    ended = metrics.Counter("anchortp_fleet_requests", "Requests that have ended, by outcome", tag_keys=("outcome",))
    gateway.tally.on_moved = moves.observe
    gateway.tally.on_ended = lambda failed: ended.inc(tags={"outcome": "failed" if failed else "served"})


def _details(application: str) -> dict[str, Any]:
    status = serve.status().applications[application]
    deployments = {
        name: {"status": str(one.status.value), "replicas": dict(one.replica_states), "message": one.message}
        for name, one in status.deployments.items()
    }
    return {"serve": {"status": str(status.status.value), "deployments": deployments}, "at": time.time()}


async def _subscribe(handle: Any) -> None:
    """Make the handle's router, which a first call does; the roster then hears of every change."""
    try:
        await handle.ping.remote()
    except Exception as error:  # a server that is lost meanwhile is no reason to end
        log.info("anchortp fleet: the first call of a server: %s", error)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
