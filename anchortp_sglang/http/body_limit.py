"""A limit for request bodies, enforced while they stream in: SGLang reads a body of any size into memory.

Starlette's RequestBodyLimitMiddleware does the same, but its plain-text answer does not say what to do.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


def limited(scope: Mapping[str, Any], receive: Receive, limit_bytes: int, way_out: str) -> Receive:
    """Wrap a request's ``receive`` so that it raises a 413 once the body is longer than ``limit_bytes``.

    With a Content-Length above the limit nothing is read; otherwise the bytes that come are counted. FastAPI and
    SGLang's routes let an HTTPException from ``receive`` through (fastapi.routing.get_request_handler).
    ``way_out`` tells the client what to do.
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
