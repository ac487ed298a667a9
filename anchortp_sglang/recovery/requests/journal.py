"""The journal of an HTTP request: what came for its client, so that another server can go on from there.

A request asks TokenizerManager (TM) for one or more generations; they are numbered in the order in which TM sends them
to the ranks, which is the same each time (with n > 1 the first ones only warm the prefix cache). Of each the journal
has, in order, the rows that the detokenizer sent for it, and how far its consumer, the HTTP handler, had read when it
took what was there. A handler is a function of what it takes and when, so one that is given the same again writes the
same messages again, parsers of tool calls and reasoning included.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

Values = list[float | None]
Indices = list[int | None]


class Logprobs(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """New logprobs of a row, by SGLang's names (``BatchStrOutput``)."""

    input_token_logprobs_val: Values | None = None
    input_token_logprobs_idx: Indices | None = None
    output_token_logprobs_val: Values | None = None
    output_token_logprobs_idx: Indices | None = None
    input_top_logprobs_val: list[Values | None] | None = None
    input_top_logprobs_idx: list[Indices | None] | None = None
    output_top_logprobs_val: list[Values | None] | None = None
    output_top_logprobs_idx: list[Indices | None] | None = None
    input_token_ids_logprobs_val: list[Values | None] | None = None
    input_token_ids_logprobs_idx: list[Indices | None] | None = None
    output_token_ids_logprobs_val: list[Values | None] | None = None
    output_token_ids_logprobs_idx: list[Indices | None] | None = None


_LOGPROBS = Logprobs.__struct_fields__
_NOT_KEPT = ("output_hidden_states", "output_token_sampling_mask", "input_top_logprobs_val_flat", "customized_info")


class Row(msgspec.Struct, tag="row", tag_field="kind", omit_defaults=True, forbid_unknown_fields=True):
    """New tokens of generation ``of``, their text, and the counts that came with them."""

    of: int
    token_ids: list[int] = []
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    retractions: int = 0
    dp_rank: int | None = None
    cached_tokens_details: dict[str, int | str] | None = None
    logprobs: Logprobs | None = None
    weight_versions: list[tuple[str, int, int]] | None = None
    finish_reason: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.of < 0 or any(token < 0 for token in self.token_ids):
            raise ValueError("numbers of generations and tokens are not negative")
        given = None if self.logprobs is None else self.logprobs.output_token_logprobs_val
        if given is not None and len(given) != len(self.token_ids):
            raise ValueError(f"a row of {len(self.token_ids)} tokens has {len(given)} logprobs")


class Taken(msgspec.Struct, tag="taken", tag_field="kind", omit_defaults=True, forbid_unknown_fields=True):
    """The consumer of generation ``of`` took what there was: ``tokens`` since its beginning, and the end or not."""

    of: int
    tokens: int
    finished: bool = False


Entry = Row | Taken


class BadJournal(ValueError):
    """A journal that contradicts itself or the request that it came with."""


class TakenEvent(asyncio.Event):
    """The event of a ReqState, whose consumer clears it when it takes what there is (``_stream_one_response``)."""

    def __init__(self, on_taken: Callable[[], None]) -> None:
        super().__init__()
        self._on_taken = on_taken

    def clear(self) -> None:
        super().clear()
        self._on_taken()


class Journal:
    """The journal of one HTTP request. ``given``: what another server wrote of it, for this one to go on from.

    ``fresh``: entries that have not been handed out. ``broken``: why no other server could go on from it, or None.
    ``given_up``: why this server does not serve the request to its end, though another may; or None.
    """

    def __init__(self, given: Sequence[Entry] = ()) -> None:
        self._given: dict[int, list[Entry]] = {}
        for entry in given:
            self._given.setdefault(entry.of, []).append(entry)
        self._generations = 0
        self.fresh: list[Entry] = []
        self.broken: str | None = None
        self.given_up: str | None = None

    def begin(self) -> tuple[int, list[Entry]]:
        """Take in the next generation; return its number and what was given of it."""
        number = self._generations
        self._generations += 1
        return number, self._given.pop(number, [])

    def add(self, number: int, output: Any, row: int) -> None:
        """Note row ``row`` of a batch (BatchStrOutput), before TM takes it. Raises nothing: TM's loop would end."""
        try:
            self.broken = self.broken or _why_not_kept(output, row)
            if self.broken is None:
                self.fresh.append(_row_of(number, output, row))
        except Exception as error:
            self.broken = f"a row could not be kept: {type(error).__name__}: {error}"

    def taken(self, number: int, tokens: int, finished: bool) -> None:
        """Note that the consumer of a generation took all that there was: ``tokens`` since its beginning."""
        self.fresh.append(Taken(of=number, tokens=tokens, finished=finished))

    def take(self) -> list[Entry]:
        """Hand out the fresh entries."""
        fresh, self.fresh = self.fresh, []
        return fresh


