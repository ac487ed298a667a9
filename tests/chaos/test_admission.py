"""What could not be resumed, or would end a rank, is refused with 400 before it runs, on every way in."""

import json
import math
import threading
import urllib.error
import urllib.request

import pytest
from faults import kill_rank, recovered
from histories import assert_identical, outcomes, prompt, request

from anchortp_sglang.admission.requests import ROUTES
from anchortp_sglang.testing.streams import Streams

CHAT = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
COMPLETION = {"model": "default", "prompt": "hello", "max_tokens": 4}
GENERATE = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
REFUSED = {
    "/generate": [
        GENERATE | {"sampling_params": {"max_new_tokens": 4, "beam_width": 2}},
        GENERATE | {"return_hidden_states": True},
        {"text": ["hello", "there"], "sampling_params": [{}, {"beam_width": 2}]},
    ],
    "/v1/chat/completions": [
        CHAT | {"return_hidden_states": True},
    ],
    "/v1/completions": [COMPLETION | {"return_hidden_states": True}],
}


def status_of(server, path, body):
    """(HTTP status, text of the answer)."""
    post = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(post, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# What stock SGLang takes and its ranks die of: the field that the answer names, and what is asked beside GENERATE.
LOGPROBS = {"return_logprob": True}
DEADLY = [
    ("text, prompt or input_ids is empty", {"text": ""}),
    ("top_logprobs_num", LOGPROBS | {"top_logprobs_num": 100000}),
    ("top_logprobs_num", LOGPROBS | {"top_logprobs_num": -1}),
    ("logprob_start_len", LOGPROBS | {"logprob_start_len": -9}),
    ("logprob_start_len", LOGPROBS | {"logprob_start_len": 1000}),
]
DEADLY_SAMPLING = [
    ("stop_token_ids", {"stop_token_ids": [10**9], "min_new_tokens": 4}),
    ("stop_token_ids", {"stop_token_ids": [-5], "min_new_tokens": 4}),
    ("stop_token_ids", {"stop_token_ids": list(range(512)), "min_new_tokens": 4}),
    ("logit_bias", {"logit_bias": {"5": 1e39}}),
    ("logit_bias", {"logit_bias": {"5": 3e38}, "temperature": 0.1}),
    ("logit_bias", {"logit_bias": {str(token): -3e38 for token in range(512)}, "temperature": 0.1}),
    ("temperature", {"temperature": 1e39}),
    ("repetition_penalty", {"repetition_penalty": 1e-40}),
    ("top_k", {"top_k": 2**31}),
    ("n is", {"n": 10**9}),
    ("custom_params", {"custom_params": {"a": {"b": {"c": 1}}}}),
    ("stop_regex", {"stop_regex": "("}),
    ("stop_regex", {"stop_regex": "(?<=a+)b"}),
    ("stop_regex", {"stop_regex": "(((a{4000000}){4000000}){4000000}){4000000}"}),
    # SGLang's own contract of /generate refuses these by type, without the field's name.
    ("", {"temperature": "0.5"}),
    ("", {"top_k": 1.5}),
    ("", {"max_new_tokens": 2**70}),
    ("", {"ignore_eos": 1}),
    ("", {"is_normalized": True, "temperature": 0}),
    ("", {"logit_bias": {"5": math.inf}}),
    ("", {"stop": "\ud800"}),
]
DEADLY += [(named, {"sampling_params": asked}) for named, asked in DEADLY_SAMPLING]
ALONE = [
    ("input_ids is empty", {"input_ids": [[1, 2], []]}),
    ("input_ids has the token -1", {"input_ids": [-1, 2]}),
    ("input_ids has the token 999999", {"input_ids": [1, 999999]}),
]
DEADLY_ELSEWHERE = {
    "/v1/completions": (
        COMPLETION,
        [
            ("Prompt", {"prompt": ""}),
            ("prompt", {"prompt": ["a", ""]}),
            ("input_ids", {"prompt": [1, 999999]}),
            ("logprobs", {"logprobs": 100000}),
            ("temperature", {"temperature": 1e39}),
            ("top_k", {"top_k": 2**31}),
            ("logit_bias", {"logit_bias": {"5": 1e39}}),
            ("stop_token_ids", {"stop_token_ids": [-5], "min_tokens": 2}),
            ("stop_regex", {"stop_regex": "("}),
        ],
    ),
    "/v1/chat/completions": (
        CHAT,
        [
            ("logprobs", {"logprobs": True, "top_logprobs": 100000}),
            ("temperature", {"temperature": 1e39}),
            ("top_k", {"top_k": 2**31}),
            ("logit_bias", {"logit_bias": {"5": 1e39}}),
            ("stop_token_ids", {"stop_token_ids": [10**9], "min_tokens": 2}),
            ("stop_regex", {"stop_regex": "("}),
        ],
    ),
}


def batch_of(asked):
    """A batch whose second item asks that, beside one that asks nothing."""
    sampling = [GENERATE["sampling_params"], GENERATE["sampling_params"] | asked.get("sampling_params", {})]
    others = {name: [value, value] for name, value in asked.items() if name not in ("text", "sampling_params")}
    return {"text": ["hello", asked.get("text", "hello")], "sampling_params": sampling} | others


def deadly_bodies():
    """(path, body, what the answer must name) of each of the above, in each form."""
    for named, asked in DEADLY:
        body = GENERATE | asked | {"sampling_params": GENERATE["sampling_params"] | asked.get("sampling_params", {})}
        yield from (("/generate", body | {"stream": stream}, named) for stream in (False, True))
        if "n" not in asked.get("sampling_params", {}):  # which is one for the whole batch
            yield "/generate", batch_of(asked), named
    for named, asked in ALONE:
        yield from (("/generate", asked | {"stream": stream}, named) for stream in (False, True))
    for path, (plain, cases) in DEADLY_ELSEWHERE.items():
        for named, asked in cases:
            yield from ((path, plain | asked | {"stream": stream}, named) for stream in (False, True))
    yield "/invocations", CHAT | {"logit_bias": {"5": 1e39}}, "logit_bias"
    yield (
        "/api/generate",
        {"model": "any", "prompt": "a", "stream": False, "options": {"temperature": 1e39}},
        "temperature",
    )
    yield "/v1/messages", CHAT | {"top_k": 2**31}, "top_k"
    yield "/v1/score", {"model": "any", "query": [1], "items": [[999999]], "label_token_ids": [1]}, "input_ids"
    yield "/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"sampling_params": {"n": 0}}}, "n is 0"


@pytest.fixture
def no_rank_dies(server, unbroken):
    """The generation is the same after the test, and serves a request as ever."""
    requests = [request(prompt(970, 40), 20)]
    expected, before = unbroken(requests), server.status()
    yield
    with Streams(server.url, requests) as streams:
        pass
    assert_identical(expected, outcomes(streams.histories))
    after = server.status()
    assert after["generation"] == before["generation"]
    assert [d["rank_pid"] for d in after["devices"]] == [d["rank_pid"] for d in before["devices"]]


def test_what_would_end_a_rank_gets_400_that_names_the_field(server, no_rank_dies):
    wrong = []
    for path, body, named in deadly_bodies():
        code, text = status_of(server, path, body)
        if code != 400 or named not in text:
            wrong.append((path, body, code, text, named))
    assert wrong == []


def test_what_stock_serves_is_served_beside_requests_that_it_would_have_failed(server, no_rank_dies):
    """Unknown stop tokens, and a number of logprobs that nobody asked for, do nothing alone; in a batch they did."""
    harmless = [
        GENERATE | {"sampling_params": {"max_new_tokens": 40, "ignore_eos": True, "stop_token_ids": [10**9, -5]}},
        GENERATE | {"top_logprobs_num": 100000, "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}},
        GENERATE | LOGPROBS | {"sampling_params": {"max_new_tokens": 40, "min_new_tokens": 20}, "top_logprobs_num": 2},
        GENERATE | {"sampling_params": {"max_new_tokens": 40, "logit_bias": {"5": -1e30}, "temperature": 1.0}},
    ]
    codes = []
    threads = [
        threading.Thread(target=lambda body=body: codes.append(status_of(server, "/generate", body)))
        for body in harmless
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in codes] == [200] * len(harmless), codes


def test_routes_that_a_recovery_could_not_honour_reach_no_rank(server, no_rank_dies):
    for route in ROUTES:
        code, text = status_of(server, route.replace("{method}", "configure"), {})
        assert code == 400 and "is refused by anchortp-sglang" in text, (route, code, text)
    for dodge in (
        "/weights_checker/",
        "//weights_checker",
        "/%77eights_checker",
        "/Weights_checker",
        "/./weights_checker",
    ):
        code, text = status_of(server, dodge, {"action": "reset_tensors"})
        assert code in (400, 404), (dodge, code, text)


@pytest.mark.parametrize("stream", [False, True], ids=["not streaming", "streaming"])
@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_be_resumed_is_refused_with_400(server, path, stream):
    for body in REFUSED[path]:
        code, text = status_of(server, path, body | {"stream": stream})
        assert code == 400, (body, code, text)
        assert "cannot be resumed" in text, text


def test_logprobs_under_a_kill_are_those_of_an_unbroken_run(server, unbroken):
    asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    requests = [request(prompt(950 + seed, 150), 60) | asked for seed in range(4)]
    expected = unbroken(requests)
    with Streams(server.url, requests) as calm:
        pass
    with Streams(server.url, requests) as streams:
        streams.wait_tokens(20)
        recovered(server, kill_rank(server, 0), "process")
    assert_identical(expected, outcomes(streams.histories))
    for one, other in zip(calm.histories, streams.histories, strict=True):
        for name, count in (("output_token_logprobs", 60), ("input_token_logprobs", 150)):
            assert len(one.meta[name]) == len(other.meta[name]) == count
            assert_close(one.meta[name], other.meta[name])
        for name in ("output_top_logprobs", "input_top_logprobs"):
            for tops, others in zip(one.meta[name], other.meta[name], strict=True):
                assert (tops is None) == (others is None)
                assert_close(tops or [], others or [])


def assert_close(one, other):
    """[logprob, token id, text] triples."""
    for (value, token, _), (other_value, other_token, _) in zip(one, other, strict=True):
        assert token == other_token
        assert value == other_value or abs(value - other_value) < 1e-4


@pytest.mark.parametrize("path", REFUSED)
def test_what_can_be_resumed_is_served(server, path):
    """The same bodies without what is refused: else every answer could be a 400."""
    body = {"/generate": GENERATE, "/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}[path]
    assert status_of(server, path, body)[0] == 200
