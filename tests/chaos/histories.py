"""What clients were given, compared with what an unbroken run of the same requests gives."""

import json
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import History, Streams

VOCABULARY = 480  # of the tiny checkpoint, without its special tokens
_USAGE = ("prompt_tokens", "completion_tokens", "finish_reason")


@dataclass(frozen=True)
class Outcome:
    """All that must not depend on faults. ``usage``: what the server counted, and why it stopped."""

    output_ids: tuple[int, ...]
    text: str
    usage: tuple[Any, ...]
    error: str | None


def outcome(history: History) -> Outcome:
    assert history.done, "the stream has not ended"
    usage = tuple(json.dumps(history.meta.get(name)) for name in _USAGE)
    return Outcome(tuple(history.output_ids), history.text, usage, history.error)


def outcomes(histories: Sequence[History]) -> list[Outcome]:
    return [outcome(history) for history in histories]


def assert_identical(expected: Sequence[Outcome], got: Sequence[Outcome]) -> None:
    """No error; the same tokens, text and usage, stream by stream."""
    assert len(expected) == len(got)
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        assert other.error is None, f"stream {number}: {other.error}"
        assert other == one, f"stream {number} differs from token {_first_difference(one, other)} on"


def _first_difference(one: Outcome, other: Outcome) -> int:
    pairs = zip(one.output_ids, other.output_ids, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.output_ids), len(other.output_ids)))


def assert_exactly_once(history: History) -> None:
    """Tokens arrived in order, none twice, and the server's count is what was received."""
    counts = [tokens for _, tokens in history.arrivals]
    assert counts == sorted(set(counts))
    assert history.meta["completion_tokens"] == len(history.output_ids)


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def request(input_ids: list[Any], tokens: int, **sampling: Any) -> dict[str, Any]:
    """A greedy /generate request that stops after ``tokens`` tokens, unless ``sampling`` says otherwise."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | sampling
    return {"input_ids": input_ids, "sampling_params": params}


def ask_at_once(server: Server, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, Any]]:
    """The answers to ``prompts``, sent as one batch without streaming."""
    answers: Any = server.post("/generate", request(list(prompts), tokens))
    return list(answers)


class Unbroken:
    """What a server answers when nothing happens to it; each request is asked once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._answers: dict[str, Outcome] = {}

    def __call__(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """The outcomes of ``requests``, run together. Leaves an empty prefix cache behind, so that the run to
        compare does not find its prompts there."""
        keys = [json.dumps({k: v for k, v in request.items() if k != "rid"}, sort_keys=True) for request in requests]
        missing = [(key, request) for key, request in zip(keys, requests, strict=True) if key not in self._answers]
        if missing:
            generation = self._server.status()["generation"]
            flush(self._server)
            with Streams(self._server.url, [request for _, request in missing]) as streams:
                histories = streams.wait(120)
            assert self._server.status()["generation"] == generation, "the unbroken run was broken"
            for (key, _), history in zip(missing, histories, strict=True):
                assert history.error is None, history.error
                assert_exactly_once(history)
                self._answers[key] = outcome(history)
        flush(self._server)
        return [self._answers[key] for key in keys]


def flush(server: Server) -> None:
    """Empty the prefix cache. The server waits until no request is left, as it must; 400 if one stays."""
    with urllib.request.urlopen(f"{server.url}/flush_cache?timeout=30", timeout=60) as answer:
        assert answer.status == 200


def until(
    condition: Callable[[], Any],
    failure: str | Callable[[], str],
    timeout_s: float = 30.0,
    poll_s: float = 0.005,
) -> Any:
    """Wait until ``condition()`` is true; its value. ``failure`` says what did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{failure if isinstance(failure, str) else failure()} within {timeout_s:g} s")
        time.sleep(poll_s)
    return value


def stands_still(streams: Streams, seconds: float = 0.5) -> bool:
    """Whether no stream gets a token for so long."""
    before = [len(history.output_ids) for history in streams.histories]
    time.sleep(seconds)
    return [len(history.output_ids) for history in streams.histories] == before
