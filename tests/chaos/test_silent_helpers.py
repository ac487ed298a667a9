"""Helpers that stop or die, alone and together with a rank: no client loses a token, no recovery waits for them."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from faults import child_named, is_gone, kill_rank, recovered, standing_by
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.recovery.processes.pidfd import process_state
from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(1500 + seed, 30), 110) for seed in range(4)]
RESUMED_S = 8.0
"""Helpers are looked after every five seconds."""
USUAL_S, HELPER_S = 3.0, 3.5
"""What a recovery takes on a busy machine, and what a helper may add to it."""


def spares_of(server):
    status = server.status()
    ranks = {device["rank_pid"] for device in status["devices"]}
    children = psutil.Process(child_named(server, "anchortp::zygote", grandchildren=False)).children()
    return [c.pid for c in children if c.pid not in ranks and "anchortp::zygote" in " ".join(c.cmdline())]


def a_spare(server):
    return until(lambda: len(spares_of(server)) == 3 and spares_of(server)[2], "no spare ranks were forked")


def a_standby(server):
    return standing_by(server, 2)


FIND = {
    "a spare rank": a_spare,
    "a rank of the standby": a_standby,
    "the zygote": lambda server: child_named(server, "anchortp::zygote", grandchildren=False),
    "the zygote in reserve": lambda server: until(lambda: reserves(server), "no zygote in reserve", 90)[0],
    "the detokenizer": lambda server: child_named(server, "sglang::detokenizer"),
    "a device's anchor": lambda server: server.status()["devices"][2]["anchor_pid"],
    "the host anchor": lambda server: host_anchor(server),
}


def reserves(server):
    children = psutil.Process(server.pid).children()
    return [child.pid for child in children if "anchortp::reserve" in " ".join(child.cmdline())]


def host_anchor(server):
    mine = f"--run-dir={server.place.folder}"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if "--device=-1" in arguments and any(a.startswith(mine) for a in arguments):
                found.append(process.pid)
    assert len(found) == 1, found
    return found[0]


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    until(lambda: process_state(pid) == "T", f"process {pid} was not stopped", poll_s=0)


HOLD = """
import os, signal, sys, time
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.0001)
"""


class Held:
    """A process that is stopped again whenever something lets it go on: as good as hung.

    By a process of its own: a thread would wait for this one's lock, and what is held would get on meanwhile.
    """

    def __init__(self, pid):
        self.pid = pid

    def __enter__(self):
        stop(self.pid)
        self._holder = subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(self.pid)], stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *error):
        self._holder.kill()
        self._holder.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)


def check(expected, histories):
    assert_identical(expected, outcomes(histories))
    for history in histories:
        assert_exactly_once(history)


@pytest.mark.parametrize("helper", FIND)
def test_a_stopped_helper_costs_no_client_a_token_alone_or_with_a_rank(server, unbroken, helper):
    expected = unbroken(REQUESTS)
    pid = FIND[helper](server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        generation = server.status()["generation"]
        stop(pid)
        streams.wait_tokens(30)
        assert server.status()["generation"] == generation, "it was not worth a recovery"
        stop(pid)
        began = time.monotonic()
        recovered(server, kill_rank(server, 1), "process")
        assert time.monotonic() - began < USUAL_S + HELPER_S
    check(expected, streams.histories)
    until(lambda: is_gone(pid) or process_state(pid) != "T", f"{helper} stands still", RESUMED_S)


@pytest.mark.parametrize("helper", ["the detokenizer", "a device's anchor", "the host anchor"])
def test_a_helper_that_answers_nothing_is_replaced_in_a_recovery(server, unbroken, helper):
    expected = unbroken(REQUESTS)
    pid = FIND[helper](server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        with Held(pid):
            began = time.monotonic()
            recovered(server, kill_rank(server, 1), "process")
            assert time.monotonic() - began < USUAL_S + HELPER_S
            assert is_gone(pid)
    check(expected, streams.histories)
    assert FIND[helper](server) != pid
    record = server.status()["recoveries"][-1]
    assert record["reload_bytes"] == 0 and record["kv"]["slots_dropped"] == 0, "its memory was lost"


@pytest.mark.parametrize("helper", ["the detokenizer", "the host anchor"])
def test_a_helper_killed_with_a_rank_is_one_recovery(server, unbroken, helper):
    expected = unbroken(REQUESTS)
    pid = FIND[helper](server)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        before = server.status()
        generation, pids = before["generation"], (before["devices"][1]["rank_pid"], pid)
        began = time.monotonic()
        for one in pids:
            os.kill(one, signal.SIGKILL)
        until(lambda: all(is_gone(one) for one in pids), "they are not dead")
        status = server.wait_serving(generation + 1)
        assert time.monotonic() - began < USUAL_S + HELPER_S
    check(expected, streams.histories)
    [record] = [one for one in status["recoveries"] if one["generation"] > generation]
    assert record["cause"] == "process" and not record["lost"]


def test_a_server_that_was_suspended_for_longer_than_the_hang_timeout_goes_on(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        before = server.status()
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        pids = [process.pid for process in tree] + [d["anchor_pid"] for d in before["devices"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: all(process_state(pid) == "T" for pid in pids), "not all are stopped")
        time.sleep(6)  # the hang timeout is four seconds
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    check(expected, streams.histories)
    after = server.status()
    assert after["generation"] == before["generation"]
