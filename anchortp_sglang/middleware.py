"""Our routes and answers on SGLang's HTTP server, as one ASGI middleware."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from anchortp_sglang.recovery.coordinator import Coordinator
from anchortp_sglang.recovery.inject import InjectionError, inject
from anchortp_sglang.recovery.machine import Phase
from anchortp_sglang.recovery.metrics import Metrics
from anchortp_sglang.recovery.status import status
from anchortp_sglang.refusals import check_route
from anchortp_sglang.timeline_page import main_part, page

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_HEALTH = ("/health", "/health_generate")
_GENERATE = ("/generate", "/v1/completions", "/v1/chat/completions")
_MAX_BODY_BYTES = 4096


class AnchorMiddleware:
    """Answers /anchortp/…; /health in and after a recovery; refuses generation when the server is down.

    SGLang's own /health generates a token (20 s timeout) and would mark a recovering server unhealthy.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        coordinator: Coordinator,
        on_startup: Callable[[], None],
        allow_injection: bool,
        metrics: Metrics | None = None,
    ) -> None:
        self._app = app
        self._coordinator = coordinator
        self._on_startup = on_startup
        self._allow_injection = allow_injection
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._notice_startup(send))
        elif scope["type"] != "http" or not await self._answered(scope, receive, send):
            await self._app(scope, receive, send)

    def _notice_startup(self, send: Send) -> Send:
        async def forward(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._on_startup()  # TokenizerManager's loop, so that deaths are seen before the first request
            await send(message)

        return forward

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> bool:
        path, phase = scope["path"], self._coordinator.state.phase
        if path.startswith("/metrics") and self._metrics is not None:  # SGLang's route takes what follows as well
            self._metrics.refresh(status(self._coordinator), self._coordinator.recoveries.totals())
        if path in _HEALTH and phase not in (Phase.SERVING, Phase.STOPPED):
            down = phase is Phase.DOWN
            await _respond(send, 503 if down else 200, {"status": "down" if down else "recovering"})
        elif path in _GENERATE and phase is Phase.DOWN and self._coordinator.ledger is not None:
            await _respond(send, 503, {"error": {"message": self._coordinator.ledger.refusal, "code": 503}})
        elif (refusal := check_route(path, scope.get("root_path", ""))) is not None:
            await _respond(send, 400, {"error": {"message": refusal, "code": 400}})
        elif path == "/anchortp/status" and scope["method"] == "GET":
            await _respond(send, 200, status(self._coordinator))
        elif path == "/anchortp/timeline" and scope["method"] == "GET":
            now = status(self._coordinator)
            wanted = main_part if scope["query_string"] == b"part=main" else page
            await _send_body(send, 200, wanted(now).encode(), b"text/html; charset=utf-8")
        elif path == "/anchortp/inject" and scope["method"] == "POST":
            code, answer = await self._inject(receive)
            await _respond(send, code, answer)
        else:
            return False
        return True

    async def _inject(self, receive: Receive) -> tuple[int, dict[str, Any]]:
        if not self._allow_injection:
            return 403, {
                "ok": False,
                "verified": False,
                "detail": "start the server with --anchor-allow-injection",
            }
        try:
            body = json.loads(await _body(receive))
            device, kind = int(body["device"]), body["kind"]
        except (ValueError, KeyError, TypeError) as error:
            return 400, {
                "ok": False,
                "verified": False,
                "detail": f'want {{"device": 0, "kind": …}}: {error}',
            }
        try:
            detail = await inject(self._coordinator, device, kind)
        except InjectionError as error:
            return 409, {"ok": False, "verified": False, "detail": str(error)}
        return 200, {"ok": True, "verified": True, "detail": detail}


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            raise ValueError("the body is too large")
        if not message.get("more_body"):
            return body


async def _respond(send: Send, code: int, answer: dict[str, Any]) -> None:
    await _send_body(send, code, json.dumps(answer).encode(), b"application/json")


async def _send_body(send: Send, code: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
