"""Ownership: which device holds which units of each axis. The one value that planner, loader and KV share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from anchortp_sglang.planning.intervals import (
    Intervals,
    deal,
    intersect,
    normalize,
    scale,
    subtract,
    total,
)
from anchortp_sglang.planning.model_axes import ModelAxes, equal_vocab_cut
from anchortp_sglang.planning.shares import even, proportional, split_heads

AXES = ("q_head", "kv_head", "mlp", "expert_column", "expert", "vocab")
"""All axes there are, in canonical order; a model has some of them."""


class InvalidOwnership(ValueError):
    """No server can run with these shares; the text says what breaks and what to change."""


@dataclass(frozen=True)
class Ownership:
    """``devices`` in rank order; ``shares`` pairs each axis of the model with the intervals of rank 0, 1, …

    Raises InvalidOwnership when it is not in that canonical form; ``validate`` checks it against a model.
    """

    devices: tuple[int, ...]
    shares: tuple[tuple[str, tuple[Intervals, ...]], ...]

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise InvalidOwnership(f"devices {list(self.devices)} must be distinct, and at least one")
        named = [axis for axis, _ in self.shares]
        if named != [axis for axis in AXES if axis in named] or not {"q_head", "kv_head", "vocab"} <= set(named):
            raise InvalidOwnership(f"shares must name axes of {AXES} in this order, not {named}")
        for axis, ranks in self.shares:
            if len(ranks) != self.tp_size:
                raise InvalidOwnership(f"{axis}: shares of {len(ranks)} ranks for {self.tp_size} devices")
            if any(runs != normalize(runs) for runs in ranks):
                raise InvalidOwnership(f"{axis}: intervals must be sorted, disjoint and coalesced")

    @property
    def tp_size(self) -> int:
        return len(self.devices)

    @cached_property
    def _by_axis(self) -> dict[str, tuple[Intervals, ...]]:
        return dict(self.shares)

    def of(self, axis: str, rank: int) -> Intervals:
        """The units of an axis that a rank holds. Raises KeyError for an unknown axis."""
        return self._by_axis[axis][rank]

    def units(self, axis: str, rank: int) -> int:
        """How many units of an axis a rank holds."""
        return total(self.of(axis, rank))

    def to_json(self) -> str:
        """Canonical JSON text: equal ownerships give equal text."""
        value = {"devices": self.devices, "shares": dict(self.shares)}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Ownership":
        """The inverse of ``to_json``. Raises InvalidOwnership for any other text."""
        try:
            value = json.loads(text)
            devices = tuple(int(device) for device in value["devices"])
            shares = {
                axis: tuple(tuple((int(a), int(b)) for a, b in runs) for runs in ranks)
                for axis, ranks in value["shares"].items()
            }
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise InvalidOwnership(f"not the JSON of an ownership: {error!r}") from error
        return _ownership(devices, shares)

    def digest(self) -> str:
        """16 hex characters that name this ownership."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        lines = []
        for rank, device in enumerate(self.devices):
            runs = (f"{axis} " + ",".join(f"{a}-{b - 1}" for a, b in ranks[rank]) for axis, ranks in self.shares)
            lines.append(f"device {device}: " + "  ".join(runs))
        return "\n".join(lines)


def validate(model: ModelAxes, ownership: Ownership) -> None:
    """Raise InvalidOwnership unless SGLang can run the model with these shares.

    Query heads and columns lie on exactly one rank; a rank holds the KV heads of its query heads, each for
    an equal number of them; nobody is without units; the vocabulary is SGLang's own equal cut.
    """
    if [axis for axis, _ in ownership.shares] != list(model.axes):
        raise InvalidOwnership(f"shares of {[axis for axis, _ in ownership.shares]} for a model of {list(model.axes)}")
    for axis in ("q_head", *(columns.axis for columns in model.columns)):
        _check_held_once(axis, model.axes[axis], dict(ownership.shares)[axis])
    for rank, device in enumerate(ownership.devices):
        empty = [axis for axis, ranks in ownership.shares if not ranks[rank]]
        if empty:
            raise InvalidOwnership(f"device {device} would hold no units of {', '.join(empty)}; use fewer devices")
        _check_head_groups(model, ownership, rank)
    if dict(ownership.shares)["vocab"] != equal_vocab_cut(model.vocab_size, ownership.tp_size):
        raise InvalidOwnership(f"vocab is not the equal cut of {model.vocab_size} rows over {ownership.tp_size} ranks")


