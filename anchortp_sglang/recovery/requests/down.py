"""Ends requests and control calls at once, with the reason, in a server that has given up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException


class ServerDown(HTTPException, ValueError):
    """The error of a request to a server that has given up; the text says why.

    FastAPI and SGLang's OpenAI routes (serving_base.handle_request) turn an HTTPException into its status; SGLang's
    /generate and its streams report a ValueError (http_server.serve_generate_request), with its ``status_code``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(503, reason)

    def __str__(self) -> str:
        return str(self.detail)


class ControlCalls:
    """TokenizerManager's calls that await an answer of the ranks. ``refusal`` returns why there is none, or None."""

    def __init__(self, refusal: Callable[[], str | None]) -> None:
        self._refusal = refusal
        self._waiting: set[asyncio.Future[Any]] = set()

    async def run(self, call: Callable[[Any, Any], Awaitable[Any]], communicator: Any, message: Any) -> Any:
        """Return the result of ``call``, a FanOutCommunicator's.

        Raises ServerDown if the server is down, or goes down before the ranks have answered.
        """
        if (refusal := self._refusal()) is not None:
            raise ServerDown(refusal)
        waiting = asyncio.ensure_future(call(communicator, message))
        self._waiting.add(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if (refusal := self._refusal()) is None:
                raise
            # Otherwise the next call, if the server comes back, would take this one to be under way (watching_call).
            communicator._result_event = communicator._result_values = communicator._result_fan_out = None
            raise ServerDown(refusal) from None
        finally:
            self._waiting.discard(waiting)

    def end(self) -> None:
        """End all calls with the refusal, as the ranks are dead."""
        for waiting in self._waiting:
            waiting.cancel()
