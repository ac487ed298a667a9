"""When a lost device is tried again: soon at first, later each time that it does not stay."""

from anchortp_sglang.recovery.rejoin import FIRST_PAUSE_S, FORGIVEN_S, LONGEST_PAUSE_S, HoldOffs


def test_a_lost_device_is_due_after_the_first_pause_and_not_before() -> None:
    hold_offs = HoldOffs()
    assert hold_offs.look([0, 1], [2], 100.0) == []
    assert hold_offs.look([0, 1], [2], 100.0 + FIRST_PAUSE_S - 0.1) == []
    assert hold_offs.look([0, 1], [2], 100.0 + FIRST_PAUSE_S) == [2]


def test_each_loss_and_each_failed_attempt_doubles_the_pause_up_to_a_limit() -> None:
    hold_offs, now, pauses = HoldOffs(), 0.0, []
    hold_offs.look([0], [1], now)
    for attempt in range(12):
        began = now
        while not hold_offs.look([0], [1], now):
            now += 1.0
        pauses.append(now - began)
        if attempt % 2:
            hold_offs.failed(1, now)
        else:  # it is taken back, and lost again a moment later
            hold_offs.look([0, 1], [], now)
            hold_offs.look([0], [1], now)
    assert pauses[:4] == [FIRST_PAUSE_S * 2**n for n in range(4)]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_device_that_has_served_for_long_is_as_good_as_new() -> None:
    hold_offs = HoldOffs()
    hold_offs.look([0], [1], 0.0)
    hold_offs.failed(1, 10.0)
    hold_offs.look([0, 1], [], 50.0)
    hold_offs.look([0, 1], [], 50.0 + FORGIVEN_S + 1)
    hold_offs.look([0], [1], 1000.0)
    assert hold_offs.look([0], [1], 1000.0 + FIRST_PAUSE_S) == [1]


def test_of_several_lost_devices_the_one_that_waits_longest_comes_first() -> None:
    hold_offs = HoldOffs()
    hold_offs.look([0, 1], [3], 0.0)
    hold_offs.look([0], [1, 3], 5.0)
    assert hold_offs.look([0], [1, 3], 100.0) == [3, 1]
