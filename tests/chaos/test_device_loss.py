"""Devices die one after the other; each time their bytes are gone, and no client loses a token.

The rows of the model's matrices are pages: what a survivor has of them stays where it is.
"""

import os
import signal

import pytest
from faults import (
    assert_memory_is_gone,
    holders,
    is_gone,
    kill,
    kill_rank,
    kill_standby,
    lose_device,
    memfds_of,
    recovered,
    standing_by,
    weights_memory,
)
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request, until
from remains import Remains

from anchortp_sglang.testing.streams import Streams
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

REQUESTS = [request(prompt(1000 + seed, 40), 160) for seed in range(8)]


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("paged") / "qwen3", "qwen3", hidden_size=1024, head_dim=32)


@pytest.fixture(scope="module")
def shrinking(launch, paged):
    """A TP=4 server that loses a device in each of the tests below, which run in their order."""
    with launch(4, model=paged) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(shrinking):
    return Unbroken(shrinking)


def model_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def anchor_first(server, device):
    return lose_device(server, device, ("anchor_pid", "rank_pid"))


def rank_first(server, device):
    return lose_device(server, device, ("rank_pid", "anchor_pid"))


def in_a_recovery(server, device):
    """Another rank dies first; the device, as soon as its new rank has been forked."""
    kill_standby(server)  # its ranks would serve before the device could be lost
    first = kill_rank(server, 0)
    until(lambda: server.status()["generation"] > first.generation, "no rank was forked", poll_s=0)
    assert server.status()["state"] == "recovering"
    return lose_device(server, device)


LOSSES = [
    pytest.param(2, anchor_first, 3, id="4 to 3, the anchor dies first"),
    pytest.param(0, rank_first, 2, id="3 to 2, the rank dies first"),
    pytest.param(3, in_a_recovery, 1, id="2 to 1, in a recovery"),
]


@pytest.mark.parametrize(("device", "lose", "left"), LOSSES)
def test_a_lost_device_costs_its_bytes_but_no_token(shrinking, unbroken, paged, device, lose, left):
    expected = unbroken(REQUESTS)
    standing_by(shrinking, 0)
    with Streams(shrinking.url, REQUESTS) as streams:
        streams.wait_tokens(20)
        before = shrinking.status()["devices"][device]
        memory = memfds_of(before["anchor_pid"])
        owners = {before["anchor_pid"], before["rank_pid"], standing_by(shrinking, before["rank"])}
        assert holders(memory).keys() == owners, "others hold a device's memory"
        fault = lose(shrinking, device)
        record = recovered(shrinking, fault, "device")
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    status = shrinking.status()
    assert (status["state"], status["tp_size"]) == ("degraded", left)
    assert status["devices"][device]["state"] == "lost"
    assert is_gone(before["anchor_pid"])
    assert_memory_is_gone(memory)
    for survivor in status["devices"]:
        if survivor["state"] == "serving":
            taken = weights_memory(survivor["anchor_pid"])
            assert 0.95 < taken / survivor["weight_bytes"] < 1.2, "old weights take memory besides the new ones"
    assert 0.9 * before["weight_bytes"] < record["reload_bytes"] < 1.1 * before["weight_bytes"]
    assert record["reload_bytes"] < model_bytes(paged)
    assert record["copied_bytes"] < 0.1 * model_bytes(paged), "what stays was copied"
    assert record["p2p_bytes"] < 0.1 * record["reload_bytes"], "more than the vocabulary's shifted rows"
    assert sum(d["weight_bytes"] for d in status["devices"]) >= model_bytes(paged) * 0.99


def test_what_stayed_in_old_segments_outlives_its_anchor_and_its_rank(shrinking, unbroken):
    expected = unbroken(REQUESTS)
    (device,) = [each for each in shrinking.status()["devices"] if each["state"] == "serving"]
    weights = weights_of(device["anchor_pid"])
    assert len(weights) > 1, "the last device's shard lies in a single segment"
    with Streams(shrinking.url, REQUESTS) as streams:
        streams.wait_tokens(10)
        kill(device["anchor_pid"])
        anchor = until(lambda: shrinking.status()["devices"][device["id"]]["anchor_pid"], "no new anchor")
        until(lambda: weights_of(anchor) == weights, "the new anchor did not take back all segments")
        streams.wait_tokens(30)
        recovered(shrinking, kill_rank(shrinking, 0), "process")
    assert_identical(expected, outcomes(streams.histories))
    record = shrinking.status()["recoveries"][-1]
    assert record["reload_bytes"] == 0
    assert record["tokens_reused"] > record["tokens_recomputed"]


def weights_of(anchor_pid):
    return {inode: name for inode, name in memfds_of(anchor_pid).items() if "weights-" in name}


def test_sigint_after_all_that_leaves_nothing_behind(shrinking):
    remains = Remains(shrinking)
    os.kill(shrinking.pid, signal.SIGINT)
    shrinking.wait(30)
    remains.assert_gone()
