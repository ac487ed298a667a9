"""Splits OLMo-2's norms of q and k, which span all heads: each rank has its heads' part, the mean is summed.

SGLang gathers q and k of all ranks, norms them whole and takes its part back, which requires equal parts.
"""

from collections.abc import Callable
from typing import Any

import torch

from anchortp_sglang.rank.attachment import Assignment, current

_SHARE = "_anchortp_kv_share"


def after_olmo2_attention_init(result: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER Olmo2Attention.__init__: make norms with the weights of this rank's heads."""
    attachment = current()
    if attachment is not None:
        from sglang.srt.layers.layernorm import RMSNorm

        eps = attention.config.rms_norm_eps
        attention.q_norm, attention.k_norm = RMSNorm(attention.q_size, eps=eps), RMSNorm(attention.kv_size, eps=eps)
        setattr(attention, _SHARE, _kv_share(attachment.assignment, attention.attn.layer_id))
    return result


def _kv_share(assignment: Assignment, layer: int) -> torch.Tensor:
    """Return the share of each of this rank's KV heads that counts for it: half, if another rank has the head too."""
    holders = [0] * assignment.model.num_kv_heads
    for rank in range(assignment.ownership.tp_size):
        for head in _kv_heads(assignment, rank, layer):
            holders[head] += 1
    return torch.tensor(
        [1 / holders[head] for head in _kv_heads(assignment, assignment.rank, layer)], dtype=torch.float32
    )


def _kv_heads(assignment: Assignment, rank: int, layer: int) -> list[int]:
    return [head for start, stop in assignment.ownership.of("kv_head", rank, layer) for head in range(start, stop)]


def around_apply_qk_norm(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]], attention: Any, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """AROUND Olmo2Attention._apply_qk_norm; ``q`` is (tokens, columns of this rank's query heads), ``k`` alike."""
    attachment = current()
    if attachment is None:
        return original(attention, q, k)
    from sglang.srt.distributed import tensor_model_parallel_all_reduce

    model = attachment.assignment.model
    q_squares = q.float().square().sum(-1)
    k_squares = k.float().square().unflatten(-1, (-1, model.head_dim)).sum(-1) @ getattr(attention, _SHARE)
    squares = tensor_model_parallel_all_reduce(torch.stack([q_squares, k_squares]))
    columns = squares.new_tensor([[model.num_q_heads], [model.num_kv_heads]]) * model.head_dim
    q_mean, k_mean = squares / columns
    return _normed(q, q_mean, attention.q_norm), _normed(k, k_mean, attention.k_norm)


def _normed(x: torch.Tensor, mean: torch.Tensor, norm: Any) -> torch.Tensor:
    """Norm like `RMSNorm.forward_native`, given the mean of the squares."""
    scaled = x.float() * torch.rsqrt(mean[:, None] + norm.variance_epsilon)
    return (scaled * norm.weight).to(x.dtype)
