"""The routes under /anchortp: status, timeline, change of devices, injection."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec
from fastapi import HTTPException

from anchortp_sglang.http import journaled
from anchortp_sglang.http.body_limit import Receive, limited
from anchortp_sglang.http.status import status
from anchortp_sglang.recovery.change_plans import ChangeRefused, Wish
from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.inject import InjectionError, inject
from anchortp_sglang.views.timeline_page import main_part, page

_READ = ("GET", "HEAD")
_MAX_BODY_BYTES = 4096
JSON = "application/json"
_CHANGES = '{"drain": [2]}, {"rejoin": [2]} or {"devices": [0, 1, 3], "widths": [2, 1, 1]}'

_Body = TypeVar("_Body")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Answer:
    """One HTTP response. ``headers``: those besides content-type and content-length."""

    code: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, code: int, content: Mapping[str, Any], **headers: str) -> "Answer":
        return cls(code, json.dumps(content).encode(), headers=headers)


class _Injection(msgspec.Struct):
    device: int
    kind: str


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    """Devices that are to serve, to leave or to join: one of the three. Or, for those that serve, other shares."""

    devices: list[int] | None = None
    drain: list[int] | None = None
    rejoin: list[int] | None = None
    widths: list[int] | None = None
    rebalance: Literal["speed", "memory"] | None = None
    generation: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        given = [each for each in (self.devices, self.drain, self.rejoin) if each is not None]
        if len(given) > 1 or not (given[0] if given else self.widths or self.rebalance):
            raise ValueError("give one of devices, drain and rejoin, a list of device ids, or widths, or rebalance")
        if self.rebalance and (given or self.widths is not None):
            raise ValueError("rebalance finds the widths of the devices that serve: give it alone")

    def wish(self) -> Wish:
        devices = None if self.devices is None else frozenset(self.devices)
        widths = None if self.widths is None else tuple(self.widths)
        return Wish(devices, frozenset(self.drain or ()), frozenset(self.rejoin or ()), widths, self.rebalance)


class OwnRoutes:
    """The handlers of /anchortp/…. HEAD is answered like GET; a trailing slash is ignored."""

    def __init__(self, coordinator: Coordinator, allow_injection: bool) -> None:
        self._coordinator = coordinator
        self._allow_injection = allow_injection
        self._routes: dict[str, tuple[tuple[str, ...], Callable[[Any, Receive], Awaitable[Answer]]]] = {
            "/anchortp/status": (_READ, self._status),
            "/anchortp/timeline": (_READ, self._timeline),
            "/anchortp/reconfigure": (("POST",), self._reconfigure),
            "/anchortp/inject": (("POST",), self._inject),
        }

    async def answer(self, path: str, scope: Mapping[str, Any], receive: Receive) -> Answer | None:
        """Return the answer, or None if ``path`` is not ours."""
        methods, route = self._routes.get(path.rstrip("/"), ((), None))
        if route is None:
            return None
        if scope["method"] not in methods:
            return Answer.of(405, {"detail": f"{path} takes {' or '.join(methods)}"}, allow=", ".join(methods))
        return await route(scope, receive)

    async def _status(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        return Answer.of(200, status(self._coordinator))

    async def _timeline(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        render = main_part if scope["query_string"] == b"part=main" else page
        return Answer(200, render(status(self._coordinator)).encode(), "text/html; charset=utf-8")

    async def _reconfigure(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        change = await _decoded(scope, receive, _Change, _CHANGES)
        if isinstance(change, Answer):
            return change
        make = self._coordinator.reconfiguration.change(change.wish(), change.generation, change.dry_run)
        try:
            return Answer.of(200, {"ok": True, **await _unless_gone(make, receive)})
        except ChangeRefused as error:
            return _refused(error.code, str(error))

    async def _inject(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        if not self._allow_injection:
            return _refused(403, "injection is off: start the server with --anchor-allow-injection")
        fault = await _decoded(scope, receive, _Injection, '{"device": 0, "kind": "process"}')
        if isinstance(fault, Answer):
            return fault
        try:
            detail = await inject(self._coordinator, fault.device, fault.kind)
        except InjectionError as error:
            return _refused(409, str(error))
        return Answer.of(200, {"ok": True, "verified": True, "detail": detail})


def guard(app: Any) -> None:
    """Have SGLang guard POST to our routes on its FastAPI app as it guards its own admin routes (``--admin-api-key``).

    SGLang looks for the level at a path's handler. Our middleware answers first; what comes here is no route of ours.
    """
    from sglang.srt.utils.auth import AuthLevel, auth_level

    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def guarded() -> None:
        raise HTTPException(404)

    async def unguarded() -> None:
        raise HTTPException(404)

    # Requests with a journal are requests of users, who have no admin key.
    app.add_api_route(journaled.PATH, unguarded, methods=["POST"], include_in_schema=False)
    path = "/anchortp/{route:path}"
    app.add_api_route(path, guarded, methods=["POST"], include_in_schema=False)
    app.add_api_route(path, unguarded, methods=["GET", "HEAD", "PUT", "PATCH", "DELETE"], include_in_schema=False)


def _refused(code: int, detail: str) -> Answer:
    return Answer.of(code, {"ok": False, "verified": False, "detail": detail})


async def _decoded(scope: Mapping[str, Any], receive: Receive, kind: type[_Body], example: str) -> _Body | Answer:
    """Read a small JSON body of a type; return the answer to one that is none."""
    # Browsers do not send JSON across origins without asking (CORS), so no foreign page can do harm here.
    if content_type(scope) != JSON:
        return _refused(415, f"the Content-Type must be {JSON}")
    try:
        body = await read(limited(scope, receive, _MAX_BODY_BYTES, f"send no more than {example}"))
        return msgspec.json.decode(body, type=kind)
    except HTTPException as error:
        return _refused(error.status_code, error.detail)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return _refused(400, f"the body must be like {example}: {error}")


async def _unless_gone(work: Coroutine[Any, Any, _Result], receive: Receive) -> _Result:
    """Do what a client waits for; cancel it if the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    except asyncio.CancelledError:
        raise ChangeRefused(499, "the client has gone away") from None
    finally:
        gone.cancel()
        task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def content_type(scope: Mapping[str, Any]) -> str:
    """Return the type of a body, without parameters; an empty text if the request names none."""
    given = str(dict(scope["headers"]).get(b"content-type", b""), "latin-1")
    return given.partition(";")[0].strip().lower()


async def read(receive: Receive) -> bytes:
    """Read a request's body to its end."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body
