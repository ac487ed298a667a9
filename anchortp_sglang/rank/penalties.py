"""Keeps the penalty counters of requests exact: across a fault, and with the overlap schedule.

A penalizer starts at zero and is then fed each newest token (``cumulate_penalty_output_tokens``,
managers/schedule_batch.py). A resumed request enters with output tokens that it has not counted.

With the overlap schedule SGLang feeds it when the step is prepared, before the host knows that token: it is fed the one
before, or, depending on what else is scheduled, one token twice. The same request then gives other tokens each time. So
a step is fed when it is launched, with its own input, which the device has.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.sampling.penaltylib.frequency_penalty import BatchedFrequencyPenalizer
from sglang.srt.sampling.penaltylib.min_new_tokens import BatchedMinNewTokensPenalizer
from sglang.srt.sampling.penaltylib.presence_penalty import BatchedPresencePenalizer
from sglang.srt.sampling.penaltylib.repetition_penalty import BatchedRepetitionPenalizer

from anchortp_sglang.rank.attachment import current


def around_cumulate_penalty_output_tokens(original: Callable[[Any], None], batch: Any) -> None:
    """AROUND ScheduleBatch.cumulate_penalty_output_tokens: with overlap, wait for the launch of the step."""
    if current() is None or not batch.enable_overlap:
        original(batch)


def after_resolve_forward_inputs(result: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER overlap_utils.resolve_forward_inputs: with overlap, count the tokens that a decode step begins with."""
    if current() is None or not batch.enable_overlap:
        return result
    decode, mixed = batch.forward_mode.is_decode(), batch.forward_mode.is_mixed()
    if (decode or mixed) and batch.sampling_info.penalizer_orchestrator.is_required:
        orchestrator = batch.sampling_info.penalizer_orchestrator
        if decode:
            orchestrator.cumulate_output_tokens(batch.input_ids)
        else:  # the requests that decode are the last ones, with one token each
            tokens = batch.input_ids[-len(batch.decoding_reqs) :]
            for row, token in enumerate(tokens, start=len(batch.reqs) - len(tokens)):
                _count(orchestrator, row, token[None])
    return result


def after_penalizers(result: Any, orchestrator: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER BatchedPenalizerOrchestrator.__init__: stock starts a retracted request's counters at zero."""
    if any(req.output_ids for req in orchestrator.reqs()):
        restore_counts(orchestrator)


def restore_counts(orchestrator: Any) -> None:
    """Give every prepared penalizer of a fresh BatchedPenalizerOrchestrator its requests' output tokens."""
    for row, req in enumerate(orchestrator.reqs()):
        tokens = torch.tensor(list(req.output_ids), dtype=torch.int64, device=orchestrator.device)
        if tokens.numel():
            _count(orchestrator, row, tokens)


def _count(orchestrator: Any, row: int, tokens: torch.Tensor) -> None:
    for kind, penalizer in orchestrator.penalizers.items():
        if penalizer.is_prepared():
            _COUNT[kind](penalizer, row, tokens)


def _frequency(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    amount = penalizer.frequency_penalties[row].expand(tokens.numel())
    penalizer.cumulated_frequency_penalties[row].scatter_add_(0, tokens, amount)


def _presence(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_presence_penalties[row, tokens] = penalizer.presence_penalties[row]


def _repetition(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_repetition_penalties[row, tokens] = penalizer.repetition_penalties[row]


def _min_new_tokens(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.len_output_tokens[row] += tokens.numel()


_COUNT: dict[type, Callable[[Any, int, torch.Tensor], None]] = {
    BatchedFrequencyPenalizer: _frequency,
    BatchedPresencePenalizer: _presence,
    BatchedRepetitionPenalizer: _repetition,
    BatchedMinNewTokensPenalizer: _min_new_tokens,
}
