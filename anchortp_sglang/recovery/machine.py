"""The coordinator's decisions, as pure functions: what happens next, and who is to blame.

``step(state, event, now) -> (state, action, reason)`` follows the table TRANSITIONS. The shell around it
(coordinator.py) watches processes, carries out actions and reports back with events that carry the attempt they
belong to: what an abandoned attempt still reports is ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

Cause = Literal["process", "device", "hang"]


class Phase(StrEnum):
    SERVING = "serving"
    FENCING = "fencing"  # the old generation is being killed, reaped and drained
    STARTING = "starting"  # a new generation is planned, forked and binding
    REPLAYING = "replaying"
    DOWN = "down"  # given up; open requests have ended with an error
    STOPPED = "stopped"  # the operator ends the server


class EventKind(StrEnum):
    FAULT = "fault"
    ABORTED = "aborted"  # a step could not be finished because something else died
    FENCED = "fenced"
    STARTED = "started"
    REPLAYED = "replayed"
    FAILED = "failed"
    DEADLINE = "deadline"
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
    """``attempt``: the attempt it reports on; None for what comes from outside (faults, deadline, stop)."""

    kind: EventKind
    reason: str
    attempt: int | None = None


@dataclass(frozen=True)
class State:
    """``attempt`` counts fences; ``deadline_at``: monotonic seconds, only while recovering."""

    phase: Phase = Phase.SERVING
    attempt: int = 0
    deadline_at: float | None = None


_RECOVERING = (Phase.FENCING, Phase.STARTING, Phase.REPLAYING)

TRANSITIONS: dict[tuple[Phase, EventKind], tuple[Phase, Action]] = {
    (Phase.SERVING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    # While fencing everything is being killed anyway; the verdict is made afterwards, from what is left.
    (Phase.FENCING, EventKind.FAULT): (Phase.FENCING, Action.NOTHING),
    (Phase.FENCING, EventKind.FENCED): (Phase.STARTING, Action.START),
    (Phase.STARTING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    **{(phase, EventKind.ABORTED): (Phase.FENCING, Action.FENCE) for phase in _RECOVERING},
    (Phase.STARTING, EventKind.STARTED): (Phase.REPLAYING, Action.REPLAY),
    (Phase.REPLAYING, EventKind.FAULT): (Phase.FENCING, Action.FENCE),
    (Phase.REPLAYING, EventKind.REPLAYED): (Phase.SERVING, Action.RESUME),
    **{(phase, EventKind.FAILED): (Phase.DOWN, Action.GIVE_UP) for phase in _RECOVERING},
    **{(phase, EventKind.DEADLINE): (Phase.DOWN, Action.GIVE_UP) for phase in _RECOVERING},
    **{(phase, EventKind.STOP): (Phase.STOPPED, Action.NOTHING) for phase in Phase},
}


def step(state: State, event: Event, now: float, deadline_s: float) -> tuple[State, Action, str]:
    """The next state, what to do, and why. An event without a row in the table changes nothing."""
    if event.attempt is not None and event.attempt != state.attempt:
        return state, Action.NOTHING, f"{event.kind} of abandoned attempt {event.attempt} ignored"
    row = TRANSITIONS.get((state.phase, event.kind))
    if row is None:
        return state, Action.NOTHING, f"{event.kind} has no effect while {state.phase}"
    phase, action = row
    attempt = state.attempt + (action is Action.FENCE)
    # A second fault does not extend the time that clients were promised.
    deadline_at = (state.deadline_at or now + deadline_s) if phase in _RECOVERING else None
    return replace(state, phase=phase, attempt=attempt, deadline_at=deadline_at), action, event.reason


@dataclass(frozen=True)
class DeviceEvidence:
    """What is known of one device of the generation that failed, once all of its ranks are dead.

    ``device_error``: why its GPU is lost, though its anchor lives; empty if it is not.
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
    """``lost``: devices whose memory is gone. ``device``: the one to name in the status."""

    cause: Cause
    device: int
    lost: tuple[int, ...]
    reason: str


NO_DEVICE = -1


def judge(evidence: Sequence[DeviceEvidence], reason: str) -> Verdict:
    """Process or device? A device is lost when its anchor is dead too: its memory went with it. Or its GPU failed.

    The order in which the two died does not matter. Without a culprit (a dead detokenizer, a batch that
    contradicts what clients have) it is a process failure with ``reason``.
    """
    lost = tuple(e for e in evidence if e.loss)
    if lost:
        devices = tuple(e.device for e in lost)
        return Verdict("device", devices[0], devices, "; ".join(e.loss for e in lost))
    for item in evidence:
        if item.rank_died:
            return Verdict("process", item.device, (), f"the rank on device {item.device} died, its anchor lives")
    for item in evidence:
        if item.rank_hung:
            return Verdict("hang", item.device, (), f"the rank on device {item.device} made no progress")
    return Verdict("process", NO_DEVICE, (), reason)
