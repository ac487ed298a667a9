"""Keeps rank 0's slot table true: hooks enter what SGLang frees, computes, moves and flushes.

They find the table through ``attachment.current()``. Without an attachment, and on ranks that write no table, they
leave SGLang as it is. They run in every step of the scheduler.

A step is committed when its result is processed. With the overlap schedule (``Scheduler.event_loop_overlap``) the next
step has been launched by then, and three things follow:

- Slots that the launched step writes have no entry: they were invalidated when they were freed, before they were
  allocated for it, and they are committed with its own result. Rank 0 does all three in program order. Its peers cannot
  write earlier, as each forward pass begins with an all-reduce that rank 0's launch joins.
- A request that ended, or was retracted, while the step ran has given its row back, perhaps to another request: the
  step's token is not committed for it.
- A request that ends with a step still in flight leaves that step's slot in the tree, for its last token. The slot is
  committed with the result of that step, unless it has been freed by then (``Prefixes.commit_later``).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.rank.attachment import current
from anchortp_sglang.rank.kv.prefixes import slots_of_pages

FEW_REQUESTS = 64
"""Up to this batch size a loop in Python commits a decode step sooner than numpy does (measured in a live server)."""


def after_build_kv_cache(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER kv_cache_builder.build_kv_cache: insert the last generation's prefixes, from verified chains only.

    A rank that stands by does so when its generation is to run (``rank/main.py``).
    """
    attachment = current()
    if attachment is None:
        return
    attachment.cache = result
    if not attachment.standing_by:
        attachment.prefixes.build(result)


def before_free(allocator: Any, slots: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE TokenToKVPoolAllocator.free: forget what these slots hold before they can be allocated again.

    Only rank 0 writes the table, yet no peer can be ahead of it: the vocabulary-parallel embedding's all-reduce, which
    rank 0 joins after it has freed and allocated, comes before any layer's first KV write.

    On a GPU the copy waits for the schedule stream, on which SGLang frees and allocates. With the overlap schedule this
    stream waits for the launched step to have read what the scheduler shares with it (``_apply_war_barrier``): by the
    time that slots are freed the step before has ended, and graphs read first of all.
    """
    attachment = current()
    if attachment is None or attachment.prefixes.table is None:
        return
    if allocator.free_group is None and slots.numel():
        attachment.prefixes.forget(slots.cpu().numpy())


def before_release_page_ids(allocator: Any, *page_ids: Any) -> None:
    """BEFORE PagedTokenToKVPoolAllocator._release_page_ids: forget what their slots hold, like ``before_free``."""
    attachment = current()
    if attachment is None or attachment.prefixes.table is None:
        return
    for pages in page_ids:
        attachment.prefixes.forget(slots_of_pages(pages, allocator.page_size))


def after_whole_embedding(embedded: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AFTER Gemma3TextScaledWordEmbedding.forward: make an all-reduce, as other models' embeddings do.

    Here every rank has all rows. Without the all-reduce a peer could write KV into a slot that rank 0 has not freed
    yet.
    """
    if current() is not None:
        from sglang.srt.distributed import tensor_model_parallel_all_reduce

        tensor_model_parallel_all_reduce(torch.zeros(1, device=embedded.device))
    return embedded


def around_checkpoint_into_tree(original: Any, tree: Any, req: Any, *, up_to: int, **kwargs: Any) -> Any:
    """AROUND UnifiedRadixCache.checkpoint_into_tree: tokens in the tree from another request continue in its slots.

    The request's own slots of these tokens are freed. Their successors are moved below the tree's slots first, so that
    the chain is intact at every instant.
    """
    attachment = current()
    if attachment is None or attachment.prefixes.table is None or not req.kv.holds_kv:
        return original(tree, req, up_to=up_to, **kwargs)
    # Of a request that the step in flight decodes in a mixed batch, one token is not known yet.
    up_to = min(up_to, len(req.full_untruncated_fill_ids))
    start = max(req.kv.cache_protected_len - 1, 0)
    row = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:up_to]
    before = row.cpu().numpy().copy()
    with attachment.prefixes.forgetting_later():
        result = original(tree, req, up_to=up_to, **kwargs)
        after = row.cpu().numpy()
        replaced = before != after
        last = np.flatnonzero(replaced[:-1] & ~replaced[1:])
        if last.size:
            attachment.prefixes.move_below(after[last + 1], after[last])
    if after.size:
        req.anchortp_last_slot = int(after[-1])
    if up_to == req.seqlen and after.size > 1:  # the step that computes the last token is in flight
        attachment.prefixes.commit_later(int(after[-1]), req.full_untruncated_fill_ids[up_to - 1], int(after[-2]))
    return result


