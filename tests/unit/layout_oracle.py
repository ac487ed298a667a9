"""What each parameter of a rank must be: slices of whole checkpoint tensors, written out by hand and by name.

Knows nothing of the planner's but who holds which units.
"""

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership

Tensors = dict[str, np.ndarray]


class Share:
    """What a rank has of each axis in a layer, as numbers of heads, columns, rows and experts."""

    def __init__(
        self, model: ModelAxes, ownership: Ownership, rank: int, config: dict[str, Any], layer: int = 0
    ) -> None:
        held = {axis: [u for a, b in ownership.of(axis, rank, layer) for u in range(a, b)] for axis in model.axes}
        columns = {
            each.axis: [unit * each.unit + n for unit in held[each.axis] for n in range(each.unit)]
            for each in model.columns
        }
        self.is_first, self.config, self.head_dim, self.layer = rank == 0, config, model.head_dim, layer
        self.q, self.kv, self.vocab = held["q_head"], held["kv_head"], held["vocab"]
        self.mlp, self.shared = columns.get("mlp"), columns.get("shared_expert")
        self.columns = columns.get("expert_column", slice(None))
        self.experts = held.get("expert")

    def of_heads(self, heads: Sequence[int], size: int | None = None) -> list[int]:
        size = size or self.head_dim
        return [head * size + n for head in heads for n in range(size)]


def layer_of(name: str) -> int:
    """The layer of a parameter; 0 for one outside of the layers, of which only the vocabulary is split."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else 0


def expected(name: str, whole: Tensors, share: Share) -> np.ndarray:
    """A parameter of a rank; ``whole`` are the checkpoint's tensors."""
    if share.config["model_type"] == "gemma4_text":
        return _gemma4(name, whole, share)
    if name in ("model.embed_tokens.weight", "lm_head.weight") and share.config["model_type"] != "gemma3_text":
        padded = np.zeros((share.vocab[-1] + 1, whole[name].shape[1]), whole[name].dtype)
        padded[: len(whole[name])] = whole[name][: len(padded)]
        return padded[share.vocab]
    if match := re.fullmatch(r"(.*\.experts\.)(w13|w2)_weight(_bias)?(?:\[(\d+)\])?", name):
        prefix, which, bias, expert = match.groups()
        if expert is not None:
            return _expert(f"{prefix}{expert}.", which, whole, share)
        return (_stacked_w13 if which == "w13" else _stacked_w2)(prefix, bias or "", whole, share)
    if "self_attn." in name:
        return _attention(name, whole, share)
    if "mlp." in name:
        return _mlp(name, whole, share.shared if "shared_experts" in name else share.mlp)
    return whole[name]


def _gemma4(name: str, whole: Tensors, share: Share) -> np.ndarray:
    if match := re.fullmatch(r"(.*)moe\.(experts\.w13_weight|experts\.w2_weight|per_expert_scale)", name):
        return _gemma4_experts(match[1], match[2], whole, share)
    if "self_attn." in name:
        return _gemma4_attention(*re.fullmatch(r"(.*self_attn\.)(.*)", name).groups(), whole, share)
    if ".mlp." in name:
        # In wider layers a unit has twice as many columns.
        times = len(whole[name.replace("gate_up", "up").replace("down", "up")]) // share.config["intermediate_size"]
        return _mlp(name, whole, [times * column + n for column in share.mlp for n in range(times)])
    return whole[name]


def _gemma4_attention(prefix: str, part: str, whole: Tensors, share: Share) -> np.ndarray:
    config = share.config
    window = config["layer_types"][share.layer] == "sliding_attention"
    size = config["swa_head_dim"] if window else config["head_dim"]
    full, of_window = config["num_key_value_heads"], config["swa_num_key_value_heads"]
    together = config["num_attention_heads"] // of_window if of_window != full else 1
    q = share.of_heads([unit * together + n for unit in share.q for n in range(together)], size)
    kv = share.of_heads(share.q if window and of_window != full else share.kv, size)
    if part == "o_proj.weight":
        return whole[f"{prefix}o_proj.weight"][:, q]
    if part == "qkv_proj.weight":
        k = whole.get(f"{prefix}k_proj.weight")
        if k is None:  # it reads the KV of an earlier layer
            return np.concatenate([whole[f"{prefix}q_proj.weight"][q], np.zeros((2 * len(kv), config["hidden_size"]))])
        v = whole.get(f"{prefix}v_proj.weight", k)
        return np.concatenate([whole[f"{prefix}q_proj.weight"][q], k[kv], v[kv]])
    return whole[prefix + part] if prefix + part in whole else np.zeros(size)


