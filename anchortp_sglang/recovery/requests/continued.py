"""Goes on with requests whose clients were given tokens by another server.

TokenizerManager (TM) is given the rows of the journal again, in the portions in which the handler on the other server
took them, as if the detokenizer had sent them. Then the request is like one that a recovery resumes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from anchortp_sglang.rank.messages import Reseed
from anchortp_sglang.recovery.requests.journal import BadJournal, Journal, Row, Taken, TakenEvent, as_output, portions
from anchortp_sglang.recovery.requests.records import Record, reseed_of

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class Continued:
    """Requests that are given their rows again. ``going``: their rids; no rank has them.

    ``resume`` takes a request to the ranks, ``finish`` ends it with an error, ``reseed`` tells the detokenizer of it
    and returns when it has taken note (raises TimeoutError).
    """

    def __init__(
        self,
        tokenizer_manager: Any,
        resume: Callable[[str, Record], None],
        finish: Callable[[str, str, int], None],
    ) -> None:
        self._tm = tokenizer_manager
        self._resume = resume
        self._finish = finish
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.reseed: Callable[[Reseed], Awaitable[None]] | None = None

    @property
    def going(self) -> Collection[str]:
        return self._tasks.keys()

    def begin(self, journal: Journal, rid: str, record: Record) -> bool:
        """Connect a new request with its HTTP request's journal; return whether it is given rows first.

        Raises BadJournal if the request cannot go on from what it brings.
        """
        state = self._tm.rid_to_state[rid]
        number, entries = journal.begin()
        given = portions(entries)
        if given:
            self._check(rid, record, given)
        on_taken = _Notes(journal, number, state, known=sum(isinstance(entry, Taken) for entry in entries))
        state.event = TakenEvent(on_taken)
        record.journal, record.number = journal, number
        if not given:
            return False
        task = self._tm.event_loop.create_task(self._give(rid, record, given, on_taken))
        self._tasks[rid] = task
        task.add_done_callback(lambda _: self._tasks.pop(rid, None))
        return True

    def _check(self, rid: str, record: Record, given: list[list[Row]]) -> None:
        request, state = record.request(), self._tm.rid_to_state[rid]
        rows = [row for portion in given for row in portion]
        tokens, model = [token for row in rows for token in row.token_ids], self._tm.model_config
        ended = rows[-1].finish_reason is not None
        if any(token >= model.vocab_size for token in tokens):
            raise BadJournal(f"the journal has token {max(tokens)}; the model's are below {model.vocab_size}")
        limit = request.sampling_params.max_new_tokens
        if not ended and limit is not None and len(tokens) >= limit:
            raise BadJournal(f"the journal has {len(tokens)} tokens and no end; max_new_tokens is {limit}")
        if not ended and len(request.input_ids) + len(tokens) >= model.context_len:
            raise BadJournal(
                f"prompt and journal have {len(request.input_ids) + len(tokens)} tokens; the model's context has"
                f" {model.context_len}"
            )
        if request.return_logprob and any(row.token_ids and row.logprobs is None for row in rows):
            raise BadJournal("the request asks for logprobs, and the journal has rows without")
        if not getattr(state.obj, "stream", False) and len(given) > 1:
            raise BadJournal("the answer to a request without stream is taken once, at its end")

    async def _give(self, rid: str, record: Record, given: list[list[Row]], on_taken: "_Notes") -> None:
        state = self._tm.rid_to_state.get(rid)
        try:
            tokens = 0
            for portion in given:
                for row in portion:
                    tokens += len(row.token_ids)
                    record.cached_tokens = row.cached_tokens
                    await self._tm._handle_batch_output(as_output(row, rid, tokens))
                while getattr(state.obj, "stream", False) and not on_taken.happened.is_set():
                    if not self._is_open(rid, state):  # at its end, or its client has left
                        return
                    await _wait(on_taken.happened)
                on_taken.happened.clear()
            while self._is_open(rid, state) and not await self._reseeded(rid, record, state):
                pass
        except Exception as error:  # what SGLang makes of rows that no server wrote
            log.exception("anchortp: a request cannot go on from its journal")
            if self._is_open(rid, state):
                self._finish(rid, f"the journal is unfit: {type(error).__name__}: {error}", 400)
            return
        if self._is_open(rid, state):
            self._tasks.pop(rid, None)
            self._resume(rid, record)

    def _is_open(self, rid: str, state: Any) -> bool:
        return state is not None and self._tm.rid_to_state.get(rid) is state

    async def _reseeded(self, rid: str, record: Record, state: Any) -> bool:
        assert self.reseed is not None
        try:
            await self.reseed(reseed_of([(rid, record, state)]))
        except TimeoutError:  # it is replaced if it stays silent
            return False
        return True


class _Notes:
    """Notes what a consumer takes; not the first ``known`` times, which the journal that was given has already."""

    def __init__(self, journal: Journal, number: int, state: Any, known: int) -> None:
        self._journal = journal
        self._number = number
        self._state = state
        self._known = known
        self.happened = asyncio.Event()

    def __call__(self) -> None:
        self.happened.set()
        if self._known:
            self._known -= 1
        else:
            self._journal.taken(self._number, len(self._state.output_ids), bool(self._state.finished))


async def _wait(event: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(event.wait(), _LOOK_EVERY_S)
    except TimeoutError:
        pass
