"""Concurrent streaming clients that record what they receive and when."""

import http.client
import itertools
import json
import math
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_READ_TIMEOUT_S = 300.0


@dataclass
class History:
    """One client's history. ``arrivals``: (time.monotonic(), tokens so far) of each message with new tokens.

    ``sent_at``, ``ended_at``: time.monotonic() before the request was sent and at the end of its answer.
    """

    request: dict[str, Any]
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    sent_at: float = 0.0
    ended_at: float = math.inf
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None
    done: bool = False

    @property
    def finish_reason(self) -> Any:
        return self.meta.get("finish_reason")

    def longest_pause(self) -> tuple[float, float]:
        """Return when the longest gap between two messages began (time.monotonic) and its length in seconds."""
        times = [at for at, _ in self.arrivals]
        return max(((a, b - a) for a, b in itertools.pairwise(times)), key=lambda gap: gap[1], default=(0.0, 0.0))

    def longest_pause_s(self) -> float:
        """Return the longest gap between two messages; 0 with fewer than two."""
        return self.longest_pause()[1]

    def take(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self.error = str(message["error"])
            return
        if message["output_ids"][: len(self.output_ids)] != self.output_ids:
            self.error = f"tokens given before were taken back: {self.output_ids} became {message['output_ids']}"
        self.meta = message["meta_info"]
        if len(message["output_ids"]) > len(self.output_ids):
            self.arrivals.append((time.monotonic(), len(message["output_ids"])))
        self.output_ids, self.text = list(message["output_ids"]), message["text"]


class Streams:
    """A thread and a /generate stream for each request. Entering the block opens them; leaving it waits for all."""

    def __init__(self, url: str, requests: Sequence[dict[str, Any]]) -> None:
        self._address = urlsplit(url).netloc
        self.histories = [History(request) for request in requests]
        self._threads = [threading.Thread(target=follow, args=(self._address, h), daemon=True) for h in self.histories]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()

    def wait(self, timeout_s: float = _READ_TIMEOUT_S) -> list[History]:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.histories

    def wait_tokens(self, tokens: int, timeout_s: float = 60.0) -> None:
        """Wait until every stream has at least ``tokens`` tokens or has ended. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while any(len(h.output_ids) < tokens and not h.done for h in self.histories):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no {tokens} tokens in {timeout_s:g} s: {[len(h.output_ids) for h in self.histories]}"
                )
            time.sleep(0.005)


def events(reply: http.client.HTTPResponse) -> Generator[dict[str, Any], None, bool]:
    """Yield the JSON objects of a stream of server-sent events; return whether ``[DONE]`` came."""
    done = False
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
        elif line.startswith(b"data: [DONE]"):
            done = True
    return done


def follow(address: str, history: History) -> None:
    """Send ``history.request`` to ``address`` (host:port) as a stream and record what comes."""
    connection = http.client.HTTPConnection(address, timeout=_READ_TIMEOUT_S)
    history.sent_at = time.monotonic()
    try:
        body = json.dumps(history.request | {"stream": True})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            history.error = f"{answer.status} {answer.read().decode(errors='replace')}"
            return
        for message in events(answer):
            history.take(message)
        if history.error is None and history.finish_reason is None:  # http.client raises nothing
            history.error = "the connection ended before the answer did"
        elif history.error is None and history.finish_reason["type"] == "abort":
            history.error = f"aborted: {history.finish_reason}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        history.error = f"{type(error).__name__}: {error}"
    finally:
        history.ended_at = time.monotonic()
        history.done = True
        connection.close()
