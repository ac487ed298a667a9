"""The one door to a shard: where its bytes lie, the proof that they are complete, and how they are filled."""

from anchortp_sglang.planning.coverage import CoverageError, check_coverage, check_sources
from anchortp_sglang.planning.moves import Move, MoveKind, fill_moves, moved_bytes
from anchortp_sglang.planning.shards import Piece, Placed, ShardLayout, shard_layout, source_shape

__all__ = [
    "CoverageError",
    "Move",
    "MoveKind",
    "Piece",
    "Placed",
    "ShardLayout",
    "check_coverage",
    "check_sources",
    "fill_moves",
    "moved_bytes",
    "shard_layout",
    "source_shape",
]
