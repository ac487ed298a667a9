"""The anchor's state machine as a table (``TRANSITIONS``), without I/O and clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    Step,
    Terminated,
    Tick,
    WatchController,
)

__all__ = ["MAX_SEGMENTS", "TRANSITIONS", "refuse", "step"]

MAX_SEGMENTS = 1024

Rule = Callable[[AnchorState, Any, float], Step]


def step(state: AnchorState, event: Event, now: float) -> Step:
    """Return the outcome of an event. ``now``: seconds of a monotonic clock."""
    if isinstance(event, m.REQUEST_TYPES):
        if event.run_id != state.run_id:
            return refuse(state, "wrong_run", f"this anchor belongs to run {state.run_id!r}, not {event.run_id!r}")
        if event.generation < state.generation and not isinstance(event, m.Status):
            text = f"generation {event.generation} is superseded by {state.generation}"
            return refuse(state, "stale_generation", text)
    rule = TRANSITIONS.get((state.phase, type(event)), _ignore)
    return rule(state, event, now)


def refuse(state: AnchorState, code: m.ReasonCode, text: str) -> Step:
    """Refuse a request: the state stays, and the reply says why."""
    reply = m.Refused(run_id=state.run_id, generation=state.generation, reason_code=code, text=text)
    return Step(state=state, reason=f"{code}: {text}", reply=reply)


def _ok(state: AnchorState, reason: str, *actions: Action) -> Step:
    reply = m.Ok(run_id=state.run_id, generation=state.generation)
    return Step(state=state, reason=reason, actions=actions, reply=reply)


def _with_segment(state: AnchorState, name: str, segment: Segment) -> AnchorState:
    return replace(state, segments={**state.segments, name: segment})


def _unknown(state: AnchorState, name: str) -> Step:
    return refuse(state, "unknown_segment", f"device {state.device} has no segment {name!r}")


def _ignore(state: AnchorState, event: Event, now: float) -> Step:
    return Step(state=state, reason="ignored")


def _report(state: AnchorState, event: m.Status, now: float) -> Step:
    return Step(state=state, reason="status")


def _fence(state: AnchorState, event: m.Fence, now: float) -> Step:
    return _ok(replace(state, generation=event.generation), f"fenced at generation {event.generation}")


def _allocate(state: AnchorState, event: m.Allocate, now: float) -> Step:
    known = state.segments.get(event.name)
    if refusal := _no_room(state, event.name, known, event.nbytes):
        return refusal
    segment = known or Segment(nbytes=event.nbytes, generation=event.generation)
    reply = m.Allocated(
        run_id=state.run_id,
        generation=state.generation,
        created=known is None,
        nbytes=segment.nbytes,
        sealed=segment.sealed,
    )
    if known:
        return Step(state=state, reason=f"{event.name!r} is there already", reply=reply)
    return Step(
        state=_with_segment(state, event.name, segment),
        reason=f"allocated {event.name!r}, {event.nbytes} bytes",
        actions=(CreateSegment(event.name, event.nbytes, event.lazy),),
        reply=reply,
    )


def _no_room(state: AnchorState, name: str, known: Segment | None, nbytes: int) -> Step | None:
    if known and known.nbytes != nbytes:
        text = f"segment {name!r} has {known.nbytes} bytes, not {nbytes}: release it first"
        return refuse(state, "size_mismatch", text)
    if not known and len(state.segments) >= MAX_SEGMENTS:
        return refuse(state, "too_many_segments", f"an anchor holds at most {MAX_SEGMENTS} segments")
    return None


def _seal(state: AnchorState, event: m.Seal, now: float) -> Step:
    segment = state.segments.get(event.name)
    if segment is None:
        return _unknown(state, event.name)
    sealed = _with_segment(state, event.name, replace(segment, sealed=True))
    return _ok(sealed, f"sealed {event.name!r}", SealSegment(event.name))


def _release(state: AnchorState, event: m.Release, now: float) -> Step:
    if event.name not in state.segments:
        return _unknown(state, event.name)
    rest = {name: segment for name, segment in state.segments.items() if name != event.name}
    return _ok(replace(state, segments=rest), f"released {event.name!r}", CloseSegment(event.name))


def _open(state: AnchorState, event: m.OpenHandle, now: float) -> Step:
    segment = state.segments.get(event.name)
    if segment is None:
        return _unknown(state, event.name)
    reply = m.Handle(run_id=state.run_id, generation=state.generation, nbytes=segment.nbytes, sealed=segment.sealed)
    return Step(state=state, reason=f"handed out {event.name!r}", reply=reply)


def _adopt(state: AnchorState, event: m.AdoptHandle, now: float) -> Step:
    known = state.segments.get(event.name)
    if refusal := _no_room(state, event.name, known, event.nbytes):
        return refusal
    segment = known or Segment(nbytes=event.nbytes, generation=event.generation, sealed=event.sealed)
    adopted = _with_segment(state, event.name, segment)
    return _ok(adopted, f"took back {event.name!r}, {event.nbytes} bytes", AdoptSegment(event.name, event.nbytes))


def _already_attached(state: AnchorState, event: m.Attach, now: float) -> Step:
    if event.controller_pid != state.controller_pid:
        text = f"the anchor belongs to process {state.controller_pid}, which still runs: stop that server first"
        return refuse(state, "controller_alive", text)
    return _attach(state, event, now)


def _attach(state: AnchorState, event: m.Attach, now: float) -> Step:
    if event.identity != state.identity:
        text = f"the anchor holds memory of {state.identity!r}, not of {event.identity!r}: shut it down"
        return refuse(state, "wrong_identity", text)
    attached = replace(
        state,
        phase=Phase.OWNED,
        linger_deadline=None,
        controller_pid=event.controller_pid,
        generation=event.generation,
        linger_s=state.linger_s if event.linger_s is None else event.linger_s,
    )
    reason = f"controlled by process {event.controller_pid} at generation {event.generation}"
    return _ok(attached, reason, WatchController(event.controller_pid))


def _not_controlled(state: AnchorState, event: m.Request, now: float) -> Step:
    text = f"the controller, process {state.controller_pid}, is dead: attach a new one first"
    return refuse(state, "not_controller", text)


def _linger(state: AnchorState, event: ControllerDied, now: float) -> Step:
    if event.pid != state.controller_pid:
        return _ignore(state, event, now)
    died = f"controller {event.pid} died"
    if state.linger_s == 0:
        return Step(state=replace(state, phase=Phase.CLOSED), reason=died)
    lingering = replace(state, phase=Phase.LINGERING, linger_deadline=now + state.linger_s)
    return Step(state=lingering, reason=f"{died}: the memory is kept for {state.linger_s:g} s")


def _expire(state: AnchorState, event: Tick, now: float) -> Step:
    if state.linger_deadline is None or now < state.linger_deadline:
        return Step(state=state, reason="lingering")
    return Step(state=_closed(state), reason="no server attached in time")


def _terminate(state: AnchorState, event: Terminated, now: float) -> Step:
    return Step(state=_closed(state), reason="terminated")


def _shut_down(state: AnchorState, event: m.Shutdown, now: float) -> Step:
    return _ok(_closed(state), "shut down")


def _closed(state: AnchorState) -> AnchorState:
    return replace(state, phase=Phase.CLOSED, linger_deadline=None)


def _going_away(state: AnchorState, event: m.Request, now: float) -> Step:
    return refuse(state, "closed", "the anchor is shutting down")


_OWNED_RULES: dict[type, Rule] = {
    m.Status: _report,
    m.Fence: _fence,
    m.Attach: _already_attached,
    m.Allocate: _allocate,
    m.Seal: _seal,
    m.Release: _release,
    m.OpenHandle: _open,
    m.AdoptHandle: _adopt,
    m.Shutdown: _shut_down,
    ControllerDied: _linger,
    Terminated: _terminate,
}
_LINGERING_RULES: dict[type, Rule] = {
    m.Status: _report,
    m.Fence: _not_controlled,
    m.Attach: _attach,
    m.Allocate: _not_controlled,
    m.Seal: _not_controlled,
    m.Release: _not_controlled,
    m.OpenHandle: _not_controlled,
    m.AdoptHandle: _not_controlled,
    m.Shutdown: _shut_down,
    Tick: _expire,
    Terminated: _terminate,
}
_CLOSED_RULES: dict[type, Rule] = dict.fromkeys(m.REQUEST_TYPES, _going_away)

TRANSITIONS: dict[tuple[Phase, type], Rule] = {
    (phase, event): rule
    for phase, rules in (
        (Phase.OWNED, _OWNED_RULES),
        (Phase.LINGERING, _LINGERING_RULES),
        (Phase.CLOSED, _CLOSED_RULES),
    )
    for event, rule in rules.items()
}
