"""Request bodies have a limit, kept while they stream in: SGLang reads a body of any size into memory.

Starlette's RequestBodyLimitMiddleware would do the same, but answers in plain text that does not say what to do.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


def limited(scope: Mapping[str, Any], receive: Receive, limit_bytes: int, way_out: str) -> Receive:
    """``receive`` of a request, which raises a 413 once its body is longer than ``limit_bytes``.

    A Content-Length above the limit is believed, and nothing is read; what it does not say is counted. FastAPI and
    SGLang's routes let an HTTPException from ``receive`` through (fastapi.routing.get_request_handler).
    ``way_out``: what to do about it, for the client.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = HTTPException(413, f"The request's body is longer than {limit_bytes} bytes; {way_out}")
    received = int(announced) if announced.isdigit() and int(announced) > limit_bytes else 0

    async def receive_limited() -> Message:
        nonlocal received
        if received > limit_bytes:
            raise too_large
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit_bytes:
            raise too_large
        return message

    return receive_limited
