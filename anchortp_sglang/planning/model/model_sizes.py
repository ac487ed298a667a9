"""From the fields of a config.json to the sizes that the tensor rules name, and the extents of the axes."""

from collections.abc import Mapping
from typing import Any

from anchortp_sglang.planning.model.architectures import Architecture, Experts
from anchortp_sglang.planning.model.axes import UnsupportedModel, positive_size
from anchortp_sglang.planning.model.group_assembly import Dimensions
from anchortp_sglang.planning.model.weight_format import MXFP4_BLOCK, WeightFormat

VOCAB_UNIT_ROWS = 8
"""SGLang pads the vocabulary to a multiple of 64: so its equal cuts over up to 8 devices fall between units."""


def read_dimensions(
    config: Mapping[str, Any], architecture: Architecture, fmt: WeightFormat, kv_element_bytes: int | None
) -> Dimensions:
    """Sizes of everything that the rules of an architecture name. Raises UnsupportedModel, naming the field."""
    kv_bytes = kv_element_bytes or fmt.element_bytes
    hidden, q_heads = positive_size(config, "hidden_size"), positive_size(config, "num_attention_heads")
    vocab = positive_size(config, "vocab_size")
    sizes = {"hidden": hidden, "vocab": vocab, "q_heads": q_heads, "packed": 16}
    extents = {"q_head": q_heads, "vocab": vocab}
    unit = {"vocab": VOCAB_UNIT_ROWS if vocab >= 512 * VOCAB_UNIT_ROWS else 1}
    kv: dict[str, int] = {}
    if architecture.attention == "mla":
        sizes |= _latent_sizes(config, q_heads)
        kv["replicated"] = sizes["kv_a_out"] * kv_bytes
    else:
        kv_heads = config.get("num_key_value_heads") or q_heads
        if not isinstance(kv_heads, int) or kv_heads < 1 or q_heads % kv_heads:
            raise UnsupportedModel(f"num_key_value_heads: {q_heads} query heads cannot share {kv_heads!r} KV heads")
        head_dim = positive_size({"head_dim": config.get("head_dim") or hidden // q_heads}, "head_dim")
        sizes |= {"q_out": q_heads * head_dim, "kv_out": kv_heads * head_dim, "head_dim": head_dim}
        extents["kv_head"], kv["kv_head"] = kv_heads, 2 * head_dim * kv_bytes
    if config.get("intermediate_size") is not None or architecture.experts is None:
        sizes["inter"] = extents["mlp"] = positive_size(config, "intermediate_size")
        unit["mlp"] = column_unit(extents["mlp"])
    if architecture.experts:
        _expert_dimensions(config, architecture.experts, fmt, sizes, extents, unit)
    return Dimensions(sizes, extents, unit, kv)


def column_unit(extent: int, at_least: int = 64) -> int:
    """16 columns keep the rows of a shard aligned; a narrow MLP is cut finer so that shares can be balanced."""
    return 16 if extent % 16 == 0 and extent // 16 >= at_least else 1


def _latent_sizes(config: Mapping[str, Any], heads: int) -> dict[str, int]:
    keys = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    nope, rope, value, latent = (positive_size(config, key) for key in keys)
    return {
        "q_lora": config.get("q_lora_rank") or 0,
        "kv_lora": latent,
        "q_out": heads * (nope + rope),
        "kv_a_out": latent + rope,
        "kv_b_out": heads * (nope + value),
        "o_in": heads * value,
    }


def _expert_dimensions(
    config: Mapping[str, Any],
    experts: Experts,
    fmt: WeightFormat,
    sizes: dict[str, int],
    extents: dict[str, int],
    unit: dict[str, int],
) -> None:
    columns = positive_size(config, experts.columns)
    sizes |= {"experts": positive_size(config, experts.count), "moe_inter": columns, "moe_2inter": 2 * columns}
    extents |= {"expert": sizes["experts"], "expert_column": columns}
    unit["expert_column"] = column_unit(columns, 32)
    if fmt.kind == "mxfp4":
        if columns % MXFP4_BLOCK or sizes["hidden"] % MXFP4_BLOCK:
            raise UnsupportedModel(f"{experts.columns}: MXFP4 needs a multiple of {MXFP4_BLOCK}, not {columns}")
        extents["expert_column"] = sizes["moe_blocks"] = columns // MXFP4_BLOCK
        sizes["hidden_blocks"], unit["expert_column"] = sizes["hidden"] // MXFP4_BLOCK, 1
    if experts.shared and config.get(experts.shared):
        sizes["shared_inter"] = extents["shared_expert"] = columns * positive_size(config, experts.shared)
        unit["shared_expert"] = column_unit(sizes["shared_inter"], 32)
