"""The ingress as an ASGI application: users' requests go to the servers of the fleet, and its own routes are answered.

It knows nothing of Ray: ``members`` is filled by whoever runs it.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import aiohttp

from anchortp_sglang.fleet import moving
from anchortp_sglang.fleet.choice import key_of
from anchortp_sglang.fleet.members import Member, Members
from anchortp_sglang.fleet.moving import Request, Tally
from anchortp_sglang.http.journaled import SERVED

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[str, str]]

_PROBES = ("/health", "/health_generate", "/ready", "/ping")
_TO_ALL = ("/abort_request", "/flush_cache")
_OF_ONE = "/anchortp/"
_OF_HOP = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade", "expect", "te"}
_SESSION = ("x-session-id", "x-smg-routing-key")
"""Headers that name a session: Ray Serve's and the SGLang router's."""
_STATUS_TIMEOUT_S = 3.0


class Gateway:
    """``details`` returns what the fleet's engine knows besides, for the status: targets, nodes."""

    def __init__(
        self,
        members: Members,
        session: aiohttp.ClientSession,
        details: Callable[[], Mapping[str, Any]] = dict,
        max_body_bytes: int = 64 * 2**20,
    ) -> None:
        self._members = members
        self._session = session
        self._details = details
        self._max_body_bytes = max_body_bytes
        self.open: dict[int, Request] = {}
        self.tally = Tally()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        client = _AsgiClient(send)
        try:
            body = await self._read(receive)
        except ValueError as error:
            return await client.answer(413, {"error": {"message": str(error), "code": 413}})
        work = asyncio.ensure_future(self._answer(scope, body, client))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await work
        except asyncio.CancelledError:
            if not work.cancelled():  # we are cancelled ourselves
                raise
        finally:
            gone.cancel()
            work.cancel()

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ValueError("the client has gone away")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise ValueError(f"The request's body is longer than {self._max_body_bytes} bytes; send less")
            if not message.get("more_body"):
                return b"".join(parts)

    async def _answer(self, scope: Scope, body: bytes, client: "_AsgiClient") -> None:
        path, method = str(scope["path"]).removeprefix(scope.get("root_path", "")), scope["method"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        session = next((headers[name] for name in _SESSION if name in headers), "")
        handed_on = {name: value for name, value in headers.items() if name not in _OF_HOP}
        if path in SERVED and method == "POST":
            request = Request(path, body, handed_on, session)
            if request.is_json:
                return await self._serve(request, client)
        if path in _PROBES and method in ("GET", "HEAD"):
            up = sum(member.up for member in self._members)
            return await client.answer(200 if up else 503, {"status": "serving" if up else "down", "servers": up})
        if path == "/anchortp/status" and method in ("GET", "HEAD"):
            return await client.answer(200, await self.status(handed_on))
        if path == "/anchortp/targets" and method in ("GET", "HEAD"):
            return await client.answer(200, self.targets())
        if path.startswith(_OF_ONE):
            why = f"{path} is a route of one server: ask it, at its url in GET /anchortp/status"
            return await client.answer(404, {"error": {"message": why, "code": 404}})
        query = scope.get("query_string", b"").decode("latin-1")
        target = path + (f"?{query}" if query else "")
        if path in _TO_ALL:
            return await self._to_all(method, target, body, handed_on, client)
        await self._pass_on(method, target, body, handed_on, session, client)

    async def _serve(self, request: Request, client: "_AsgiClient") -> None:
        self.open[id(request)] = request
        try:
            await moving.serve(request, self._members, self._session, client, self.tally)
        finally:
            del self.open[id(request)]

    async def _pass_on(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], session: str, client: "_AsgiClient"
    ) -> None:
        """Hand a request to one server; to another if that one is lost before it has answered anything."""
        failed: list[str] = []
        key, until = key_of(session, body), time.monotonic() + moving.PATIENCE_S
        while time.monotonic() < until and len(failed) < moving.FATAL:
            member = self._members.pick(key, besides=failed)
            if member is None:
                await self._members.wait(moving.RETRY_S)
                continue
            try:
                return await self._hand_to(member, method, target, body, headers, client)
            except aiohttp.ClientConnectorError as error:  # it never had the request
                member.lose(f"{type(error).__name__}: {error}")
            except (aiohttp.ClientError, OSError, TimeoutError):
                failed.append(member.known.name)
                self._members.check(member)
                if client.started:
                    raise  # the connection ends without the answer's end
        why = f"{len(failed)} servers in a row were lost with it" if failed else "no server of the fleet is up"
        await client.answer(503, {"error": {"message": why, "type": "fleet_error", "code": 503}})

    async def _hand_to(
        self, member: Member, method: str, target: str, body: bytes, headers: Mapping[str, str], client: "_AsgiClient"
    ) -> None:
        with member.serving() as scope:
            async with (
                scope,
                self._session.request(method, member.known.url + target, data=body, headers=headers) as answer,
            ):
                await client.start(answer.status, moving.handed_on(list(answer.headers.items())))
                async for chunk in answer.content.iter_any():
                    await client.write(chunk, False)
                await client.write(b"", True)

    async def _to_all(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], client: "_AsgiClient"
    ) -> None:
        async def ask(member: Member, content: bytes) -> int:
            timeout = aiohttp.ClientTimeout(total=_STATUS_TIMEOUT_S)
            try:
                async with self._session.request(
                    method, member.known.url + target, data=content, headers=headers, timeout=timeout
                ) as answer:
                    return answer.status
            except (aiohttp.ClientError, OSError, TimeoutError):
                return 503

        members, contents = list(self._members), self._aborts(target, body)
        codes = await asyncio.gather(*(ask(member, content) for member in members for content in contents))
        failed = [code for code in codes if code != 200]
        if not members:
            return await client.answer(503, {"success": False, "servers": 0})
        await client.answer(failed[0] if failed else 200, {"success": not failed, "servers": len(members)})

    def _aborts(self, target: str, body: bytes) -> list[bytes]:
        """Return a body for all servers; to abort a request, one for each name that it may have after moves."""
        try:
            asked = json.loads(body) if target.startswith("/abort_request") else {}
            rid = asked.get("rid")
        except (ValueError, AttributeError):
            return [body]
        if not isinstance(rid, str) or not rid:
            return [body]
        here = [  # servers name those that came without a rid
            request.id_here[choice].decode()
            for request in self.open.values()
            for choice, first in request.ids.items()
            if first.startswith(rid.encode()) and request.id_here.get(choice, first) != first
        ]
        return [body, *(json.dumps({**asked, "rid": one}).encode() for one in [*moving.rids_of(rid), *here])]

    async def status(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the status of all servers, each as it answers itself or with the reason why it does not."""

        async def ask(member: Member) -> dict[str, Any]:
            known = member.known
            entry: dict[str, Any] = {"name": known.name, "url": known.url, "node": known.node, "up": member.up}
            entry |= {"share": known.share, "open_here": member.open}
            timeout = aiohttp.ClientTimeout(total=_STATUS_TIMEOUT_S)
            try:
                async with self._session.get(
                    f"{known.url}/anchortp/status", headers=headers, timeout=timeout
                ) as answer:
                    said = await answer.json()
                    return entry | ({"status": said} if answer.status == 200 else {"error": f"{answer.status} {said}"})
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                return entry | {"error": f"{type(error).__name__}: {error}"}

        servers = await asyncio.gather(*(ask(member) for member in self._members))
        tally = self.tally
        ingress = {
            "open": len(self.open),
            "served": tally.served,
            "failed": tally.failed,
            "moved": tally.moved,
            "longest_pause_s": round(max(tally.pauses_s, default=0.0), 3),
        }
        return {"fleet": True, "servers": servers, "ingress": ingress, **self._details()}

    def targets(self) -> list[dict[str, Any]]:
        """Return what Prometheus scrapes, as its HTTP service discovery wants it."""
        return [
            {
                "targets": [member.known.url.removeprefix("http://")],
                "labels": {"replica": member.known.name, "node": member.known.node},
            }
            for member in self._members
        ]


class _AsgiClient:
    """The client of a request, behind ASGI's ``send``."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, body: bytes, end: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": not end})

    async def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        await self.start(status, [("content-type", "application/json"), ("content-length", str(len(body)))])
        await self.write(body, True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
