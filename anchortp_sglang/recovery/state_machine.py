"""The coordinator's decisions, as pure functions: what to do next, and which device is to blame.

``step(state, event, now) -> (state, action, reason)`` follows the table TRANSITIONS. The shell around it
(coordinator.py) watches processes, carries out actions and reports events with the attempt they belong to: events of an
abandoned attempt are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

Cause = Literal["process", "device", "hang", "planned"]


class Phase(StrEnum):
    SERVING = "serving"
    FENCING = "fencing"  # the old generation is being killed, reaped and drained
    STARTING = "starting"  # a new generation is planned, forked and binding
    REPLAYING = "replaying"
    DOWN = "down"  # given up; open requests have ended with an error
    STOPPED = "stopped"  # the operator ends the server


class EventKind(StrEnum):
    FAULT = "fault"
    CHANGE = "change"  # the generation of other devices, as planned, is to take over
    ABORTED = "aborted"  # a step could not be finished because something else died
    FENCED = "fenced"
    STARTED = "started"
    REPLAYED = "replayed"
    FAILED = "failed"
    DEADLINE = "deadline"
    TOKENS = "tokens"  # a client got new tokens, or no client waits for any
    RETRY = "retry"  # what failed may work by now
    STOP = "stop"


class Action(StrEnum):
    FENCE = "fence"
    START = "start"
    REPLAY = "replay"
    RESUME = "resume"
    GIVE_UP = "give_up"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Event:
    """An event. ``attempt``: the attempt it reports on; None for events from outside (faults, deadline, stop).

    ``failure``: why a start failed by itself, equal if it fails in the same way again; empty if it was cut off.
    ``final``: whether it cannot work later either.
    """

    kind: EventKind
    reason: str
    attempt: int | None = None
    failure: str = ""
    final: bool = False


@dataclass(frozen=True)
class State:
    """State of the coordinator. ``attempt`` counts fences; ``deadline_at``: monotonic seconds, only while recovering.

    ``fruitless``: faults of serving generations since a client last got a token, the first of them at
    ``fruitless_since``. ``failure``: of the last start that failed by itself, ``failures`` times in a row. ``aborts``:
    attempts of this recovery that were cut short. ``given_ups``: how often in a row open requests were ended and new
    ones refused; reset when a generation serves. ``final``: whether no retry follows.
    """

    phase: Phase = Phase.SERVING
    attempt: int = 0
    deadline_at: float | None = None
    fruitless: int = 0
    fruitless_since: float = 0.0
    failure: str = ""
    failures: int = 0
    aborts: int = 0
    given_ups: int = 0
    final: bool = False

    @property
    def given_up(self) -> bool:
        """Whether new requests are refused, even if another try is under way."""
        return self.given_ups > 0


_RECOVERING = (Phase.FENCING, Phase.STARTING, Phase.REPLAYING)

TRANSITIONS: dict[tuple[Phase, EventKind], tuple[Phase, Action]] = {
    (Phase.SERVING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    (Phase.SERVING, EventKind.CHANGE): (Phase.FENCING, Action.FENCE),
    # While fencing everything is being killed anyway; the verdict is made afterwards, from what is left.
    (Phase.FENCING, EventKind.FAULT): (Phase.FENCING, Action.NOTHING),
    (Phase.FENCING, EventKind.FENCED): (Phase.STARTING, Action.START),
    (Phase.STARTING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    **{(phase, EventKind.ABORTED): (Phase.FENCING, Action.FENCE) for phase in _RECOVERING},
    (Phase.STARTING, EventKind.STARTED): (Phase.REPLAYING, Action.REPLAY),
    (Phase.REPLAYING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    (Phase.REPLAYING, EventKind.REPLAYED): (Phase.SERVING, Action.RESUME),
    (Phase.DOWN, EventKind.RETRY): (Phase.FENCING, Action.FENCE),
    **{(phase, EventKind.FAILED): (Phase.DOWN, Action.GIVE_UP) for phase in _RECOVERING},
    **{(phase, EventKind.DEADLINE): (Phase.DOWN, Action.GIVE_UP) for phase in _RECOVERING},
    **{(phase, EventKind.STOP): (Phase.STOPPED, Action.NOTHING) for phase in Phase},
}


SAME_FAILURES = 3
"""Starts that fail in the same way, after which a recovery is given up before its deadline."""

FREE_FAULTS = 3
BACK_OFF_S = 0.25
LONGEST_BACK_OFF_S = 2.0
RETRY_S = 10.0
LONGEST_RETRY_S = 300.0
FEWEST_FRUITLESS = 8
"""Fewest faults without a token in between that may end the open requests, however long they take."""


def step(state: State, event: Event, now: float, deadline_s: float) -> tuple[State, Action, str]:
    """Return the next state, what to do, and why. An event without a row in the table changes nothing."""
    if event.attempt is not None and event.attempt != state.attempt:
        return state, Action.NOTHING, f"{event.kind} of abandoned attempt {event.attempt} ignored"
    if event.kind is EventKind.TOKENS:
        return replace(state, fruitless=0), Action.NOTHING, event.reason
    kind, reason, state = _repeated(state, event)
    row = TRANSITIONS.get((state.phase, kind))
    if row is None:
        return state, Action.NOTHING, f"{kind} has no effect while {state.phase}"
    phase, action = row
    if state.phase is Phase.SERVING and kind is EventKind.FAULT:
        since = state.fruitless_since if state.fruitless else now
        state = replace(state, fruitless=state.fruitless + 1, fruitless_since=since)
    attempt = state.attempt + (action is Action.FENCE)
    # A second fault does not extend the time promised to clients.
    deadline_at = (state.deadline_at or now + deadline_s) if phase in _RECOVERING else None
    aborts = 0 if phase is Phase.SERVING else state.aborts + (kind is EventKind.ABORTED)
    given_ups = 0 if action is Action.RESUME else state.given_ups + (action is Action.GIVE_UP)
    final = action is Action.GIVE_UP and event.final
    after = replace(
        state,
        phase=phase,
        attempt=attempt,
        deadline_at=deadline_at,
        aborts=aborts,
        given_ups=given_ups,
        final=final,
    )
    return after, action, reason


def _repeated(state: State, event: Event) -> tuple[EventKind, str, State]:
    """Turn a start's failure into FAILED after it has occurred ``SAME_FAILURES`` times in a row."""
    if event.kind is EventKind.STARTED:
        return event.kind, event.reason, replace(state, failure="", failures=0)
    if not event.failure:
        return event.kind, event.reason, state
    failures = state.failures + 1 if event.failure == state.failure else 1
    if failures < SAME_FAILURES:
        return event.kind, event.reason, replace(state, failure=event.failure, failures=failures)
    reason = f"{failures} starts in a row failed in the same way: {event.reason}"
    return EventKind.FAILED, reason, replace(state, failure="", failures=0)


