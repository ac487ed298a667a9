"""Computes a few new tokens after a long prefix on torch_native as in decode, one query at a time.

torch_native computes an extend as if the prefix were new as well: for a token after 2,000 cached ones, attention of
2,001 queries. Every request that goes on with its KV after a recovery would pay that, and any prompt in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch

from anchortp_sglang.rank.attachment import current

_PREFIX_PER_TOKEN = 16
"""Ratio of prefix to new tokens from which an extend is short. Each of its tokens gathers K and V once more."""


def around_run_sdpa_forward_extend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    ends: torch.Tensor,
    prefixes: torch.Tensor,
    extends: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """AROUND TorchNativeAttnBackend._run_sdpa_forward_extend. ``query``, ``output``: [tokens, heads, head size]."""
    pool = (keys, values, req_to_token)
    short = extends * _PREFIX_PER_TOKEN <= prefixes
    if current() is None or encoder_lens is not None or not kwargs["causal"] or not short.any():
        return original(backend, query, output, *pool, rows, ends, prefixes, extends, encoder_lens, **kwargs)
    is_short = short.repeat_interleave(extends)
    few = torch.empty_like(output[is_short])
    output[is_short] = _decode(backend, query[is_short], few, pool, rows[short], ends[short], extends[short], kwargs)
    if not short.all():
        rest = (each[~short] for each in (rows, ends, prefixes, extends))
        long = torch.empty_like(output[~is_short])
        output[~is_short] = original(backend, query[~is_short], long, *pool, *rest, None, **kwargs)
    return output


def _decode(
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    pool: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    ends: torch.Tensor,
    extends: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Decode every token as the last one of its own request, which sees what is before it."""
    firsts = torch.cumsum(extends, 0) - extends
    of_request = torch.arange(len(query)) - firsts.repeat_interleave(extends)
    lengths = (ends - extends).repeat_interleave(extends) + of_request + 1
    rows, kwargs = rows.repeat_interleave(extends), kwargs | {"causal": False}
    attended: torch.Tensor = backend._run_sdpa_forward_decode(query, output, *pool, rows, lengths, None, **kwargs)
    return attended
