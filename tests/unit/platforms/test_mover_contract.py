"""What every mover promises: a shard filled and re-laid by real plans is the shard that the plan describes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from planning_cases import Tensors, checkpoint, materialize, model

from anchortp_sglang.planning.layout.moves import fill_moves
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership, split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.platforms.cpu.mover import HostMover
from anchortp_sglang.platforms.mover import Mover, pieces

Platform = tuple[str, Callable[[], Mover]]
Shard = dict[str, torch.Tensor]


def write(part: torch.Tensor, data: memoryview) -> None:
    """What a mover for host memory is given: here past torch, in ranks past the mapping."""
    assert part.is_contiguous() and part.nbytes == len(data)
    ctypes.memmove(part.data_ptr(), bytes(data), len(data))


@pytest.fixture(params=["host", "host, by writing", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request: pytest.FixtureRequest) -> Platform:
    if request.param == "host":
        return "cpu", HostMover
    if request.param == "host, by writing":
        return "cpu", lambda: HostMover(write)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from anchortp_sglang.platforms.cuda.mover import CudaMover

    return "cuda", lambda: CudaMover(torch.device("cuda", torch.cuda.current_device()))


def fill(
    platform: Platform, axes: ModelAxes, new: Ownership, rank: int, old: Ownership | None, shards: dict[int, Shard],
    whole: Tensors,
) -> tuple[Shard, Mover]:  # fmt: skip
    device, make = platform
    layout = shard_layout(axes, new, rank)
    # A memfd holds zeros at first, a GPU's memory anything.
    blank = torch.zeros if device == "cpu" else lambda *shape, **kw: torch.full(shape, torch.nan, **kw)
    target = {placed.name: blank(*placed.shape, dtype=torch.float64, device=device) for placed in layout.params}
    dims = {placed.name: placed.dim for placed in layout.params}
    with make() as mover:
        for name, start, length in layout.padding:
            mover.clear(target[name].narrow(dims[name], start, length))
        for index, move in enumerate(fill_moves(axes, new, rank, old)):
            into = target[move.param].narrow(move.dim, move.start, move.length)
            if move.device is None:
                source = torch.from_numpy(whole[move.source])
                mover.load(into, source.narrow(move.dim, move.source_start, move.length).clone())
            else:
                source = shards[move.device][move.source]
                mover.copy(into, source.narrow(move.dim, move.source_start, move.length))
            mover.layer_done(index)
    return target, mover


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_shards_are_filled_and_re_laid_exactly(platform: Platform, architecture: str) -> None:
    axes = model((12, 4), architecture)
    whole = checkpoint(axes)
    old = split(axes, (0, 1, 2, 3))
    shards = {rank: fill(platform, axes, old, rank, None, {}, whole)[0] for rank in range(4)}
    new = reconfigure(axes, old, [0, 1, 3])
    for rank in range(3):
        layout = shard_layout(axes, new, rank)
        moved, mover = fill(platform, axes, new, rank, old, shards, whole)
        for name, expected in materialize(layout, whole).items():
            np.testing.assert_array_equal(moved[name].cpu().numpy(), expected, err_msg=name)
        assert mover.moved.loaded_bytes > 0 and mover.moved.copied_bytes > 0
        ready = list(mover.moved.layer_ready_s.values())
        assert ready == sorted(ready) and ready[-1] <= mover.moved.seconds + 0.1


@pytest.mark.parametrize(
    "shape, dim", [((4096, 3000), 0), ((4096, 3000), 1), ((7, 900, 2000), 1), ((1, 20_000_000), 1)]
)
def test_what_is_larger_than_a_staging_buffer_arrives_whole(
    platform: Platform, shape: tuple[int, ...], dim: int
) -> None:
    device, make = platform
    wide = torch.zeros(*(size * (2 if at == dim else 1) for at, size in enumerate(shape)), device=device)
    source = torch.arange(wide.numel() // 2, dtype=torch.float32).view(shape)
    with make() as mover:
        into = wide.narrow(dim, shape[dim], shape[dim])
        mover.load(into, source)
    assert torch.equal(into.cpu(), source)
    assert not wide.narrow(dim, 0, shape[dim]).any()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_kept_by_columns_arrives_whole(platform: Platform, stored: torch.dtype) -> None:
    device, make = platform
    wide = torch.arange(700 * 3000, dtype=torch.float32).remainder(251).to(stored).view(700, 3000)
    into = torch.zeros(2000, 700, device=device).t()
    with make() as mover:
        mover.load(into, wide.narrow(1, 500, 2000))
    assert torch.equal(into.cpu(), wide[:, 500:2500].float())
    assert mover.moved.loaded_bytes == into.nbytes


def test_whatever_can_be_written_past_the_mapping_is() -> None:
    written = []
    with HostMover(lambda part, data: written.append(len(data))) as mover:
        mover.load(torch.zeros(700, 3000), torch.ones(700, 3000))
        mover.load(torch.zeros(3000, 700).t(), torch.ones(700, 3000))
        assert sum(written) == 2 * 700 * 3000 * 4 and max(written) <= 1 << 20
        mover.load(torch.zeros(700, 3000)[:, :10], torch.ones(700, 10))  # in many small pieces: through the mapping
    assert sum(written) == 2 * 700 * 3000 * 4


def test_a_load_converts_what_is_stored_in_another_dtype(platform: Platform) -> None:
    device, make = platform
    source = torch.arange(5_000_000, dtype=torch.float64) / 3
    into = torch.zeros(len(source), dtype=torch.bfloat16, device=device)
    with make() as mover:
        mover.load(into, source)
    assert torch.equal(into.cpu(), source.to(torch.bfloat16))


def test_the_source_of_a_load_may_go_away_at_once(platform: Platform) -> None:
    device, make = platform
    into = torch.zeros(64, 1000, device=device)
    with make() as mover:
        for row in range(64):
            source = torch.full((1000,), float(row))
            mover.load(into[row], source)
            source.fill_(-1)
    assert torch.equal(into[:, 0].cpu(), torch.arange(64.0))


def test_an_error_in_between_does_not_hide_what_it_is(platform: Platform) -> None:
    device, make = platform
    with pytest.raises(RuntimeError), make() as mover:
        mover.load(torch.zeros(3, device=device), torch.zeros(4))


@pytest.mark.parametrize("limit", [1, 4, 40, 4000])
def test_pieces_cover_every_element_once(limit: int) -> None:
    source = torch.arange(3 * 5 * 7, dtype=torch.float32).view(3, 5, 7)
    into = torch.zeros(3, 5, 7)
    for part, piece in pieces(into, source, limit):
        assert part.shape == piece.shape and part.nbytes <= max(limit, 4)
        part.add_(piece + 1)
    assert torch.equal(into, source + 1)
