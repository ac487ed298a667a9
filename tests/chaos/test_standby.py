"""A whole generation that waits for a kill: it touches nothing before, takes over at once, and is soon there again."""

import re
from pathlib import Path

import psutil
import pytest
from faults import kill, kill_rank, recovered, standing_by
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(2700 + seed, 30), 110) for seed in range(4)]
BUILT = {"groups_ready", "weights_bound"}
"""Stages of a rank that is built after the fault."""
_MAPPING = re.compile(r"^\S+ (\S{4}) \S+ \S+ \d+ +/memfd:([a-z-]+)")


def ready(server):
    return [standing_by(server, rank) for rank in range(4)]


def stages(record):
    return {stage["name"] for rank in record["ranks"] for stage in rank["stages"]}


def check(expected, histories):
    assert_identical(expected, outcomes(histories))
    for history in histories:
        assert_exactly_once(history)


def writable(pid):
    """Names of the memfds that a process has mapped to write to."""
    found = map(_MAPPING.match, Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {match[2] for match in found if match and "w" in match[1]}


@pytest.mark.parametrize("schedule", ["plain", pytest.param("overlap", marks=pytest.mark.overlap)])
def test_a_kill_is_taken_over_by_what_stood_by_which_wrote_nothing_before(server, unbroken, schedule):
    expected = unbroken(REQUESTS)
    standing_by = ready(server)
    with Streams(server.url, REQUESTS) as streams:  # if the standby took requests, some of these would never end
        streams.wait_tokens(10)
        for pid in standing_by:
            assert writable(pid) == {"control-", "exits"}, "its own counters, and its zygote's record"
        record = recovered(server, kill_rank(server, 1), "process")
        assert not BUILT & stages(record), "ranks were built after the fault"
        serving = [device["rank_pid"] for device in server.status()["devices"]]
        assert serving == standing_by
        assert all("sglang::scheduler_TP" in " ".join(psutil.Process(pid).cmdline()) for pid in serving)
        assert "kv-" in writable(serving[1]) and "slot-table-" in writable(serving[0])
    check(expected, streams.histories)
    assert record["kv"]["slots_dropped"] == 0
    assert record["tokens_recomputed"] <= 2 * len(REQUESTS)
    assert not set(ready(server)) & set(serving)


def test_without_one_that_is_ready_a_kill_is_a_recovery_as_before(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        first = recovered(server, kill_rank(server, 2), "process")
        second = recovered(server, kill_rank(server, 3), "process")  # it is built a second after a recovery
        assert stages(second) >= BUILT and first["generation"] + 1 == second["generation"]
    check(expected, streams.histories)


def test_a_standby_that_dies_costs_no_client_anything_and_comes_back(server, unbroken):
    expected = unbroken(REQUESTS)
    standing_by = ready(server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        generation = server.status()["generation"]
        kill(standing_by[2])
        until(lambda: server.status()["standby"] == "failed", "its death was not noticed", 8)
        record = recovered(server, kill_rank(server, 1), "process")
        assert record["generation"] == generation + 1 and stages(record) >= BUILT
    check(expected, streams.histories)
    assert not set(ready(server)) & set(standing_by)


def test_what_a_standby_has_followed_of_the_slot_table_is_used(server):
    """It looks a few times a second, so a kill may come before the first look."""
    for _ in range(5):
        ready(server)
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(50)
            recovered(server, kill_rank(server, 2), "process")
        if "slots have changed since the slot table was looked at" in server.log.read_text(errors="replace"):
            return
    pytest.fail("no rank went on with what it had followed")
