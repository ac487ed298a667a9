"""Structured output under kills: the same tokens as in an unbroken run, and the whole is what the grammar says."""

import json
import random
import threading
import time
import urllib.error

import jsonschema
import openai
import pytest
from constrained import (
    CHAT_TOKENS,
    SCHEMA,
    calls,
    generate,
    grammars,
    nested,
    no_blanks,
    streamed,
    thinking_checkpoint,
    whole,
)
from faults import kill_rank, kill_standby, lose_device, recovered
from forge import LAUNCHER
from fronts import front
from histories import Unbroken, assert_exactly_once, assert_identical, outcomes, prompt, request, until

from anchortp_sglang.testing.streams import Streams

FLAGS = ("--chunked-prefill-size", "128", "--enable-mixed-chunk", "--constrained-json-disable-any-whitespace")
PARSERS = ("--tool-call-parser", "qwen25", "--reasoning-parser", "deepseek-r1")
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "100"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return thinking_checkpoint(tmp_path_factory.mktemp("grammars") / "qwen3")


@pytest.fixture(scope="module")
def plain(launch, model):
    with launch(2, *FLAGS, *PARSERS, model=model) as server:
        yield server, Unbroken(server)


@pytest.fixture(scope="module")
def with_overlap(launch, model):
    """With SGLang's overlap schedule; every 100th step retracts requests."""
    with launch(2, *FLAGS, *PARSERS, "--anchor-overlap", "on", model=model, env=RETRACTING, module=LAUNCHER) as server:
        yield server, Unbroken(server)


@pytest.fixture
def served(plain):
    server, unbroken = plain
    server.wait_serving(0)
    return server, unbroken


@pytest.fixture(scope="module")
def asked(model):
    """A stream for each kind of grammar, one without any, and one with a prompt of six chunks."""
    kinds = grammars(no_blanks(model))
    requests = [
        generate(name, sampling, seed, 20 + 5 * seed) for seed, (name, (sampling, _)) in enumerate(kinds.items())
    ]
    requests.append(request(prompt(50, 30), 80))
    requests.append(generate("json_schema", kinds["json_schema"][0], 51, 700))
    return requests, [check for _, check in kinds.values()] + [len, kinds["json_schema"][1]]


def check(expected, histories):
    assert_identical(expected, outcomes(histories))
    for history in histories:
        assert_exactly_once(history)


def test_the_unbroken_output_is_what_each_grammar_says(served, asked):
    _, unbroken = served
    requests, checks = asked
    for outcome, is_right in zip(unbroken(requests), checks, strict=True):
        is_right(outcome.text)
        assert len(outcome.output_ids) > 20


@pytest.mark.parametrize(("rank", "tokens"), [(0, 1), (1, 30)])
def test_a_kill_costs_no_token_of_any_grammar(served, asked, rank, tokens):
    server, unbroken = served
    requests, checks = asked
    expected = unbroken(requests)
    with Streams(server.url, requests) as streams:
        streams.wait_tokens(tokens)
        assert not any(history.done for history in streams.histories) or tokens > 20, "streams were complete"
        record = recovered(server, kill_rank(server, rank), "process")
    check(expected, streams.histories)
    assert record["requests_replayed"] > len(requests) // 2
    for history, is_right in zip(streams.histories, checks, strict=True):
        is_right(history.text)


CLOCK = [request(prompt(60, 20), 150)]  # streams beside the others, and tells how far they are


