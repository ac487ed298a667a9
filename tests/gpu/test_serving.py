"""Real servers on one GPU: parity with stock, and faults under live streams."""

import os
import signal

import pytest
from faults import kill_rank, lose_device, recovered
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.bench.parity import compare_all, make_prompts, read_answer, verdict
from anchortp_sglang.bench.parity import request as parity_request
from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(seed, 40), 160) for seed in range(6)]
TOLERANCE = 1e-3  # of float32 on a GPU, whose matrix products may be taken in TF32
PROMPTS = make_prompts(500)


@pytest.fixture(scope="module")
def pair(launch):
    """Two devices on one GPU, as separate anchors, over gloo."""
    with launch(2) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(pair):
    return Unbroken(pair)


def answers(server):
    return [read_answer(one, server.post("/generate", parity_request(one, 48))) for one in PROMPTS]


def test_two_devices_answer_like_stock_on_one(stock, launch):
    with stock() as server:
        expected = answers(server)
    with launch(2) as server:
        outcome = verdict([compare_all("", expected, answers(server))], TOLERANCE)
    assert outcome.equal, outcome.text


def test_unequal_devices_answer_like_stock_on_one(stock, launch):
    with stock() as server:
        expected = answers(server)
    with launch(3, "--anchor-widths", "2,1,1") as server:
        outcome = verdict([compare_all("", expected, answers(server))], TOLERANCE)
    assert outcome.equal, outcome.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_no_token_and_moves_no_byte(pair, unbroken, rank):
    expected = unbroken(REQUESTS)
    with Streams(pair.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        record = recovered(pair, kill_rank(pair, rank), "process")
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    assert record["reload_bytes"] == record["p2p_bytes"] == record["copied_bytes"] == 0
    assert pair.status()["recoveries"][-1]["tokens_reused"] > 0


def test_an_anchor_killed_alone_interrupts_nobody(pair, unbroken):
    expected = unbroken(REQUESTS)
    before = pair.status()
    victim = before["devices"][0]["anchor_pid"]
    with Streams(pair.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        os.kill(victim, signal.SIGKILL)
        until(lambda: pair.status()["devices"][0]["anchor_pid"] not in (victim, None), "no new anchor")
    assert_identical(expected, outcomes(streams.histories))
    assert pair.status()["generation"] == before["generation"]


def test_a_lost_device_costs_no_token(pair, unbroken):
    """Last of the module: the server goes on with one device."""
    expected = unbroken(REQUESTS)
    with Streams(pair.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        record = recovered(pair, lose_device(pair, 1), "device")
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    assert record["reload_bytes"] > 0 and record["copied_bytes"] > 0
    assert pair.wait_serving(0)["tp_size"] == 1
