"""Families whose KV is of another kind lose a rank, then a device: what is kept is used again, and no token is lost."""

import pytest
from faults import kill_rank, lose_device
from histories import Unbroken, prompt, request
from survival import survive

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

REQUESTS = [request(prompt(5000 + seed, 90), 60) for seed in range(4)]


@pytest.mark.parametrize(
    ("family", "shape", "flags"),
    [
        pytest.param("deepseek_v3", {"num_layers": 3}, ("--ep-size", "3"), id="latents"),
        pytest.param("gemma3_text", {"num_layers": 6, "sliding_window": 64}, (), id="windows"),
    ],
)
def test_a_killed_rank_and_a_lost_device_cost_no_token(launch, tmp_path, family, shape, flags):
    model = write_checkpoint(tmp_path / family, family, **shape)
    with launch(3, *flags, model=model) as server:
        expected = Unbroken(server)(REQUESTS)
        process = survive(server, REQUESTS, expected, lambda: kill_rank(server, 1), "process")
        assert process["reload_bytes"] == 0
        assert process["tokens_reused"] >= len(REQUESTS) * 90
        device = survive(server, REQUESTS, expected, lambda: lose_device(server, 0), "device")
        assert server.status()["tp_size"] == 2
        if family == "deepseek_v3":  # each device has all latents, so none of them is lost
            assert device["kv"]["slots_restored"] == 0
            assert device["tokens_reused"] >= len(REQUESTS) * 90
