"""Puts SGLang's KV buffers into the anchor's memory, with the same number of slots on every rank."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from anchortp_sglang.planning.intervals import total
from anchortp_sglang.planning.layout.kv_layout import held_heads
from anchortp_sglang.rank.attachment import Attachment, current


def around_create_buffers(original: Callable[..., Any], pool: Any) -> None:
    """AROUND MHATokenToKVPool._create_buffers_normal: use views of the anchor's memory, never zeroed on rebind.

    Like stock, K and V of a layer are two halves of one block of (2, rows, heads, head_dim); layers follow one another,
    each with as many heads as the rank has there, and of their size. Layers that read the KV of others come last, and
    have none.
    """
    attachment = current()
    if attachment is None:
        original(pool)
        return
    assignment, model = attachment.assignment, attachment.assignment.model
    full = (model.num_kv_heads, 2 * model.head_dim)  # of layers without a window, whose heads SGLang's pool has
    heads = max(
        total(held_heads(model, assignment.ownership, assignment.rank, layer))
        for layer, kv in enumerate(model.kv)
        if kv is not None and (kv.heads, kv.row) == full
    )
    shape = (assignment.kv.rows, heads, model.head_dim)
    _check_pool(pool, attachment, MHATokenToKVPool, shape, *pool._kv_buffer_shapes())
    pool.k_buffer, pool.v_buffer = [], []
    for k, v in _layers(pool, attachment):
        pool.k_buffer.append(k)
        pool.v_buffer.append(v)


def around_create_latent_buffers(original: Callable[..., Any], pool: Any) -> None:
    """AROUND MLATokenToKVPool._create_buffers: use such views for latents, of which every rank has all."""
    attachment = current()
    if attachment is None:
        original(pool)
        return
    assignment = attachment.assignment
    unit = assignment.kv.unit_bytes(assignment.model, 0) // assignment.kv.dtype_bytes
    _check_pool(
        pool,
        attachment,
        MLATokenToKVPool,
        (assignment.kv.rows, 1, unit),
        (pool.size + pool.page_size, 1, pool.kv_cache_dim),
    )
    pool.kv_buffer = [latents for (latents,) in _layers(pool, attachment)]


def _layers(pool: Any, attachment: Attachment) -> Iterator[torch.Tensor]:
    """Yield each layer's (planes, rows, heads, elements) of the store's dtype, in the anchor's memory."""
    layout = attachment.kv_layout
    flat, assignment = attachment.kv_tensor(), attachment.assignment
    if not (assignment.platform.new_memory_is_zero or assignment.restore_prefixes):
        flat.zero_()  # it may hold NaNs of its last owner, and attention reads those too
    for group in layout.groups:
        units = flat[group.offset_bytes : group.offset_bytes + layout.group_bytes(group)].view(pool.store_dtype)
        yield from units.view(*layout.shape(group), group.unit_bytes // pool.store_dtype.itemsize)


def _check_pool(
    pool: Any, attachment: Attachment, kind: type, planned: tuple[int, ...], *shapes: tuple[int, ...]
) -> None:
    """Raise RuntimeError unless SGLang's pool is of the planned kind and ``shapes``.

    A pool with separate sliding-window layers, for instance, is not.
    """
    layers, dtype_bytes = attachment.assignment.model.num_layers, attachment.assignment.kv.dtype_bytes
    found = (type(pool), pool.layer_num, pool.store_dtype.itemsize)
    if found != (kind, layers, dtype_bytes) or any(tuple(one) != planned for one in shapes):
        raise RuntimeError(
            f"the KV pool is {type(pool).__name__} {shapes} x {pool.layer_num} layers of {pool.store_dtype}; "
            f"the plan says {kind.__name__} {planned} x {layers} of {dtype_bytes} bytes"
        )


def around_resolve_memory_pool_config(
    original: Callable[..., Any], configurator: Any, pre_model_load_memory: Any
) -> Any:
    """AROUND KVCacheConfigurator._resolve_memory_pool_config: use the planned number of slots.

    Stock divides the free bytes by each rank's own bytes per token: with unequal heads the ranks would get unequal
    pools, and their allocators would no longer stay in lock step.
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
