"""The building blocks of the planned models as data: tensors, the axes they lie on, the sizes of their dimensions.

Sizes are names; ``catalog`` gives them their numbers. Tensor names are those of the checkpoints on the HF hub.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorRule:
    """A tensor relative to its layer. ``axis`` is what dimension ``dim`` lies on; None: every device holds all.

    ``quantized``: it is among the weights that FP8 checkpoints quantize. ``element_bytes`` is given where it
    does not follow the model's dtype.
    """

    name: str
    axis: str | None
    shape: tuple[str, ...]
    dim: int | None = 0
    quantized: bool = False
    element_bytes: int | None = None


def replicated(name: str, *shape: str, quantized: bool = False, element_bytes: int | None = None) -> TensorRule:
    """A tensor that every device holds."""
    return TensorRule(name, None, shape, None, quantized, element_bytes)


def columns(name: str, axis: str, size: str, inner: str = "hidden") -> TensorRule:
    """A weight whose outputs are split (rows of the tensor)."""
    return TensorRule(name, axis, (size, inner), 0, quantized=True)


def rows(name: str, axis: str, size: str) -> TensorRule:
    """A weight whose inputs are split; its outputs are summed over the devices."""
    return TensorRule(name, axis, ("hidden", size), 1, quantized=True)


def grouped_query_attention(
    *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False, sinks: bool = False
) -> tuple[TensorRule, ...]:
    """Query heads, and the KV heads they share. Norms of q and k span one head, so every device has them."""
    rules = [
        columns("self_attn.q_proj.weight", "q_head", "q_out"),
        columns("self_attn.k_proj.weight", "kv_head", "kv_out"),
        columns("self_attn.v_proj.weight", "kv_head", "kv_out"),
        rows("self_attn.o_proj.weight", "q_head", "q_out"),
    ]
    if qkv_bias:
        rules += [
            TensorRule("self_attn.q_proj.bias", "q_head", ("q_out",)),
            TensorRule("self_attn.k_proj.bias", "kv_head", ("kv_out",)),
            TensorRule("self_attn.v_proj.bias", "kv_head", ("kv_out",)),
        ]
    if o_bias:
        rules.append(replicated("self_attn.o_proj.bias", "hidden"))
    if qk_norm:
        rules += [replicated(f"self_attn.{x}_norm.weight", "head_dim") for x in "qk"]
    if sinks:
        rules.append(TensorRule("self_attn.sinks", "q_head", ("q_heads",)))
    return tuple(rules)


def latent_attention(*, q_lora: bool) -> tuple[TensorRule, ...]:
    """MLA: heads are split, the down-projections and the latent KV are not."""
    query = (
        (
            replicated("self_attn.q_a_proj.weight", "q_lora", "hidden", quantized=True),
            replicated("self_attn.q_a_layernorm.weight", "q_lora"),
            columns("self_attn.q_b_proj.weight", "q_head", "q_out", "q_lora"),
        )
        if q_lora
        else (columns("self_attn.q_proj.weight", "q_head", "q_out"),)
    )
    return (
        *query,
        replicated("self_attn.kv_a_proj_with_mqa.weight", "kv_a_out", "hidden", quantized=True),
        replicated("self_attn.kv_a_layernorm.weight", "kv_lora"),
        columns("self_attn.kv_b_proj.weight", "q_head", "kv_b_out", "kv_lora"),
        rows("self_attn.o_proj.weight", "q_head", "o_in"),
    )


def gated_mlp(
    prefix: str = "mlp.", axis: str = "mlp", size: str = "inter", bias: bool = False
) -> tuple[TensorRule, ...]:
    """Gate and up together with the rows of down that they meet."""
    weights = (
        columns(f"{prefix}gate_proj.weight", axis, size),
        columns(f"{prefix}up_proj.weight", axis, size),
        rows(f"{prefix}down_proj.weight", axis, size),
    )
    if not bias:
        return weights
    return (
        *weights,
        TensorRule(f"{prefix}gate_proj.bias", axis, (size,)),
        TensorRule(f"{prefix}up_proj.bias", axis, (size,)),
        replicated(f"{prefix}down_proj.bias", "hidden"),
    )


def experts(prefix: str, names: tuple[str, str, str], whole: bool) -> tuple[TensorRule, ...]:
    """One set of tensors per expert (gate, up, down): dealt whole, or each cut along its columns."""
    gate, up, down = names
    if whole:
        return tuple(
            TensorRule(f"{prefix}experts.{{unit}}.{name}.weight", "expert", shape, None, quantized=True)
            for name, shape in ((gate, _OUT), (up, _OUT), (down, _IN))
        )
    name = f"{prefix}experts.{{expert}}."
    return (
        columns(f"{name}{gate}.weight", "expert_column", "moe_inter"),
        columns(f"{name}{up}.weight", "expert_column", "moe_inter"),
        rows(f"{name}{down}.weight", "expert_column", "moe_inter"),
    )


def stacked_experts(whole: bool, mxfp4: bool) -> tuple[TensorRule, ...]:
    """GPT-OSS: all experts in one tensor, gate and up interleaved. The unit of columns is ``moe_block``.

    The bias of down is added once, so columns leave it whole.
    """
    axis, prefix = ("expert" if whole else "expert_column"), "mlp.experts."
    out, inner = (0, 0) if whole else (1, 2)
    bias = (
        TensorRule(f"{prefix}gate_up_proj_bias", axis, ("experts", "moe_2inter"), out),
        TensorRule(f"{prefix}down_proj_bias", "expert", ("experts", "hidden"), 0)
        if whole
        else replicated(f"{prefix}down_proj_bias", "experts", "hidden"),
    )
    if not mxfp4:  # stored as (expert, in, out)
        return (
            TensorRule(f"{prefix}gate_up_proj", axis, ("experts", "hidden", "moe_2inter"), 0 if whole else 2),
            TensorRule(f"{prefix}down_proj", axis, ("experts", "moe_inter", "hidden"), out),
            *bias,
        )
    gate_up, down = ("experts", "moe_2inter", "hidden_blocks"), ("experts", "hidden", "moe_blocks")
    return (
        TensorRule(f"{prefix}gate_up_proj_blocks", axis, (*gate_up, "packed"), out, element_bytes=1),
        TensorRule(f"{prefix}gate_up_proj_scales", axis, gate_up, out, element_bytes=1),
        TensorRule(f"{prefix}down_proj_blocks", axis, (*down, "packed"), inner, element_bytes=1),
        TensorRule(f"{prefix}down_proj_scales", axis, down, inner, element_bytes=1),
        *bias,
    )


_OUT, _IN = ("moe_inter", "hidden"), ("hidden", "moe_inter")

NORMS = (
    replicated("input_layernorm.weight", "hidden"),
    replicated("post_attention_layernorm.weight", "hidden"),
)
EMBED = TensorRule("model.embed_tokens.weight", "vocab", ("vocab", "hidden"))
HEAD = TensorRule("lm_head.weight", "vocab", ("vocab", "hidden"))
FINAL_NORM = replicated("model.norm.weight", "hidden")
