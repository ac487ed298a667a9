"""Does ahead of a fault what ranks would do first: it would otherwise cost the next recovery a tenth of a second.

A forked process copies every page that it writes to, and torch prepares each kind of operation when it is first called.
None of it depends on what the child will be. ``warm_up`` is for an idle spare child: it must not run before the fork,
as it may start OpenMP's threads. ``read_ahead`` is for the process that forks.
"""

import contextlib
import linecache
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

_TOKENS, _HIDDEN, _HEAD = 16, 64, 32
_SEEDING = tuple(
    f"sglang.srt.{name}"
    for name in ("managers.scheduler", "managers.tp_worker", "model_executor.model_runner", "utils.common")
)
"""Modules on the stack when SGLang seeds torch, which then formats a trace of it with their lines."""


def read_ahead() -> None:
    """Read what each rank's start needs from files and another program, before the zygote is forked."""
    for name in _SEEDING:
        if (module := sys.modules.get(name)) is not None:
            linecache.getlines(str(module.__file__))
    if (common := sys.modules.get("sglang.srt.utils.common")) is not None:
        with contextlib.suppress(RuntimeError):
            common.parse_lscpu_topology()


def warm_up() -> None:
    """Do a little of a rank's start and first step, on tensors that are dropped."""
    torch.manual_seed(0)
    _process_groups()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            _forward(dtype)


def _process_groups() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.new_group([0], backend="gloo")
    dist.destroy_process_group()


def _forward(dtype: torch.dtype) -> None:
    rows = torch.ones(_TOKENS, _HIDDEN, dtype=dtype)
    hidden = F.embedding(torch.arange(_TOKENS), rows)
    hidden = hidden * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(dtype)
    query, key = F.linear(hidden, rows).view(1, _TOKENS, -1, _TOKENS).transpose(1, 2).chunk(2, dim=-1)
    attended = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    angle = torch.outer(torch.arange(_TOKENS).float(), torch.ones(_HEAD))
    rotated = torch.cat([hidden[:, :_HEAD] * angle.cos().to(dtype), hidden[:, _HEAD:] * angle.sin().to(dtype)], dim=-1)
    gated = F.silu(rotated) * hidden + attended.sum()
    buffer = torch.zeros(2 * _TOKENS, _HIDDEN, dtype=dtype)
    buffer[torch.arange(_TOKENS)] = gated
    logits = F.linear(buffer.index_select(0, torch.arange(_TOKENS)), rows)
    torch.argmax(torch.softmax(logits.float(), dim=-1), dim=-1).tolist()
    torch.isin(torch.arange(_TOKENS), torch.tensor([0, 3])).nonzero()
