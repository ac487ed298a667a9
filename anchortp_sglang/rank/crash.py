"""Describes the exception that ends a rank: its text, and the requests that the rank was working on."""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

_TEXT_CHARS = 500
_CONNECTIONS = "/torch/distributed/"
_OURS_OR_SGLANG = ("sglang.", "anchortp_sglang.")


@dataclass(frozen=True)
class Crash:
    """An exception that ended a rank. ``rids``: requests that the failing code was working on.

    ``peer_lost``: it failed in a collective of torch's, which the death of another rank breaks as well.
    """

    text: str
    rids: frozenset[str]
    peer_lost: bool


def describe(error: BaseException) -> Crash:
    """Read the requests concerned out of the local variables of the frames that ``error`` passed through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    text = f"{type(error).__name__}: {error}"[:_TEXT_CHARS]
    peer_lost = any(_CONNECTIONS in frame.f_code.co_filename for frame in frames)
    return Crash(text, frozenset(_innermost_requests(frames)), peer_lost)


def _innermost_requests(frames: Sequence[FrameType]) -> set[str]:
    """Find the requests of the innermost frame with one in a variable, else of the innermost frame with a batch."""
    for look in (_single, _batched):
        for frame in reversed(frames):
            if found := {rid for value in _sglang_objects(frame) for rid in look(value)}:
                return found
    return set()


def _sglang_objects(frame: FrameType) -> Iterator[Any]:
    return (value for value in frame.f_locals.values() if type(value).__module__.startswith(_OURS_OR_SGLANG))


def _single(value: Any) -> Iterator[str]:
    rid = getattr(value, "rid", None)
    if isinstance(rid, str):
        yield rid


def _batched(value: Any) -> Iterator[str]:
    """Yield the requests of a ScheduleBatch (``reqs``) or of a batch message (``batch``)."""
    for name in ("reqs", "batch"):
        members = getattr(value, name, None)
        if isinstance(members, list):
            for member in members:
                yield from _single(member)
