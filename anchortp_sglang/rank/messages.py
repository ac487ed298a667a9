"""Our messages on SGLang's own ZeroMQ sockets."""

from sglang.srt.managers.io_struct import BaseReq, TokenizedGenerateReqInput, hook_custom_types


class Resume(TokenizedGenerateReqInput, kw_only=True):
    """A request that was running when its ranks died.

    ``delivered``: the output tokens that TokenizerManager holds; ``cached_tokens``: what it reported so far.
    """

    delivered: list[int] = []
    cached_tokens: int = 0


class GenerationStart(BaseReq, kw_only=True):
    """First message of a generation: rank 0 drops earlier arrivals, which were meant for its dead predecessor."""

    generation: int


class CaptureGraphs(BaseReq, kw_only=True):
    """main -> all ranks: capture decode graphs for these batch sizes (GPUs only)."""

    batch_sizes: list[int]


class Leave(BaseReq, kw_only=True):
    """main -> all ranks: end after this step, as another generation takes over."""


class Measure(BaseReq, kw_only=True):
    """main -> all ranks: measure your device after this step, and report it with this number."""

    number: int


class Fence(BaseReq, kw_only=True):
    """main -> detokenizer -> TokenizerManager: nothing of an older generation comes after this."""

    generation: int
    drained: int = 0
    waited_s: float = 0.0


class Ping(BaseReq, kw_only=True):
    """main -> detokenizer -> TokenizerManager: checks that the detokenizer answers."""

    number: int


class Reseed(BaseReq, kw_only=True):
    """main -> a new detokenizer: its predecessor's progress with each request that has delivered tokens.

    ``decode_ids``: as in SGLang's DecodeStatus, the last prompt tokens (``context_tokens`` of them), then the delivered
    ones. ``sent_chars``: characters of text that TokenizerManager holds. ``skip_special``, ``space_special``: the
    request's skip_special_tokens and spaces_between_special_tokens.
    """

    rids: list[str]
    decode_ids: list[list[int]]
    context_tokens: list[int]
    sent_chars: list[int]
    skip_special: list[bool]
    space_special: list[bool]


CONTEXT_TOKENS = 5
"""``INIT_INCREMENTAL_DETOKENIZATION_OFFSET`` of managers/schedule_batch.py: prompt tokens sent ahead for decoding."""


def register() -> None:
    """Make the types known to SGLang's msgpack codec, in every process that sends or receives them."""
    hook_custom_types(Resume, GenerationStart, CaptureGraphs, Leave, Measure, Fence, Ping, Reseed)
