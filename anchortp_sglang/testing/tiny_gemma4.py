"""Gemma-4's parts of a layer, its other tensors and its config.json, as in the released models.

Layers with a sliding window and without one take turns, the last one without. A head without a window is twice as wide.
"""

from typing import Any

from anchortp_sglang.testing.tiny_layers import Sizes, Tensors, mlp, norm

_OWN_INPUT = 16
"""Columns of each layer's own embedding of a token."""


def _has_window(sizes: Sizes, layer: int) -> bool:
    return (sizes.num_layers - layer) % 2 == 0


def _full_kv_heads(sizes: Sizes) -> int:
    return max(1, sizes.num_kv_heads // 2)


def _shared(sizes: Sizes) -> int:
    """Count the last layers, which read the KV of earlier ones."""
    return sizes.num_layers // 3


def _attention(sizes: Sizes, layer: int, kv_heads: int, *, has_kv: bool = True, has_v: bool = True) -> Tensors:
    columns = sizes.head_columns if _has_window(sizes, layer) else 2 * sizes.head_columns
    names = ("k_proj", *(("v_proj",) if has_v else ())) if has_kv else ()
    yield "self_attn.q_proj.weight", (sizes.num_q_heads * columns, sizes.hidden_size)
    for name in names:
        yield f"self_attn.{name}.weight", (kv_heads * columns, sizes.hidden_size)
    yield "self_attn.q_norm.weight", (columns,)
    if has_kv:
        yield "self_attn.k_norm.weight", (columns,)
    yield "self_attn.o_proj.weight", (sizes.hidden_size, sizes.num_q_heads * columns)


def _around_mlp(sizes: Sizes, layer: int) -> Tensors:
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield from norm(f"{name}_layernorm")(sizes, layer)
    yield "layer_scalar", (1,)


def large_layer(sizes: Sizes, layer: int) -> Tensors:
    """Yield a layer of the large models: without a window it has half as many KV heads, and takes K for V."""
    window = _has_window(sizes, layer)
    yield from _attention(sizes, layer, sizes.num_kv_heads if window else _full_kv_heads(sizes), has_v=window)
    yield from mlp(sizes, layer)
    yield from _around_mlp(sizes, layer)


def sparse_layer(sizes: Sizes, layer: int) -> Tensors:
    """Yield a layer of the models with experts: a large model's, and experts beside its MLP, all in one tensor."""
    yield from large_layer(sizes, layer)
    count, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.moe_intermediate_size
    yield "router.proj.weight", (count, hidden)
    yield "router.scale", (hidden,)
    yield "router.per_expert_scale", (count,)
    yield "experts.gate_up_proj", (count, 2 * inner, hidden)
    yield "experts.down_proj", (count, hidden, inner)
    for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
        yield from norm(name)(sizes, layer)


def small_layer(sizes: Sizes, layer: int) -> Tensors:
    """Yield a layer of the small models: each has its own input; the last read earlier KV and are twice as wide."""
    shared = layer >= sizes.num_layers - _shared(sizes)
    yield from _attention(sizes, layer, sizes.num_kv_heads, has_kv=not shared)
    for name, shape in mlp(sizes, layer):
        yield name, tuple(n * (1 + shared) if n == sizes.intermediate_size else n for n in shape)
    yield from _around_mlp(sizes, layer)
    yield "per_layer_input_gate.weight", (_OWN_INPUT, sizes.hidden_size)
    yield "per_layer_projection.weight", (sizes.hidden_size, _OWN_INPUT)
    yield from norm("post_per_layer_input_norm")(sizes, layer)


def own_inputs(sizes: Sizes) -> Tensors:
    """Return the tensors from which each layer's own input is made."""
    columns = sizes.num_layers * _OWN_INPUT
    yield "model.embed_tokens_per_layer.weight", (sizes.vocab_size, columns)
    yield "model.per_layer_model_projection.weight", (columns, sizes.hidden_size)
    yield "model.per_layer_projection_norm.weight", (_OWN_INPUT,)


def _config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return {
        "model_type": "gemma4_text",
        "global_head_dim": 2 * sizes.head_columns,
        "layer_types": [kinds[_has_window(sizes, layer)] for layer in range(sizes.num_layers)],
        "sliding_window": sizes.sliding_window,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": sizes.vocab_size,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        **more,
    }


def large(sizes: Sizes) -> dict[str, Any]:
    return _config(sizes, attention_k_eq_v=True, num_global_key_value_heads=_full_kv_heads(sizes))


def sparse(sizes: Sizes) -> dict[str, Any]:
    return large(sizes) | {
        "enable_moe_block": True,
        "num_experts": sizes.num_experts,
        "top_k_experts": sizes.experts_per_token,
        "moe_intermediate_size": sizes.moe_intermediate_size,
    }


def small(sizes: Sizes) -> dict[str, Any]:
    return _config(
        sizes,
        attention_k_eq_v=False,
        num_kv_shared_layers=_shared(sizes),
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=_OWN_INPUT,
    )
