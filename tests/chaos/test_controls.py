"""Controls: the checks of the other tests can fail."""

import dataclasses

import pytest
from faults import assert_memory_is_gone, kill_rank, memfds_of, recovered
from histories import assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(1100 + seed, 30), 60) for seed in range(4)]
OTHERS = [request(prompt(1200 + seed, 30), 60) for seed in range(4)]


def test_a_killed_rank_does_not_pass_for_a_lost_device(server, unbroken):
    """A fault that misses the anchor leaves the memory where it is, and the check says so."""
    victim = server.status()["devices"][1]
    memory = memfds_of(victim["anchor_pid"])
    fault = kill_rank(server, victim["rank"])
    with pytest.raises(AssertionError, match="still held"):
        assert_memory_is_gone(memory)
    with pytest.raises(AssertionError):
        recovered(server, fault, "device")
    recovered(server, fault, "process")


def test_histories_of_other_prompts_do_not_pass_for_identical(server, unbroken):
    expected = unbroken(REQUESTS)
    with Streams(server.url, OTHERS) as streams:
        pass
    with pytest.raises(AssertionError, match="stream 0 differs"):
        assert_identical(expected, outcomes(streams.histories))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: {"output_ids": (*one.output_ids[:30], *one.output_ids[31:])},
        lambda one: {"output_ids": (*one.output_ids[:30], *one.output_ids[29:])},
        lambda one: {"text": one.text[:-1]},
        lambda one: {"usage": ("31", *one.usage[1:])},
        lambda one: {"error": "ConnectionResetError"},
    ],
    ids=["a token lost", "a token doubled", "a character lost", "a count changed", "an error"],
)
def test_the_smallest_damage_to_one_history_is_seen(server, unbroken, change):
    expected = unbroken(REQUESTS)
    damaged = dataclasses.replace(expected[2], **change(expected[2]))
    with pytest.raises(AssertionError, match="stream 2"):
        assert_identical(expected, [*expected[:2], damaged, expected[3]])


def test_the_unbroken_runs_wander_so_that_an_error_would_show(server, unbroken):
    """A model that repeats one token would pass any comparison."""
    for one in unbroken(REQUESTS):
        assert len(set(one.output_ids)) > len(one.output_ids) // 2
