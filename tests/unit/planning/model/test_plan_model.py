import json
from math import prod
from typing import Any

import pytest
from places import CONFIGS
from plan_models import (
    BLOCK_FP8,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_70B,
    MIXTRAL_8X22B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    TENSOR_FP8,
    planned,
)
from planned_shards import check_bytes
from planning_cases import FAMILIES, MOE_FAMILIES, SHAPES, model

from anchortp_sglang.planning.layout.shards import sources
from anchortp_sglang.planning.model.axes import UnsupportedModel, has_experts, read_model_axes
from anchortp_sglang.planning.model.plan_model import plan_model, served_plan_model
from anchortp_sglang.planning.ownership.ownership import split


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize(
    ("published", "total_bytes"),
    [
        # metadata.total_size of the index on the hub, or twice the published number of parameters
        (LLAMA_70B, 141_107_412_992),
        (MIXTRAL_8X22B, 281_260_142_592),
        (QWEN3_30B_A3B, 61_064_245_248),
        (QWEN3_235B_A22B, 470_187_269_120),
        (DEEPSEEK_V2_LITE, 31_412_968_448),
    ],
)
def test_bytes_are_those_of_the_published_checkpoint(
    published: dict[str, Any], total_bytes: int, whole_experts: bool
) -> None:
    assert planned(published, whole_experts).total_bytes == total_bytes


def test_the_biases_of_gpt_oss_experts_weigh_twice_what_the_checkpoint_has() -> None:
    """SGLang keeps them in float32; the checkpoint has them in bfloat16."""
    gate_up_and_down = 32 * (2 * 2880 + 2880) * 24
    assert planned(GPT_OSS_20B).total_bytes == 41_829_514_368 + 2 * gate_up_and_down


def test_deepseek_v3_has_its_671_billion_parameters() -> None:
    axes = read_model_axes(DEEPSEEK_V3)
    weights = [prod(one.shape) for name, one in sources(axes).items() if not name.endswith("_scale_inv")]
    assert sum(weights) == 671_026_419_200


@pytest.mark.parametrize("vocab_size", [130, 4000, 20_000])
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("architecture", [*FAMILIES, "Gemma3ForCausalLM", "GptOssForCausalLM"])
def test_bytes_are_those_of_the_shards_vocabulary_padding_included(
    architecture: str, heads: tuple[int, int], vocab_size: int
) -> None:
    for whole_experts in (False, True) if architecture in (*MOE_FAMILIES, "GptOssForCausalLM") else (False,):
        axes = model(heads, architecture, whole_experts=whole_experts, vocab_size=vocab_size, attention_bias=True)
        for tp_size in (1, 2, 4, 5):
            check_bytes(axes, split(axes, range(tp_size)))


@pytest.mark.parametrize("published", [LLAMA_70B, MIXTRAL_8X22B, QWEN3_30B_A3B, DEEPSEEK_V2_LITE])
def test_bytes_of_published_models_are_those_of_their_shards_on_eight_devices(published: dict[str, Any]) -> None:
    axes = read_model_axes(published)
    check_bytes(axes, split(axes, range(8)))


def test_deepseek_heads_and_columns_are_cut_at_the_edges_of_scale_blocks() -> None:
    groups = planned(DEEPSEEK_V3).by_name
    assert groups["layers.5.q_head"].units == 64  # 192 rows a head: two heads are three blocks
    assert groups["layers.5.expert_column"].units == groups["layers.5.shared_expert"].units == 16
    assert groups["layers.0.mlp"].units == 144


def test_scales_of_whole_tensors_are_on_every_device() -> None:
    plain = planned(LLAMA_70B, dtype="float32").by_name["layers.0.replicated"].total_bytes
    scaled = planned(LLAMA_70B | {"quantization_config": TENSOR_FP8}, dtype="float32")
    scales_of_layer = 7 * 2 * 4  # a weight's and an input's
    assert scaled.by_name["layers.0.replicated"].total_bytes == plain + scales_of_layer


def test_latent_kv_is_replicated_and_no_axis() -> None:
    made = planned(DEEPSEEK_V2_LITE)
    assert sum(each.kv_bytes_per_token for each in made.replicated) == 27 * 576 * 2
    assert not any(each.kv_bytes_per_token or each.axis == "kv_head" for each in made.sharded)


def test_kv_heads_cost_a_key_and_a_value_each() -> None:
    made = planned(LLAMA_70B)
    assert sum(each.units * each.kv_bytes_per_token for each in made.sharded) == 80 * 8 * 2 * 128 * 2


def test_modules_that_are_not_converted_keep_their_dtype() -> None:
    quantization = BLOCK_FP8 | {"modules_to_not_convert": ["self_attn"]}
    groups = planned(LLAMA_70B | {"quantization_config": quantization}).by_name
    assert groups["layers.0.q_head"].unit_bytes == 2 * 128 * 8192 * 2
    assert groups["layers.0.mlp"].units == 28672 // 128


def test_float32_doubles_the_weights() -> None:
    assert planned(LLAMA_70B, dtype="float32").total_bytes == 2 * 141_107_412_992


@pytest.mark.parametrize("published", [QWEN3_30B_A3B, DEEPSEEK_V2_LITE])
@pytest.mark.parametrize("whole_experts", [False, True])
def test_what_a_server_cuts_has_the_same_bytes_for_all_layers_or_by_layer(
    published: dict[str, Any], whole_experts: bool
) -> None:
    axes = read_model_axes(published, whole_experts=whole_experts)
    whole = sum(each.total_bytes for each in plan_model(axes).sharded if each.axis != "vocab")
    for by_layer in ((), ("q_head", "kv_head", "expert"), axes.axes):
        made = served_plan_model(axes, by_layer)
        assert made.sharded_bytes == made.total_bytes == whole
        assert {each.axis for each in made.groups if each.layer is not None} == set(by_layer) & {
            each.axis for each in made.groups
        }


@pytest.mark.parametrize(
    "field, value",
    [("decoder_sparse_step", "x"), ("mlp_only_layers", 3), ("intermediate_size", None), ("num_experts_per_tok", {})],
)
def test_a_field_of_the_wrong_type_is_refused_and_not_a_crash(field: str, value: Any) -> None:
    for path in sorted(CONFIGS.glob("*.json")):
        damaged = json.loads(path.read_text()) | {field: value}
        try:
            read_model_axes(damaged, whole_experts=has_experts(damaged))
        except UnsupportedModel as error:
            assert str(error)
