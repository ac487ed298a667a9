"""From a HF config.json to the axes a model can be split along and the parameters that lie on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.planning.families import FAMILIES, REFUSED, UNUSED_SOURCES, Family, Rule
from anchortp_sglang.planning.intervals import Intervals

__all__ = [
    "Block",
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
    """A run of one parameter along its split dimension that comes from one checkpoint tensor.

    ``axis`` None: every rank holds the whole extent, which is ``elements_per_unit``.
    """

    source: str
    axis: str | None
    elements_per_unit: int


@dataclass(frozen=True)
class ParamSpec:
    """An SGLang parameter: its blocks stacked along ``dim``, ``rest`` the sizes of its other dimensions.

    A rank's shape is ``rest`` with the extent of its units inserted at ``dim``. ``layer`` None: outside of
    the decoder layers.
    """

    name: str
    blocks: tuple[Block, ...]
    dim: int
    rest: tuple[int, ...]
    layer: int | None


@dataclass(frozen=True)
class ModelAxes:
    """What a model is made of. Sizes are the whole model's, in elements unless named otherwise.

    ``mlp_unit`` is the columns of one "mlp" unit; ``params`` are in the order of execution;
    ``unused_sources`` are regular expressions (searched) for checkpoint tensors that nobody needs.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    dtype: str
    dtype_bytes: int
    mlp_unit: int
    params: tuple[ParamSpec, ...]
    unused_sources: tuple[str, ...]

    @property
    def axes(self) -> dict[str, int]:
        """Units of each axis. "vocab" is the padded rows of a single rank; with more ranks the padding may
        grow, see ``padded_vocab_rows``."""
        return {
            "q_head": self.num_q_heads,
            "kv_head": self.num_kv_heads,
            "mlp": self.intermediate_size // self.mlp_unit,
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


def read_model_axes(config: Mapping[str, Any], dtype: str | None = None) -> ModelAxes:
    """Read a config.json.

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
    intermediate_size = positive_size(config, "intermediate_size")
    mlp_unit = _mlp_unit(intermediate_size)
    num_layers, vocab_size = positive_size(config, "num_hidden_layers"), positive_size(config, "vocab_size")
    sizes: dict[str, tuple[str | None, int]] = {
        "q_head": ("q_head", head_dim),
        "kv_head": ("kv_head", head_dim),
        "mlp": ("mlp", mlp_unit),
        "vocab": ("vocab", 1),
        "hidden": (None, hidden_size),
        "head_dim": (None, head_dim),
    }
    tied = bool(config.get("tie_word_embeddings", False))
    dtype = _dtype(config, dtype)
    return ModelAxes(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        dtype=dtype,
        dtype_bytes=_DTYPE_BYTES[dtype],
        mlp_unit=mlp_unit,
        params=_params(family, config, sizes, num_layers),
        unused_sources=UNUSED_SOURCES + ((r"^lm_head\.weight$",) if tied else ()),
    )


def _params(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, tuple[str | None, int]], num_layers: int
) -> tuple[ParamSpec, ...]:
    def spec(rule: Rule, prefix: str = "", layer: int | None = None) -> ParamSpec:
        blocks = tuple(Block(prefix + source, *sizes[size]) for source, size in rule.sources)
        rest = () if rule.other is None else (sizes[rule.other][1],)
        return ParamSpec(prefix + rule.name, blocks, rule.dim, rest, layer)

    before, layers, after = (
        [rule for rule in rules if _exists(rule, config)] for rules in (family.before, family.layer, family.after)
    )
    return (
        *(spec(rule) for rule in before),
        *(spec(rule, f"model.layers.{n}.", n) for n in range(num_layers) for rule in layers),
        *(spec(rule) for rule in after),
    )


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


def _mlp_unit(intermediate_size: int) -> int:
    """16 columns keep rows of a shard aligned; a narrow MLP is cut finer so that shares can be balanced."""
    return 16 if intermediate_size % 16 == 0 and intermediate_size // 16 >= 64 else 1


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
