"""KV buffers in the anchor's memory, of the same number of slots on every rank."""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from anchortp_sglang.elastic.attachment import Attachment, current, kv_segment


def around_create_buffers(original: Callable[..., Any], pool: Any) -> None:
    """AROUND MHATokenToKVPool._create_buffers_normal: views of the anchor's memory, never zeroed on rebind.

    Like stock, K and V of a layer are two halves of one block of (2, rows, heads, head_dim).
    """
    attachment = current()
    if attachment is None:
        original(pool)
        return
    shape = _check_pool(pool, attachment)
    at = attachment.assignment
    memory = attachment.map(at.device, kv_segment(at.ownership), writable=True)
    blocks = torch.frombuffer(memory, dtype=pool.store_dtype).view(pool.layer_num, 2, *shape)
    pool.k_buffer = [blocks[layer, 0] for layer in range(pool.layer_num)]
    pool.v_buffer = [blocks[layer, 1] for layer in range(pool.layer_num)]


def _check_pool(pool: Any, attachment: Attachment) -> tuple[int, ...]:
    at = attachment.assignment
    k_shape, v_shape = pool._kv_buffer_shapes()
    planned = (at.kv.rows, at.ownership.units("kv_head", at.rank), at.model.head_dim)
    found = (type(pool), k_shape, v_shape, pool.layer_num, pool.store_dtype.itemsize)
    if found != (MHATokenToKVPool, planned, planned, at.model.num_layers, at.kv.dtype_bytes):
        raise RuntimeError(
            f"the KV pool is {type(pool).__name__} {k_shape} x {pool.layer_num} layers of {pool.store_dtype}; "
            f"the plan says {planned} x {at.model.num_layers} of {at.kv.dtype_bytes} bytes"
        )
    return planned


def around_resolve_memory_pool_config(
    original: Callable[..., Any], configurator: Any, pre_model_load_memory: Any
) -> Any:
    """AROUND KVCacheConfigurator._resolve_memory_pool_config: the planned number of slots.

    Stock divides the free bytes by each rank's own bytes per token: with unequal heads the ranks would get
    unequal pools and their lock-step allocators would part ways.
    """
    attachment = current()
    if attachment is None:
        return original(configurator, pre_model_load_memory)
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator

    plan = attachment.assignment.kv
    sizes = create_memory_pool_configurator(configurator)
    config = sizes.calculate_pool_sizes_from_max_tokens(plan.slots, plan.page_size)
    config.max_running_requests = configurator.resolve_max_num_reqs(config.max_total_num_tokens)
    return sizes.finalize_with_max_running_requests(config)
