"""Plans are compared with the best there is: by exhaustion, and by an integer program that knows only the rules."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from plan_models import toy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from anchortp_sglang.planning.intervals import intersect, total
from anchortp_sglang.planning.layer_ownership import Layout
from anchortp_sglang.planning.migration import plan_migration
from anchortp_sglang.planning.placement import equal_split

Rows = list[tuple[dict[int, int], float, float]]


def kept(before: Sequence[Layout], after: Sequence[Layout]) -> int:
    pairs = zip(before, after, strict=True)
    return sum(total(intersect(a, b)) for old, new in pairs for a, b in zip(old, new, strict=True))


def most_kept_by_exhaustion(units: int, before: Sequence[Layout]) -> int:
    """Over all contiguous cuts with widths rounded down or up, in each layer and in total."""
    layers, devices = len(before), len(before[0])

    def rounded(widths: Sequence[int], due: int) -> bool:
        return all(due // devices <= width <= -(-due // devices) for width in widths)

    def cuts() -> Iterator[tuple[tuple[int, ...], Layout]]:
        for inner in combinations(range(1, units), devices - 1):
            runs = list(pairwise((0, *inner, units)))
            if rounded(widths := tuple(b - a for a, b in runs), units):
                yield widths, tuple((run,) for run in runs)

    return max(
        kept(before, [layout for _, layout in choice])
        for choice in product(list(cuts()), repeat=layers)
        if rounded([sum(widths[d] for widths, _ in choice) for d in range(devices)], layers * units)
    )


def most_kept_by_program(units: int, weights: Sequence[int], before: Sequence[Layout], contiguous: bool = True) -> int:
    """The same as an integer program: x[l, u, d] = unit u of layer l goes to device d."""
    layers, devices, parts = len(before), len(weights), sum(weights)

    def x(layer: int, unit: int, device: int) -> int:
        return (layer * units + unit) * devices + device

    gain = np.zeros(layers * units * devices)
    for layer, device in product(range(layers), range(devices)):
        for start, stop in before[layer][device]:
            gain[[x(layer, unit, device) for unit in range(start, stop)]] = 1
    rows: Rows = []
    for layer in range(layers):
        rows += [({x(layer, u, d): 1 for d in range(devices)}, 1, 1) for u in range(units)]
        for device, weight in enumerate(weights):
            rows.append(
                ({x(layer, u, device): 1 for u in range(units)}, units * weight // parts, -(-units * weight // parts))
            )
        for unit, device in product(range(units - 1), range(devices - 1)) if contiguous else ():
            upto = {x(layer, unit, d): 1 for d in range(device + 1)}
            rows.append((upto | {x(layer, unit + 1, d): -1 for d in range(device + 1)}, 0, np.inf))
    for device, weight in enumerate(weights):
        every = {x(layer, u, device): 1 for layer in range(layers) for u in range(units)}
        due = layers * units * weight
        rows.append((every, due // parts, -(-due // parts)))
    return solve(gain, rows)


def solve(gain: np.ndarray, rows: Rows) -> int:
    matrix = lil_matrix((len(rows), len(gain)))
    for index, (coefficients, _, _) in enumerate(rows):
        for column, value in coefficients.items():
            matrix[index, column] = value
    limits = LinearConstraint(matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows])
    found = milp(-gain, constraints=limits, integrality=np.ones(len(gain)), bounds=Bounds(0, 1))
    assert found.success
    return round(-found.fun)


def layouts(ownership: object, layers: int) -> list[Layout]:
    return [ownership.layout(f"{layer}.axis") for layer in range(layers)]  # type: ignore[attr-defined]


def on(ownership: object, layers: int, devices: Sequence[int]) -> list[Layout]:
    """What each of ``devices`` holds, layer by layer."""
    return [tuple(ownership.of(f"{layer}.axis", d) for d in devices) for layer in range(layers)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("devices", [3, 4, 5])
@pytest.mark.parametrize("units", [5, 7, 8])
@pytest.mark.parametrize("layers", [1, 2])
def test_one_loss_moves_the_least_by_exhaustion(devices: int, units: int, layers: int) -> None:
    model = toy(layers, [("axis", units, 1)])
    for lost in range(devices):
        old = equal_split(model, range(devices))
        left = [d for d in range(devices) if d != lost]
        plan = plan_migration(model, old, left)
        best = most_kept_by_exhaustion(units, on(old, layers, left))
        assert sum(plan.kept_bytes.values()) == best
        assert plan.reload_bytes == plan.reload_lower_bound_bytes
        assert plan.p2p_bytes == layers * units - best - plan.reload_bytes


@pytest.mark.parametrize("seed", range(60))
def test_losses_and_rejoins_move_the_least_by_integer_program(seed: int) -> None:
    """Starting wherever units divide or there are several per device and layer, chains of changes stay optimal."""
    rng = random.Random(seed)
    devices, layers = rng.randint(3, 6), rng.randint(1, 4)
    units = rng.randint(devices * devices, devices * devices + 12)
    model = toy(layers, [("axis", units, 1)])
    ownership, alive = equal_split(model, range(devices)), list(range(devices))
    for _ in range(3):
        away = [d for d in range(devices) if d not in alive]
        back = bool(away) and (rng.random() < 0.4 or len(alive) == 2)
        alive = sorted({*alive, rng.choice(away)}) if back else sorted({*alive} - {rng.choice(alive)})
        plan = plan_migration(model, ownership, alive)
        before = on(ownership, layers, alive)
        assert sum(plan.kept_bytes.values()) == most_kept_by_program(units, [1] * len(alive), before)
        assert plan.reload_bytes == plan.reload_lower_bound_bytes
        ownership = plan.new


@pytest.mark.parametrize("seed", range(40))
def test_a_single_layer_is_optimal_with_any_weights_and_any_history(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.randint(2, 6)
    weights = [rng.randint(1, 3) for _ in range(devices)]
    units = rng.randint(sum(weights), 24)
    model = toy(1, [("axis", units, 1)])
    old = equal_split(model, range(devices + 1))
    chosen = sorted(rng.sample(range(devices + 2), devices))
    plan = plan_migration(model, old, chosen, weights=dict(zip(chosen, weights, strict=True)))
    assert sum(plan.kept_bytes.values()) == most_kept_by_program(units, weights, on(old, 1, chosen))


@pytest.mark.parametrize("seed", range(40))
def test_equal_shares_of_alike_layers_lose_a_device_optimally_however_narrow(seed: int) -> None:
    rng = random.Random(seed)
    devices, layers = rng.randint(3, 7), rng.randint(1, 5)
    model = toy(layers, [("axis", units := devices * rng.randint(1, 3), 1)])
    old = equal_split(model, range(devices))
    left = [d for d in range(devices) if d != seed % devices]
    plan = plan_migration(model, old, left)
    assert sum(plan.kept_bytes.values()) == most_kept_by_program(units, [1] * len(left), on(old, layers, left))


@pytest.mark.parametrize("seed", range(40))
def test_a_rejoin_gives_back_the_least_that_restores_balance(seed: int) -> None:
    rng = random.Random(seed)
    devices, layers = rng.randint(3, 5), rng.randint(1, 4)
    units = rng.randint(2 * devices, 4 * devices)
    model = toy(layers, [("axis", units, 1)])
    lost = rng.randrange(devices)
    old = equal_split(model, range(devices))
    reduced = plan_migration(model, old, [d for d in range(devices) if d != lost], "adopt").new
    plan = plan_migration(model, reduced, range(devices), "adopt")
    before = on(reduced, layers, range(devices))
    assert sum(plan.kept_bytes.values()) == most_kept_by_program(units, [1] * devices, before, contiguous=False)
    assert plan.reload_bytes == 0


@pytest.mark.parametrize(("lost", "fraction"), [(3, 9), (4, 9), (0, 21), (7, 21)])
def test_eight_to_seven_equal_shards_move_9_or_21_of_56(lost: int, fraction: int) -> None:
    model = toy(3, [("axis", 56 * 4, 10)])
    plan = plan_migration(model, equal_split(model, range(8)), [d for d in range(8) if d != lost])
    assert plan.p2p_bytes * 56 == fraction * plan.sharded_bytes
    assert plan.reload_bytes * 8 == plan.sharded_bytes
