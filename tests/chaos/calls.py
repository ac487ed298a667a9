"""Calls of any API, many at once, and their answers reduced to what must not depend on a fault."""

import base64
import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from anchortp_sglang.testing.server import Server

_TIMEOUT_S = 120.0
_TEXTS = ("content", "text", "thinking", "reasoning_content", "delta", "response", "partial_json")
_LASTS = ("finish_reason", "stop_reason", "matched_stop", "done_reason", "usage", "status", "eval_count", "error")
_CHANGING = {
    *("id", "created", "created_at", "e2e_latency", "response_sent_to_client_ts", "total_duration", "item_id"),
    *("cached_tokens", "cached_tokens_details", "previous_response_id"),
}
"""Keys whose values no two runs have in common. How many tokens were cached depends on what was asked before."""

Ask = Callable[[Server], Any]


def post(path: str, body: Mapping[str, Any]) -> Ask:
    """A call of ``path`` that returns the answer; a stream's, folded into one."""

    def ask(server: Server) -> Any:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            read = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, f"{answer.status}: {read[:500]}"
        if "json" in answer.headers["content-type"] and "ndjson" not in answer.headers["content-type"]:
            return json.loads(read)
        lines = [line.removeprefix("data: ") for line in read.splitlines()]
        messages = [line for line in lines if line.startswith("{")]
        assert messages, "the stream is empty"
        # The messages of /generate have all tokens so far.
        return json.loads(messages[-1]) if path == "/generate" else folded(map(json.loads, messages))

    return ask


def folded(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join a stream of pieces: texts and lists joined, and the last word on the rest."""
    joined: dict[str, Any] = {}
    for event in events:
        _fold(event, event.get("type", ""), joined)
    return joined


def _fold(value: Any, path: str, joined: dict[str, Any]) -> None:
    if isinstance(value, list):
        for one in value:
            _fold(one, path, joined)
    if not isinstance(value, dict):
        return
    path += f"[{value['index']}]" if "index" in value else ""
    for name, part in value.items():
        key = f"{path}.{name}"
        if name in _TEXTS and isinstance(part, str):
            joined[key] = joined.get(key, "") + part
        elif name in _LASTS and part is not None:
            joined[key] = part
        elif name == "logprobs" and isinstance(part, dict):
            for which, each in part.items():
                joined.setdefault(f"{key}.{which}", []).extend(each or ())
        else:
            _fold(part, key, joined)


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two answers differ, beyond what changes from run to run and 1e-4 in numbers; None if nowhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(one.keys() ^ other.keys())}"
        pairs = [(f"{where}.{k}", _read(k, one[k]), _read(k, other[k])) for k in one if k not in _CHANGING]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where}: {len(one)} items, {len(other)}"
        pairs = [(f"{where}[{n}]", a, b) for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float):
        return None if math.isclose(one, other, rel_tol=0, abs_tol=1e-4) else f"{where}: {one}, {other}"
    else:
        return None if one == other else f"{where}: {one!r}, {other!r}"
    return next((found for place, a, b in pairs if (found := difference(a, b, place)) is not None), None)


def _read(name: str, value: Any) -> Any:
    return list(memoryview(base64.b64decode(value)).cast("f")) if name.endswith("val_flat_b64") else value


@dataclass
class AtOnce:
    """Every call in a thread of its own. Entering the block starts them; leaving it waits for all answers."""

    server: Server
    calls: Mapping[str, Ask]
    given: dict[str, Any] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "AtOnce":
        self._threads = [threading.Thread(target=self._ask, args=one, daemon=True) for one in self.calls.items()]
        for thread in self._threads:
            thread.start()
        return self

    def _ask(self, name: str, ask: Ask) -> None:
        try:
            self.given[name] = ask(self.server)
        except Exception as error:  # whatever a client raises is what its user would see
            self.given[name] = error

    def __exit__(self, *error: object) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if error[0] is None:
            assert self.given.keys() == self.calls.keys(), f"no answer: {self.calls.keys() - self.given.keys()}"


def assert_same(expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """No error, and each call's answer as expected."""
    failed = {name: answer for name, answer in got.items() if isinstance(answer, Exception)}
    assert not failed, failed
    found = {name: difference(answer, got[name]) for name, answer in expected.items()}
    assert not any(found.values()), {name: where for name, where in found.items() if where}
