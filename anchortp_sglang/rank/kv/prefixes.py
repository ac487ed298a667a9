"""The slot table inside SGLang: rank 0 keeps it, every rank of the next generation rebuilds its tree from it."""

import array
import hashlib
import time
from typing import Any

import numpy as np
import torch

from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.retained_slots import RetainedSlots
from anchortp_sglang.kv.slot_table import SlotTable, SlotTableMismatch
from anchortp_sglang.rank.attachment import HOST_DEVICE, Attachment, current, slot_table_segment
from anchortp_sglang.rank.kv.mirroring import Mirroring, open_mirroring
from anchortp_sglang.rank.kv.restore import Restoration, RestorationFailed

FEW_REQUESTS = 64
"""Up to this batch size a loop in Python commits a decode step sooner than numpy does (measured in a live server)."""

_table: SlotTable | None = None
"""Rank 0's table; None on the other ranks, where there is no attachment, and until ``start_writing``."""

_next: SlotTable | None = None
"""On rank 0 the table to be written once all ranks are ready. The last generation's table, if it is the same one, is
still read by the others: they rebuild their trees at their own pace."""

_table_memory: Any = None
_restoration: Restoration | None = None
_mirroring: Mirroring | None = None

_platform: Any = None
"""This rank's ``platforms.base.Platform``; set before any table is."""

_allocator: Any = None
"""Of the slots of ``_next``, when they are kept ones."""

_freed: list[np.ndarray] | None = None
"""Slots to be forgotten when the request that has lost them to the tree has been moved to the tree's; else None."""

rebuilt: dict[str, Any] = {}
"""What the rebuild at start found, for the report with "ready": how many slots were ``kept``, ``dropped`` (by the
reason) and ``restored`` (lost heads read back), bytes moved, seconds, and the ``digest`` that must be the same on all
ranks."""


def open_table(attachment: Attachment) -> None:
    """Map KV and slot table; begin to keep what may be kept of the last generation's. Before the pools are built."""
    global _next, _table_memory, _restoration, _mirroring, _platform
    at = attachment.assignment
    _platform = at.platform
    kv = KVSegment(attachment.kv_memory(), attachment.kv_layout) if _platform.moves_kv else None
    segment = slot_table_segment(at.ownership, at.kv)
    _table_memory = attachment.map(HOST_DEVICE, segment, writable=at.rank == 0)
    _mirroring = open_mirroring(attachment, kv, _table_memory) if kv else None
    if not at.restore_prefixes:
        if at.rank == 0:
            _next = SlotTable.create(_table_memory, at.kv.rows, attachment.namespace)
        return
    assert at.previous is not None
    old = slot_table_segment(at.previous.ownership, at.previous_kv)
    memory = _table_memory if old == segment else attachment.map_briefly(HOST_DEVICE, old)
    try:
        table = SlotTable.attach(memory, at.previous_kv.rows, attachment.namespace)
    except SlotTableMismatch as error:
        raise RestorationFailed(str(error)) from error
    if at.rank == 0 and old == segment:
        _next = table
    _restoration = Restoration(attachment, table, kv)
    _restoration.start()


def before_free(allocator: Any, slots: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE TokenToKVPoolAllocator.free: whatever these slots hold is forgotten before anyone can have them anew.

    Only rank 0 writes the table, yet no peer can be ahead of it: the vocabulary-parallel embedding's all-reduce,
    which rank 0 joins after it has freed and allocated, comes before any layer's first KV write.
    """
    if _table is not None and allocator.free_group is None and slots.numel():
        _forget(_table, slots.cpu().numpy())


def after_whole_embedding(embedded: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AFTER Gemma3TextScaledWordEmbedding.forward: where every rank has all rows there is no such all-reduce. Without
    one a peer could write KV into a slot that rank 0 has not freed yet."""
    if current() is not None:
        from sglang.srt.distributed import tensor_model_parallel_all_reduce

        tensor_model_parallel_all_reduce(torch.zeros(1, device=embedded.device))
    return embedded


def before_release_page_ids(allocator: Any, *page_ids: Any) -> None:
    """BEFORE PagedTokenToKVPoolAllocator._release_page_ids: the same with pages of several slots."""
    if _table is not None:
        for pages in page_ids:
            _forget(_table, _slots_of_pages(pages, allocator.page_size))


def _forget(table: SlotTable, slots: np.ndarray) -> None:
    if _freed is None:
        table.invalidate(slots)
    else:
        _freed.append(slots)


def around_checkpoint_into_tree(original: Any, tree: Any, req: Any, *, up_to: int, **kwargs: Any) -> Any:
    """AROUND UnifiedRadixCache.checkpoint_into_tree: tokens that the tree has from another request go on in its slots.

    The request's own slots of these tokens are freed. What comes after them is hung on the tree's slots first, so that
    its chain is intact at every instant.
    """
    global _freed
    if _table is None or not req.kv.holds_kv:
        return original(tree, req, up_to=up_to, **kwargs)
    row = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx, req.kv.cache_protected_len : up_to]
    before = row.cpu().numpy().copy()
    _freed = []
    try:
        result = original(tree, req, up_to=up_to, **kwargs)
        after = row.cpu().numpy()
        replaced = before != after
        last = np.flatnonzero(replaced[:-1] & ~replaced[1:])
        if last.size:
            _table.move_below(after[last + 1], after[last])
    finally:
        freed, _freed = _freed, None
        for slots in freed:
            _table.invalidate(slots)
    return result


def _slots_of_pages(pages: Any, page_size: int) -> np.ndarray:
    return (pages.cpu().numpy()[:, None] * page_size + np.arange(page_size)).ravel()


