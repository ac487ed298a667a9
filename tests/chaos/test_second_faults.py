"""Faults while a recovery runs: it is planned again from what is left, and clients still get every token."""

import os
import signal

import psutil
import pytest
from faults import is_gone, kill, kill_rank, kill_standby
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(400 + seed, 40), 100) for seed in range(8)]


def recovering_with(server, generation):
    """The status once the ranks of a later generation run, but are not serving yet; None before."""
    status = server.status()
    assert status["state"] == "recovering", f"the recovery was over too soon: {status}"
    return status if status["generation"] > generation else None


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_killed_while_it_starts_is_replaced_again(server, unbroken, rank):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        kill_standby(server)
        first = kill_rank(server, 1)
        until(lambda: server.status()["state"] == "recovering", "no recovery began")
        status = until(lambda: recovering_with(server, first.generation), "no rank was forked", poll_s=0)
        pid = next(d["rank_pid"] for d in status["devices"] if d["rank"] == rank)
        kill(pid)
        after = server.wait_serving(status["generation"] + 1)
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    assert is_gone(pid)
    assert after["generation"] == first.generation + 2
    records = [r for r in after["recoveries"] if r["generation"] > first.generation]
    assert len(records) == 1, "two faults in one outage are one recovery"


def test_a_fault_right_after_the_first_token_is_a_recovery_of_its_own(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        first = kill_rank(server, 2)
        server.wait_serving(first.generation + 1)
        tokens = min(len(h.output_ids) for h in streams.histories)
        until(lambda: max(len(h.output_ids) for h in streams.histories) > tokens, "no token came")
        second = kill_rank(server, 2)
        after = server.wait_serving(second.generation + 1)
    assert_identical(expected, outcomes(streams.histories))
    assert second.generation == first.generation + 1
    assert [r["generation"] for r in after["recoveries"]][-2:] == [first.generation + 1, first.generation + 2]


def test_all_ranks_killed_at_once_are_one_recovery(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        status = server.status()
        pids = [d["rank_pid"] for d in status["devices"]]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(is_gone(pid) for pid in pids), "the ranks are not dead")
        after = server.wait_serving(status["generation"] + 1)
    assert_identical(expected, outcomes(streams.histories))
    assert after["generation"] == status["generation"] + 1


def test_a_killed_anchor_alone_interrupts_nobody(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        before = server.status()
        pid = before["devices"][1]["anchor_pid"]
        kill(pid)
        new = until(lambda: server.status()["devices"][1]["anchor_pid"], "no new anchor")
    assert_identical(expected, outcomes(streams.histories))
    assert psutil.pid_exists(new) and new != pid
    assert server.status()["generation"] == before["generation"]