class Chats:
    """Every chat, streaming and not, at once, each in its thread."""

    def __init__(self, server, bodies):
        # No retries: a retried request would hide that it broke.
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.given = {}
        ways = [(name, way) for name in bodies for way in (whole, streamed)]
        self._threads = [
            threading.Thread(target=self._call, args=(name, way, bodies[name]), daemon=True) for name, way in ways
        ]

    def _call(self, name, way, body):
        try:
            self.given[name, way.__name__] = way(self.client, body)
        except Exception as error:  # whatever the client raises is what its user would see
            self.given[name, way.__name__] = repr(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        for thread in self._threads:
            thread.join(120)
        self.client.close()


@pytest.fixture(scope="module")
def chats(plain, model):
    """The chats, and what they are answered when nothing happens."""
    bodies = calls(no_blanks(model))
    with Chats(plain[0], bodies) as unbroken:
        pass
    return bodies, unbroken.given


def test_the_unbroken_chats_reason_and_answer_as_asked(chats):
    _, given = chats
    for (name, _), answer in given.items():
        assert not isinstance(answer, str), f"{name}: {answer}"
        for said in answer[0].values():
            assert said.reasoning and said.reasoning[-1] != ">", name
            if name in ("response_format json_schema", "n=2"):
                jsonschema.validate(json.loads(said.content), SCHEMA)
            if name in ("tool_choice required", "tool_choice named", "tool_choice auto, a call"):
                tool, arguments = said.tools[0]
                assert tool == "book", name
                jsonschema.validate(json.loads(arguments), SCHEMA)
    assert len(given["n=2", "streamed"][0]) == 2
    print(given)
    assert given["tool_choice auto", "streamed"][1] == CHAT_TOKENS


def test_chats_with_formats_tools_and_reasoning_go_on_as_unbroken(served, chats):
    server, _ = served
    bodies, expected = chats
    with Chats(server, bodies) as broken, Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(12)
        assert not broken.given, "an answer was complete before the kill"
        recovered(server, kill_rank(server, 1), "process")
    assert clock.histories[0].error is None
    for name, answer in expected.items():
        assert broken.given[name] == answer, name


def test_a_lost_device_costs_no_token_of_any_grammar_or_chat(served, asked, chats):
    server, unbroken = served
    requests, checks = asked
    bodies, answers = chats
    expected = unbroken(requests)
    try:
        with Chats(server, bodies) as broken, Streams(server.url, [*CLOCK, *requests]) as streams:
            streams.wait_tokens(10)
            assert not broken.given, "an answer was complete before the loss"
            recovered(server, lose_device(server, 1), "device")
        assert server.status()["tp_size"] == 1
    finally:
        server.post("/anchortp/reconfigure", {"rejoin": [1]})
    check(expected, streams.histories[1:])
    for history, is_right in zip(streams.histories[1:], checks, strict=True):
        is_right(history.text)
    for name, answer in answers.items():
        assert broken.given[name] == answer, name


def test_a_list_of_requests_with_grammars_goes_on_as_unbroken(served, asked):
    server, _ = served
    listed = [one for one in asked[0] if one.keys() == {"input_ids", "sampling_params"}]
    body = {name: [one[name] for one in listed] for name in ("input_ids", "sampling_params")}
    assert len(listed) > 6
    given = []
    asking = threading.Thread(target=lambda: given.append(server.post("/generate", body)))
    expected = server.post("/generate", body)
    with Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(2)
        asking.start()
        clock.wait_tokens(14)
        assert not given
        recovered(server, kill_rank(server, 0), "process")
        asking.join(60)
    assert [each["output_ids"] for each in given[0]] == [each["output_ids"] for each in expected]


SIMPLE = SCHEMA | {"properties": {name: SCHEMA["properties"][name] for name in ("name", "tags")}}
SIMPLE["required"] = ["name", "tags"]  # outlines takes no bounds of numbers


def is_simple(text):
    jsonschema.validate(json.loads(text), SIMPLE)


@pytest.mark.parametrize("backend", ["llguidance", "outlines"])
def test_grammars_of_other_backends_go_on_as_unbroken(launch, model, backend):
    sampling = {"max_new_tokens": 300, "temperature": 0}
    kinds = {"json_schema": (sampling | {"json_schema": json.dumps(SIMPLE)}, is_simple), "regex": grammars({})["regex"]}
    requests = [generate(name, kinds[name][0], 70 + seed, 60) for seed in range(2) for name in kinds]
    with launch(2, *FLAGS, "--grammar-backend", backend, model=model) as server:
        expected = Unbroken(server)(requests)
        for cause, fault in ("process", kill_rank), ("device", lose_device):
            with Streams(server.url, requests) as streams:
                streams.wait_tokens(12)
                recovered(server, fault(server, 1), cause)
            check(expected, streams.histories)
            for history, (_, is_right) in zip(streams.histories, 2 * list(kinds.values()), strict=True):
                is_right(history.text)


def test_chats_and_grammars_that_move_to_another_server_go_on_as_unbroken(served, chats, asked):
    """The parsers of tool calls and reasoning are given the same again there, and the grammars the tokens."""
    server, unbroken = served
    bodies, expected = chats
    streams = unbroken(asked[0])
    with front([server.url]) as moving:
        with Chats(moving, bodies) as moved, Streams(moving.url, [*CLOCK, *asked[0]]) as clock:
            clock.wait_tokens(12)
            assert not moved.given, "an answer was complete before the cut"
            assert moving.cut() > len(bodies)
        clock.wait()
    check(streams, clock.histories[1:])
    for name, answer in expected.items():
        assert moved.given[name] == answer, name


def slow_request(title):
    return request(prompt(61, 20), 20, ignore_eos=False, json_schema=nested(300, title)) | {"rid": title}


@pytest.fixture
def compiling(served, request):
    """A stream whose grammar compiles, beside another that runs; a rank is killed meanwhile."""
    server, unbroken = served
    expected = unbroken([*CLOCK, slow_request("unbroken")])
    with Streams(server.url, [slow_request(request.node.name)]) as slow:
        time.sleep(0.3)
        clock = Streams(server.url, CLOCK)
        clock.__enter__()
        clock.wait_tokens(2)
        record = recovered(server, kill_rank(server, 0), "process")
        assert record["requests_replayed"] == 2, "the ranks did not have it"
        assert not slow.histories[0].output_ids, "the grammar was compiled before"
        yield clock.histories[0], slow.histories[0], expected[1]
        clock.wait()
    check(expected[:1], clock.histories)


def test_a_grammar_that_still_compiles_when_a_rank_dies_is_compiled_again(compiling):
    _, slow, expected = compiling
    until(lambda: slow.done, "the request does not end")
    check([expected], [slow])


def test_an_abort_while_a_resumed_grammar_compiles_takes_effect(served, compiling):
    clock, slow, _ = compiling
    abort(served[0], slow.request["rid"])
    until(lambda: slow.done, "the aborted stream does not end")
    assert "abort" in slow.error and len(slow.output_ids) <= 1
    assert not clock.done


def abort(server, rid):
    with pytest.raises(ValueError):  # its answer has no body
        server.post("/abort_request", {"rid": rid})


def test_requests_with_grammars_that_arrive_in_an_outage_are_served(served, asked):
    server, unbroken = served
    requests, _ = asked
    expected, clock_expected = unbroken(requests), unbroken(CLOCK)
    with Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(5)
        kill_standby(server)  # else the outage is too short to arrive in it
        fault = kill_rank(server, 0)
        until(lambda: server.status()["state"] == "recovering", "no recovery began", poll_s=0)
        with Streams(server.url, requests) as arriving:
            assert server.status()["state"] == "recovering", "the outage was over"
            recovered(server, fault, "process")
    check(expected, arriving.histories)
    check(clock_expected, clock.histories)


INVALID = [
    {"regex": "("},
    {"json_schema": "no JSON"},
    {"json_schema": '{"type": "nonsense"}'},
    {"ebnf": "root ::= missing"},
    {"structural_tag": "{}"},
    {"regex": "a\\x00b\x00"},
]


def test_an_invalid_grammar_gets_a_400_alone(served):
    server, unbroken = served
    expected, generation = unbroken(CLOCK), server.status()["generation"]
    with Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(3)
        for grammar in INVALID * 2:  # a second time from the cache
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.post("/generate", {"text": "hello", "sampling_params": grammar})
            assert refused.value.code == 400, grammar
    check(expected, clock.histories)
    assert server.status()["generation"] == generation


NOTHING_ALLOWED = request(prompt(62, 20), 20, ebnf='root ::= a\na ::= a "x" | a', temperature=1.0)


def test_a_grammar_that_ends_ranks_each_time_ends_with_an_error_of_its_own(served):
    """It allows no token: every probability is NaN, and sampling raises on all ranks."""
    server, unbroken = served
    expected = unbroken(CLOCK)
    generation = server.status()["generation"]
    with Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(10)
        with pytest.raises(urllib.error.HTTPError) as ended:
            server.post("/generate", NOTHING_ALLOWED)
    assert ended.value.code == 500
    assert server.status()["generation"] > generation
    check(expected, clock.histories)


with_both_schedules = pytest.mark.parametrize("schedule", ["plain", "with_overlap"])


@with_both_schedules
def test_kills_in_a_row_at_random_moments_cost_no_token(request, asked, seeds, schedule):
    """ANCHORTP_KILLS of them; long prompts are cut in chunks, and with overlap requests are retracted meanwhile."""
    server, unbroken = request.getfixturevalue(schedule)
    server.wait_serving(0)
    kills, seed = seeds
    draw = random.Random(seed)
    requests, checks = asked
    expected = unbroken(requests)
    for number in range(kills):
        with Streams(server.url, requests) as streams:
            moment, rank = draw.choice([0, 1, draw.randrange(2, 60)]), draw.randrange(2)
            if moment:
                until(lambda m=moment: most(streams) >= m, f"no {moment} tokens")
            else:
                time.sleep(draw.uniform(0, 0.4))  # most grammars still compile, prompts are prefilled
            print(f"kill {number + 1}: rank {rank}, token {moment}")
            recovered(server, kill_rank(server, rank), "process")
        check(expected, streams.histories)
        for history, is_right in zip(streams.histories, checks, strict=True):
            is_right(history.text)
    assert schedule == "plain" or "Testing retraction" in server.log.read_text(errors="replace")


def most(streams):
    return max(len(history.output_ids) for history in streams.histories)