current: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The journal of the HTTP request that this task serves, if its sender asked for one."""


def portions(entries: Sequence[Entry]) -> list[list[Row]]:
    """Return the rows of one generation as its consumer took them; last those that it had not taken, if any.

    Raises BadJournal if it would have taken nothing, or something after the end.
    """
    rows = [entry for entry in entries if isinstance(entry, Row)]
    if any(row.finish_reason for row in rows[:-1]):
        raise BadJournal("the journal goes on after a finish_reason")
    made: list[list[Row]] = []
    tokens = at = 0
    for taken in (entry for entry in entries if isinstance(entry, Taken)):
        portion: list[Row] = []
        while at < len(rows) and _is_in(rows[at], taken, tokens):
            tokens += len(rows[at].token_ids)
            portion.append(rows[at])
            at += 1
        if not portion or tokens != taken.tokens or taken.finished != (portion[-1].finish_reason is not None):
            raise BadJournal(f"the journal's rows do not end where {taken.tokens} tokens were taken")
        made.append(portion)
    return [*made, rows[at:]] if at < len(rows) else made


def _is_in(row: Row, taken: Taken, tokens: int) -> bool:
    ends_too_early = row.finish_reason is not None and not taken.finished
    return tokens + len(row.token_ids) <= taken.tokens and not ends_too_early


def _why_not_kept(output: Any, row: int) -> str | None:
    if not hasattr(output, "output_strs"):
        return "the server sends no text (--skip-tokenizer-init)"
    for name in (
        "output_hidden_states",
        "output_token_sampling_mask",
        "input_top_logprobs_val_flat",
        "customized_info",
    ):
        value = getattr(output, name, None)
        value = _at(value, row) if isinstance(value, list) else value
        if value is not None and not (isinstance(value, list) and not value):
            return f"journals do not keep {name}"
    return None


def _at(values: Any, row: int) -> Any:
    return values[row] if values and row < len(values) else None


def _row_of(number: int, output: Any, row: int) -> Row:
    logprobs = {name: _plain(_at(getattr(output, name), row)) or None for name in _LOGPROBS}
    spans = _at(output.weight_versions, row)
    return Row(
        of=number,
        token_ids=list(output.output_ids[row]),
        text=output.output_strs[row],
        prompt_tokens=output.prompt_tokens[row],
        cached_tokens=output.cached_tokens[row],
        reasoning_tokens=output.reasoning_tokens[row],
        retractions=_at(output.retraction_counts, row) or 0,
        dp_rank=_at(output.dp_ranks, row),
        cached_tokens_details=_at(output.cached_tokens_details, row),
        logprobs=Logprobs(**logprobs) if any(value is not None for value in logprobs.values()) else None,
        weight_versions=None if spans is None else [(span.version, span.start, span.end) for span in spans],
        finish_reason=output.finished_reasons[row],
    )


def _plain(value: Any) -> Any:
    """Return a value of logprobs as lists, whatever arrays or tuples SGLang has."""
    if value is None or isinstance(value, (int, float)):
        return value
    return [_plain(one) for one in value]


def as_output(row: Row, rid: str, completion_tokens: int) -> Any:
    """Return a row as the batch (BatchStrOutput) in which it came, for request ``rid``."""
    from sglang.srt.managers.io_struct import BatchStrOutput
    from sglang.srt.utils.weight_versions import WeightVersionSpan

    spans = row.weight_versions and [WeightVersionSpan(version=v, start=a, end=b) for v, a, b in row.weight_versions]
    # A row without logprobs of some kind was in a batch that had others with them.
    logprobs = {name: [getattr(row.logprobs, name, None)] for name in _LOGPROBS}
    for name in _LOGPROBS:
        if "_top_" in name or "_ids_" in name:
            logprobs[name] = [logprobs[name][0] or []]
    return BatchStrOutput(
        rids=[rid],
        finished_reasons=[row.finish_reason],
        output_strs=[row.text],
        output_ids=[row.token_ids],
        prompt_tokens=[row.prompt_tokens],
        completion_tokens=[completion_tokens],
        reasoning_tokens=[row.reasoning_tokens],
        cached_tokens=[row.cached_tokens],
        retraction_counts=[row.retractions],
        dp_ranks=[row.dp_rank],
        weight_versions=[spans],
        cached_tokens_details=[row.cached_tokens_details],
        output_token_entropy_val=None,
        output_token_sampling_mask=None,
        output_hidden_states=None,
        routed_experts=None,
        indexer_topk=None,
        placeholder_tokens_idx=None,
        placeholder_tokens_val=None,
        **logprobs,
    )
