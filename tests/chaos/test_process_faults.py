"""A rank dies; its server goes on at the same width, and every stream gets every token once."""

import random
import re

import pytest
from faults import kill_rank, recovered
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

SHORT = [request(prompt(seed, 12 + 5 * seed), 120) for seed in range(8)]
LONG = [request(prompt(100 + seed, 700), 24) for seed in range(5)]

with_both_schedules = pytest.mark.parametrize("schedule", ["plain", pytest.param("overlap", marks=pytest.mark.overlap)])


def prefills(server, since):
    """How many prefill batches rank 0 has logged after the first ``since`` bytes of the log."""
    with server.log.open("rb") as log:
        log.seek(since)
        return len(re.findall(rb"Prefill batch", log.read()))


def in_prefill(server, streams, batches):
    """Wait for ``batches`` prefill batches of the streams just opened."""
    since = streams.opened_at
    until(lambda: prefills(server, since) >= batches, f"no {batches} prefill batches")


class LoggedStreams(Streams):
    """Streams that know where the server's log ended when they were opened."""

    def __init__(self, server, requests):
        super().__init__(server.url, requests)
        self.opened_at = server.log.stat().st_size


def check(expected, histories):
    assert_identical(expected, outcomes(histories))
    for history in histories:
        assert_exactly_once(history)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_killed_in_decode_costs_no_token(server, unbroken, rank):
    expected = unbroken(SHORT)
    with Streams(server.url, SHORT) as streams:
        streams.wait_tokens(10 + 20 * rank)
        fault = kill_rank(server, rank)
        record = recovered(server, fault, "process")
    check(expected, streams.histories)
    assert record["requests_replayed"] == len(SHORT)
    assert record["reload_bytes"] == record["p2p_bytes"] == record["copied_bytes"] == 0


@with_both_schedules
def test_kept_kv_is_used_again_after_a_rank_died(server, unbroken, schedule):
    expected = unbroken(SHORT)
    with Streams(server.url, SHORT) as streams:
        streams.wait_tokens(60)
        recovered(server, kill_rank(server, 2), "process")
    check(expected, streams.histories)
    record = server.status()["recoveries"][-1]
    assert 0 < record["tokens_recomputed"] <= len(SHORT)
    assert record["tokens_reused"] >= sum(len(each["input_ids"]) + 60 - 1 for each in SHORT)
    assert record["kv"]["slots_dropped"] == 0


@pytest.mark.parametrize("rank", [3])
def test_a_rank_killed_in_prefill_costs_no_token(server, unbroken, rank):
    expected = unbroken(SHORT)
    with LoggedStreams(server, SHORT) as streams:
        in_prefill(server, streams, 1)
        fault = kill_rank(server, rank)
        recovered(server, fault, "process")
    check(expected, streams.histories)


@with_both_schedules
@pytest.mark.parametrize("rank", [0])
def test_a_rank_killed_in_chunked_prefill_costs_no_token(server, unbroken, rank, schedule):
    """700 tokens a prompt in chunks of 128: after three chunks nobody has a token."""
    expected = unbroken(LONG)
    with LoggedStreams(server, LONG) as streams:
        in_prefill(server, streams, 3)
        fault = kill_rank(server, rank)
        recovered(server, fault, "process")
    check(expected, streams.histories)
    assert all(history.arrivals[0][0] > fault.dead_at for history in streams.histories)


@with_both_schedules
def test_kills_in_a_row_of_random_ranks_at_random_moments_cost_no_token(server, unbroken, seeds, schedule):
    kills, seed = seeds
    draw = random.Random(seed)
    for number in range(kills):
        long = draw.random() < 0.3
        requests = LONG if long else SHORT
        expected = unbroken(requests)
        with LoggedStreams(server, requests) as streams:
            moment = draw.randrange(20) if long else draw.randrange(100)
            if long:
                in_prefill(server, streams, moment + 1)
            else:
                streams.wait_tokens(moment)
            rank = draw.randrange(4)
            print(f"kill {number + 1}: rank {rank}, {'prefill batch' if long else 'token'} {moment}")
            recovered(server, kill_rank(server, rank), "process")
        check(expected, streams.histories)


def test_a_rank_killed_while_idle_is_replaced(server, unbroken):
    expected = unbroken(SHORT)
    record = recovered(server, kill_rank(server, 1), "process")
    assert record["requests_replayed"] == 0
    with Streams(server.url, SHORT) as streams:
        pass
    check(expected, streams.histories)
