"""Hang detection as a function of what was seen and when."""

import os
import signal
import subprocess
import sys
import time

from anchortp_sglang.recovery.processes.pidfd import Usage, usage
from anchortp_sglang.recovery.watch import HangWatch, OwnTime


def test_counters_that_move_are_never_hung():
    watch = HangWatch(timeout_s=2.0)
    assert not any(watch.hung(1, (tick, 0), now=float(tick)) for tick in range(100))


def test_counters_that_stand_still_for_longer_than_the_timeout_are_hung():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5, 5), now) for now in (0.0, 1.0, 2.0, 2.1)] == [False, False, False, True]


def test_a_new_generation_starts_its_own_time():
    watch = HangWatch(timeout_s=2.0)
    watch.hung(1, (5, 5), 0.0)
    assert not watch.hung(2, (5, 5), 3.0)
    assert watch.hung(2, (5, 5), 5.1)


def test_after_a_reset_the_time_counts_anew():
    watch = HangWatch(timeout_s=2.0)
    watch.hung(1, (5, 5), 0.0)
    watch.reset()
    assert not watch.hung(1, (5, 5), 10.0)


def test_a_single_rank_has_more_time_for_a_step():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5,), now) for now in (0.0, 3.0, 20.0, 20.1)] == [False, False, False, True]


def test_what_was_taken_for_a_hang_is_given_twice_the_time_when_it_comes_again():
    watch = HangWatch(timeout_s=2.0)
    times = []
    for generation in range(6):
        begin = 100.0 * generation
        times.append(next(t for t in range(100) if watch.hung(generation, (5, 5), begin + t)))
        watch.reset()
    assert times == [3, 5, 9, 17, 17, 17]


def test_a_stopped_rank_is_no_long_step_and_gets_no_patience():
    watch = HangWatch(timeout_s=2.0)
    for generation in range(4):
        begin = 100.0 * generation
        assert next(t for t in range(100) if watch.hung(generation, (5, 5), begin + t, stopped=True)) == 3
        assert watch.waited_s == 2.0
        watch.reset()


def test_steady_progress_ends_that_patience():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5, 5), now) for now in (0.0, 2.1)] == [False, True]
    watch.reset()
    assert not any(watch.hung(2, (beat, 5), 10.0 + beat) for beat in range(6))  # five seconds; four are asked for
    assert [watch.hung(2, (5, 5), now) for now in (16.9, 17.1)] == [False, True]


def test_a_pause_above_the_timeout_is_no_steady_progress():
    watch = HangWatch(timeout_s=2.0)
    assert [watch.hung(1, (5, 5), now) for now in (0.0, 2.1)] == [False, True]
    watch.reset()
    for now, beat in ((10.0, 1), (11.0, 2), (14.0, 2), (14.5, 3), (16.0, 4), (17.0, 5)):
        assert not watch.hung(2, (beat, 5), now)
    assert [watch.hung(2, (5, 5), now) for now in (20.9, 21.1)] == [False, True]


IDLE = {1: Usage("S", 500), 2: Usage("S", 700)}


def advanced(time, looks):
    """How much the time has moved at each look: (wall, ranks)."""
    before, moved = 0.0, []
    for wall, ranks in looks:
        now = time.advance(wall, ranks)
        moved.append(round(now - before, 3))
        before = now
    return moved


def test_time_in_which_main_itself_did_not_run_does_not_count():
    looks = [(100.0, IDLE), (100.5, IDLE), (140.5, IDLE), (141.0, IDLE)]
    assert advanced(OwnTime(most_s=1.0), looks) == [0.0, 0.5, 1.0, 0.5]


def test_of_ranks_that_compute_with_little_cpu_only_what_they_got_counts():
    def starved(ticks):
        return {1: Usage("S", 500), 2: Usage("R", ticks), 3: Usage("R", ticks // 2)}

    looks = [(10.0, starved(100)), (10.5, starved(102)), (11.0, starved(104))]
    assert advanced(OwnTime(most_s=1.0), looks) == [0.0, 0.02, 0.02]


def test_a_rank_that_computes_for_ever_is_hung_all_the_same():
    looks = [(10.0 + 0.5 * n, {1: Usage("R", 50 * n), 2: Usage("S", 100)}) for n in range(3)]
    assert advanced(OwnTime(most_s=1.0), looks) == [0.0, 0.5, 0.5]


def test_what_the_kernel_says_of_a_busy_and_of_a_stopped_process():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen(["sleep", "60"])
    try:
        deadline = time.monotonic() + 20
        while usage(busy.pid).ticks < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert usage(busy.pid).state == "R" and usage(busy.pid).ticks >= 20
        assert usage(idle.pid).state == "S"
        os.kill(busy.pid, signal.SIGSTOP)
        while usage(busy.pid).state != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert usage(busy.pid).state == "T"
    finally:
        for process in (busy, idle):
            process.kill()
            process.wait()
    assert usage(busy.pid) is None
