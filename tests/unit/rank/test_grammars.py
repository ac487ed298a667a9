"""A resumed request's grammar allows what it would allow without a fault, after every token: SGLang's own backends."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future
from types import MethodType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from scheduled_kv import PLAIN, new_request, publish

from anchortp_sglang.rank import grammars
from anchortp_sglang.rank.main import after_create_generation_req, around_add_request_to_queue
from anchortp_sglang.rank.messages import Resume
from anchortp_sglang.testing.tiny_tokenizer import TURN_END, build_tokenizer, special_token_ids

VOCAB_SIZE = 512
END = special_token_ids(VOCAB_SIZE)[TURN_END]
PROMPT = [3, 4, 9]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "flags": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["name", "flags"],
    "additionalProperties": False,
}
TAG = {"begin": "<call>", "schema": SCHEMA, "end": "</call>"}
GRAMMARS = {
    "json": json.dumps(SCHEMA),
    "regex": "(yes|no)( (yes|no)){3,9}",
    "ebnf": 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]{2,6}',
    "structural_tag": json.dumps({"structures": [TAG], "triggers": ["<call>"], "at_least_one": True}),
}
CASES = [("xgrammar", kind) for kind in GRAMMARS] + [
    *(("llguidance", kind) for kind in ("json", "regex")),
    *(("outlines", kind) for kind in ("json", "regex")),
]
THINK_END = 300


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    publish()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(VOCAB_SIZE), eos_token=TURN_END)


@pytest.fixture(scope="module")
def backends(tokenizer: Any) -> dict[str, Any]:
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend
    from sglang.srt.constrained.outlines_backend import OutlinesGrammarBackend
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    return {
        "xgrammar": XGrammarGrammarBackend(tokenizer, VOCAB_SIZE, [END], any_whitespace=False),
        "llguidance": GuidanceBackend(tokenizer, any_whitespace=False, n_vocab=VOCAB_SIZE, eos_token_ids=[END]),
        "outlines": OutlinesGrammarBackend(tokenizer, whitespace_pattern=""),
    }


def scheduler() -> Any:
    """The parts of a Scheduler that the hooks use; its processor advances grammars as SGLang's does."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    processor = SimpleNamespace(_maybe_update_reasoning_tokens=lambda req, tokens: None)
    processor._accept_grammar_tokens = MethodType(SchedulerBatchResultProcessor._accept_grammar_tokens, processor)
    return SimpleNamespace(batch_result_processor=processor, max_queued_requests=None, waiting_queue=[])


def ask(ignore_eos: bool = False) -> Any:
    req = new_request("r", PROMPT, PLAIN, 999)
    req.sampling_params.ignore_eos = ignore_eos
    req.sampling_params.normalize(None)
    req.eos_token_ids = {END}
    return req


def resumed(delivered: list[int], grammar: Any, ignore_eos: bool = False) -> Any:
    """A request as it enters a new generation's waiting queue, with a new grammar."""
    rest = {field.encode_name: None for field in msgspec.structs.fields(Resume) if field.required}
    message = Resume(**rest, delivered=delivered)
    req, of_rank = ask(ignore_eos), scheduler()
    after_create_generation_req(req, of_rank, message)
    req.grammar = grammar
    around_add_request_to_queue(lambda *args: None, of_rank, req)
    return req


def step(processor: Any, req: Any, token: int) -> None:
    """As process_batch_result_decode ends a step that sampled ``token``."""
    req.output_ids.append(token)
    req.update_finish_state(1)
    processor._accept_grammar_tokens(req, token)
    req.grammar.finished = req.finished()


