"""The anchor's state machine: what each event does in each phase, and what never happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from anchortp_sglang.anchor import messages as m
from anchortp_sglang.anchor.state import (
    Action,
    AdoptSegment,
    AnchorState,
    CloseSegment,
    ControllerDied,
    CreateSegment,
    Event,
    Phase,
    SealSegment,
    Segment,
    Terminated,
    Tick,
    WatchController,
)
from anchortp_sglang.anchor.transitions import MAX_SEGMENTS, TRANSITIONS, step

RUN, MODEL = "run-1", "model-a"
OLD, NEW = 100, 200  # controllers
KEYS = {"run_id": RUN, "generation": 5}

OWNED = AnchorState(
    device=0,
    run_id=RUN,
    identity=MODEL,
    controller_pid=OLD,
    linger_s=30.0,
    generation=5,
    segments={
        "weights": Segment(nbytes=64, generation=4, sealed=True),
        "kv": Segment(nbytes=32, generation=5),
    },
)
LINGERING = replace(OWNED, phase=Phase.LINGERING, linger_deadline=30.0)
CLOSED = replace(OWNED, phase=Phase.CLOSED)

ATTACH = m.Attach(**KEYS, controller_pid=NEW, identity=MODEL)
REQUESTS: dict[type, m.Request] = {
    m.Status: m.Status(**KEYS),
    m.Fence: m.Fence(**KEYS),
    m.Attach: ATTACH,
    m.Allocate: m.Allocate(**KEYS, name="new", nbytes=16),
    m.Seal: m.Seal(**KEYS, name="kv"),
    m.Release: m.Release(**KEYS, name="kv"),
    m.OpenHandle: m.OpenHandle(**KEYS, name="kv"),
    m.AdoptHandle: m.AdoptHandle(**KEYS, name="old", nbytes=8, sealed=True),
    m.Shutdown: m.Shutdown(**KEYS),
}

# (state, event) -> (phase after, what the reply is or why it is refused, actions)
TABLE = [
    (OWNED, m.Status, Phase.OWNED, None, ()),
    (OWNED, m.Fence, Phase.OWNED, m.Ok, ()),
    (OWNED, m.Attach, Phase.OWNED, "controller_alive", ()),
    (OWNED, m.Allocate, Phase.OWNED, m.Allocated, (CreateSegment("new", 16, False),)),
    (OWNED, m.Seal, Phase.OWNED, m.Ok, (SealSegment("kv"),)),
    (OWNED, m.Release, Phase.OWNED, m.Ok, (CloseSegment("kv"),)),
    (OWNED, m.OpenHandle, Phase.OWNED, m.Handle, ()),
    (OWNED, m.AdoptHandle, Phase.OWNED, m.Ok, (AdoptSegment("old", 8),)),
    (OWNED, m.Shutdown, Phase.CLOSED, m.Ok, ()),
    (LINGERING, m.Status, Phase.LINGERING, None, ()),
    (LINGERING, m.Fence, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.Attach, Phase.OWNED, m.Ok, (WatchController(NEW),)),
    (LINGERING, m.Allocate, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.Seal, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.Release, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.OpenHandle, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.AdoptHandle, Phase.LINGERING, "not_controller", ()),
    (LINGERING, m.Shutdown, Phase.CLOSED, m.Ok, ()),
    *((CLOSED, request, Phase.CLOSED, "closed", ()) for request in REQUESTS),
]


@pytest.mark.parametrize("state, request_type, phase, answer, actions", TABLE)
def test_each_request_in_each_phase(
    state: AnchorState,
    request_type: type,
    phase: Phase,
    answer: type | str | None,
    actions: tuple[Action, ...],
) -> None:
    outcome = step(state, REQUESTS[request_type], now=0.0)
    assert outcome.state.phase is phase
    assert outcome.actions == actions
    if isinstance(answer, str):
        assert isinstance(outcome.reply, m.Refused) and outcome.reply.reason_code == answer
        assert outcome.state == state
    else:
        assert answer is type(outcome.reply) or (answer is None and outcome.reply is None)


def test_the_table_above_is_complete() -> None:
    assert {(state.phase, event) for state, event, *_ in TABLE} == {
        (phase, event) for phase, event in TRANSITIONS if event in REQUESTS
    }


@pytest.mark.parametrize(
    "state, event, now, phase",
    [
        (OWNED, ControllerDied(OLD), 7.0, Phase.LINGERING),
        (OWNED, ControllerDied(NEW), 7.0, Phase.OWNED),
        (replace(OWNED, linger_s=0.0), ControllerDied(OLD), 7.0, Phase.CLOSED),
        (OWNED, Tick(), 1e9, Phase.OWNED),
        (OWNED, Terminated(), 0.0, Phase.CLOSED),
        (LINGERING, ControllerDied(OLD), 7.0, Phase.LINGERING),
        (LINGERING, Tick(), 29.9, Phase.LINGERING),
        (LINGERING, Tick(), 30.0, Phase.CLOSED),
        (LINGERING, Terminated(), 0.0, Phase.CLOSED),
        (CLOSED, Tick(), 1e9, Phase.CLOSED),
        (CLOSED, ControllerDied(OLD), 0.0, Phase.CLOSED),
        (CLOSED, Terminated(), 0.0, Phase.CLOSED),
    ],
)
def test_each_other_event_in_each_phase(state: AnchorState, event: Event, now: float, phase: Phase) -> None:
    assert step(state, event, now).state.phase is phase


def test_lingering_lasts_as_long_as_asked_for() -> None:
    assert step(OWNED, ControllerDied(OLD), now=7.0).state.linger_deadline == 37.0


@pytest.mark.parametrize("request_type", sorted(REQUESTS, key=lambda kind: kind.__name__))
def test_other_runs_and_older_generations_are_refused(request_type: type) -> None:
    event = REQUESTS[request_type]
    assert _refusal(OWNED, replace(event, run_id="other")) == "wrong_run"
    if request_type is not m.Status:
        assert _refusal(OWNED, replace(event, generation=4)) == "stale_generation"
        assert _refusal(LINGERING, replace(event, generation=4)) == "stale_generation"


def test_a_fence_raises_the_generation() -> None:
    fenced = step(OWNED, m.Fence(run_id=RUN, generation=9), now=0.0).state
    assert fenced.generation == 9
    assert _refusal(fenced, m.Fence(run_id=RUN, generation=8)) == "stale_generation"
    assert step(fenced, m.Fence(run_id=RUN, generation=9), now=0.0).state == fenced


class TestAttach:
    def test_changes_the_controller_and_fences_the_old_one(self) -> None:
        attached = step(LINGERING, replace(ATTACH, generation=6), now=1.0).state
        assert (attached.controller_pid, attached.generation, attached.linger_s) == (NEW, 6, 30.0)
        assert attached.segments == LINGERING.segments
        assert step(attached, Tick(), now=1e9).state.phase is Phase.OWNED
        assert step(attached, ControllerDied(OLD), now=2.0).state.phase is Phase.OWNED

    def test_may_set_another_linger_time(self) -> None:
        assert step(LINGERING, replace(ATTACH, linger_s=2.0), now=1.0).state.linger_s == 2.0

    def test_is_refused_for_another_model(self) -> None:
        assert _refusal(LINGERING, replace(ATTACH, identity="model-b")) == "wrong_identity"

    def test_may_be_repeated(self) -> None:
        attached = step(LINGERING, ATTACH, now=1.0).state
        assert step(attached, ATTACH, now=2.0).state == attached


class TestSegments:
    def test_allocating_again_changes_nothing(self) -> None:
        outcome = step(OWNED, m.Allocate(**KEYS, name="weights", nbytes=64), now=0.0)
        assert outcome.state == OWNED and outcome.actions == ()
        assert isinstance(outcome.reply, m.Allocated)
        assert (outcome.reply.created, outcome.reply.sealed) == (False, True)

    def test_another_size_is_refused(self) -> None:
        assert _refusal(OWNED, m.Allocate(**KEYS, name="kv", nbytes=33)) == "size_mismatch"
        assert _refusal(OWNED, m.AdoptHandle(**KEYS, name="kv", nbytes=33, sealed=False)) == "size_mismatch"

    @pytest.mark.parametrize("kind", [m.Seal, m.Release, m.OpenHandle])
    def test_unknown_names_are_refused(self, kind: type) -> None:
        assert _refusal(OWNED, kind(**KEYS, name="nope")) == "unknown_segment"

    def test_their_number_is_bounded(self) -> None:
        crowd = {f"s{i}": Segment(nbytes=1, generation=0) for i in range(MAX_SEGMENTS)}
        full = replace(OWNED, segments=crowd)
        assert _refusal(full, REQUESTS[m.Allocate]) == "too_many_segments"
        assert _refusal(full, REQUESTS[m.AdoptHandle]) == "too_many_segments"
        assert step(full, m.Allocate(**KEYS, name="s0", nbytes=1), now=0.0).state == full


@pytest.mark.parametrize("changes", [{"linger_s": -1.0}, {"linger_s": float("nan")}, {"linger_deadline": 1.0}])
def test_impossible_states_cannot_be_made(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        replace(OWNED, **changes)


def _refusal(state: AnchorState, event: Event) -> str:
    outcome = step(state, event, now=0.0)
    assert isinstance(outcome.reply, m.Refused)
    assert outcome.state == state and outcome.actions == ()
    return outcome.reply.reason_code


keys = st.fixed_dictionaries({"run_id": st.sampled_from([RUN, "other"]), "generation": st.integers(0, 9)})
names = st.sampled_from(["a", "b", "c"])
sizes = st.sampled_from([8, 16])
pids = st.sampled_from([OLD, NEW])
events = st.one_of(
    st.builds(lambda k: m.Fence(**k), keys),
    st.builds(lambda k, p: m.Attach(**k, controller_pid=p, identity=MODEL), keys, pids),
    st.builds(lambda k, n, s: m.Allocate(**k, name=n, nbytes=s), keys, names, sizes),
    st.builds(lambda k, n: m.Seal(**k, name=n), keys, names),
    st.builds(lambda k, n: m.Release(**k, name=n), keys, names),
    st.builds(lambda k, n, s: m.AdoptHandle(**k, name=n, nbytes=s, sealed=True), keys, names, sizes),
    st.builds(ControllerDied, pids),
    st.just(Tick()),
)


@given(st.lists(st.tuples(events, st.floats(0, 20)), max_size=30))
def test_whatever_happens_generations_only_rise_and_sealed_stays_sealed(
    history: list[tuple[Event, float]],
) -> None:
    state, now = replace(OWNED, segments={}, generation=0), 0.0
    for event, wait_s in history:
        now += wait_s
        outcome = step(state, event, now)
        after = outcome.state
        assert after.generation >= state.generation
        for name in state.segments.keys() & after.segments.keys():
            assert after.segments[name].sealed >= state.segments[name].sealed
        if state.phase is Phase.CLOSED:
            assert after.phase is Phase.CLOSED
        if isinstance(outcome.reply, m.Refused):
            assert after == state and outcome.actions == ()
        state = after
