"""A LoRA adapter of random weights in PEFT's format, for a checkpoint that `tiny_checkpoint` has written."""

import json
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SPREAD = 0.2
"""Large enough to make other tokens than the model without it, from the first one on."""


def write_adapter(
    path: Path, checkpoint: Path, *, seed: int, rank: int = 4, projections: Collection[str] = PROJECTIONS
) -> Path:
    """Write an adapter of all layers' ``projections``, and return its folder. Values depend on seed and names alone."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in projections:
            rows, columns = weight.shape
            for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                rng = np.random.default_rng([seed, zlib.crc32(f"{module}.{part}".encode())])
                noise = _SPREAD * rng.standard_normal(shape, dtype=np.float32)
                tensors[f"base_model.model.{module}.{part}.weight"] = noise
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(projections),
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path
