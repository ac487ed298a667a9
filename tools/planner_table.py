#!/usr/bin/env python3
"""Print the table of docs/planner.md, or with a file's name put it between the marks in that file.

PYTHONPATH=. python tools/planner_table.py [docs/planner.md]
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from table_page import publish

from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.model.plan_model import plan_model
from anchortp_sglang.planning.prediction.changes import Change
from anchortp_sglang.planning.prediction.presets import machine
from anchortp_sglang.planning.prediction.scenario import Scenario, answer_all
from anchortp_sglang.planning.prediction.what_if import WhatIf

CONFIGS = Path(__file__).parent.parent / "tests" / "unit" / "configs"
MODELS = {
    "Mixtral-8x22B": "mixtral-8x22b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "DeepSeek-V3": "deepseek-v3",
}
MACHINE = "8xH20-NVLink"
ENOUGH_BYTES = 10**12
"""Device memory for the table: some of its cases do not fit on real devices, which its last column tells."""


@dataclass(frozen=True)
class Case:
    """The last of the changes is the one that a row shows."""

    title: str
    devices: int
    changes: tuple[Change, ...]


CASES = (
    Case("8→7", 8, (Change("lose", lost=(3,)),)),
    Case("7→6", 8, (Change("lose", lost=(3,)), Change("then", lost=(5,)))),
    Case("8→6", 8, (Change("lose", lost=(3, 5)),)),
    Case("4→3", 4, (Change("lose", lost=(1,)),)),
)
HEADINGS = (
    "model",
    "devices",
    "reload",
    "P2P adopt",
    "P2P contiguous",
    "moving adopt",
    "moving contiguous",
    "TFS adopt",
    "TFS contiguous",
    "TFS restart",
    "largest device",
)


def table() -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---|---|" + "---:|" * (len(HEADINGS) - 2)
    for name, config in MODELS.items():
        for case in CASES:
            yield f"| {name} | {case.title} | " + " | ".join(_cells(config, case)) + " |"


def _cells(config: str, case: Case) -> Iterator[str]:
    adopt, contiguous = (answer(config, case, strategy) for strategy in ("adopt", "contiguous"))
    reloads = [_gigabytes(answer.plan.reload_bytes) for answer in (adopt, contiguous)]
    yield " / ".join(dict.fromkeys(reloads))
    yield _gigabytes(adopt.plan.p2p_bytes)
    plan = contiguous.plan
    yield f"{_gigabytes(plan.p2p_bytes)} ({plan.p2p_bytes / plan.sharded_bytes:.1%})"
    yield from (f"{answer.timeline.makespan_s:.2f} s" for answer in (adopt, contiguous))
    yield from (f"{answer.recovery.tfs_s:.1f} s" for answer in (adopt, contiguous))
    yield f"{adopt.restart.tfs_s:.1f} s"
    yield _gigabytes(max(nbytes for answer in (adopt, contiguous) for nbytes in answer.plan.weight_bytes.values()))


@cache
def answer(config: str, case: Case, strategy: str) -> WhatIf:
    topology = replace(machine(MACHINE, case.devices), device_memory_bytes=(ENOUGH_BYTES,) * case.devices)
    model = plan_model(read_model_axes(json.loads((CONFIGS / f"{config}.json").read_text())))
    return answer_all(Scenario(model, topology, case.devices, strategy), case.changes)[-1]


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes else "0"


if __name__ == "__main__":
    publish("planner_table.py", table())
