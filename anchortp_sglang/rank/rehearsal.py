"""Lets a rank that stands by serve a few requests of its own, so that its first step for clients is not its first one.

A forked process copies each page that it first writes to, and much of SGLang and torch prepares itself when it is first
used: the first step took 30 ms longer. All ranks rehearse together, in SGLang's own loop. Nobody else notices:

- KV goes to small buffers that are then dropped. The pool's own are read-only;
- outputs go to sockets that are connected to nothing (``rank/standby.py``);
- nothing is logged, or counted for ``/metrics``. At the end the cache is flushed, as if nothing had been computed.
"""

import logging
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_REQUESTS, _PROMPT, _NEW = 4, 4, 3
_FIRST, _AGAIN, _LAST = 1, 20, 40
"""Turns of the loop: the first requests, the same ones with their prompts cached, and the end."""

_BUFFERS = ("k_buffer", "v_buffer", "kv_buffer")


class Rehearsal:
    """Turns of a scheduler's loop, counted; the same on all ranks, as each turn begins with a broadcast of rank 0."""

    def __init__(self, scheduler: Any, rank: int) -> None:
        self._scheduler, self._rank, self._turn = scheduler, rank, 0

    def pull(self, requests: list[Any] | None) -> list[Any] | None:
        """Return what this turn brings. ``requests``: what the sockets brought: none, or nothing at all."""
        self._turn += 1
        if self._turn == _LAST:
            self._scheduler.gracefully_exit = True  # the loop ends before the next turn
        return _requests(self._turn) if self._rank == 0 and self._turn in (_FIRST, _AGAIN) else requests


def rehearse(scheduler: Any, attachment: Any) -> None:
    """Let a scheduler serve for some turns. Raises RuntimeError if it is not idle then, and what its loop raises."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    with _own_buffers(pool, scheduler.page_size), _uncounted(), _silent():
        sleeper, scheduler.idle_sleeper = scheduler.idle_sleeper, None  # it sleeps in each idle turn
        attachment.rehearsal = Rehearsal(scheduler, attachment.assignment.rank)
        scheduler.run_event_loop()
        attachment.rehearsal, scheduler.idle_sleeper, scheduler.gracefully_exit = None, sleeper, False
        if not scheduler.flush_cache():
            raise RuntimeError(f"a rehearsal was not over after {_LAST} turns")


def _requests(turn: int) -> list[Any]:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    def request(number: int) -> Any:
        sampling = SamplingParams(max_new_tokens=_NEW, temperature=0.0, ignore_eos=True)
        sampling.normalize(None)
        return TokenizedGenerateReqInput(
            rid=f"rehearsal-{turn}-{number}",
            input_text="",
            input_ids=array("q", range(number, number + _PROMPT)),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=True,
        )

    return [request(number) for number in range(_REQUESTS)]


@contextmanager
def _own_buffers(pool: Any, page_size: int) -> Iterator[None]:
    """Give a KV pool buffers for the pages that the requests can take, twice as many as one round needs."""
    pages = 1 + 2 * _REQUESTS * (1 + -(-(_PROMPT + _NEW) // page_size))
    kept = {name: getattr(pool, name) for name in _BUFFERS if hasattr(pool, name)}
    for name, buffers in kept.items():
        own = [torch.zeros((pages * page_size, *each.shape[1:]), dtype=each.dtype) for each in buffers]
        setattr(pool, name, own)
    try:
        yield
    finally:
        for name, buffers in kept.items():
            setattr(pool, name, buffers)


@contextmanager
def _uncounted() -> Iterator[None]:
    """Let prometheus_client ignore what this process counts meanwhile."""
    from prometheus_client import values  # here, as its import reads PROMETHEUS_MULTIPROC_DIR

    kind = values.ValueClass
    kept = kind.inc, kind.set
    kind.inc = kind.set = lambda *args, **kwargs: None
    try:
        yield
    finally:
        kind.inc, kind.set = kept


@contextmanager
def _silent() -> Iterator[None]:
    """Let handlers write warnings alone. (``logging.disable`` writes to every logger, which copies their pages.)"""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("sglang").handlers]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
