"""Serves one request by whichever server is there, and goes on with it on another when that one is lost."""

import logging
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import msgspec

from anchortp_sglang.fleet.choice import key_of
from anchortp_sglang.fleet.members import Member, Members

log = logging.getLogger(__name__)

JOURNALED = "/anchortp/journaled"
PATIENCE_S = 60.0
"""Time that a request waits for a server to be there."""
FATAL = 3
"""Servers in a row that may be lost while they have a request and answer nothing: then it is the likely cause."""
MOVED_RIDS = 4
RETRY_S = 0.2
_BUSY = (429, 503)
_OF_CONNECTION = ("content-length", "transfer-encoding", "connection", "date", "server")
_ID = re.compile(rb'"id":"([^"]*)"')


class Piece(msgspec.Struct):
    """A line of a journaled answer (``http.journaled.Frame``), with the journal's entries as they are."""

    status: int = 0
    headers: list[tuple[str, str]] = []
    journal: list[msgspec.Raw] = []
    broken: str | None = None
    given_up: str | None = None
    body: str = ""
    index: str = ""
    end: bool = False


class _Wanted(msgspec.Struct):
    rid: Any = None
    stream: bool | None = False


class Client(Protocol):
    """Where an answer goes."""

    async def start(self, status: int, headers: list[tuple[str, str]]) -> None: ...

    async def write(self, body: bytes, end: bool) -> None: ...


@dataclass
class Tally:
    """Counts of an ingress's requests. ``pauses_s``: of the last moves, from the loss to the answer's next piece."""

    served: int = 0
    moved: int = 0
    failed: int = 0
    pauses_s: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    on_moved: Callable[[float], None] = lambda pause_s: None
    on_ended: Callable[[bool], None] = lambda failed: None

    def note_moved(self, pause_s: float) -> None:
        self.moved += 1
        self.pauses_s.append(pause_s)
        self.on_moved(pause_s)

    def note_ended(self, failed: bool) -> None:
        self.served, self.failed = self.served + (not failed), self.failed + failed
        self.on_ended(failed)


class Lost(Exception):
    """The server is lost, or does not serve the request to its end."""


