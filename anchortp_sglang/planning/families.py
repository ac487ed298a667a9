"""Model families as data: the parameters SGLang creates, and the checkpoint tensors that fill them.

A new family is a new entry in ``FAMILIES``. Names of sizes ("q_head", "hidden", ...) are given their numbers
in ``model_axes``. Written against SGLang 0.5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One SGLang parameter.

    ``sources`` are ``(checkpoint tensor, size)`` in the order in which the parameter stacks them along
    ``dim``; a size is an axis ("q_head", "kv_head", "mlp", "expert_column", "vocab") or a whole extent ("hidden",
    "head_dim", "experts"). A tensor that is named several times holds those sizes one after the other.
    ``other`` names the remaining dimension, None for a vector. The parameter exists when any config key in
    ``only_if`` is true (or ``only_if`` is empty) and ``unless`` is not. With ``{expert}`` in its tensors' names it
    has a leading dimension over the experts.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    dim: int = 0
    other: str | None = "hidden"
    only_if: tuple[str, ...] = ()
    unless: str | None = None


@dataclass(frozen=True)
class Family:
    """The parameters of one architecture, in the order of execution.

    ``layer`` rules are relative to ``model.layers.N.``; in a layer with experts ``sparse`` takes the place of
    ``dense``. ``columns`` pairs an axis with the config key of its size. ``defaults`` are what transformers assumes
    for a key that config.json lacks. ``refused`` pairs a config key with why a true value cannot be served.
    """

    before: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    dense: tuple[Rule, ...]
    after: tuple[Rule, ...]
    sparse: tuple[Rule, ...] = ()
    columns: tuple[tuple[str, str], ...] = (("mlp", "intermediate_size"),)
    experts: str | None = None
    """Config key of the number of experts."""
    defaults: tuple[tuple[str, Any], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def is_sparse(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether config.json gives a layer experts, by the keys that Qwen models have for it; by default all do."""
        if not self.sparse:
            return False
        step = config.get("decoder_sparse_step") or 1
        return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


REFUSED: tuple[tuple[str, str], ...] = (
    ("quantization_config", "the checkpoint is quantized; use the unquantized one"),
    ("compression_config", "the checkpoint is quantized; use the unquantized one"),
    ("use_sliding_window", "it attends over a sliding window; only full attention is supported"),
    (
        "dual_chunk_attention_config",
        "dual chunk attention keeps per-head data of its own; remove the key to serve with full attention",
    ),
)
"""Config keys that no family can have set."""

