"""The coordinator's decisions: every transition of the table, and the verdict."""

import itertools

import pytest

from anchortp_sglang.recovery.machine import (
    NO_DEVICE,
    TRANSITIONS,
    Action,
    DeviceEvidence,
    Event,
    EventKind,
    Phase,
    State,
    judge,
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


@pytest.mark.parametrize("kind", list(EventKind))
def test_nothing_but_the_operator_leads_out_of_down(kind):
    state, action, _ = step(State(Phase.DOWN, 1), Event(kind, "whatever"), 0.0, DEADLINE_S)
    assert state.phase is (Phase.STOPPED if kind is EventKind.STOP else Phase.DOWN)
    assert action is Action.NOTHING


def test_every_phase_and_event_is_safe_and_only_the_table_acts():
    for phase, kind in itertools.product(Phase, EventKind):
        before = State(phase, 3, 5.0)
        after, action, reason = step(before, Event(kind, "x"), 1.0, DEADLINE_S)
        assert reason
        if (phase, kind) in TRANSITIONS:
            assert (after.phase, action) == TRANSITIONS[phase, kind]
        else:
            assert after == before and action is Action.NOTHING


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