def before_process_batch_result(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler.process_batch_result: the forward pass has returned, so its KV is complete; commit it.

    A last-layer all-reduce that rank 0 has left comes after every rank's last KV write. Where to return is only to have
    been launched, wait for it, as SGLang will do next to read the tokens.
    """
    if _table is None or batch is None or not batch.reqs:
        return
    rows = scheduler.req_to_token_pool.req_to_token
    _platform.wait_for_forward()
    if batch.forward_mode.is_decode():
        _commit_decode(_table, batch, rows)
    elif batch.forward_mode.is_extend():
        _commit_extend(_table, batch, rows)


def _commit_decode(table: SlotTable, batch: Any, rows: torch.Tensor) -> None:
    # The input of this step is the last token that was put out; the new one is appended afterwards.
    if len(batch.reqs) <= FEW_REQUESTS and _platform.in_host_memory:
        slots = memoryview(rows.numpy())
        places = ((req.kv.req_pool_idx, req.seqlen, req.output_ids[-1]) for req in batch.reqs)
        table.commit_tokens((slots[row, end - 1], token, slots[row, end - 2]) for row, end, token in places)
        return
    tokens = np.fromiter((req.output_ids[-1] for req in batch.reqs), np.int64, len(batch.reqs))
    last = batch.seq_lens - 1
    slots, parents = (rows[batch.req_pool_indices, at].cpu().numpy() for at in (last, last - 1))
    table.commit_step(slots, tokens, parents)


def _commit_extend(table: SlotTable, batch: Any, rows: torch.Tensor) -> None:
    for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        if extend_len == 0:
            continue
        row = rows[req.kv.req_pool_idx]
        end, before = prefix_len + extend_len, min(prefix_len, 1)
        slots = row[prefix_len - before : end].cpu().numpy()
        tokens = np.asarray(req.full_untruncated_fill_ids[prefix_len:end], np.int64)
        # RadixKey takes an empty cache salt for none.
        parent = int(slots[0]) if before else table.root_of((req.extra_key, req.cache_salt or None))
        if parent is not None:
            table.commit_run(slots[before:], tokens, parent)


def after_flush_cache(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AFTER Scheduler.flush_cache: what was flushed must not come back with the next generation."""
    if flushed and _table is not None:
        _table.invalidate(np.arange(1, _table.slots))
    return flushed


def after_build_kv_cache(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER kv_cache_builder.build_kv_cache: the prefix tree of the last generation, from verified chains only."""
    global _allocator, _next
    attachment = current()
    if attachment is None or _restoration is None:
        return
    started = time.monotonic()
    kept = _restoration.kept()
    _allocator = result.token_to_kv_pool_allocator
    reusable = not result.disable_radix_cache
    if reusable:
        _insert(kept, result)
    at = attachment.assignment
    if at.rank == 0 and _next is None:
        _next = SlotTable.create(_table_memory, at.kv.rows, attachment.namespace)
        _next.write_entries(kept.entries)
    free = hashlib.blake2b(_free_slots().tobytes(), digest_size=8).hexdigest()
    ended = time.monotonic()
    rebuilt.update(
        kept=len(kept.slots) if reusable else 0,
        dropped=kept.dropped | ({} if reusable else {"no_prefix_cache": len(kept.slots)}),
        seconds=ended - started,
        at=ended,
        digest=f"{kept.digest()}-{free}",
    )


def finish() -> float:
    """Wait until the kept KV is in place; when it was (monotonic seconds, 0 if there was none)."""
    attachment = current()
    if _mirroring is not None and attachment is not None and attachment.assignment.rank != 0:
        _mirroring.start()
    if _restoration is None:
        return 0.0
    _restoration.wait()
    rebuilt.update(restored=_restoration.restored_slots, moved_bytes=_restoration.moved)
    return _restoration.finished_at


def start_writing() -> None:
    """On rank 0, once all ranks have rebuilt their trees: what is free now is forgotten, and frees are from now on."""
    global _table, _next
    if _next is None:
        return
    if _restoration is not None and _allocator is not None:
        # Before what they hung on is forgotten: where two slots had equal chains, one is kept.
        kept = _restoration.kept()
        parents = kept.entries.parents[kept.numbers]
        moved = _next.parents[kept.numbers] != parents
        _next.move_below(kept.numbers[moved], parents[moved])
        _next.invalidate(_free_slots())
    _table, _next = _next, None
    if _mirroring is not None:
        _mirroring.start()


def _free_slots() -> np.ndarray:
    """The allocator's free slots, in the order in which it will give them out."""
    return _slots_of_pages(_allocator.get_all_free_pages(), _allocator.page_size)


def _insert(kept: RetainedSlots, result: Any) -> None:
    """Mark the kept slots used and insert their chains, oldest first; equal on all ranks, as ``kept`` is."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    allocator, tree = result.token_to_kv_pool_allocator, result.tree_cache
    free = allocator.free_pages
    used = torch.from_numpy(kept.numbers[kept.numbers % allocator.page_size == 0] // allocator.page_size)
    allocator.free_pages = free[~torch.isin(free, used.to(free.device))]
    for chain in kept.chains():
        extra_key, cache_salt = kept.entries.namespace(chain)
        tree.insert(
            InsertParams(
                key=RadixKey(array.array("q", chain.tokens.tolist()), extra_key, cache_salt=cache_salt),
                value=torch.from_numpy(chain.slots).to(free.device),
                # Without it the tree frees the slots that it already holds (_insert_overlap_step).
                prev_prefix_len=chain.shared,
            )
        )
