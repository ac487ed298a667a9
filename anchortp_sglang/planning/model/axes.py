"""The axes along which a model can be split, and the parameters that lie on them, read from a HF config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.model.families import FAMILIES
from anchortp_sglang.planning.model.parameters import DTYPE_BYTES, Block, ParamSpec, param_specs
from anchortp_sglang.planning.model.quantization import read_quantization
from anchortp_sglang.planning.model.rules import HEAD, REFUSED, UNUSED_SOURCES, Family
from anchortp_sglang.planning.model.sizes import (
    Columns,
    LayerKV,
    UnsupportedModel,
    layer_shape,
    positive_size,
    read_sizes,
)

__all__ = [
    "Block",
    "Columns",
    "Intervals",
    "LayerKV",
    "ModelAxes",
    "ParamSpec",
    "UnsupportedModel",
    "caveats",
    "equal_vocab_cut",
    "has_unlike_layers",
    "padded_vocab_rows",
    "positive_size",
    "read_model_axes",
    "refuse_layout_only",
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


@dataclass(frozen=True)
class ModelAxes:
    """A model's sizes, axes and parameters. Sizes are the whole model's, in elements unless named otherwise.

    ``columns``: the axes besides heads and vocabulary. ``params``: in the order of execution. ``unused_sources``:
    regular expressions (searched) for checkpoint tensors that are not needed. ``kv``: what each layer keeps; None for
    a layer that reads the KV of an earlier one. ``num_kv_heads`` and ``head_dim`` are those of layers with full
    attention. ``latent_kv``: there is one KV head, of the latents. ``heads_per_unit``: query heads that are dealt
    together. ``quantization``: its name, None for a plain checkpoint.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_q_heads: int
    heads_per_unit: int
    num_kv_heads: int
    head_dim: int
    kv: tuple[LayerKV | None, ...]
    latent_kv: bool
    vocab_size: int
    tie_word_embeddings: bool
    dtype: str
    dtype_bytes: int
    columns: tuple[Columns, ...]
    params: tuple[ParamSpec, ...]
    unused_sources: tuple[str, ...]
    quantization: str | None

    @property
    def axes(self) -> dict[str, int]:
        """Units of each axis.

        "vocab" is the padded rows of a single rank; with more ranks the padding may grow, see ``padded_vocab_rows``.
        """
        return {
            "q_head": self.num_q_heads // self.heads_per_unit,
            "kv_head": self.num_kv_heads,
            **{columns.axis: columns.units for columns in self.columns},
            "vocab": padded_vocab_rows(self.vocab_size, 1),
        }

    @property
    def window_kv_axis(self) -> str:
        """Axis along which the KV of layers with a sliding window is dealt."""
        return next((kv.axis for kv in self.kv if kv is not None and kv.axis != "kv_head"), "kv_head")

    @property
    def group_size(self) -> int:
        """Units of query heads per KV head."""
        return self.axes["q_head"] // self.num_kv_heads


def padded_vocab_rows(vocab_size: int, tp_size: int) -> int:
    """Count the rows of the vocabulary after padding, over all ranks (``VocabParallelEmbedding.__init__``)."""
    padding = VOCAB_PADDING_ROWS
    if _round_up(vocab_size, padding) % tp_size:
        padding *= tp_size
    return _round_up(vocab_size, padding)


def equal_vocab_cut(vocab_size: int, tp_size: int) -> tuple[Intervals, ...]:
    """Cut the vocabulary as SGLang does: equal runs of padded rows; rows from ``vocab_size`` on are padding."""
    rows = padded_vocab_rows(vocab_size, tp_size) // tp_size
    return tuple(((rank * rows, (rank + 1) * rows),) for rank in range(tp_size))


