"""Each rank's parameters, read from a real checkpoint of every family, are slices of the whole tensors."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_oracle import Share, Tensors, expected, layer_of
from planned_shards import check_bytes
from safetensors.numpy import load_file

from anchortp_sglang.planning.layout.coverage import check_coverage, check_sources
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes, read_model_axes
from anchortp_sglang.planning.model.families import FAMILIES as RULES
from anchortp_sglang.planning.model.wrappers import WRAPPERS, language_tensor
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure, rotating_split
from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_families import FAMILIES as TINY_FAMILIES
from anchortp_sglang.testing.tiny_wrappers import WRAPPED

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 96, "num_q_heads": 8, "num_kv_heads": 4, "shards": 2}
SHAPE |= {"intermediate_size": 72, "moe_intermediate_size": 24, "vocab_size": 512}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "qwen3_vl_moe", "gemma4_sparse")
FAMILIES = [
    *("llama", "qwen2", "qwen3", "mistral", "phi3", "glm4", "gemma2", "gemma3_text", "olmo2"),
    *EXPERTS,
    "deepseek_v2 without q_lora",
    *("gemma4_text", "gemma4_small", "gemma4"),
    *("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def write(family: str) -> Path:
        name, _, variant = family.partition(" ")
        shape = SHAPE | ({"q_lora_rank": 0} if variant else {}) | ({"head_dim": 16} if "gemma" in name else {})
        return write_checkpoint(tmp_path_factory.mktemp("c"), name, **shape)  # type: ignore[arg-type]

    return cache(write)


def whole_tensors(folder: Path) -> Tensors:
    """The checkpoint's tensors; of a multimodal model under the names that its language model alone would have."""
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {language_tensor(name): tensor for file in files for name, tensor in file.items()}


def read_ranks(folder: Path, model: ModelAxes, ownership: Ownership) -> list[Tensors]:
    """What the loader would put into the anchors: every piece through the code that a rank reads it with."""
    import torch

    from anchortp_sglang.rank.weights.checkpoint import Checkpoint

    layouts = [shard_layout(model, ownership, rank) for rank in range(ownership.tp_size)]
    with Checkpoint(folder) as opened:
        shapes = opened.shapes()
        check_sources(model, layouts, shapes, shapes)
        ranks = []
        for layout in layouts:
            check_coverage(layout)
            filled = {
                placed.name: torch.full(placed.shape, torch.nan, dtype=getattr(torch, placed.dtype))
                for placed in layout.params
            }
            dims = {placed.name: placed.dim for placed in layout.params}
            for name, start, length in layout.padding:
                filled[name].narrow(dims[name], start, length).zero_()
            for piece in layout.pieces:
                opened.fill(filled[piece.param].narrow(piece.dim, piece.start, piece.length), piece)
            ranks.append({name: tensor.float().numpy() for name, tensor in filled.items()})
    return ranks


def ownerships(model: ModelAxes) -> Iterator[Ownership]:
    for tp_size in (1, 2, 3, 4, 6):
        if tp_size <= model.axes["q_head"]:
            yield split(model, range(tp_size))
    if model.num_kv_heads == 4:
        yield split(model, range(3), [1, 2, 1])
    wide = split(model, range(4))
    yield reconfigure(model, wide, (0, 2, 3))
    yield reconfigure(model, reconfigure(model, wide, (1, 2, 3)), (1, 3))
    rotated = rotating_split(model, range(3))
    yield rotated
    yield reconfigure(model, rotated, (0, 2), rotate=True)


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_each_rank_are_slices_of_the_checkpoint(
    checkpoint: Callable[[str], Path], family: str, whole_experts: bool
) -> None:
    pytest.importorskip("torch")
    if whole_experts and family.split()[0] not in EXPERTS:
        pytest.skip("no experts")
    folder = checkpoint(family)
    whole, config = whole_tensors(folder), read_config(folder)
    model = read_model_axes(config, whole_experts=whole_experts)
    for ownership in ownerships(model):
        for rank, found in enumerate(read_ranks(folder, model, ownership)):
            for name, tensor in found.items():
                share = Share(model, ownership, rank, config, layer_of(name))
                np.testing.assert_array_equal(tensor, expected(name, whole, share), err_msg=f"{name} of rank {rank}")


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_counts_the_bytes_of_the_shards(
    checkpoint: Callable[[str], Path], family: str, whole_experts: bool
) -> None:
    if whole_experts and family.split()[0] not in EXPERTS:
        pytest.skip("no experts")
    model = read_model_axes(read_config(checkpoint(family)), whole_experts=whole_experts)
    for ownership in ownerships(model):
        check_bytes(model, ownership)


def test_these_are_all_families(checkpoint: Callable[[str], Path]) -> None:
    names = {family.split()[0] for family in FAMILIES}
    assert names == TINY_FAMILIES.keys() | WRAPPED.keys()
    assert {read_config(checkpoint(family))["architectures"][0] for family in names} == set(RULES)
    others = {"Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration", *RULES}
    assert {one.architecture for one in WRAPPED.values()} == set(WRAPPERS) - others
