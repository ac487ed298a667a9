"""Rounds many layers for many devices in a time that is known beforehand: well, not always optimally.

Being rounded up gets a price on each device, which rises where more layers want it than are due and falls where fewer
do (subgradients of the Lagrangian relaxation, one step a layer). Then each layer in turn takes what is best for it at
the prices, as far as the totals can still come out right.
"""

from collections.abc import Sequence

from anchortp_sglang.planning.placement.rounding import LayerKind, RoundedUp

ALWAYS = 1e9
"""Price that outweighs all that a layer can keep."""


def priced_rounding(layers: Sequence[LayerKind], totals: Sequence[int]) -> list[RoundedUp]:
    """Choose the devices rounded up in each of ``layers`` (their kinds): device ``d`` in ``totals[d]`` of them."""
    due = [total / len(layers) for total in totals]
    prices = _prices(layers, due)
    missing = list(totals)
    choices = []
    for left, kind in zip(range(len(layers), 0, -1), layers, strict=True):
        asked = [_asked(price, share, lacks, left) for price, share, lacks in zip(prices, due, missing, strict=True)]
        choices.append(kind.best(asked)[1])
        for device in choices[-1]:
            missing[device] -= 1
    return choices


def _prices(layers: Sequence[LayerKind], due: Sequence[float]) -> list[float]:
    prices = [0.0] * len(due)
    for place, kind in enumerate(layers):
        step = 1 / (1 + 3 * place / len(layers))
        wanted = kind.best(prices)[1]
        prices = [price - step * share for price, share in zip(prices, due, strict=True)]
        for device in wanted:
            prices[device] += step
    return prices


def _asked(price: float, due: float, missing: int, left: int) -> float:
    """Return the price in a layer of a device that is to be rounded up in ``missing`` of the ``left`` layers."""
    if missing in (0, left):
        return -ALWAYS if missing else ALWAYS
    return price + 0.3 * (due - missing / left) * min(left, 10)
