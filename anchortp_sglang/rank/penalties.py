"""Restores the penalty counters of resumed requests.

A penalizer starts at zero and is then fed each newest token (``cumulate_penalty_output_tokens``,
managers/schedule_batch.py). A resumed request enters with output tokens that it has not counted.

With the overlap schedule a step is launched before the token of the step before is known: SGLang then counts one step
late, and begins with the prompt's last token. A resumed request counts as if it had never been interrupted.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.sampling.penaltylib.frequency_penalty import BatchedFrequencyPenalizer
from sglang.srt.sampling.penaltylib.min_new_tokens import BatchedMinNewTokensPenalizer
from sglang.srt.sampling.penaltylib.presence_penalty import BatchedPresencePenalizer
from sglang.srt.sampling.penaltylib.repetition_penalty import BatchedRepetitionPenalizer


def restore_counts(orchestrator: Any) -> None:
    """Give every prepared penalizer of a fresh BatchedPenalizerOrchestrator its requests' output tokens."""
    overlap = orchestrator.batch.enable_overlap
    for row, req in enumerate(orchestrator.reqs()):
        if not req.output_ids:
            continue
        counted = [req.origin_input_ids[-1], *req.output_ids[:-1]] if overlap else list(req.output_ids)
        tokens = torch.tensor(counted, dtype=torch.int64, device=orchestrator.device)
        for kind, penalizer in orchestrator.penalizers.items():
            if penalizer.is_prepared():
                _RESTORE[kind](penalizer, row, tokens)


def _frequency(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    amount = penalizer.frequency_penalties[row].expand(tokens.numel())
    penalizer.cumulated_frequency_penalties[row].scatter_add_(0, tokens, amount)


def _presence(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_presence_penalties[row, tokens] = penalizer.presence_penalties[row]


def _repetition(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_repetition_penalties[row, tokens] = penalizer.repetition_penalties[row]


def _min_new_tokens(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.len_output_tokens[row] += tokens.numel()


_RESTORE: dict[type, Callable[[Any, int, torch.Tensor], None]] = {
    BatchedFrequencyPenalizer: _frequency,
    BatchedPresencePenalizer: _presence,
    BatchedRepetitionPenalizer: _repetition,
    BatchedMinNewTokensPenalizer: _min_new_tokens,
}
