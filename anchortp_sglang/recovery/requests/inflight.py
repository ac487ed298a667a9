"""Tracks every open request, so that main can resume it in another generation.

Lives beside TokenizerManager (TM), on its event loop. In an outage nothing is sent to the dead scheduler: messages are
held back in order and follow the replays; otherwise an abort could overtake its request.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.managers.io_struct import AbortReq, ShutdownReq

from anchortp_sglang.kv.namespaces import Key
from anchortp_sglang.rank.messages import GenerationStart, Reseed
from anchortp_sglang.recovery.requests import journal
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies
from anchortp_sglang.recovery.requests.continued import Continued
from anchortp_sglang.recovery.requests.control import PAUSES, ControlMessages
from anchortp_sglang.recovery.requests.down import ControlCalls, ServerDown
from anchortp_sglang.recovery.requests.isolation import Evidence, Isolation
from anchortp_sglang.recovery.requests.pause import PauseGate
from anchortp_sglang.recovery.requests.records import Record, encode, records_of, reseed_of

log = logging.getLogger(__name__)


_STALE_RECORDS = 64
_ERROR_TYPES = {400: "BadRequestError", 500: "InternalServerError"}


class TokenCountMismatch(AssertionError):
    """A batch that would leave a gap in a client's tokens, or double some."""


