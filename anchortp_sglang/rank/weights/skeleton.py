"""Builds a model without memory for its parameters, which are bound to the anchor's memory afterwards.

On the meta device a model would lose what its constructors compute (rotary tables, among others). So only
``torch.empty``, with which parameters are made, takes no memory: its result is one element, repeated. A constructor
that writes values to it is stopped by torch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Skeleton(TorchFunctionMode):
    """Makes ``torch.empty`` return placeholders while active."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty:
            return func(*args, **kwargs)
        size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        size = kwargs.pop("size", size)
        return func(1, **kwargs).expand(size)


def placeholders(model: torch.nn.Module) -> Iterator[str]:
    """Yield the names of tensors that are still placeholders: parameters, buffers, and attributes of modules."""
    for prefix, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not any(tensor.stride()):
                yield f"{prefix}.{name}".lstrip(".")
