"""Random weights are the same whoever makes them, in whichever slices."""

import pytest
import torch

from anchortp_sglang.planning.layout.moves import fill_moves
from anchortp_sglang.planning.layout.shards import Piece
from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.rank.weights import random_checkpoint
from anchortp_sglang.rank.weights.checkpoint import Checkpoint
from anchortp_sglang.rank.weights.random_checkpoint import LARGEST, RandomCheckpoint
from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint


@pytest.fixture(params=["llama", "qwen3_moe", "deepseek_v2"])
def folder(request, tmp_path):
    return write_checkpoint(tmp_path, request.param, num_layers=2)


def whole(checkpoint, name, transposed=False):
    shape = checkpoint.shapes()[name]
    return checkpoint.read(Piece("p", 0, 0, shape[-1 if transposed else 0], name, 0, transposed), torch.float32)


def test_it_has_the_tensors_of_the_checkpoint_and_fills_every_move(folder):
    model = read_model_axes(read_config(folder))
    made = RandomCheckpoint(model)
    with Checkpoint(folder) as opened:
        shapes = opened.shapes()
        assert made.shapes().items() <= shapes.items()
        for rank in range(2):
            for move in fill_moves(model, split(model, range(2)), rank, None):
                assert made.read(move, torch.bfloat16).shape == opened.read(move, torch.float32).shape


def test_slices_are_parts_of_the_whole(folder, monkeypatch):
    made = RandomCheckpoint(read_model_axes(read_config(folder)))
    everything = whole(made, "model.embed_tokens.weight")
    rows, columns = everything.shape
    monkeypatch.setattr(random_checkpoint, "_CHUNK", 1000)  # several chunks
    assert torch.equal(whole(made, "model.embed_tokens.weight"), everything)
    for dim, (start, length) in ((0, (5, rows // 2)), (1, (3, columns // 3))):
        part = made.read(Piece("p", dim, 0, length, "model.embed_tokens.weight", start), torch.float32)
        assert torch.equal(part, everything.narrow(dim, start, length))
    turned = made.read(Piece("p", 0, 0, 7, "model.embed_tokens.weight", 2, transposed=True), torch.float32)
    assert torch.equal(turned, everything.t()[2:9])


def test_weights_are_spread_evenly_and_differ_between_tensors(folder):
    made = RandomCheckpoint(read_model_axes(read_config(folder)))
    embedding, head = whole(made, "model.embed_tokens.weight"), whole(made, "lm_head.weight")
    assert embedding.abs().max() <= LARGEST
    assert abs(embedding.mean()) < 0.02 * LARGEST
    assert embedding.std() == pytest.approx(LARGEST / 3**0.5, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([embedding.flatten(), head.flatten()]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([embedding[:-1].flatten(), embedding[1:].flatten()]))[0, 1]) < 0.02
