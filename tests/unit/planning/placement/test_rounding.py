"""The parts of the search for the best rounding, each against an oracle that knows only what it promises."""

import random
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import linprog

from anchortp_sglang.planning.placement.priced_rounding import priced_rounding
from anchortp_sglang.planning.placement.rounding import LayerKind
from anchortp_sglang.planning.placement.simplex import Simplex


def kind(rng: random.Random, devices: int, extra: int, layers: int = 1) -> LayerKind:
    down, up = (
        tuple(tuple(rng.randint(0, 4) for _ in range(extra + 1)) for _ in range(devices)) for _ in ("down", "up")
    )
    return LayerKind(0, layers, extra, down, up)


@pytest.mark.parametrize("seed", range(40))
def test_the_best_rounding_of_a_layer_is_that_of_all(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.randint(1, 7)
    one = kind(rng, devices, rng.randint(0, devices))
    prices, scale = [rng.randint(-5, 9) for _ in range(devices)], rng.randint(1, 3)

    def value(rounded_up: tuple[int, ...]) -> int:
        return scale * one.kept(rounded_up) - sum(prices[device] for device in rounded_up)

    found, rounded_up = one.best(prices, scale)
    assert found == value(rounded_up) == max(map(value, combinations(range(devices), one.extra)))


@pytest.mark.parametrize("seed", range(40))
def test_the_parts_of_a_kind_allow_just_the_roundings_that_take_a_step_or_do_not(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.randint(2, 6)
    whole = kind(rng, devices, rng.randint(1, devices - 1), layers=5)
    roundings = list(combinations(range(devices), whole.extra))
    step = rng.choice(whole.steps(rng.choice(roundings)))
    for taken in (True, False):
        part, rest = whole.part(step, 3, taken)
        assert (part.layers, rest.layers) == (3, 2)
        for rounded_up in roundings:
            allowed = (step in whole.steps(rounded_up)) == taken
            assert part.kept(rounded_up) == whole.kept(rounded_up) if allowed else part.kept(rounded_up) < 0
            assert rest.kept(rounded_up) == whole.kept(rounded_up)


@pytest.mark.parametrize("seed", range(40))
def test_columns_that_enter_while_they_are_worth_it_solve_the_linear_program(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(2, 7)
    columns = [tuple(rng.sample(range(size), rng.randint(1, size))) for _ in range(4 * size)]
    gains = [rng.randint(0, 9) for _ in columns]
    matrix = np.array([[float(row in rows) for rows in columns] for row in range(size)])
    sums = [int(total) for total in matrix @ [rng.randint(0, 3) for _ in columns]]
    simplex = Simplex[int](sums)
    while True:
        worth, entering = max((simplex.worth(rows, gains[index]), index) for index, rows in enumerate(columns))
        if worth <= 0:
            break
        simplex.enter(entering, columns[entering], gains[entering])
    amounts = dict(simplex.amounts())
    assert [sum(n for index, n in amounts.items() if row in columns[index]) for row in range(size)] == [
        simplex.scale * total for total in sums
    ]
    best = linprog([-gain for gain in gains], A_eq=matrix, b_eq=sums)
    assert sum(gains[index] * n for index, n in amounts.items()) == pytest.approx(-best.fun * simplex.scale)


@pytest.mark.parametrize("seed", range(40))
def test_a_priced_rounding_has_the_totals_that_are_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    devices, count = rng.randint(2, 9), rng.randint(1, 9)
    extra = rng.randint(1, devices - 1)
    layers = [kind(rng, devices, extra) for _ in range(count)]
    asked = [device for _ in layers for device in rng.sample(range(devices), extra)]
    totals = [asked.count(device) for device in range(devices)]
    chosen = priced_rounding(layers, totals)
    assert all(len(rounded_up) == extra for rounded_up in chosen)
    assert [sum(device in rounded_up for rounded_up in chosen) for device in range(devices)] == totals
