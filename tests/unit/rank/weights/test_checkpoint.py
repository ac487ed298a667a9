"""Checkpoints as users have them are read as SGLang reads them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anchortp_sglang.planning.layout.coverage import CoverageError, check_sources, foreign_sources
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.rank.weights.checkpoint import Checkpoint
from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

SHAPE = {"num_layers": 2, "hidden_size": 64, "num_q_heads": 4, "num_kv_heads": 2, "intermediate_size": 32}


def written(path: Path, family: str = "llama") -> Path:
    return write_checkpoint(path, family, **SHAPE)  # type: ignore[arg-type]


def with_tensors(folder: Path, *names: str) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: np.zeros(3, np.float32) for name in names}, file)
    return folder


def unused(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a start finds that it does not need, and of that what SGLang would warn of."""
    model = read_model_axes(read_config(folder))
    ownership = split(model, range(2))
    with Checkpoint(folder) as opened:
        shapes = opened.shapes()
    found = check_sources(model, [shard_layout(model, ownership, rank) for rank in range(2)], shapes, shapes)
    return found, foreign_sources(model, found)


def names(folder: Path) -> set[str]:
    with Checkpoint(folder) as opened:
        return set(opened.shapes())


def test_mistrals_consolidated_file_beside_a_whole_one_is_not_read(tmp_path: Path) -> None:
    before = names(written(tmp_path, "mistral"))
    save_file({"layers.0.attention.wq.weight": np.zeros(3, np.float32)}, tmp_path / "consolidated.safetensors")
    assert names(tmp_path) == before


def test_a_consolidated_file_alone_is_read(tmp_path: Path) -> None:
    before = names(written(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert names(tmp_path) == before


def test_a_consolidated_file_beside_several_without_an_index_is_left_out_by_its_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mistral", shards=2, **SHAPE)  # type: ignore[arg-type]
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"layers.0.attention.wq.weight": np.zeros(3, np.float32)}, tmp_path / "consolidated.safetensors")
    assert unused(tmp_path) == (("layers.0.attention.wq.weight",),) * 2


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
        "model.layers.1.self_attn.v_proj.v_scale",
        "model.layers.1.self_attn.kv_scale",
        "model.layers.2.mlp.up_proj.weight",
        "model.vision_tower.patch.weight",
    ],
)
def test_what_sglang_skips_for_every_model_is_not_needed(tmp_path: Path, name: str) -> None:
    assert unused(with_tensors(written(tmp_path), name)) == ((name,), ())


def test_what_is_not_the_models_is_left_out_and_told(tmp_path: Path) -> None:
    heads = ("v_head.summary.bias", "v_head.summary.weight")
    assert unused(with_tensors(written(tmp_path), *heads)) == (heads, heads)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.layers.0.odd.weight", "model.odd.weight"])
def test_an_unknown_tensor_of_the_model_itself_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CoverageError, match=f"no place for: {name}"):
        unused(with_tensors(written(tmp_path), name))
