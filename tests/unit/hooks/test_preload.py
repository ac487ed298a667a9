"""Which of SGLang's model modules a start leaves out."""

import os
from pathlib import Path

import pytest

from anchortp_sglang.hooks import preload
from anchortp_sglang.startup import preflight

VARIABLE = "SGLANG_DISABLED_MODEL_ARCHS"


@pytest.fixture
def without(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    os.environ.pop(VARIABLE, None)


def test_all_modules_but_the_models_own_are_left_out(without):
    preload.leave_out_other_models(["Qwen3ForCausalLM"])
    left_out = os.environ[VARIABLE].split(",")
    assert len(left_out) > 150
    assert "qwen3" not in left_out and "registry" not in left_out
    assert {"llama", "qwen3_moe", "deepseek_v2", "gemma4_text"} <= set(left_out)


def test_a_model_of_this_package_is_imported_alone(without):
    preload.leave_out_other_models(["Gemma4TextForCausalLM"])
    left_out = set(os.environ[VARIABLE].split(","))
    assert "gemma4_text" not in left_out and {"qwen3", "gemma4_mm"} <= left_out


@pytest.mark.parametrize("unknown", [[], ["NoSuchModelForCausalLM"]])
def test_nothing_is_left_out_for_a_model_that_is_not_known(without, unknown):
    preload.leave_out_other_models(unknown)
    assert VARIABLE not in os.environ


def test_what_the_operator_left_out_stays(without, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mixtral")
    preload.leave_out_other_models(["Qwen3ForCausalLM"])
    assert os.environ[VARIABLE] == "mixtral"


def test_architectures_come_from_the_checkpoint(tmp_path):
    (Path(tmp_path) / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert preflight.architectures({"model_path": str(tmp_path)}) == ["Qwen3ForCausalLM"]
    assert preflight.architectures({"model_path": str(tmp_path / "nowhere")}) == []
    assert preflight.architectures({}) == []
