"""Plans are compared with the best there is: by exhaustion, and by an integer program that knows only the rules."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from plan_models import toy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from anchortp_sglang.planning.intervals import intersect, normalize, total
from anchortp_sglang.planning.ownership.layer_ownership import Layout
from anchortp_sglang.planning.placement.contiguous import contiguous_layouts
from anchortp_sglang.planning.placement.even_spread import evenly_spread
from anchortp_sglang.planning.placement.migration import plan_migration
from anchortp_sglang.planning.placement.migration_types import Strategy
from anchortp_sglang.planning.placement.place import equal_split

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
    exact = {"mip_rel_gap": 0}
    found = milp(-gain, constraints=limits, integrality=np.ones(len(gain)), bounds=Bounds(0, 1), options=exact)
    assert found.success
    return round(-found.fun)


def layouts(ownership: object, layers: int) -> list[Layout]:
    return [ownership.layout(f"{layer}.axis") for layer in range(layers)]  # type: ignore[attr-defined]


def cut_at(cuts: Sequence[Sequence[int]]) -> list[Layout]:
    return [tuple(((start, stop),) for start, stop in pairwise((0, *ends))) for ends in cuts]


def check_rounded(units: int, after: Sequence[Layout]) -> None:
    """One interval each, in order; widths rounded down or up, in each layer and in total."""
    devices, totals = len(after[0]), [0] * len(after[0])
    for layout in after:
        runs = [run for (run,) in layout]
        assert [stop for _, stop in runs] == [*(start for start, _ in runs[1:]), units] and runs[0][0] == 0
        assert all(units // devices <= stop - start <= -(-units // devices) for start, stop in runs)
        totals = [width + stop - start for width, (start, stop) in zip(totals, runs, strict=True)]
    due = len(after) * units
    assert all(due // devices <= width <= -(-due // devices) for width in totals)


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


def changed(rng: random.Random, alive: Sequence[int], devices: int) -> list[int]:
    """One or two devices lost, or one back."""
    away = [d for d in range(devices) if d not in alive]
    if away and (rng.random() < 0.3 or len(alive) == 2):
        return sorted({*alive, rng.choice(away)})
    lost = rng.sample(alive, min(rng.choice((1, 1, 2)), len(alive) - 2))
    return [d for d in alive if d not in lost]


@pytest.mark.parametrize("wide", [False, True], ids=["few units", "many units"])
@pytest.mark.parametrize("strategies", [("contiguous",), ("contiguous", "adopt")], ids=["rotated", "mixed"])
@pytest.mark.parametrize("seed", range(60))
def test_chains_of_losses_and_rejoins_move_the_least_by_integer_program(
    seed: int, strategies: tuple[Strategy, ...], wide: bool
) -> None:
    """Layers that earlier plans cut differently, and left with several runs where they adopted."""
    rng = random.Random(seed)
    devices, layers = rng.randint(3, 7), rng.randint(1, 5)
    units = rng.randint(devices, 3 * devices) + wide * devices * (devices - 2)
    model = toy(layers, [("axis", units, 1)])
    ownership, alive = equal_split(model, range(devices)), list(range(devices))
    for _ in range(4):
        alive = changed(rng, alive, devices)
        before = on(ownership, layers, alive)
        plan = plan_migration(model, ownership, alive)
        assert sum(plan.kept_bytes.values()) == most_kept_by_program(units, [1] * len(alive), before)
        assert plan.reload_bytes == plan.reload_lower_bound_bytes
        ownership = plan_migration(model, ownership, alive, rng.choice(strategies)).new


@pytest.mark.parametrize("seed", range(60))
def test_any_history_and_any_weights_move_the_least_by_integer_program(seed: int) -> None:
    """Not even in the order of the devices; some units are nobody's."""
    rng = random.Random(seed)
    devices, layers = rng.randint(2, 5), rng.randint(1, 4)
    weights = [rng.randint(1, 3) for _ in range(devices)]
    units = rng.randint(sum(weights), 16)
    owners = [[rng.randint(0, devices) for _ in range(units)] for _ in range(layers)]
    before = [
        tuple(normalize((u, u + 1) for u, owner in enumerate(layer) if owner == d) for d in range(devices))
        for layer in owners
    ]
    after = contiguous_layouts(units, weights, before)
    assert kept(before, after) == most_kept_by_program(units, weights, before)


@pytest.mark.parametrize(
    ("units", "layers", "devices", "losses"),
    [
        (8, 28, 8, [(3,), (5,)]),  # KV heads, one device after the other
        (16, 10, 8, [(0, 1)]),  # a cut is due just where its left device's old interval starts, in all layers
        (18, 6, 10, [(0, 1)]),
    ],
)
def test_where_even_spreading_moves_too_much_the_program_moves_the_least(
    units: int, layers: int, devices: int, losses: Sequence[tuple[int, ...]]
) -> None:
    model = toy(layers, [("axis", units, 1)])
    ownership, alive = equal_split(model, range(devices)), list(range(devices))
    for lost in losses:
        alive = [d for d in alive if d not in lost]
        before = on(ownership, layers, alive)
        plan = plan_migration(model, ownership, alive)
        ownership = plan.new
    weights = [1] * len(alive)
    best = most_kept_by_program(units, weights, before)
    assert sum(plan.kept_bytes.values()) == best
    assert kept(before, cut_at(evenly_spread(units, weights, before))) < best


@pytest.mark.parametrize(("devices", "lost", "units"), [(60, 0, 150), (64, 0, 160), (80, 26, 106)])
def test_with_too_many_devices_for_the_program_prices_do_better_than_even_spreading(
    devices: int, lost: int, units: int
) -> None:
    layers = 12
    model = toy(layers, [("axis", units, 1)])
    old = equal_split(model, range(devices))
    left = [d for d in range(devices) if d != lost]
    before, weights = on(old, layers, left), [1] * len(left)
    after = layouts(plan_migration(model, old, left).new, layers)
    check_rounded(units, after)
    assert kept(before, after) > 1.04 * kept(before, cut_at(evenly_spread(units, weights, before)))


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
