"""SGLang's own allocator, prefix tree and request rows, driven as its scheduler drives them, beside our slot table.

Nothing computes: a forward pass is what a slot's KV was computed from, written down in ``written``.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from anchortp_sglang.hooks import table
from anchortp_sglang.kv.retained_slots import RetainedSlots, retain
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.rank import attachment
from anchortp_sglang.rank.kv import slot_table_hooks
from anchortp_sglang.rank.kv.prefixes import Prefixes, slots_of_pages

MODEL = b"model"
PLAIN = (None, None)
"""Neither extra key nor cache salt."""
MOST_RUNNING = 8
LONGEST = 96

Content = tuple[Any, ...]
"""A namespace, then all tokens up to one."""

IN_FLIGHT: Content = ()
"""Content of a slot that a launched step may be writing: it is unknown."""


@dataclass(eq=False)
class Step:
    """A launched batch, as ``Scheduler.process_batch_result`` gets it (``ScheduleBatch.copy``); what it computes."""

    forward_mode: Any
    reqs: list[Any]
    prefix_lens: list[int] = field(default_factory=list)
    extend_lens: list[int] = field(default_factory=list)
    out_cache_loc: Any = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    decoding_reqs: list[Any] | None = None
    computes: dict[int, Content] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    result: Any = None
    """Result of ``Scheduler.run_batch``, as far as the hooks read it."""

    def launch(self, overlap: bool) -> None:
        self.result = SimpleNamespace(copy_done=None)
        if overlap:
            self.result.copy_done = SimpleNamespace(synchronize=lambda: None)
            streams = SimpleNamespace(
                copy_stream=SimpleNamespace(wait_stream=lambda other: None),
                copy_stream_ctx=nullcontext(),
                forward_stream=None,
            )
            slot_table_hooks.before_copy_result_to_cpu(streams, self.result, self)
            self.out_cache_loc = None  # the copy alone may be read


def publish() -> None:
    """Publish the configuration that SGLang's requests and memory read."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    runtime_context.publish(
        ServerArgs(model_path="none", device="cpu"),
        role="scheduler",
        ranks=runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0),
    )


@contextmanager
def hooked_memory() -> Iterator[None]:
    """Our hooks into SGLang's memory, from the table of hooks."""
    publish()
    with pytest.MonkeyPatch.context() as patch:
        for hook in table.HOOKS:
            if hook.function.__module__ == slot_table_hooks.__name__ and ".mem_cache." in hook.target:
                module, owner, name = hook.target.rsplit(".", 2)
                if owner[0].isupper():
                    of = getattr(importlib.import_module(module), owner)
                    patch.setattr(of, name, _wrapped(hook, getattr(of, name)))
        patch.setattr(attachment, "_current", SimpleNamespace(prefixes=None))
        yield


def _wrapped(hook: table.Hook, original: Any) -> Any:
    def before(*args: Any, **kwargs: Any) -> Any:
        hook.function(*args, **kwargs)
        return original(*args, **kwargs)

    def around(*args: Any, **kwargs: Any) -> Any:
        return hook.function(original, *args, **kwargs)

    return {"before": before, "around": around}[hook.kind]


