"""The LoRA adapters that were loaded and unloaded since the start, which new ranks have to be told of.

Ranks load those of ``--lora-paths`` when they are made; messages bring them from there to what main serves. Main keeps
a copy of each adapter's files, and ranks read nothing else.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any

from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, LoRAUpdateOutput, UnloadLoRAAdapterReqInput

from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies, copy_adapter
from anchortp_sglang.threads import in_thread

__all__ = ["MESSAGES", "Adapters"]

MESSAGES = (LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput)


class Adapters:
    """Keeps what ranks have been told of adapters, and the call that waits for an answer; there is one at a time.

    ``copies`` takes the files of those that are loaded from now on. ``served`` returns the names of those that main
    serves.
    """

    def __init__(self, copies: AdapterCopies, served: Callable[[], Collection[str]]) -> None:
        self._copies, self._served = copies, served
        self._loaded: dict[str, bytes] = {}
        """By adapter: the message that loaded it, unless ranks load it when they are made."""
        self._unloaded: dict[str, bytes] = {}
        """By adapter: the message that unloaded it, if ranks load it when they are made."""
        self._sent: tuple[Any, bytes] | None = None
        self._repeated = asyncio.Event()
        """Set when all messages that no call waited behind have been answered."""
        self._repeated.set()

    async def run(self, call: Callable[[Any], Awaitable[Sequence[Any]]], message: Any) -> Sequence[Any]:
        """Return the result of ``message``, which ``call`` sends, whatever repeated ones are answered meanwhile."""
        try:
            if isinstance(message, LoadLoRAAdapterReqInput):
                try:
                    message = await self._with_copy(message)
                except (ValueError, OSError) as error:
                    return [LoRAUpdateOutput(success=False, error_message=str(error), loaded_adapters={})]
            while not self._repeated.is_set():
                await self._repeated.wait()  # set, too, if other ranks are told again
            results = await call(message)
            self._note(results)
            return [self._with_sources(results[-1])]
        finally:
            self._sent = None
            if isinstance(message, LoadLoRAAdapterReqInput) and message.lora_id not in self._loaded:
                self._copies.discard(message.lora_id)

    async def _with_copy(self, message: LoadLoRAAdapterReqInput) -> LoadLoRAAdapterReqInput:
        """Copy the adapter's files, and return the message with the copy's folder.

        Raises ValueError, as SGLang answers, for one that is loaded or cannot be read.
        """
        if message.lora_name in self._served():  # SGLang looks for these words
            raise ValueError(f"the adapter {message.lora_name} is already loaded; unload it first")
        assert message.lora_id is not None
        files = await in_thread(copy_adapter, message.lora_path, self._copies.readers)
        self._copies.keep(message.lora_id, message.lora_path, files)
        message = copy.copy(message)
        message.lora_path = self._copies.path(message.lora_id)
        return message

    def _with_sources(self, result: LoRAUpdateOutput) -> LoRAUpdateOutput:
        """Return a result in which adapters have the paths that clients know."""
        result = copy.copy(result)
        loaded = result.loaded_adapters or {}
        result.loaded_adapters = {
            name: self._copies.source(path) if isinstance(path, str) else path for name, path in loaded.items()
        }
        return result

    def sent(self, message: Any, encoded: bytes) -> None:
        """Note a message on its way to the ranks."""
        self._sent = message, encoded

    def repeat(self, call: Any, held: bool) -> list[bytes]:
        """Return the messages for new ranks. ``call``: the communicator that awaits answers of ranks.

        ``held``: whether the message that it awaits the answer of is sent later anyhow.
        """
        self._repeated.set()  # the ranks that were told before are dead
        awaited = call._result_event is not None and self._sent is not None
        unread = awaited and call._result_event.is_set()
        if unread:  # the dead ranks' answer, which the caller reads in the loop's next round
            self._note(call._result_values)
            awaited = False
        messages = [*self._unloaded.values(), *self._loaded.values()]
        self._copies.show()
        if awaited:
            assert self._sent is not None
            _, encoded = self._sent
            messages = [one for one in messages if one != encoded]
            call._result_values.clear()
            call._result_fan_out = len(messages) + 1
            messages += [] if held else [encoded]
        elif messages:  # their answers must not be taken for those of the next call
            self._repeated = asyncio.Event()
            collect = partial(_collect, call, self._repeated, len(messages))
            if unread:
                asyncio.get_running_loop().call_soon(collect)
            else:
                collect()
        return messages

    def _note(self, results: Sequence[Any]) -> None:
        if self._sent is None or not results or not results[-1].success:
            return
        message, encoded = self._sent
        if isinstance(message, LoadLoRAAdapterReqInput):
            self._loaded[message.lora_id] = encoded
            return
        self._loaded.pop(message.lora_id, None)
        if not self._copies.discard(message.lora_id):
            self._unloaded[message.lora_id] = encoded


def _collect(call: Any, event: asyncio.Event, count: int) -> None:
    """Have a communicator take ``count`` answers that nobody awaits, and set ``event`` then."""
    call._result_event, call._result_values, call._result_fan_out = event, [], count