def read_model_axes(config: Mapping[str, Any], dtype: str | None = None, *, whole_experts: bool = False) -> ModelAxes:
    """Read a config.json. Experts are cut along their columns, or with ``whole_experts`` dealt whole.

    ``dtype`` is SGLang's ``--dtype``: None keeps the dtype that the config names, "auto" follows SGLang
    (``_get_and_verify_dtype``: float32 checkpoints are served in float16). Raises UnsupportedModel, with the reason,
    for a model that cannot be served.
    """
    try:
        return _read(config, dtype, whole_experts)
    except UnsupportedModel:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Fields are checked where they are used; a wrong type shows only there.
        raise UnsupportedModel(f"config.json: a field cannot be read ({type(error).__name__}: {error})") from error


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether the architecture is a mixture of experts. Raises UnsupportedModel for an unknown one."""
    return FAMILIES[_architecture(config)].experts is not None


def _read(config: Mapping[str, Any], dtype: str | None, whole_experts: bool) -> ModelAxes:
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse(config, architecture, family)
    config = family.resolved(config)
    quantization = read_quantization(config)
    group = 1 if quantization is None else quantization.group
    if whole_experts and not family.experts:
        raise UnsupportedModel(f"this {architecture} has no experts: leave --ep-size out")
    heads, columns, sizes = read_sizes(family, config, group, whole_experts)
    num_layers = positive_size(config, "num_hidden_layers")
    layers = tuple(layer_shape(family, config, layer, heads, sizes) for layer in range(num_layers))
    tied = bool(config.get("tie_word_embeddings", False))
    dtype = _dtype(config, dtype)
    return ModelAxes(
        architecture=architecture,
        hidden_size=sizes["hidden"].elements,
        num_layers=num_layers,
        num_q_heads=heads.num_q_heads,
        heads_per_unit=heads.heads_per_unit,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        kv=tuple(layer.kv for layer in layers),
        latent_kv=family.latent_kv,
        vocab_size=sizes["vocab"].elements,
        tie_word_embeddings=tied,
        dtype=dtype,
        dtype_bytes=DTYPE_BYTES[dtype],
        columns=columns,
        params=param_specs(family, config, sizes, layers, dtype, whole_experts, quantization),
        unused_sources=(
            *UNUSED_SOURCES,
            *family.unused,
            *(() if quantization is None else quantization.unused),
            *((r"^lm_head\.weight$",) if tied else ()),
            *(
                rf"^model\.layers\.{n}\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."
                for n, layer in enumerate(layers)
                if layer.kv is None
            ),
            # Layers after the last one, those for multi-token prediction among them (`get_layer_id`, `end_layer`).
            rf"^model\.layers\.(?!(?:{'|'.join(map(str, range(num_layers)))})\.)\d+\.",
        ),
        quantization=None if quantization is None else quantization.name,
    )


def has_unlike_layers(model: ModelAxes) -> bool:
    """Return whether a family's layers may differ in heads and columns (Gemma-4)."""
    return FAMILIES[model.architecture].of_layer is not None


def refuse_layout_only(model: ModelAxes) -> None:
    """Raise UnsupportedModel if there are rules for a model, but SGLang cannot serve it on this platform."""
    reason = FAMILIES[model.architecture].layout_only
    if model.quantization is not None:
        reason = (
            f"SGLang has no kernels for {model.quantization} on a CPU without AMX, and its quantization_config "
            "asks for them; use an unquantized checkpoint"
        )
    if reason is not None:
        raise UnsupportedModel(f"this {model.architecture} cannot be served: {reason}")


def caveats(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings for the operator where SGLang on this platform differs from the released model."""
    family = FAMILIES[_architecture(config)]
    config = family.resolved(config)
    return tuple(text for key, text in family.caveats if config.get(key))


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnsupportedModel("architectures: none named in config.json, whose first one says what the model is")
    if architectures[0] not in FAMILIES:
        raise UnsupportedModel(
            f"architecture {architectures[0]} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return str(architectures[0])


def _refuse(config: Mapping[str, Any], architecture: str, family: Family) -> None:
    for key, reason in REFUSED + family.refused:
        if config.get(key):
            raise UnsupportedModel(f"this {architecture} has {key} set in its config.json: {reason}")
    if config.get("tie_word_embeddings") is False and all(rule.name != HEAD.name for rule in family.after):
        raise UnsupportedModel(
            f"this {architecture} has tie_word_embeddings: false in its config.json; SGLang's model has its embedding "
            "for a head"
        )
    other = sorted(set(config.get("layer_types") or ()) - set(family.layer_types))
    if other:
        raise UnsupportedModel(
            f"this {architecture} has layers of type {', '.join(other)}; "
            f"it is supported with {', '.join(family.layer_types)} alone"
        )


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
