"""What is refused before SGLang is imported: overrides of a model's config."""

import json

import pytest

from anchortp_sglang.startup.preflight import check_given, read_config
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("preflight") / "qwen3", "qwen3")


YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 4096}


def test_keys_that_change_no_shape_are_applied(checkpoint):
    config = read_config(checkpoint)
    assert read_config(checkpoint, json.dumps(YARN)) == config | YARN
    assert read_config(checkpoint, "{}") == config


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ('{"num_hidden_layers": 2}', "changes the shapes of parameters"),
        ('{"num_key_value_heads": 2}', "changes the shapes of parameters"),
        ('{"architectures": ["LlamaForCausalLM"]}', "cannot change architectures"),
        ('{"model_type": "llama"}', "cannot change model_type"),
        ("[1]", "takes a JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_others_are_refused(checkpoint, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_config(checkpoint, overrides)


def test_they_are_refused_before_sglang_is_imported(checkpoint):
    from anchortp_sglang.platforms.cpu.platform import CpuPlatform

    given = {"model_path": str(checkpoint), "json_model_override_args": '{"num_hidden_layers": 2}'}
    with pytest.raises(ValueError, match="changes the shapes"):
        check_given(given, CpuPlatform.rules)
