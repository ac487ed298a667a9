"""A resumed request has the counters that it would have without a fault: penalties and reasoning tokens."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from scheduled_kv import PLAIN, new_request, publish

from anchortp_sglang.rank import penalties
from anchortp_sglang.rank.main import after_create_generation_req
from anchortp_sglang.rank.messages import Resume

VOCAB_SIZE = 16
PROMPT = [3, 4, 9]
OUTPUTS = [7, 7, 2, 9, 5, 1, 7]
THINK_END = 5


@pytest.fixture(scope="module", autouse=True)
def _published():
    publish()


class Batch:
    """Stands for a ScheduleBatch, with what penalizers and hooks read of it; penalizers refer to it weakly."""

    device = "cpu"

    def __init__(self, req: Any, mode: str) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.enable_overlap = mode != "plain"
        self.forward_mode = ForwardMode.MIXED if mode == "mixed" else ForwardMode.DECODE
        # In a mixed batch, what is prefilled comes before what decodes.
        self.reqs = [penalized([]), req] if mode == "mixed" else [req]
        self.decoding_reqs = [req] if mode == "mixed" else None

    def launch(self, token: int) -> None:
        self.input_ids = torch.tensor([*PROMPT, token] if self.decoding_reqs else [token])
        penalties.after_resolve_forward_inputs(None, self)


def penalized(outputs: list[int]) -> Any:
    req = new_request("r", PROMPT, PLAIN, len(OUTPUTS))
    req.output_ids.extend(outputs)
    sampling = req.sampling_params
    sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty = 0.5, 0.25, 1.5
    sampling.min_new_tokens = 4
    req.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
    return req


def logits_at_each_step(resumed_after: int, mode: str) -> list[list[float]]:
    """Penalized logits of each output token from ``resumed_after`` on, as the scheduler feeds the penalizers."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling import penaltylib

    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    req = penalized(OUTPUTS[:resumed_after])
    batch = Batch(req, mode)
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCAB_SIZE, batch, kinds)
    penalties.after_penalizers(None, orchestrator)
    batch.sampling_info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    found = [applied(orchestrator)]  # the prefill samples a token
    for token in OUTPUTS[resumed_after:-1]:
        if mode == "plain":
            req.output_ids.append(token)
        penalties.around_cumulate_penalty_output_tokens(ScheduleBatch.cumulate_penalty_output_tokens, batch)
        batch.launch(token)
        if mode != "plain":
            req.output_ids.append(token)
        found.append(applied(orchestrator))
    return found


def applied(orchestrator: Any) -> list[float]:
    """Return the penalized logits of the batch's last request."""
    logits = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float32).repeat(len(orchestrator.reqs()), 1)
    orchestrator.apply(logits)
    return logits[-1].tolist()


@pytest.mark.parametrize("mode", ["plain", "overlap", "mixed"])
@pytest.mark.parametrize("delivered", range(len(OUTPUTS)))
def test_penalties_are_those_of_a_run_without_fault_and_overlap(
    monkeypatch: pytest.MonkeyPatch, delivered: int, mode: str
) -> None:
    monkeypatch.setattr(penalties, "current", SimpleNamespace)  # in a rank
    unbroken = logits_at_each_step(0, "plain")
    assert unbroken[0] != unbroken[-1]
    assert logits_at_each_step(delivered, mode) == unbroken[delivered:]


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
