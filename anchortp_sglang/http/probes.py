"""Answers to an orchestrator's probes while the server is not down.

SGLang's /health generates a token, takes at least a second (http_server.health_generate) and waits behind a long
prefill: as a liveness probe it would get a healthy server killed. As the coordinator detects and replaces dead and hung
ranks by itself, our /health answers from its state. /health_generate still generates a token.
"""

from dataclasses import dataclass

from anchortp_sglang.recovery.state_machine import Phase

_NOT_RECOVERING = (Phase.SERVING, Phase.DOWN, Phase.STOPPED)
PROBES = ("/health", "/health_generate", "/ready", "/ping")


@dataclass(frozen=True)
class Tokenizer:
    """State of SGLang's TokenizerManager.

    ``starting``: its warm-up request has not been answered. ``leaving``: it is shutting down.
    """

    starting: bool
    leaving: bool


def answer(path: str, phase: Phase, tokenizer: Tokenizer) -> int | None:
    """Return the HTTP status of a probe, or None if SGLang's own handler answers it."""
    recovering = phase not in _NOT_RECOVERING
    if path == "/ready":  # as while SGLang is paused: new requests are accepted, but wait
        return 503 if recovering else None
    if path == "/ping" or tokenizer.starting or tokenizer.leaving:  # SGLang answers these at once
        return None
    if recovering:
        return 200
    return 200 if path == "/health" and phase is Phase.SERVING else None