def allowed(grammar: Any) -> list[int]:
    """The tokens that SamplingBatchInfo.update_grammar_mask leaves; all if the grammar takes no part any more."""
    if grammar.finished or grammar.is_terminated():
        return list(range(VOCAB_SIZE))
    mask = grammar.allocate_vocab_mask(VOCAB_SIZE, 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    logits = torch.zeros(1, VOCAB_SIZE)
    grammar.apply_vocab_mask(logits=logits, vocab_mask=mask)
    return torch.nonzero(logits[0] == 0).flatten().tolist()


def run(grammar: Any, seed: int, tokens: int = 60, ignore_eos: bool = False) -> tuple[list[int], list[list[int]]]:
    """An unbroken run that draws among what is allowed: its tokens, and what was allowed before each and at the end."""
    draw, of_rank = random.Random(seed), scheduler()
    req = ask(ignore_eos)
    req.grammar = grammar
    seen = [allowed(grammar)]
    while not req.finished() and len(req.output_ids) < tokens:
        step(of_rank.batch_result_processor, req, draw.choice(seen[-1]))
        seen.append(allowed(grammar))
    return list(req.output_ids), seen


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["", "ignore_eos"])
@pytest.mark.parametrize(("backend", "kind"), CASES)
def test_after_every_number_of_tokens_the_same_tokens_are_allowed(backends, backend, kind, ignore_eos):
    compiled = getattr(backends[backend], f"dispatch_{kind}")(GRAMMARS[kind])
    for seed in range(3):
        output, seen = run(compiled.copy(), seed, ignore_eos=ignore_eos)
        assert len(output) > 4 and any(one != seen[0] for one in seen)
        for delivered in range(len(output) if not ignore_eos else len(output) - 1):
            req = resumed(output[:delivered], compiled.copy(), ignore_eos)
            assert allowed(req.grammar) == seen[delivered], (seed, delivered)
            assert req.grammar.is_terminated() == (backend == "xgrammar" and END in output[:delivered])


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_request_whose_last_token_was_lost_may_only_end(backends, kind):
    """The ranks had ended it, by the grammar's end token; its client has all others."""
    compiled = getattr(backends["xgrammar"], f"dispatch_{kind}")(GRAMMARS[kind])
    output = next(tokens for tokens, _ in (run(compiled.copy(), seed, 400) for seed in range(99)) if tokens[-1] == END)
    req = resumed(output[:-1], compiled.copy())
    assert END in allowed(req.grammar)
    step(scheduler().batch_result_processor, req, END)
    assert req.finished() and req.finished_reason.to_json() == {"type": "stop", "matched": END}


def reasoning(inner: Any) -> Any:
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject

    made = ReasonerGrammarObject(inner, [THINK_END, THINK_END + 1])
    made.maybe_init_reasoning(True)
    return made


def test_a_grammar_after_reasoning_begins_where_it_would_have(backends):
    compiled = backends["xgrammar"].dispatch_regex(GRAMMARS["regex"])
    thoughts = [7, THINK_END, 8, THINK_END, THINK_END + 1]
    answer, _ = run(compiled.copy(), 0)
    unbroken, seen = reasoning(compiled.copy()), []
    for token in [*thoughts, *answer]:
        seen.append((allowed(unbroken), unbroken.tokens_in_think))
        unbroken.accept_token(token)
    assert len(seen[4][0]) == VOCAB_SIZE > len(seen[5][0])
    for delivered in range(len(seen)):
        req = resumed([*thoughts, *answer][:delivered], reasoning(compiled.copy()))
        assert (allowed(req.grammar), req.grammar.tokens_in_think) == seen[delivered], delivered


def test_a_retracted_request_keeps_its_grammar_as_it_is(backends):
    compiled = backends["xgrammar"].dispatch_regex(GRAMMARS["regex"])
    output, seen = run(compiled.copy(), 0)
    req, of_rank = resumed(output[:3], compiled.copy()), scheduler()
    step(of_rank.batch_result_processor, req, output[3])
    around_add_request_to_queue(lambda *args, **kwargs: None, of_rank, req, is_retracted=True)
    assert allowed(req.grammar) == seen[4] and req.to_finish is None


def test_a_request_without_a_grammar_and_one_that_was_aborted_while_it_compiled_pass(backends):
    assert resumed([1, 2], None).grammar is None
    req = ask()
    grammars.expect(req)
    req.grammar = Future()
    req.set_finish_with_abort("Aborted by AbortReq.")  # as GrammarManager.abort_requests does
    around_add_request_to_queue(lambda *args: None, scheduler(), req)
    assert req.to_finish is not None


def test_a_token_that_the_grammar_does_not_accept_ends_the_request_alone(backends):
    req = resumed([1, 2, 3], backends["xgrammar"].dispatch_regex("yes"))
    assert "Grammar accept_token failed" in req.to_finish.to_json()["message"]


def test_the_vocabulary_prepared_before_the_fork_makes_the_same_grammars(tokenizer, backends, monkeypatch):
    from sglang.srt.configs import model_config
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    from anchortp_sglang.hooks import grammar_backend

    model = SimpleNamespace(hf_eos_token_id={END}, vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(model_config.ModelConfig, "from_server_args", lambda args: model)
    view = SimpleNamespace(grammar_backend="xgrammar", skip_tokenizer_init=False)
    grammar_backend.prepare(view, tokenizer)
    try:
        made = XGrammarGrammarBackend(tokenizer, VOCAB_SIZE, [END], any_whitespace=False)
        assert made._tokenizer_info is tokenizer.init_xgrammar()[0]
        for seed in range(3):
            one, other = (
                run(backend.dispatch_json(GRAMMARS["json"]), seed) for backend in (made, backends["xgrammar"])
            )
            assert one == other
    finally:
        del tokenizer.init_xgrammar
