"""What main must know of every open request to go on with it in another generation.

Lives beside TokenizerManager (TM), on its event loop. In an outage nothing is sent to the dead scheduler: messages
are held back in order and follow the replays, else an abort could overtake its request.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    AbortReq,
    FlushCacheReqInput,
    GetInternalStateReq,
    TokenizedGenerateReqInput,
)

from anchortp_sglang.memory.namespaces import Key
from anchortp_sglang.recovery.wire import CONTEXT_TOKENS, GenerationStart, Reseed, resume_of

log = logging.getLogger(__name__)


_REPEATABLE: dict[str, type] = {
    "get_internal_state_communicator": GetInternalStateReq,
    "flush_cache_communicator": FlushCacheReqInput,
}
"""TokenizerManager's control calls that may be sent twice, by the attribute that awaits their answer."""

_STALE_RECORDS = 64


class TokenCountMismatch(AssertionError):
    """A batch would have left a gap in, or doubled, a client's tokens."""


@dataclass
class Record:
    """A dispatched request as it was sent, and the cached_tokens last reported to its client."""

    request: TokenizedGenerateReqInput
    cached_tokens: int = 0


class Ledger:
    """Requests between TM and the scheduler. ``send``: TM's own way to the scheduler, unhooked."""

    def __init__(self, tokenizer_manager: Any, send: Callable[[Any], None]) -> None:
        self._tm = tokenizer_manager
        self._send = send
        self._records: dict[str, Record] = {}
        self._held: list[Any] = []
        self._control: dict[type, Any] = {}  # the last message of each repeatable kind
        self.outage = True  # until the first generation is ready
        self.refusal: str | None = None
        """Why nothing is served any more; set by ``give_up``."""

    def dispatch(self, message: Any) -> None:
        """TM wants to send ``message``."""
        if not self.outage:
            self._remember(message)
            self._send(message)
        elif isinstance(message, AbortReq):
            self._abort(message)
        else:
            # A copy: TM puts unpicklable time_stats back into the same object once it is dispatched.
            self._held.append(copy.copy(message))

    def delivered(self, output: Any) -> int:
        """Check a batch for gaps and doubles before TM takes it; how many new tokens it carries.

        Raises TokenCountMismatch, which must end the requests concerned: their streams would be wrong.
        """
        counts, ids = getattr(output, "completion_tokens", None), getattr(output, "output_ids", None)
        if counts is None or ids is None:
            return 0
        fresh = 0
        for rid, count, new, cached in zip(output.rids, counts, ids, output.cached_tokens, strict=True):
            state, record = self._tm.rid_to_state.get(rid), self._records.get(rid)
            if state is None or record is None:
                continue
            if count != len(state.output_ids) + len(new):
                raise TokenCountMismatch(
                    f"request {rid} has {len(state.output_ids)} tokens, got {len(new)} and should then have {count}"
                )
            record.cached_tokens = cached
            fresh += len(new)
        return fresh

    def forget(self, rids: Sequence[str]) -> None:
        """Drop those of these requests that TM is done with."""
        for rid in rids:
            if rid not in self._tm.rid_to_state:
                self._records.pop(rid, None)

    def forget_finished(self) -> None:
        """Drop the records of all requests that TM is done with (an abort is answered without a batch)."""
        open_requests = self._tm.rid_to_state
        for rid in [rid for rid in self._records if rid not in open_requests]:
            del self._records[rid]

    def replay(self, generation: int) -> int:
        """Open the new generation's gate, resume what is open, then send what was held back, in order.

        Returns how many were resumed.
        """
        self.forget_finished()
        self._send(GenerationStart(generation=generation))
        self._repeat_control()
        resumed = 0
        for rid, record in list(self._records.items()):
            if self._tm.rid_to_state[rid].abort_sent:
                self._drop(rid)  # the abort died with the scheduler
                continue
            delivered = list(self._tm.rid_to_state[rid].output_ids)
            self._send(resume_of(record.request, delivered, record.cached_tokens))
            resumed += 1
        self.outage = False
        held, self._held = self._held, []
        for message in held:
            self.dispatch(message)
        return resumed

    def open_tokens(self) -> Iterator[tuple[Key, NDArray[np.int64]]]:
        """Prompt and delivered tokens of each open request, after its extra key and cache salt."""
        self.forget_finished()
        for rid, record in self._records.items():
            request, delivered = record.request, self._tm.rid_to_state[rid].output_ids
            tokens = np.array([*request.input_ids, *delivered], np.int64)
            yield (request.extra_key, request.cache_salt or None), tokens

    def reseed(self) -> Reseed:
        """What a new detokenizer must know of the requests that have delivered tokens."""
        self.forget_finished()
        message = Reseed(rids=[], decode_ids=[], context_tokens=[], sent_chars=[], skip_special=[], space_special=[])
        for rid, record in self._records.items():
            state = self._tm.rid_to_state[rid]
            if state.output_ids:
                context = list(record.request.input_ids[-CONTEXT_TOKENS:])
                message.rids.append(rid)
                message.decode_ids.append([*context, *state.output_ids])
                message.context_tokens.append(len(context))
                message.sent_chars.append(len(state.get_text()))
                message.skip_special.append(record.request.sampling_params.skip_special_tokens)
                message.space_special.append(record.request.sampling_params.spaces_between_special_tokens)
        return message

    def give_up(self, reason: str) -> int:
        """End every open request with a clear error; returns how many."""
        self.refusal = reason
        self._held.clear()
        rids = list(self._tm.rid_to_state)
        for rid in rids:
            self._finish(rid, reason, status_code=503)
        self._records.clear()
        return len(rids)

    def _remember(self, message: Any) -> None:
        if type(message) in _REPEATABLE.values():
            self._control[type(message)] = message
        for request in getattr(message, "batch", None) or [message]:
            if isinstance(request, TokenizedGenerateReqInput):
                self._records[request.rid] = Record(copy.copy(request))
        if len(self._records) > 2 * len(self._tm.rid_to_state) + _STALE_RECORDS:
            self.forget_finished()

    def _repeat_control(self) -> None:
        """Ask again what the dead scheduler did not answer; what must not be asked twice fails instead of hanging."""
        held = {type(message) for message in self._held}
        for name, call in list(vars(self._tm).items()):
            waits = isinstance(call, FanOutCommunicator) and call._result_event is not None
            if not waits or call._result_event.is_set():
                continue
            kind = _REPEATABLE.get(name)
            if kind in self._control and kind not in held:
                call._result_values.clear()
                self._send(self._control[kind])
            elif kind is None and not held:
                log.error("anchortp: the answer to %s was lost in the outage", name.removesuffix("_communicator"))
                call._result_event.set()

    def _abort(self, message: AbortReq) -> None:
        """The scheduler would have answered; it is dead (``Scheduler.abort_request`` matches by prefix)."""
        rids = [r for r in self._tm.rid_to_state if message.abort_all or r.startswith(message.rid)]
        for rid in rids:
            self._drop(rid)

    def _drop(self, rid: str) -> None:
        self._records.pop(rid, None)
        self._held = [held for held in self._held if getattr(held, "rid", None) != rid]
        self._finish(rid, "Aborted while the server was recovering", status_code=None)

    def _finish(self, rid: str, text: str, status_code: int | None) -> None:
        reason: dict[str, Any] = {"type": "abort", "message": text}
        if status_code is not None:
            reason |= {"status_code": status_code, "err_type": "ServiceUnavailable"}
        self._tm._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))
