"""Configs of well-known models, as on the HF hub, and toy models for the oracles."""

from collections.abc import Sequence
from typing import Any

from anchortp_sglang.planning.model.axes import has_experts, read_model_axes
from anchortp_sglang.planning.model.plan_model import AxisGroup, AxisKind, PlanModel, plan_model


def _config(architecture: str, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "head_dim": 128,
        "num_key_value_heads": 8,
    } | fields


LLAMA_70B = _config(
    "LlamaForCausalLM", hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80,
    vocab_size=128256,
)  # fmt: skip
MIXTRAL_8X22B = _config(
    "MixtralForCausalLM", hidden_size=6144, intermediate_size=16384, num_attention_heads=48, num_hidden_layers=56,
    vocab_size=32768, num_local_experts=8,
)  # fmt: skip
QWEN3_30B_A3B = _config(
    "Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
    num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=48, vocab_size=151936, num_experts=128,
    decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096, "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
DEEPSEEK_V3 = _config(
    "DeepseekV3ForCausalLM", hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    n_routed_experts=256, n_shared_experts=1, first_k_dense_replace=3, moe_layer_freq=1, num_attention_heads=128,
    num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, num_hidden_layers=61, num_nextn_predict_layers=1, vocab_size=129280,
    quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
)  # fmt: skip
DEEPSEEK_V2_LITE = _config(
    "DeepseekV2ForCausalLM", hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    n_routed_experts=64, n_shared_experts=2, first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16,
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    num_hidden_layers=27, vocab_size=102400,
)  # fmt: skip
GPT_OSS_120B = _config(
    "GptOssForCausalLM", hidden_size=2880, intermediate_size=2880, num_attention_heads=64, head_dim=64,
    num_hidden_layers=36, num_local_experts=128, vocab_size=201088,
    layer_types=["sliding_attention", "full_attention"] * 18,
)  # fmt: skip
GPT_OSS_20B = GPT_OSS_120B | {"num_hidden_layers": 24, "num_local_experts": 32}
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TENSOR_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}


def planned(config: dict[str, Any], whole_experts: bool = False, dtype: str | None = None) -> PlanModel:
    """The planner's model of a config.json; ``whole_experts`` if it has any."""
    return plan_model(read_model_axes(config, dtype, whole_experts=whole_experts and has_experts(config)))


def toy(
    layers: int, axes: Sequence[tuple[str, int, int]], heads: tuple[int, int] | None = None, replicated: int = 0
) -> PlanModel:
    """``axes`` are (name, units, bytes of one) in every layer; ``heads`` are KV heads and query heads of each."""

    groups: list[AxisGroup] = []
    for layer in range(layers):

        def add(name: str, kind: AxisKind, units: int, nbytes: int, layer: int = layer, **more: Any) -> None:
            groups.append(AxisGroup(f"{layer}.{name}", name, kind, layer, layer + 1, units, nbytes, **more))

        if replicated:
            add("r", "replicated", 1, replicated)
        if heads:
            kv, grain = heads
            add("q", "split", kv * grain, 3, grain=grain)
            add("kv", "shared", kv, 5, grain=grain, follows=f"{layer}.q", kv_bytes_per_token=2)
        for name, units, nbytes in axes:
            add(name, "shared" if name == "expert" else "split", units, nbytes)
    return PlanModel("Toy", layers, tuple(groups))
