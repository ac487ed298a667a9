"""Small models for the planning tests, and a numpy oracle that knows nothing of intervals."""

from typing import Any

import numpy as np

from anchortp_sglang.planning.intervals import Intervals, intersect
from anchortp_sglang.planning.layout.moves import Move
from anchortp_sglang.planning.layout.shards import ShardLayout, shard_layout, source_shape
from anchortp_sglang.planning.model.axes import ModelAxes, read_model_axes
from anchortp_sglang.planning.ownership.ownership import Ownership

SHAPES = ((12, 4), (6, 2), (8, 8), (32, 8))
FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Glm4ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
MOE_FAMILIES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
EXPERTS = 9

Tensors = dict[str, np.ndarray]


def config(heads: tuple[int, int] = (12, 4), architecture: str = "Qwen3ForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of two small layers; 1040 MLP columns are 65 units of 16."""
    return {
        "architectures": [architecture],
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 2,
        "intermediate_size": 1040,
        "moe_intermediate_size": 40,
        "num_local_experts": EXPERTS,
        "vocab_size": 130,
        "dtype": "float32",
    } | changes


def model(
    heads: tuple[int, int] = (12, 4),
    architecture: str = "Qwen3ForCausalLM",
    *,
    whole_experts: bool = False,
    **changes: Any,
) -> ModelAxes:
    return read_model_axes(config(heads, architecture, **changes), whole_experts=whole_experts)


def source_names(axes: ModelAxes) -> list[str]:
    return [block.source for param in axes.params for block in param.blocks]


def source_shapes(axes: ModelAxes) -> dict[str, tuple[int, ...]]:
    return {name: source_shape(axes, name) for name in source_names(axes)}


def overlap(old: Ownership, new: Ownership, axis: str, device: int, layer: int | None = None) -> Intervals:
    """Units of an axis that a device holds before and after; none if it is missing from either."""
    if device not in old.devices or device not in new.devices:
        return ()
    return intersect(old.of(axis, old.devices.index(device), layer), new.of(axis, new.devices.index(device), layer))


def held_elements(axes: ModelAxes, ownership: Ownership, rank: int) -> set[tuple[str, int]]:
    """What a rank has of each checkpoint tensor, element by element along the dimension that is split."""
    pieces = shard_layout(axes, ownership, rank).pieces
    return {(one.source, one.source_start + i) for one in pieces for i in range(one.length)}


def checkpoint(axes: ModelAxes) -> Tensors:
    """Random full tensors."""
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=source_shape(axes, name)) for name in source_names(axes)}


def _blank(layout: ShardLayout) -> Tensors:
    tensors = {placed.name: np.full(placed.shape, np.nan) for placed in layout.params}
    for param, start, length in layout.padding:
        tensors[param][start : start + length] = 0
    return tensors


def materialize(layout: ShardLayout, whole: Tensors) -> Tensors:
    """A rank's parameters, from the checkpoint alone. NaN where nothing was written."""
    tensors = _blank(layout)
    for piece in layout.pieces:
        _at(tensors[piece.param], piece.dim, piece.start, piece.length)[...] = _at(
            whole[piece.source], piece.dim, piece.source_start, piece.length
        )
    return tensors


def follow(moves: tuple[Move, ...], layout: ShardLayout, whole: Tensors, old: dict[int, Tensors]) -> Tensors:
    """A rank's parameters, from the old ones of each device and the checkpoint."""
    tensors = _blank(layout)
    for move in moves:
        source = whole if move.device is None else old[move.device]
        _at(tensors[move.param], move.dim, move.start, move.length)[...] = _at(
            source[move.source], move.dim, move.source_start, move.length
        )
    return tensors


def _at(tensor: np.ndarray, dim: int, start: int, length: int) -> np.ndarray:
    assert start + length <= tensor.shape[dim]
    return np.moveaxis(tensor, dim, 0)[start : start + length].swapaxes(0, dim)


def attention(weights: Tensors, layer: str, q_heads: int, kv_heads: int, x: np.ndarray) -> np.ndarray:
    """A stand-in for attention on one rank's parameters that mixes each query head with its own KV head."""
    qkv = weights[f"{layer}.self_attn.qkv_proj.weight"] @ x + weights.get(f"{layer}.self_attn.qkv_proj.bias", 0)
    heads = qkv.reshape(q_heads + 2 * kv_heads, -1)
    q, k, v = np.split(heads, [q_heads, q_heads + kv_heads])
    group = q_heads // kv_heads
    mixed = q * np.repeat(k, group, axis=0) + np.repeat(v, group, axis=0)
    return weights[f"{layer}.self_attn.o_proj.weight"] @ mixed.reshape(-1)


def mlp(weights: Tensors, layer: str, x: np.ndarray) -> np.ndarray:
    """A stand-in for the MLP on one rank's parameters; of experts, their sum weighted by their place."""
    experts = sorted(name for name in weights if name.startswith(layer) and ".w13_weight[" in name)
    if not experts:
        return gated(weights[f"{layer}.mlp.gate_up_proj.weight"], weights[f"{layer}.mlp.down_proj.weight"], x)
    return sum(
        (i + 1) * gated(weights[name], weights[name.replace("w13", "w2")], x) for i, name in enumerate(experts)
    )  # fmt: skip


def gated(gate_up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up @ x, 2)
    return down @ (np.maximum(gate, 0) * up)


def fused(whole: Tensors, layer: str) -> Tensors:
    """The whole model's layer as SGLang would hold it on a single rank."""
    stacks = {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    }
    tensors = dict(whole)
    for expert in range(EXPERTS):
        for prefix, gate, up, down in (
            (f"{layer}.mlp.", "gate_proj", "up_proj", "down_proj"),
            (f"{layer}.block_sparse_moe.", "w1", "w3", "w2"),
        ):
            one = f"{prefix}experts.{expert}."
            if f"{one}{gate}.weight" in whole:
                stacked = np.concatenate([whole[f"{one}{gate}.weight"], whole[f"{one}{up}.weight"]])
                tensors[f"{prefix}experts.w13_weight[{expert}]"] = stacked
                tensors[f"{prefix}experts.w2_weight[{expert}]"] = whole[f"{one}{down}.weight"]
    for param, sources in stacks.items():
        part = param.split(".")[0]
        for kind in ("weight", "bias"):
            names = [f"{layer}.{part}.{source}.{kind}" for source in sources]
            if names[0] in whole:
                tensors[f"{layer}.{param}.{kind}"] = np.concatenate([whole[name] for name in names])
    return tensors
