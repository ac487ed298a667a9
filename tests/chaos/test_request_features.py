"""Every request feature and API that is served, many of them in each batch, cut by faults at random moments.

The table in docs/requests.md names these tests. ANCHORTP_KILLS=50 kills more often.
"""

import os
import random
import time
import urllib.error
from pathlib import Path

import pytest
import requests
import requests_of_all_kinds as kinds
from calls import AtOnce, assert_same, post
from faults import kill_rank, kill_standby, lose_device, recovered
from fronts import front
from histories import assert_exactly_once, assert_identical, flush, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

RUNNING = 48
FLAGS = (
    *("--chunked-prefill-size", "128", "--max-running-requests", str(RUNNING), "--random-seed", "7"),
    *("--enable-deterministic-inference", "--return-hidden-states-mode", "last", "--enable-custom-logit-processor"),
    *("--enable-priority-scheduling", "--default-priority-value", "0", "--enable-response-store"),
)
CLOCK = request(prompt(740, 20), kinds.TOKENS)  # streams beside the others, and tells how far they are
READ_TOKENS = ("processor with a thinking budget", "processor that reads the tokens")
OVERLAP = os.environ.get("ANCHORTP_OVERLAP") == "on"
KILLS = int(os.environ.get("ANCHORTP_KILLS", "1"))
SEED = int(os.environ.get("ANCHORTP_SEED", "0"))


@pytest.fixture(scope="module")
def flagged(launch):
    """A TP=2 server with all flags that request features need."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with launch(2, *FLAGS, module="seeded_server", env={"PYTHONPATH": path}) as server:
        yield server


@pytest.fixture(scope="module")
def calls(flagged):
    model = flagged.get("/v1/models")["data"][0]["id"]
    text = kinds.generate(725, False, sampling={"max_new_tokens": 45})(flagged)["text"]
    apis = kinds.of_apis(model) | kinds.stored_responses(model)
    found = kinds.of_generate() | kinds.stops(text) | kinds.of_flags() | apis
    if OVERLAP:  # SGLang then shows a processor the newest token or does not
        found = {name: ask for name, ask in found.items() if name not in READ_TOKENS}
    return found


@pytest.fixture(scope="module")
def unbroken(flagged, calls):
    """What the calls are answered when nothing happens."""
    generation = flagged.status()["generation"]
    flush(flagged)
    with AtOnce(flagged, calls) as asked:
        pass
    assert flagged.status()["generation"] == generation, "the unbroken run was broken"
    flush(flagged)
    return asked.given


def test_the_unbroken_answers_are_what_was_asked_for(unbroken):
    failed = {name: answer for name, answer in unbroken.items() if isinstance(answer, Exception)}
    assert not failed
    meta = {name: answer["meta_info"] for name, answer in unbroken.items() if "meta_info" in answer}
    assert len(meta["logprobs from the start"]["input_top_logprobs"]) == 150
    assert len(meta["logprobs from the middle"]["input_token_logprobs"]) == 80
    for name in ("logprobs from the start", "logprobs of the output"):
        assert len(meta[name]["output_token_ids_logprobs"]) == kinds.TOKENS
    assert len(unbroken["return_prompt_token_ids"]["prompt_token_ids"]) == 20
    assert len(meta["sampling mask, drawn"]["output_token_sampling_mask"]) == kinds.TOKENS
    assert unbroken["hidden states of the last token"]["choices"][0]["hidden_states"]
    if not OVERLAP:
        budget = unbroken["processor with a thinking budget"]["output_ids"]
        assert budget[24:26] == [199, 507], "the budget ended no thinking"
    assert not {*unbroken["processor without state"]["output_ids"]} & {*range(0, 480, 3)}
    seeded = [unbroken[name]["output_ids"] for name in ("sampling_seed", "no seed where seeds count")]
    assert all(len(set(tokens)) > kinds.TOKENS // 2 for tokens in seeded), "nothing was drawn"
    stopped = [answer for name, answer in unbroken.items() if name.startswith("stop at")]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in stopped} == {"stop"}
    assert len({answer["meta_info"]["completion_tokens"] for answer in stopped}) > 2
    assert unbroken["responses, background"]["output"] and unbroken["responses, previous"]["output"]


def strike(server, calls, fault, cause, moment):
    """Open all calls; once the clock has ``moment`` tokens, ``fault()``. Their answers, and the recovery's record."""
    with Streams(server.url, [CLOCK]) as clock, AtOnce(server, calls) as asked:
        clock.wait_tokens(moment)
        early = len(asked.given)
        recovered(server, fault(), cause)
    assert clock.histories[0].error is None
    assert_exactly_once(clock.histories[0])
    record = server.status()["recoveries"][-1]
    assert record["requests_replayed"] > len(calls) // 2, f"{early} answers were complete before the fault"
    flush(server)
    return asked.given


