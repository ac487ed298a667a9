"""Messages of TokenizerManager as values: encoded when they are dispatched, as SGLang would send them.

TokenizerManager continues to use the objects that it dispatches (it puts unpicklable time stats back into them), so a
message that is kept for later must not share anything with them.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, msgpack_decode, msgpack_encode

from anchortp_sglang.rank.messages import CONTEXT_TOKENS, Reseed, Resume
from anchortp_sglang.recovery.requests.journal import Journal

_PICKLED = envs.SGLANG_USE_PICKLE_IPC.get()


def encode(message: Any) -> bytes:
    """Encode a message as ``sock_send`` (managers/io_struct.py) would send it."""
    if _PICKLED:
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return msgpack_encode(message)


def decode(message: bytes) -> Any:
    """Decode a message of ours like ``sock_recv``."""
    return pickle.loads(message) if _PICKLED else msgpack_decode(message)


@dataclass
class Record:
    """A request as it was dispatched, and the cached_tokens last reported to its client.

    ``message``: the request, encoded as a message of its own. ``begun``: whether ranks have been given it. ``journal``:
    that of its HTTP request, in which it is generation ``number``; None if nobody asked for one.
    """

    message: bytes
    begun: bool = False
    cached_tokens: int = 0
    journal: Journal | None = None
    number: int = 0

    def request(self) -> TokenizedGenerateReqInput:
        """Decode a fresh copy of the request."""
        request: TokenizedGenerateReqInput = decode(self.message)
        return request

    def resume(self, delivered: list[int]) -> bytes:
        """Encode the message that makes ranks go on after ``delivered``, the output tokens that the client has."""
        request = self.request()
        fields = {name: getattr(request, name) for name in TokenizedGenerateReqInput.__struct_fields__}
        # Each token is reported at once (SchedulerOutputStreamer), whatever the client wanted: the next fault finds
        # more of them, and ranks can prove that they serve it.
        fields["stream"], request.sampling_params.stream_interval = True, 1
        return encode(Resume(**fields, delivered=delivered, cached_tokens=self.cached_tokens))


def records_of(message: Any, encoded: bytes) -> dict[str, Record]:
    """Return the generation requests in a message, by rid; none for other kinds. ``encoded``: the message."""
    if isinstance(message, TokenizedGenerateReqInput):
        return {message.rid: Record(encoded)}
    batch = getattr(message, "batch", None) or ()
    return {one.rid: Record(encode(one)) for one in batch if isinstance(one, TokenizedGenerateReqInput)}


def reseed_of(open_requests: Iterable[tuple[str, Record, Any]]) -> Reseed:
    """Make the message that tells a detokenizer of requests (rid, record, ReqState) with delivered tokens."""
    message = Reseed(rids=[], decode_ids=[], context_tokens=[], sent_chars=[], skip_special=[], space_special=[])
    for rid, record, state in open_requests:
        request = record.request()
        context = list(request.input_ids[-CONTEXT_TOKENS:])
        message.rids.append(rid)
        message.decode_ids.append([*context, *state.output_ids])
        message.context_tokens.append(len(context))
        message.sent_chars.append(len(state.get_text()))
        message.skip_special.append(request.sampling_params.skip_special_tokens)
        message.space_special.append(request.sampling_params.spaces_between_special_tokens)
    return message
