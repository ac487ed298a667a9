"""Requests that compute the same tokens at the same time, each in slots of its own: after a kill all is used again."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import kill_rank, recovered
from histories import ask_at_once, assert_identical, flush, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

pytestmark = pytest.mark.overlap  # there, what is committed follows a step behind

FIRST_WORD = prompt(7, 1)
ALIKE = [[*FIRST_WORD, *prompt(100 + n, 20 + 3 * n)] for n in range(8)]
SYSTEM = prompt(1, 300)
CACHED = [[*SYSTEM, *prompt(200 + n, 16 + n)] for n in range(24)]
LONG = [request([*SYSTEM, *prompt(300 + n, 400)], 20) for n in range(4)]
"""Seven hundred tokens each, in chunks of 128."""


def used_slots(server):
    return server.status()["kv"]["used"]


def settled(server):
    """How many slots are in use, once nothing runs any more."""

    def unchanged():
        before = used_slots(server)
        time.sleep(0.05)
        return before == used_slots(server) and before

    return until(unchanged, "the server is not idle")


def tokens(answers):
    return [answer["output_ids"] for answer in answers]


def last_record(server):
    return server.status()["recoveries"][-1]


def test_one_batch_of_prompts_with_the_same_first_word_is_not_computed_again(server):
    flush(server)
    expected = tokens(ask_at_once(server, ALIKE, 120))
    flush(server)
    started = 1 + sum(len(ids) - 1 for ids in ALIKE) + len(ALIKE) * 20
    with ThreadPoolExecutor(1) as client:
        answers = client.submit(ask_at_once, server, ALIKE, 120)
        until(lambda: used_slots(server) > started, "the batch does not run")
        recovered(server, kill_rank(server, 1), "process")
        assert tokens(answers.result()) == expected
    record = last_record(server)
    assert record["tokens_recomputed"] <= len(ALIKE)
    assert record["tokens_reused"] >= sum(map(len, ALIKE)) - len(ALIKE)
    assert record["kv"]["slots_dropped"] == 0


def test_requests_that_begin_alike_at_once_are_not_computed_again_not_even_twice(server, unbroken):
    requests = [request(ids, 150) for ids in ALIKE]
    expected = unbroken(requests)
    with Streams(server.url, requests) as streams:
        for delivered in (30, 70):
            streams.wait_tokens(delivered)
            recovered(server, kill_rank(server, 0), "process")
    assert_identical(expected, outcomes(streams.histories))
    for record, delivered in zip(server.status()["recoveries"][-2:], (30, 70), strict=True):
        assert record["requests_replayed"] == len(requests)
        assert record["tokens_recomputed"] <= len(requests)
        assert record["tokens_reused"] >= sum(map(len, ALIKE)) + len(requests) * (delivered - 1)
        assert record["kv"]["slots_dropped"] == 0


def test_what_one_batch_left_in_the_cache_stays_there_through_two_kills(server):
    flush(server)
    ask_at_once(server, CACHED, 8)
    before = settled(server)
    assert before >= len(SYSTEM) + sum(len(ids) - len(SYSTEM) for ids in CACHED)
    for rank in (2, 0):
        recovered(server, kill_rank(server, rank), "process")
        kv = last_record(server)["kv"]
        assert (kv["slots_kept"], kv["slots_dropped"], used_slots(server)) == (before, 0, before)
    answers = ask_at_once(server, CACHED, 1)
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [len(ids) - 1 for ids in CACHED]


def test_finished_chunks_of_a_shared_prompt_are_kept(server, unbroken):
    expected = unbroken(LONG)
    with Streams(server.url, LONG) as streams:
        until(lambda: used_slots(server) > 900, "no chunks are computed", poll_s=0)
        finished = used_slots(server)
        recovered(server, kill_rank(server, 3), "process")
    assert_identical(expected, outcomes(streams.histories))
    record = last_record(server)
    assert record["kv"]["slots_dropped"] == 0
    assert record["kv"]["slots_kept"] >= finished
    prompts = sum(len(each["input_ids"]) for each in LONG)
    assert record["tokens_reused"] >= finished
    assert record["tokens_reused"] + record["tokens_recomputed"] >= prompts
