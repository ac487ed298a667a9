"""Open-loop clients: they arrive whether or not the server keeps up, each with its own stream."""

import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from anchortp_sglang.bench.load import requested_tokens
from anchortp_sglang.testing.streams import History, follow

_STILL_TO_COME = 20
"""Tokens that a stream still lacks to be in the middle; fewer may already be in flight."""


class OpenLoop:
    """Clients that send ``requests[number]`` at each arrival, from entering the block until ``stop``.

    Leaving the block waits for all streams. ``histories``: (number of the request, what its client saw), in the order
    of arrival.
    """

    def __init__(self, url: str, requests: Sequence[dict[str, Any]], arrivals: Iterator[tuple[float, int]]) -> None:
        self._address = urlsplit(url).netloc
        self._requests = requests
        self._arrivals = arrivals
        self._ended = threading.Event()
        self._clients: list[threading.Thread] = []
        self._dispatcher = threading.Thread(target=self._dispatch, daemon=True)
        self.histories: list[tuple[int, History]] = []
        self.began = 0.0

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self._dispatcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            for client in self._clients:
                client.join()

    def stop(self) -> None:
        """End the arrivals; open streams go on."""
        self._ended.set()
        self._dispatcher.join()

    def being_served(self) -> bool:
        """Return whether a client is in the middle of its stream: it has a quarter of its tokens and lacks many."""
        return any(
            len(history.output_ids) >= requested_tokens(history.request) / 4
            and requested_tokens(history.request) - len(history.output_ids) >= _STILL_TO_COME
            for _, history in list(self.histories)
            if not history.done
        )

    def first_token_after(self, moment: float) -> float | None:
        """Return when a client first got a token after ``moment`` (both time.monotonic()), or None."""
        times = [at for _, history in list(self.histories) for at, _ in history.arrivals[-200:] if at > moment]
        return min(times, default=None)

    def _dispatch(self) -> None:
        for at_s, number in self._arrivals:
            if self._ended.wait(max(0.0, self.began + at_s - time.monotonic())):
                return
            history = History(self._requests[number])
            client = threading.Thread(target=follow, args=(self._address, history), daemon=True)
            self.histories.append((number, history))
            self._clients.append(client)
            client.start()
