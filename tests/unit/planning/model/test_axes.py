import re

import pytest
from planning_cases import FAMILIES, config, model, source_names

from anchortp_sglang.planning.layout.shards import source_shape
from anchortp_sglang.planning.model.axes import (
    LayerKV,
    ModelAxes,
    UnsupportedModel,
    equal_vocab_cut,
    padded_vocab_rows,
    read_model_axes,
    refuse_layout_only,
)
from anchortp_sglang.planning.model.families import FAMILIES as RULES
from anchortp_sglang.testing.tiny_families import FAMILIES as TINY_FAMILIES


def names(architecture: str, **changes: object) -> list[str]:
    layer_of = [p.name for p in model(architecture=architecture, **changes).params]
    return [name.replace("model.layers.0.", "") for name in layer_of if ".layers.1." not in name]


def test_qwen3_parameters_are_those_of_sglang_in_order_of_execution() -> None:
    assert names("Qwen3ForCausalLM") == [
        "model.embed_tokens.weight",
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("architecture", "changes", "biases"),
    [
        ("LlamaForCausalLM", {}, []),
        ("LlamaForCausalLM", {"attention_bias": True}, ["self_attn.qkv_proj.bias", "self_attn.o_proj.bias"]),
        ("LlamaForCausalLM", {"bias": True}, ["self_attn.qkv_proj.bias", "self_attn.o_proj.bias"]),
        ("Qwen2ForCausalLM", {}, ["self_attn.qkv_proj.bias"]),
        ("Qwen3ForCausalLM", {}, []),
        ("Qwen3ForCausalLM", {"attention_bias": True}, ["self_attn.qkv_proj.bias", "self_attn.o_proj.bias"]),
    ],
)
def test_biases_are_those_that_sglang_creates(architecture: str, changes: dict[str, object], biases: list[str]) -> None:
    assert [name for name in names(architecture, **changes) if name.endswith("bias")] == biases


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_tied_head_is_no_parameter_and_its_tensor_is_unused(architecture: str) -> None:
    tied = model(architecture=architecture, tie_word_embeddings=True)
    assert "lm_head.weight" not in [param.name for param in tied.params]
    assert r"^lm_head\.weight$" in tied.unused_sources


def test_shapes_of_checkpoint_tensors_follow_the_config() -> None:
    axes = model((12, 4), attention_bias=True)
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": (130, 8),
        layer + "self_attn.q_proj.weight": (24, 8),
        layer + "self_attn.v_proj.weight": (8, 8),
        layer + "self_attn.k_proj.bias": (8,),
        layer + "self_attn.o_proj.weight": (8, 24),
        layer + "self_attn.o_proj.bias": (8,),
        layer + "self_attn.q_norm.weight": (2,),
        layer + "mlp.up_proj.weight": (1040, 8),
        layer + "mlp.down_proj.weight": (8, 1040),
        layer + "input_layernorm.weight": (8,),
    }
    assert {name: source_shape(axes, name) for name in expected} == expected
    assert len(source_names(axes)) == len(set(source_names(axes)))


def test_axes_count_units() -> None:
    assert model((12, 4)).axes == {"q_head": 12, "kv_head": 4, "mlp": 65, "vocab": 192}
    assert model((12, 4)).group_size == 3


@pytest.mark.parametrize(("columns", "unit"), [(1040, 16), (1024, 16), (1008, 1), (2050, 1)])
def test_wide_mlps_are_cut_in_aligned_units(columns: int, unit: int) -> None:
    assert model(intermediate_size=columns).columns[0].unit == unit


@pytest.mark.parametrize(
    ("architecture", "head_dim", "expected"),
    [("LlamaForCausalLM", None, 4), ("Qwen2ForCausalLM", None, 4), ("Qwen3ForCausalLM", 16, 16)],
)
def test_head_dim_is_named_or_derived(architecture: str, head_dim: int | None, expected: int) -> None:
    assert model((6, 2), architecture, hidden_size=24, head_dim=head_dim).head_dim == expected


def test_keys_left_out_mean_what_transformers_says() -> None:
    llama, qwen3 = config(architecture="LlamaForCausalLM"), config((64, 8))
    del llama["num_key_value_heads"], qwen3["head_dim"], qwen3["num_key_value_heads"]
    assert read_model_axes(llama).num_kv_heads == 12
    assert (read_model_axes(qwen3).head_dim, read_model_axes(qwen3).num_kv_heads) == (128, 32)


