"""A storm's clients: threads that send requests one after the other, each in its own seeded order, and record them."""

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from anchortp_sglang.bench.storm.judge import Answer
from anchortp_sglang.bench.storm.requests import Request
from anchortp_sglang.testing.streams import events

_REFERENCE_CLIENTS = 16
_POLL_S = 0.3
_REFUSED_S = 1.0
_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Exchange:
    """One request of one client, and the answer. ``number``: index of the request. Times are time.monotonic()."""

    number: int
    sent_at: float
    answer: Answer = field(default_factory=Answer)
    ended_at: float | None = None
    last_at: float = 0.0

    @property
    def latency_s(self) -> float:
        return (self.ended_at or time.monotonic()) - self.sent_at


class Clients:
    """A storm's ``count`` clients, and one that polls the routes ``polled``, while the block runs.

    Leaving the block waits for open requests.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[Request],
        seed: int,
        count: int,
        polled: Sequence[str],
        timeout_s: float,
        poll_timeout_s: float,
    ) -> None:
        self._url, self._requests, self._polled = url, requests, polled
        self._timeout_s, self._poll_timeout_s = timeout_s, poll_timeout_s
        self.exchanges: list[Exchange] = []
        self.polls_failed: list[str] = []
        self.polls = 0
        self._stopping = threading.Event()
        rngs = [random.Random(f"{seed} {number}") for number in range(count)]
        self._threads = [threading.Thread(target=self._run_client, args=(rng,), daemon=True) for rng in rngs]
        self._threads.append(threading.Thread(target=self._poll, daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        deadline = time.monotonic() + self._timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def open_streams(self) -> int:
        """Count the open streams that have begun to receive."""
        return sum(each.ended_at is None and each.last_at > 0 for each in self.exchanges)

    def last_token_at(self) -> float:
        return max((each.last_at for each in self.exchanges), default=0.0)

    def longest_wait_s(self) -> float:
        """Return how long the oldest open request has waited."""
        return max((each.latency_s for each in self.exchanges if each.ended_at is None), default=0.0)

    def _run_client(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            number = rng.randrange(len(self._requests))
            exchange = Exchange(number, time.monotonic())
            self.exchanges.append(exchange)
            rid = f"storm-{rng.getrandbits(64):x}"
            send(self._url, self._requests[number], exchange, rid, rng.randint(1, 8), self._timeout_s)
            if exchange.answer.code in (0, 503):
                self._stopping.wait(_REFUSED_S)  # no connection, or the server is down

    def _poll(self) -> None:
        while not self._stopping.wait(_POLL_S):
            path = self._polled[self.polls % len(self._polled)]
            self.polls += 1
            code, why = call(self._url, "GET", path, None, self._poll_timeout_s)
            if code != 200:
                self.polls_failed.append(f"{path}: {code} {why}")


def read_whole(request: Request) -> Request:
    """Return the same request, with a client that reads to the end."""
    return replace(request, way="whole")


def send_all(url: str, requests: Sequence[Request], timeout_s: float) -> list[Answer]:
    """Return the answers to all requests, read to the end by a few clients at once."""

    def one(number: int) -> Answer:
        exchange = Exchange(number, time.monotonic())
        send(url, read_whole(requests[number]), exchange, "", 0, timeout_s)
        return exchange.answer

    with ThreadPoolExecutor(_REFERENCE_CLIENTS) as pool:
        return list(pool.map(one, range(len(requests))))


def send(url: str, request: Request, exchange: Exchange, rid: str, messages: int, timeout_s: float) -> None:
    """Send one request and record its answer. ``messages``: after how many a client leaves or aborts."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    answer = exchange.answer
    body = request.body | ({"rid": rid} if request.way == "abort" else {})
    try:
        connection.request("POST", request.path, json.dumps(body), _HEADERS)
        reply = connection.getresponse()
        answer.code = reply.status
        if reply.status != 200:
            answer.error = reply.read().decode(errors="replace")[:500]
            return
        for count, message in enumerate(_messages(reply, request.streams, answer), 1):
            answer.take(message)
            exchange.last_at = time.monotonic()
            if count == messages and request.way == "leave":
                return
            if count == messages and request.way == "abort":
                call(url, "POST", "/abort_request", {"rid": rid}, timeout_s)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        exchange.ended_at = time.monotonic()
        connection.close()


def _messages(reply: http.client.HTTPResponse, streams: bool, answer: Answer) -> Iterator[dict[str, Any]]:
    if not streams:
        body = json.loads(reply.read())
        for number, message in enumerate(body if isinstance(body, list) else [body]):
            yield message | {"index": number}
        answer.ended = True
    else:
        answer.ended = yield from events(reply)


def call(url: str, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, str]:
    """Send one short request. Return (HTTP status or 0, the body or error if it is not 200)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), _HEADERS)
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, "" if reply.status == 200 else text.decode(errors="replace")[:200]
    except (OSError, http.client.HTTPException) as error:
        return 0, f"{type(error).__name__}: {error}"
    finally:
        connection.close()
