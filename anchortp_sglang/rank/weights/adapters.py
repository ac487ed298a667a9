"""Cuts LoRA adapters like the weights that they adapt: a rank takes the rows or columns of its own share.

SGLang reads an adapter whole and gives each rank equal parts. Where shares are unequal, its buffers already have a
rank's own size, as they follow the base layers.
"""

from functools import partial
from typing import Any

import torch

from anchortp_sglang.planning.intervals import Intervals
from anchortp_sglang.planning.layout.whole import runs_of_whole
from anchortp_sglang.rank.attachment import current


def after_init_lora_modules(result: None, manager: Any) -> None:
    """AFTER LoRAManager.init_lora_modules, which wraps each layer that adapters may change.

    Raises ValueError for adapters of embeddings and heads.
    """
    attachment = current()
    if attachment is None:
        return
    if manager.embed_tokens_module is not None or manager.lm_head_module is not None:
        raise ValueError("adapters of embed_tokens and lm_head are not supported: name other --lora-target-modules")
    model, layout = attachment.assignment.model, attachment.layout
    dims = {placed.name: placed.dim for placed in layout.params}
    for modules in manager.lora_modules:
        for name, module in modules.items():
            weight = f"{name}.weight"
            runs = runs_of_whole(model, layout, weight)
            if dims[weight] == 0:
                module.slice_lora_b_weights = partial(_rows, runs)
            else:
                module.slice_lora_a_weights = partial(_columns, runs)


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
