"""The slot table of a busy server whose pool is too small: what is free has no entry, what is cached has one."""

import json

POOL = 512
SHARED = list(range(20, 84))
WAVES = [[[*SHARED, *range(100 + 7 * wave + i, 130 + 7 * wave + i)] for i in range(4)] for wave in range(6)]


def test_slots_are_forgotten_as_they_are_freed_and_known_while_they_are_used(forge, checkpoint, places, tmp_path):
    path = tmp_path / "audits"
    done = forge.run(
        "engine_jobs:audited_generate",
        env=places,
        model=str(checkpoint["qwen3"]),
        path=str(path),
        waves=WAVES,
        max_new_tokens=100,
        max_total_tokens=POOL,
    )
    assert done.code == 0, done.output[-4000:]
    assert done.value > len(SHARED), "nothing was cached"
    audits = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(audits) > len(WAVES)
    assert [audit["stale"] for audit in audits] == [0] * len(audits)
    # Six waves of 4 x 130 tokens through 512 slots: full of what was computed before, hence evictions.
    assert max(audit["kept"] for audit in audits) > POOL // 2
    assert all(audit["kept"] + audit["free"] <= POOL for audit in audits)
