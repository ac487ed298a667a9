"""The servers that an ingress knows: who is there, who answers, who has how much to do."""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

from anchortp_sglang.fleet.choice import Candidate, choose

log = logging.getLogger(__name__)

PROBE_EVERY_S = 0.5
PROBE_TIMEOUT_S = 1.0
MISSED_PROBES = 3
"""Probes in a row without an answer after which a server is lost. One that refuses connections is lost at once."""


@dataclass(frozen=True)
class Known:
    """A server as Serve knows it. ``model``: what it serves; a stream goes on only where it is the same."""

    name: str
    url: str
    node: str = ""
    model: str = ""
    share: float = 1.0


@dataclass
class Member:
    """A server and what this ingress has found out about it. ``open``: this ingress's requests that it has."""

    known: Known
    open: int = 0
    up: bool = True
    missed: int = 0
    scopes: set[asyncio.Timeout] = field(default_factory=set)

    @contextmanager
    def serving(self) -> Iterator[asyncio.Timeout]:
        """Hold a request that the server has; when it is lost, a TimeoutError is raised within ``async with`` of it."""
        scope = asyncio.timeout(None)
        self.scopes.add(scope)
        self.open += 1
        try:
            yield scope
        finally:
            self.open -= 1
            self.scopes.discard(scope)

    def lose(self, why: str) -> None:
        """Take it that the server is gone: its requests go on elsewhere, new ones wait until it answers a probe."""
        if self.up:
            log.warning("anchortp fleet: %s (%s) is lost: %s", self.known.name, self.known.url, why)
        self.up = False
        now = asyncio.get_running_loop().time()
        for scope in self.scopes:
            if not scope.expired() and scope.when() is None:
                scope.reschedule(now)


class Members:
    """All servers. ``update`` takes Serve's word on who is there; probes say who answers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._members: dict[str, Member] = {}
        self._leaving: list[Member] = []
        """Those that Serve has taken out, until they have no request of ours any more."""
        self._changed = asyncio.Event()
        self._checks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def update(self, known: Iterable[Known]) -> None:
        """Take the servers that Serve knows. One that it takes out gets nothing new, and ends what it has."""
        found = {one.name: one for one in known}
        self._leaving += [self._members.pop(name) for name in self._members.keys() - found.keys()]
        for name, one in found.items():
            member = self._members.get(name)
            if member is None or member.known.url != one.url:
                self._members[name] = Member(one)
            else:
                member.known = one
        self._wake()

    def pick(self, key: bytes, model: str = "", besides: Collection[str] = ()) -> Member | None:
        """Return the server for a request, of those that serve ``model`` (any if empty); None if there is none.

        ``besides``: names of those that have failed it, which are taken only if there is no other.
        """
        fit = [one for one in self._members.values() if one.up and model in ("", one.known.model)]
        fit = [one for one in fit if one.known.name not in besides] or fit
        if not fit:
            return None
        candidates = [Candidate(one.known.name, one.open, max(one.known.share, 0.01)) for one in fit]
        return self._members[choose(key, candidates)]

    async def wait(self, timeout_s: float) -> None:
        """Wait until something has changed, or for ``timeout_s`` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            pass

    def check(self, member: Member) -> None:
        """Probe a server at once, as a connection with it broke: it is lost, or only the connection was."""
        task = asyncio.ensure_future(self._probe(member))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def watch(self) -> None:
        """Probe all servers, again and again."""
        while True:
            began = time.monotonic()
            self._leaving = [member for member in self._leaving if member.open]
            await asyncio.gather(*(self._probe(member) for member in (*self, *self._leaving)))
            await asyncio.sleep(max(0.05, PROBE_EVERY_S - (time.monotonic() - began)))

    async def _probe(self, member: Member) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
            async with self._session.get(f"{member.known.url}/health", timeout=timeout) as answer:
                await answer.read()
                healthy = answer.status == 200
        except TimeoutError:
            member.missed += 1
            if member.missed >= MISSED_PROBES:
                member.lose(f"no answer to {member.missed} probes")
        except (aiohttp.ClientError, OSError) as error:
            member.lose(f"{type(error).__name__}: {error}")
        else:
            member.missed = 0
            came_up = healthy and not member.up
            member.up = healthy
            if came_up:
                self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()
