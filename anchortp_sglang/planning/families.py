"""Model families as data: the parameters SGLang creates, and the checkpoint tensors that fill them.

A new family is a new entry in ``FAMILIES``. Names of sizes ("q_head", "hidden", ...) are given their numbers
in ``model_axes``. Written against SGLang 0.5.23.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One SGLang parameter.

    ``sources`` are ``(checkpoint tensor, size)`` in the order in which the parameter stacks them along
    ``dim``; a size is an axis ("q_head", "kv_head", "mlp", "vocab") or a whole extent ("hidden", "head_dim").
    ``other`` names the remaining dimension, None for a vector. The parameter exists when any config key in
    ``only_if`` is true (or ``only_if`` is empty) and ``unless`` is not.
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

    ``layer`` rules are relative to ``model.layers.N.``. ``defaults`` are what transformers assumes for a key
    that config.json lacks. ``refused`` pairs a config key with why a true value cannot be served.
    """

    before: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    after: tuple[Rule, ...]
    defaults: tuple[tuple[str, int], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


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
_MLP = (
    _replicated("post_attention_layernorm.weight", "hidden"),
    Rule("mlp.gate_up_proj.weight", (("mlp.gate_proj.weight", "mlp"), ("mlp.up_proj.weight", "mlp"))),
    Rule("mlp.down_proj.weight", (("mlp.down_proj.weight", "mlp"),), dim=1),
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
        *_MLP,
    ),
    after=(_NORM, _HEAD),
    refused=(("mlp_bias", "SGLang's LlamaMLP drops the MLP biases, so its answers would be wrong"),),
)

# models/qwen2.py, `Qwen2Attention`: q, k, v always have a bias, o_proj never.
_QWEN2 = Family(
    before=(_EMBED,),
    layer=(_BEFORE_ATTENTION, _qkv("weight", "hidden"), _qkv("bias", None), _O_PROJ, *_MLP),
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
        *_MLP,
    ),
    after=(_NORM, _HEAD),
    defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
}
"""HF architecture name -> its family."""
