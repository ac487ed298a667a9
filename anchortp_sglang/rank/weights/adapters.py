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

Shapes = dict[str, tuple[int, ...]]
"""Rows and columns of whole weights, by the names of their modules."""


def after_init_lora_modules(result: None, manager: Any) -> None:
    """AFTER LoRAManager.init_lora_modules, which wraps each layer that adapters may change.

    Raises ValueError for adapters of embeddings and heads, or of another model.
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
        _check(manager, shapes, adapter)
    manager.load_lora_weights = partial(_load_checked, manager.load_lora_weights, manager, shapes)


def _load_checked(load: Callable[[Any], None], manager: Any, shapes: Shapes, adapter: Any) -> None:
    """Load an adapter as LoRAManager.load_lora_weights does. Raises ValueError for one of another model.

    SGLang would notice that only in the middle of a step, and end the rank.
    """
    load(adapter)
    try:
        _check(manager, shapes, manager.loras[adapter.lora_id])
    except ValueError:
        del manager.loras[adapter.lora_id], manager.configs[adapter.lora_id]
        raise


def _check(manager: Any, shapes: Shapes, adapter: Any) -> None:
    for layer, modules in zip(adapter.layers, manager.lora_modules, strict=True):
        for name, tensor in layer.weights.items():
            module = next((module for module in modules if f".{module.rpartition('.')[2]}." in name), None)
            if module is None:
                continue
            rows, columns = shapes[module]
            found, wanted = (tensor.shape[-1], columns) if "lora_A" in name else (tensor.shape[0], rows)
            if found != wanted:
                raise ValueError(f"the adapter is of another model: {name} is for {found} elements, not {wanted}")


def _rows(runs: Intervals, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[start:stop] for start, stop in runs])


def _columns(runs: Intervals, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:, start:stop] for start, stop in runs], dim=1)


def refuse_unknown_adapter(scheduler: Any, req: Any) -> None:
    """End a request whose adapter this rank does not have, as it could not be loaded again after a fault."""
    if req.lora_id is None or req.lora_id in scheduler.tp_worker.model_runner.lora_manager.lora_refs:
        return
    req.lora_id = None
    req.set_finish_with_abort(
        "the request's adapter could not be loaded again after a fault; the server's log says why"
    )
