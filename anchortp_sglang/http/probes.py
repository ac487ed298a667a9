"""What an orchestrator's probes are told, while the server is not down.

SGLang's /health generates a token, takes a second at least (http_server.health_generate) and waits behind a long
prefill: asked as a liveness probe it gets a healthy server killed. The coordinator sees dead and hung ranks by itself
and replaces them, so /health says what it knows. /health_generate remains the one that generates a token.
"""

from dataclasses import dataclass

from anchortp_sglang.recovery.state_machine import Phase

_NOT_RECOVERING = (Phase.SERVING, Phase.DOWN, Phase.STOPPED)
PROBES = ("/health", "/health_generate", "/ready", "/ping")


@dataclass(frozen=True)
class Tokenizer:
    """What SGLang's TokenizerManager says of itself.

    ``starting``: its warm-up request has not been answered. ``leaving``: it was told to end.
    """

    starting: bool
    leaving: bool


def answer(path: str, phase: Phase, tokenizer: Tokenizer) -> int | None:
    """The HTTP status of a probe; None: SGLang's own handler gives it."""
    recovering = phase not in _NOT_RECOVERING
    if path == "/ready":  # as when SGLang is paused: new requests are taken, but wait
        return 503 if recovering else None
    if path == "/ping" or tokenizer.starting or tokenizer.leaving:  # SGLang looks at flags alone
        return None
    if recovering:
        return 200
    return 200 if path == "/health" and phase is Phase.SERVING else None
