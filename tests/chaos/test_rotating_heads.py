"""With --anchor-rotate-heads no device's KV is much larger than another's, whichever devices are lost."""

import pytest
from faults import kill_rank, lose_device
from histories import Unbroken, prompt, request
from survival import survive

REQUESTS = [request(prompt(5000 + seed, 40), 120) for seed in range(6)]
HEAD_DIM, LAYERS, KV_HEADS = 32, 6, 4


@pytest.fixture(scope="module")
def rotating(launch):
    with launch(4, "--anchor-rotate-heads") as server:
        yield server


@pytest.fixture(scope="module")
def expected(rotating):
    return Unbroken(rotating)(REQUESTS)


def kv_heads_of(status):
    """KV heads of each serving device, over all layers."""
    head_bytes = 2 * (status["kv"]["slots"] + 1) * HEAD_DIM * 4
    held = [device["kv_bytes"] / head_bytes for device in status["devices"] if device["state"] == "serving"]
    assert sum(held) == KV_HEADS * LAYERS
    return held


def test_each_loss_leaves_every_device_an_equal_share_of_the_kv(rotating, expected):
    status = rotating.status()
    assert kv_heads_of(status) == [6, 6, 6, 6]
    assert status["kv_capacity"]["slots_alike"] == status["kv_capacity"]["slots"], "four heads divide by four"
    for device, held in ((1, [8, 8, 8]), (0, [12, 12])):
        lost = next(each for each in rotating.status()["devices"] if each["id"] == device)
        record = survive(rotating, REQUESTS, expected, lambda device=device: lose_device(rotating, device), "device")
        assert 0.9 * lost["weight_bytes"] < record["reload_bytes"] < 1.1 * lost["weight_bytes"]
        assert record["p2p_bytes"] < 0.1 * record["reload_bytes"], "more than the vocabulary's shifted rows"
        assert kv_heads_of(rotating.status()) == held
        kv = rotating.status()["kv_capacity"]
        assert kv["rotating"] and kv["slots_rotating"] == kv["slots"]
        assert (kv["slots_alike"] < 0.75 * kv["slots"]) == (len(held) == 3), "two heads of every layer on one device"


def test_a_killed_rank_finds_its_kv_again(rotating, expected):
    record = survive(rotating, REQUESTS, expected, lambda: kill_rank(rotating, 1), "process")
    assert record["reload_bytes"] == 0
    assert record["tokens_reused"] > record["tokens_recomputed"]