@dataclass
class Request:
    """A request and what its client has. ``headers``: those to hand on; ``session``: the name of its session."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    session: str = ""
    journal: list[msgspec.Raw] = field(default_factory=list)
    shown: dict[str, int] = field(default_factory=dict)
    started: bool = False
    ended: bool = False
    broken: str | None = None
    moves: int = 0
    lost_at: float | None = None
    """When its server was lost, until another one goes on with it."""
    failed: bool = False
    model: str = ""
    ids: dict[str, bytes] = field(default_factory=dict)
    """The first id that the client saw of each choice; servers make their own."""
    id_here: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_json(self) -> bool:
        try:
            self._wanted = msgspec.json.decode(self.body, type=_Wanted)
        except msgspec.DecodeError:
            return False
        return True

    @property
    def streams(self) -> bool:
        return bool(self._wanted.stream)

    def encoded(self) -> bytes:
        """Return the body for a server: the request, and the journal so far."""
        shown = msgspec.json.encode(self.shown)
        path, journal = msgspec.json.encode(self.path), msgspec.json.encode(self.journal)
        return b'{"path":%b,"body":%b,"journal":%b,"shown":%b}' % (path, self._body(), journal, shown)

    def _body(self) -> bytes:
        """Return the body; after a move with another rid, as the server may still have the request from before.

        The new one does not begin with the old one: SGLang aborts all that begin with what it is to abort.
        """
        rid = self._wanted.rid
        if not self.moves or not self._rids():
            return self.body
        moved = [rids_of(one)[self.moves % MOVED_RIDS] for one in self._rids()]
        return msgspec.json.encode(
            {**msgspec.json.decode(self.body), "rid": moved if isinstance(rid, list) else moved[0]}
        )

    def _rids(self) -> list[str]:
        rid = self._wanted.rid
        return [one for one in (rid if isinstance(rid, list) else [rid]) if isinstance(one, str) and one]

    def take(self, piece: Piece) -> bytes:
        """Note a piece; return the bytes for the client."""
        self.journal += piece.journal
        self.broken = piece.broken
        if not piece.body:
            return b""
        self.shown[piece.index] = self.shown.get(piece.index, 0) + 1
        body = piece.body.encode()
        for rid in self._rids() if self.moves else ():
            body = body.replace(rids_of(rid)[self.moves % MOVED_RIDS].encode(), rid.encode())
        if piece.index in self.ids and not self.moves:
            return body
        found = _ID.search(body)
        if found is None:
            return body
        self.id_here[piece.index] = found[1]
        first = self.ids.setdefault(piece.index, found[1])
        return body if first == found[1] else body[: found.start(1)] + first + body[found.end(1) :]


def rids_of(rid: str) -> list[str]:
    """Return the rids that a request of this rid may have after moves."""
    return [f"moved-{number}-{rid}" for number in range(MOVED_RIDS)]


async def serve(
    request: Request, members: Members, session: aiohttp.ClientSession, client: Client, tally: Tally
) -> None:
    """Serve a request until its client has the whole answer, or an error that says why not."""
    await _serve(request, members, session, client, tally)
    tally.note_ended(request.failed)


async def _serve(
    request: Request, members: Members, session: aiohttp.ClientSession, client: Client, tally: Tally
) -> None:
    failed: list[str] = []
    fatal, key, waits_until = 0, key_of(request.session, request.body), time.monotonic() + PATIENCE_S
    refusal: Piece | None = None
    while True:
        member = members.pick(key, request.model, failed)
        if member is None or (refusal is not None and member.known.name in failed):
            if refusal is not None and not request.started:
                return await _refuse(client, refusal)
            if time.monotonic() > waits_until:
                return await _end(request, client, 503, "no server of the fleet has come up in time")
            failed.clear()
            await members.wait(RETRY_S)
            continue
        entries = len(request.journal)
        try:
            refusal = await _ask(request, member, session, client, tally)
            if refusal is None:
                return
        except aiohttp.ClientConnectorError as error:  # it never had the request
            refusal = None
            member.lose(f"{type(error).__name__}: {error}")
        except (Lost, TimeoutError, aiohttp.ClientError, OSError) as error:
            refusal = None
            fatal = 0 if len(request.journal) > entries else fatal + (0 if isinstance(error, Lost) else 1)
            members.check(member)
            if request.broken is not None and request.started:
                return await _end(request, client, 503, f"its server is lost, and {request.broken}")
            if fatal >= FATAL:
                return await _end(request, client, 500, f"{fatal} servers in a row were lost with this request")
            log.warning("anchortp fleet: a request of %s goes on elsewhere: %s", member.known.name, error)
            request.lost_at = request.lost_at or time.monotonic()
            waits_until = time.monotonic() + PATIENCE_S
        if request.broken is not None:
            request.journal.clear()  # nothing was shown: it begins anew
        request.moves += 1
        failed.append(member.known.name)


async def _ask(
    request: Request, member: Member, session: aiohttp.ClientSession, client: Client, tally: Tally
) -> Piece | None:
    """Have a server go on with the request; return its refusal if it has no room. Raises Lost, and aiohttp's errors."""
    with member.serving() as scope:
        async with (
            scope,
            session.post(member.known.url + JOURNALED, data=request.encoded(), headers=request.headers) as answer,
        ):
            if answer.status != 200:
                return await _passed_on(request, answer, client)
            async for piece in _pieces(answer.content):
                if piece.given_up is not None:
                    raise Lost(piece.given_up)
                if piece.status:
                    if piece.status in _BUSY:
                        return await _whole(piece, answer.content)
                    if not request.started:
                        request.started, request.model = True, member.known.model
                        await client.start(piece.status, handed_on(piece.headers))
                    elif piece.status != 200:
                        refusal = await _whole(piece, answer.content)
                        await _end(request, client, piece.status, f"the next server refuses it: {refusal.body}")
                        return None
                if request.lost_at is not None and (piece.body or piece.journal):
                    tally.note_moved(time.monotonic() - request.lost_at)
                    request.lost_at = None
                body = request.take(piece)
                if body or piece.end:
                    request.ended = piece.end
                    await client.write(body, piece.end)
                if piece.end:
                    return None
            raise Lost("the answer ended before its end")


async def _passed_on(request: Request, answer: aiohttp.ClientResponse, client: Client) -> Piece | None:
    """Handle an answer that is no journal: from what stands before our route, such as a check of keys."""
    body = (await answer.read()).decode(errors="replace")
    refusal = Piece(status=answer.status, headers=[("content-type", answer.content_type)], body=body)
    if answer.status in _BUSY:
        return refusal
    await (_end(request, client, answer.status, body) if request.started else _refuse(client, refusal))
    return None


async def _whole(first: Piece, content: aiohttp.StreamReader) -> Piece:
    if not first.end:
        async for piece in _pieces(content):
            first.body += piece.body
    return first


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer; lines may be longer than aiohttp's ``readline`` takes."""
    pending = b""
    async for chunk in content.iter_any():
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=Piece)


async def _refuse(client: Client, refusal: Piece) -> None:
    await client.start(refusal.status, handed_on(refusal.headers))
    await client.write(refusal.body.encode(), True)


def handed_on(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers without those of one connection; ids and times of another server have other lengths."""
    return [(name, value) for name, value in headers if name.lower() not in _OF_CONNECTION]


async def _end(request: Request, client: Client, status: int, why: str) -> None:
    """End a request with an error: as an answer, or as the last event of a stream."""
    request.failed = True
    error = {"error": {"message": why, "type": "fleet_error", "code": status}}
    if not request.started:
        return await _refuse(client, Piece(status, [("content-type", "application/json")], body=_json(error)))
    await client.write(f"data: {_json(error)}\n\n".encode() if request.streams else b"", True)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
