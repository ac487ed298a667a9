"""The language model of a multimodal checkpoint, by its config.json and the names of its tensors."""

from typing import Any

import pytest

from anchortp_sglang.planning.model.axes import UnsupportedModel, read_model_axes
from anchortp_sglang.planning.model.wrappers import language_model, language_tensor

# As released, without what does not matter here.
GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
QWEN25_VL_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 1280},
    "vocab_size": 152064,
}


def test_sizes_that_a_text_config_leaves_out_are_those_of_transformers() -> None:
    model = read_model_axes(language_model(GEMMA3_4B))
    assert (model.architecture, model.dtype) == ("Gemma3ForCausalLM", "bfloat16")
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (8, 4, 256, 262208)


def test_the_wrappers_end_tokens_count_and_scaled_positions_stay() -> None:
    config = language_model(GEMMA3_4B)
    assert config["eos_token_id"] == [1, 106]
    assert config["rope_scaling"] == {"factor": 8.0, "rope_type": "linear"}
    assert "vision_config" not in config


def test_a_config_without_a_text_config_is_the_language_models_but_for_images() -> None:
    config = language_model(QWEN25_VL_7B)
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    assert config["rope_scaling"] is None
    assert not config.keys() & {"vision_config", "image_token_id"}
    assert read_model_axes(config).num_layers == 28


def test_positions_keep_what_is_not_of_images() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"rope_parameters": rope, "num_hidden_layers": 2}
    config = language_model({"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": text})
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e6}


def test_positions_of_images_that_are_scaled_are_refused() -> None:
    rope = {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}
    with pytest.raises(UnsupportedModel, match="yarn"):
        language_model(QWEN25_VL_7B | {"rope_scaling": rope})


def test_a_model_that_wraps_none_is_left_alone() -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "text_config": {}}
    assert language_model(config) == config


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.visual.merger.norm.weight", "model.visual.merger.norm.weight"),
    ],
)
def test_tensors_have_the_names_of_a_language_model(stored: str, own: str) -> None:
    assert language_tensor(stored) == own