class InflightRequests:
    """Requests between TM and the scheduler.

    ``send`` takes an encoded message to the scheduler. ``copies``: those of adapters' files.
    ``isolation`` decides which open requests go to a new generation, and when.
    """

    def __init__(self, tokenizer_manager: Any, send: Callable[[bytes], Any], copies: AdapterCopies) -> None:
        self._tm = tokenizer_manager
        self._send = send
        self._records: dict[str, Record] = {}
        self.control = ControlMessages(tokenizer_manager, send, copies)
        self._wake: Any = None
        self._task: Any = None
        self.isolation = Isolation()
        self.gate = PauseGate(self._error_of)
        self.outage = True  # until the first generation is ready
        self.refusal: str | None = None
        """Why no request is served any more; set by ``give_up``."""
        self.control_calls = ControlCalls(lambda: self.refusal)
        self.continued = Continued(tokenizer_manager, self._resume, self._finish)

    def dispatch(self, message: Any) -> None:
        """Take a message that TM wants to send to the scheduler. Raises ServerDown if it would not be answered."""
        if isinstance(message, AbortReq):
            return self._abort(message)
        if isinstance(message, PAUSES):
            self.control.dispatch(message, encode(message), self.outage)
            return self._release()
        if self.refusal is not None and not isinstance(message, ShutdownReq):  # TM's sigterm_watchdog must not fail
            raise ServerDown(self.refusal)
        encoded = encode(message)
        requests = records_of(message, encoded)
        if requests and not requests.keys() & self._tm.rid_to_state.keys():
            return None  # aborted in an outage, before it came here
        if requests and self._go_on_with_journals(requests):
            encoded = b""  # no message has just those that are left
        self._records |= requests
        if not requests and encoded:
            self.control.dispatch(message, encoded, self.outage)
        elif not self.outage:
            admitted = {rid for rid in requests if self.isolation.admit(rid, time.monotonic())}
            self._begin(requests, admitted, encoded)
        if len(self._records) > 2 * len(self._tm.rid_to_state) + _STALE_RECORDS:
            self.forget_finished()

    def _go_on_with_journals(self, requests: dict[str, Record]) -> bool:
        """Connect requests with their HTTP request's journal, and take out those that it has rows of, if any."""
        given = journal.current.get()
        if given is None:
            return False
        here = [rid for rid in requests if rid in self._tm.rid_to_state]
        going = [rid for rid in here if self.continued.begin(given, rid, requests[rid])]
        for rid in going:
            del requests[rid]
        return bool(going)

    def _resume(self, rid: str, record: Record) -> None:
        """Take in a request that has been given the rows of its journal."""
        record.begun = True
        self._records[rid] = record
        if self._tm.rid_to_state[rid].abort_sent:
            self._drop(rid)
        elif not self.outage:
            self._begin({rid: record}, {rid} if self.isolation.admit(rid, time.monotonic()) else set(), b"")

    @property
    def has_open(self) -> bool:
        """Whether a request has been taken for the ranks and has not ended."""
        return bool(self.continued.going) or any(rid in self._tm.rid_to_state for rid in self._records)

    @property
    def open_requests(self) -> int:
        """Return how many requests clients wait for, those included that have not been sent to the ranks."""
        return len(self._tm.rid_to_state)

    def abort_open(self) -> bool:
        """Abort all requests that were taken for the ranks; return whether some have not ended yet."""
        for rid in list(self.continued.going):
            self._drop(rid)
        open_rids = [rid for rid in self._records if rid in self._tm.rid_to_state]
        for rid in open_rids:
            if self.outage or rid in self.isolation.waiting:
                self._drop(rid)
            else:
                self._tm.rid_to_state[rid].abort_sent = True
        if self.has_open:
            self._send(encode(AbortReq(rid="", abort_all=True)))
        return self.has_open

    def _error_of(self, rids: Sequence[str]) -> Exception | None:
        """Return why requests that have not been taken yet are to end; None if they are not."""
        if self.refusal is not None:
            return ServerDown(self.refusal)
        states = self._tm.rid_to_state
        if any(rid not in states or states[rid].abort_sent for rid in rids):
            return ValueError("the request was aborted while the server was paused")
        return None

    def _begin(self, requests: dict[str, Record], admitted: Collection[str], encoded: bytes) -> None:
        """Send the admitted ones; ``encoded``: the message that has all of them, or nothing."""
        whole = encoded and len(admitted) == len(requests)
        for rid in admitted:
            if not whole:
                self._send(self._message_of(rid, requests[rid]))
            requests[rid].begun = True
        if whole:
            self._send(encoded)
        elif len(admitted) < len(requests):
            self._release()

    def _message_of(self, rid: str, record: Record) -> bytes:
        """Return what makes ranks begin a request, or go on after the tokens that its client has."""
        return record.resume(list(self._tm.rid_to_state[rid].output_ids)) if record.begun else record.message

    def delivered(self, output: Any) -> int:
        """Check a batch for gaps and doubles before TM takes it; return how many new tokens it carries.

        Raises TokenCountMismatch, which must end the requests concerned: their streams would be wrong.
        """
        counts, ids = getattr(output, "completion_tokens", None), getattr(output, "output_ids", None)
        if counts is None or ids is None:
            return 0
        fresh, now = 0, time.monotonic()
        rows = zip(output.rids, counts, ids, output.cached_tokens, strict=True)
        for row, (rid, count, new, cached) in enumerate(rows):
            state, record = self._tm.rid_to_state.get(rid), self._records.get(rid)
            if state is None or record is None:
                continue
            if count != len(state.output_ids) + len(new):
                raise TokenCountMismatch(
                    f"request {rid}: its client has {len(state.output_ids)} tokens, a batch with {len(new)} more says "
                    f"that it has {count}"
                )
            record.cached_tokens = cached
            if record.journal is not None:
                record.journal.add(record.number, output, row)
            fresh += len(new)
            self.isolation.progressed(rid, len(new), now)
        return fresh

    def forget(self, rids: Sequence[str]) -> None:
        """Forget those of these requests that TM is done with, and release requests that waited for them."""
        for rid in rids:
            if rid not in self._tm.rid_to_state:
                self._forget(rid)
        self._release()

    def forget_finished(self) -> None:
        """Forget all requests that TM is done with (an abort is answered without a batch)."""
        open_requests = self._tm.rid_to_state
        for rid in [rid for rid in self._records if rid not in open_requests]:
            self._forget(rid)

    def _forget(self, rid: str) -> None:
        self._records.pop(rid, None)
        self.isolation.close(rid)

    # ---- from one generation to the next

    def struck(self, evidence: Evidence) -> dict[str, str]:
        """Judge a fault of the serving generation, and end requests that ranks cannot serve. Return rid -> reason."""
        self.outage = True
        self.forget_finished()
        named = evidence.rids.intersection(self._records)
        ended = self.isolation.struck(replace(evidence, rids=named), time.monotonic())
        for rid, reason in ended.items():
            self._forget(rid)
            self._finish(rid, reason, status_code=500)
        return ended

    def replay(self, generation: int) -> int:
        """Open the new generation's gate, send held messages, and resume open requests in the order of isolation.

        Returns how many requests were resumed.
        """
        self.forget_finished()
        self.outage, self.refusal = False, None
        self.send(GenerationStart(generation=generation))
        self.control.repeat()
        for rid in [rid for rid in self._records if self._tm.rid_to_state[rid].abort_sent]:
            self._drop(rid)  # the abort died with the scheduler
        states = self._tm.rid_to_state
        resumed = sum(record.begun for record in self._records.values())
        self.isolation.replay([(rid, bool(states[rid].output_ids)) for rid in self._records], time.monotonic())
        self._release()
        self.control.release()
        return resumed

    def send(self, message: Any) -> None:
        """Send a message of our own to the scheduler."""
        self._send(encode(message))

    def _release(self) -> None:
        """Send the requests that may go to the ranks by now; none that waits while these pause."""
        if self.outage or self.control.ranks_pause or not self.isolation.waiting:
            return
        self.forget_finished()  # a waiting request may have ended: its client left, or it was aborted
        now = time.monotonic()
        for rid in self.isolation.release(now):
            record = self._records.get(rid)
            if record is None:
                self.isolation.close(rid)
                continue
            self._send(self._message_of(rid, record))
            record.begun = True
        if self._wake is not None:
            self._wake.cancel()
        at = self.isolation.wake_at(now)
        self._wake = None if at is None else self._tm.event_loop.call_later(at - now, self._release)

    def open_tokens(self) -> Iterator[tuple[Key, NDArray[np.int64]]]:
        """Yield the extra key and cache salt of each open request, and its prompt and delivered tokens."""
        self.forget_finished()
        for rid, record in self._records.items():
            request, delivered = record.request(), self._tm.rid_to_state[rid].output_ids
            tokens = np.array([*request.input_ids, *delivered], np.int64)
            # As Req.__init__ (managers/schedule_batch.py) makes it.
            extra_key = request.extra_key if request.lora_id is None else (request.extra_key or "") + request.lora_id
            yield (extra_key, request.cache_salt or None), tokens

    def reseed(self) -> Reseed:
        """Make the message that tells a new detokenizer of the requests with delivered tokens."""
        self.forget_finished()
        states = self._tm.rid_to_state
        return reseed_of((rid, record, states[rid]) for rid, record in self._records.items() if states[rid].output_ids)

    def end_open(self, reason: str) -> int:
        """End every open request with a clear error; return how many. New ones are accepted as before."""
        rids = list(self._tm.rid_to_state)
        for rid in rids:
            record = self._records.get(rid)
            if record is not None and record.journal is not None:
                record.journal.given_up = reason
            self._forget(rid)
            self._finish(rid, reason, status_code=503)
        return len(rids)

    def give_up(self, reason: str) -> int:
        """End every open request with a clear error, and refuse new ones until a replay; return how many ended."""
        self.refusal = reason
        self.control.forget_held()
        self.control_calls.end()
        ended = self.end_open(reason)
        self._look_at_gate()
        return ended

    def _look_at_gate(self) -> None:
        if self._tm.is_pause:
            self._task = self._tm.event_loop.create_task(self.gate.look())  # asyncio keeps no reference of its own

    def _abort(self, message: AbortReq) -> None:
        """End requests that are not with the ranks; tell ranks of the others (``abort_request`` takes prefixes)."""
        matching = [r for r in self._tm.rid_to_state if message.abort_all or r.startswith(message.rid)]
        with_nobody = {*self.isolation.waiting, *self.continued.going}
        here = set(matching) if self.outage else with_nobody.intersection(matching)
        for rid in here:
            self._drop(rid)
        for rid in set(matching) - here:
            self._tm.rid_to_state[rid].abort_sent = True  # in case the ranks die before they read it
        self._look_at_gate()
        if not self.outage:
            self._send(encode(message))
            self._release()

    def _drop(self, rid: str) -> None:
        self._forget(rid)
        self._finish(rid, "Aborted while the server was recovering", status_code=None)

    def _finish(self, rid: str, text: str, status_code: int | None) -> None:
        reason: dict[str, Any] = {"type": "abort", "message": text}
        if status_code is not None:
            err_type = _ERROR_TYPES.get(status_code, "ServiceUnavailable")
            # A bare number would not do: streams of OpenAI's and Anthropic's APIs would end as if they were complete
            # (serving_chat._generate_chat_stream, serving_completions).
            reason |= {"status_code": HTTPStatus(status_code), "err_type": err_type}
        self._tm._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))
        state = self._tm.rid_to_state.pop(rid, None)
        if state is not None:  # a health check of SGLang's, which _handle_abort_req ignores
            state.finished = True
            state.out_list.append({"text": "", "output_ids": [], "meta_info": {"id": rid, "finish_reason": reason}})
            state.event.set()
