"""Shards of quantized checkpoints, made plain again, are slices of the whole checkpoint made plain again.

So weights, scales and zero points of a shard belong together, and no cut falls into a group of them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_oracle import Share, Tensors, expected
from planned_shards import check_bytes

from anchortp_sglang.planning.layout.coverage import CoverageError, check_coverage, check_sources
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes, UnsupportedModel, read_model_axes, refuse_layout_only
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_quantized import Kind, write_quantized

GROUP = 16
SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "num_q_heads": 8, "num_kv_heads": 4}
SHAPE |= {"intermediate_size": 96, "moe_intermediate_size": 80, "vocab_size": 512, "head_dim": 32}
CASES: tuple[tuple[str, Kind, bool], ...] = (
    ("qwen3", "fp8-block", False),
    ("qwen3", "fp8-tensor", False),
    ("qwen3", "fp8-channel", False),
    ("qwen3", "awq", False),
    ("qwen3", "gptq", False),
    ("phi3", "fp8-block", False),
    ("qwen3_moe", "fp8-block", False),
    ("qwen3_moe", "fp8-block", True),
    ("deepseek_v3", "fp8-block", False),
    ("deepseek_v3", "fp8-block", True),
)
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Kind], Path]:
    pytest.importorskip("torch")

    def write(family: str, kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp("q")
        shape = {name: size for name, size in SHAPE.items() if name != "head_dim" or family.startswith("qwen")}
        plain = write_checkpoint(folder / "plain", family, dtype="bfloat16", **shape)  # type: ignore[arg-type]
        return write_quantized(plain, folder / kind, kind, GROUP)

    return cache(write)


def read_rank(folder: Path, model: ModelAxes, layout: Any) -> Tensors:
    import torch

    from anchortp_sglang.rank.weights.checkpoint import Checkpoint

    filled = {placed.name: torch.zeros(placed.shape, dtype=getattr(torch, placed.dtype)) for placed in layout.params}
    with Checkpoint(folder) as opened:
        for piece in layout.pieces:
            opened.fill(filled[piece.param].narrow(piece.dim, piece.start, piece.length), piece)
    return {name: as_numpy(tensor) for name, tensor in filled.items()}


def as_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def plain(tensors: Tensors, parts: Callable[[str, int], list[int]]) -> Tensors:
    """Weights as they were before quantization, by their old names; ``parts``: rows of what a parameter stacks."""
    made = {}
    for name, tensor in tensors.items():
        stem, _, expert = name.partition("[")
        base, suffix = next(
            ((stem[: -len(end)], end) for end in ("qweight", "weight") if stem.endswith(end)), (stem, "")
        )
        end = f"[{expert}" if expert else ""
        if suffix == "qweight":
            zeros, scales = tensors[f"{base}qzeros{end}"], tensors[f"{base}scales{end}"]
            made[f"{base}weight{end}"] = (gptq if f"{base}g_idx" in tensors else awq)(tensor, zeros, scales)
        elif f"{base}weight_scale_inv{end}" in tensors:
            scale = tensors[f"{base}weight_scale_inv{end}"].repeat(GROUP, 0).repeat(GROUP, 1)
            made[name] = tensor * scale[: tensor.shape[0], : tensor.shape[1]]
        elif f"{base}weight_scale{end}" in tensors:
            scale = tensors[f"{base}weight_scale{end}"]
            if scale.ndim < 2:
                scale = np.repeat(scale.reshape(-1), parts(name, len(tensor)))[:, None]
            made[name] = tensor * scale
        elif suffix or stem.endswith("bias"):
            made[name] = tensor
    return made


def fours(packed: np.ndarray) -> np.ndarray:
    return (packed.view(np.uint32)[..., None] >> (np.arange(8, dtype=np.uint32) * 4)) & 15


def awq(weight: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    integers, zero = (fours(x)[..., list(AWQ_PLACES)].reshape(len(x), -1).astype(float) for x in (weight, zeros))
    return ((integers - zero.repeat(GROUP, 0)) * scales.repeat(GROUP, 0)).T


def gptq(weight: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    integers = fours(weight.T.copy()).reshape(weight.shape[1], -1).T.astype(float)
    zero = fours(zeros).reshape(len(zeros), -1).astype(float) + 1
    return ((integers - zero.repeat(GROUP, 0)) * scales.repeat(GROUP, 0)).T


def whole_tensors(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return plain({name: as_numpy(x) for name, x in load_file(folder / "model.safetensors").items()}, lambda _, n: [n])


def layouts(folder: Path, whole_experts: bool) -> Iterator[tuple[ModelAxes, Any, list[Any]]]:
    model = read_model_axes(read_config(folder), whole_experts=whole_experts)
    wide = split(model, range(4))
    for ownership in (split(model, range(1)), split(model, range(3)), wide, reconfigure(model, wide, (0, 2, 3))):
        yield model, ownership, [shard_layout(model, ownership, rank) for rank in range(ownership.tp_size)]


@pytest.mark.parametrize(("family", "kind", "whole_experts"), CASES)
def test_shards_are_slices_of_the_checkpoint_once_both_are_plain(
    checkpoint: Callable[[str, Kind], Path], family: str, kind: Kind, whole_experts: bool
) -> None:
    from anchortp_sglang.rank.weights.checkpoint import Checkpoint

    folder = checkpoint(family, kind)
    config, whole = read_config(folder), whole_tensors(folder)
    with Checkpoint(folder) as opened:
        shapes = opened.shapes()
    for model, ownership, ranks in layouts(folder, whole_experts):
        check_sources(model, ranks, shapes, shapes)
        for rank, layout in enumerate(ranks):
            check_coverage(layout)
            share = Share(model, ownership, rank, config)
            found = plain(read_rank(folder, model, layout), stacked_rows(share))
            assert len(found) >= 15
            for name, tensor in found.items():
                np.testing.assert_array_equal(tensor, expected(name, whole, share), err_msg=f"{name} of rank {rank}")


def stacked_rows(share: Share) -> Callable[[str, int], list[int]]:
    def parts(name: str, rows: int) -> list[int]:
        if "qkv_proj" in name:
            return [len(share.of_heads(heads)) for heads in (share.q, share.kv, share.kv)]
        return [rows // 2] * 2 if "gate_up_proj" in name else [rows]

    return parts


@pytest.mark.parametrize("kind", ["fp8-block", "awq", "gptq"])
def test_widths_end_on_groups(checkpoint: Callable[[str, Kind], Path], kind: Kind) -> None:
    model = read_model_axes(read_config(checkpoint("qwen3", kind)))
    (mlp,) = model.columns
    assert (mlp.unit, mlp.units) == (GROUP, 96 // GROUP)


def test_heads_of_latent_attention_are_dealt_so_many_at_once_that_they_end_on_blocks(
    checkpoint: Callable[[str, Kind], Path],
) -> None:
    config = read_config(checkpoint("deepseek_v3", "fp8-block"))
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    blocks = config["quantization_config"] | {"weight_block_size": [128, 128]}
    columns = {"moe_intermediate_size": 256, "intermediate_size": 512}
    model = read_model_axes(config | sizes | columns | {"quantization_config": blocks})
    assert (model.num_q_heads, model.heads_per_unit, model.axes["q_head"]) == (8, 2, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 100}, "intermediate_size is 100, no multiple of the 16"),
        ({"head_dim": 24}, "24 elements of q_head belong together, but groups of 16"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}}, "desc_act"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 16}}, r"4 or 8.*found 3"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}}, "gemv"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["re:.*"]}}, "patterns"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "8-bit floats"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 16]}}, "weight_block_size"),
    ],
)
def test_what_there_is_no_rule_for_is_refused_by_name(
    checkpoint: Callable[[str, Kind], Path], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        read_model_axes(read_config(checkpoint("qwen3", "fp8-block")) | changes)


def test_modules_that_are_not_converted_keep_plain_weights(checkpoint: Callable[[str, Kind], Path]) -> None:
    config = read_config(checkpoint("qwen3", "fp8-block"))

    def with_skipped(*names: str) -> dict[str, Any]:
        return config | {"quantization_config": config["quantization_config"] | {"modules_to_not_convert": names}}

    skipped = "model.layers.1.mlp."
    dtypes = {spec.name: spec.dtype for spec in read_model_axes(with_skipped(skipped)).params}
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == "float8_e4m3fn"
    assert dtypes["model.layers.1.mlp.down_proj.weight"] == "bfloat16"
    assert "model.layers.1.mlp.down_proj.weight_scale_inv" not in dtypes
    with pytest.raises(UnsupportedModel, match=r"gate_up_proj.*fuses"):
        read_model_axes(with_skipped("gate_proj"))


def test_quantized_experts_have_a_rule_for_blocks_alone(checkpoint: Callable[[str, Kind], Path]) -> None:
    config = read_config(checkpoint("qwen3_moe", "fp8-block"))
    awq_config = {"quant_method": "awq", "bits": 4, "group_size": GROUP}
    with pytest.raises(UnsupportedModel, match="no rule for experts in AWQ"):
        read_model_axes(config | {"quantization_config": awq_config})


def test_a_quantized_model_is_refused_at_start_with_the_reason(checkpoint: Callable[[str, Kind], Path]) -> None:
    with pytest.raises(UnsupportedModel, match="no kernels for block FP8 on a CPU"):
        refuse_layout_only(read_model_axes(read_config(checkpoint("qwen3", "fp8-block"))))


def test_a_weight_that_is_not_stored_as_the_config_says_is_refused(
    checkpoint: Callable[[str, Kind], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from anchortp_sglang.rank.weights.checkpoint import CheckpointError

    folder, name = checkpoint("qwen3", "fp8-block"), "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].float()}, tmp_path / "model.safetensors")
    model = read_model_axes(read_config(folder))
    with pytest.raises(CheckpointError, match=f"{name} is stored in torch.float32"):
        read_rank(tmp_path, model, shard_layout(model, split(model, range(2)), 0))


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-channel", "awq", "gptq"])
def test_scales_cut_by_a_wrong_rule_are_noticed(checkpoint: Callable[[str, Kind], Path], kind: Kind) -> None:
    """Every block of a scale once shifted or shortened by an element: coverage fails, or the checkpoint's shape."""
    from anchortp_sglang.rank.weights.checkpoint import Checkpoint

    folder = checkpoint("qwen3", kind)
    with Checkpoint(folder) as opened:
        shapes = opened.shapes()
    model = read_model_axes(read_config(folder))
    scale = "qkv_proj." + {"fp8-block": "weight_scale_inv", "fp8-channel": "weight_scale"}.get(kind, "scales")
    for change in ({"elements_per_unit": 1}, {"offset": 1}):
        wrong = dataclasses.replace(
            model,
            params=tuple(
                dataclasses.replace(spec, blocks=tuple(dataclasses.replace(one, **change) for one in spec.blocks))
                if spec.name.endswith(scale)
                else spec
                for spec in model.params
            ),
        )
        ownership = split(wrong, range(3))
        with pytest.raises(CoverageError, match="proj"):
            check_sources(wrong, [shard_layout(wrong, ownership, rank) for rank in range(3)], shapes, shapes)


@pytest.mark.parametrize(("family", "kind", "whole_experts"), CASES)
def test_the_planner_counts_the_bytes_of_the_shards(
    checkpoint: Callable[[str, Kind], Path], family: str, kind: Kind, whole_experts: bool
) -> None:
    model = read_model_axes(read_config(checkpoint(family, kind)), whole_experts=whole_experts)
    for devices in (1, 2, 3):
        check_bytes(model, split(model, range(devices)))
