"""A start that stands still is told from one that is slow."""

from anchortp_sglang.recovery.processes.pidfd import Usage
from anchortp_sglang.recovery.processes.stall import StallWatch

STARTED_AT = 1e5


def watch(looks, limit_s=2.0):
    """Whether any look found the ranks stalled; ``looks``: (seconds, usage of each rank)."""
    stall = StallWatch(limit_s)
    return any(stall.stalled(ranks, at) for at, ranks in looks)


def every(step_s, count, ranks):
    return [(STARTED_AT + n * step_s, ranks(n)) for n in range(count)]


def test_ranks_that_all_sleep_are_stalled_after_the_limit():
    asleep = [Usage("S", 7), Usage("T", 3)]
    assert not watch(every(0.1, 20, lambda n: asleep))
    assert watch(every(0.1, 25, lambda n: asleep))


def test_a_rank_that_computes_keeps_the_start_going():
    assert not watch(every(0.1, 100, lambda n: [Usage("S", n // 5), Usage("S", 3)]))


def test_a_stopped_rank_stalls_the_start_though_the_others_look_for_it_again_and_again():
    waiting = lambda n: [Usage("T", 7), Usage("R" if n % 2 else "S", n)]  # noqa: E731
    assert not watch(every(0.1, 20, waiting))
    assert watch(every(0.1, 25, waiting))


def test_a_rank_that_is_continued_in_time_goes_on():
    assert not watch(every(0.1, 100, lambda n: [Usage("T" if n % 20 else "S", 7), Usage("S", n)]))


def test_runnable_ranks_without_processor_time_and_waits_for_a_disk_are_no_stall():
    for state in "RD":
        assert not watch(every(0.1, 100, lambda n, state=state: [Usage(state, 3), Usage("S", 3)]))


def test_time_in_which_main_did_not_run_does_not_count():
    asleep = [Usage("S", 7), Usage("S", 3)]
    looks = [*every(0.1, 5, lambda n: asleep), (STARTED_AT + 60.0, asleep), (STARTED_AT + 60.1, asleep)]
    assert not watch(looks)
