"""Plays the scenarios of ``scenarios/`` to the coordinator's decisions: a script of faults in, phases and verdicts out.

A line at the margin is what happens, the indented line below it is what must follow:

    0.0 fault: the process of rank 1 died       seconds, event (``recovery/state_machine.py``), reason
        serving -> fencing, fence (attempt 1)   phases, action, and what else of the state is new
    judge: device 1 rank died; device 2 whole   what is found once all ranks are dead
        process, device 1: ...                  verdict and its reason ("judge planned": a change of devices)

Options of an event stand before its colon: ``attempt 1`` (the attempt that reports; by default the current one),
``own failure`` (its reason is what a rank said it failed of), ``final``. Recoveries have ``DEADLINE_S``. A line that
begins with ``#`` is a comment.
"""

import re
from pathlib import Path

import pytest

from anchortp_sglang.recovery.state_machine import (
    Action,
    DeviceEvidence,
    Event,
    EventKind,
    State,
    back_off_s,
    budget_is_spent,
    judge,
    retry_after_s,
    step,
)

DEADLINE_S = 10.0
SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
REPORTS = {EventKind.ABORTED, EventKind.FENCED, EventKind.STARTED, EventKind.REPLAYED, EventKind.FAILED}
EVENT = re.compile(
    r"(?P<now>[\d.]+) (?P<kind>\w+)( attempt (?P<attempt>\d+))?(?P<own> own failure)?(?P<final> final)?"
    r"(: (?P<reason>.*))?"
)
DEVICE = re.compile(r"device (\d+) ?(.*)")
FOUND = {
    "whole": {},
    "rank died": {"rank_died": True},
    "rank hung": {"rank_hung": True},
    "anchor and rank died": {"anchor_alive": False, "rank_died": True},
}


def outcome(state: State, line: str) -> tuple[State, str]:
    """What follows from a line of a scenario."""
    how, _, found = line.partition(": ")
    if how in ("judge", "judge planned"):
        return state, verdict(found, planned=how == "judge planned")
    parts = EVENT.fullmatch(line)
    assert parts, f"not a line of a scenario: {line!r}"
    kind, now, reason = EventKind(parts["kind"]), float(parts["now"]), parts["reason"] or ""
    attempt = int(parts["attempt"]) if parts["attempt"] else state.attempt if kind in REPORTS else None
    event = Event(kind, reason, attempt, failure=reason if parts["own"] else "", final=bool(parts["final"]))
    after, action, why = step(state, event, now, DEADLINE_S)
    facts = [*news(state, after), *waits(after, action, now)]
    text = f"{state.phase} -> {after.phase}, {action}" if state.phase is not after.phase else f"{after.phase}, {action}"
    return after, text + (f" ({', '.join(facts)})" if facts else "") + (f": {why}" if why != reason else "")


def news(before: State, after: State) -> list[str]:
    def number(name: str, value: object) -> list[str]:
        return [f"{name} {value}"] if getattr(before, name.replace(" ", "_")) != value else []

    deadline = "no deadline" if after.deadline_at is None else f"deadline {after.deadline_at:g}"
    return [
        *number("attempt", after.attempt),
        *([deadline] if before.deadline_at != after.deadline_at else []),
        *number("failures", after.failures),
        *number("aborts", after.aborts),
        *number("fruitless", after.fruitless),
        *(["requests are refused" if after.given_up else "requests are taken"] * (before.given_up != after.given_up)),
    ]


def waits(state: State, action: Action, now: float) -> list[str]:
    if action is Action.START and back_off_s(state):
        return [f"after {back_off_s(state):g} s"]
    if action is Action.GIVE_UP:
        return ["for good" if state.final else f"again in {retry_after_s(state):g} s"]
    return ["open requests end"] if budget_is_spent(state, now, DEADLINE_S) and action is Action.FENCE else []


def verdict(text: str, planned: bool) -> str:
    devices, _, reason = text.partition(" | ")
    found = [DEVICE.fullmatch(device) for device in devices.split("; ")]
    whole = {"anchor_alive": True, "rank_died": False}
    evidence = [DeviceEvidence(int(one[1]), **whole | FOUND[one[2]]) for one in found]
    made = judge(evidence, reason, planned)
    who = "no device" if made.device < 0 else f"device {made.device}"
    lost = f", lost {' '.join(map(str, made.lost))}" if made.lost else ""
    return f"{made.cause}, {who}{lost}: {made.reason}"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    written, played, state = path.read_text().splitlines(), [], State()
    for line in written:
        if line.startswith(" "):
            continue
        played.append(line)
        if line and not line.startswith("#"):
            state, follows = outcome(state, line)
            played.append(f"    {follows}")
    assert played == written, "\n".join(played)


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 8
