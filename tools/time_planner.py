#!/usr/bin/env python3
"""Print how long planning takes: PYTHONPATH=. python tools/time_planner.py

Models that run on 512 devices do not exist yet; that one is made up, with enough heads and experts for all.
"""

import time
from collections.abc import Sequence

from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.model.plan_model import PlanModel, plan_model
from anchortp_sglang.planning.ownership.layer_ownership import LayerOwnership
from anchortp_sglang.planning.placement.migration import STRATEGIES, plan_migration
from anchortp_sglang.planning.placement.place import equal_split

QWEN3_235B_A22B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
WIDE = QWEN3_235B_A22B | {"num_attention_heads": 1024, "num_key_value_heads": 1024, "num_experts": 1024}


def without(devices: int, *lost: int) -> list[int]:
    return [device for device in range(devices) if device not in lost]


def show(label: str, model: PlanModel, old: LayerOwnership, targets: Sequence[int]) -> None:
    for strategy in STRATEGIES:
        begin = time.perf_counter()
        plan = plan_migration(model, old, targets, strategy)
        took_ms = (time.perf_counter() - begin) * 1e3
        reload, p2p = plan.reload_bytes / plan.sharded_bytes, plan.p2p_bytes / plan.sharded_bytes
        shares = f"reload {reload:6.2%}  P2P {p2p:6.2%}"
        print(f"{label:32} {strategy:10} {took_ms:8.1f} ms  {shares}  {len(plan.transfers)} transfers")


def main() -> None:
    columns, whole = (plan_model(read_model_axes(QWEN3_235B_A22B, whole_experts=whole)) for whole in (False, True))
    for name, model in (("TP-MoE", columns), ("EP", whole)):
        for devices, lost in ((8, 3), (64, 20)):
            full = equal_split(model, range(devices))
            left = without(devices, lost)
            show(f"Qwen3-235B {name} {devices}→{devices - 1}", model, full, left)
            reduced = plan_migration(model, full, left, "adopt").new
            show(f"Qwen3-235B {name} {devices - 1}→{devices}", model, reduced, range(devices))
    wide = plan_model(read_model_axes(WIDE, whole_experts=True))
    show("wide EP 512→500", wide, equal_split(wide, range(512)), without(512, *range(5, 512, 43)))


if __name__ == "__main__":
    main()