def test_kills_at_random_moments_change_no_answer(flagged, calls, unbroken):
    draw = random.Random(SEED)
    for number in range(KILLS):
        moment, rank = draw.randrange(1, kinds.TOKENS // 2), draw.randrange(2)
        print(f"kill {number + 1}: rank {rank}, token {moment}")
        got = strike(flagged, calls, lambda rank=rank: kill_rank(flagged, rank), "process", moment)
        assert_same(unbroken, got)


OF_OTHER_APIS = (
    *("messages, streamed", "ollama chat, streamed", "ollama generate, streamed", "responses, streamed"),
    "invocations, streamed",
)
NOT_KEPT = (
    *("sampling mask, greedy", "sampling mask, drawn", "hidden states, streamed"),
    "flat logprobs of the prompt, streamed",
)
"""Streams whose answers have what journals do not keep."""
STORED = ("responses, background", "responses, previous")
"""They go on with what one server has stored."""


def said_why_not(answer):
    """Whether an answer is an error, or a stream that ended without its end."""
    return isinstance(answer, Exception) or "fleet_error" in str(answer)


def test_requests_that_move_to_another_server_are_answered_as_unbroken(flagged, calls, unbroken):
    """The connections are cut under all of them, so each goes on as if its server were lost with its host."""
    generation = flagged.status()["generation"]
    sent = {name: ask for name, ask in calls.items() if name not in STORED}
    with front([flagged.url]) as moving, Streams(moving.url, [CLOCK]) as clock, AtOnce(moving, sent) as asked:
        clock.wait_tokens(random.Random(SEED).randrange(2, kinds.TOKENS // 2))
        early = dict(asked.given)
        cut = moving.cut()
        until(lambda: clock.histories[0].done, "the clock's stream does not end")
    print(f"{cut} connections cut, {len(early)} answers were complete")
    assert flagged.status()["generation"] == generation
    assert clock.histories[0].error is None
    assert_exactly_once(clock.histories[0])
    assert cut > len(calls) // 2
    broken = {name for name in OF_OTHER_APIS + NOT_KEPT if said_why_not(asked.given[name])}
    same = sent.keys() - broken
    assert_same({name: unbroken[name] for name in same}, {name: asked.given[name] for name in same})
    flush(flagged)


def test_what_a_seed_draws_does_not_depend_on_others_of_the_batch(flagged, calls):
    """After a fault they are others. One with a top_k or top_p makes SGLang sort the probabilities of all."""
    with AtOnce(flagged, {"sampling_seed": calls["sampling_seed"]}) as alone:
        pass
    flush(flagged)
    with AtOnce(flagged, {name: calls[name] for name in ("sampling_seed", "top_p near 0", "stop_regex")}) as beside:
        pass
    assert_same(alone.given, {"sampling_seed": beside.given["sampling_seed"]})


SCORED = 40


@pytest.fixture(params=["process", "device"])
def fault(flagged, request):
    """A function that kills a rank, or takes a device away until the test is over, and waits for the recovery."""
    fail = kill_rank if request.param == "process" else lose_device
    yield lambda: recovered(flagged, fail(flagged, 1), request.param)
    flagged.post("/anchortp/reconfigure", {"devices": [0, 1]})


def test_scoring_goes_on(flagged, fault):
    body = {"model": "any", "query": prompt(741, 20), "label_token_ids": [3, 4], "apply_softmax": True}
    body["items"] = [prompt(742 + number, 120) for number in range(SCORED)]
    score = {"score": post("/v1/score", body)}
    began = time.monotonic()
    with AtOnce(flagged, score) as calm:
        pass
    took_s = time.monotonic() - began
    flush(flagged)
    with AtOnce(flagged, score) as asked:
        time.sleep(took_s / 4)
        assert not asked.given, "all was scored before the fault"
        fault()
    assert_same(calm.given, asked.given)
    assert len(calm.given["score"]["scores"]) == SCORED
    assert flagged.status()["recoveries"][-1]["requests_replayed"] > SCORED // 2


def test_priority_and_arrival_order_outlive_a_fault(flagged):
    """More requests than may run; those that wait are served by priority, then as they came."""
    running = [request(prompt(800 + n, 8), 20 + 3 * n if n < 8 else 50) for n in range(RUNNING)]
    waiting = [request(prompt(900 + n, 8), 30) | {"priority": -5 if n < 3 else 5} for n in range(6)]
    with Streams(flagged.url, running) as first:
        first.wait_tokens(3)
        late = [Streams(flagged.url, [one]) for one in waiting]
        for stream in late:
            stream.__enter__()
            time.sleep(0.02)
        recovered(flagged, kill_rank(flagged, 1), "process")
        assert not any(stream.histories[0].arrivals for stream in late), "none waited"
        for stream in late:
            stream.wait()
    histories = [stream.histories[0] for stream in late]
    assert [history.error for history in [*first.histories, *histories]] == [None] * (RUNNING + 6)
    order = sorted(range(6), key=lambda n: histories[n].arrivals[0][0])
    assert order == [3, 4, 5, 0, 1, 2]


def test_a_processor_that_fails_ends_its_own_request_only(flagged):
    failing = {"text": "a", "custom_logit_processor": kinds.processor("Failing", "processors")}
    generation = flagged.status()["generation"]
    with Streams(flagged.url, [CLOCK]) as calm:
        pass
    with Streams(flagged.url, [CLOCK]) as clock:
        clock.wait_tokens(5)
        with pytest.raises(urllib.error.HTTPError) as ended:
            flagged.post("/generate", failing | {"sampling_params": {"max_new_tokens": 4}})
    assert ended.value.code == 500
    assert b"this processor always fails" in ended.value.read()
    assert flagged.status()["generation"] > generation
    assert_identical(outcomes(calm.histories), outcomes(clock.histories))


def test_a_cancelled_response_stays_cancelled(flagged, fault):
    """One in the background, that a recovery has taken up again."""
    model = flagged.get("/v1/models")["data"][0]["id"]
    body = {"model": model, "input": "Why?", "max_output_tokens": 4000, "temperature": 0, "background": True}
    with Streams(flagged.url, [CLOCK]) as clock:
        path = f"/v1/responses/{flagged.post('/v1/responses', body)['id']}"
        clock.wait_tokens(5)
        fault()
        assert flagged.get(path)["status"] in ("queued", "in_progress")
        assert flagged.post(f"{path}/cancel", {})["status"] == "cancelled"
    flush(flagged)  # would wait for a request that still ran
    assert flagged.get(path)["status"] == "cancelled"


OF_MAIN = {
    "/tokenize": {"model": "any", "prompt": "a ship"},
    "/v1/tokenize": {"model": "any", "prompt": "a ship"},
    "/detokenize": {"model": "any", "tokens": [70, 80]},
    "/v1/detokenize": {"model": "any", "tokens": [70, 80]},
    "/v1/messages/count_tokens": {"model": "any", "max_tokens": 1, "messages": kinds.MESSAGES},
    "/parse_function_call": {"text": "none", "tools": [], "tool_call_parser": "qwen25"},
    "/separate_reasoning": {"text": "so</think>yes", "reasoning_parser": "deepseek-r1"},
    "/api/show": {"model": "any"},
}
READ = ("/v1/models", "/model_info", "/get_model_info", "/api/tags", "/openapi.json")


def test_main_answers_what_needs_no_ranks_during_a_recovery(flagged):
    def ask():
        posted = {path: flagged.post(path, body) for path, body in OF_MAIN.items()}
        return posted | {path: flagged.get(path) for path in READ}

    calm = ask()
    kill_standby(flagged)  # else the outage is too short
    fault = kill_rank(flagged, 1)
    until(lambda: flagged.status()["state"] == "recovering", "no recovery began", poll_s=0)
    during = ask()
    assert flagged.status()["state"] == "recovering", "the outage was over"
    recovered(flagged, fault, "process")
    for answer in (calm, during):
        for each in [*answer["/v1/models"]["data"], *answer["/api/tags"]["models"], answer["/api/show"]]:
            each.pop("created", None), each.pop("modified_at", None)
    assert during == calm
    for path in ("/server_info", "/get_server_info", "/v1/loads"):
        assert flagged.get(path)


def test_log_levels_and_frozen_garbage_hold_for_new_ranks(flagged, fault):
    def frozen():
        return flagged.log.read_text().count("Freezing GC in Scheduler")  # said at debug level

    def ask(path, body):
        assert requests.post(flagged.url + path, json=body, timeout=10).status_code == 200

    ask("/configure_logging", {"log_level": "debug"})
    try:
        before = frozen()
        ask("/freeze_gc", {})
        until(lambda: frozen() == before + 2, "ranks did not freeze")
        before = frozen()
        fault()
        until(lambda: frozen() >= before + flagged.status()["tp_size"], "new ranks did not")
    finally:
        ask("/configure_logging", {"log_level": "info"})


NOT_SERVED = {
    "custom_logit_processor": ("/generate", {"text": "a", "custom_logit_processor": "{}"}),
    "min_p": ("/generate", {"text": "a", "sampling_params": {"min_p": 0.1}}),
    "return_hidden_states": ("/v1/chat/completions", kinds.CHAT | {"return_hidden_states": True}),
    "top_k": ("/generate", {"text": "a", "return_sampling_mask": True, "sampling_params": {"temperature": 1.0}}),
    "seed": ("/api/chat", {"model": "any", "messages": kinds.MESSAGES, "options": {"seed": 1}}),
    "context length": ("/api/generate", {"model": "any", "prompt": "a " * 9000}),
    "--is-embedding": ("/v1/embeddings", {"model": "any", "input": "a"}),
    "--is-embedding ": ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    "--is-embedding  ": ("/v1/classify", {"model": "any", "input": "a"}),
    "--is-embedding   ": ("/encode", {"text": "a"}),
    "--is-embedding    ": ("/classify", {"text": "a"}),
}


BY_RANKS = {"top_k"}
"""Refused by SGLang's scheduler, which says so in a stream's only message."""


def test_what_is_not_served_gets_a_400_with_the_reason(flagged):
    generation = flagged.status()["generation"]
    for named, (path, body) in NOT_SERVED.items():
        for stream in (False,) if named in BY_RANKS else (False, True):
            with pytest.raises(urllib.error.HTTPError) as refused:
                flagged.post(path, body | {"stream": stream})
            assert refused.value.code == 400, (path, body)
            assert named.strip() in refused.value.read().decode(), (path, body)
    assert flagged.status()["generation"] == generation


def test_a_lost_device_changes_no_answer(flagged, calls, unbroken):
    """The last test with this server: it has one device left."""
    got = strike(flagged, calls, lambda: lose_device(flagged, 1), "device", kinds.TOKENS // 3)
    assert flagged.status()["tp_size"] == 1
    assert_same(unbroken, got)


def test_tokens_drawn_without_a_seed_go_on_from_those_that_were_given(server):
    """Other tokens than without the fault, but drawn from the model's own distribution: all ranks drew the same ones.

    Each token's logprob is what the prompt's logprobs say when the whole is asked as a prompt.
    """
    sampling = {"temperature": 1.0, "min_p": 0.02}
    asked = [request(prompt(760 + n, 20), kinds.TOKENS, **sampling) | kinds.LOGPROBS for n in range(6)]
    given = []
    with Streams(server.url, asked) as streams:
        streams.wait_tokens(kinds.TOKENS // 3)
        given = [list(history.output_ids) for history in streams.histories]
        recovered(server, kill_rank(server, 2), "process")
    flush(server)
    for before, history in zip(given, streams.histories, strict=True):
        assert history.error is None and history.output_ids[: len(before)] == before
        assert len(set(history.output_ids)) > kinds.TOKENS // 2
        whole = [*history.request["input_ids"], *history.output_ids]
        again = server.post(
            "/generate",
            request(whole, 1) | kinds.LOGPROBS | {"logprob_start_len": 20 - 1},
        )["meta_info"]["input_token_logprobs"]
        for drawn, of_prompt in zip(history.meta["output_token_logprobs"], again[-kinds.TOKENS :], strict=True):
            assert drawn[1] == of_prompt[1]
            assert drawn[0] == pytest.approx(of_prompt[0], abs=1e-3)