def back_off_s(state: State) -> float:
    """Return the seconds to wait before the next start.

    No wait at first; longer while attempts are cut short, or recoveries get no client a token.
    """
    beyond = max(state.fruitless, state.aborts) - FREE_FAULTS
    return min(BACK_OFF_S * 2.0 ** (beyond - 1), LONGEST_BACK_OFF_S) if beyond > 0 else 0.0


def retry_after_s(state: State) -> float:
    """Return the seconds after which a server that has given up tries again."""
    return min(RETRY_S * 2.0 ** (state.given_ups - 1), LONGEST_RETRY_S)


def budget_is_spent(state: State, now: float, deadline_s: float) -> bool:
    """Return whether faults have kept every client from a token for as long as one recovery may take."""
    return state.fruitless >= FEWEST_FRUITLESS and now - state.fruitless_since > deadline_s


@dataclass(frozen=True)
class DeviceEvidence:
    """The evidence on one device of the failed generation, once all of its ranks are dead.

    ``device_error``: why its GPU is lost, although its anchor lives; empty if it is not.
    """

    device: int
    anchor_alive: bool
    rank_died: bool
    rank_hung: bool = False
    device_error: str = ""

    @property
    def loss(self) -> str:
        """Why the device is lost; empty if it is not."""
        if self.anchor_alive:
            return self.device_error and f"device {self.device}: {self.device_error}"
        return f"anchor and rank of device {self.device} are dead: its memory is gone"


@dataclass(frozen=True)
class Verdict:
    """Judgement of a fault. ``lost``: devices whose memory is gone. ``device``: the one to name in the status."""

    cause: Cause
    device: int
    lost: tuple[int, ...]
    reason: str


NO_DEVICE = -1


def judge(evidence: Sequence[DeviceEvidence], reason: str, planned: bool = False) -> Verdict:
    """Judge whether a process or a device failed. A device is lost with its anchor, which held its memory, or its GPU.

    The order in which rank and anchor died does not matter. Without a culprit (a dead detokenizer, a batch that
    contradicts what clients have) it is a process failure with ``reason``. ``planned``: main stopped the ranks, as
    devices are to change.
    """
    lost = tuple(e for e in evidence if e.loss)
    if lost:
        devices = tuple(e.device for e in lost)
        return Verdict("device", devices[0], devices, "; ".join(e.loss for e in lost))
    if planned:
        return Verdict("planned", NO_DEVICE, (), reason)
    for item in evidence:
        if item.rank_died:
            return Verdict("process", item.device, (), f"the rank on device {item.device} died, its anchor lives")
    for item in evidence:
        if item.rank_hung:
            return Verdict("hang", item.device, (), f"the rank on device {item.device} made no progress")
    return Verdict("process", NO_DEVICE, (), reason)
