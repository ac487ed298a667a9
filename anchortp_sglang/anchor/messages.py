"""Messages between anchors and their clients: frozen msgspec structs, encoded in msgpack.

Every message has the run it belongs to and the sender's generation (in a reply, the anchor's). An anchor refuses
messages of another run and, except ``Status``, those of generations older than its own.

A control message is one ZeroMQ frame. On the handles socket a message follows its length (4 bytes, little endian); a
segment's file descriptor is sent with it (SCM_RIGHTS).
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
    "closed",  # the anchor is shutting down
    "controller_alive",  # the anchor belongs to a server that still runs
    "internal_error",
    "no_memory",
    "no_such_process",  # the new controller is not running
    "not_controller",  # the anchor lingers without a controller: attach first
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
    """Request for a ``StatusReply``, answered at any generation, as it only reads."""


class Fence(Message, frozen=True, kw_only=True):
    """Request to raise the anchor's generation to this message's, and refuse older ones from then on."""


class Attach(Message, frozen=True, kw_only=True):
    """Request of a restarted server to take over a lingering anchor, whose generation becomes this message's.

    ``identity`` must equal the anchor's. ``linger_s`` replaces the anchor's own, unless None.
    """

    controller_pid: Pid
    identity: ShortText
    linger_s: Seconds | None = None


class Allocate(Message, frozen=True, kw_only=True):
    """Request for a segment of zeros. If one of this name and size exists, the reply describes it."""

    name: SegmentName
    nbytes: Bytes
    lazy: bool = False


class Seal(Message, frozen=True, kw_only=True):
    """Request to make a segment read-only for good, except through existing mappings."""

    name: SegmentName


class Release(Message, frozen=True, kw_only=True):
    """Request to release a segment; its bytes live on while another process holds it."""

    name: SegmentName


class Shutdown(Message, frozen=True, kw_only=True):
    """Request to release all segments and exit."""


class OpenHandle(Message, frozen=True, kw_only=True):
    """Request for the file descriptor of a segment (handles socket)."""

    name: SegmentName


class AdoptHandle(Message, frozen=True, kw_only=True):
    """Request that a restarted anchor holds a segment, whose file descriptor is sent with it (handles socket)."""

    name: SegmentName
    nbytes: Bytes
    sealed: bool


class Ok(Message, frozen=True, kw_only=True):
    """Reply: the request was carried out."""


class Allocated(Message, frozen=True, kw_only=True):
    """Reply: the segment exists. ``created``: it is new and holds zeros."""

    created: bool
    nbytes: int
    sealed: bool


class Handle(Message, frozen=True, kw_only=True):
    """Reply with the segment's file descriptor, which is read-only if ``sealed``."""

    nbytes: int
    sealed: bool


class SegmentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A segment in a status. ``generation``: the one that made it."""

    name: str
    nbytes: int
    resident_bytes: int
    generation: int
    sealed: bool


class StatusReply(Message, frozen=True, kw_only=True):
    """Reply with what the anchor holds. ``controller_pid``: None while it lingers. ``dropped``: refusals by reason."""

    device: int
    pid: int
    identity: str
    controller_pid: int | None
    segments: list[SegmentInfo]
    dropped: dict[str, int]
    uptime_s: float


class Refused(Message, frozen=True, kw_only=True):
    """Reply: the request was refused, and nothing changed."""

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
    """Encode a message in msgpack."""
    return _encoder.encode(message)


def decode_control(payload: bytes) -> ControlRequest:
    """Decode a control request. Raises ``msgspec.DecodeError`` (or its ``ValidationError``) for anything else."""
    return _control_decoder.decode(payload)


def decode_handle_request(payload: bytes) -> HandleRequest:
    """Decode a request of the handles socket. Raises ``msgspec.DecodeError`` for anything else."""
    return _handle_decoder.decode(payload)


def decode_reply(payload: bytes) -> Reply:
    """Decode a reply. Raises ``msgspec.DecodeError`` for anything else."""
    return _reply_decoder.decode(payload)


def frame(message: Message) -> bytes:
    """Encode a message for the handles socket, with its length before it."""
    payload = encode(message)
    return _HEADER.pack(len(payload)) + payload


def frame_length(header: bytes | bytearray) -> int:
    """Return the length of the payload after a header of ``FRAME_HEADER_BYTES`` bytes."""
    length: int = _HEADER.unpack(header)[0]
    return length
