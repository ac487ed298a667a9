"""The page table inside SGLang: rank 0 keeps it, every rank of the next generation rebuilds its tree from it."""

import array
import time
from typing import Any

import numpy as np
import torch

from anchortp_sglang.elastic.attachment import HOST_DEVICE, PAGE_TABLE_SEGMENT, Attachment
from anchortp_sglang.memory.page_table import PageTable

FEW_REQUESTS = 64
"""Up to this batch size a loop in Python commits a decode step sooner than numpy does (measured in a live server)."""

_table: PageTable | None = None
"""Rank 0's table; None on the other ranks, where there is no attachment, and while a new generation reads it."""

_to_restore: PageTable | None = None
"""The last generation's table. Ranks rebuild their trees from it at their own pace, so nobody writes to it yet."""

_allocator: Any = None
"""Of the slots of ``_to_restore``."""

rebuilt: dict[str, float] = {}
"""What the rebuild at start found: kept slots and chains, seconds. Reported with "ready"."""


def namespace(attachment: Attachment) -> bytes:
    """Ties a table to what its KV was computed with: the checkpoint and its dtype."""
    at = attachment.assignment
    return f"{at.checkpoint}\0{at.model.dtype}".encode()


def open_table(attachment: Attachment) -> None:
    """Map the page table, or start an empty one when nothing may be restored. Call before the pools are built."""
    global _table, _to_restore
    at = attachment.assignment
    writable = at.rank == 0
    if not (writable or at.restore_prefixes):
        return
    memory = attachment.map(HOST_DEVICE, PAGE_TABLE_SEGMENT, writable=writable)
    if at.restore_prefixes:
        _to_restore = PageTable.attach(memory, at.kv.rows, namespace(attachment))
    else:
        _table = PageTable.create(memory, at.kv.rows, namespace(attachment))


def before_free(allocator: Any, slots: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE TokenToKVPoolAllocator.free: whatever these slots hold is forgotten before anyone can have them anew.

    Only rank 0 writes the table, yet no peer can be ahead of it: the vocabulary-parallel embedding's all-reduce,
    which rank 0 joins after it has freed and allocated, comes before any layer's first KV write.
    """
    if _table is not None and allocator.free_group is None and slots.numel():
        _table.invalidate(slots.numpy())


def before_process_batch_result(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler.process_batch_result: the forward pass has returned, so its KV is complete; commit it.

    A last-layer all-reduce that rank 0 has left comes after every rank's last KV write.
    """
    if _table is None or batch is None or not batch.reqs:
        return
    if batch.forward_mode.is_decode():
        _commit_decode(_table, batch, scheduler.req_to_token_pool.req_to_token)
    elif batch.forward_mode.is_extend():
        _commit_extend(_table, batch, scheduler.req_to_token_pool.req_to_token.numpy())


def _commit_decode(table: PageTable, batch: Any, rows: Any) -> None:
    # The input of this step is the last token that was put out; the new one is appended afterwards.
    if len(batch.reqs) <= FEW_REQUESTS:
        slots = memoryview(rows.numpy())
        for req in batch.reqs:
            row, end = req.kv.req_pool_idx, req.seqlen
            table.commit_token(slots[row, end - 1], req.output_ids[-1], slots[row, end - 2])
        return
    tokens = np.fromiter((req.output_ids[-1] for req in batch.reqs), np.int64, len(batch.reqs))
    pool = batch.req_pool_indices.numpy()
    last = batch.seq_lens.numpy() - 1
    rows = rows.numpy()
    table.commit_step(rows[pool, last], tokens, rows[pool, last - 1])


def _commit_extend(table: PageTable, batch: Any, rows: np.ndarray) -> None:
    for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        if req.extra_key is not None or req.cache_salt is not None or extend_len == 0:
            continue  # other namespaces are not restored; their decode steps then lack a known parent
        row = rows[req.kv.req_pool_idx]
        end = prefix_len + extend_len
        tokens = np.asarray(req.full_untruncated_fill_ids[prefix_len:end], np.int64)
        parent = int(row[prefix_len - 1]) if prefix_len else 0
        table.commit_run(row[prefix_len:end], tokens, parent)


def after_flush_cache(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AFTER Scheduler.flush_cache: what was flushed must not come back with the next generation."""
    if flushed and _table is not None:
        _table.invalidate(np.arange(1, _table.slots))
    return flushed


def after_build_kv_cache(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER kv_cache_builder.build_kv_cache: the prefix tree of the last generation, from verified chains only."""
    global _allocator
    if _to_restore is None:
        return
    started = time.monotonic()
    kept = 0 if result.disable_radix_cache else _restore(_to_restore, result)
    _allocator = result.token_to_kv_pool_allocator
    rebuilt.update(slots=kept, seconds=time.monotonic() - started)


def start_writing() -> None:
    """On rank 0, once all ranks have rebuilt their trees: what is free now is forgotten, and frees are from now on."""
    global _table, _to_restore
    if _to_restore is not None:
        _to_restore.invalidate(_allocator.get_all_free_pages().numpy())
        _table, _to_restore = _to_restore, None


def _restore(table: PageTable, result: Any) -> int:
    """Mark the kept slots used and insert their chains, oldest first; equal on all ranks, as the table is."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    allocator, tree = result.token_to_kv_pool_allocator, result.tree_cache
    kept = table.kept_slots()
    free = allocator.free_pages
    allocator.free_pages = free[~torch.isin(free, torch.from_numpy(kept))]
    for chain in table.chains():
        tree.insert(
            InsertParams(
                key=RadixKey(array.array("q", chain.tokens.tolist())),
                value=torch.from_numpy(chain.slots),
                # Without it the tree frees the slots that it already holds (_insert_overlap_step).
                prev_prefix_len=chain.shared,
            )
        )
    return len(kept)
