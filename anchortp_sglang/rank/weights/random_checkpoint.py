"""Random weights instead of a checkpoint's (``--load-format dummy``), for trials of a model's size and speed."""

import zlib

import torch

from anchortp_sglang.planning.layout.moves import Move
from anchortp_sglang.planning.layout.shards import Piece, sources
from anchortp_sglang.planning.model.axes import ModelAxes

LARGEST = 1e-3
"""Weights are between -LARGEST and LARGEST, as those of SGLang's dummy loader."""

_CHUNK = 1 << 22


class RandomCheckpoint:
    """A stand-in for :class:`anchortp_sglang.rank.weights.checkpoint.Checkpoint`, without files.

    A weight depends on its tensor's name and its place in it alone, so that a shard made again after a loss is as it
    was, and all widths compute the same.
    """

    def __init__(self, model: ModelAxes) -> None:
        self._shapes = {name: source.shape for name, source in sources(model).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, piece: Piece | Move, wanted: torch.dtype) -> torch.Tensor:
        """Return the slice that a piece, or a move of the kind "reload", needs, in the dtype ``wanted``."""
        shape = self._shapes[piece.source] or (1,)
        dims = list(range(len(shape)))
        if piece.transposed:
            dims[-2:] = reversed(dims[-2:])
        dim = dims[piece.dim]
        found = torch.empty((*shape[:dim], piece.length, *shape[dim + 1 :]), dtype=wanted)
        seed = zlib.crc32(piece.source.encode())
        rows = max(1, _CHUNK * found.shape[0] // max(1, found.numel()))
        for first in range(0, found.shape[0], rows):
            part = found[first : first + rows]
            starts = [0] * len(shape)
            starts[0] = first
            starts[dim] += piece.source_start
            part.copy_(_weights(shape, starts, part.shape, seed))
        return found.transpose(-2, -1) if piece.transposed else found


def _weights(shape: tuple[int, ...], starts: list[int], lengths: torch.Size, seed: int) -> torch.Tensor:
    """Return the weights of a block of a tensor: a hash of each element's index (murmur3's finalizer, 32 bits)."""
    index = torch.full((1,) * len(shape), seed - (1 << 31), dtype=torch.int32)
    stride = 1
    for dim in reversed(range(len(shape))):
        along = (torch.arange(starts[dim], starts[dim] + lengths[dim], dtype=torch.int64) * stride).to(torch.int32)
        index = index + along.reshape([-1 if each == dim else 1 for each in range(len(shape))])
        stride *= shape[dim]
    for factor, shift in ((-2048144789, 16), (-1028477387, 13)):
        index = (index ^ (index >> shift & 0xFFFF)) * factor
    return (index ^ (index >> 16 & 0xFFFF)).to(torch.float32) * (LARGEST / (1 << 31))
