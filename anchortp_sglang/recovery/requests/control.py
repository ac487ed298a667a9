"""Messages from TokenizerManager (TM) to the ranks that are no requests, from one generation to the next.

In an outage they are held back. What new ranks have to know of those that came before, they are told again.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import (
    ConfigureLoggingReq,
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    FreezeGCReq,
    GetInternalStateReq,
    PauseGenerationReqInput,
)

from anchortp_sglang.recovery.requests import adapters
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.requests.adapters import Adapters

__all__ = ["PAUSES", "ControlMessages"]

PAUSES = (PauseGenerationReqInput, ContinueGenerationReqInput)
"""Messages of which the last one holds for new ranks, too: they pause before they take a request."""

_LASTING = (ConfigureLoggingReq, FreezeGCReq)
"""Messages without an answer, of each of which the last one holds for new ranks."""

_REPEATABLE: dict[str, type] = {
    "get_internal_state_communicator": GetInternalStateReq,
    "flush_cache_communicator": FlushCacheReqInput,
}
"""TM's calls by the attribute that awaits their answer: all that reach ranks (``check_message``), but for adapters.
Each may be sent twice."""


class ControlMessages:
    """Sends ranks messages, holds them back in an outage, and repeats to new ranks those that they must know.

    ``send`` takes an encoded message to them. ``copies``: those of adapters' files.
    """

    def __init__(self, tokenizer_manager: Any, send: Callable[[bytes], Any], copies: AdapterCopies) -> None:
        self._tm = tokenizer_manager
        self._send = send
        self._held: list[tuple[type, bytes]] = []
        self._last: dict[type, bytes] = {}  # of each repeatable or lasting kind
        self._pause: bytes | None = None  # the message that has paused the ranks
        self.adapters = Adapters(copies, lambda: tokenizer_manager.lora_registry.get_all_adapters())

    @property
    def ranks_pause(self) -> bool:
        """Whether ranks have been told to pause, and new ones will be."""
        return self._pause is not None

    def dispatch(self, message: Any, encoded: bytes, outage: bool) -> None:
        """Send a message, or hold it back in an outage. New ranks learn of a pause before all others are released."""
        kind = type(message)
        if kind in PAUSES:
            self._pause = encoded if kind is PauseGenerationReqInput else None
        elif kind in _LASTING or kind in _REPEATABLE.values():
            self._last[kind] = encoded
        elif kind in adapters.MESSAGES:
            self.adapters.sent(message, encoded)
        if not outage:
            self._send(encoded)
        elif kind not in PAUSES + _LASTING:
            self._held.append((kind, encoded))

    def repeat(self) -> None:
        """Tell new ranks, before any request, of the pause, log levels, adapters, and calls that were not answered."""
        if self._pause is not None:
            self._send(self._pause)
        for kind in _LASTING:
            if kind in self._last:
                self._send(self._last[kind])
        held = {kind for kind, _ in self._held}
        update: Any = getattr(self._tm, "update_lora_adapter_communicator", None)
        if update is not None:
            for message in self.adapters.repeat(update, bool(held.intersection(adapters.MESSAGES))):
                self._send(message)
        for name, kind in _REPEATABLE.items():
            call: Any = getattr(self._tm, name, None)
            if call is None or call._result_event is None or call._result_event.is_set():
                continue
            if kind in self._last and kind not in held:
                call._result_values.clear()
                self._send(self._last[kind])

    def release(self) -> None:
        """Send what was held back."""
        held, self._held = self._held, []
        for _, message in held:
            self._send(message)

    def forget_held(self) -> None:
        """Drop what was held back, as nobody waits for it any more."""
        self._held.clear()