UNUSED_SOURCES: tuple[str, ...] = (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",)
"""Checkpoint tensors that SGLang's ``load_weights`` skips for every family (regex, searched)."""


def _replicated(name: str, size: str, only_if: tuple[str, ...] = ()) -> Rule:
    return Rule(name, ((name, size),), other=None, only_if=only_if)


_QKV = (("q_proj", "q_head"), ("k_proj", "kv_head"), ("v_proj", "kv_head"))


def _qkv(tensor: str, other: str | None, only_if: tuple[str, ...] = ()) -> Rule:
    sources = tuple((f"self_attn.{proj}.{tensor}", axis) for proj, axis in _QKV)
    return Rule(f"self_attn.qkv_proj.{tensor}", sources, other=other, only_if=only_if)


_EMBED = Rule("model.embed_tokens.weight", (("model.embed_tokens.weight", "vocab"),))
# A tied head is the embedding itself (`self.lm_head = self.model.embed_tokens`), not a second parameter.
_HEAD = Rule("lm_head.weight", (("lm_head.weight", "vocab"),), unless="tie_word_embeddings")
_NORM = _replicated("model.norm.weight", "hidden")
_BEFORE_ATTENTION = _replicated("input_layernorm.weight", "hidden")
_QK_NORM = (
    _replicated("self_attn.q_norm.weight", "head_dim"),
    _replicated("self_attn.k_norm.weight", "head_dim"),
)
_O_PROJ = Rule("self_attn.o_proj.weight", (("self_attn.o_proj.weight", "q_head"),), dim=1)
_BEFORE_MLP = _replicated("post_attention_layernorm.weight", "hidden")
_MLP = (
    Rule("mlp.gate_up_proj.weight", (("mlp.gate_proj.weight", "mlp"), ("mlp.up_proj.weight", "mlp"))),
    Rule("mlp.down_proj.weight", (("mlp.down_proj.weight", "mlp"),), dim=1),
)
_FUSED_MLP = (
    Rule("mlp.gate_up_proj.weight", (("mlp.gate_up_proj.weight", "mlp"), ("mlp.gate_up_proj.weight", "mlp"))),
    _MLP[1],
)


def _o_bias(only_if: tuple[str, ...]) -> Rule:
    # `RowParallelLinear` keeps the whole bias on every rank and adds it on rank 0 alone.
    return _replicated("self_attn.o_proj.bias", "hidden", only_if)


# models/llama.py, `LlamaDecoderLayer`: the biases follow `attention_bias or bias`; `LlamaMLP` has none.
_LLAMA_BIAS = ("attention_bias", "bias")
_LLAMA = Family(
    before=(_EMBED,),
    layer=(
        _BEFORE_ATTENTION,
        _qkv("weight", "hidden"),
        _qkv("bias", None, _LLAMA_BIAS),
        _O_PROJ,
        _o_bias(_LLAMA_BIAS),
        _BEFORE_MLP,
    ),
    dense=_MLP,
    after=(_NORM, _HEAD),
    refused=(("mlp_bias", "SGLang's LlamaMLP drops the MLP biases, so its answers would be wrong"),),
)

# models/qwen2.py, `Qwen2Attention`: q, k, v always have a bias, o_proj never.
_QWEN2 = Family(
    before=(_EMBED,),
    layer=(_BEFORE_ATTENTION, _qkv("weight", "hidden"), _qkv("bias", None), _O_PROJ, _BEFORE_MLP),
    dense=_MLP,
    after=(_NORM, _HEAD),
    defaults=(("num_key_value_heads", 32),),
)

# models/qwen3.py, `Qwen3Attention`: q_norm and k_norm span one head, so every rank needs them whole.
_QWEN3_BIAS = ("attention_bias",)
_QWEN3 = Family(
    before=(_EMBED,),
    layer=(
        _BEFORE_ATTENTION,
        _qkv("weight", "hidden"),
        _qkv("bias", None, _QWEN3_BIAS),
        *_QK_NORM,
        _O_PROJ,
        _o_bias(_QWEN3_BIAS),
        _BEFORE_MLP,
    ),
    dense=_MLP,
    after=(_NORM, _HEAD),
    defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
)


def _experts(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """`FusedMoE`: w13 stacks gate and up of each expert, w2 is down (layers/moe/fused_moe_triton/layer.py).

    Every rank has all experts, each cut along its columns. The router is whole everywhere.
    """
    sources = [(f"{prefix}experts.{{expert}}.{name}.weight", "expert_column") for name in (gate, up, down)]
    return (
        Rule(f"{prefix}gate.weight", ((f"{prefix}gate.weight", "experts"),)),
        Rule(f"{prefix}experts.w13_weight", tuple(sources[:2])),
        Rule(f"{prefix}experts.w2_weight", (sources[2],), dim=1),
    )


# models/qwen3_moe.py, `Qwen3MoeSparseMoeBlock`: SGLang gives every layer experts, whatever config.json says.
_QWEN3_MOE = replace(
    _QWEN3,
    dense=(),
    sparse=_experts("mlp.", "gate_proj", "up_proj", "down_proj"),
    columns=(("expert_column", "moe_intermediate_size"),),
    experts="num_experts",
    defaults=(("num_key_value_heads", 4),),
)

# models/mixtral.py: no biases.
_MIXTRAL = Family(
    before=(_EMBED,),
    layer=(_BEFORE_ATTENTION, _qkv("weight", "hidden"), _O_PROJ, _BEFORE_MLP),
    dense=(),
    sparse=_experts("block_sparse_moe.", "w1", "w3", "w2"),
    after=(_NORM, _HEAD),
    columns=(("expert_column", "intermediate_size"),),
    experts="num_local_experts",
    defaults=(("num_local_experts", 8), ("num_key_value_heads", 8)),
)

# models/llama.py, `Phi3ForCausalLM`: the checkpoint holds q, k and v in one tensor, gate and up in another. (SGLang
# applies neither its sliding window nor Mistral's.)
_PHI3 = replace(
    _LLAMA,
    layer=(
        _BEFORE_ATTENTION,
        Rule(
            "self_attn.qkv_proj.weight",
            tuple(("self_attn.qkv_proj.weight", axis) for axis in ("q_head", "kv_head", "kv_head")),
        ),
        _O_PROJ,
        _BEFORE_MLP,
    ),
    dense=_FUSED_MLP,
)

# models/glm4.py: two more norms, on what attention and MLP put out; q, k, v with a bias.
_GLM4 = replace(
    _QWEN2,
    layer=(
        _BEFORE_ATTENTION,
        _qkv("weight", "hidden"),
        _qkv("bias", None, ("attention_bias",)),
        _O_PROJ,
        _replicated("post_self_attn_layernorm.weight", "hidden"),
        _BEFORE_MLP,
    ),
    dense=(*_FUSED_MLP, _replicated("post_mlp_layernorm.weight", "hidden")),
)

FAMILIES: dict[str, Family] = {
    "Glm4ForCausalLM": _GLM4,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "Phi3ForCausalLM": _PHI3,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
}
"""HF architecture name -> its family."""
