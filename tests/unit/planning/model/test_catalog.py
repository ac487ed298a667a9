import json
from math import prod
from typing import Any

import pytest
from places import CONFIGS
from plan_models import (
    BLOCK_FP8,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_45_AIR,
    GPT_OSS_20B,
    GPT_OSS_120B,
    LLAMA_70B,
    MIXTRAL_8X22B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    TENSOR_FP8,
)
from planning_cases import FAMILIES, SHAPES, config
from planning_cases import model as axes_of

from anchortp_sglang.planning.layout.shards import sources
from anchortp_sglang.planning.model.architectures import ARCHITECTURES
from anchortp_sglang.planning.model.axes import UnsupportedModel
from anchortp_sglang.planning.model.catalog import read_plan_model
from anchortp_sglang.planning.model.plan_model import AxisGroup, PlanModel


def group(model: PlanModel, name: str) -> AxisGroup:
    return model.by_name[name]


def index_of(model: PlanModel) -> dict[str, Any]:
    return {"weight_map": {name: "model.safetensors" for name, _, _ in model.tensors()}}


@pytest.mark.parametrize("moe", ["tp", "ep"])
@pytest.mark.parametrize(
    ("published", "total_bytes"),
    [
        # metadata.total_size of the index on the hub, or twice the published number of parameters
        (LLAMA_70B, 141_107_412_992),
        (MIXTRAL_8X22B, 281_260_142_592),
        (QWEN3_30B_A3B, 61_064_245_248),
        (QWEN3_235B_A22B, 470_187_269_120),
        (GPT_OSS_120B, 65_248_815_744),
        (GPT_OSS_20B, 13_761_264_768),
        (DEEPSEEK_V2_LITE, 31_412_968_448),
    ],
)
def test_bytes_are_those_of_the_published_checkpoint(published: dict[str, Any], total_bytes: int, moe: Any) -> None:
    assert read_plan_model(published, moe=moe).total_bytes == total_bytes


def test_deepseek_v3_has_its_671_billion_parameters_and_leaves_the_mtp_layer_out() -> None:
    model = read_plan_model(DEEPSEEK_V3)
    weights = [prod(shape) for name, shape, _ in model.tensors() if not name.endswith("_scale_inv")]
    assert sum(weights) == 671_026_419_200
    assert model.left_out == ("model.layers.61",)


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("architecture", sorted(set(FAMILIES) & set(ARCHITECTURES)))
@pytest.mark.parametrize("tied", [False, True])
def test_models_have_the_tensors_that_are_served(heads: Any, architecture: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied, "attention_bias": True}
    planned = {name: shape for name, shape, _ in read_plan_model(config(heads, architecture, **changes)).tensors()}
    assert planned == {name: s.shape for name, s in sources(axes_of(heads, architecture, **changes)).items()}


def test_deepseek_heads_and_columns_are_cut_at_the_edges_of_scale_blocks() -> None:
    model = read_plan_model(DEEPSEEK_V3)
    assert group(model, "layers.5.q_head").units == 64  # 192 rows a head: two heads are three blocks
    assert group(model, "layers.5.expert_column").units == group(model, "layers.5.shared_expert").units == 16
    assert group(model, "layers.0.mlp").units == 144
    for part in (part for each in model.groups for part in each.parts if part.dim is not None):
        if part.element_bytes == 1:
            assert part.per_unit % 128 == 0, part


def test_a_last_block_that_is_cut_short_weighs_less() -> None:
    model = read_plan_model(GLM_45_AIR | {"quantization_config": BLOCK_FP8})
    mlp = group(model, "layers.0.mlp")
    assert mlp.units == 86  # 10944 columns are 85.5 blocks
    assert mlp.last_unit_bytes < mlp.unit_bytes
    assert mlp.total_bytes == sum(mlp.nbytes(((unit, unit + 1),)) for unit in range(86))
    assert mlp.total_bytes == 3 * (10944 * 4096 + 86 * 32 * 4)


