"""What main remembers of open requests: values that nobody else can change, sent in the order of isolation."""

import asyncio
from types import SimpleNamespace

import pytest
from open_requests import dispatch, names, tokenized
from sglang.srt.managers.io_struct import AbortReq, BatchTokenizedGenerateReqInput, FlushCacheReqInput

from anchortp_sglang.recovery.requests.inflight import TokenCountMismatch
from anchortp_sglang.recovery.requests.isolation import PROOF_TOKENS, Evidence

SIGNAL = Evidence("signal", "a rank died")


class Unpicklable:
    def __reduce__(self):
        raise TypeError("raw time stats must not be sent")


def deliver(inflight, manager, rid, tokens):
    """A batch with new tokens of one request passes on its way to its client."""
    state = manager.rid_to_state[rid]
    count = len(state.output_ids) + len(tokens)
    output = SimpleNamespace(rids=[rid], completion_tokens=[count], output_ids=[tokens], cached_tokens=[2])
    fresh = inflight.delivered(output)
    state.output_ids += tokens
    inflight.forget([rid])
    return fresh


@pytest.mark.parametrize("outage", [False, True], ids=["before the outage", "in the outage"])
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_what_its_owner_does_to_a_message_later_is_not_what_is_replayed(inflight, manager, sent, batch, outage):
    """TokenizerManager puts raw time stats back into what it has dispatched, also into the items of a batch."""
    manager.open("a", "b")
    items = [tokenized("a", 1, 2), tokenized("b", 3, 4)]
    inflight.outage = outage
    for message in [BatchTokenizedGenerateReqInput(batch=items)] if batch else items:
        inflight.dispatch(message)
    for item in items:
        item.time_stats, item.input_ids[0] = Unpicklable(), 99
    if not outage:
        inflight.struck(SIGNAL)
        sent.clear()
    inflight.replay(1)
    kind = "TokenizedGenerateReqInput" if outage else "Resume"
    assert names(sent) == [("GenerationStart", None), (kind, "a"), (kind, "b")]
    assert [list(message.input_ids) for message in sent[1:]] == [[1, 2], [3, 4]]


def test_a_request_goes_on_after_the_tokens_that_its_client_has(inflight, manager, sent):
    dispatch(inflight, manager, "a")
    assert deliver(inflight, manager, "a", [7, 8]) == 2
    inflight.struck(SIGNAL)
    sent.clear()
    assert inflight.replay(1) == 1
    resume = sent[1]
    assert (resume.delivered, resume.cached_tokens, resume.stream) == ([7, 8], 2, True)


def test_a_batch_that_doubles_or_skips_tokens_is_found(inflight, manager):
    dispatch(inflight, manager, "a")
    for count in (0, 2):
        with pytest.raises(TokenCountMismatch):
            inflight.delivered(
                SimpleNamespace(rids=["a"], completion_tokens=[count], output_ids=[[5]], cached_tokens=[0])
            )


def test_what_waits_and_has_ended_without_a_word_is_not_sent(inflight, manager, sent):
    dispatch(inflight, manager, "old", "new")
    deliver(inflight, manager, "old", [1])
    inflight.struck(SIGNAL)
    inflight.replay(1)
    assert inflight.isolation.waiting == ["new"]
    del manager.rid_to_state["new"]
    sent.clear()
    deliver(inflight, manager, "old", [2])
    assert sent == [] and inflight.isolation.waiting == []


def test_requests_and_control_of_an_outage_follow_what_goes_on(inflight, manager, sent):
    dispatch(inflight, manager, "running")
    deliver(inflight, manager, "running", [1])
    inflight.struck(SIGNAL)
    inflight.dispatch(FlushCacheReqInput())
    dispatch(inflight, manager, "late")
    sent.clear()
    assert inflight.replay(1) == 1
    assert names(sent) == [("GenerationStart", None), ("Resume", "running"), ("FlushCacheReqInput", None)]
    sent.clear()
    deliver(inflight, manager, "running", [2])
    assert names(sent) == [("TokenizedGenerateReqInput", "late")]


def test_an_abort_ends_at_once_what_is_not_with_the_ranks_and_is_passed_on_for_the_rest(inflight, manager, sent):
    dispatch(inflight, manager, "old", "new")
    deliver(inflight, manager, "old", [1])
    inflight.struck(SIGNAL)
    inflight.replay(1)
    sent.clear()
    inflight.dispatch(AbortReq(rid="new"))
    assert list(manager.ended) == ["new"] and inflight.isolation.waiting == []
    inflight.dispatch(AbortReq(rid="old"))
    assert ("AbortReq", "old") in names(sent) and list(manager.ended) == ["new"]


def test_a_request_aborted_in_an_outage_before_it_came_is_dropped(inflight, manager, sent):
    inflight.struck(SIGNAL)
    manager.open("early")
    inflight.dispatch(AbortReq(rid="early"))
    inflight.dispatch(tokenized("early"))
    sent.clear()
    assert inflight.replay(1) == 0 and names(sent) == [("GenerationStart", None)]


def test_an_abort_that_ranks_took_to_their_grave_is_not_forgotten(inflight, manager, sent):
    dispatch(inflight, manager, "a1", "a2", "b")
    inflight.dispatch(AbortReq(rid="a"))  # a prefix, as SGLang takes it
    inflight.struck(SIGNAL)
    sent.clear()
    assert inflight.replay(1) == 1 and set(manager.ended) == {"a1", "a2"}


def test_tokens_are_reported_as_they_come_after_a_replay_whatever_the_interval_was(inflight, manager, sent):
    manager.open("a")
    request = tokenized("a")
    request.sampling_params.stream_interval = 1000
    inflight.dispatch(request)
    deliver(inflight, manager, "a", [7])
    inflight.struck(SIGNAL)
    sent.clear()
    inflight.replay(1)
    assert sent[1].sampling_params.stream_interval == 1


def test_a_health_check_is_ended_too(inflight, manager, sent):
    """TokenizerManager._handle_abort_req passes over them."""
    dispatch(inflight, manager, "HEALTH_CHECK_1")
    state = manager.rid_to_state["HEALTH_CHECK_1"]
    state.out_list, state.event = [], asyncio.Event()
    assert inflight.end_open("no luck") == 1
    assert manager.rid_to_state == {} and state.event.is_set()
    assert state.out_list[0]["meta_info"]["finish_reason"]["message"] == "no luck"


def test_of_a_batch_an_item_waits_while_a_suspect_is_tried(inflight, manager, sent):
    dispatch(inflight, manager, "bad")
    for generation in (1, 2):
        inflight.struck(SIGNAL)
        inflight.replay(generation)
    assert inflight.isolation.suspects == 1
    manager.open("a", "b")
    sent.clear()
    inflight.dispatch(BatchTokenizedGenerateReqInput(batch=[tokenized("a"), tokenized("b")]))
    assert sent == [] and inflight.isolation.waiting == ["a", "b"]
    deliver(inflight, manager, "bad", list(range(PROOF_TOKENS)))
    assert names(sent) == [("TokenizedGenerateReqInput", "a"), ("TokenizedGenerateReqInput", "b")]


def test_when_all_end_nothing_is_remembered_and_new_ones_are_taken(inflight, manager, sent):
    dispatch(inflight, manager, "a", "b")
    inflight.struck(SIGNAL)
    assert inflight.end_open("no luck") == 2
    assert {reason["message"] for reason in manager.ended.values()} == {"no luck"}
    assert inflight.replay(1) == 0
    sent.clear()
    dispatch(inflight, manager, "c")
    assert names(sent) == [("TokenizedGenerateReqInput", "c")]
