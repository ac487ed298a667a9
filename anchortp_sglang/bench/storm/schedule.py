"""The schedule of a storm: which faults strike, how and when, drawn from a seed alone. Pure."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# kill: SIGKILL; crash: SIGSEGV; stop: SIGSTOP for good; pause: SIGSTOP, and SIGCONT after a while.
_EVERY = ("kill", "crash", "stop", "pause")
TARGETS = {
    "rank": (6, _EVERY),
    "two-ranks": (2, _EVERY),
    "all-ranks": (1, _EVERY),
    "device": (1, ("kill", "crash")),  # a rank and its anchor: the memory is gone
    "anchor": (1, _EVERY),
    "host-anchor": (1, _EVERY),
    "detokenizer": (1, _EVERY),
    "zygote": (1, _EVERY),
    "reserve": (1, _EVERY),
    "spare": (1, _EVERY),
    "standby": (1, _EVERY),
    "devices": (4, ("change",)),  # no fault, but a request for other devices; the next blow may come in its middle
}
"""Targets: (number of cards in the deck for each manner, manners)."""

KINDS = tuple(f"{target}:{manner}" for target, (_, manners) in TARGETS.items() for manner in manners)

_SECOND_BLOW = 0.35
_THIRD_BLOW = 0.3
_LONGEST_DELAY_S = 0.5
"""About the time of a recovery, so that a later blow hits any of its stages."""
_REST_S = (0.0, 0.5, 3.0)
"""Longest rests: before spares are forked (a second after a recovery), while they warm up, and when all stand by."""
_PAUSE_S = (0.1, 6.0)


@dataclass(frozen=True)
class Blow:
    """One fault. ``after_s``: since the blow before it. ``draw``, in [0, 1), chooses the victim."""

    kind: str
    after_s: float
    draw: float
    pause_s: float = 0.0

    @property
    def target(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def manner(self) -> str:
        return self.kind.partition(":")[2]


@dataclass(frozen=True)
class Burst:
    """Blows that do not wait for each other's recovery. They begin ``rest_s`` after clients are served again."""

    number: int
    rest_s: float
    blows: tuple[Blow, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Burst":
        """Read what ``to_json`` returned. Raises ValueError, KeyError or TypeError for anything else."""
        blows = tuple(Blow(**blow) for blow in fields["blows"])
        if unknown := [blow.kind for blow in blows if blow.kind not in KINDS]:
            raise ValueError(f"unknown kinds of faults: {', '.join(unknown)}")
        return cls(fields["number"], fields["rest_s"], blows)


def match_kinds(patterns: str) -> tuple[str, ...]:
    """Return the kinds named by a comma list of targets (``rank``), manners (``:kill``) or both (``rank:kill``).

    Raises ValueError for a word that matches none.
    """
    found = []
    for pattern in patterns.split(","):
        matching = [kind for kind in KINDS if _matches(kind, pattern.strip())]
        if not matching:
            raise ValueError(f"{pattern!r} is no kind of fault; kinds are {', '.join(KINDS)}")
        found += matching
    return tuple(kind for kind in KINDS if kind in found)


def _matches(kind: str, pattern: str) -> bool:
    target, colon, manner = kind.partition(":")
    return pattern in ("all", kind, target, colon + manner)


def bursts(seed: int, faults: int, kinds: Sequence[str] = KINDS) -> Iterator[Burst]:
    """Yield bursts with ``faults`` blows in all. Kinds are dealt from a shuffled deck, so none is left out for long."""
    rng = random.Random(seed)
    deck = _dealt(rng, kinds)
    number = 0
    while faults > 0:
        size = min(faults, 1 + (rng.random() < _SECOND_BLOW) * (1 + (rng.random() < _THIRD_BLOW)))
        yield Burst(number, round(rng.choice(_REST_S) * rng.random(), 3), tuple(_burst(rng, deck, size)))
        faults -= size
        number += 1


def _burst(rng: random.Random, deck: Iterator[str], size: int) -> Iterator[Blow]:
    for place in range(size):
        at_once = place > 0 and rng.random() < 0.3
        after_s = 0.0 if at_once else rng.uniform(0, _LONGEST_DELAY_S)
        kind = next(deck)
        pause_s = rng.uniform(*_PAUSE_S) if kind.endswith(":pause") else 0.0
        yield Blow(kind, round(after_s, 3), rng.randrange(1000) / 1000, round(pause_s, 3))


def _dealt(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    cards = [kind for kind in kinds for _ in range(TARGETS[kind.partition(":")[0]][0])]
    while True:
        yield from rng.sample(cards, len(cards))
