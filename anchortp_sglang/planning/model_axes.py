"""From a HF config.json to the axes a model can be split along and the parameters that lie on them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anchortp_sglang.planning.families import FAMILIES, REFUSED, UNUSED_SOURCES, Family, Rule
from anchortp_sglang.planning.intervals import Intervals

__all__ = [
    "Block",
    "Columns",
    "Intervals",
    "ModelAxes",
    "ParamSpec",
    "UnsupportedModel",
    "equal_vocab_cut",
    "padded_vocab_rows",
    "read_model_axes",
]

VOCAB_PADDING_ROWS = 64
"""``DEFAULT_VOCAB_PADDING_SIZE`` of sglang.srt.layers.vocab_parallel_embedding."""

# `_STR_DTYPE_TO_TORCH_DTYPE` of sglang.srt.configs.model_config.
_DTYPE_NAMES = {
    "half": "float16",
    "float16": "float16",
    "float": "float32",
    "float32": "float32",
    "bfloat16": "bfloat16",
}
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class UnsupportedModel(ValueError):
    """The model cannot be served with unequal shards; the text says why and what would help."""


@dataclass(frozen=True)
class Block:
    """A run of one parameter along its split dimension that comes from one checkpoint tensor, from its element
    ``offset`` on.

    ``axis`` None: every rank holds the whole extent, which is ``elements_per_unit``.
    """

    source: str
    axis: str | None
    elements_per_unit: int
    offset: int = 0


@dataclass(frozen=True)
class Columns:
    """An axis of ``units`` units of ``unit`` columns each; ``config_key`` names their number in config.json, None for
    whole experts."""

    axis: str
    units: int
    unit: int
    config_key: str | None


@dataclass(frozen=True)
class ParamSpec:
    """An SGLang parameter: its blocks stacked along ``dim``, ``rest`` the sizes of its other dimensions.

    A rank's shape is ``rest`` with the extent of its units inserted at ``dim``. ``layer`` None: outside of
    the decoder layers. The slices of a parameter over experts are specs of their own, named ``parameter[expert]``
    and in order: those that a rank holds lie side by side. ``expert`` is given where experts are dealt whole: a rank
    holds the slice if it holds that unit of the axis "expert".
    """

    name: str
    blocks: tuple[Block, ...]
    dim: int
    rest: tuple[int, ...]
    layer: int | None
    expert: int | None = None

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """Equal for parameters that differ in names only, as those of layers and experts do."""
        return tuple((block.axis, block.elements_per_unit, block.offset) for block in self.blocks), self.dim, self.rest


@dataclass(frozen=True)
class ModelAxes:
    """What a model is made of. Sizes are the whole model's, in elements unless named otherwise.

    ``columns`` are the axes besides heads and vocabulary; ``params`` are in the order of execution;
    ``unused_sources`` are regular expressions (searched) for checkpoint tensors that nobody needs.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    dtype: str
    dtype_bytes: int
    columns: tuple[Columns, ...]
    params: tuple[ParamSpec, ...]
    unused_sources: tuple[str, ...]

    @property
    def axes(self) -> dict[str, int]:
        """Units of each axis. "vocab" is the padded rows of a single rank; with more ranks the padding may
        grow, see ``padded_vocab_rows``."""
        return {
            "q_head": self.num_q_heads,
            "kv_head": self.num_kv_heads,
            **{columns.axis: columns.units for columns in self.columns},
            "vocab": padded_vocab_rows(self.vocab_size, 1),
        }

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


def padded_vocab_rows(vocab_size: int, tp_size: int) -> int:
    """Rows of the vocabulary after padding, over all ranks (``VocabParallelEmbedding.__init__``)."""
    padding = VOCAB_PADDING_ROWS
    if _round_up(vocab_size, padding) % tp_size:
        padding *= tp_size
    return _round_up(vocab_size, padding)


def equal_vocab_cut(vocab_size: int, tp_size: int) -> tuple[Intervals, ...]:
    """SGLang's own split: per rank an equal run of padded rows; rows from ``vocab_size`` on are padding."""
    rows = padded_vocab_rows(vocab_size, tp_size) // tp_size
    return tuple(((rank * rows, (rank + 1) * rows),) for rank in range(tp_size))


def read_model_axes(config: Mapping[str, Any], dtype: str | None = None, *, whole_experts: bool = False) -> ModelAxes:
    """Read a config.json. Experts are cut along their columns, or with ``whole_experts`` dealt whole.

    ``dtype`` is SGLang's ``--dtype``: None keeps the dtype that the config names, "auto" follows SGLang
    (``_get_and_verify_dtype``: float32 checkpoints are served in float16).
    Raises UnsupportedModel, with the reason, for what cannot be served.
    """
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse(config, architecture, family)
    config = {**dict(family.defaults), **config}
    hidden_size, num_q_heads = positive_size(config, "hidden_size"), positive_size(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_q_heads
    if num_q_heads % num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads={num_q_heads} is not a multiple of num_key_value_heads={num_kv_heads}; "
            "config.json does not describe grouped-query attention"
        )
    head_dim = config.get("head_dim") or _derived_head_dim(hidden_size, num_q_heads)
    num_layers, vocab_size = positive_size(config, "num_hidden_layers"), positive_size(config, "vocab_size")
    columns = _columns(family, config, num_layers)
    experts = positive_size(config, family.experts) if family.experts else 0
    if whole_experts and not any(each.axis == "expert_column" for each in columns):
        raise UnsupportedModel(f"this {architecture} has no experts: leave --ep-size out")
    sizes = {
        "q_head": _Size("q_head", head_dim, num_q_heads),
        "kv_head": _Size("kv_head", head_dim, num_kv_heads),
        **{each.axis: _Size(each.axis, each.unit, each.units) for each in columns},
        "vocab": _Size("vocab", 1, vocab_size),
        "hidden": _Size(None, hidden_size),
        "head_dim": _Size(None, head_dim),
        "experts": _Size(None, experts),
    }
    if whole_experts:
        sizes["expert_column"] = _Size(None, sizes["expert_column"].elements)
        cut = [each for each in columns if each.axis != "expert_column"]
        columns = (*cut, Columns("expert", experts, 1, None))
    tied = bool(config.get("tie_word_embeddings", False))
    dtype = _dtype(config, dtype)
    return ModelAxes(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        dtype=dtype,
        dtype_bytes=_DTYPE_BYTES[dtype],
        columns=columns,
        params=_params(family, config, sizes, num_layers),
        unused_sources=UNUSED_SOURCES + ((r"^lm_head\.weight$",) if tied else ()),
    )


