"""``POST /anchortp/journaled``: a request with its journal, from which another server can go on.

The body names a route of SGLang's and has the body for it. The answer is a stream of lines, each a JSON object (Frame):
SGLang's answer in pieces, and before each piece what a server needs to go on behind it. Sent to another server with all
journal entries so far and the number of pieces that the client has, the request goes on there with the next piece.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from anchortp_sglang.http.body_limit import Receive
from anchortp_sglang.recovery.requests import journal
from anchortp_sglang.recovery.requests.journal import Entry, Journal

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH = "/anchortp/journaled"
SERVED = ("/generate", "/v1/completions", "/v1/chat/completions")
"""Routes whose answers are functions of the tokens, but for ids and times. Others make ids as they go on."""
CONTENT_TYPE = "application/x-ndjson"

_FLUSH_EVERY_S = 0.1
_INDEX = re.compile(rb'"index":(\d+)')
"""The first one in a message is the choice's: quotes inside of texts are escaped, and of tool calls it comes later."""


class Journaled(msgspec.Struct, forbid_unknown_fields=True):
    """The body. ``journal``: the entries that other servers sent, in order. ``shown``: how many pieces with a body the
    client has, by their ``index``.
    """

    path: str
    body: msgspec.Raw
    journal: list[Entry] = []
    shown: dict[str, int] = {}


class Frame(msgspec.Struct, omit_defaults=True):
    """A line of the answer, with what it has of these.

    ``status``, ``headers``: of SGLang's answer, before its first piece. ``journal``: fresh entries. ``broken``: why no
    other server could go on. ``given_up``: why this one does not, so that another should; an error follows. ``body``:
    a piece of the answer's body, for the choice ``index``; pieces are the same each time. ``end``: whether this is the
    last line.
    """

    status: int = 0
    headers: list[tuple[str, str]] = []
    journal: list[Entry] = []
    broken: str | None = None
    given_up: str | None = None
    body: str = ""
    index: str = ""
    end: bool = False


class BadRequest(ValueError):
    """A body that is no Journaled; the text is for the client."""


def parse(body: bytes) -> Journaled:
    """Read the body of a request. Raises BadRequest."""
    try:
        asked = msgspec.json.decode(body, type=Journaled)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        example = '{"path": "/generate", "body": {...}, "journal": [], "shown": {}}'
        raise BadRequest(f"the body must be like {example}: {error}") from None
    if asked.path not in SERVED:
        raise BadRequest(f"path {asked.path} is not served with a journal, only {', '.join(SERVED)}")
    return asked


async def serve(
    asked: Journaled, app: Callable[..., Awaitable[None]], scope: Scope, receive: Receive, send: Send
) -> None:
    """Have ``app`` serve what was asked for, and send its answer as frames."""
    kept = Journal(asked.journal)
    frames = _Frames(kept, asked.shown, send)
    flushing = asyncio.ensure_future(frames.flush_now_and_then())
    token = journal.current.set(kept)
    try:
        await app(_inner_scope(scope, asked), _inner_receive(bytes(asked.body), receive), frames.send)
    finally:
        journal.current.reset(token)
        flushing.cancel()


def _inner_scope(scope: Scope, asked: Journaled) -> Scope:
    path = scope.get("root_path", "") + asked.path
    length = str(len(bytes(asked.body))).encode()
    replaced = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name not in replaced]
    headers += [(b"content-length", length), (b"content-type", b"application/json")]
    return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}


def _inner_receive(body: bytes, receive: Receive) -> Receive:
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return next_message


class _Frames:
    """Sends an answer as frames, without the pieces that the client has."""

    def __init__(self, kept: Journal, shown: Mapping[str, int], send: Send) -> None:
        self._kept = kept
        self._left = dict(shown)
        self._send = send
        self._start: MutableMapping[str, Any] | None = None
        self._started = False
        self._ended = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message  # goes along with the first piece
            return None
        if message["type"] != "http.response.body":
            return None
        body, end = message.get("body", b""), not message.get("more_body", False)
        if not body and not end:
            return None
        found = _INDEX.search(body)
        index = "" if found is None else found[1].decode()
        if body and self._left.get(index, 0) > 0:
            self._left[index] -= 1
            body = b""
            if not end:
                return None
        await self._write(Frame(body=body.decode(), index=index, end=end), end)

    async def flush_now_and_then(self) -> None:
        """Send entries that no piece takes along: an answer that is not streamed comes at its end."""
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            if self._kept.fresh and not self._ended:
                await self._write(Frame())

    async def _write(self, frame: Frame, end: bool = False) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", CONTENT_TYPE.encode()), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._ended = self._ended or end
        if self._start is not None:
            frame.status = self._start["status"]
            frame.headers = [
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in self._start["headers"]
            ]
            self._start = None
        frame.journal, frame.broken, frame.given_up = self._kept.take(), self._kept.broken, self._kept.given_up
        line = msgspec.json.encode(frame) + b"\n"
        await self._send({"type": "http.response.body", "body": line, "more_body": not end})
