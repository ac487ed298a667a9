"""Our routes and answers on SGLang's HTTP server, as one ASGI middleware."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from anchortp_sglang.admission.checks import check_route
from anchortp_sglang.http import journaled, probes
from anchortp_sglang.http.body_limit import Receive, limited
from anchortp_sglang.http.metrics import Metrics, scrape
from anchortp_sglang.http.own_routes import JSON, Answer, OwnRoutes, content_type, read
from anchortp_sglang.http.status import state_name, status
from anchortp_sglang.recovery.coordinator import Coordinator

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_READ = ("GET", "HEAD")
_KNOWN_WITHOUT_RANKS = ("", "/model_info", "/get_model_info", "/v1/models", "/metrics")
"""Routes whose GET main answers by itself while the server is down. Every other route answers 503 then."""

_PAUSES = ("/pause_generation", "/continue_generation")
"""Routes that tell main what new ranks are to do, should the server come up again."""

_TRY_AGAIN_LATER = 1013  # RFC 6455's registry of close codes


class AnchorMiddleware:
    """Middleware that answers /anchortp/… and probes, refuses unsupported routes, and limits bodies.

    All else goes to SGLang. ``tokenizer_manager`` returns SGLang's TokenizerManager, made after the middleware.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        coordinator: Coordinator,
        tokenizer_manager: Callable[[], Any],
        on_startup: Callable[[], None],
        allow_injection: bool,
        max_body_bytes: int,
        allow_journals: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self._app = app
        self._coordinator = coordinator
        self._tokenizer_manager = tokenizer_manager
        self._on_startup = on_startup
        self._own = OwnRoutes(coordinator, allow_injection)
        self._max_body_bytes = max_body_bytes
        self._allow_journals = allow_journals
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._notice_startup(send))
        elif scope["type"] == "websocket" and self._refusal is not None:
            await _refuse_websocket(scope, self._refusal, send)
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _path(scope).rstrip("/") == journaled.PATH:
            await self._serve_journaled(scope, receive, send)
        elif (answer := await self._answer(scope, receive)) is not None:
            await _send(answer, send)
        elif _path(scope).startswith("/metrics"):
            await scrape(lambda: self._app(scope, receive, send))
        else:
            if scope["method"] == "HEAD" and _path(scope) in probes.PROBES:
                scope = {**scope, "method": "GET"}  # SGLang has no HEAD here; the HTTP server drops the body
            way_out = "send less, or raise --anchor-max-body-mib"
            await self._app(scope, limited(scope, receive, self._max_body_bytes, way_out), send)

    async def _serve_journaled(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            return await _send(Answer.of(405, {"detail": f"{journaled.PATH} takes POST"}, allow="POST"), send)
        if not self._allow_journals:
            return await _send(_error(403, "journals are off: start the server with --anchor-allow-journals"), send)
        if content_type(scope) != JSON:  # what a foreign page may send unasked
            return await _send(_error(415, f"the Content-Type must be {JSON}"), send)
        try:
            body = await read(limited(scope, receive, 2 * self._max_body_bytes, "raise --anchor-max-body-mib"))
            asked = journaled.parse(body)
        except HTTPException as error:
            return await _send(_error(error.status_code, error.detail), send)
        except journaled.BadRequest as error:
            return await _send(_error(400, str(error)), send)
        await journaled.serve(asked, self, scope, receive, send)

    def _notice_startup(self, send: Send) -> Send:
        async def forward(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._on_startup()  # on TokenizerManager's loop, to see deaths before the first request
            await send(message)

        return forward

    @property
    def _refusal(self) -> str | None:
        """Why the server is down, or None."""
        inflight = self._coordinator.inflight
        return None if inflight is None else inflight.refusal

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """Return our answer, or None if the request goes to SGLang."""
        path, reads = _path(scope), scope["method"] in _READ
        own = await self._own.answer(path, scope, receive)
        if own is not None:
            return own
        if self._refusal is not None and not (reads and _is_known_without_ranks(path)) and path not in _PAUSES:
            return _error(503, self._refusal)
        if path in probes.PROBES and reads:
            return self._probe(path)
        if path.startswith("/metrics") and self._metrics is not None:  # SGLang's route matches any suffix
            self._metrics.refresh(status(self._coordinator), self._coordinator.recoveries.totals())
        refusal = check_route(scope["path"], scope.get("root_path", ""))
        return None if refusal is None else _error(400, refusal)

    def _probe(self, path: str) -> Answer | None:
        from sglang.srt.managers.tokenizer_manager import ServerStatus

        manager = self._tokenizer_manager()
        tokenizer = probes.Tokenizer(
            starting=manager.server_status == ServerStatus.Starting,
            leaving=manager.gracefully_exit,
        )
        code = probes.answer(path, self._coordinator.state.phase, tokenizer)
        return None if code is None else Answer.of(code, {"status": state_name(self._coordinator)})


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _is_known_without_ranks(path: str) -> bool:
    bare = path.rstrip("/")
    return bare in _KNOWN_WITHOUT_RANKS or bare.startswith("/v1/models/")


def _error(code: int, message: str) -> Answer:
    """Make an error answer. OpenAI's clients read ``error.message``; Anthropic's also need the outer ``type``."""
    kind = "overloaded_error" if code == 503 else "invalid_request_error"
    return Answer.of(code, {"type": "error", "error": {"type": kind, "message": message, "code": code}})


async def _refuse_websocket(scope: Scope, reason: str, send: Send) -> None:
    """Answer 503 to the handshake, if the HTTP server can, or else close: it answers 403 then."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await _send(_error(503, reason), send, kind="websocket.http")
    else:
        await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": reason})


async def _send(answer: Answer, send: Send, kind: str = "http") -> None:
    headers = {"content-type": answer.content_type, "content-length": str(len(answer.body)), **answer.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": f"{kind}.response.start", "status": answer.code, "headers": encoded})
    await send({"type": f"{kind}.response.body", "body": answer.body})
