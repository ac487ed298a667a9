"""Answers for what SGLang asks about GPUs while it is imported and resolves its arguments.

torch and the driver would be initialised to answer, and no child of such a process could use CUDA: the zygote could not
be forked. Seen with SGLang 0.5.23: ``platforms._is_sail_available`` (the GPU's name), many tests of the compute
capability, ``_cuda_mem_fallback`` where there is no nvidia-smi, and FlashInfer, whose import asks CUTLASS's DSL for the
architecture (``detect_gpu_arch``), which calls cuInit unless CUTE_DSL_ARCH says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from anchortp_sglang.platforms.cuda.probe import GpuFacts

__all__ = ["Properties", "environment", "install"]

_GPUS = "ANCHORTP_GPUS"
"""Variable with the visible GPUs as JSON, for every process that imports SGLang."""


@dataclass(frozen=True)
class Properties:
    """A GPU's properties, known before CUDA is initialised, under the names of torch's ``_CudaDeviceProperties``."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    L2_cache_size: int
    uuid: str
    warp_size: int = 32


def environment(gpus: Sequence[GpuFacts]) -> dict[str, str]:
    """Return the environment in which :func:`install` answers, and CUTLASS's DSL needs not ask."""
    major, minor = gpus[0].capability
    arch = f"sm_{major}{minor}{'a' if major >= 9 else ''}"  # as detect_gpu_arch (cutlass/base_dsl/env_manager.py)
    return {_GPUS: msgspec.json.encode(list(gpus)).decode(), "CUTE_DSL_ARCH": arch}


def install(environ: Mapping[str, str]) -> None:
    """Make ``torch.cuda`` answer from the environment as long as CUDA is not initialised in a process; imports torch.

    From then on, in ranks, the real functions answer. Without GPUs in the environment nothing is changed. torch's
    other questions of this kind go through these three.
    """
    if _GPUS not in environ:
        return
    gpus = msgspec.json.decode(environ[_GPUS], type=list[GpuFacts])

    def gpu(device: Any = None) -> GpuFacts:
        import torch

        index = torch.cuda._utils._get_device_index(device, optional=True)
        if not 0 <= index < len(gpus):
            raise AssertionError("Invalid device id")  # as torch does
        return gpus[index]

    _answer("current_device", lambda: 0)
    _answer("get_device_properties", lambda device=None: _properties(gpu(device)))
    _answer("mem_get_info", lambda device=None: (gpu(device).free_bytes, gpu(device).total_bytes))


def _properties(gpu: GpuFacts) -> Properties:
    major, minor = gpu.capability
    return Properties(gpu.name, major, minor, gpu.total_bytes, gpu.multiprocessors, gpu.l2_bytes, gpu.uuid)


def _answer(name: str, answer: Callable[..., Any]) -> None:
    import torch

    real = getattr(torch.cuda, name)

    def ask(*args: Any, **kwargs: Any) -> Any:
        return (real if torch.cuda.is_initialized() else answer)(*args, **kwargs)

    setattr(torch.cuda, name, ask)
