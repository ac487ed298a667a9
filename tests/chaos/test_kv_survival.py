"""A device is lost under load, and the KV that it held is read back from the mirror: nothing is computed twice."""

import os
import re

import pytest
from faults import kill_rank, kill_standby, lose_device, memfds_of, recovered, standing_by
from histories import Unbroken, ask_at_once, assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
SYSTEM = prompt(1, 300)
CACHED = [*SYSTEM, *prompt(2, 90)]
"""The prompt of a request that has ended when devices are lost."""

RUNNING = [
    *(request([*SYSTEM, *prompt(10 + seed, 40 + 30 * seed)], 240) for seed in range(4)),
    *(request(prompt(20 + seed, 25 + 200 * seed), 240) for seed in range(2)),
    # The same tokens in two namespaces.
    request([*SYSTEM, *prompt(10, 40)], 240) | {"extra_key": "tenant"},
    request([*SYSTEM, *prompt(10, 40)], 240) | {"extra_key": "tenant", "cache_salt": "salt"},
]


@pytest.fixture(scope="module")
def shrinking(launch):
    """A TP=4 server that loses a device in most of the tests below, which run in their order."""
    with launch(4, "--chunked-prefill-size", "256", env=STRICT) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(shrinking):
    return Unbroken(shrinking)


def run_with_a_cached_prompt(server, expected, fault):
    """Streams while ``fault(server)`` happens once the mirror has kept up; the histories."""
    ask(server, CACHED)
    ask(server, CACHED, cache_salt="salt")
    with Streams(server.url, RUNNING) as streams:
        streams.wait_tokens(40)
        until(lambda: server.status()["kv"]["mirror"]["coverage"] > 0.98, "the mirror does not keep up")
        fault(server)
    assert_identical(expected, outcomes(streams.histories))
    for history in streams.histories:
        assert_exactly_once(history)
    return streams.histories


def ask(server, ids, **namespace):
    """cached_tokens of a short request."""
    answer = server.post("/generate", request(ids, 4) | namespace)
    return answer["meta_info"]["cached_tokens"]


def assert_nothing_was_computed_twice(server, record, steps):
    """``steps``: of the running requests, that may not have reached the mirror when the device died."""
    kv = record["kv"]
    assert kv["slots_restored"] == kv["slots_kept"] > len(CACHED)
    assert record["tokens_recomputed"] <= steps * len(RUNNING)
    assert set(kv["dropped"]) <= {"lost_with_device"}
    assert record["tokens_reused"] >= 0.96 * (record["tokens_reused"] + record["tokens_recomputed"])
    # All but the last token of a prompt that is known whole is found.
    assert ask(server, CACHED) == len(CACHED) - 1
    assert ask(server, CACHED, cache_salt="salt") == len(CACHED) - 1
    assert ask(server, CACHED, cache_salt="another", extra_key=f"new in {record['generation']}") == 0


def test_a_lost_device_takes_no_kv_along(shrinking, unbroken):
    expected = unbroken(RUNNING)

    def fault(server):
        recovered(server, lose_device(server, 2), "device")

    run_with_a_cached_prompt(shrinking, expected, fault)
    record = shrinking.status()["recoveries"][-1]
    assert_nothing_was_computed_twice(shrinking, record, steps=8)
    assert record["kv"]["restored_bytes"] > 0
    assert shrinking.status()["devices"][2]["state"] == "lost"


def test_kv_that_was_restored_survives_a_process_too(shrinking, unbroken):
    expected = unbroken(RUNNING)
    run_with_a_cached_prompt(shrinking, expected, lambda server: recovered(server, kill_rank(server, 0), "process"))
    record = shrinking.status()["recoveries"][-1]
    assert record["kv"]["slots_kept"] > len(CACHED)
    assert record["kv"]["slots_restored"] == record["kv"]["kept_bytes"] == record["kv"]["restored_bytes"] == 0
    assert record["kv"]["slots_dropped"] == 0
    assert record["tokens_recomputed"] <= len(RUNNING)
    assert ask(shrinking, CACHED) == len(CACHED) - 1


def test_a_device_lost_while_another_fault_is_recovered_takes_no_kv_along(shrinking, unbroken):
    expected = unbroken(RUNNING)

    def fault(server):
        kill_standby(server)
        first = kill_rank(server, 1)
        until(lambda: server.status()["generation"] > first.generation, "no rank was forked", poll_s=0)
        assert server.status()["state"] == "recovering"
        recovered(server, lose_device(server, 0), "device")

    run_with_a_cached_prompt(shrinking, expected, fault)
    assert shrinking.status()["tp_size"] == 2
    assert_nothing_was_computed_twice(shrinking, shrinking.status()["recoveries"][-1], steps=8)


