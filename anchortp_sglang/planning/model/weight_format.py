"""How weights are stored: plain, block-FP8, per-tensor FP8, or MXFP4; and what each tensor then weighs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from anchortp_sglang.planning.model.axes import UnsupportedModel
from anchortp_sglang.planning.model.plan_model import TensorPart

FP32_BYTES = 4
MXFP4_BLOCK = 32
"""MXFP4 packs 32 numbers into 16 bytes and a scale of one byte."""

_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class WeightFormat:
    """``kind``: "none", "fp8-block", "fp8-tensor" or "mxfp4". ``block`` are the rows and columns that share a
    scale. Modules whose name holds one of ``unquantized`` keep ``dtype``.

    Scales are counted as SGLang keeps them on the device, in float32, even if the checkpoint's are bfloat16.
    """

    dtype: str
    kind: str = "none"
    block: tuple[int, int] = (1, 1)
    unquantized: tuple[str, ...] = ()
    input_scales: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of an element that is not quantized."""
        return _DTYPE_BYTES[self.dtype]

    def applies(self, name: str) -> bool:
        """Whether the FP8 formats apply to a weight that can be quantized."""
        return self.kind.startswith("fp8") and not any(skip in name for skip in self.unquantized)

    def aligned(self, name: str, dim: int, per_unit: int) -> int:
        """The least multiple of ``per_unit`` elements that ends on a block."""
        return lcm(per_unit, self.block[dim]) if self.kind == "fp8-block" and self.applies(name) else per_unit

    def parts(self, part: TensorPart) -> tuple[TensorPart, ...]:
        """The tensors that a quantizable weight becomes; ``part`` is given with unquantized elements."""
        if not self.applies(part.name):
            return (part,)
        stem, weight = part.name, TensorPart(part.name, part.shape, 1, part.dim, part.per_unit, part.experts)
        if self.kind == "fp8-tensor":
            names = [stem + "_scale"] + ([stem.removesuffix("weight") + "input_scale"] if self.input_scales else [])
            return (weight, *(TensorPart(name, (), FP32_BYTES, experts=part.experts) for name in names))
        shape = tuple(-(-size // block) for size, block in zip(part.shape, self.block, strict=True))
        per_unit = part.per_unit if part.dim is None else part.per_unit // self.block[part.dim]
        return (weight, TensorPart(stem + "_scale_inv", shape, FP32_BYTES, part.dim, per_unit, part.experts))


def read_weight_format(config: Mapping[str, Any], dtype: str | None = None) -> WeightFormat:
    """The format that a config.json names; ``dtype`` overrides its dtype. Raises UnsupportedModel."""
    name = str(dtype or config.get("torch_dtype") or config.get("dtype") or "float32")
    name = name.lower().removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in _DTYPE_BYTES:
        raise UnsupportedModel(f"dtype: no rule for {name}; there are rules for {', '.join(_DTYPE_BYTES)}")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise UnsupportedModel(f"quantization_config: expected an object, found {quantization!r}")
    if not quantization:
        return WeightFormat(name)
    skip = quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or ()
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return WeightFormat(name, "mxfp4")
    if method != "fp8":
        raise UnsupportedModel(
            f"quantization_config.quant_method: no rule for {method!r}; there are rules for fp8 and mxfp4"
        )
    unquantized, static = tuple(map(str, skip)), quantization.get("activation_scheme") == "static"
    block = quantization.get("weight_block_size")
    if block is None:
        return WeightFormat(name, "fp8-tensor", unquantized=unquantized, input_scales=static)
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise UnsupportedModel(f"quantization_config.weight_block_size: expected two sizes, found {block!r}")
    return WeightFormat(name, "fp8-block", (block[0], block[1]), unquantized)