def test_per_tensor_scales_are_on_every_device_and_go_with_whole_experts() -> None:
    by_columns = read_plan_model(QWEN3_30B_A3B | {"quantization_config": TENSOR_FP8})
    whole = read_plan_model(QWEN3_30B_A3B | {"quantization_config": TENSOR_FP8}, moe="ep")
    assert by_columns.total_bytes == whole.total_bytes
    scales_of_layer = 128 * 3 * 2 * 4
    difference = group(by_columns, "layers.0.replicated").total_bytes - group(whole, "layers.0.replicated").total_bytes
    assert difference == scales_of_layer


def test_latent_kv_is_replicated_and_its_down_projections_are() -> None:
    model = read_plan_model(DEEPSEEK_V2_LITE)
    names = {part.name for part in group(model, "layers.1.replicated").parts}
    assert {"self_attn.kv_a_proj_with_mqa.weight", "mlp.gate.weight"} <= names
    assert sum(each.kv_bytes_per_token for each in model.replicated) == 27 * 576 * 2
    assert not any(each.kv_bytes_per_token for each in model.sharded)


def test_modules_that_are_not_converted_keep_their_dtype() -> None:
    quantization = BLOCK_FP8 | {"modules_to_not_convert": ["self_attn"]}
    model = read_plan_model(LLAMA_70B | {"quantization_config": quantization})
    assert group(model, "layers.0.q_head").unit_bytes == 2 * 128 * 8192 * 2
    assert group(model, "layers.0.mlp").units == 28672 // 128


def test_float32_doubles_the_weights() -> None:
    assert read_plan_model(LLAMA_70B, dtype="float32").total_bytes == 2 * 141_107_412_992


def test_an_index_that_lists_what_the_model_needs_is_accepted() -> None:
    model = read_plan_model(GLM_45_AIR)
    index = index_of(model)
    index["weight_map"]["model.layers.46.eh_proj.weight"] = "model.safetensors"
    assert read_plan_model(GLM_45_AIR, index=index) == model


@pytest.mark.parametrize(
    ("add", "drop", "size", "message"),
    [
        ((), "model.norm.weight", None, "no model.norm.weight, which LlamaForCausalLM needs"),
        (("model.layers.0.extra",), None, None, "no rule for model.layers.0.extra"),
        ((), None, 10**9, "metadata.total_size: the checkpoint has 1000000000 bytes"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_by_name(add: Any, drop: Any, size: Any, message: str) -> None:
    index = index_of(read_plan_model(LLAMA_70B)) | {"metadata": {"total_size": size or 141_107_412_992}}
    index["weight_map"].update(dict.fromkeys(add, "a"))
    index["weight_map"].pop(drop, None)
    with pytest.raises(UnsupportedModel, match=message):
        read_plan_model(LLAMA_70B, index=index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures: no rule for MambaForCausalLM"),
        ({"architectures": None}, "architectures: config.json must name one"),
        ({"layer_types": ["linear_attention"]}, "layer_types: no rule for layers of type linear_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: no rule for 'awq'"),
        ({"quantization_config": BLOCK_FP8 | {"weight_block_size": [128]}}, "weight_block_size: expected two sizes"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "no rule for mxfp4 in LlamaForCausalLM"),
        ({"hidden_size": None}, "positive hidden_size"),
        ({"num_hidden_layers": -1}, "positive num_hidden_layers"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        ({"torch_dtype": "int4"}, "dtype: no rule for int4"),
    ],
)
def test_bad_configs_are_refused_with_the_field_or_the_missing_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_plan_model(LLAMA_70B | changes)


@pytest.mark.parametrize(
    "field, value",
    [("decoder_sparse_step", "x"), ("mlp_only_layers", 3), ("intermediate_size", None), ("num_experts_per_tok", {})],
)
def test_a_field_of_the_wrong_type_is_refused_and_not_a_crash(field: str, value: Any) -> None:
    for path in sorted(CONFIGS.glob("*.json")):
        damaged = json.loads(path.read_text()) | {field: value}
        try:
            read_plan_model(damaged)
        except UnsupportedModel as error:
            assert str(error)
