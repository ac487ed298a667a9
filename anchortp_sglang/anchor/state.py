"""The values an anchor's state machine works on: its state, the events it sees, the actions that follow.

OWNED: the controller (the server's main process) lives. LINGERING: it died; the memory is kept until the
deadline for a restarted server that attaches. CLOSED: the memory is given up, the process ends.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from anchortp_sglang.anchor import messages as m

__all__ = [
    "Action",
    "AnchorState",
    "CloseSegment",
    "ControllerDied",
    "CreateSegment",
    "Event",
    "KeepHandle",
    "Phase",
    "SealSegment",
    "Segment",
    "Step",
    "Terminated",
    "Tick",
    "WatchController",
]


class Phase(enum.Enum):
    """See the module's docstring."""

    OWNED = "owned"
    LINGERING = "lingering"
    CLOSED = "closed"


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment the anchor holds; ``generation`` is the one that made it."""

    nbytes: int
    generation: int
    sealed: bool = False


class AnchorState(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what an anchor does next. ``linger_deadline``: on the clock given to ``step``, in
    s."""

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
    """The process behind ``pid`` has exited."""

    pid: int


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Terminated(msgspec.Struct, frozen=True):
    """The operator asked the anchor to end (SIGTERM)."""


Event = m.Request | ControllerDied | Tick | Terminated


class CreateSegment(msgspec.Struct, frozen=True):
    """Make the memory."""

    name: str
    nbytes: int
    lazy: bool


class SealSegment(msgspec.Struct, frozen=True):
    """Make the memory read-only."""

    name: str


class CloseSegment(msgspec.Struct, frozen=True):
    """Let go of the memory."""

    name: str


class KeepHandle(msgspec.Struct, frozen=True):
    """Keep the handle that came with the message; it must be the one already held under this name, if any."""

    name: str
    nbytes: int


class WatchController(msgspec.Struct, frozen=True):
    """Report this process's death as ``ControllerDied``, and no other's any more."""

    pid: int


Action = CreateSegment | SealSegment | CloseSegment | KeepHandle | WatchController


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from an event. If an action fails, the old state stands and the request is refused."""

    state: AnchorState
    reason: str
    actions: tuple[Action, ...] = ()
    reply: m.Reply | None = None  # None also for Status, whose answer takes a look at the memory
