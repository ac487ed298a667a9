"""The rounding by which most units are kept over all layers: an integer program, by branch and bound.

Where the best rounding divides layers, it is looked for with fewer and with more of them taking the step in question;
both together cover all whole numbers. A branch whose bound is no more than what is known to be possible is left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor

from anchortp_sglang.planning.placement.relaxation import Choice, Flow, Kinds, Relaxation
from anchortp_sglang.planning.placement.rounding import LayerKind, RoundedUp, Step

MOST_WORK = 3_000_000
"""How many numbers are computed before the search is given up: some tenths of a second. With eight devices it seldom
takes a tenth of them."""


@dataclass
class Search:
    """``best`` is the best choice that is known and keeps ``kept`` units. Once the search is over there is no better
    one, unless the ``work`` that is left for it is below zero."""

    best: Choice
    kept: int
    work: int = MOST_WORK


def most_kept(kinds: Kinds, totals: Sequence[int], search: Search) -> None:
    """Improve ``search``, whose choice is for all layers of these kinds and has each device rounded up in
    ``totals`` of them."""
    if 20 * len(totals) * (len(kinds) + len(totals)) ** 2 > search.work:
        search.work = -1  # it would not get far
        return
    branches = [(search.kept + 1, Relaxation(kinds, totals, search.best))]
    while branches and search.work >= 0:
        bound, relaxation = branches.pop()
        flows = relaxation.solve(search.kept, search.work) if bound > search.kept else None
        search.work -= relaxation.work
        if flows is None:
            continue
        fewer_or_more = _branch(relaxation.kinds, flows)
        if not fewer_or_more:
            search.best = list(_choice(relaxation.kinds, flows))
            search.kept = relaxation.bound
        for parts in fewer_or_more:
            branches.append((relaxation.bound, Relaxation(parts, totals, relaxation.used())))


def _branch(kinds: Kinds, flows: Sequence[Flow]) -> list[Kinds]:
    """The kinds with fewer and with more layers taking a step that a fraction takes now; nothing if none does. Steps
    in the middle of the devices settle most on both sides."""
    fractional = [
        (abs(2 * step.device - len(kind.down)), not step.up, index, step)
        for index, (kind, flow) in enumerate(zip(kinds, flows, strict=True))
        for step, layers in flow.items()
        if layers.denominator > 1
    ]
    if not fractional:
        return []
    *_, index, step = min(fractional)
    kind, layers = kinds[index], flows[index][step]
    fewer = kind.part(step, kind.layers - floor(layers), taken=False)
    more = kind.part(step, ceil(layers), taken=True)
    return [(*kinds[:index], *parts, *kinds[index + 1 :]) for parts in (fewer, more)]


def _choice(kinds: Kinds, flows: Sequence[Flow]) -> Iterator[tuple[int, RoundedUp]]:
    for kind, flow in zip(kinds, flows, strict=True):
        left = dict(flow)
        for _ in range(kind.layers):
            yield kind.name, _take_layer(kind, left)


def _take_layer(kind: LayerKind, flow: Flow) -> RoundedUp:
    """A layer's way along steps that whole layers take, which is taken off them."""
    rounded_up: list[int] = []
    for device in range(len(kind.down)):
        up, down = (Step(device, len(rounded_up), up) for up in (True, False))
        step = up if flow.get(up) else down
        flow[step] -= 1
        if step.up:
            rounded_up.append(device)
    return tuple(rounded_up)
