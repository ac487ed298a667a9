"""Open-loop load, as SGLang's serving benchmark makes it: Poisson arrivals, mixed lengths, shared prefixes. Pure."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SHARED_PREFIXES = 4
_PREFIX_TOKENS = 48
_PROMPT_TOKENS = (8, 16, 32, 64, 96)
_NEW_TOKENS = (12, 24, 32, 48, 64)


@dataclass(frozen=True)
class Load:
    """A load of random requests. ``rate_per_s``: mean arrivals per second. ``pool``: number of different requests."""

    rate_per_s: float
    pool: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.pool < 1:
            raise ValueError(f"a load needs a rate above 0 and at least one request, got {self}")

    def requests(self) -> list[dict[str, Any]]:
        """Return greedy bodies of ``POST /generate``. Half of the prompts begin with one of a few shared prefixes."""
        rng = random.Random(self.vocab_size)
        ordinary = range(self.vocab_size // 10, self.vocab_size * 9 // 10)  # special tokens are at the ends
        prefixes = [rng.choices(ordinary, k=_PREFIX_TOKENS) for _ in range(SHARED_PREFIXES)]
        made = []
        for number in range(self.pool):
            prefix = prefixes[number // 2 % SHARED_PREFIXES] if number % 2 else []
            prompt = prefix + rng.choices(ordinary, k=_PROMPT_TOKENS[number % len(_PROMPT_TOKENS)])
            new_tokens = _NEW_TOKENS[number // 2 % len(_NEW_TOKENS)]
            sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
            made.append({"input_ids": prompt, "sampling_params": sampling})
        return made

    def arrivals(self, seed: int) -> Iterator[tuple[float, int]]:
        """Yield (seconds since the start, number of the request) without end."""
        rng = random.Random(seed)
        at_s = 0.0
        while True:
            at_s += rng.expovariate(self.rate_per_s)
            yield at_s, rng.randrange(self.pool)


def requested_tokens(request: dict[str, Any]) -> int:
    """Return the number of new tokens that a body of ``POST /generate`` asks for."""
    return int(request["sampling_params"]["max_new_tokens"])
