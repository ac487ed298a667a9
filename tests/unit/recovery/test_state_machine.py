"""The coordinator's decisions: every transition of the table, and the verdict."""

import itertools

import pytest

from anchortp_sglang.recovery.state_machine import (
    NO_DEVICE,
    TRANSITIONS,
    Action,
    DeviceEvidence,
    Event,
    EventKind,
    Phase,
    State,
    back_off_s,
    budget_is_spent,
    judge,
    retry_after_s,
    step,
)

DEADLINE_S = 10.0


def advance(state, *kinds, now=100.0):
    """Feed events that report on the current attempt; the state and actions after each."""
    actions = []
    for kind in kinds:
        state, action, _ = step(state, Event(kind, "because", state.attempt), now, DEADLINE_S)
        actions.append(action)
    return state, actions


def test_a_fault_leads_through_fence_start_and_replay_back_to_serving():
    state, actions = advance(State(), EventKind.FAULT)
    state, more = advance(state, EventKind.FENCED, EventKind.STARTED, EventKind.REPLAYED)
    assert state.phase is Phase.SERVING and state.deadline_at is None
    assert actions + more == [Action.FENCE, Action.START, Action.REPLAY, Action.RESUME]


@pytest.mark.parametrize("reached", [[], [EventKind.FENCED], [EventKind.FENCED, EventKind.STARTED]])
def test_a_step_cut_short_by_another_fault_is_fenced_and_planned_again(reached):
    state, _ = advance(State(), EventKind.FAULT)
    state, _ = advance(state, *reached)
    again, actions = advance(state, EventKind.ABORTED)
    assert again.phase is Phase.FENCING and actions == [Action.FENCE]
    assert again.attempt == state.attempt + 1


def test_what_an_abandoned_attempt_reports_is_ignored():
    state, _ = advance(State(), EventKind.FAULT)
    old = state.attempt
    state, _ = advance(state, EventKind.FENCED, EventKind.ABORTED)
    after, action, reason = step(state, Event(EventKind.FENCED, "late", old), 100.0, DEADLINE_S)
    assert after == state and action is Action.NOTHING and "abandoned" in reason


def test_a_second_fault_does_not_extend_the_deadline():
    state, _ = advance(State(), EventKind.FAULT, now=100.0)
    assert state.deadline_at == 110.0
    state, _ = advance(state, EventKind.FENCED, EventKind.ABORTED, now=105.0)
    assert state.deadline_at == 110.0


@pytest.mark.parametrize("phase", [Phase.FENCING, Phase.STARTING, Phase.REPLAYING])
@pytest.mark.parametrize("kind", [EventKind.DEADLINE, EventKind.FAILED])
def test_a_recovery_that_fails_or_is_late_gives_up(phase, kind):
    state, action, _ = step(State(phase, 1, 110.0), Event(kind, "too late"), 111.0, DEADLINE_S)
    assert state.phase is Phase.DOWN and action is Action.GIVE_UP and state.deadline_at is None


@pytest.mark.parametrize("kind", [kind for kind in EventKind if kind is not EventKind.RETRY])
def test_nothing_but_the_operator_and_another_try_lead_out_of_down(kind):
    state, action, _ = step(State(Phase.DOWN, 1, given_ups=1), Event(kind, "whatever"), 0.0, DEADLINE_S)
    assert state.phase is (Phase.STOPPED if kind is EventKind.STOP else Phase.DOWN)
    assert action is Action.NOTHING


def test_another_try_after_giving_up_serves_again_only_when_it_has_come_through():
    state, _ = advance(State(), EventKind.FAULT, EventKind.FAILED)
    assert state.phase is Phase.DOWN and state.given_up and retry_after_s(state) == 10.0
    state, actions = advance(state, EventKind.RETRY, now=500.0)
    assert actions == [Action.FENCE] and state.given_up and state.deadline_at == 510.0
    state, _ = advance(state, EventKind.FENCED, EventKind.STARTED)
    assert state.given_up
    state, actions = advance(state, EventKind.REPLAYED)
    assert state.phase is Phase.SERVING and actions == [Action.RESUME] and not state.given_up


def test_every_phase_and_event_is_safe_and_only_the_table_acts():
    for phase, kind in itertools.product(Phase, EventKind):
        before = State(phase, 3, 5.0)
        after, action, reason = step(before, Event(kind, "x"), 1.0, DEADLINE_S)
        assert reason
        if (phase, kind) in TRANSITIONS:
            assert (after.phase, action) == TRANSITIONS[phase, kind]
        else:
            assert after == before and action is Action.NOTHING


