"""Random checkpoints of several sizes for benchmarks: Qwen3 with 4 KV heads, float32."""

from enum import StrEnum
from pathlib import Path
from typing import Any


class ModelSize(StrEnum):
    """Sizes by number of parameters. Serving one takes as much memory again as its checkpoint does."""

    TINY = "tiny"
    M100 = "100m"
    B1 = "1b"
    B1_5 = "1.5b"


VOCAB_SIZE = 2048
_LARGE: dict[str, Any] = {"num_kv_heads": 4, "head_dim": 128, "vocab_size": VOCAB_SIZE, "shards": 8}
_SHAPES: dict[ModelSize, dict[str, Any]] = {
    ModelSize.TINY: {"vocab_size": VOCAB_SIZE},
    ModelSize.M100: _LARGE | {"hidden_size": 1024, "num_layers": 10, "num_q_heads": 8, "intermediate_size": 2560},
    ModelSize.B1: _LARGE | {"hidden_size": 2048, "num_layers": 20, "num_q_heads": 16, "intermediate_size": 6144},
    ModelSize.B1_5: _LARGE | {"hidden_size": 2048, "num_layers": 30, "num_q_heads": 16, "intermediate_size": 6144},
}


def make_model(folder: Path, size: ModelSize) -> Path:
    """Write the checkpoint and return its folder."""
    from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint  # here, as it imports numpy

    return write_checkpoint(folder, "qwen3", **_SHAPES[size])
