"""Gives a rank its planned experts: expert parallelism with unequal, scattered shares.

SGLang deals ``num_experts / ep_size`` consecutive experts to each rank. Here each layer is built as if all ranks had as
many as this one, so that every assertion holds. Then the true number is restored, and a map from experts to places set.
"""

from collections.abc import Callable
from typing import Any

import torch

from anchortp_sglang.rank.attachment import Assignment, current


def _dealing() -> Assignment | None:
    """Return this rank's assignment, if it deals whole experts."""
    attachment = current()
    deals = attachment is not None and "expert" in attachment.assignment.model.axes
    return attachment.assignment if attachment is not None and deals else None


def around_fused_moe_init(
    original: Callable[..., None],
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    layer_id: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND FusedMoE.__init__ (layers/moe/fused_moe_triton/layer.py)."""
    sizes = (hidden_size, intermediate_size, layer_id)
    assignment = _dealing()
    if assignment is None:
        return original(layer, num_experts, *sizes, *args, **kwargs)
    own = [
        expert
        for start, stop in assignment.ownership.of("expert", assignment.rank, layer_id)
        for expert in range(start, stop)
    ]
    if num_experts != assignment.model.axes["expert"]:
        raise RuntimeError(f"a layer has {num_experts} experts, the plan {assignment.model.axes['expert']}")
    original(layer, len(own) * assignment.ownership.tp_size, *sizes, *args, **kwargs)
    layer.num_experts = layer._num_global_routed = num_experts
    layer.moe_runner_config.num_experts = num_experts
    layer.dispatcher.num_experts = num_experts
    # The dispatcher makes a map of equal shares unless it has one.
    layer.dispatcher.local_expert_mapping = torch.full((num_experts,), -1, dtype=torch.int32)
    layer.dispatcher.local_expert_mapping[own] = torch.arange(len(own), dtype=torch.int32)


def around_init_expert_location(original: Callable[..., Any], model_config: Any) -> Any:
    """AROUND ExpertLocationMetadata._init_common: its tables assume equal shares, and only EPLB needs them."""
    return original(model_config) if _dealing() is None else None


def around_moe_forward_native(
    original: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, topk_output: Any, runner_config: Any
) -> torch.Tensor:
    """AROUND fused_moe_native.moe_forward_native (CPU), which cannot handle id -1, an expert on another rank.

    Each choice of an expert of this rank becomes a token of its own, with only that expert.
    """
    if _dealing() is None:
        return original(layer, x, topk_output, runner_config)
    token, choice = torch.where(topk_output.topk_ids >= 0)
    summed = torch.zeros_like(x)
    if len(token):
        here = topk_output._replace(
            topk_weights=topk_output.topk_weights[token, choice, None],
            topk_ids=topk_output.topk_ids[token, choice, None],
        )
        summed.index_add_(0, token, original(layer, x[token], here, runner_config).to(x.dtype))
    return summed


def around_deepseek_mlp_init(
    original: Callable[..., None], mlp: Any, hidden_size: int, intermediate_size: int, *args: Any, **kwargs: Any
) -> None:
    """AROUND DeepseekV2MLP.__init__: set the shared experts' own share of columns.

    SGLang gives them a multiple of the routed experts' columns. (A dense layer's come from the config.)
    """
    attachment = current()
    if attachment is not None and kwargs.get("prefix", "").endswith("shared_experts"):
        assignment = attachment.assignment
        (columns,) = (each for each in assignment.model.columns if each.axis == "shared_expert")
        intermediate_size = (
            assignment.ownership.units("shared_expert", assignment.rank) * columns.unit * assignment.ownership.tp_size
        )
    original(mlp, hidden_size, intermediate_size, *args, **kwargs)
