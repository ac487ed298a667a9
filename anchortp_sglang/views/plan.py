"""Terminal view of the answer of ``anchortp plan``. Pure: values in, renderables out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from anchortp_sglang.planning.placement.migration_types import MigrationPlan
from anchortp_sglang.planning.prediction.simulation import Prediction
from anchortp_sglang.planning.prediction.what_if import WhatIf
from anchortp_sglang.views.status import bar, byte_size

_KIND_COLOURS = {"reload": "yellow", "p2p": "cyan", "copy": "green"}
MOST_DEVICES = 32


def answer_view(title: str, answer: WhatIf, width: int = 80) -> RenderableType:
    """Show one change: devices, totals and bounds, transfers over time, recovery and restart."""
    parts = (
        Text(title, style="bold"),
        _devices(answer),
        _totals(answer),
        *_transfers(answer, width),
        _stages("predicted recovery", answer.recovery, width),
        Text(_comparison(answer)),
    )
    return Group(*(part for each in parts for part in (each, Text())))


def failures_view(title: str, answers: Sequence[tuple[str, WhatIf | str]]) -> RenderableType:
    """Show a line for each change. An answer that is a text says why there is no plan."""
    table = Table(title=title, title_justify="left")
    for heading in ("lost", "strategy", "reload", "P2P", "moving", "first token", "restart"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    refused = []
    for lost, answer in answers:
        if isinstance(answer, str):
            table.add_row(lost, Text("none", style="bold red"))
            refused.append(Text(f"device {lost}: {answer}"))
            continue
        plan = answer.plan
        table.add_row(
            *(lost, plan.strategy, byte_size(plan.reload_bytes), byte_size(plan.p2p_bytes)),
            *(_seconds(s) for s in (answer.timeline.makespan_s, answer.recovery.tfs_s, answer.restart.tfs_s)),
        )
    return Group(table, *refused)


def _devices(answer: WhatIf) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for heading in ("device", "before", "kept", "P2P in", "P2P out", "reload", "after", "KV tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    devices = answer.plan.devices
    for device in devices[:MOST_DEVICES]:
        table.add_row(
            str(device.id),
            *(byte_size(device.weight_bytes_before), byte_size(device.kept_bytes)),
            *(byte_size(device.p2p_in_bytes), byte_size(device.p2p_out_bytes), byte_size(device.reload_bytes)),
            byte_size(device.weight_bytes),
            f"{answer.kv_tokens[device.id]:,}",
        )
    if len(devices) > MOST_DEVICES:
        return Group(table, Text(f"and {len(devices) - MOST_DEVICES} more devices", style="dim"))
    return table


def _totals(answer: WhatIf) -> Table:
    plan, timeline = answer.plan, answer.timeline
    table = Table(box=None, pad_edge=False, show_header=False)
    from_memory = f", {byte_size(plan.copy_bytes)} of it from host memory" if plan.copy_bytes else ""
    for name, value in (
        ("strategy", plan.strategy),
        (
            "reload",
            f"{byte_size(plan.reload_bytes)} (no plan can do with less than "
            f"{byte_size(plan.reload_lower_bound_bytes)}){from_memory}",
        ),
        ("P2P", f"{byte_size(plan.p2p_bytes)}, {_share(plan)}"),
        (
            "moving",
            f"{_seconds(timeline.makespan_s)} (the busiest link needs {_seconds(timeline.link_lower_bound_s)})",
        ),
        ("fullest device", f"{plan.imbalance:.2%} above the mean"),
        ("KV capacity", _kv_capacity(answer)),
    ):
        table.add_row(name, value)
    return table


def _kv_capacity(answer: WhatIf) -> str:
    text = f"{answer.kv_capacity:,} tokens, what the device with the least room can hold"
    if answer.kv_capacity == answer.kv_tokens_alike:
        return text
    gain = f" ({answer.kv_capacity / answer.kv_tokens_alike - 1:+.0%})" if answer.kv_tokens_alike else ""
    return f"{text}; {answer.kv_tokens_alike:,} if heads and experts did not rotate over the layers{gain}"


def _share(plan: MigrationPlan) -> str:
    share = plan.p2p_bytes / plan.sharded_bytes if plan.sharded_bytes else 0.0
    return f"{share:.2%} of the {byte_size(plan.sharded_bytes)} that are sharded"


def _transfers(answer: WhatIf, width: int) -> list[RenderableType]:
    """Draw a bar for each device and kind of transfer."""
    spans: dict[tuple[int, str], tuple[float, float]] = {}
    for entry in answer.timeline.entries:
        key = (entry.device, entry.kind)
        start, end = spans.get(key, (entry.start_s, entry.end_s))
        spans[key] = (min(start, entry.start_s), max(end, entry.end_s))
    if not spans:
        return [Text("no byte moves")]
    table = Table(title="transfers", title_justify="left", box=None, pad_edge=False, show_header=False)
    for (device, kind), (start, end) in sorted(spans.items())[: 2 * MOST_DEVICES]:
        drawn = bar(start, end, answer.timeline.makespan_s, max(10, width - 34), _KIND_COLOURS[kind])
        table.add_row(f"device {device}", kind, drawn, _seconds(end))
    return [table]


def _stages(title: str, prediction: Prediction, width: int) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for stage in prediction.stages:
        drawn = bar(stage.start_s, stage.end_s, prediction.full_speed_s, max(10, width - 34))
        table.add_row(stage.name, drawn, _seconds(stage.end_s))
    return table


def _comparison(answer: WhatIf) -> str:
    recovery, restart = answer.recovery.tfs_s, answer.restart.tfs_s
    return (
        f"first token after {_seconds(recovery)}; restart and reload: {_seconds(restart)}, "
        f"{restart / recovery:.1f} times as long"
        if recovery > 0
        else f"first token at once; restart and reload: {_seconds(restart)}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
