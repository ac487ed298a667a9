"""Recorded streams through the OpenAI client: what each received and when, and how it ended."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import openai

Face = Literal["chat", "completion"]

_READ_TIMEOUT_S = 60.0


@dataclass
class ClientStream:
    """One stream. ``tokens``: number by the server's usage. ``arrivals``: (time.monotonic(), tokens so far)."""

    face: Face
    prompt: str
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None
    done: bool = False

    def outcome(self) -> tuple[str, int, str | None]:
        """Return what must be equal in two runs of the same prompt."""
        return self.text, self.tokens, self.finish_reason

    def tokens_at(self, moment: float) -> int:
        """Return the number of tokens received until ``moment`` (time.monotonic())."""
        return max((tokens for at, tokens in self.arrivals if at <= moment), default=0)

    def pause_around(self, start: float, end: float) -> tuple[float, float]:
        """Return (length, end) of the longest gap between two arrivals that overlaps [start, end]."""
        gaps = [(b - a, b) for (a, _), (b, _) in itertools.pairwise(self.arrivals) if a < end and b > start]
        return max(gaps, default=(0.0, end))

    def take(self, text: str, tokens: int) -> None:
        self.text += text
        if tokens > self.tokens:
            self.tokens = tokens
            self.arrivals.append((time.monotonic(), tokens))


class OpenAIStreams:
    """A thread and a greedy stream of ``max_tokens`` tokens for each prompt, alternately chat and completion.

    Entering the block opens the streams; leaving it closes the client, which aborts those that still run.
    """

    def __init__(self, url: str, prompts: Sequence[str], max_tokens: int) -> None:
        self.max_tokens = max_tokens
        faces: itertools.cycle[Face] = itertools.cycle(("chat", "completion"))
        self.streams = [ClientStream(face, prompt) for prompt, face in zip(prompts, faces, strict=False)]
        # No retries: a retried request would hide that a stream broke.
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_READ_TIMEOUT_S)
        self._threads = [threading.Thread(target=self._follow, args=(s,), daemon=True) for s in self.streams]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def tokens(self) -> int:
        """Number of tokens received so far on all streams."""
        return sum(stream.tokens for stream in self.streams)

    def wait(self, tokens: int | None = None, timeout_s: float = _READ_TIMEOUT_S) -> None:
        """Wait until every stream has ended or has ``tokens`` tokens (if not None). Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while any(not s.done and (tokens is None or s.tokens < tokens) for s in self.streams):
            if time.monotonic() > deadline:
                counts = [stream.tokens for stream in self.streams]
                raise TimeoutError(f"streams did not get on within {timeout_s:g} s; tokens so far: {counts}")
            time.sleep(0.005)

    def _follow(self, stream: ClientStream) -> None:
        try:
            for text, tokens, finish_reason in self._chunks(stream):
                stream.take(text, tokens)
                stream.finish_reason = finish_reason or stream.finish_reason
        except Exception as error:  # its user would see any exception of the client
            stream.error = f"{type(error).__name__}: {error}"
        finally:
            stream.done = True

    def _chunks(self, stream: ClientStream) -> Iterator[tuple[str, int, str | None]]:
        """Yield (text, tokens so far, finish reason) of each message."""
        options: dict[str, Any] = {
            "model": "default",
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "extra_body": {"ignore_eos": True},
        }
        if stream.face == "chat":
            opened = self._client.chat.completions.create(
                messages=[{"role": "user", "content": stream.prompt}], **options
            )
        else:
            opened = self._client.completions.create(prompt=stream.prompt, **options)
        for chunk in opened:
            tokens = chunk.usage.completion_tokens if chunk.usage else 0
            choice = chunk.choices[0] if chunk.choices else None
            if choice is None:
                yield "", tokens, None
            else:
                text = choice.delta.content if stream.face == "chat" else choice.text
                yield text or "", tokens, choice.finish_reason
