"""The routes under /anchortp: status, timeline, injection."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import HTTPException

from anchortp_sglang.http.body_limit import Receive, limited
from anchortp_sglang.http.status import status
from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.inject import InjectionError, inject
from anchortp_sglang.views.timeline_page import main_part, page

_READ = ("GET", "HEAD")
_MAX_BODY_BYTES = 4096
_JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    """One HTTP response. ``headers``: those besides content-type and content-length."""

    code: int
    body: bytes
    content_type: str = _JSON
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, code: int, content: Mapping[str, Any], **headers: str) -> "Answer":
        return cls(code, json.dumps(content).encode(), headers=headers)


class _Injection(msgspec.Struct):
    device: int
    kind: str


class OwnRoutes:
    """The handlers of /anchortp/…. HEAD is answered like GET; a trailing slash is ignored."""

    def __init__(self, coordinator: Coordinator, allow_injection: bool) -> None:
        self._coordinator = coordinator
        self._allow_injection = allow_injection
        self._routes: dict[str, tuple[tuple[str, ...], Callable[[Any, Receive], Awaitable[Answer]]]] = {
            "/anchortp/status": (_READ, self._status),
            "/anchortp/timeline": (_READ, self._timeline),
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

    async def _inject(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        if not self._allow_injection:
            return _not_injected(403, "injection is off: start the server with --anchor-allow-injection")
        # Browsers do not send JSON across origins without asking (CORS), so no foreign page can inject faults.
        if _content_type(scope) != _JSON:
            return _not_injected(415, f"the Content-Type must be {_JSON}")
        try:
            body = await _read(limited(scope, receive, _MAX_BODY_BYTES, "send device and kind only"))
            fault = msgspec.json.decode(body, type=_Injection)
        except HTTPException as error:
            return _not_injected(error.status_code, error.detail)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            return _not_injected(400, f'the body must be like {{"device": 0, "kind": "process"}}: {error}')
        try:
            detail = await inject(self._coordinator, fault.device, fault.kind)
        except InjectionError as error:
            return _not_injected(409, str(error))
        return Answer.of(200, {"ok": True, "verified": True, "detail": detail})


def _not_injected(code: int, detail: str) -> Answer:
    return Answer.of(code, {"ok": False, "verified": False, "detail": detail})


def _content_type(scope: Mapping[str, Any]) -> str:
    given = str(dict(scope["headers"]).get(b"content-type", b""), "latin-1")
    return given.partition(";")[0].strip().lower()


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body
