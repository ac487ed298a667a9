"""The parts of the search for the best rounding, each against an oracle that knows only what it promises."""

import random
from itertools import combinations, combinations_with_replacement, product

import pytest

from anchortp_sglang.planning.placement import largest_overlap as programs
from anchortp_sglang.planning.placement.even_spread import is_best
from anchortp_sglang.planning.placement.largest_overlap import largest_overlap
from anchortp_sglang.planning.placement.priced_rounding import priced_rounding
from anchortp_sglang.planning.placement.rounding import NEVER, LayerKind, RoundedUp, most_conceivable


def kind(rng: random.Random, devices: int, extra: int, layers: int = 1, barred: float = 0.0) -> LayerKind:
    down, up = (
        tuple(tuple(rng.randint(0, 4) for _ in range(extra + 1)) for _ in range(devices)) for _ in ("down", "up")
    )
    up = tuple((NEVER,) * (extra + 1) if rng.random() < barred else row for row in up)
    return LayerKind(layers, extra, down, up)


@pytest.mark.parametrize("seed", range(40))
def test_the_best_rounding_of_a_layer_is_that_of_all(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.randint(1, 7)
    one = kind(rng, devices, rng.randint(0, devices))
    prices = [rng.randint(-5, 9) for _ in range(devices)]

    def value(rounded_up: RoundedUp) -> int:
        return one.overlap(rounded_up) - sum(prices[device] for device in rounded_up)

    found, rounded_up = one.best(prices)
    assert found == value(rounded_up) == max(map(value, combinations(range(devices), one.extra)))


def totals(choice: list[RoundedUp], devices: int) -> list[int]:
    return [sum(device in rounded_up for rounded_up in choice) for device in range(devices)]


@pytest.mark.parametrize("seed", range(60))
def test_the_program_finds_what_exhaustion_does_within_the_limits(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.randint(2, 4)
    extra = rng.randint(1, devices - 1)
    kinds = [kind(rng, devices, extra, rng.randint(1, 3), barred=0.2) for _ in range(rng.randint(1, 2))]
    layers = sum(each.layers for each in kinds)
    due = layers * extra / devices
    limits = [(rng.randint(0, int(due)), rng.randint(-int(-due), layers)) for _ in range(devices)]
    roundings = list(combinations(range(devices), extra))
    best = -1
    for chosen in product(*(combinations_with_replacement(roundings, each.layers) for each in kinds)):
        every = [rounded_up for one in chosen for rounded_up in one]
        within = all(low <= n <= high for n, (low, high) in zip(totals(every, devices), limits, strict=True))
        if within:
            best = max(best, sum(k.overlap(one) for k, ones in zip(kinds, chosen, strict=True) for one in ones))
    found = largest_overlap(kinds, limits)
    if best < 0:
        assert found is None
        return
    assert found is not None and [len(ones) for ones in found] == [each.layers for each in kinds]
    every = [rounded_up for ones in found for rounded_up in ones]
    assert all(low <= n <= high for n, (low, high) in zip(totals(every, devices), limits, strict=True))
    assert sum(k.overlap(one) for k, ones in zip(kinds, found, strict=True) for one in ones) == best
    assert best <= most_conceivable(kinds)


def test_a_program_that_is_too_large_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [kind(random.Random(1), 4, 2, 3)]
    assert largest_overlap(kinds, [(0, 3)] * 4)
    monkeypatch.setattr(programs, "MOST_STEPS", 5)
    assert largest_overlap(kinds, [(0, 3)] * 4) is None


@pytest.mark.parametrize("seed", range(40))
def test_a_priced_rounding_has_the_totals_that_are_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    devices, count = rng.randint(2, 9), rng.randint(1, 9)
    extra = rng.randint(1, devices - 1)
    layers = [kind(rng, devices, extra) for _ in range(count)]
    asked = [device for _ in layers for device in rng.sample(range(devices), extra)]
    wanted = [asked.count(device) for device in range(devices)]
    chosen = priced_rounding(layers, wanted)
    assert all(len(rounded_up) == extra for rounded_up in chosen)
    assert totals(chosen, devices) == wanted


def test_an_even_spread_is_best_where_no_cut_gains_again_after_it_lost() -> None:
    old = (((0, 4),), ((4, 8),), ((8, 12),))
    assert is_best((4, 4, 4), 0, old)
    assert is_best((3, 3, 3), 3, old)
    assert is_best((6, 6), 1, (((0, 4),), ((8, 12),)))  # the one between them is lost
    assert not is_best((2, 2, 2), 2, (((0, 2),), ((5, 6),), ((4, 5),)))
