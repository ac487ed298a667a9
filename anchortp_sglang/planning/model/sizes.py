"""The numbers behind the sizes that a family's rules name, read from a HF config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

from anchortp_sglang.planning.model.gemma4 import SHARED_KV, WINDOW_KV_HEADS
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
class LayerKV:
    """The KV of a layer: ``heads`` units of ``axis``, each of which stores ``row`` elements per token.

    That is K and V of a head, or the latent that replaces both.
    """

    axis: str
    heads: int
    row: int


@dataclass(frozen=True)
class Heads:
    """Query and KV heads; with latent attention a single KV head, which all query heads share.

    ``head_dim`` and ``kv`` are those of layers with full attention. ``heads_per_unit``: query heads that are dealt
    together. ``sizes``: those that attention's rules name.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv: LayerKV
    heads_per_unit: int
    sizes: Mapping[str, Size]


def positive_size(config: Mapping[str, Any], key: str) -> int:
    """Read a size that config.json must name. Raises UnsupportedModel."""
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModel(f"config.json needs a positive {key}, but has {value!r}")
    return value


def _extent(config: Mapping[str, Any], key: str) -> int:
    """Read a size of a part that a model may lack. Raises UnsupportedModel."""
    return positive_size(config, key) if config.get(key) else 0


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
        **{name: Size(None, prod(_extent(config, key) for key in keys)) for name, *keys in family.extents},
        "scalar": Size(None, 1),
    }
    if whole_experts:
        sizes |= {name: Size(None, sizes[name].elements) for name in ("expert_column", "expert_column_pair")}
        columns = (*(each for each in columns if each.axis != "expert_column"), Columns("expert", experts, 1, None))
    return heads, columns, sizes


@dataclass(frozen=True)
class LayerShape:
    """A layer: its config.json, the sizes that its rules name, and its KV; None if it reads that of an earlier one."""

    config: Mapping[str, Any]
    sizes: Mapping[str, Size]
    kv: LayerKV | None


def layer_shape(
    family: Family, config: Mapping[str, Any], layer: int, heads: Heads, sizes: Mapping[str, Size]
) -> LayerShape:
    """Return the shape of a layer, which is that of the others but for families with ``of_layer``."""
    if family.of_layer is None:
        return LayerShape(config, sizes, heads.kv)
    config = family.of_layer(config, layer)
    head_dim, kv_heads = positive_size(config, "head_dim"), positive_size(config, "num_key_value_heads")
    axis, mlp = "kv_head" if kv_heads == heads.num_kv_heads else "q_head", sizes["mlp"]
    own = {
        "q_head": replace(sizes["q_head"], per_unit=head_dim * heads.heads_per_unit),
        "kv_head": Size(axis, head_dim, kv_heads),
        "head_dim": Size(None, head_dim),
        "mlp": replace(mlp, per_unit=positive_size(config, "intermediate_size") // mlp.units),
    }
    kv = None if config[SHARED_KV] else LayerKV(axis, kv_heads, 2 * head_dim)
    return LayerShape(config, {**sizes, **own}, kv)


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
    unit = _heads_per_unit(config, num_q_heads, num_kv_heads)
    sizes = {
        "q_head": Size("q_head", head_dim * unit, num_q_heads // unit),
        "kv_head": Size("kv_head", head_dim, num_kv_heads),
        "head": Size("q_head", unit, num_q_heads // unit),
        "head_dim": Size(None, head_dim),
    }
    return Heads(num_q_heads, num_kv_heads, head_dim, LayerKV("kv_head", num_kv_heads, 2 * head_dim), unit, sizes)


def _heads_per_unit(config: Mapping[str, Any], num_q_heads: int, num_kv_heads: int) -> int:
    """Deal the query heads of a KV head together where layers with a sliding window have more KV heads than others."""
    of_windows = config.get(WINDOW_KV_HEADS) or num_kv_heads
    if of_windows == num_kv_heads:
        return 1
    if num_q_heads % of_windows or of_windows % num_kv_heads:
        raise UnsupportedModel(
            f"layers with a sliding window have {of_windows} KV heads, the others {num_kv_heads}; supported is a "
            f"multiple of the others' that divides num_attention_heads={num_q_heads}"
        )
    return int(num_q_heads // of_windows)


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
    return Heads(num_q_heads, 1, nope + rope, LayerKV("kv_head", 1, latent + rope), unit, sizes)


def _columns(family: Family, config: Mapping[str, Any], num_layers: int, group: int) -> tuple[Columns, ...]:
    """Read the axes besides heads, in units of whole groups of columns."""
    kinds = {family.is_sparse(config, layer) for layer in range(num_layers)}
    if False in kinds and not family.dense:
        raise UnsupportedModel(
            "config.json has layers without experts (mlp_only_layers, decoder_sparse_step); SGLang's model has none"
        )
    rules = (*family.layer, *(family.dense if False in kinds else ()), *(family.sparse if True in kinds else ()))
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
