"""A paused server computes nothing, whatever happens to its ranks; told to continue, it goes on with every request."""

import pytest
from faults import kill_rank, recovered
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, stands_still, until

from anchortp_sglang.cli import client
from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(5100 + seed, 30), 90) for seed in range(3)]
LATER = [request(prompt(5110, 30), 40)]


@pytest.fixture(autouse=True)
def goes_on(server):
    yield
    client.tell(server.url, client.CONTINUE)


def counts(streams):
    return [len(history.output_ids) for history in streams.histories]


def assert_stands_still(streams):
    until(lambda: stands_still(streams), "tokens arrive")  # a step may have been under way
    assert stands_still(streams)


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [
        ("in_place", (1, 3, 0)),  # more faults than make a suspect of a request
        pytest.param("retract", (0,), marks=pytest.mark.overlap),
    ],
)
def test_a_pause_outlives_kills_and_costs_no_token(server, unbroken, mode, ranks):
    expected = unbroken(REQUESTS + LATER)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        for _ in range(2):  # asked twice, it is paused once
            client.tell(server.url, ("/pause_generation", {"mode": mode}))
        assert_stands_still(streams)
        for rank in ranks:
            recovered(server, kill_rank(server, rank), "process")
        status = server.status()
        assert status["paused"] and status["state"] == "serving" and status["suspects"] == 0
        with Streams(server.url, LATER) as later:
            assert_stands_still(streams)
            assert counts(later) == [0] and max(counts(streams)) < 90
            client.tell(server.url, client.CONTINUE)
            client.tell(server.url, client.CONTINUE)
    assert not server.status()["paused"]
    assert_identical(expected, outcomes(streams.histories + later.histories))
    for history in streams.histories + later.histories:
        assert_exactly_once(history)


def test_continued_in_an_outage_the_new_ranks_do_not_pause(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        client.tell(server.url, client.PAUSE)
        assert_stands_still(streams)
        fault = kill_rank(server, 0)
        client.tell(server.url, client.CONTINUE)
    recovered(server, fault, "process")
    assert_identical(expected, outcomes(streams.histories))


@pytest.mark.parametrize("paused", [False, True], ids=["while they run", "while they pause"])
def test_a_pause_that_aborts_ends_what_is_open_and_holds_what_comes(server, unbroken, paused):
    expected = unbroken(LATER)
    abort = ("/pause_generation", {"mode": "abort"})
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        if paused:
            client.tell(server.url, client.PAUSE)
        client.tell(server.url, abort)
        for history in streams.wait(10):
            assert history.finish_reason["type"] == "abort"
    with Streams(server.url, LATER) as later:
        assert_stands_still(later)
        client.tell(server.url, abort)  # what waits is not open
        recovered(server, kill_rank(server, 2), "process")
        assert_stands_still(later)
        assert counts(later) == [0]
        client.tell(server.url, client.CONTINUE)
        recovered(server, kill_rank(server, 1), "process")
    assert_identical(expected, outcomes(later.histories))
