"""A storm's log: JSON lines of its schedule, by which it can be replayed, and of all that happened."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.bench.storm.requests import Request, make_requests
from anchortp_sglang.bench.storm.schedule import Burst, bursts, match_kinds


@dataclass(frozen=True)
class Schedule:
    """A storm's schedule, on which all its choices depend. ``requests``: the kinds of requests, all if empty.

    ``overlap``: whether servers use SGLang's overlap schedule.
    """

    seed: int
    tp_size: int
    clients: int
    requests: tuple[str, ...]
    bursts: tuple[Burst, ...]
    overlap: bool = False

    def make_requests(self, vocab_size: int) -> list[Request]:
        """Make the requests of the schedule's kinds."""
        made = make_requests(self.seed, vocab_size)
        return [request for request in made if not self.requests or request.kind in self.requests]

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "tp_size": self.tp_size,
            "clients": self.clients,
            "requests": list(self.requests),
            "bursts": [burst.to_json() for burst in self.bursts],
            "overlap": self.overlap,
        }


def draw(
    seed: int, faults: int, kinds: str, requests: str, tp_size: int, clients: int, overlap: bool = False
) -> Schedule:
    """Draw the schedule of a seed. Raises ValueError for unknown kinds."""
    request_kinds = () if requests == "all" else tuple(requests.split(","))
    known = {request.kind for request in make_requests(seed, 2048)}
    if unknown := [kind for kind in request_kinds if kind not in known]:
        raise ValueError(f"{unknown[0]!r} is no kind of request; kinds are {', '.join(sorted(known))}")
    return Schedule(seed, tp_size, clients, request_kinds, tuple(bursts(seed, faults, match_kinds(kinds))), overlap)


def read(path: Path) -> Schedule:
    """Read the schedule at the head of a log. Raises ValueError if it has none."""
    try:
        head = json.loads(path.read_text().partition("\n")[0])
        read_bursts = tuple(Burst.from_json(burst) for burst in head["bursts"])
        return Schedule(
            head["seed"], head["tp_size"], head["clients"], tuple(head["requests"]), read_bursts, head["overlap"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no log of a storm: {error}") from error


class Writer:
    """A log's writer: keeps the lines, and appends each to ``path`` at once, if given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[str] = []
        if path is not None:
            path.write_text("")

    def write(self, line: dict[str, Any]) -> None:
        self._lines.append(json.dumps(line))
        if self._path is not None:
            with self._path.open("a") as log:
                log.write(self._lines[-1] + "\n")

    def text(self) -> str:
        return "\n".join(self._lines)
