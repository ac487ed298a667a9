"""The parts of a layer that `tiny_families` combines: the tensors each has in a checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint. Families ignore sizes of parts they lack: experts, multi-head latent attention (MLA).

    ``attention_bias``: whether q, k and v have one. ``num_dense_layers``: the first layers, which have no experts.
    ``q_lora_rank`` 0: q has a single projection. In MLA, v has as many columns as the part of k without position.
    """

    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int | None
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    num_dense_layers: int
    sliding_window: int
    q_lora_rank: int
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16

    @property
    def head_columns(self) -> int:
        return self.head_dim or self.hidden_size // self.num_q_heads

    @property
    def q_rows(self) -> int:
        return self.num_q_heads * self.head_columns

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_columns


Part = Callable[[Sizes, int], Tensors]
"""A function from the layer's number to the part's tensors; names are relative to ``model.layers.N.``."""


def norm(name: str) -> Part:
    def tensors(sizes: Sizes, layer: int) -> Tensors:
        yield f"{name}.weight", (sizes.hidden_size,)

    return tensors


def attention(*, o_bias: bool = True, qk_norm: Literal["each head", "all heads"] | None = None) -> Part:
    """Make attention. ``o_bias``: whether o_proj has a bias if q, k and v do. ``qk_norm``: what its mean is over."""

    def tensors(sizes: Sizes, layer: int) -> Tensors:
        for projection, rows in (("q_proj", sizes.q_rows), ("k_proj", sizes.kv_rows), ("v_proj", sizes.kv_rows)):
            yield f"self_attn.{projection}.weight", (rows, sizes.hidden_size)
            if sizes.attention_bias:
                yield f"self_attn.{projection}.bias", (rows,)
        if qk_norm is not None:
            of_a_head = qk_norm == "each head"
            yield "self_attn.q_norm.weight", (sizes.head_columns if of_a_head else sizes.q_rows,)
            yield "self_attn.k_norm.weight", (sizes.head_columns if of_a_head else sizes.kv_rows,)
        yield "self_attn.o_proj.weight", (sizes.hidden_size, sizes.q_rows)
        if sizes.attention_bias and o_bias:
            yield "self_attn.o_proj.bias", (sizes.hidden_size,)

    return tensors


def sinks(sizes: Sizes, layer: int) -> Tensors:
    yield "self_attn.sinks", (sizes.num_q_heads,)


def fused_attention(sizes: Sizes, layer: int) -> Tensors:
    yield "self_attn.qkv_proj.weight", (sizes.q_rows + 2 * sizes.kv_rows, sizes.hidden_size)
    yield "self_attn.o_proj.weight", (sizes.hidden_size, sizes.q_rows)


def latent_attention(sizes: Sizes, layer: int) -> Tensors:
    heads, hidden, nope, rope = sizes.num_q_heads, sizes.hidden_size, sizes.qk_nope_head_dim, sizes.qk_rope_head_dim
    v_columns = nope
    if sizes.q_lora_rank:
        yield "self_attn.q_a_proj.weight", (sizes.q_lora_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (sizes.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), sizes.q_lora_rank)
    else:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (sizes.kv_lora_rank + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (sizes.kv_lora_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + v_columns), sizes.kv_lora_rank)
    yield "self_attn.o_proj.weight", (hidden, heads * v_columns)


def _gated(name: str, hidden: int, inner: int, projections: tuple[str, str, str]) -> Tensors:
    gate, up, down = projections
    yield f"{name}.{gate}.weight", (inner, hidden)
    yield f"{name}.{up}.weight", (inner, hidden)
    yield f"{name}.{down}.weight", (hidden, inner)


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def mlp(sizes: Sizes, layer: int) -> Tensors:
    yield from _gated("mlp", sizes.hidden_size, sizes.intermediate_size, _GATE_UP_DOWN)


def fused_mlp(sizes: Sizes, layer: int) -> Tensors:
    yield "mlp.gate_up_proj.weight", (2 * sizes.intermediate_size, sizes.hidden_size)
    yield "mlp.down_proj.weight", (sizes.hidden_size, sizes.intermediate_size)


def experts(block: str, projections: tuple[str, str, str] = _GATE_UP_DOWN) -> Part:
    def tensors(sizes: Sizes, layer: int) -> Tensors:
        if layer < sizes.num_dense_layers:
            yield from mlp(sizes, layer)
            return
        yield f"{block}.gate.weight", (sizes.num_experts, sizes.hidden_size)
        for expert in range(sizes.num_experts):
            name = f"{block}.experts.{expert}"
            yield from _gated(name, sizes.hidden_size, sizes.moe_intermediate_size, projections)

    return tensors


def fused_experts(sizes: Sizes, layer: int) -> Tensors:
    """Return GPT-OSS's experts. Rows are inputs, unlike in a linear layer; columns of gate and up alternate."""
    count, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.moe_intermediate_size
    yield "mlp.router.weight", (count, hidden)
    yield "mlp.router.bias", (count,)
    yield "mlp.experts.gate_up_proj", (count, hidden, 2 * inner)
    yield "mlp.experts.gate_up_proj_bias", (count, 2 * inner)
    yield "mlp.experts.down_proj", (count, inner, hidden)
    yield "mlp.experts.down_proj_bias", (count, hidden)


def deepseek_experts(shared: int, correction_bias: bool) -> Part:
    routed = experts("mlp")

    def tensors(sizes: Sizes, layer: int) -> Tensors:
        yield from routed(sizes, layer)
        if layer < sizes.num_dense_layers:
            return
        if correction_bias:
            yield "mlp.gate.e_score_correction_bias", (sizes.num_experts,)
        inner = shared * sizes.moe_intermediate_size
        yield from _gated("mlp.shared_experts", sizes.hidden_size, inner, _GATE_UP_DOWN)

    return tensors
