"""One of each checkpoint for all engine tests."""

import shutil
import tempfile
from pathlib import Path

import leftovers
import pytest

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

MULTIMODAL = ("mistral3", "qwen2_5_vl", "qwen3_vl_moe")
CHECKPOINTS = {
    "qwen3": {"num_layers": 4, "shards": 2},
    "qwen2": {"num_layers": 4, "num_kv_heads": 2, "tie_word_embeddings": True},
    "llama": {"num_layers": 4},
    **{
        family: {"num_layers": 3}
        for family in ("phi3", "glm4", "gemma2", "olmo2", "mixtral", "qwen3_moe", "deepseek_v2", *MULTIMODAL)
    },
    # A full layer after five with a window, which the longest prompt outgrows.
    "gemma3": {"num_layers": 6, "sliding_window": 64},
    **{kind: {"num_layers": 4, "sliding_window": 64} for kind in ("gemma4", "gemma4_small")},
    "gemma4_sparse": {"num_layers": 3, "sliding_window": 64},
    "deepseek_v3": {"num_layers": 3, "num_dense_layers": 1},
}
"""Untied with explicit head_dim; tied with qkv bias and two KV heads; head_dim derived from hidden_size; others."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """family -> folder of its checkpoint. Read only: tests that damage one copy it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(folder / family, family, **shape) for family, shape in CHECKPOINTS.items()}


@pytest.fixture
def run_base():
    """A short, empty folder for run directories and temporary files, see ``places``."""
    folder = Path(tempfile.mkdtemp(prefix="atp"))
    (folder / "tmp").mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def places(run_base):
    """Environment that makes a server put all its files under ``run_base``; nothing may be left there."""
    yield {"XDG_RUNTIME_DIR": str(run_base), "TMPDIR": str(run_base / "tmp")}
    assert leftovers.files(run_base) == []
