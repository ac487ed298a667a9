"""Finds the transfers between two ownerships: what each device lacks, and where it comes from."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from anchortp_sglang.planning.intervals import Intervals, intersect, normalize, subtract
from anchortp_sglang.planning.model.plan_model import AxisGroup, PlanModel
from anchortp_sglang.planning.ownership.layer_ownership import LayerOwnership, Layout
from anchortp_sglang.planning.placement.migration_types import Transfer, TransferKind

_WHOLE: Intervals = ((0, 1),)


@dataclass(frozen=True, slots=True)
class Need:
    """Units that a rank of the new ownership lacks, all held by the same ``holders`` (device ids)."""

    rank: int
    holders: tuple[int, ...]
    runs: Intervals


def find_transfers(
    model: PlanModel, old: LayerOwnership, new: LayerOwnership, host_copies: Mapping[str, Intervals]
) -> tuple[Transfer, ...]:
    """Find all that devices of ``new`` lack: on any surviving peer, else in ``host_copies``, else in the checkpoint.

    ``host_copies`` are units by group. Of several peers, the one that has sent least so far sends. Units that no
    survivor has are fetched once, by the first device that needs them; a later transfer in the list relays them to the
    others.
    """
    survivors = tuple(device for device in old.devices if device in new.ranks)
    sent = dict.fromkeys(old.devices + new.devices, 0)
    known: dict[tuple[int, int, int], tuple[Need, ...]] = {}
    old_index, new_index = dict(old.shares), dict(new.shares)
    transfers: list[Transfer] = []
    for group in model.groups:
        if group.kind == "replicated":
            needs: Sequence[Need] = [
                Need(rank, survivors, _WHOLE) for rank, device in enumerate(new.devices) if device not in old.ranks
            ]
        else:
            key = (old_index[group.name], new_index[group.name], group.units)
            if key not in known:
                known[key] = tuple(_needs(old, new, old.layout(group.name), new.layout(group.name)))
            needs = known[key]
        transfers += _fill(group, needs, new.devices, host_copies.get(group.name, ()), sent)
    return tuple(transfers)


def _needs(old: LayerOwnership, new: LayerOwnership, before: Layout, after: Layout) -> Iterator[Need]:
    segments = _segments(old, new, before)
    starts = [start for start, _, _ in segments]
    for rank, device in enumerate(new.devices):
        old_rank = old.ranks.get(device)
        lacks = after[rank] if old_rank is None else subtract(after[rank], before[old_rank])
        by_holders: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for start, stop in lacks:
            for piece_start, piece_stop, holders in segments[max(0, bisect_right(starts, start) - 1) :]:
                if piece_start >= stop:
                    break
                if piece_stop > start:
                    run = (max(start, piece_start), min(stop, piece_stop))
                    by_holders.setdefault(holders, []).append(run)
        for holders, runs in by_holders.items():
            yield Need(rank, holders, normalize(runs))


def _segments(old: LayerOwnership, new: LayerOwnership, before: Layout) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return the units from 0 on in runs with the same surviving holders; the last run is open, without holders."""
    opens: dict[int, list[int]] = {0: []}
    closes: dict[int, list[int]] = {}
    for device, runs in zip(old.devices, before, strict=True):
        if device in new.ranks:
            for start, stop in runs:
                opens.setdefault(start, []).append(device)
                closes.setdefault(stop, []).append(device)
    edges = sorted(opens.keys() | closes.keys())
    holders: set[int] = set()
    segments = []
    for start, stop in zip(edges, [*edges[1:], 2**63], strict=True):
        holders.difference_update(closes.get(start, ()))
        holders.update(opens.get(start, ()))
        segments.append((start, stop, tuple(sorted(holders))))
    return segments


def _fill(
    group: AxisGroup, needs: Sequence[Need], devices: Sequence[int], copied: Intervals, sent: dict[int, int]
) -> Iterator[Transfer]:
    loaded: list[tuple[int, Intervals]] = []

    def transfer(kind: TransferKind, device: int, source: int | None, runs: Intervals) -> Transfer:
        nbytes = group.nbytes(runs)
        if source is not None:
            sent[source] += nbytes
        return Transfer(kind, device, source, group.name, group.layer, group.stage, runs, nbytes)

    for need in needs:
        device, runs = devices[need.rank], need.runs
        if need.holders:
            source = need.holders[0] if len(need.holders) == 1 else min(need.holders, key=lambda d: (sent[d], d))
            yield transfer("p2p", device, source, runs)
            continue
        if group.kind != "split":
            for peer, has in loaded:
                if relayed := intersect(runs, has):
                    yield transfer("p2p", device, peer, relayed)
                    runs = subtract(runs, relayed)
            if not runs:
                continue
            loaded.append((device, runs))
        if from_host := intersect(runs, copied):
            yield transfer("copy", device, None, from_host)
        if from_disk := subtract(runs, copied):
            yield transfer("reload", device, None, from_disk)