class Server:
    """One generation: its memory, its requests, and its prefixes; its slot table is in ``buffer``."""

    def __init__(self, slots: int, page_size: int, core: str, overlap: bool = False, mixed: bool = False) -> None:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.overlap, self.in_flight = overlap, None
        self.mixed = mixed  # --enable-mixed-chunk
        self.writer: dict[int, Step] = {}
        self.page_size = page_size
        self.rows = slots + page_size
        rest: tuple[Any, ...] = (torch.float32, "cpu", None, False)
        self.allocator: Any = (
            TokenToKVPoolAllocator(slots, *rest)
            if page_size == 1
            else PagedTokenToKVPoolAllocator(slots, page_size, *rest)
        )
        self.requests_rows = ReqToTokenPool(MOST_RUNNING + 1, LONGEST, "cpu", False)
        self.tree: Any = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.requests_rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=page_size,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        self.prefixes: Any = None
        self.running: list[Any] = []
        self.chunked: Any = None
        self.written: dict[int, Content] = {}
        self.committed_len: dict[str, int] = {}
        self.promised: set[Content] = set()
        """What a kill at this instant must not cost: chains up to the ends of whole pages."""

    # --- a generation begins

    def start_empty(self, buffer: bytearray) -> None:
        self._begin(buffer)
        self.prefixes.build(self._built())
        self.prefixes.start_writing()

    def take_over(self, buffer: bytearray, written: dict[int, Content]) -> RetainedSlots:
        """What a new rank does before it is ready; rank 0 has yet to ``start_writing``."""
        self._begin(buffer)
        table = SlotTable.attach(buffer, self.rows, MODEL)
        retained = retain(table.entries(), None, self.rows, self.page_size)
        self.prefixes.restore(SimpleNamespace(start=lambda: None, retained=lambda: retained), table)
        self.prefixes.build(self._built())
        self.written = {slot: written[slot] for slot in retained.slots.tolist()}
        self.promised = self._committed()
        return retained

    def _begin(self, buffer: bytearray) -> None:
        self.prefixes = Prefixes(0, self.rows, MODEL, buffer, CpuPlatform())
        held = attachment.current()
        assert held is not None
        held.prefixes = self.prefixes

    def _built(self) -> Any:
        """What kv_cache_builder.build_kv_cache returns, as far as ours reads it."""
        return SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator, tree_cache=self.tree, disable_radix_cache=False
        )

    # --- batches

    def prefill(self, requests: Sequence[Any], budget: int) -> list[Any]:
        """One batch of new or retracted requests, after what is left of a chunked one; those that found no room.

        ``budget``: how many tokens it may compute; the last request that gets any may be cut into chunks.
        """
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        waiting, batch = list(requests), []
        if self.chunked is not None:
            if self.chunked.extend_end > self.chunked.prefix_len:
                checkpoint_kv_cache(self.chunked, self.tree)  # as stash_chunked_request does
            self.chunked.init_next_round_input()
            left = self._extend(self.chunked, budget)
            batch, budget = ([self.chunked], left) if left is not None else ([], 0)
        while waiting and budget and len(batch) < 4 and len(batch) + len(self.running) < MOST_RUNNING:
            req = waiting[0]
            req.init_next_round_input(self.tree)
            req.lock = self.tree.lock(req.last_node)
            left = self._extend(req, budget)
            if left is None:
                self.tree.unlock(req.lock)
                req.lock = None
                break
            batch.append(waiting.pop(0))
            budget = left
        self._run(self._launch_prefill(batch) if batch else None)
        return waiting

    def _extend(self, req: Any, budget: int) -> int | None:
        """Take slots for a prefill, or for a chunk of whole pages; what is left of the budget, None if nothing fits."""
        start, whole = req.prefix_len, len(req.full_untruncated_fill_ids) - req.prefix_len
        n = whole if whole <= budget else budget // self.page_size * self.page_size
        if n == 0 or not self._make_room(n + self.page_size):
            return None
        if req.kv.holds_kv:
            prefix = self.requests_rows.req_to_token[req.kv.req_pool_idx, :start].long()
        else:
            prefix = self.tree.prefix_device_indices(req)[:start]
        end = start + n
        if self.page_size == 1:
            slots = self.allocator.alloc(n)
        else:
            ends = [torch.tensor([each], dtype=torch.int64) for each in (start, end)]
            last = prefix[-1:] if start else torch.tensor([-1])
            slots = self.allocator.alloc_extend(ends[0], ends[0], ends[1], ends[1], last, n)
        self.requests_rows.alloc([req])
        row = req.kv.req_pool_idx
        self.requests_rows.write((row, slice(0, start)), prefix.to(torch.int32))
        self.requests_rows.write((row, slice(start, end)), slots.to(torch.int32))
        req.is_retracted = False
        req.extend_end = req.kv.kv_allocated_len = req.kv.kv_committed_len = end
        return budget - n if n == whole else 0

    def _launch_prefill(self, batch: list[Any]) -> Step:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        step = Step(
            ForwardMode.EXTEND,
            batch,
            prefix_lens=[req.prefix_len for req in batch],
            extend_lens=[req.extend_end - req.prefix_len for req in batch],
        )
        rows = self.requests_rows.req_to_token
        step.out_cache_loc = torch.cat([rows[r.kv.req_pool_idx, r.prefix_len : r.extend_end].long() for r in batch])
        self.chunked = None
        if self.mixed and (decoding := self._may_decode()):
            self._decode_in(step, decoding)
        for req in batch:
            self._compute(step, req, req.prefix_len, req.extend_end)
            if req.extend_end < len(req.full_untruncated_fill_ids):
                self.chunked = req
            else:
                step.sampled[req.rid] = _sample(req)
                self.running.append(req)
        return step

    def decode(self) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        batch = self._may_decode()
        step = Step(ForwardMode.DECODE, []) if batch else None
        if step is not None:
            self._decode_in(step, batch)
        self._run(step)

    def _may_decode(self) -> list[Any]:
        """Requests that can take a slot each now."""
        batch = [req for req in self.running if not self._ends_with_the_step_in_flight(req)]
        return batch if self._make_room(len(batch) * self.page_size) else []

    def _decode_in(self, step: Step, batch: list[Any]) -> None:
        """Compute one more token of each request of ``batch`` in ``step``, after what is prefilled in it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lens = torch.tensor([len(computed(req)) for req in batch])
        rows = torch.tensor([req.kv.req_pool_idx for req in batch])
        if self.page_size == 1:
            slots = self.allocator.alloc(len(batch))
        else:
            slots = self.allocator.alloc_decode(lens, lens, self.requests_rows.req_to_token[rows, lens - 2].long())
        self.requests_rows.write((rows, lens - 1), slots.to(torch.int32))
        step.out_cache_loc = torch.cat([step.out_cache_loc, slots])
        step.reqs = [*step.reqs, *batch]
        if step.forward_mode.is_extend():
            step.forward_mode, step.decoding_reqs = ForwardMode.MIXED, batch
            step.prefix_lens += [length - 1 for length in lens.tolist()]
            step.extend_lens += [1] * len(batch)
            for req, length in zip(batch, lens.tolist(), strict=True):  # mix_with_running
                req.refresh_fill_ids()
                req.extend_end = length
        for req, length in zip(batch, lens.tolist(), strict=True):
            req.kv.kv_allocated_len = req.kv.kv_committed_len = length
            self._compute(step, req, length - 1, length)
            step.sampled[req.rid] = _sample(req)

    def _ends_with_the_step_in_flight(self, req: Any) -> bool:
        """Whether the scheduler knows it (``_reqs_finishing_inflight``): it cannot foresee a stop token."""
        most = req.sampling_params.max_new_tokens
        return (
            self.in_flight is not None
            and req in self.in_flight.reqs
            and not stops_by_token(req)
            and len(req.output_ids) + 1 >= most
        )

    def _run(self, launched: Step | None) -> None:
        """Process the result of the step that was launched; with overlap, of the one before."""
        if launched is not None:
            launched.launch(self.overlap)
        if self.overlap:
            launched, self.in_flight = self.in_flight, launched
        if launched is not None:
            self._process(launched)

    def _process(self, step: Step) -> None:
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        for slot, content in step.computes.items():
            if self.writer[slot] is step:
                self.written[slot] = content
        ended = [req for req in step.reqs if req.finished() or req.is_retracted]
        slot_table_hooks.before_process_batch_result(
            SimpleNamespace(req_to_token_pool=self.requests_rows), step, step.result
        )
        going_on = [req for req in step.reqs if req not in ended]
        for req in going_on:
            self.committed_len[req.rid] = step.ends[req.rid]
        self.promised = self._committed(going_on)
        self.allocator.free_group_begin()
        for req in going_on:
            if req.rid not in step.sampled:
                continue  # the last chunk is still to come
            req.output_ids.append(step.sampled[req.rid])
            prefilled = step.forward_mode.is_extend() and req not in (step.decoding_reqs or ())
            if not self._end_if_done(req) and prefilled:
                checkpoint_kv_cache(req, self.tree)
        self.allocator.free_group_end()

    def retract(self, req: Any) -> None:
        """A running request gives up its slots; it is to be prefilled again."""
        from sglang.srt.mem_cache.common import release_kv_cache

        self.running.remove(req)
        self.committed_len.pop(req.rid, None)
        self.promised = self._committed()
        release_kv_cache(req, self.tree, checkpoint=False)
        req.reset_for_retract()
        if self.overlap:
            self.decode()  # the rest of the same turn: what the step in flight sampled for it is dropped
        del req.ahead[:]

    def evict(self, tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.promised = self._committed(cached=False)
        self.tree.evict(EvictParams(num_tokens=tokens))
        self.promised = self._committed()

    def _make_room(self, tokens: int) -> bool:
        if (missing := tokens - self.allocator.available_size()) > 0:
            self.evict(missing)
        return bool(self.allocator.available_size() >= tokens)

    def _compute(self, step: Step, req: Any, start: int, end: int) -> None:
        tokens = computed(req)
        step.ends[req.rid] = end
        for at in range(start, end):
            slot = int(self.requests_rows.req_to_token[req.kv.req_pool_idx, at])
            step.computes[slot] = ((req.extra_key, req.cache_salt), *tokens[: at + 1])
            self.writer[slot] = step
            self.written[slot] = IN_FLIGHT

    def _end_if_done(self, req: Any) -> bool:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.srt.mem_cache.common import release_kv_cache

        del req.ahead[:1]
        most = req.sampling_params.max_new_tokens
        if len(req.output_ids) < most:
            return False
        req.finished_reason, req.finished_len = FINISH_LENGTH(most), most
        release_kv_cache(req, self.tree, checkpoint=True)
        self.running.remove(req)
        return True

    # --- what is where

    def _free(self) -> set[int]:
        return set(slots_of_pages(self.allocator.get_all_free_pages(), self.page_size).tolist())

    def _committed(self, batch: Sequence[Any] = (), cached: bool = True) -> set[Content]:
        """Of what is running (or in ``batch``), computed in chunks so far, or cached."""
        slots = set(self.tree.all_values_flatten().tolist()) if cached else set()
        for req in (*self.running, *batch, *([self.chunked] if self.chunked is not None else [])):
            row = self.requests_rows.req_to_token[req.kv.req_pool_idx]
            slots |= set(row[: self.committed_len.get(req.rid, 0)].tolist())
        whole: set[Content] = set()  # without what is below a token that is still being computed
        for content in sorted(filter(None, (self.written[slot] for slot in slots)), key=len):
            if len(content) == 2 or content[:-1] in whole:
                whole.add(content)
        return {content for content in whole if (len(content) - 1) % self.page_size == 0}

    def check(self) -> None:
        """Allocator, tree and table agree."""
        table = self.prefixes.table
        assert table is not None
        entries = table.entries()
        known = set(np.flatnonzero(entries.hashes).tolist()) - {0}
        free = self._free()
        assert known.isdisjoint(free), "a free slot has an entry"
        lost = known - set(np.flatnonzero(entries.verified()).tolist())
        assert all(self._awaits(slot, entries) for slot in lost), "an entry has lost its parent"
        cached = {slot for slot in self.tree.all_values_flatten().tolist() if self.written[slot] != IN_FLIGHT}
        assert known >= cached, "what the tree holds is not known"
        for slot in known - lost:
            above = entries.parents[slot]
            content = self.written[slot]
            assert content != IN_FLIGHT, "a slot that is being written has an entry"
            assert entries.tokens[slot] == content[-1]
            assert above <= 0 or self.written[int(above)] == content[:-1]

    def _awaits(self, slot: int, entries: Any) -> bool:
        """Whether a slot is, or is below, one that will be moved below the slot of a token that is being computed."""
        awaiting = dict(self.prefixes._pending_moves)
        while slot not in awaiting and slot > 0 and entries.hashes[slot]:
            slot = int(entries.parents[slot])
        return slot in awaiting and self.written[awaiting[slot]] == IN_FLIGHT


def new_request(name: str, tokens: Sequence[int], key: tuple[str | None, str | None], outputs: int) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=outputs)
    req = Req(name, "", array("q", tokens), sampling, extra_key=key[0], cache_salt=key[1])
    req.ahead = []  # tokens that a launched step has sampled, and the scheduler has not seen
    return req


def computed(req: Any) -> tuple[int, ...]:
    """All tokens of a request that the device has."""
    return (*req.origin_input_ids, *req.output_ids, *req.ahead)


def stops_by_token(req: Any) -> bool:
    """Whether its end comes unforeseen. Every other request's does."""
    return bool(req.sampling_params.max_new_tokens % 2)


def _sample(req: Any) -> int:
    # Of few tokens, and the same for the same input: requests with equal prompts stay equal.
    token = sum(computed(req)) % 3
    req.ahead.append(token)
    return token
