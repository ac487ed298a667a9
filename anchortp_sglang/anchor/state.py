"""The values of an anchor's state machine: its state, events and actions.

OWNED: the controller (the server's main process) lives. LINGERING: it died, and the memory is kept until the deadline
for a restarted server to attach. CLOSED: the memory is released and the process ends.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from anchortp_sglang.anchor import messages as m

__all__ = [
    "Action",
    "AdoptSegment",
    "AnchorState",
    "CloseSegment",
    "ControllerDied",
    "CreateSegment",
    "Event",
    "Phase",
    "SealSegment",
    "Segment",
    "Step",
    "Terminated",
    "Tick",
    "WatchController",
]


class Phase(enum.Enum):
    """Phase of an anchor; see the module's docstring."""

    OWNED = "owned"
    LINGERING = "lingering"
    CLOSED = "closed"


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment that the anchor holds. ``generation``: the one that made it."""

    nbytes: int
    generation: int
    sealed: bool = False


class AnchorState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an anchor. ``linger_deadline``: in seconds of the clock given to ``step``."""

    device: int
    run_id: str
    identity: str
    controller_pid: int
    linger_s: float
    generation: int = 0
    phase: Phase = Phase.OWNED
    linger_deadline: float | None = None
    segments: Mapping[str, Segment] = {}

    def __post_init__(self) -> None:
        if not self.linger_s >= 0:
            raise ValueError(f"linger_s is {self.linger_s}: it must not be negative")
        if (self.phase is Phase.LINGERING) != (self.linger_deadline is not None):
            raise ValueError(f"{self.phase} with linger deadline {self.linger_deadline}")


class ControllerDied(msgspec.Struct, frozen=True):
    """Event: the process ``pid`` has exited."""

    pid: int


class Tick(msgspec.Struct, frozen=True):
    """Event: time has passed."""


class Terminated(msgspec.Struct, frozen=True):
    """Event: the operator asked the anchor to end (SIGTERM)."""


Event = m.Request | ControllerDied | Tick | Terminated


class CreateSegment(msgspec.Struct, frozen=True):
    """Action: make the memory."""

    name: str
    nbytes: int
    lazy: bool


class SealSegment(msgspec.Struct, frozen=True):
    """Action: make the memory read-only."""

    name: str


class CloseSegment(msgspec.Struct, frozen=True):
    """Action: release the memory."""

    name: str


class AdoptSegment(msgspec.Struct, frozen=True):
    """Action: hold the handle that came with the message. One held under this name must be of the same segment."""

    name: str
    nbytes: int


class WatchController(msgspec.Struct, frozen=True):
    """Action: report the death of this process, and of no other, as ``ControllerDied``."""

    pid: int


Action = CreateSegment | SealSegment | CloseSegment | AdoptSegment | WatchController


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of an event. If an action fails, the old state stays and the request is refused."""

    state: AnchorState
    reason: str
    actions: tuple[Action, ...] = ()
    reply: m.Reply | None = None  # None also for Status, which the loop answers
