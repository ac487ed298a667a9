"""Lets SGLang's LoRA run without pinned memory, which torch has only beside an accelerator.

SGLang 0.5.23 pins what it copies to a GPU (lora/layers.py, lora/backend/torch_backend.py) even where everything is on a
CPU, and torch raises then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anchortp_sglang.rank.attachment import current


class Unpinned(TorchFunctionMode):
    """Makes torch leave memory as it is where it should be pinned, while active."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = kwargs or {}
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def around_lora(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND LoRAManager.init_state and LoRAManager.prepare_lora_batch."""
    if current() is None or manager.device.type != "cpu":
        return original(manager, *args, **kwargs)
    with Unpinned():
        return original(manager, *args, **kwargs)


def register() -> None:
    """Let LoRA run in a process without our hooks."""
    from sglang.srt.lora.lora_manager import LoRAManager

    for name in ("init_state", "prepare_lora_batch"):
        setattr(LoRAManager, name, _unpinned(getattr(LoRAManager, name)))


def _unpinned(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with Unpinned():
            return method(*args, **kwargs)

    return call
