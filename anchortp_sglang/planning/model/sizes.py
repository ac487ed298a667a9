"""The numbers behind the sizes that a family's rules name, read from a HF config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from anchortp_sglang.planning.model.rules import Family


class UnsupportedModel(ValueError):
    """A model that cannot be served with unequal shards; the text says why and what would help."""


@dataclass(frozen=True)
class Size:
    """``units`` units of ``per_unit`` elements on an axis; without an axis, one unit that every rank holds."""

    axis: str | None
    per_unit: int
    units: int = 1

    @property
    def elements(self) -> int:
        """Elements of all units."""
        return self.per_unit * self.units


@dataclass(frozen=True)
class Columns:
    """An axis of ``units`` units of ``unit`` columns each.

    ``config_key`` names their number in config.json; None if no single key does, as for whole experts.
    """

    axis: str
    units: int
    unit: int
    config_key: str | None


@dataclass(frozen=True)
class Heads:
    """Query and KV heads; with latent attention a single KV head, which all query heads share.

    ``kv_row``: elements that a KV head stores per token and layer: K and V of ``head_dim`` each, or the latent that
    replaces both. ``heads_per_unit``: query heads that are dealt together. ``sizes``: those that attention's rules
    name.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_row: int
    heads_per_unit: int
    sizes: Mapping[str, Size]


def positive_size(config: Mapping[str, Any], key: str) -> int:
    """Read a size that config.json must name. Raises UnsupportedModel."""
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModel(f"config.json needs a positive {key}, but has {value!r}")
    return value


def read_sizes(
    family: Family, config: Mapping[str, Any], group: int, whole_experts: bool
) -> tuple[Heads, tuple[Columns, ...], dict[str, Size]]:
    """Read heads, the other axes, and the sizes that rules name.

    Cuts fall between groups of ``group`` elements that are quantized together. Raises UnsupportedModel.
    """
    heads = _heads(family, config, group)
    columns = _columns(family, config, positive_size(config, "num_hidden_layers"), group)
    vocab_size = positive_size(config, "vocab_size")
    experts = positive_size(config, family.experts) if family.experts else 0
    sizes = {
        **heads.sizes,
        **_column_sizes(columns),
        "vocab": Size("vocab", 1, vocab_size),
        "vocab_row": Size(None, vocab_size),
        "hidden": Size(None, positive_size(config, "hidden_size")),
        "experts": Size(None, experts),
        "one": Size(None, 1),
        "scalar": Size(None, 1),
    }
    if whole_experts:
        sizes |= {name: Size(None, sizes[name].elements) for name in ("expert_column", "expert_column_pair")}
        columns = (*(each for each in columns if each.axis != "expert_column"), Columns("expert", experts, 1, None))
    return heads, columns, sizes


def _heads(family: Family, config: Mapping[str, Any], group: int) -> Heads:
    """Read the heads; with latents, so many are dealt together that no cut divides a group of rows."""
    num_q_heads = positive_size(config, "num_attention_heads")
    if family.latent_kv:
        return _latent_heads(config, num_q_heads, group)
    hidden_size = positive_size(config, "hidden_size")
    num_kv_heads = config.get("num_key_value_heads") or num_q_heads
    if num_q_heads % num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads={num_q_heads} is not a multiple of num_key_value_heads={num_kv_heads}; "
            "config.json does not describe grouped-query attention"
        )
    head_dim = config.get("head_dim") or _derived_head_dim(hidden_size, num_q_heads)
    sizes = {
        "q_head": Size("q_head", head_dim, num_q_heads),
        "kv_head": Size("kv_head", head_dim, num_kv_heads),
        "head": Size("q_head", 1, num_q_heads),
        "head_dim": Size(None, head_dim),
    }
    return Heads(num_q_heads, num_kv_heads, head_dim, 2 * head_dim, 1, sizes)


def _latent_heads(config: Mapping[str, Any], num_q_heads: int, group: int) -> Heads:
    keys = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    nope, rope, value, latent = (positive_size(config, key) for key in keys)
    per_head = {"q_head": nope + rope, "kv_b_head": nope + value, "v_head": value}
    unit = lcm(*(lcm(elements, group) // elements for elements in per_head.values()))
    if num_q_heads % unit:
        raise UnsupportedModel(
            f"num_attention_heads={num_q_heads}: groups of {group} quantized rows end at every {unit}th head, which "
            "does not share them out"
        )
    sizes = {
        **{name: Size("q_head", elements * unit, num_q_heads // unit) for name, elements in per_head.items()},
        "q_lora": Size(None, config.get("q_lora_rank") or 0),
        "kv_lora": Size(None, latent),
        "latent": Size(None, latent + rope),
    }
    return Heads(num_q_heads, 1, nope + rope, latent + rope, unit, sizes)


def _columns(family: Family, config: Mapping[str, Any], num_layers: int, group: int) -> tuple[Columns, ...]:
    """Read the axes besides heads, in units of whole groups of columns."""
    kinds = {family.is_sparse(config, layer) for layer in range(num_layers)}
    if False in kinds and not family.dense:
        raise UnsupportedModel(
            "config.json has layers without experts (mlp_only_layers, decoder_sparse_step); SGLang's model has none"
        )
    rules = (*(family.dense if False in kinds else ()), *(family.sparse if True in kinds else ()))
    used = {size.removesuffix("_pair") for rule in rules if rule.exists(config) for _, size in rule.sources}
    found = []
    for axis, *keys in family.columns:
        if axis in used:
            size = prod(positive_size(config, key) for key in keys)
            unit = _columns_per_unit(size, group)
            if size % unit:
                raise UnsupportedModel(
                    f"{' times '.join(keys)} is {size}, no multiple of the {group} columns that are quantized together"
                )
            found.append(Columns(axis, size // unit, unit, keys[0] if len(keys) == 1 else None))
    return tuple(found)


def _column_sizes(columns: tuple[Columns, ...]) -> dict[str, Size]:
    """Name the sizes of column axes; "_pair" is for gate and up interleaved, two columns each."""
    sizes = {each.axis: Size(each.axis, each.unit, each.units) for each in columns}
    return sizes | {f"{axis}_pair": Size(axis, 2 * size.per_unit, size.units) for axis, size in sizes.items()}


def _derived_head_dim(hidden_size: int, num_q_heads: int) -> int:
    if hidden_size % num_q_heads:
        raise UnsupportedModel(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_q_heads}; "
            "name head_dim in config.json"
        )
    return hidden_size // num_q_heads


def _columns_per_unit(size: int, group: int) -> int:
    """Choose a unit: 16 columns keep a shard's rows aligned; a narrow MLP is cut finer to balance shares."""
    aligned = lcm(16, group)
    return aligned if size % aligned == 0 and size // aligned >= 64 else group
