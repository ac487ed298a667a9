"""A resumed request has the counters that it would have without a fault: penalties and reasoning tokens."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from scheduled_kv import PLAIN, new_request, publish

from anchortp_sglang.rank.main import after_create_generation_req
from anchortp_sglang.rank.messages import Resume
from anchortp_sglang.rank.penalties import restore_counts

VOCAB_SIZE = 16
PROMPT = [3, 4, 9]
OUTPUTS = [7, 7, 2, 9, 5, 1, 7]
THINK_END = 5


@pytest.fixture(scope="module", autouse=True)
def _published():
    publish()


class Batch:
    """What a penalizer reads of a ScheduleBatch, which it refers to weakly."""

    device = "cpu"

    def __init__(self, req: Any, enable_overlap: bool) -> None:
        self.reqs, self.enable_overlap = [req], enable_overlap


def penalized(outputs: list[int]) -> Any:
    req = new_request("r", PROMPT, PLAIN, len(OUTPUTS))
    req.output_ids.extend(outputs)
    sampling = req.sampling_params
    sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty = 0.5, 0.25, 1.5
    sampling.min_new_tokens = 4
    req.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
    return req


def logits_at_each_step(resumed_after: int, overlap: bool) -> list[list[float]]:
    """Penalized logits of each output token from ``resumed_after`` on, as the scheduler feeds the penalizers."""
    from sglang.srt.sampling import penaltylib

    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    req = penalized(OUTPUTS[:resumed_after])
    batch = Batch(req, overlap)
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCAB_SIZE, batch, kinds)
    restore_counts(orchestrator)
    found = [applied(orchestrator)]  # the prefill samples a token
    for token in OUTPUTS[resumed_after:-1]:
        if not overlap:
            req.output_ids.append(token)
        last = req.output_ids[-1] if req.output_ids else PROMPT[-1]  # cumulate_penalty_output_tokens
        orchestrator.cumulate_output_tokens(torch.tensor([last]))
        if overlap:
            req.output_ids.append(token)
        found.append(applied(orchestrator))
    return found


def applied(orchestrator: Any) -> list[float]:
    logits = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float32)[None]
    orchestrator.apply(logits)
    return logits[0].tolist()


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("delivered", range(1, len(OUTPUTS)))
def test_penalties_go_on_as_without_a_fault(delivered: int, overlap: bool) -> None:
    unbroken = logits_at_each_step(0, overlap)
    assert unbroken[0] != unbroken[-1]
    assert logits_at_each_step(delivered, overlap)[1:] == unbroken[delivered + 1 :]


@pytest.mark.parametrize("delivered", range(len(OUTPUTS) + 1))
def test_reasoning_tokens_go_on_as_without_a_fault(delivered: int) -> None:
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    processor = SimpleNamespace(model_config=SimpleNamespace(think_end_ids=[THINK_END]))
    processor._maybe_update_reasoning_tokens = MethodType(
        SchedulerBatchResultProcessor._maybe_update_reasoning_tokens, processor
    )
    scheduler = SimpleNamespace(batch_result_processor=processor)
    req = new_request("r", PROMPT, PLAIN, len(OUTPUTS))
    req.require_reasoning = True
    rest = {field.encode_name: None for field in msgspec.structs.fields(Resume) if field.required}
    after_create_generation_req(req, scheduler, Resume(**rest, delivered=OUTPUTS[:delivered]))
    for token in OUTPUTS[delivered:]:
        processor._maybe_update_reasoning_tokens(req, token)
    assert req.reasoning_tokens == OUTPUTS.index(THINK_END) + 1
