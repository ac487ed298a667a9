"""Cuts LoRA adapters like the weights that they adapt: a rank takes the rows or columns of its own share.

SGLang reads an adapter whole and gives each rank equal parts. Where shares are unequal, its buffers already have a
rank's own size, as they follow the base layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.layout.whole import runs_of_whole, whole_shape
from anchortp_sglang.rank.attachment import current
from anchortp_sglang.rank.heartbeat import Counters

Shapes = dict[str, tuple[int, ...]]
"""Rows and columns of whole weights, by the names of their modules."""

_READ_LIMIT_S = 120.0
"""How long the reading of an adapter, from main's memory, may take before its ranks count as hung."""


def after_init_lora_modules(result: None, manager: Any) -> None:
    """AFTER LoRAManager.init_lora_modules, which wraps each layer that adapters may change.

    Raises ValueError for adapters of embeddings and heads, and for one of another model.
    """
    attachment = current()
    if attachment is None:
        return
    if manager.embed_tokens_module is not None or manager.lm_head_module is not None:
        raise ValueError("adapters of embed_tokens and lm_head are not supported: name other --lora-target-modules")
    model, layout = attachment.assignment.model, attachment.layout
    dims = {placed.name: placed.dim for placed in layout.params}
    shapes = {}
    for modules in manager.lora_modules:
        for name, module in modules.items():
            weight = f"{name}.weight"
            shapes[name] = whole_shape(model, weight)
            runs = runs_of_whole(model, layout, weight)
            if dims[weight] == 0:
                module.slice_lora_b_weights = partial(_rows, runs)
            else:
                module.slice_lora_a_weights = partial(_columns, runs)
    for adapter in manager.loras.values():
        check(manager, shapes, adapter)
    manager.load_lora_weights = partial(_load_checked, manager.load_lora_weights, manager, shapes)
    manager.load_lora_adapter = partial(_load_beating, manager.load_lora_adapter, attachment.counters)


def _load_beating(load: Callable[[Any], Any], counters: Counters, adapter: Any) -> Any:
    with counters.beating(_READ_LIMIT_S):
        return load(adapter)


def _load_checked(load: Callable[[Any], None], manager: Any, shapes: Shapes, adapter: Any) -> None:
    """Load an adapter as LoRAManager.load_lora_weights does. Raises ValueError for one that does not fit the model.

    SGLang would notice that only in the middle of a step, and end the rank.
    """
    try:
        load(adapter)
        check(manager, shapes, manager.loras[adapter.lora_id])
    except Exception:  # of files that anybody may have written; SGLang answers with its text
        manager.loras.pop(adapter.lora_id, None)
        manager.configs.pop(adapter.lora_id, None)
        raise


def check(manager: Any, shapes: Shapes, adapter: Any) -> None:
    """Raise ValueError for an adapter that LoRAMemoryPool.load_lora_weight_to_buffer could not take.

    ``adapter``: SGLang's LoRAAdapter, of which q, k and v, or gate and up, have been stacked.
    """
    from sglang.srt.lora.utils import get_stacked_multiply, get_target_module_name

    rank = adapter.config.r
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"the adapter's rank r is {rank!r}, which is no whole number above 0")
    if getattr(adapter, "embedding_layers", None) or getattr(adapter, "added_tokens_embeddings", None):
        raise ValueError("adapters of embed_tokens and lm_head are not supported")
    for layer, modules in zip(adapter.layers, manager.lora_modules, strict=True):
        parts: dict[str, set[str]] = {}
        for name, tensor in layer.weights.items():
            try:
                target = get_target_module_name(name, manager.target_modules)
            except ValueError:
                raise ValueError(
                    f"{name} belongs to none of the adapted modules {sorted(manager.target_modules)}"
                ) from None
            module = next((module for module in modules if module.rpartition(".")[2] == target), None)
            if module is None:
                raise ValueError(f"the adapter is of another model: it has {name}")
            rows, columns = shapes[module]
            part = "lora_A" if "lora_A" in name else "lora_B"
            stacked = rank * get_stacked_multiply(target, manager.base_model)
            wanted = (stacked, columns) if part == "lora_A" else (rows, rank)
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"the adapter is of another model or rank: {name} is {tuple(tensor.shape)}, not {wanted}"
                )
            parts.setdefault(module, set()).add(part)
        for module, found in parts.items():
            if len(found) < 2:
                raise ValueError(f"the adapter has lora_A or lora_B alone of {module}")


def _rows(runs: Intervals, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in runs])


def _columns(runs: Intervals, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:, start:stop] for start, stop in runs], dim=1)