def before_copy_result_to_cpu(scheduler: Any, result: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler._copy_result_to_cpu: a step's slots reach the host with its tokens, behind the same event."""
    attachment = current()
    if attachment is None or attachment.prefixes.table is None:
        return
    scheduler.copy_stream.wait_stream(scheduler.forward_stream)
    with scheduler.copy_stream_ctx:
        result.anchortp_slots = batch.out_cache_loc.to("cpu", non_blocking=True)


def before_process_batch_result(scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler.process_batch_result: the step's forward pass is complete, and so is its KV; commit it.

    A last-layer all-reduce that rank 0 has left comes after every rank's last KV write. Where the pass may still run,
    wait for it, as SGLang does next to read the tokens.
    """
    attachment = current()
    if attachment is None or (table := attachment.prefixes.table) is None or batch is None or not batch.reqs:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    else:
        attachment.prefixes.platform.wait_for_forward()
    attachment.prefixes.commit_pending()
    if batch.forward_mode.is_extend():
        _commit_extend(table, batch, scheduler.req_to_token_pool.req_to_token)
    if decoding := _decoding(batch):
        slots = getattr(result, "anchortp_slots", batch.out_cache_loc)
        _commit_decode(table, decoding, slots[-len(decoding) :].tolist())


def _decoding(batch: Any) -> Sequence[Any]:
    """Return the requests of which a step computes the last output token: in a mixed batch the last ones."""
    if batch.forward_mode.is_decode():
        return batch.reqs
    return batch.decoding_reqs or () if batch.forward_mode.is_mixed() else ()


def _commit_decode(table: SlotTable, reqs: Sequence[Any], slots: Sequence[int]) -> None:
    # The input of this step is the last output token; the new one is appended afterwards.
    entered = []
    for req, slot in zip(reqs, slots, strict=True):
        if not (req.finished() or req.is_retracted):
            entered.append((slot, req.output_ids[-1], req.anchortp_last_slot))
            req.anchortp_last_slot = slot
    if len(entered) <= FEW_REQUESTS:
        table.commit_tokens(entered)
    else:
        table.commit_step(*np.array(entered, np.int64).T)


def _commit_extend(table: SlotTable, batch: Any, rows: torch.Tensor) -> None:
    extended = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    for req, prefix_len, extend_len in itertools.islice(extended, len(batch.reqs) - len(_decoding(batch))):
        if extend_len == 0 or req.finished() or req.is_retracted:
            continue
        row = rows[req.kv.req_pool_idx]
        end, before = prefix_len + extend_len, min(prefix_len, 1)
        slots = row[prefix_len - before : end].cpu().numpy()
        req.anchortp_last_slot = int(slots[-1])
        tokens = np.asarray(req.full_untruncated_fill_ids[prefix_len:end], np.int64)
        # RadixKey treats an empty cache salt as none.
        parent = int(slots[0]) if before else table.root_of((req.extra_key, req.cache_salt or None))
        if parent is not None:
            table.commit_run(slots[before:], tokens, parent)


def after_flush_cache(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AFTER Scheduler.flush_cache: flushed prefixes must not come back with the next generation."""
    attachment = current()
    if flushed and attachment is not None and (table := attachment.prefixes.table) is not None:
        attachment.prefixes.forget(np.arange(1, table.slots))
    return flushed
