"""What distinguishes the architectures that can be planned for, as a table. A new one is a new entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: config keys of the number of experts and of their columns, tensor names, and which
    layers have them ("all", "first_k_dense": from ``first_k_dense_replace`` on, "step": ``decoder_sparse_step``).
    """

    count: str
    columns: str
    layers: str = "all"
    prefix: str = "mlp."
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: bool = False
    router: tuple[str, ...] = ("gate.weight",)
    shared: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where an architecture differs from Llama. A string is the config key that turns a part on.

    ``mtp`` is the config key with the number of layers for multi-token prediction that follow the others.
    """

    attention: str = "gqa"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool | str = False
    mlp_bias: bool | str = False
    sinks: bool = False
    experts: Experts | None = None
    mtp: str | None = None
    defaults: tuple[tuple[str, int], ...] = ()


_QWEN3_DEFAULTS = (("num_key_value_heads", 32), ("head_dim", 128))
_MIXTRAL = Experts(
    "num_local_experts", "intermediate_size", prefix="block_sparse_moe.", names=("w1", "w3", "w2")
)  # fmt: skip
_DEEPSEEK = Experts("n_routed_experts", "moe_intermediate_size", "first_k_dense", shared="n_shared_experts")
# topk_method noaux_tc: the router has a bias per expert, in float32.
_WITH_CORRECTION = Experts(
    "n_routed_experts",
    "moe_intermediate_size",
    "first_k_dense",
    router=("gate.weight", "gate.e_score_correction_bias"),
    shared="n_shared_experts",
)
_GPT_OSS = Experts("num_local_experts", "intermediate_size", stacked=True, router=("router.weight", "router.bias"))

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, defaults=(("num_key_value_heads", 32),)),
    "Qwen3ForCausalLM": Architecture(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, defaults=_QWEN3_DEFAULTS
    ),
    "MixtralForCausalLM": Architecture(experts=_MIXTRAL),
    "Qwen3MoeForCausalLM": Architecture(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        experts=Experts("num_experts", "moe_intermediate_size", "step"),
        defaults=_QWEN3_DEFAULTS,
    ),
    "DeepseekV2ForCausalLM": Architecture(attention="mla", experts=_DEEPSEEK),
    "DeepseekV3ForCausalLM": Architecture(attention="mla", experts=_WITH_CORRECTION, mtp="num_nextn_predict_layers"),
    "GptOssForCausalLM": Architecture(qkv_bias=True, o_bias=True, sinks=True, experts=_GPT_OSS),
    "Glm4MoeForCausalLM": Architecture(
        qkv_bias="attention_bias", qk_norm="use_qk_norm", experts=_WITH_CORRECTION, mtp="num_nextn_predict_layers"
    ),
}
"""HF architecture name -> how it is built."""
