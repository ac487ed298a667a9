"""Journals: rows come again in the portions in which they were taken, and what contradicts itself is refused."""

from types import SimpleNamespace

import msgspec
import pytest
from open_requests import names, tokenized

from anchortp_sglang.http.journaled import BadRequest, parse
from anchortp_sglang.recovery.requests import journal
from anchortp_sglang.recovery.requests.journal import BadJournal, Entry, Journal, Row, Taken, as_output, portions

END = {"type": "length", "length": 3}


def row(*tokens, end=None):
    return Row(of=0, token_ids=list(tokens), text="x" * len(tokens), finish_reason=end)


def taken(tokens, finished=False):
    return Taken(of=0, tokens=tokens, finished=finished)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], []),
        ([row(1)], [[1]]),
        ([row(1), taken(1), row(2), taken(2)], [[1], [2]]),
        ([row(1), row(2, 3), taken(3), row(4)], [[1, 2, 3], [4]]),
        # A row that its consumer had not been given yet when it took the one before it
        ([row(1), row(2), taken(1), taken(2)], [[1], [2]]),
        ([row(1), taken(1), row(end=END), taken(1, True)], [[1], []]),
        ([row(1), row(end=END), taken(1), taken(1, True)], [[1], []]),
    ],
)
def test_rows_come_again_as_they_were_taken(entries, expected):
    assert [[token for one in portion for token in one.token_ids] for portion in portions(entries)] == expected


@pytest.mark.parametrize(
    "entries",
    [
        [taken(0)],
        [row(1), taken(2)],
        [row(1, 2), taken(1)],
        [row(1), taken(1), taken(1)],
        [row(1, end=END), row(2)],
        [row(1), taken(1, True)],
        [row(1, end=END), taken(1, False)],
    ],
)
def test_a_journal_that_contradicts_itself_is_refused(entries):
    with pytest.raises(BadJournal):
        portions(entries)


def test_a_row_that_went_out_and_came_in_is_the_batch_that_it_was():
    sent = as_output(row(7, 8), "a", 2)
    sent.output_token_logprobs_val, sent.output_token_logprobs_idx = [[-0.5, float("-inf")]], [[7, 8]]
    out = Journal()
    number, _ = out.begin()
    out.add(number, sent, 0)
    wire = msgspec.json.decode(msgspec.json.encode(out.take()), type=list[Entry])
    back = as_output(wire[0], "a", 2)
    assert out.broken is None
    assert back.output_token_logprobs_val == [[-0.5, None]]  # JSON has no infinity, and answers neither
    for name in ("rids", "output_strs", "output_ids", "completion_tokens", "cached_tokens", "finished_reasons"):
        assert getattr(back, name) == getattr(sent, name)


def test_what_a_journal_cannot_keep_breaks_it_and_raises_nothing():
    for output in (SimpleNamespace(), as_output(row(1), "a", 1)):
        kept = Journal()
        output.output_hidden_states = [[1.0]]
        kept.add(0, output, 0)
        assert kept.broken and not kept.take()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"path": "/generate"}',
        b'{"path": "/flush_cache", "body": {}}',
        b'{"path": "/generate", "body": {}, "journal": [{"kind": "row"}]}',
        b'{"path": "/generate", "body": {}, "journal": [{"kind": "row", "of": -1}]}',
        b'{"path": "/generate", "body": {}, "journal": [{"kind": "row", "of": 0, "token_ids": [-1]}]}',
        b'{"path": "/generate", "body": {}, "journal": [{"kind": "row", "of": 0, "token_ids": [1],'
        b' "logprobs": {"output_token_logprobs_val": []}}]}',
        b'{"path": "/generate", "body": {}, "more": 1}',
    ],
)
def test_a_body_that_is_none_is_refused_with_the_reason(body):
    with pytest.raises(BadRequest, match=r".{20}"):
        parse(body)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(600)], "the model's are below 512"),
        ([row(*range(9))], "max_new_tokens is 5"),
        ([row(1, 2), taken(2), row(3, 4), taken(4)], "without stream"),
        ([row(1), taken(2)], "do not end"),
    ],
)
def test_a_request_does_not_go_on_from_what_cannot_have_been_its_journal(inflight, manager, sent, rows, said):
    manager.open("a")
    manager.rid_to_state["a"].obj = SimpleNamespace(stream=False)
    manager.model_config = SimpleNamespace(vocab_size=512, context_len=64)
    request = tokenized("a")
    request.sampling_params.max_new_tokens = 5
    token = journal.current.set(Journal(rows))
    try:
        with pytest.raises(BadJournal, match=said):
            inflight.dispatch(request)
    finally:
        journal.current.reset(token)
    assert names(sent) == []
