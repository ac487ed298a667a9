"""What anchors and their clients say to each other: frozen msgspec structs, in msgpack.

Every message carries the run it belongs to and the generation of its sender (in a reply: of the anchor). An
anchor refuses messages of another run, and those of generations older than its own, except ``Status``.

Control messages are one ZeroMQ frame each. On the handles socket a message is framed by its length (4 bytes,
little endian); a segment's file descriptor travels beside it (SCM_RIGHTS).
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, get_args

import msgspec

__all__ = [
    "FRAME_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "AdoptHandle",
    "Allocate",
    "Allocated",
    "Attach",
    "ControlRequest",
    "Fence",
    "Handle",
    "HandleRequest",
    "Ok",
    "OpenHandle",
    "ReasonCode",
    "Refused",
    "Release",
    "Reply",
    "Request",
    "Seal",
    "SegmentInfo",
    "Shutdown",
    "Status",
    "StatusReply",
    "decode_control",
    "decode_handle_request",
    "decode_reply",
    "encode",
    "frame",
    "frame_length",
]

MAX_MESSAGE_BYTES = 64 * 1024  # of a request; replies come from the anchor and may be longer
FRAME_HEADER_BYTES = 4
_HEADER = struct.Struct("<I")

Generation = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
SegmentName = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[\w.:/-]+$")]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]

ReasonCode = Literal[
    "bad_handle",  # the file descriptor handed over is no segment of the promised kind
    "bad_message",  # not decodable, too long
    "closed",  # the anchor is going away
    "controller_alive",  # the anchor belongs to a server that still runs
    "internal_error",
    "no_memory",
    "no_such_process",  # the new controller does not run
    "not_controller",  # nobody controls the anchor: it lingers, attach first
    "size_mismatch",
    "stale_generation",
    "too_many_segments",
    "unknown_segment",
    "wrong_identity",  # the anchor holds the memory of another model or ownership
    "wrong_run",
]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of all messages."""

    run_id: ShortText
    generation: Generation


class Status(Message, frozen=True, kw_only=True):
    """Ask for a ``StatusReply``. Answered at any generation: it only reads."""


class Fence(Message, frozen=True, kw_only=True):
    """Raise the anchor's generation to this message's; older ones are refused from then on."""


class Attach(Message, frozen=True, kw_only=True):
    """A restarted server takes over a lingering anchor, whose generation becomes this message's.

    ``identity`` must equal the anchor's. ``linger_s`` replaces the anchor's own; None keeps it.
    """

    controller_pid: Pid
    identity: ShortText
    linger_s: Seconds | None = None


class Allocate(Message, frozen=True, kw_only=True):
    """Make a segment of zeros; the same name and size again is answered with what is there."""

    name: SegmentName
    nbytes: Bytes
    lazy: bool = False


class Seal(Message, frozen=True, kw_only=True):
    """Make a segment read-only for every handle; mappings made before stay writable. Cannot be undone."""

    name: SegmentName


class Release(Message, frozen=True, kw_only=True):
    """Let go of a segment; its bytes live on while somebody else holds it."""

    name: SegmentName


class Shutdown(Message, frozen=True, kw_only=True):
    """Let go of all segments and exit."""


class OpenHandle(Message, frozen=True, kw_only=True):
    """Ask for the file descriptor of a segment (handles socket)."""

    name: SegmentName


class AdoptHandle(Message, frozen=True, kw_only=True):
    """Give a restarted anchor a segment's file descriptor, which travels beside (handles socket)."""

    name: SegmentName
    nbytes: Bytes
    sealed: bool


class Ok(Message, frozen=True, kw_only=True):
    """Done."""


class Allocated(Message, frozen=True, kw_only=True):
    """The segment exists; ``created`` tells whether it is new, and so holds zeros."""

    created: bool
    nbytes: int
    sealed: bool


class Handle(Message, frozen=True, kw_only=True):
    """The segment's file descriptor travels beside; it is read-only if ``sealed``."""

    nbytes: int
    sealed: bool


class SegmentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A segment in a status; ``generation`` is the one that made it."""

    name: str
    nbytes: int
    resident_bytes: int
    generation: int
    sealed: bool


class StatusReply(Message, frozen=True, kw_only=True):
    """What the anchor holds. ``controller_pid`` is None while it lingers; ``dropped`` counts refusals."""

    device: int
    pid: int
    identity: str
    controller_pid: int | None
    segments: list[SegmentInfo]
    dropped: dict[str, int]
    uptime_s: float


class Refused(Message, frozen=True, kw_only=True):
    """Not done, and nothing changed."""

    reason_code: ReasonCode
    text: str


ControlRequest = Status | Fence | Attach | Allocate | Seal | Release | Shutdown
HandleRequest = OpenHandle | AdoptHandle
Request = ControlRequest | HandleRequest
Reply = Ok | Allocated | Handle | StatusReply | Refused

REQUEST_TYPES: tuple[type[Message], ...] = get_args(Request)

_encoder = msgspec.msgpack.Encoder()
_control_decoder: msgspec.msgpack.Decoder[ControlRequest] = msgspec.msgpack.Decoder(ControlRequest)
_handle_decoder: msgspec.msgpack.Decoder[HandleRequest] = msgspec.msgpack.Decoder(HandleRequest)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Message) -> bytes:
    """The message in msgpack."""
    return _encoder.encode(message)


def decode_control(payload: bytes) -> ControlRequest:
    """``msgspec.DecodeError`` (``ValidationError`` among them) on anything else."""
    return _control_decoder.decode(payload)


def decode_handle_request(payload: bytes) -> HandleRequest:
    """``msgspec.DecodeError`` on anything else."""
    return _handle_decoder.decode(payload)


def decode_reply(payload: bytes) -> Reply:
    """``msgspec.DecodeError`` on anything else."""
    return _reply_decoder.decode(payload)


def frame(message: Message) -> bytes:
    """The message as it travels on the handles socket."""
    payload = encode(message)
    return _HEADER.pack(len(payload)) + payload


def frame_length(header: bytes | bytearray) -> int:
    """Length of the payload that follows a header of ``FRAME_HEADER_BYTES`` bytes."""
    length: int = _HEADER.unpack(header)[0]
    return length
