"""What clients do while the server recovers: new requests wait their turn, aborts take effect."""

import http.client
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import kill_rank, kill_standby, recovered
from histories import (
    assert_identical,
    flush,
    outcomes,
    prompt,
    request,
    until,
)

from anchortp_sglang.testing.streams import Streams

RUNNING = [request(prompt(500 + seed, 25), 100) for seed in range(4)]
ARRIVING = [request(prompt(600 + seed, 128), 20) for seed in range(4)]
ENDLESS = 6000
"""Tokens of a request that would run for a minute if its abort were lost."""


def is_recovering(server):
    return server.status()["state"] == "recovering"


def outage(server, rank=1):
    """Kill a rank and wait until the server knows. Without a standby the outage is long enough to send requests."""
    kill_standby(server)
    fault = kill_rank(server, rank)
    until(lambda: is_recovering(server), "no recovery began", poll_s=0)
    return fault


def test_requests_that_arrive_in_an_outage_are_served_in_their_order(server, unbroken):
    """Each prompt fills a chunk of prefill, so the order of first tokens is the order of service."""
    expected = unbroken(RUNNING + ARRIVING)
    with Streams(server.url, RUNNING) as running:
        running.wait_tokens(10)
        fault = outage(server)
        arriving = [Streams(server.url, [one]) for one in ARRIVING]
        for stream in arriving:
            stream.__enter__()
            assert is_recovering(server), "the outage was over before all requests had arrived"
            assert is_recovering(server)  # twice round the event loop: the request has been taken up
        recovered(server, fault, "process")
        histories = [stream.wait()[0] for stream in arriving]
    assert_identical(expected, outcomes([*running.histories, *histories]))
    first_tokens = [history.arrivals[0][0] for history in histories]
    assert first_tokens == sorted(first_tokens)
    assert min(first_tokens) > fault.dead_at


