"""Pauses a server for its operator (SGLang's ``/pause_generation``), so that no fault makes requests of it hang.

SGLang keeps new requests waiting at ``TokenizerManager.is_pause_cond``, and holds it while a pause that aborts waits
for the open ones. Here a request that waits ends if it is aborted or the server goes down, and no pause holds the gate.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from sglang.srt.managers.io_struct import ContinueGenerationReqInput

from anchortp_sglang.admission.hooks import asking

_Result = TypeVar("_Result")

_POLL_S = 0.02
_REPEAT_S = 1.0


class PauseGate(asyncio.Condition):
    """Holds new requests while the server is paused, in the place of TokenizerManager's ``is_pause_cond``.

    ``error_of`` returns the error with which a waiting request, given by its rids, is to end, or None.
    """

    def __init__(self, error_of: Callable[[list[str]], Exception | None]) -> None:
        super().__init__()
        self._error_of = error_of

    async def wait_for(self, predicate: Callable[[], _Result]) -> _Result:
        """Wait until the server is not paused. Raises the error of the request that this task asks for."""
        rids = _rids(asking.get())
        while not (result := predicate()):
            self._check(rids)
            await self.wait()
            self._check(rids)
        return result

    def _check(self, rids: list[str]) -> None:
        if (error := self._error_of(rids)) is not None:
            raise error

    async def look(self) -> None:
        """Let each waiting request look whether it is to end."""
        async with self:
            self.notify_all()


async def pause_and_abort(tokenizer_manager: Any, inflight: Any) -> None:
    """Let new requests wait and end the open ones; return when none is left, or the server is continued."""
    tokenizer_manager.is_pause = True
    if inflight.control.ranks_pause:  # they would not notice an abort
        inflight.dispatch(ContinueGenerationReqInput(torch_empty_cache=False))
    loop = asyncio.get_running_loop()
    while tokenizer_manager.is_pause and inflight.abort_open():
        again_at = loop.time() + _REPEAT_S  # one that was being tokenized comes to the ranks later
        while tokenizer_manager.is_pause and inflight.has_open and loop.time() < again_at:
            await asyncio.sleep(_POLL_S)


def _rids(request: Any) -> list[str]:
    rids = getattr(request, "rid", None)
    return rids if isinstance(rids, list) else [] if rids is None else [rids]
