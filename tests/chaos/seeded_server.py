"""A server whose ranks draw tokens with each request's seed, as on a GPU with --enable-deterministic-inference.

SGLang 0.5.23 refuses the flag on CPUs: torch_native is not in its lists, its hash there is an op of the CPU build of
sgl_kernel, and its batch-invariant kernels are for GPUs. The sampling code (layers/sampler.py) is SGLang's own.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from anchortp_sglang import launch_server
from anchortp_sglang.hooks import preload

if TYPE_CHECKING:
    import torch  # not before launch_server has set its number of threads

_LOW = 0xFFFFFFFF


def murmur_hash32(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The hash of (seed, position, column) as a [rows, columns] tensor; as in kernels/ops/sampling/murmur_hash.py."""
    seed, position = seeds.long(), positions.long()
    state = seed * 0
    for word in (seed & _LOW, (seed >> 32) & _LOW, position & _LOW):
        state = _mix(state, word)
    state = _mix(state[:, None], columns.long()[None, :]) ^ 16
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    """``value * factor`` modulo 2**32, without an overflow of int64."""
    return (((value >> 16) * factor & 0xFFFF) * 65536 + (value & 0xFFFF) * factor) & _LOW


def _rotated(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _LOW


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotated(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_times(_rotated(state ^ word, 13), 5) + 0xE6546B64) & _LOW


_kept: list[object] = []


@functools.cache
def allow() -> None:
    """Let SGLang, which is imported by now, take --enable-deterministic-inference on the CPU."""
    import torch
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seeds, Tensor positions, Tensor columns) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _kept.append(library)


if __name__ == "__main__":
    import_sglang = preload.import_sglang
    preload.import_sglang = lambda: (import_sglang(), allow())
    launch_server.main(sys.argv[1:])
