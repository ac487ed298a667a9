"""Finds the rounding by which most units are kept over all layers, by an integer program.

The roundings of a layer are the paths through a graph: from device to device, by the number of devices rounded up
before. Layers that are alike are a flow along such paths; the number of layers in which a device is rounded up is
bounded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anchortp_sglang.planning.placement.rounding import LayerKind, RoundedUp

MOST_STEPS = 3000
"""Most variables of a program: up to fifty devices with layers that were cut alike, or eight with a hundred layers that
were all cut differently."""

MOST_NODES = 200
"""Most branches tried before the best answer so far is taken. Few programs need more than one."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Layers of the kind ``kind`` in which ``device`` is rounded ``up`` or down, after ``before`` devices rounded up.

    Each of these layers keeps ``gain`` units there.
    """

    kind: int
    device: int
    before: int
    up: bool
    gain: int


def largest_overlap(kinds: Sequence[LayerKind], limits: Sequence[tuple[int, int]]) -> list[list[RoundedUp]] | None:
    """Choose the devices that are rounded up in each layer of each kind, such that most is kept.

    ``limits``: in how many layers each device may be rounded up, at least and at most. Returns None if the program is
    too large, or has no answer after ``MOST_NODES``.
    """
    steps = [step for index, kind in enumerate(kinds) for step in _steps(index, kind)]
    if len(steps) > MOST_STEPS:
        return None
    # Imported here: most plans need no program, and `anchortp plan` answers at once.
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layers = [kinds[step.kind].layers for step in steps]
    rows, columns, signs, low, high = _constraints(kinds, limits, steps)
    matrix = csr_array((signs, (rows, columns)), shape=(len(low), len(steps)))
    found = milp(
        [-step.gain for step in steps],
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.ones(len(steps)),
        bounds=Bounds(0, layers),
        options={"node_limit": MOST_NODES, "mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    flow = Counter({step: round(amount) for step, amount in zip(steps, found.x, strict=True)})
    return [[_take_layer(index, kind, flow) for _ in range(kind.layers)] for index, kind in enumerate(kinds)]


def _steps(index: int, kind: LayerKind) -> Iterator[_Step]:
    """Yield the possible roundings of each device on the paths that round up as many devices as are due."""
    devices = len(kind.down)
    for device in range(devices):
        for before in range(min(device, kind.extra) + 1):
            for up in (False, True):
                gain = (kind.up if up else kind.down)[device][before]
                if gain >= 0 and 0 <= kind.extra - before - up <= devices - device - 1:
                    yield _Step(index, device, before, up, gain)


def _constraints(
    kinds: Sequence[LayerKind], limits: Sequence[tuple[int, int]], steps: Sequence[_Step]
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return rows, columns and signs of the matrix, and the lower and upper bounds of its rows.

    First the devices' totals. Then, by kind, device and number of devices rounded up before it: as many layers leave as
    arrive.
    """
    low, high = ([limit[end] for limit in limits] for end in (0, 1))
    nodes: dict[tuple[int, int, int], int] = {}
    rows, columns, signs = [], [], []

    def add(row: int, column: int, sign: int) -> None:
        rows.append(row)
        columns.append(column)
        signs.append(sign)

    def node(kind: int, device: int, before: int) -> int:
        if (kind, device, before) not in nodes:
            nodes[kind, device, before] = len(low)
            source, sink = device == 0, device == len(limits)
            balance = kinds[kind].layers * (source - sink)
            low.append(balance)
            high.append(balance)
        return nodes[kind, device, before]

    for column, step in enumerate(steps):
        if step.up:
            add(step.device, column, 1)
        add(node(step.kind, step.device, step.before), column, 1)
        add(node(step.kind, step.device + 1, step.before + step.up), column, -1)
    return rows, columns, signs, low, high


def _take_layer(index: int, kind: LayerKind, flow: Counter[_Step]) -> RoundedUp:
    """Return the path of one layer along steps that layers still take, and remove it from them."""
    rounded_up: list[int] = []
    for device in range(len(kind.down)):
        before = len(rounded_up)
        step = _Step(index, device, before, True, kind.up[device][before])
        if before == kind.extra or not flow[step]:
            step = _Step(index, device, before, False, kind.down[device][before])
        flow[step] -= 1
        if step.up:
            rounded_up.append(device)
    return tuple(rounded_up)
