"""``anchortp parity`` with real servers: it compares, and it passes on why a model is refused."""

import json
import os
import subprocess
import sys

import pytest
from remains import Place

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

SHAPE = {"num_layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "qwen3", "qwen3", **SHAPE)


@pytest.fixture
def parity(model, tmp_path):
    """parity(*arguments): the ended command; nothing of its servers is left behind."""
    place = Place(tmp_path / "log")

    def run(*arguments, model=model):
        command = [sys.executable, "-m", "anchortp_sglang.cli", "parity", "--model", str(model), "--tp", "2"]
        return subprocess.run(
            [*command, *arguments], env=os.environ | place.env, capture_output=True, text=True, timeout=240
        )

    yield run
    assert place.leftovers() == []
    assert list(place.folder.glob("anchortp-parity-*")) == []
    place.remove()


def test_heads_that_rotate_answer_as_stock_before_and_after_a_lost_device(parity, tmp_path):
    """Four devices have one KV head each; of three, another one has two in each layer, and experts are dealt whole."""
    model = write_checkpoint(tmp_path / "moe", "qwen3_moe", num_layers=5)
    flags = ("--tp", "4", "--rotate-heads", "--lose", "1", "--experts", "ep", "--tokens", "32", "--json")
    done = parity(*flags, model=model)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and found["tolerance"] == 1e-4
    assert [each["when"] for each in found["rounds"]] == ["before loss", "after loss"]
    for each in found["rounds"]:
        prompts = each["prompts"]
        assert [one["prompt_tokens"] for one in prompts] == [1, 5, 33, 128, 300]
        assert [one["prefill"]["pairs"] for one in prompts] == [0, 4, 32, 127, 299]
        assert all(one["decode"]["pairs"] == 32 and one["distinct_tokens"] > 16 for one in prompts)
        assert any(one["prefill"]["max"] > 0 for one in prompts), "two different servers do not agree to the last bit"


def test_a_refused_model_is_told_with_the_reason(parity, model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["NobodyKnowsForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = parity(model=tmp_path)
    assert done.returncode == 2
    assert "cannot start: architecture NobodyKnowsForCausalLM" in done.stderr
    assert done.stdout == ""


def test_a_model_that_stock_cannot_serve_is_refused_before_anything_starts(parity, tmp_path):
    done = parity(model=write_checkpoint(tmp_path, "gemma4_text", num_layers=2))
    assert done.returncode == 2
    assert "there is nothing to compare with" in done.stderr
    assert done.stdout == ""
