"""Which server a request goes to: the one that has its prefix, unless that one has too much to do.

Pure: rendezvous hashing with bounded loads (Mirrokni et al., 2016, for the bound). Every ingress comes to the same
order of servers for a key, knows nothing of the others, and one that has just started knows as much as they.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX_BYTES = 512
"""How much of a prompt says which server has its beginning: more would part the turns of a conversation."""
BOUND = 1.25
"""A server takes requests of its own prefixes until its load is this many times the mean."""
SLACK = 2.0
"""Requests above the mean that a server takes in any case: few requests are never even."""

_PROMPT = re.compile(rb'"(?:messages|prompt|text|input_ids|input)"\s*:\s*')


@dataclass(frozen=True)
class Candidate:
    """A server. ``load``: its open requests; ``share``: its devices that serve, as a part of all it was made for."""

    name: str
    load: int
    share: float = 1.0


def key_of(session: str, body: bytes) -> bytes:
    """Return what requests that should meet on one server share: their session, or the beginning of their prompt."""
    if session:
        return session.encode()
    found = _PROMPT.search(body)
    return b"" if found is None else body[found.end() : found.end() + PREFIX_BYTES]


def choose(key: bytes, candidates: Sequence[Candidate]) -> str:
    """Return the name of the candidate to take, of which there must be one. Without a key: the least loaded one."""
    if not key:
        return min(candidates, key=lambda one: (_relative(one), one.name)).name
    shares = sum(one.share for one in candidates)
    mean = (sum(one.load for one in candidates) + 1) / shares
    fitting = [one for one in candidates if _relative(one) <= BOUND * mean + SLACK / one.share]
    return max(fitting or candidates, key=lambda one: _score(key, one)).name


def _relative(one: Candidate) -> float:
    """Return the load with one more request, by what is left of the server."""
    return (one.load + 1) / one.share


def _score(key: bytes, one: Candidate) -> float:
    """Return the weighted rendezvous score: keys fall to servers in proportion to their shares."""
    digest = hashlib.blake2b(key, digest_size=8, key=one.name.encode()[:64]).digest()
    return -one.share / math.log((int.from_bytes(digest) + 1) / (2**64 + 2))
