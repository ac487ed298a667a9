"""The fence between generations, as main sees it: nothing an old rank 0 said arrives after it."""

import asyncio
from typing import Any

import zmq

from anchortp_sglang.recovery.wire import Fence

_TIMEOUT_S = 10.0


class FenceLine:
    """main -> detokenizer -> TokenizerManager: the way that outputs take, for messages of our own."""

    def __init__(self, tokenizer_manager: Any, detokenizer_endpoint: str) -> None:
        from sglang.utils import TypeBasedDispatcher

        tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(Fence, self._arrived)])
        self._push: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._push.connect(detokenizer_endpoint)
        self._generation = -1
        self._seen: asyncio.Future[Fence] | None = None

    def send(self, message: Any) -> None:
        """To the detokenizer."""
        from sglang.srt.managers.io_struct import sock_send

        sock_send(self._push, message)

    async def drain(self, generation: int) -> Fence:
        """Until all that ``generation``'s dead rank 0 has sent is with TokenizerManager. Raises TimeoutError."""
        self._generation, self._seen = generation, asyncio.get_running_loop().create_future()
        self.send(Fence(generation=generation))
        return await asyncio.wait_for(self._seen, _TIMEOUT_S)

    def _arrived(self, fence: Fence) -> None:
        if self._seen is not None and not self._seen.done() and fence.generation == self._generation:
            self._seen.set_result(fence)