def _gemma4_experts(prefix: str, part: str, whole: Tensors, share: Share) -> np.ndarray:
    if part == "per_expert_scale":
        return whole[f"{prefix}router.per_expert_scale"]
    found = whole[f"{prefix}experts.{'gate_up_proj' if 'w13' in part else 'down_proj'}"]
    found = found if share.experts is None else found[share.experts]
    if "w2" in part:
        return found[:, :, share.columns]
    return np.concatenate([half[:, share.columns] for half in np.split(found, 2, axis=1)], axis=1)


def _attention(name: str, whole: Tensors, share: Share) -> np.ndarray:
    prefix, part, config = *re.fullmatch(r"(.*self_attn\.)(.*)", name).groups(), share.config
    if part.startswith("qkv_proj."):
        q, k, v = _qkv(whole, prefix, part.removeprefix("qkv_proj."), config)
        return np.concatenate([q[share.of_heads(share.q)], *(x[share.of_heads(share.kv)] for x in (k, v))])
    if part == "fused_qkv_a_proj_with_mqa.weight":
        return np.concatenate([whole[f"{prefix}{x}.weight"] for x in ("q_a_proj", "kv_a_proj_with_mqa")])
    if part == "o_proj.weight":
        return whole[name][:, share.of_heads(share.q, config.get("v_head_dim"))]
    if part in ("q_proj.weight", "q_b_proj.weight"):
        return whole[name][share.of_heads(share.q)]
    if part == "kv_b_proj.weight":
        return whole[name][share.of_heads(share.q, config["qk_nope_head_dim"] + config["v_head_dim"])]
    if part == "sinks":  # in bfloat16 whatever the model's dtype
        return whole[name][share.q].astype(ml_dtypes.bfloat16).astype(np.float32)
    if config["model_type"] == "olmo2" and part.endswith("_norm.weight"):
        return whole[name][share.of_heads(share.q if part.startswith("q") else share.kv)]
    return whole[name]


def _qkv(whole: Tensors, prefix: str, kind: str, config: dict[str, Any]) -> list[np.ndarray]:
    if f"{prefix}q_proj.{kind}" in whole:
        return [whole[f"{prefix}{x}_proj.{kind}"] for x in "qkv"]
    fused, kv_heads = whole[f"{prefix}qkv_proj.{kind}"], config["num_key_value_heads"]
    kv = len(fused) // (config["num_attention_heads"] + 2 * kv_heads) * kv_heads
    return np.split(fused, [len(fused) - 2 * kv, len(fused) - kv])


def _mlp(name: str, whole: Tensors, columns: list[int] | None) -> np.ndarray:
    if name.endswith("gate_up_proj.weight"):
        gate, up = (
            np.split(whole[name], 2)
            if name in whole
            else (whole[name.replace("gate_up", "gate")], whole[name.replace("gate_up", "up")])
        )
        return np.concatenate([gate[columns], up[columns]])
    return whole[name][:, columns] if name.endswith("down_proj.weight") else whole[name]


def _expert(prefix: str, which: str, whole: Tensors, share: Share) -> np.ndarray:
    gate, up, down = ("w1", "w3", "w2") if "sparse" in prefix else ("gate_proj", "up_proj", "down_proj")
    if which == "w2":
        return whole[f"{prefix}{down}.weight"][:, share.columns]
    return np.concatenate([whole[f"{prefix}{x}.weight"][share.columns] for x in (gate, up)])


def _stacked_w13(prefix: str, bias: str, whole: Tensors, share: Share) -> np.ndarray:
    """In the last dimension of GPT-OSS's checkpoint gate and up take turns, as in the middle one of the parameter; in
    Qwen3-VL's gate comes first."""
    found = whole[f"{prefix}gate_up_proj{bias}"]
    found = found if share.experts is None else found[share.experts]
    if share.config["model_type"] == "qwen3_moe":
        gate, up = (half[..., share.columns] for half in np.split(found, 2, axis=-1))
        return np.concatenate([gate, up], axis=-1).swapaxes(1, 2)
    pairs = found.reshape(*found.shape[:-1], -1, 2)[..., share.columns, :]
    turns = pairs.reshape(*found.shape[:-1], -1)
    return turns if bias else turns.swapaxes(1, 2)


def _stacked_w2(prefix: str, bias: str, whole: Tensors, share: Share) -> np.ndarray:
    """A bias that every rank added would be there several times: cut along columns, only the first one has it."""
    found = whole[f"{prefix}down_proj{bias}"]
    if share.experts is not None:
        found = found[share.experts]
    elif bias and not share.is_first:
        found = np.zeros_like(found)
    return found if bias else found[:, share.columns].swapaxes(1, 2)
