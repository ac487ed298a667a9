"""Small checkpoints of random weights in the formats of quantized releases.

python -m anchortp_sglang.testing.tiny_quantized /tmp/tiny /tmp/tiny-fp8 --kind fp8-block --group 32
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Kind = Literal["fp8-block", "fp8-tensor", "fp8-channel", "awq", "gptq"]
Tensors = dict[str, np.ndarray]

_LARGEST_FP8 = 448.0
_BITS, _PACKED = 4, 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The order in which AWQ packs eight outputs in a 32-bit number, lowest four bits first."""


def write_quantized(source: Path, target: Path, kind: Kind, group: int = 32) -> Path:
    """Write the checkpoint ``source`` to ``target`` with quantized projections, and return ``target``.

    ``group``: rows and columns of an FP8 block, or inputs of an AWQ or GPTQ group. Embeddings, head, norms and
    routers stay as they are.
    """
    tensors: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if ("_proj" in name and name.endswith(".weight")) or ".experts." in name:
                stem = name.removesuffix("weight")
                tensors |= {stem + suffix: made for suffix, made in _WRITERS[kind](tensor, group).items()}
            else:
                tensors[name] = tensor
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _configs(group)[kind]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def _fp8_block(weight: np.ndarray, group: int) -> Tensors:
    rows, columns = (-(-size // group) for size in weight.shape)
    padded = np.zeros((rows * group, columns * group), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, group, columns, group)
    scale = np.abs(blocks).max((1, 3)) / _LARGEST_FP8
    quantized = (blocks / scale[:, None, :, None]).reshape(padded.shape)
    return {"weight": _as_fp8(quantized[: weight.shape[0], : weight.shape[1]]), "weight_scale_inv": scale}


def _fp8_tensor(weight: np.ndarray, group: int) -> Tensors:
    scale = np.float32(np.abs(weight).max() / _LARGEST_FP8)
    return {"weight": _as_fp8(weight / scale), "weight_scale": np.array(scale)}


def _fp8_channel(weight: np.ndarray, group: int) -> Tensors:
    scale = np.abs(weight).max(1, keepdims=True) / _LARGEST_FP8
    return {"weight": _as_fp8(weight / scale), "weight_scale": scale}


def _as_fp8(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.astype(ml_dtypes.float8_e4m3fn))


def _integers(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``weight`` (out, in) to integers (in, out), zero points and scales (groups, out).

    weight = (integer - zero) * scale.
    """
    columns = weight.T.astype(np.float32)
    groups = columns.reshape(-1, group, columns.shape[1])
    low, high = groups.min(1), groups.max(1)
    scale = (high - low) / (2**_BITS - 1)
    zero = np.clip(np.round(-low / scale), 1, 2**_BITS - 1)
    integers = np.clip(np.round(groups / scale[:, None]) + zero[:, None], 0, 2**_BITS - 1)
    return integers.reshape(columns.shape).astype(np.uint32), zero.astype(np.uint32), scale.astype(weight.dtype)


def _packed_outputs(integers: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    eights = integers.reshape(integers.shape[0], -1, _PACKED)[..., list(order)]
    shifts = np.arange(_PACKED, dtype=np.uint32) * _BITS
    return (eights << shifts).sum(-1, dtype=np.uint32).view(np.int32)


def _awq(weight: np.ndarray, group: int) -> Tensors:
    integers, zero, scale = _integers(weight, group)
    return {
        "qweight": _packed_outputs(integers, _AWQ_ORDER),
        "qzeros": _packed_outputs(zero, _AWQ_ORDER),
        "scales": scale,
    }


def _gptq(weight: np.ndarray, group: int) -> Tensors:
    integers, zero, scale = _integers(weight, group)
    in_turn = tuple(range(_PACKED))
    return {
        "qweight": np.ascontiguousarray(_packed_outputs(np.ascontiguousarray(integers.T), in_turn).T),
        "qzeros": _packed_outputs(zero - 1, in_turn),
        "scales": scale,
        "g_idx": (np.arange(weight.shape[1]) // group).astype(np.int32),
    }


_WRITERS: dict[Kind, Callable[[np.ndarray, int], Tensors]] = {
    "fp8-block": _fp8_block,
    "fp8-tensor": _fp8_tensor,
    "fp8-channel": _fp8_channel,
    "awq": _awq,
    "gptq": _gptq,
}


def _configs(group: int) -> dict[Kind, dict[str, Any]]:
    fp8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    integers = {"bits": _BITS, "group_size": group}
    return {
        "fp8-block": fp8 | {"weight_block_size": [group, group]},
        "fp8-tensor": fp8,
        "fp8-channel": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
            "ignore": ["lm_head"],
        },
        "awq": integers | {"quant_method": "awq", "version": "gemm", "zero_point": True},
        "gptq": integers | {"quant_method": "gptq", "desc_act": False, "sym": False},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tiny_quantized", description="Quantize a small checkpoint.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--kind", choices=get_args(Kind), default="fp8-block")
    parser.add_argument("--group", type=int, default=32)
    print(write_quantized(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