@dataclass(frozen=True)
class _Size:
    """``units`` units of ``per_unit`` elements on an axis; a single one without."""

    axis: str | None
    per_unit: int
    units: int = 1

    @property
    def elements(self) -> int:
        return self.per_unit * self.units


def _columns(family: Family, config: Mapping[str, Any], num_layers: int) -> tuple[Columns, ...]:
    """The axes that this model's layers have."""
    kinds = {family.is_sparse(config, layer) for layer in range(num_layers)}
    if False in kinds and not family.dense:
        raise UnsupportedModel(
            "config.json has layers without experts (mlp_only_layers, decoder_sparse_step); SGLang's model has none"
        )
    rules = (*(family.dense if False in kinds else ()), *(family.sparse if True in kinds else ()))
    used = {size for rule in rules for _, size in rule.sources}
    found = []
    for axis, key in family.columns:
        if axis in used:
            size = positive_size(config, key)
            unit = _columns_per_unit(size)
            found.append(Columns(axis, size // unit, unit, key))
    return tuple(found)


def _params(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, _Size], num_layers: int
) -> tuple[ParamSpec, ...]:
    def specs(rules: Iterable[Rule], prefix: str = "", layer: int | None = None) -> Iterator[ParamSpec]:
        for rule in rules:
            if _exists(rule, config):
                yield from _specs(rule, sizes, prefix, layer)

    def layer_rules(layer: int) -> Iterable[Rule]:
        return (*family.layer, *(family.sparse if family.is_sparse(config, layer) else family.dense))

    return (
        *specs(family.before),
        *(spec for n in range(num_layers) for spec in specs(layer_rules(n), f"model.layers.{n}.", n)),
        *specs(family.after),
    )


def _specs(rule: Rule, sizes: Mapping[str, _Size], prefix: str, layer: int | None) -> Iterator[ParamSpec]:
    rest = () if rule.other is None else (sizes[rule.other].elements,)
    per_expert = "{expert}" in rule.sources[0][0]
    for expert in range(sizes["experts"].elements if per_expert else 1):
        blocks, ends = [], defaultdict[str, int](int)
        for tensor, size in rule.sources:
            source = prefix + (tensor.format(expert=expert) if per_expert else tensor)
            blocks.append(Block(source, sizes[size].axis, sizes[size].per_unit, ends[source]))
            ends[source] += sizes[size].elements
        if not per_expert:
            yield ParamSpec(prefix + rule.name, tuple(blocks), rule.dim, rest, layer)
            continue
        dealt = expert if sizes["expert_column"].axis is None else None
        yield ParamSpec(f"{prefix}{rule.name}[{expert}]", tuple(blocks), rule.dim, rest, layer, dealt)


def _exists(rule: Rule, config: Mapping[str, Any]) -> bool:
    wanted = not rule.only_if or any(config.get(key) for key in rule.only_if)
    return wanted and not (rule.unless and config.get(rule.unless))


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or ["(none named)"]
    if architectures[0] not in FAMILIES:
        raise UnsupportedModel(
            f"architecture {architectures[0]} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return str(architectures[0])


def _refuse(config: Mapping[str, Any], architecture: str, family: Family) -> None:
    for key, reason in REFUSED + family.refused:
        if config.get(key):
            raise UnsupportedModel(f"this {architecture} has {key} set in its config.json: {reason}")
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise UnsupportedModel(
            f"this {architecture} has layers of type {', '.join(other)}; only full attention is supported"
        )


def positive_size(config: Mapping[str, Any], key: str) -> int:
    """A size that config.json must name. Raises UnsupportedModel."""
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModel(f"config.json needs a positive {key}, but has {value!r}")
    return value


def _derived_head_dim(hidden_size: int, num_q_heads: int) -> int:
    if hidden_size % num_q_heads:
        raise UnsupportedModel(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_q_heads}; "
            "name head_dim in config.json"
        )
    return hidden_size // num_q_heads


def _columns_per_unit(size: int) -> int:
    """16 columns keep rows of a shard aligned; a narrow MLP is cut finer so that shares can be balanced."""
    return 16 if size % 16 == 0 and size // 16 >= 64 else 1


def _dtype(config: Mapping[str, Any], wanted: str | None) -> str:
    # transformers 5 writes `dtype`, earlier releases `torch_dtype`.
    declared = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if wanted == "auto":
        wanted = "float16" if declared == "float32" else declared
    name = (wanted or declared).lower().removeprefix("torch.")
    if name not in _DTYPE_NAMES:
        raise UnsupportedModel(f"dtype {name} is not supported; use one of {', '.join(_DTYPE_NAMES)}")
    return _DTYPE_NAMES[name]


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
