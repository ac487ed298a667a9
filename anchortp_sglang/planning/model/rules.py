"""Rules for the parameters of a model family, and the rules that several families share.

Sizes are names ("q_head", "hidden", ...); ``sizes.read_sizes`` gives their numbers. Written against SGLang 0.5.23.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One SGLang parameter.

    ``sources`` are ``(checkpoint tensor, size)`` in the order in which the parameter stacks them along ``dim``; a size
    is an axis ("q_head", "kv_head", "mlp", "expert_column", "vocab", ...) or a whole extent ("hidden", "head_dim",
    "experts", ...). A tensor named several times holds those sizes one after the other, or with ``repeats`` the same
    elements serve for all of them. A tensor "" stands for elements that nothing reads. ``rest`` names the other
    dimensions in order. The parameter exists if a config key in ``only_if`` is true (or ``only_if`` is empty) and
    ``unless`` is not. With ``{expert}`` in its tensors' names it has a leading dimension over the experts; with
    "experts" first in ``rest`` its tensor has that dimension too.

    ``projection``: a weight (out, in) that quantized checkpoints store in another form. ``transposed``: the checkpoint
    has the last two dimensions swapped. ``first_rank_only``: a term of a sum over the ranks, zero on all but the first.
    ``dtype``: set if it is not the model's.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    dim: int = 0
    rest: tuple[str, ...] = ("hidden",)
    projection: bool = False
    only_if: tuple[str, ...] = ()
    unless: str | None = None
    transposed: bool = False
    first_rank_only: bool = False
    dtype: str | None = None
    repeats: bool = False

    @property
    def over_experts(self) -> bool:
        """Whether there is one tensor per expert."""
        return "{expert}" in self.sources[0][0]

    def exists(self, config: Mapping[str, Any]) -> bool:
        """Return whether SGLang creates the parameter for this config.json."""
        wanted = not self.only_if or any(config.get(key) for key in self.only_if)
        return wanted and not (self.unless and config.get(self.unless))


@dataclass(frozen=True)
class Family:
    """The parameters of one architecture, in the order of execution.

    ``layer`` rules are relative to ``model.layers.N.``; in a layer with experts ``sparse`` replaces ``dense``.
    ``columns`` pairs an axis with the config keys whose product is its size. ``aliases`` pairs another name of a config
    key with that key, like the ``attribute_map`` of transformers' config class. ``defaults`` are the values of
    transformers for keys that config.json lacks. ``refused`` pairs a config key with why a true value cannot be served.
    ``layout_only``: why SGLang cannot serve it on this platform; its rules are then for planning and tests only.
    """

    before: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    dense: tuple[Rule, ...]
    after: tuple[Rule, ...]
    sparse: tuple[Rule, ...] = ()
    columns: tuple[tuple[str, ...], ...] = (("mlp", "intermediate_size"),)
    experts: str | None = None
    """Config key of the number of experts."""
    latent_kv: bool = False
    """Multi-head latent attention: all heads share one row of KV per token, which every rank holds."""
    layer_types: tuple[str, ...] = ("full_attention",)
    """Allowed entries of the config's ``layer_types``."""
    aliases: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    caveats: tuple[tuple[str, str], ...] = ()
    """Pairs a config key with what SGLang silently does otherwise on this platform if it is true."""
    layout_only: str | None = None
    without_stock: str | None = None
    """Why stock SGLang cannot serve it on this platform, where this package can."""
    of_layer: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None
    """Returns config.json as a layer has it, where layers differ in heads and columns."""
    extents: tuple[tuple[str, ...], ...] = ()
    """Pairs a size of its own, which every rank has whole, with the config keys whose product it is."""
    unused: tuple[str, ...] = ()
    """Checkpoint tensors that are not needed (regex, searched)."""

    def resolved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with aliases renamed and missing keys set to their defaults."""
        named = {key: config[alias] for alias, key in self.aliases if alias in config}
        return {**dict(self.defaults), **named, **config}

    def is_sparse(self, config: Mapping[str, Any], layer: int) -> bool:
        """Return whether a layer has experts, by the config keys of Qwen and DeepSeek; without these keys all have."""
        if not self.sparse:
            return False
        step, frequency = config.get("decoder_sparse_step") or 1, config.get("moe_layer_freq") or 1
        return (
            layer not in (config.get("mlp_only_layers") or ())
            and (layer + 1) % step == 0
            and layer >= (config.get("first_k_dense_replace") or 0)
            and layer % frequency == 0
        )


REFUSED: tuple[tuple[str, str], ...] = (
    ("compression_config", "the checkpoint is quantized; use the unquantized one"),
    ("use_sliding_window", "it attends over a sliding window; only full attention is supported"),
    (
        "dual_chunk_attention_config",
        "dual chunk attention keeps per-head data of its own; remove the key to serve with full attention",
    ),
)
"""Config keys that no family may have set, each with the reason."""

UNUSED_SOURCES: tuple[str, ...] = (
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"\.(k|v|kv)_scale$",
    r"projector|^(model\.)?(vision_tower|visual)\.",
)
"""Checkpoint tensors that SGLang's ``load_weights`` skips (regex, searched): values it computes itself, scales of a
quantized KV cache (``maybe_remap_kv_scale_name``), and the parts that turn images into embeddings."""


def vector(name: str, size: str, only_if: tuple[str, ...] = ()) -> Rule:
    """Describe a vector: split if its size is an axis, else whole on every rank."""
    return Rule(name, ((name, size),), rest=(), only_if=only_if)


def plain(name: str, out: str) -> Rule:
    """Describe a matrix that quantized checkpoints leave plain: embeddings, routers."""
    return Rule(name, ((name, out),))


def linear(name: str, out: str, inner: str = "hidden", only_if: tuple[str, ...] = ()) -> Rule:
    """Describe a weight that is split along its outputs, or whole on every rank."""
    return Rule(name, ((name, out),), rest=(inner,), only_if=only_if, projection=True)


def summed(name: str, inner: str) -> Rule:
    """Describe a weight that is split along its inputs; its outputs are summed over the ranks."""
    return Rule(name, ((name, inner),), dim=1, projection=True)


_QKV = (("q_proj", "q_head"), ("k_proj", "kv_head"), ("v_proj", "kv_head"))


def qkv(only_if: tuple[str, ...] = ()) -> Rule:
    """Describe q, k and v in one parameter."""
    sources = tuple((f"self_attn.{proj}.weight", axis) for proj, axis in _QKV)
    return Rule("self_attn.qkv_proj.weight", sources, only_if=only_if, projection=True)


def qkv_bias(only_if: tuple[str, ...] = ()) -> Rule:
    """Describe the biases of q, k and v."""
    sources = tuple((f"self_attn.{proj}.bias", axis) for proj, axis in _QKV)
    return Rule("self_attn.qkv_proj.bias", sources, rest=(), only_if=only_if)


def o_bias(only_if: tuple[str, ...] = ()) -> Rule:
    """Describe the bias of o_proj: `RowParallelLinear` keeps all of it on every rank, and rank 0 adds it."""
    return vector("self_attn.o_proj.bias", "hidden", only_if)


def gated_mlp(prefix: str, axis: str) -> tuple[Rule, ...]:
    """Describe gate and up in one parameter, and down."""
    gate_up = ((f"{prefix}gate_proj.weight", axis), (f"{prefix}up_proj.weight", axis))
    return Rule(f"{prefix}gate_up_proj.weight", gate_up, projection=True), summed(f"{prefix}down_proj.weight", axis)


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Describe `FusedMoE`: w13 stacks gate and up of each expert, w2 is down (layers/moe/fused_moe_triton/layer.py).

    Every rank has all experts, each cut along its columns, or some of them whole. The router is whole everywhere.
    """
    sources = [(f"{prefix}experts.{{expert}}.{name}.weight", "expert_column") for name in (gate, up, down)]
    return (
        plain(f"{prefix}gate.weight", "experts"),
        Rule(f"{prefix}experts.w13_weight", tuple(sources[:2]), projection=True),
        Rule(f"{prefix}experts.w2_weight", (sources[2],), dim=1, projection=True),
    )


EMBED = plain("model.embed_tokens.weight", "vocab")
# A tied head is the embedding itself (`self.lm_head = self.model.embed_tokens`), not a second parameter.
HEAD = Rule("lm_head.weight", (("lm_head.weight", "vocab"),), unless="tie_word_embeddings")
NORM = vector("model.norm.weight", "hidden")
BEFORE_ATTENTION = vector("input_layernorm.weight", "hidden")
BEFORE_MLP = vector("post_attention_layernorm.weight", "hidden")
QK_NORM = (
    vector("self_attn.q_norm.weight", "head_dim"),
    vector("self_attn.k_norm.weight", "head_dim"),
)
O_PROJ = summed("self_attn.o_proj.weight", "q_head")
MLP = gated_mlp("mlp.", "mlp")
FUSED_MLP = (
    Rule("mlp.gate_up_proj.weight", (("mlp.gate_up_proj.weight", "mlp"),) * 2, projection=True),
    MLP[1],
)