@pytest.mark.parametrize(
    ("declared", "wanted", "dtype", "nbytes"),
    [
        ({"dtype": "bfloat16"}, None, "bfloat16", 2),
        ({"dtype": None, "torch_dtype": "float16"}, None, "float16", 2),
        ({"dtype": "torch.bfloat16"}, "float32", "float32", 4),
        ({"dtype": "bfloat16"}, "auto", "bfloat16", 2),
        ({"dtype": "float32"}, "auto", "float16", 2),
        ({"dtype": "float32"}, "half", "float16", 2),
        ({"dtype": None}, None, "float32", 4),
    ],
)
def test_dtype_is_read_as_sglang_reads_it(
    declared: dict[str, object], wanted: str | None, dtype: str, nbytes: int
) -> None:
    axes = read_model_axes(config() | declared, wanted)
    assert (axes.dtype, axes.dtype_bytes) == (dtype, nbytes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes.*unquantized"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, "dual chunk"),
        ({"num_attention_heads": 10}, "num_attention_heads=10 is not a multiple of num_key_value_heads=4"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": 10, "head_dim": None}, "hidden_size=10 is not a multiple"),
        ({"vocab_size": None}, "vocab_size"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        read_model_axes(config() | changes)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_layers_with_a_window_are_accepted_where_their_kv_is_kept_like_the_others(architecture: str) -> None:
    assert model(architecture=architecture, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UnsupportedModel, match=r"chunked_attention.*full_attention, sliding_attention"):
        model(architecture=architecture, layer_types=["chunked_attention"])


def test_a_family_that_sglang_cannot_serve_here_has_rules_but_is_refused_with_the_reason() -> None:
    axes = model(architecture="GptOssForCausalLM")
    with pytest.raises(UnsupportedModel, match=r"GptOssForCausalLM cannot be served: .* AMX"):
        refuse_layout_only(axes)
    refuse_layout_only(model())


def latent(**changes: object) -> ModelAxes:
    sizes = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "kv_lora_rank": 5, "q_lora_rank": 7}
    experts = {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
    return model(architecture="DeepseekV3ForCausalLM", **(sizes | experts | changes))


def test_latents_are_one_kv_head_that_all_query_heads_share() -> None:
    axes = latent()
    assert (axes.num_kv_heads, axes.head_dim) == (1, 4 + 2)
    assert axes.kv == (LayerKV("kv_head", 1, 5 + 2),) * 2
    assert axes.axes == {
        "q_head": 12,
        "kv_head": 1,
        "mlp": 65,
        "shared_expert": 80,
        "expert_column": 40,
        "vocab": 192,
    }


def test_only_layers_behind_the_first_dense_ones_have_experts() -> None:
    experts = {param.layer for param in latent(num_hidden_layers=3).params if ".experts." in param.name}
    assert experts == {1, 2}


def test_the_bias_by_which_experts_are_chosen_stays_in_float32() -> None:
    dtypes = {param.name: param.dtype for param in latent(dtype="bfloat16").params}
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"
    assert dtypes["model.layers.1.mlp.gate.weight"] == "bfloat16"


@pytest.mark.parametrize("layers", [2, 12])
def test_layers_behind_the_last_one_are_left_out(layers: int) -> None:
    """As those for several tokens at once are."""
    patterns = [re.compile(pattern) for pattern in latent(num_hidden_layers=layers).unused_sources]
    for layer in range(layers + 3):
        unused = any(pattern.search(f"model.layers.{layer}.eh_proj.weight") for pattern in patterns)
        assert unused == (layer >= layers)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_may_be_counted_by_either_name_and_its_own_goes_first(architecture: str) -> None:
    counts = [{"num_local_experts": 5}, {"num_experts": 5}, {"num_experts": 9, "num_local_experts": 5}]
    for given in counts:
        nameless = {key: value for key, value in config(architecture=architecture).items() if "num_ex" not in key}
        del nameless["num_local_experts"]
        assert read_model_axes(nameless | given, whole_experts=True).axes["expert"] == 5


def test_aliases_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    types = {tiny.architecture: name for name, tiny in TINY_FAMILIES.items()}
    types |= dict.fromkeys(("Gemma4TextForCausalLM", "Gemma4TextMoeForCausalLM"), "gemma4_text")
    for architecture, family in RULES.items():
        assert dict(family.aliases) == transformers.CONFIG_MAPPING[types[architecture]].attribute_map, architecture


def test_sliding_window_sizes_that_are_switched_off_are_accepted() -> None:
    assert model(sliding_window=4096, use_sliding_window=False, layer_types=["full_attention"] * 2)


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "rows"),
    [
        (128, 1, 128),
        (130, 1, 192),
        (130, 2, 192),
        (130, 3, 192),
        (130, 4, 192),
        (130, 5, 320),
        (151936, 3, 152064),
    ],
)
def test_vocab_rows_are_padded_as_sglang_pads_them(vocab_size: int, tp_size: int, rows: int) -> None:
    assert padded_vocab_rows(vocab_size, tp_size) == rows
    cut = equal_vocab_cut(vocab_size, tp_size)
    assert cut[0][0][0] == 0
    assert cut[-1][0][1] == rows
    assert {stop - start for ((start, stop),) in cut} == {rows // tp_size}
