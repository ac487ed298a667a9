"""The keys of each family's config.json beyond those of all families, as in the released models."""

from collections.abc import Callable
from typing import Any

from anchortp_sglang.testing.tiny_layers import Sizes

EXPERT_GROUPS = 4
"""Number of DeepSeek's expert groups; a token's experts are in GROUPS_PER_TOKEN of them."""
GROUPS_PER_TOKEN = 2


def phi3(sizes: Sizes) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": sizes.max_position_embeddings,
        "rope_scaling": None,
        "sliding_window": None,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _sliding(sizes: Sizes) -> dict[str, Any]:
    return {"sliding_window": sizes.sliding_window, "cache_implementation": "hybrid"}


def gemma2(sizes: Sizes) -> dict[str, Any]:
    return _sliding(sizes) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": sizes.head_columns,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def gemma3(sizes: Sizes) -> dict[str, Any]:
    return _sliding(sizes) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": sizes.head_columns,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    }


def _yarn(sizes: Sizes) -> dict[str, Any]:
    before = sizes.max_position_embeddings // 2
    return {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": before}


def mixtral(sizes: Sizes) -> dict[str, Any]:
    return {
        "intermediate_size": sizes.moe_intermediate_size,
        "num_local_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }


def qwen3_moe(sizes: Sizes) -> dict[str, Any]:
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": sizes.num_layers,
        "rope_scaling": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(sizes.num_dense_layers)),
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def gpt_oss(sizes: Sizes) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {
        "intermediate_size": sizes.moe_intermediate_size,
        "num_local_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "experts_per_token": sizes.experts_per_token,
        "layer_types": [kinds[layer % 2] for layer in range(sizes.num_layers)],
        "sliding_window": sizes.sliding_window,
        "initial_context_length": sizes.max_position_embeddings // 2,
        "rope_scaling": _yarn(sizes) | {"rope_type": "yarn", "truncate": False},
        "swiglu_limit": 7.0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
    }


def deepseek(shared: int, mscale: float, gate: dict[str, Any]) -> Callable[[Sizes], dict[str, Any]]:
    def config(sizes: Sizes) -> dict[str, Any]:
        return {
            "q_lora_rank": sizes.q_lora_rank or None,
            "kv_lora_rank": sizes.kv_lora_rank,
            "qk_nope_head_dim": sizes.qk_nope_head_dim,
            "qk_rope_head_dim": sizes.qk_rope_head_dim,
            "v_head_dim": sizes.qk_nope_head_dim,
            "rope_scaling": _yarn(sizes) | {"type": "yarn", "mscale": mscale, "mscale_all_dim": mscale},
            "first_k_dense_replace": sizes.num_dense_layers,
            "moe_layer_freq": 1,
            "moe_intermediate_size": sizes.moe_intermediate_size,
            "n_routed_experts": sizes.num_experts,
            "n_shared_experts": shared,
            "num_experts_per_tok": sizes.experts_per_token,
            "n_group": EXPERT_GROUPS,
            "topk_group": GROUPS_PER_TOKEN,
            "routed_scaling_factor": 2.5,
            "pretraining_tp": 1,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            **gate,
        }

    return config
