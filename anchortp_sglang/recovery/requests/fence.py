"""The fence between generations, as main sees it: no message of an old rank 0 arrives after it.

On the same path, pings check that the detokenizer answers while clients wait for tokens.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from anchortp_sglang.rank.messages import Fence, Ping, Reseed
from anchortp_sglang.recovery.processes.pidfd import is_dead
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.requests.inflight import InflightRequests
from anchortp_sglang.threads import in_thread

log = logging.getLogger(__name__)

_TIMEOUT_S = 3.0
_PING_EVERY_S = 1.0
_UNANSWERED = 5


class FenceLine:
    """main -> detokenizer -> TokenizerManager: the path of outputs, for messages of our own."""

    def __init__(self, tokenizer_manager: Any, detokenizer_endpoint: str) -> None:
        from sglang.utils import TypeBasedDispatcher

        ours = [(Fence, self._arrived), (Ping, self._answered)]
        tokenizer_manager._result_dispatcher += TypeBasedDispatcher(ours)
        self._tm = tokenizer_manager
        self._push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._push.connect(detokenizer_endpoint)
        self._generation = -1
        self._seen: asyncio.Future[Fence] | None = None
        self._pings = 0
        self._answers = 0
        self._reseeds = 0
        self._awaited: dict[int, asyncio.Future[None]] = {}

    async def drain(self, generation: int, processes: ServerProcesses, inflight: InflightRequests) -> None:
        """Wait until all that ``generation``'s dead rank 0 has sent is with TokenizerManager.

        A detokenizer that is dead or does not answer is replaced; the tokens that it had not passed on are computed
        again. Raises StartFailed, TimeoutError.
        """
        await in_thread(processes.resume_stopped)
        assert processes.detokenizer is not None
        if not is_dead(processes.detokenizer.pidfd):
            try:
                return await self._fence(generation)
            except TimeoutError:
                processes.end_detokenizer()
        await in_thread(processes.restart_detokenizer)
        self._send(inflight.reseed())
        await self._fence(generation)

    async def watch(self, processes: ServerProcesses, serving: Callable[[], bool]) -> None:
        """Ping the detokenizer while ``serving`` and clients wait for tokens.

        After one unanswered ping the detokenizer may be stopped, so it is resumed; after ``_UNANSWERED`` it is killed.
        Pings are counted, not seconds: while main itself does not run, it does not ping.
        """
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            if not serving() or not self._tm.rid_to_state:
                self._answers = self._pings
                continue
            if self._pings - self._answers == _UNANSWERED:
                self._answers = self._pings
                processes.end_detokenizer()
                continue
            if self._pings > self._answers:
                await in_thread(processes.resume_stopped)
            self._pings += 1
            self._send(Ping(number=self._pings))

    async def reseed(self, message: Reseed) -> None:
        """Tell the detokenizer of requests that it has not had; return when it knows them. Raises TimeoutError."""
        self._send(message)
        self._reseeds += 1
        number = -self._reseeds  # no ping of the watch: many at once are no sign of a detokenizer that does not answer
        self._send(Ping(number=number))
        self._awaited[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._awaited[number], _TIMEOUT_S)
        finally:
            del self._awaited[number]

    async def _fence(self, generation: int) -> None:
        self._generation, self._seen = generation, asyncio.get_running_loop().create_future()
        self._send(Fence(generation=generation))
        await asyncio.wait_for(self._seen, _TIMEOUT_S)

    def _send(self, message: Any) -> None:
        """Send a message to the detokenizer."""
        from sglang.srt.managers.io_struct import sock_send

        sock_send(self._push, message)

    def _arrived(self, fence: Fence) -> None:
        if self._seen is not None and not self._seen.done() and fence.generation == self._generation:
            self._seen.set_result(fence)

    def _answered(self, ping: Ping) -> None:
        self._answers = max(self._answers, ping.number)
        awaited = self._awaited.get(ping.number)
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