BATCHES = {
    "texts": lambda requests: {"text": ["hello world", "once upon a time"]},
    "input_ids": lambda requests: {"input_ids": [request["input_ids"] for request in requests]},
    "n": lambda requests: {"input_ids": requests[0]["input_ids"], "n": 2},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_that_arrive_in_an_outage_are_answered(server, unbroken, kind):
    body = BATCHES[kind](ARRIVING) | {"sampling_params": {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}}
    body["sampling_params"] |= {"n": n} if (n := body.pop("n", None)) else {}
    expected = [answer["output_ids"] for answer in server.post("/generate", body)]
    running = unbroken(RUNNING)
    with Streams(server.url, RUNNING) as streams, ThreadPoolExecutor() as pool:
        streams.wait_tokens(10)
        fault = outage(server)
        posted = pool.submit(server.post, "/generate", body)
        until(lambda: server.status(), "no status")
        assert is_recovering(server), "the outage was over before the batch had arrived"
        record = recovered(server, fault, "process")
        assert [answer["output_ids"] for answer in posted.result(60)] == expected
    assert record["requests_replayed"] == len(RUNNING)
    assert_identical(running, outcomes(streams.histories))


def test_an_abort_in_an_outage_ends_its_request_and_no_other(server, unbroken):
    expected = unbroken(RUNNING)
    victim = request(prompt(700, 25), ENDLESS) | {"rid": "victim"}
    with Streams(server.url, [*RUNNING, victim]) as streams:
        streams.wait_tokens(10)
        fault = outage(server, rank=0)
        abort(server, "victim")
        aborted = streams.histories[-1]
        until(lambda: aborted.done, "the aborted request did not end", timeout_s=5)
        assert is_recovering(server), "the abort waited for the recovery"
        record = recovered(server, fault, "process")
    assert aborted.finish_reason["type"] == "abort"
    assert record["requests_replayed"] == len(RUNNING)
    assert_identical(expected, outcomes(streams.histories[:-1]))


def test_a_request_aborted_in_the_outage_it_arrived_in_never_runs(server, unbroken):
    expected = unbroken(RUNNING)
    victim = request(prompt(701, 25), ENDLESS) | {"rid": "latecomer"}
    with Streams(server.url, RUNNING) as running:
        running.wait_tokens(10)
        fault = outage(server)
        with Streams(server.url, [victim]) as late:
            assert is_recovering(server)
            assert is_recovering(server)
            abort(server, "latecomer")
        recovered(server, fault, "process")
    assert late.histories[0].finish_reason["type"] == "abort"
    assert late.histories[0].output_ids == []
    assert_identical(expected, outcomes(running.histories))
    flush(server)  # would wait for a request that still ran


def abort(server, rid):
    body = json.dumps({"rid": rid}).encode()
    post = urllib.request.Request(f"{server.url}/abort_request", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=10) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_a_client_that_leaves_in_an_outage_takes_its_request_along(server, unbroken, stream):
    expected = unbroken(RUNNING)
    leaver = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps(request(prompt(702, 25), ENDLESS) | {"stream": stream})
    leaver.request("POST", "/generate", body, {"Content-Type": "application/json"})
    with Streams(server.url, RUNNING) as streams:
        streams.wait_tokens(10)
        fault = outage(server)
        leaver.close()
        recovered(server, fault, "process")
    assert_identical(expected, outcomes(streams.histories))
    began = time.monotonic()
    flush(server)
    assert time.monotonic() - began < 10, "the request went on without its client"


PENALTIES = (
    {"frequency_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
)


def penalized(unbroken):
    plain = [request(prompt(800 + seed, 20), 100) for seed in range(4)]
    requests = [request(one["input_ids"], 100, **PENALTIES[n]) for n, one in enumerate(plain)]
    for number, (one, other) in enumerate(zip(unbroken(plain), unbroken(requests), strict=True)):
        assert one.output_ids != other.output_ids, f"{PENALTIES[number]} does nothing"
    return requests


def stopped_by_a_string(unbroken):
    plain = [request(prompt(820 + seed, 20), 100) for seed in range(2)]
    texts = [one.text for one in unbroken(plain)]
    requests = [request(prompt(820 + seed, 20), 100, stop=[stop_in(text)]) for seed, text in enumerate(texts)]
    assert all(40 < len(one.output_ids) < 100 for one in unbroken(requests)), "the stop strings do not stop"
    return requests


def stop_in(text):
    """Two printable characters that come first in the last part of ``text``."""
    for start in range(len(text) * 3 // 5, len(text) - 2):
        piece = text[start : start + 2]
        if piece.isprintable() and "�" not in piece and text.index(piece) == start:
            return piece
    raise AssertionError(f"no stop string in {text!r}")


STOPS = range(0, 480, 7)  # one of them comes soon, and would come too soon


def held_by_min_new_tokens(unbroken):
    plain = [request(prompt(840 + seed, 20), 100) for seed in range(2)]
    early = [one.output_ids[5] for one in unbroken(plain)]  # would stop at once
    requests = [
        request(prompt(840 + seed, 20), 100, min_new_tokens=60, stop_token_ids=[token, *STOPS], ignore_eos=False)
        for seed, token in enumerate(early)
    ]
    assert all(60 <= len(one.output_ids) < 100 for one in unbroken(requests)), "nothing stops after min_new_tokens"
    return requests


def test_penalties_stop_strings_and_min_new_tokens_count_the_tokens_from_before_the_kill(server, unbroken):
    """In one batch, next to requests without any."""
    plain = [request(prompt(860 + seed, 20), 100) for seed in range(2)]
    requests = [*penalized(unbroken), *stopped_by_a_string(unbroken), *held_by_min_new_tokens(unbroken), *plain]
    expected = unbroken(requests)
    with Streams(server.url, requests) as streams:
        streams.wait_tokens(30)
        recovered(server, kill_rank(server, 0), "process")
    assert_identical(expected, outcomes(streams.histories))
