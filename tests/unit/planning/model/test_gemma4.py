"""Gemma-4's config.json in the forms in which it is found, and what its layers keep."""

import json
from pathlib import Path
from typing import Any

import pytest

from anchortp_sglang.planning.layout.coverage import CoverageError, check_names
from anchortp_sglang.planning.layout.shards import sources
from anchortp_sglang.planning.model.axes import LayerKV, ModelAxes, UnsupportedModel, read_model_axes
from anchortp_sglang.planning.model.wrappers import language_model, shown_config
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, ownership_by_layer, split, validate
from anchortp_sglang.planning.placement.reconfiguration import rotating_axes

TEXT: dict[str, Any] = {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size": 512,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 2048,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 16,
    "vocab_size": 1024,
}
LARGE: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "eos_token_id": [1, 106],
    "text_config": TEXT,
    "vision_config": {"model_type": "gemma4_vision"},
}


def large(**changes: Any) -> ModelAxes:
    return read_model_axes(language_model(LARGE | {"text_config": TEXT | changes}))


def test_heads_with_a_window_are_dealt_with_their_query_heads_where_there_are_more_of_them() -> None:
    model = large()
    assert model.kv == (LayerKV("q_head", 16, 2 * 256), LayerKV("kv_head", 4, 2 * 512))
    assert (model.axes["q_head"], model.axes["kv_head"], model.heads_per_unit) == (16, 4, 2)
    eight = split(model, range(8))
    assert {eight.units("q_head", rank) for rank in range(8)} == {2}
    assert split(model, range(16)).tp_size == 16


def test_heads_of_one_number_are_dealt_alike_and_a_layer_that_reads_anothers_kv_has_none() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    shared = {"num_hidden_layers": 3, "layer_types": kinds, "num_kv_shared_layers": 1}
    model = large(attention_k_eq_v=False, num_key_value_heads=2, **shared)
    assert model.kv == (LayerKV("kv_head", 2, 512), LayerKV("kv_head", 2, 1024), None)
    assert model.heads_per_unit == 1
    assert (rotating_axes(model), rotating_axes(large())) == (("expert",), ("q_head", "kv_head", "expert"))


def test_what_transformers_saves_is_what_was_released(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    released = TEXT | {"num_hidden_layers": 12, "layer_types": TEXT["layer_types"] * 6}
    transformers.Gemma4Config(text_config=released, audio_config=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["per_layer_config"].keys() >= {"01", "11"}
    assert read_model_axes(language_model(LARGE | saved)) == large(**released)


def test_unified_models_have_no_inputs_of_layers() -> None:
    text = {key: value for key, value in TEXT.items() if key != "hidden_size_per_layer_input"}
    unified = {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "model_type": "gemma4_unified"}
    config = LARGE | unified | {"text_config": text}
    assert read_model_axes(language_model(config)) == large()
    shown = shown_config(config)
    assert shown["model_type"] == "gemma4_unified"
    assert read_model_axes(language_model(shown)) == large()
    assert read_model_axes(language_model(LARGE | {"text_config": text})) != large()


def test_what_the_operator_changes_reaches_the_text_inside() -> None:
    rope = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    config = LARGE | {"text_config": TEXT | {"rope_parameters": rope, "use_bidirectional_attention": "all"}}
    changes = {"sliding_window": 128, "eos_token_id": 7, "use_bidirectional_attention": None}
    changes |= {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}
    shown = shown_config(config, changes)
    assert shown["text_config"]["sliding_window"] == 128
    assert shown["eos_token_id"] == language_model(shown)["eos_token_id"] == 7
    merged = rope | {"full_attention": {"rope_theta": 1e6, "rope_type": "yarn"}}
    assert shown["text_config"]["rope_parameters"] == merged


def test_only_a_layer_that_reads_anothers_kv_may_have_projections_that_nothing_uses() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2}
    model = large(attention_k_eq_v=False, **shared)
    names = [*sources(model), *(f"model.layers.{n}.self_attn.k_proj.weight" for n in (2, 3))]
    assert check_names(model, names) == tuple(sorted(names[-2:]))
    with pytest.raises(CoverageError, match=r"no place for: model.layers.1.self_attn.v_proj.weight"):
        check_names(large(), [*sources(large()), "model.layers.1.self_attn.v_proj.weight"])


def test_heads_of_layers_that_share_kv_may_not_differ_by_layer() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2, "num_key_value_heads": 4}
    model = large(attention_k_eq_v=False, **shared)
    alike = dict(split(model, (0, 1)).layouts[0])
    other = alike | {axis: tuple(reversed(alike[axis])) for axis in ("q_head", "kv_head")}
    with pytest.raises(InvalidOwnership, match="read the KV of earlier ones"):
        validate(model, ownership_by_layer((0, 1), [alike, alike, alike, other]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "only layers of full attention may differ"),
        ({"per_layer_config": {"1": {"num_attention_heads": 8}}}, "only layers of full attention may differ"),
        ({"per_layer_config": ["head_dim"]}, "cannot be served"),
        ({"use_bidirectional_attention": "all"}, "only causal attention"),
        ({"num_global_key_value_heads": 8, "num_key_value_heads": 4}, "have 4 KV heads, the others 8"),
        ({"num_hidden_layers": 3}, "layer_types names 2 layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be positive, but is None"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
        ({"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"]}, "is 1: those layers"),
        ({"num_kv_shared_layers": 0.5}, "num_kv_shared_layers is 0.5"),
        ({"hidden_size_per_layer_input": -1}, "positive hidden_size_per_layer_input"),
        ({"tie_word_embeddings": False}, "embedding for a head"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        large(**changes)


def test_images_may_see_later_ones_as_there_are_none() -> None:
    assert large(use_bidirectional_attention="vision") == large()


def test_sglang_is_shown_the_language_model_inside_and_reads_the_same_from_that() -> None:
    shown = shown_config(LARGE)
    assert (shown["architectures"], shown["model_type"]) == (["Gemma4TextForCausalLM"], "gemma4")
    assert shown["eos_token_id"] == [1, 106]
    assert "vision_config" not in shown
    assert language_model(shown) == language_model(LARGE)
    assert language_model(language_model(LARGE)) == language_model(LARGE)
    assert shown_config(shown) == shown


def test_a_checkpoint_of_text_alone_is_shown_inside_of_a_multimodal_one_too() -> None:
    alone = TEXT | {"architectures": ["Gemma4ForCausalLM"], "eos_token_id": [1, 106]}
    for config in (alone, {key: value for key, value in alone.items() if key != "model_type"}):
        shown = shown_config(config)
        assert (shown["model_type"], shown["text_config"]["num_attention_heads"]) == ("gemma4", 32)
        assert read_model_axes(language_model(shown)) == large()


@pytest.mark.parametrize("architectures", [None, [], "Gemma4ForCausalLM", [7]])
def test_a_config_that_names_no_architecture_is_refused_by_who_needs_one(architectures: Any) -> None:
    config = TEXT | {"architectures": architectures}
    assert shown_config(config) == config
    with pytest.raises(UnsupportedModel, match="architecture"):
        read_model_axes(config)


def test_experts_make_another_architecture() -> None:
    experts = {"enable_moe_block": True, "num_experts": 8, "moe_intermediate_size": 96}
    shown = shown_config(LARGE | {"text_config": TEXT | experts})
    assert shown["architectures"] == ["Gemma4TextMoeForCausalLM"]
    assert large(**experts).axes["expert_column"] == 96
