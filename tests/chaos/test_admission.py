"""What could not be resumed is refused with 400 before it runs, on every way in, streaming or not."""

import json
import urllib.error
import urllib.request

import pytest
from faults import kill_rank, recovered
from histories import assert_identical, outcomes, prompt, request

from anchortp_sglang.bench.streams import Streams

CHAT = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
COMPLETION = {"model": "default", "prompt": "hello", "max_tokens": 4}
GENERATE = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
REFUSED = {
    "/generate": [
        GENERATE | {"sampling_params": {"max_new_tokens": 4, "regex": "a+"}},
        GENERATE | {"return_hidden_states": True},
        {"text": ["hello", "there"], "sampling_params": [{}, {"json_schema": "{}"}]},
    ],
    "/v1/chat/completions": [
        CHAT | {"response_format": {"type": "json_object"}},
        CHAT | {"regex": "a+"},
    ],
    "/v1/completions": [COMPLETION | {"regex": "a+"}, COMPLETION | {"json_schema": "{}"}],
}


def status_of(server, path, body):
    """(HTTP status, text of the answer)."""
    post = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(post, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


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
