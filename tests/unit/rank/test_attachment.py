"""What a rank writes into a shard past its mappings, in the memory of a real anchor."""

from __future__ import annotations

from pathlib import Path

import pytest
from anchor_rig import AnchorRig
from planning_cases import model

from anchortp_sglang.planning.layout.extents import WeightPlacement, hold
from anchortp_sglang.planning.layout.kv_layout import KVPlan
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.rank.attachment import Assignment, Attachment

AXES = model((8, 4), hidden_size=1024, head_dim=128, intermediate_size=6144, vocab_size=2048)
KV = KVPlan(slots=1, page_size=1, dtype_bytes=4)


def attachment(rig: AnchorRig, weights: WeightPlacement) -> Attachment:
    """Of rank 0 on device 0, whose anchor is given the segments that it lacks."""
    client = rig.client()
    shard = weights.shards[0]
    if shard.added not in {segment.name for segment in client.status().segments}:
        client.allocate(0, shard.added, shard.added_bytes)
    run = Path(rig.run.path), rig.run.run_id, Path("/")
    return Attachment(Assignment(0, 0, 0, *run, AXES, weights, None, KV, KV, False, None, CpuPlatform()))


def test_writes_arrive_where_the_mapping_shows_them_and_spare_what_was_kept(tmp_path: Path) -> None:
    before = hold(AXES, split(AXES, (0, 1, 2, 3)))
    after = hold(AXES, reconfigure(AXES, before.ownership, [0, 1, 2]), before)
    with AnchorRig(tmp_path) as rig:
        rig.start()
        first, shard = attachment(rig, before), before.shards[0]
        with first.shard_writer(0, shard) as write, first.shard_briefly(0, shard, writable=False) as flat:
            write(5, memoryview(b"kept" * 5000))
            assert bytes(flat[5 : 5 + 20000].numpy()) == b"kept" * 5000
            assert not flat[:5].any() and not flat[20005:].any()

        second, shard = attachment(rig, after), after.shards[0]
        added = [extent for extent in shard.extents if extent.segment == shard.added]
        kept = next(extent for extent in shard.extents if extent.segment != shard.added)
        with second.shard_writer(0, shard) as write, second.shard_briefly(0, shard, writable=False) as flat:
            for extent in added:
                write(extent.start, memoryview(bytes([1 + extent.start % 251]) * extent.nbytes))
            for extent in added:
                assert (flat[extent.start : extent.stop] == 1 + extent.start % 251).all()
            as_it_was = flat[kept.start : kept.stop].clone()
            with pytest.raises(RuntimeError, match="are to stay as they are"):
                write(kept.start, memoryview(b"x"))
            assert (flat[kept.start : kept.stop] == as_it_was).all()
