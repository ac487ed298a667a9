"""A model with experts loses a rank, then a device: experts, or columns of them, move by the plan; no token is lost."""

import json
import shutil

import pytest
from faults import kill_rank, lose_device
from histories import Unbroken, prompt, request
from survival import survive

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

HOT = json.dumps(
    {"logical_count": [[50 if expert % 4 == layer % 4 else 1 for expert in range(16)] for layer in range(6)]}
)
REQUESTS = [request(prompt(3000 + seed, 40), 100) for seed in range(6)]


@pytest.fixture(scope="module")
def experts_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("experts") / "qwen3_moe", "qwen3_moe")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--load-format", "dummy"), id="columns, of random weights without a file"),
        pytest.param(("--ep-size", "3", "--init-expert-location", HOT), id="whole experts, hot ones apart"),
    ],
)
def test_a_killed_rank_and_a_lost_device_cost_no_token(launch, experts_checkpoint, tmp_path, flags):
    model = experts_checkpoint
    if "dummy" in flags:
        model = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    with launch(3, *flags, model=model) as server:
        expected = Unbroken(server)(REQUESTS)
        before = server.status()["devices"]
        process = survive(server, REQUESTS, expected, lambda: kill_rank(server, 1), "process")
        assert process["reload_bytes"] == 0
        device = survive(server, REQUESTS, expected, lambda: lose_device(server, 1), "device")
        assert 0.9 * before[1]["weight_bytes"] < device["reload_bytes"] < 1.1 * before[1]["weight_bytes"]
        left = server.status()
        assert (left["state"], left["tp_size"]) == ("degraded", 2)
        largest, smallest = (chosen(left["devices"][d]["weight_bytes"] for d in (0, 2)) for chosen in (max, min))
        assert largest < 1.1 * smallest
        survive(server, REQUESTS, expected, lambda: lose_device(server, 0), "device")
        assert server.status()["tp_size"] == 1
