"""What holds of the coordinator's decisions in every scenario (``scenarios/`` has single ones), and their diagram."""

import random
import re
from pathlib import Path

from anchortp_sglang.recovery.state_machine import (
    TRANSITIONS,
    Action,
    Event,
    EventKind,
    Phase,
    State,
    back_off_s,
    budget_is_spent,
    retry_after_s,
    step,
)

DEADLINE_S = 10.0
ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"
ARROW = re.compile(r"\s+(\S+) --> (\w+)(?:: ([\w, ]+) / (\w+))?")


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    diagram = re.search(r"```mermaid\nstateDiagram-v2\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    assert diagram is not None
    (_, begin, *no_label), *arrows = [ARROW.fullmatch(line).groups() for line in diagram[1].splitlines()]
    assert (begin, no_label) == (State().phase, [None, None])
    drawn = [(start, event, end, action) for start, end, events, action in arrows for event in events.split(", ")]
    table = [(phase, kind, after, action) for (phase, kind), (after, action) in TRANSITIONS.items()]
    assert sorted(drawn) == sorted(table)


def test_whatever_happens_only_a_recovery_has_a_deadline_and_a_stopped_server_stays_so() -> None:
    for seed in range(500):
        rng, state, now, deadline_at = random.Random(seed), State(), 0.0, None
        for _ in range(60):
            kind = rng.choice([kind for kind in EventKind if kind is not EventKind.STOP or rng.random() < 0.02])
            attempt = rng.choice([None, state.attempt, state.attempt - 1])
            event = Event(kind, "because", attempt, rng.choice(["", "own"]), rng.random() < 0.1)
            before, now = state, now + rng.random()
            state, action, reason = step(before, event, now, DEADLINE_S)
            recovering = state.phase in (Phase.FENCING, Phase.STARTING, Phase.REPLAYING)
            assert reason and (state.deadline_at is not None) == recovering
            if recovering and deadline_at is not None:
                assert state.deadline_at == deadline_at, "a recovery got more time"
            deadline_at = state.deadline_at
            assert state.attempt == before.attempt + (action is Action.FENCE), "an attempt is not told from the last"
            if before.phase is Phase.STOPPED or attempt == before.attempt - 1:
                assert action is Action.NOTHING and state.phase is before.phase


def recover(state: State, now: float) -> State:
    """A fault of a generation that serves, and its whole recovery."""
    for kind in (EventKind.FAULT, EventKind.FENCED, EventKind.STARTED, EventKind.REPLAYED):
        state, _, _ = step(state, Event(kind, "because"), now, DEADLINE_S)
    return state


def test_two_faults_are_no_loop_however_far_apart() -> None:
    assert not budget_is_spent(recover(recover(State(), now=100.0), now=200.0), 200.0, DEADLINE_S)


def test_twenty_quick_kills_are_within_the_budget() -> None:
    state, now = State(), 0.0
    for _ in range(20):
        state = recover(state, now)
        now += 0.5 + back_off_s(state)
    assert not budget_is_spent(state, now, deadline_s=120.0)


def test_waits_have_an_end() -> None:
    assert back_off_s(State(fruitless=50)) == back_off_s(State(aborts=50)) == 2.0
    assert [retry_after_s(State(given_ups=n)) for n in (1, 2, 5, 6, 50)] == [10.0, 20.0, 160.0, 300.0, 300.0]