def _check_held_once(axis: str, units: int, ranks: Sequence[Intervals]) -> None:
    together = normalize(run for runs in ranks for run in runs)
    missing = subtract(((0, units),), together)
    if missing:
        raise InvalidOwnership(f"{axis}: units {missing} are on no rank")
    if together != ((0, units),) or sum(map(total, ranks)) != units:
        raise InvalidOwnership(f"{axis}: units are on two ranks, or beyond the {units} of the model")


def _check_head_groups(model: ModelAxes, ownership: Ownership, rank: int) -> None:
    q_heads, kv_heads = ownership.of("q_head", rank), ownership.of("kv_head", rank)
    where = f"device {ownership.devices[rank]}"
    needed = normalize((q // model.group_size, q // model.group_size + 1) for a, b in q_heads for q in range(a, b))
    if kv_heads != needed:
        raise InvalidOwnership(f"{where} holds KV heads {kv_heads}, its query heads need {needed}")
    sizes = {
        total(intersect(q_heads, scale(((kv, kv + 1),), model.group_size))) for a, b in kv_heads for kv in range(a, b)
    }
    if len(sizes) > 1:
        raise InvalidOwnership(f"{where} has KV heads with unequal numbers of query heads: {sorted(sizes)}")


def kept_units(old: Ownership, new: Ownership, axis: str, device: int) -> Intervals:
    """Units of an axis that a device holds before and after; none if it is missing from either."""
    if device not in old.devices or device not in new.devices:
        return ()
    return intersect(old.of(axis, old.devices.index(device)), new.of(axis, new.devices.index(device)))


def split(model: ModelAxes, devices: Sequence[int], widths: Sequence[int] | None = None) -> Ownership:
    """A contiguous split, in device order.

    ``widths`` are KV heads per device; columns follow them. Without widths both are as even as possible,
    the larger shares first. With more devices than KV heads each KV head is replicated over some of them and
    they share its query heads. Raises InvalidOwnership for a split that cannot be.
    """
    tp_size = len(devices)
    if not 0 < tp_size <= model.num_q_heads:
        raise InvalidOwnership(
            f"{tp_size} devices cannot share {model.num_q_heads} query heads; "
            f"the largest tensor-parallel size of this model is {model.num_q_heads}"
        )
    if widths is not None:
        _check_widths(model, tp_size, widths)
    columns = {
        each.axis: deal(
            ((0, each.units),), even(each.units, tp_size) if widths is None else proportional(each.units, widths)
        )
        for each in model.columns
    }
    kv_head, q_head = split_heads(model.num_kv_heads, model.group_size, tp_size, widths)
    ownership = _ownership(
        tuple(devices),
        {
            "q_head": q_head,
            "kv_head": kv_head,
            **columns,
            "vocab": equal_vocab_cut(model.vocab_size, tp_size),
        },
    )
    validate(model, ownership)
    return ownership


def _check_widths(model: ModelAxes, tp_size: int, widths: Sequence[int]) -> None:
    kv_heads = model.num_kv_heads
    given = ",".join(map(str, widths))
    if tp_size > kv_heads:
        raise InvalidOwnership(
            f"widths {given} are not possible: {tp_size} devices replicate the {kv_heads} KV heads; "
            f"leave the widths out, or use at most {kv_heads} devices"
        )
    if len(widths) != tp_size or min(widths) < 1 or sum(widths) != kv_heads:
        example = ",".join(map(str, even(kv_heads, tp_size)))
        raise InvalidOwnership(
            f"widths {given} do not share out {kv_heads} KV heads over {tp_size} devices; "
            f"give {tp_size} positive numbers that add up to {kv_heads}, such as {example}"
        )


def _ownership(devices: tuple[int, ...], shares: Mapping[str, tuple[Intervals, ...]]) -> Ownership:
    # An unknown axis is left for Ownership to refuse.
    return Ownership(devices, tuple(sorted(shares.items(), key=lambda share: (*AXES, share[0]).index(share[0]))))
