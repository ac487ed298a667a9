"""A stand-in for ``sgl_kernel``, so that SGLang imports on a machine where the real one cannot load.

SGLang 0.5.23 imports names from ``sgl_kernel`` at module level on its CPU paths, among them
``copy_all_layer_kv_cache_cpu`` (sglang.kernels.ops.kvcache.cache_move), ``assign_req_to_token_pool_cpu``
(sglang.kernels.ops.speculative.cache_locs) and ``rotate_input_ids_cpu`` (…speculative.multi_layer_eagle).
Dense and MoE models without AMX call none of them. The pip wheel is a CUDA build and needs libcuda.so.1.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_PACKAGE = "sgl_kernel"

SUBMODULES = ("mamba",)
"""Submodules that SGLang imports by name on CPU (layers.attention.linear.gdn_backend). Others stay absent:
SGLang tests for some with ``except ImportError`` and has its own fallback, which a stand-in would hide
(``scalar_type`` in layers.quantization.utils)."""


def install() -> None:
    """Put the stand-in into ``sys.modules`` unless the real sgl_kernel is there or can load.

    Call it before SGLang is imported, in every process. Calling it again does nothing.
    """
    if _PACKAGE in sys.modules or _real_one_loads():
        return
    package = _StandIn(_PACKAGE)
    sys.modules[_PACKAGE] = package
    for name in SUBMODULES:
        submodule = _StandIn(f"{_PACKAGE}.{name}")
        sys.modules[submodule.__name__] = submodule
        setattr(package, name, submodule)


def install_operators() -> None:
    """Make missing operators of sgl_kernel's CPU build refuse to be called, instead of to be named; imports torch.

    For stock SGLang only: its processors of Qwen's images import modules that take such operators by name when loaded
    (``fused_sigmoid_mul_cpu`` in models.qwen3_5, among others).
    """
    import torch

    class Operators(type(torch.ops.sgl_kernel)):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if not name.endswith("_cpu"):
                    raise
                return _refuse(f"torch.ops.{_PACKAGE}.{name}")

    torch.ops.sgl_kernel = Operators(_PACKAGE)


def _real_one_loads() -> bool:
    """Return whether importing the installed package would succeed, without the seconds of importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        return False
    # sgl_kernel.load_utils._load_architecture_specific_ops: CUDA builds keep common_ops in sm90/, sm100/.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(folder.glob("sm*/common_ops.*") for folder in folders):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class _StandIn(ModuleType):
    """A module in which every public name is a function that refuses to be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, doc="Stand-in of anchortp-sglang: the real module cannot load here.")
        # importlib.util.find_spec() raises ValueError for a loaded module without a spec.
        self.__spec__ = ModuleSpec(name, loader=None)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):  # __path__, __file__, __version__: "absent" is true
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _refuse(f"{self.__name__}.{name}")


def _refuse(qualified_name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{qualified_name} was called, but sgl_kernel cannot load on this machine (no libcuda.so.1): "
            "this model or flag needs a GPU, or the CPU build of sgl_kernel"
        )

    refuse.__name__ = refuse.__qualname__ = qualified_name.rpartition(".")[2]
    return refuse