def test_a_damaged_slot_table_costs_its_kv_and_no_token(shrinking, unbroken):
    expected = unbroken(RUNNING)

    def fault(server):
        overwrite(server, "slot-table", b"\xff", second_half=False)
        recovered(server, kill_rank(server, 1), "process", device=-1)  # nobody is to blame for the second attempt

    run_with_a_cached_prompt(shrinking, expected, fault)
    record = shrinking.status()["recoveries"][-1]
    assert record["kv"]["slots_kept"] == 0
    assert "slot table: magic is" in shrinking.log.read_text()


def test_what_is_read_back_decides_what_is_answered(shrinking, unbroken):
    """A control: with a mirror of zeros the answers differ, so the equality above says something."""
    expected = unbroken(RUNNING)
    ask(shrinking, CACHED)
    with Streams(shrinking.url, RUNNING) as streams:
        streams.wait_tokens(40)
        until(lambda: shrinking.status()["kv"]["mirror"]["coverage"] > 0.98, "the mirror does not keep up")
        overwrite(shrinking, "kv-mirror", b"\0", second_half=True)  # KV, not what says that it is valid
        recovered(shrinking, lose_device(shrinking, 1), "device")
    assert shrinking.status()["recoveries"][-1]["requests_replayed"] == len(RUNNING)
    assert shrinking.status()["recoveries"][-1]["kv"]["slots_restored"] > len(CACHED)
    with pytest.raises(AssertionError, match="differs from token"):
        assert_identical(expected, outcomes(streams.histories))


def overwrite(server, segment, byte, *, second_half):
    """Fill the first 8 bytes, or the second half, of a segment of the host anchor."""
    pid = anchor_of_host(server)
    [inode] = [inode for inode, name in memfds_of(pid).items() if segment in name]
    for link in (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")):
        if (os.stat(link).st_dev, os.stat(link).st_ino) == inode:
            fd = os.open(link, os.O_RDWR)
            half = os.fstat(fd).st_size // 2
            os.pwrite(fd, byte * half if second_half else byte * 8, half if second_half else 0)
            return os.close(fd)


def anchor_of_host(server):
    [record] = server.place.folder.glob("**/anchor-host.json")
    return int(re.search(r'"pid": ?(\d+)', record.read_text()).group(1))


def test_without_a_mirror_lost_kv_is_computed_again(launch):
    with launch(2, "--anchor-kv-mirror", "off", env=STRICT) as server:
        assert server.status()["kv"]["mirror"] is None
        expected = Unbroken(server)(RUNNING)
        ask(server, CACHED)
        with Streams(server.url, RUNNING) as streams:
            streams.wait_tokens(40)
            record = recovered(server, lose_device(server, 0), "device")
        assert_identical(expected, outcomes(streams.histories))
        record = server.status()["recoveries"][-1]
        assert record["kv"]["slots_kept"] == 0 < record["kv"]["slots_dropped"]
        assert ask(server, CACHED) == len(SYSTEM)


TOGETHER = [[*SYSTEM, *prompt(200 + n, 20 + 11 * n)] for n in range(6)]
"""Computed in one batch, each in slots of its own."""

PYTHON_TREE = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
PAGE = 16
EQUAL = 5
"""Streams of eight that must be equal to the unbroken run: what is computed again after a change of width differs in
float32's last bits, and may then be rounded to another 16-bit float."""


def test_pages_in_bfloat16_under_a_tree_in_python_lose_no_kv_either(launch):
    arguments = ("--page-size", str(PAGE), "--kv-cache-dtype", "bf16")
    with launch(3, *arguments, env=STRICT | PYTHON_TREE) as server:
        expected = Unbroken(server)(RUNNING)
        ask_at_once(server, TOGETHER, 4)
        standing_by(server, 0)
        with Streams(server.url, RUNNING) as streams:
            streams.wait_tokens(30)
            recovered(server, kill_rank(server, 0), "process")
            assert "slots have changed since the slot table was looked at" in server.log.read_text()
            until(lambda: server.status()["kv"]["mirror"]["coverage"] > 0.98, "the mirror does not keep up")
            recovered(server, lose_device(server, 1), "device")
        for history in streams.histories:
            assert history.error is None
            assert_exactly_once(history)
        same = [one == other for one, other in zip(expected, outcomes(streams.histories), strict=True)]
        assert sum(same) >= EQUAL, same
        after_kill, after_loss = server.status()["recoveries"]
        assert after_kill["tokens_recomputed"] <= len(RUNNING) * PAGE
        assert after_loss["tokens_recomputed"] <= len(RUNNING) * (PAGE + 7)
        assert after_loss["kv"]["slots_restored"] > len(CACHED) // PAGE * PAGE
        assert after_loss["kv"]["slots_restored"] % PAGE == 0
        assert set(after_kill["kv"]["dropped"]) <= {"incomplete_page"}
        assert set(after_loss["kv"]["dropped"]) <= {"incomplete_page", "lost_with_device"}
        cached = [answer["meta_info"]["cached_tokens"] for answer in ask_at_once(server, TOGETHER, 1)]
        assert cached == [(len(ids) - 1) // PAGE * PAGE for ids in TOGETHER]
