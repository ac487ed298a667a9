"""Families whose KV is of another kind lose a rank, then a device: what is kept is used again, and no token is lost.

ANCHORTP_KILLS=50 kills more often, at random moments.
"""

import json
import os
import random
import urllib.error

import pytest
from faults import kill_rank, lose_device
from histories import Unbroken, prompt, request
from survival import survive

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

REQUESTS = [request(prompt(5000 + seed, 90), 60) for seed in range(4)]
KILLS = int(os.environ.get("ANCHORTP_KILLS", "1"))
SEED = int(os.environ.get("ANCHORTP_SEED", "0"))
IMAGE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("family", "shape", "flags"),
    [
        pytest.param("deepseek_v3", {"num_layers": 3}, ("--ep-size", "3"), id="latents"),
        pytest.param("gemma3", {"num_layers": 6, "sliding_window": 64}, (), id="windows-of-a-multimodal-model"),
        pytest.param("gemma4", {"num_layers": 4, "sliding_window": 64}, (), id="heads-of-two-sizes"),
        pytest.param("gemma4_small", {"num_layers": 6, "sliding_window": 64}, (), id="layers-that-share-kv"),
        pytest.param("gemma4_sparse", {"num_layers": 4}, ("--ep-size", "3"), id="experts-beside-an-mlp"),
    ],
)
def test_a_killed_rank_and_a_lost_device_cost_no_token(launch, tmp_path, family, shape, flags):
    model = write_checkpoint(tmp_path / family, family, **shape)
    with launch(3, *flags, model=model) as server:
        expected = Unbroken(server)(REQUESTS)
        draw = random.Random(SEED)
        for _ in range(KILLS):
            moment, rank = draw.randrange(1, 40), draw.randrange(3)
            process = survive(server, REQUESTS, expected, lambda rank=rank: kill_rank(server, rank), "process", moment)
            assert process["reload_bytes"] == 0
            assert process["tokens_reused"] >= len(REQUESTS) * 90
        device = survive(server, REQUESTS, expected, lambda: lose_device(server, 0), "device")
        assert server.status()["tp_size"] == 2
        if family == "deepseek_v3":  # each device has all latents, so none of them is lost
            assert device["kv"]["slots_restored"] == 0
            assert device["tokens_reused"] >= len(REQUESTS) * 90
        if family in ("gemma3", "gemma4"):
            check_that_images_are_refused(server, model)


def check_that_images_are_refused(server, model):
    """By /generate and in chats, where texts are still served in parts; the model has the name of its own folder."""
    assert [one["id"] for one in server.get("/v1/models")["data"]] == [str(model)]
    assert "images" in refusal(server, "/generate", {"text": "a", "image_data": IMAGE})
    text = {"type": "text", "text": "What is this?"}
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    assert "image" in refusal(server, "/v1/chat/completions", chat(model, text, image))
    assert server.post("/v1/chat/completions", chat(model, text))["usage"]["completion_tokens"] == 4


def chat(model, *parts):
    return {"model": str(model), "max_tokens": 4, "messages": [{"role": "user", "content": list(parts)}]}


def refusal(server, path, body):
    """The text of the 400 that a call gets."""
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(path, body)
    assert error.value.code == 400
    return json.dumps(json.loads(error.value.read()))
