"""The ownership that a server runs: which device holds which units of each axis. Planner, loader and KV share it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from anchortp_sglang.planning.intervals import Intervals, deal, intersect, normalize, scale, subtract, total
from anchortp_sglang.planning.model.axes import ModelAxes, equal_vocab_cut
from anchortp_sglang.planning.ownership.shares import even, proportional, split_heads

AXES = ("q_head", "kv_head", "mlp", "shared_expert", "expert_column", "expert", "vocab")
"""All axes, in canonical order; a model has some of them."""


Shares = tuple[tuple[str, tuple[Intervals, ...]], ...]
"""Pairs each axis of a model, in canonical order, with the intervals of rank 0, 1, …"""


class InvalidOwnership(ValueError):
    """Shares with which no server can run; the text says what breaks and what to change."""


@dataclass(frozen=True)
class Ownership:
    """Shares of every axis, for all layers or layer by layer.

    ``devices`` are in rank order. ``layouts`` are the distinct shares of layers, in the order of their first use;
    ``layers`` is the index of each layer's layout, empty if all have the same. A layer without an axis still has some
    shares of it, which are not used. Raises InvalidOwnership unless it is in this canonical form; ``validate`` checks
    it against a model.
    """

    devices: tuple[int, ...]
    layouts: tuple[Shares, ...]
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise InvalidOwnership(f"devices {list(self.devices)} must be distinct, and at least one")
        first_uses = list(dict.fromkeys(self.layers or (0,)))
        if first_uses != list(range(len(self.layouts))) or len(set(self.layouts)) != len(self.layouts):
            raise InvalidOwnership("layouts must be distinct, and listed in the order of their first use")
        if self.layers and len(self.layouts) == 1:
            raise InvalidOwnership("layers need not be named where all have the same layout")
        for shares in self.layouts:
            self._check_shares(shares)

    def _check_shares(self, shares: Shares) -> None:
        named = [axis for axis, _ in shares]
        if named != [axis for axis in AXES if axis in named] or not {"q_head", "kv_head", "vocab"} <= set(named):
            raise InvalidOwnership(f"shares must name axes of {AXES} in this order, not {named}")
        for axis, ranks in shares:
            if len(ranks) != self.tp_size:
                raise InvalidOwnership(f"{axis}: shares of {len(ranks)} ranks for {self.tp_size} devices")
            if any(runs != normalize(runs) for runs in ranks):
                raise InvalidOwnership(f"{axis}: intervals must be sorted, disjoint and coalesced")

    @property
    def tp_size(self) -> int:
        return len(self.devices)

    @cached_property
    def _by_axis(self) -> tuple[dict[str, tuple[Intervals, ...]], ...]:
        return tuple(dict(shares) for shares in self.layouts)

    @cached_property
    def by_layer(self) -> frozenset[str]:
        """Axes whose shares differ between layers."""
        return frozenset(axis for axis, ranks in self.layouts[0] if any(one[axis] != ranks for one in self._by_axis))

    def layout_of(self, layer: int | None) -> int:
        """Return the index of a layer's layout: layers of the same layout are cut alike."""
        return self.layers[layer] if self.layers and layer is not None else 0

    def ranks(self, axis: str, layer: int | None = None) -> tuple[Intervals, ...]:
        """Return the units of an axis that rank 0, 1, … hold in a layer; without a layer, in all of them.

        Raises KeyError for an unknown axis, and without a layer for an axis whose shares differ between layers.
        """
        if layer is None and axis in self.by_layer:
            raise KeyError(f"shares of {axis} differ by layer, and none was named")
        return self._by_axis[self.layout_of(layer)][axis]

    def of(self, axis: str, rank: int, layer: int | None = None) -> Intervals:
        """Return the units that one rank holds; see ``ranks``."""
        return self.ranks(axis, layer)[rank]

    def units(self, axis: str, rank: int, layer: int | None = None) -> int:
        """Count the units that one rank holds; see ``ranks``."""
        return total(self.of(axis, rank, layer))

    def to_json(self) -> str:
        """Return canonical JSON: equal ownerships give equal text."""
        value = {"devices": self.devices, "layouts": [dict(shares) for shares in self.layouts], "layers": self.layers}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Ownership":
        """Read the text of ``to_json``. Raises InvalidOwnership for any other text."""
        try:
            value = json.loads(text)
            devices = tuple(int(device) for device in value["devices"])
            layouts = tuple(
                _in_order(
                    {
                        axis: tuple(tuple((int(a), int(b)) for a, b in runs) for runs in ranks)
                        for axis, ranks in shares.items()
                    }
                )
                for shares in value["layouts"]
            )
            layers = tuple(int(index) for index in value["layers"])
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise InvalidOwnership(f"not the JSON of an ownership: {error!r}") from error
        return cls(devices, layouts, layers)

    def digest(self) -> str:
        """Return 16 hex characters that identify this ownership."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __str__(self) -> str:
        lines = []
        for index, shares in enumerate(self.layouts):
            if self.layers:
                lines.append(f"layers {','.join(str(n) for n, layout in enumerate(self.layers) if layout == index)}")
            for rank, device in enumerate(self.devices):
                runs = (f"{axis} " + ",".join(f"{a}-{b - 1}" for a, b in ranks[rank]) for axis, ranks in shares)
                lines.append(f"device {device}: " + "  ".join(runs))
        return "\n".join(lines)


def ownership_by_layer(devices: Sequence[int], shares: Sequence[Mapping[str, tuple[Intervals, ...]]]) -> Ownership:
    """Make the canonical ownership from the shares of layer 0, 1, …; a single entry holds for all layers.

    Raises InvalidOwnership.
    """
    known: dict[Shares, int] = {}
    layers = tuple(known.setdefault(_in_order(each), len(known)) for each in shares)
    return Ownership(tuple(devices), tuple(known), layers if len(known) > 1 else ())


def validate(model: ModelAxes, ownership: Ownership) -> None:
    """Raise InvalidOwnership unless SGLang can run the model with these shares.

    Query heads and columns must be on exactly one rank; a rank must hold the KV heads of its query heads, each for an
    equal number of them; every rank must have units of every axis; the vocabulary must be SGLang's own equal cut.
    """
    if ownership.layers and len(ownership.layers) != model.num_layers:
        raise InvalidOwnership(f"shares of {len(ownership.layers)} layers for a model of {model.num_layers}")
    if None in model.kv and not {"q_head", "kv_head"}.isdisjoint(ownership.by_layer):
        raise InvalidOwnership("heads differ by layer, but some layers read the KV of earlier ones")
    for index, shares in enumerate(ownership.layouts):
        kept = {kv.axis for layer, kv in enumerate(model.kv) if kv and ownership.layout_of(layer) == index}
        _check_layout(model, ownership.devices, dict(shares), "kv_head" in kept)


def _check_layout(
    model: ModelAxes, devices: Sequence[int], shares: Mapping[str, tuple[Intervals, ...]], has_kv_heads: bool
) -> None:
    if list(shares) != list(model.axes):
        raise InvalidOwnership(f"shares of {list(shares)} for a model of {list(model.axes)}")
    for axis in ("q_head", *(columns.axis for columns in model.columns)):
        _check_held_once(axis, model.axes[axis], shares[axis])
    for rank, device in enumerate(devices):
        empty = [axis for axis, ranks in shares.items() if not ranks[rank]]
        if empty:
            raise InvalidOwnership(f"device {device} would hold no units of {', '.join(empty)}; use fewer devices")
        if has_kv_heads:  # where KV heads are dealt with query heads, every cut is one
            _check_head_groups(model, device, shares["q_head"][rank], shares["kv_head"][rank])
    if shares["vocab"] != equal_vocab_cut(model.vocab_size, len(devices)):
        raise InvalidOwnership(f"vocab is not the equal cut of {model.vocab_size} rows over {len(devices)} ranks")


def _check_held_once(axis: str, units: int, ranks: Sequence[Intervals]) -> None:
    together = normalize(run for runs in ranks for run in runs)
    missing = subtract(((0, units),), together)
    if missing:
        raise InvalidOwnership(f"{axis}: units {missing} are on no rank")
    if together != ((0, units),) or sum(map(total, ranks)) != units:
        raise InvalidOwnership(f"{axis}: units are on two ranks, or beyond the {units} of the model")


def _check_head_groups(model: ModelAxes, device: int, q_heads: Intervals, kv_heads: Intervals) -> None:
    needed = normalize((q // model.group_size, q // model.group_size + 1) for a, b in q_heads for q in range(a, b))
    if kv_heads != needed:
        raise InvalidOwnership(f"device {device} holds KV heads {kv_heads}, its query heads need {needed}")
    sizes = {
        total(intersect(q_heads, scale(((kv, kv + 1),), model.group_size))) for a, b in kv_heads for kv in range(a, b)
    }
    if len(sizes) > 1:
        raise InvalidOwnership(f"device {device} has KV heads with unequal numbers of query heads: {sorted(sizes)}")


def split(model: ModelAxes, devices: Sequence[int], widths: Sequence[int] | None = None) -> Ownership:
    """Split a model contiguously, in device order, alike in all layers.

    ``widths`` are KV heads per device; columns follow them. Without widths both are as even as possible, the larger
    shares first. With more devices than KV heads, several devices hold the same KV head and share its query heads.
    Raises InvalidOwnership for an impossible split.
    """
    tp_size = len(devices)
    heads = model.axes["q_head"]
    if not 0 < tp_size <= heads:
        dealt = "query heads" if model.heads_per_unit == 1 else f"groups of {model.heads_per_unit} query heads"
        raise InvalidOwnership(
            f"{tp_size} devices cannot share {heads} {dealt}; the largest tensor-parallel size of this model is {heads}"
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
    vocab = equal_vocab_cut(model.vocab_size, tp_size)
    ownership = ownership_by_layer(devices, [{"q_head": q_head, "kv_head": kv_head, **columns, "vocab": vocab}])
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


def _in_order(shares: Mapping[str, tuple[Intervals, ...]]) -> Shares:
    # An unknown axis is left for Ownership to refuse.
    return tuple(sorted(shares.items(), key=lambda share: (*AXES, share[0]).index(share[0])))