def fail_start(state, failure, now=100.0):
    """A start that ranks break off with words of their own, and the fence of the next one."""
    state, action, reason = step(state, Event(EventKind.ABORTED, failure, state.attempt, failure), now, DEADLINE_S)
    if state.phase is Phase.FENCING:
        state, _ = advance(state, EventKind.FENCED)
    return state, action, reason


def test_a_start_that_fails_three_times_in_the_same_way_is_given_up_with_that_reason():
    state, _ = advance(State(), EventKind.FAULT, EventKind.FENCED)
    for expected in (Action.FENCE, Action.FENCE, Action.GIVE_UP):
        state, action, reason = fail_start(state, "no such kernel")
        assert action is expected
    assert "3 starts in a row" in reason and "no such kernel" in reason


@pytest.mark.parametrize("failures", [["a", "b", "a", "b", "a"], ["", "", "", "", ""], ["a", "a", "", "b", "a"]])
def test_starts_that_fail_in_different_ways_or_are_cut_off_are_tried_until_the_deadline(failures):
    state, _ = advance(State(), EventKind.FAULT, EventKind.FENCED)
    for failure in failures:
        state, action, _ = fail_start(state, failure)
        assert action is Action.FENCE


def recover(state, now):
    """A fault of a generation that serves, and its whole recovery."""
    return advance(state, EventKind.FAULT, EventKind.FENCED, EventKind.STARTED, EventKind.REPLAYED, now=now)[0]


def test_recoveries_that_get_nobody_a_token_back_off_and_a_token_ends_that():
    state, waits = State(), []
    for _ in range(8):
        state = recover(state, now=100.0)
        waits.append(back_off_s(state))
    assert waits == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 2.0, 2.0]
    state, _ = advance(state, EventKind.TOKENS)
    assert back_off_s(recover(state, now=200.0)) == 0.0


def test_attempts_that_are_cut_short_again_and_again_back_off_and_the_next_recovery_begins_afresh():
    state, waits = advance(State(), EventKind.FAULT, EventKind.FENCED)[0], []
    for _ in range(6):
        state, _ = advance(state, EventKind.ABORTED, EventKind.FENCED)
        waits.append(back_off_s(state))
    assert waits == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0]
    state, _ = advance(state, EventKind.STARTED, EventKind.REPLAYED, EventKind.TOKENS)
    assert back_off_s(recover(state, now=100.0)) == 0.0


def test_the_budget_is_spent_when_many_recoveries_in_a_row_have_taken_longer_than_one_may():
    state = recover(recover(State(), now=100.0), now=200.0)
    assert not budget_is_spent(state, 200.0, DEADLINE_S), "two faults are no loop, however far apart"
    for count in range(20):
        state = recover(state, now=200.0 + count)
    assert budget_is_spent(state, 220.0, DEADLINE_S)
    assert not budget_is_spent(advance(state, EventKind.TOKENS)[0], 220.0, DEADLINE_S)


def test_twenty_quick_kills_are_within_the_budget():
    state, now = State(), 0.0
    for _ in range(20):
        state = recover(state, now)
        now += 0.5 + back_off_s(state)
    assert not budget_is_spent(state, now, deadline_s=120.0)


def device(number, *, anchor=True, died=False, hung=False):
    return DeviceEvidence(number, anchor_alive=anchor, rank_died=died, rank_hung=hung)


def test_a_dead_rank_with_a_living_anchor_is_a_process_failure():
    verdict = judge([device(0), device(1, died=True)], "rank died")
    assert (verdict.cause, verdict.device, verdict.lost) == ("process", 1, ())


def test_a_dead_anchor_is_a_lost_device_whatever_else_died():
    verdict = judge([device(0, died=True), device(1), device(2, anchor=False, died=True)], "rank died")
    assert (verdict.cause, verdict.device, verdict.lost) == ("device", 2, (2,))


def test_several_devices_may_be_lost_at_once():
    assert judge([device(0, anchor=False), device(1), device(3, anchor=False)], "x").lost == (0, 3)


def test_a_hang_without_deaths_is_a_hang():
    assert judge([device(0), device(1, hung=True)], "no progress").cause == "hang"


def test_without_a_culprit_it_is_a_process_failure_that_says_why():
    verdict = judge([device(0), device(1)], "the detokenizer died")
    assert (verdict.cause, verdict.device, verdict.reason) == ("process", NO_DEVICE, "the detokenizer died")
