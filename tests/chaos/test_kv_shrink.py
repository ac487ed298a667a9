"""Devices of limited memory: with one of them less there are fewer KV slots, and no request fails for it."""

import json

import pytest
from faults import is_gone, kill, lose_device, recovered
from histories import Unbroken, assert_exactly_once, assert_identical, flush, outcomes, prompt, request, until

from anchortp_sglang.planning.layout.kv_layout import KVPlan, fit_slots
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.testing.streams import Streams

STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
SLOTS, SLOTS_OF_THREE = 3000, 1000
CACHED = prompt(1, 600)
RUNNING = [request(prompt(10 + seed, 60 + 40 * seed), 100) for seed in range(8)]
"""2,400 tokens in the end."""
DELIVERED = 40
LEAST_HELD = 60 + DELIVERED - 1
"""Tokens with KV that the shortest of them has at the fault."""


@pytest.fixture(scope="module")
def device_gib(checkpoint):
    """Memory with which four devices have ``SLOTS`` slots, three ``SLOTS_OF_THREE``, and two none."""
    model = read_model_axes(json.loads((checkpoint / "config.json").read_text()), "float32")
    four = split(model, (0, 1, 2, 3))
    three = reconfigure(model, four, (0, 1, 3))
    weights = max(shard_layout(model, three, rank).total_bytes for rank in range(3))
    slot_bytes = 2 * model.num_layers * 2 * model.head_dim * 4
    nbytes = weights + (SLOTS_OF_THREE + 1) * slot_bytes
    most = KVPlan(SLOTS, 1, 4)
    assert fit_slots(model, most, four, nbytes) == most
    assert fit_slots(model, most, three, nbytes).slots == SLOTS_OF_THREE
    with pytest.raises(InvalidOwnership):
        fit_slots(model, most, reconfigure(model, three, (0, 1)), nbytes)
    return repr((nbytes + 1) / 2**30)


@pytest.fixture(scope="module")
def started(launch, device_gib):
    arguments = ("--max-total-tokens", str(SLOTS), "--anchor-device-gib", device_gib)
    with launch(4, *arguments, env=STRICT) as server:
        yield server


@pytest.fixture
def limited(started):
    """All four devices serve, with an empty prefix cache."""
    started.post("/anchortp/reconfigure", {"devices": [0, 1, 2, 3]})
    flush(started)
    return started


def check(expected, streams):
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)


def test_with_fewer_slots_running_requests_keep_theirs_and_none_fails(limited):
    assert limited.status()["kv"]["slots"] == SLOTS
    expected = Unbroken(limited)(RUNNING)
    limited.post("/generate", request(CACHED, 4))
    with Streams(limited.url, RUNNING) as streams:
        streams.wait_tokens(DELIVERED)
        until(lambda: limited.status()["kv"]["mirror"]["coverage"] > 0.98, "the mirror does not keep up")
        recovered(limited, lose_device(limited, 2), "device")
    check(expected, streams)
    status = limited.status()
    record = status["recoveries"][-1]
    assert status["kv"]["slots"] == SLOTS_OF_THREE
    assert 0.9 * SLOTS_OF_THREE < record["kv"]["slots_kept"] <= SLOTS_OF_THREE
    assert record["kv"]["slots_dropped"] > 500, "of the cached prompt, which no running request shares"
    grown = limited.post("/anchortp/reconfigure", {"rejoin": [2]})
    assert grown["plan"]["kv_slots"] == [SLOTS_OF_THREE, SLOTS] and limited.status()["kv"]["slots"] == SLOTS
    # At least by the first to be taken up; those that wait for room lose what they had to those that run.
    assert record["tokens_reused"] >= LEAST_HELD


def test_a_kill_while_slots_are_renumbered_costs_no_token(limited):
    expected = Unbroken(limited)(RUNNING)
    with Streams(limited.url, RUNNING) as streams:
        streams.wait_tokens(DELIVERED)
        until(lambda: limited.status()["kv"]["mirror"]["coverage"] > 0.98, "the mirror does not keep up")
        fault = lose_device(limited, 2)
        until(lambda: limited.status()["generation"] > fault.generation, "no rank was forked", poll_s=0)
        status = limited.status()
        assert status["state"] == "recovering"
        victim = next(device["rank_pid"] for device in status["devices"] if device["rank"] == 1)
        kill(victim)
        limited.wait_serving(status["generation"] + 1)
    check(expected, streams)
    assert is_gone(victim)
    record = limited.status()["recoveries"][-1]
    assert limited.status()["kv"]["slots"] == SLOTS_OF_THREE
    assert 500 < record["kv"]["slots_kept"] <= SLOTS_OF_THREE
    assert record["tokens_reused"] >= LEAST_HELD


def test_devices_without_room_for_weights_and_kv_are_not_served_on(started):
    """The last test: three devices are left by the one before."""
    with Streams(started.url, RUNNING[:2]) as streams:
        streams.wait_tokens(5)
        lose_device(started, 0)
        until(lambda: started.status()["state"] == "down", "the server did not give up")
    for history in streams.histories:
        assert "has no room for KV" in f"{history.error} {history.finish_reason}"
