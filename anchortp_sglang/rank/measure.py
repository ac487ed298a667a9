"""Measures what this rank's device can do, between two steps, when main asks for it (``recovery/balance.py``)."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from anchortp_sglang.rank.messages import Measure

_LEAST_S = 0.03
_LEAST_PASSES = 2
_SAMPLE_BYTES = 64 << 20


def listen(scheduler: Any, attachment: Any) -> None:
    """Let a scheduler answer the message ``Measure``; all ranks do so in the same turn."""
    from sglang.utils import TypeBasedDispatcher

    def measure(message: Measure) -> None:
        assignment = attachment.assignment
        wait = assignment.platform.wait_for_forward
        speed = bytes_per_s(scheduler.tp_worker.model_runner.model.parameters(), wait)
        attachment.counters.report(message.number, speed, assignment.platform.free_bytes(assignment.device))

    scheduler._request_dispatcher += TypeBasedDispatcher([(Measure, measure)])


def bytes_per_s(weights: Iterable[torch.Tensor], wait: Any) -> int:
    """Return how many bytes of weights a device reads in a second, which bounds its decode steps.

    Takes some 0.03 s. ``wait`` returns when the device has done what it was given.
    """
    sample, nbytes = [], 0
    for tensor in weights:
        if nbytes < _SAMPLE_BYTES:
            sample.append(_summable(tensor.detach()))
            nbytes += tensor.nbytes
    passes, began = 0, time.perf_counter()
    while passes < _LEAST_PASSES or time.perf_counter() - began < _LEAST_S:
        for tensor in sample:
            tensor.sum()
        wait()
        passes += 1
    return max(1, int(passes * nbytes / (time.perf_counter() - began)))


def _summable(tensor: torch.Tensor) -> torch.Tensor:
    """View weights of 8 bits as integers: as floats they have no sum of their own."""
    return tensor.view(torch.int8) if tensor.itemsize == 1 else tensor
