"""The families that `tiny_checkpoint` writes: the parts of their layers, the spread of their tensors, their configs.

Names, shapes and config keys are those of the released models. Transformers 5 has all experts of a layer in one tensor;
here they are separate, as in the files on the hub that SGLang 0.5.23 reads (`load_weights` in sglang.srt.models).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from anchortp_sglang.testing import tiny_configs, tiny_gemma4
from anchortp_sglang.testing.tiny_layers import (
    Part,
    Sizes,
    Tensors,
    attention,
    deepseek_experts,
    experts,
    fused_attention,
    fused_experts,
    fused_mlp,
    latent_attention,
    mlp,
    norm,
    sinks,
)

Family = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "glm4",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gemma4_small",
    "gemma4_sparse",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
]
Spread = tuple[float, float]
"""Mean and standard deviation."""


@dataclass(frozen=True)
class TinyFamily:
    """A family. ``config`` gives the keys beyond those of all families; ``omitted`` names common keys that it lacks.

    ``attention_bias`` and ``tied``: None leaves the choice to the caller. ``spread``: by the end of a tensor's name,
    where it is not `tiny_checkpoint`'s default.
    """

    architecture: str
    layer: tuple[Part, ...]
    config: Callable[[Sizes], dict[str, Any]] = lambda sizes: {}
    omitted: tuple[str, ...] = ()
    hidden_size: int = 384
    head_dim: int | None = None
    takes_head_dim: bool = True
    hidden_in_heads: bool = False
    """Whether hidden_size must be a multiple of the query heads."""
    attention_bias: bool | None = None
    tied: bool | None = None
    kv_heads_are_q_heads: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_groups: int = 1
    num_dense_layers: int | None = None
    """None if all layers have experts, or none has."""
    sliding_window: int = 4096
    outside: Callable[[Sizes], Tensors] = lambda sizes: iter(())
    """Tensors besides those of the layers that every family has."""
    spread: tuple[tuple[str, Spread], ...] = ()


_BEFORE_ATTENTION = norm("input_layernorm")
_BEFORE_MLP = norm("post_attention_layernorm")
_DENSE = (_BEFORE_ATTENTION, attention(), _BEFORE_MLP, mlp)
_EACH_HEAD_NORMED = attention(qk_norm="each head")
_GEMMA_AFTER_ATTENTION = (
    norm("post_attention_layernorm"),
    norm("pre_feedforward_layernorm"),
    mlp,
    norm("post_feedforward_layernorm"),
)
# Gemma's norms multiply by 1 + weight, and embeddings are multiplied by sqrt(hidden_size). The norms behind attention
# and MLP must be large for the layers to outweigh the input token. With small norms of q and k a token would attend to
# all others alike, and repeat.
_GEMMA_SPREAD = (
    ("post_attention_layernorm.weight", (5.0, 0.05)),
    ("post_feedforward_layernorm.weight", (12.0, 0.05)),
    ("q_norm.weight", (2.0, 0.05)),
    ("k_norm.weight", (2.0, 0.05)),
    ("norm.weight", (0.0, 0.05)),
    ("embed_tokens.weight", (0.0, 0.1)),
)


# Gemma-4's norms multiply by their weights as they are.
_GEMMA4_SPREAD = (
    ("post_attention_layernorm.weight", (2.0, 0.05)),
    ("post_feedforward_layernorm.weight", (3.0, 0.05)),
    ("embed_tokens.weight", (0.0, 0.02)),
    ("embed_tokens_per_layer.weight", (0.0, 0.25)),
)


def _gemma4(layer: Part, config: Callable[[Sizes], dict[str, Any]], **more: Any) -> TinyFamily:
    return TinyFamily(
        "Gemma4ForCausalLM",
        (layer,),
        config,
        omitted=("hidden_act", "rope_theta"),
        hidden_size=288,
        head_dim=32,
        attention_bias=False,
        tied=True,
        sliding_window=512,
        spread=_GEMMA4_SPREAD,
        **more,
    )


def _deepseek(architecture: str, shared: int, mscale: float, correction_bias: bool, **gate: Any) -> TinyFamily:
    return TinyFamily(
        architecture,
        (_BEFORE_ATTENTION, latent_attention, _BEFORE_MLP, deepseek_experts(shared, correction_bias)),
        tiny_configs.deepseek(shared, mscale, gate),
        takes_head_dim=False,
        hidden_in_heads=True,
        attention_bias=False,
        kv_heads_are_q_heads=True,
        num_experts=8,
        experts_per_token=2,
        expert_groups=tiny_configs.EXPERT_GROUPS,
        num_dense_layers=1,
        # As large as differences between scores, so that it changes which experts a token gets.
        spread=(("e_score_correction_bias", (0.0, 0.1)),),
    )


FAMILIES: dict[Family, TinyFamily] = {
    "llama": TinyFamily("LlamaForCausalLM", _DENSE, hidden_in_heads=True),
    "qwen2": TinyFamily(
        "Qwen2ForCausalLM",
        (_BEFORE_ATTENTION, attention(o_bias=False), _BEFORE_MLP, mlp),
        lambda sizes: {"use_sliding_window": False},
        omitted=("attention_bias",),
        attention_bias=True,
    ),
    "qwen3": TinyFamily(
        "Qwen3ForCausalLM",
        (_BEFORE_ATTENTION, _EACH_HEAD_NORMED, _BEFORE_MLP, mlp),
        lambda sizes: {"use_sliding_window": False},
        hidden_size=320,
        head_dim=32,
    ),
    "mistral": TinyFamily(
        "MistralForCausalLM",
        _DENSE,
        lambda sizes: {"sliding_window": None},
        omitted=("attention_bias",),
        attention_bias=False,
    ),
    "phi3": TinyFamily(
        "Phi3ForCausalLM",
        (_BEFORE_ATTENTION, fused_attention, _BEFORE_MLP, fused_mlp),
        tiny_configs.phi3,
        takes_head_dim=False,
        hidden_in_heads=True,
        attention_bias=False,
    ),
    "glm4": TinyFamily(
        "Glm4ForCausalLM",
        (
            _BEFORE_ATTENTION,
            attention(o_bias=False),
            norm("post_self_attn_layernorm"),
            _BEFORE_MLP,
            fused_mlp,
            norm("post_mlp_layernorm"),
        ),
        lambda sizes: {"partial_rotary_factor": 0.5},
        hidden_size=320,
        head_dim=32,
        attention_bias=True,
    ),
    "gemma2": TinyFamily(
        "Gemma2ForCausalLM",
        (_BEFORE_ATTENTION, attention(), *_GEMMA_AFTER_ATTENTION),
        tiny_configs.gemma2,
        omitted=("tie_word_embeddings",),
        hidden_size=288,
        head_dim=32,
        hidden_in_heads=True,
        tied=True,
        spread=_GEMMA_SPREAD,
    ),
    "gemma3_text": TinyFamily(
        "Gemma3ForCausalLM",
        (_BEFORE_ATTENTION, _EACH_HEAD_NORMED, *_GEMMA_AFTER_ATTENTION),
        tiny_configs.gemma3,
        omitted=("tie_word_embeddings", "hidden_act"),
        hidden_size=288,
        head_dim=32,
        hidden_in_heads=True,
        tied=True,
        sliding_window=512,
        spread=_GEMMA_SPREAD,
    ),
    "gemma4_text": _gemma4(tiny_gemma4.large_layer, tiny_gemma4.large),
    "gemma4_small": _gemma4(tiny_gemma4.small_layer, tiny_gemma4.small, outside=tiny_gemma4.own_inputs),
    "gemma4_sparse": _gemma4(tiny_gemma4.sparse_layer, tiny_gemma4.sparse, num_experts=8, experts_per_token=2),
    "olmo2": TinyFamily(
        "Olmo2ForCausalLM",
        (
            attention(qk_norm="all heads"),
            norm("post_attention_layernorm"),
            mlp,
            norm("post_feedforward_layernorm"),
        ),
        lambda sizes: {"rope_scaling": None},
        takes_head_dim=False,
        hidden_in_heads=True,
    ),
    "mixtral": TinyFamily(
        "MixtralForCausalLM",
        (_BEFORE_ATTENTION, attention(), _BEFORE_MLP, experts("block_sparse_moe", ("w1", "w3", "w2"))),
        tiny_configs.mixtral,
        omitted=("attention_bias",),
        attention_bias=False,
        num_experts=8,
        experts_per_token=2,
    ),
    "qwen3_moe": TinyFamily(
        "Qwen3MoeForCausalLM",
        (_BEFORE_ATTENTION, _EACH_HEAD_NORMED, _BEFORE_MLP, experts("mlp")),
        tiny_configs.qwen3_moe,
        hidden_size=320,
        head_dim=32,
        num_experts=16,
        experts_per_token=4,
        num_dense_layers=0,
    ),
    "gpt_oss": TinyFamily(
        "GptOssForCausalLM",
        (_BEFORE_ATTENTION, attention(), sinks, _BEFORE_MLP, fused_experts),
        tiny_configs.gpt_oss,
        hidden_size=320,
        head_dim=32,
        attention_bias=True,
        num_experts=8,
        experts_per_token=2,
        sliding_window=128,
        spread=(("sinks", (0.0, 1.0)),),
    ),
    "deepseek_v2": _deepseek(
        "DeepseekV2ForCausalLM",
        shared=2,
        mscale=0.707,
        correction_bias=False,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
    ),
    "deepseek_v3": _deepseek(
        "DeepseekV3ForCausalLM",
        shared=1,
        mscale=1.0,
        correction_bias=True,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        ep_size=1,
    ),
}
"""Families by the `model_type` of their config.json, but for the kinds of Gemma-4, which have one."""
