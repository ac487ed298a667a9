"""Overrides of a model's config are applied, or refused before SGLang is imported."""

import json

import pytest

from anchortp_sglang.planning.model.axes import UnsupportedModel, read_model_axes
from anchortp_sglang.startup.preflight import check_model, read_config
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
        ('{"torch_dtype": "float16"}', "cannot change torch_dtype: use --dtype"),
        ("[1]", "takes a JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_others_are_refused(checkpoint, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_config(checkpoint, overrides)


def test_what_makes_a_model_unsupported_may_be_overridden(checkpoint, tmp_path):
    config = read_config(checkpoint) | {"use_sliding_window": True, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_model_axes(read_config(tmp_path, '{"use_sliding_window": false}'))
    with pytest.raises(UnsupportedModel):
        read_model_axes(read_config(tmp_path))


def test_they_are_refused_before_sglang_is_imported(checkpoint):
    given = {"model_path": str(checkpoint), "json_model_override_args": '{"num_hidden_layers": 2}'}
    with pytest.raises(ValueError, match="changes the shapes"):
        check_model(given)
