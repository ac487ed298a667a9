"""Kills ranks of a server in the background, and takes one device from it, for as long as other tests run."""

import random
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

from faults import kill_rank, lose_device, recovered

from anchortp_sglang.testing.server import Server

Kind = Literal["process", "device"]
LOSS_AT = 4
"""Which of the faults, from 0, is the loss of a device. It does not come back, so what follows runs without it."""


class RankKills:
    """A fault every ``least_s`` to ``most_s`` seconds, the first at once; each is seen to take effect and to be
    recovered from before the next. A fault that did not is raised by ``check``."""

    def __init__(self, server: Server, seed: int, least_s: float = 3.0, most_s: float = 5.0) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._pause_s = lambda: self._random.uniform(least_s, most_s)
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rank kills")
        self._first_generation = 0
        self.records: list[dict[str, Any]] = []

    @property
    def kinds(self) -> Sequence[Kind]:
        return [record["cause"] for record in self.records]

    def __enter__(self) -> Self:
        self._first_generation = self._server.status()["generation"]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.check()
        status = self._server.wait_serving(0)
        assert status["generation"] == self._first_generation + len(self.records), "a fault of which nobody knows"
        assert status["tp_size"] == len(status["devices"]) - self.kinds.count("device")

    def check(self) -> None:
        """Raise what has ended it early."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                self.records.append(self._strike())
                if self._ended.wait(self._pause_s()):
                    return
        except BaseException as error:  # raised where the tests look
            self._error = error

    def _strike(self) -> dict[str, Any]:
        status = self._server.wait_serving(0)
        serving = [device for device in status["devices"] if device["rank"] is not None]
        victim = self._random.choice(serving)
        if len(self.records) == LOSS_AT:
            return recovered(self._server, lose_device(self._server, victim["id"]), "device")
        return recovered(self._server, kill_rank(self._server, victim["rank"]), "process")
