"""The requests of a storm: every kind that the server accepts, and some that it must refuse. Pure."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["whole", "leave", "abort", "refused"]

_TEXTS = (
    "Once upon a time there was an anchor",
    "The wind did not wait for them, and",
    "Why does the sea wait for the ship? ⚓ Überfahrt",
)
_OPENAI: dict[str, Any] = {"model": "default", "temperature": 0}
_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Request:
    """One request. ``way``: read the answer to its end, leave in mid-stream, abort it by its rid, or expect a 400."""

    kind: str
    path: str
    body: dict[str, Any]
    way: Way = "whole"

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def make_requests(seed: int, vocab_size: int) -> list[Request]:
    """Return requests of all kinds, each in one to three sizes."""
    rng = random.Random(seed)
    return [
        *_generate(rng, vocab_size),
        *_grammars(rng, vocab_size),
        *_openai(rng),
        *_leaving(rng, vocab_size),
        *_refused(vocab_size),
    ]


def _generate(rng: random.Random, vocab_size: int) -> Iterator[Request]:
    def ids(length: int) -> list[int]:
        return _ids(rng, vocab_size, length)

    shared = ids(64)
    for tokens in (12, 32, 72):
        yield _request("generate", {"text": rng.choice(_TEXTS)}, tokens)
        yield _request("stream", {"input_ids": ids(24)}, tokens, stream=True)
        yield _request("shared prefix", {"input_ids": shared + ids(8)}, tokens, stream=True)
    for length in (300, 700):
        yield _request("long prompt", {"input_ids": ids(length)}, 24, stream=True)
    yield _request("batch", {"text": list(_TEXTS)}, 32)
    yield _request("batch", {"input_ids": [ids(12), ids(40)]}, 40, stream=True)
    yield _request("n=2", {"text": _TEXTS[0]}, 32, n=2)
    for key in ("extra_key", "cache_salt"):
        yield _request(key, {"input_ids": shared + ids(8), key: f"tenant {key}"}, 32, stream=True)
    penalties: dict[str, Any] = {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    yield _request("penalties", {"input_ids": ids(20)}, 64, stream=True, **penalties)
    yield _request("logit_bias", {"input_ids": ids(20)}, 48, stream=True, logit_bias={str(i): 3.0 for i in ids(6)})
    yield _request("min_new_tokens", {"input_ids": ids(20)}, 64, min_new_tokens=24, stop_token_ids=ids(200))
    yield _request("stop string", {"input_ids": ids(20)}, 96, stream=True, stop=["qu", "the", "z"])
    yield _request("stop_token_ids", {"input_ids": ids(20)}, 96, stream=True, stop_token_ids=ids(120))
    yield _request("stop_regex", {"input_ids": ids(20)}, 96, stream=True, stop_regex="[qxz][a-z]")
    logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    yield _request("logprobs", {"input_ids": ids(150)} | logprobs, 32, stream=True)
    yield _request("logprobs", {"input_ids": ids(20), "return_logprob": True}, 48)


def _grammars(rng: random.Random, vocab_size: int) -> Iterator[Request]:
    def ask(name: str, grammar: str) -> Request:
        prompt = {"input_ids": _ids(rng, vocab_size, 20)}
        params: dict[str, Any] = {"ignore_eos": False, name: grammar}
        return _request(name, prompt, 96, stream=True, **params)

    words = "(yes|no|perhaps)"
    number = {"type": "integer", "minimum": 10, "maximum": 9999}
    yield ask("regex", f"{words}( {words}){{20,40}}")
    yield ask("ebnf", 'root ::= "[" number ("," number){20,40} "]"\nnumber ::= [1-9][0-9]{1,5}')
    yield ask("json_schema", json.dumps({"type": "array", "items": number, "minItems": 10, "maxItems": 20}))
    tag = {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": number},
        "end": "</call>",
    }
    yield ask("structural_tag", json.dumps({"type": "structural_tag", "format": tag}))
    response_format = {"type": "json_schema", "json_schema": {"name": "number", "schema": number}}
    chat = {"messages": [{"role": "user", "content": rng.choice(_TEXTS)}], "max_tokens": 48}
    yield Request("response_format", "/v1/chat/completions", _OPENAI | chat | {"response_format": response_format})


def _openai(rng: random.Random) -> Iterator[Request]:
    plain: dict[str, Any] = {}
    for more in (plain, _USAGE):
        name = " stream" if more else ""
        body: dict[str, Any] = _OPENAI | {"max_tokens": rng.choice((24, 40)), "ignore_eos": True} | more
        chat = {"messages": [{"role": "user", "content": rng.choice(_TEXTS)}]}
        yield Request("completion" + name, "/v1/completions", body | {"prompt": _TEXTS[1]})
        yield Request("completion" + name, "/v1/completions", body | {"prompt": list(_TEXTS[:2]), "n": 2})
        yield Request("completion" + name, "/v1/completions", body | {"prompt": _TEXTS[0], "logprobs": 2})
        yield Request("chat" + name, "/v1/chat/completions", body | chat)
        yield Request("chat" + name, "/v1/chat/completions", body | chat | {"logprobs": True, "top_logprobs": 2})


def _leaving(rng: random.Random, vocab_size: int) -> Iterator[Request]:
    for way in ("leave", "abort"):
        for length in (16, 200):
            prompt = {"input_ids": _ids(rng, vocab_size, length)}
            yield _request("disconnect" if way == "leave" else "abort", prompt, 72, way=way, stream=True)
    chat = {"messages": [{"role": "user", "content": _TEXTS[2]}], "max_tokens": 72, "ignore_eos": True}
    yield Request("disconnect", "/v1/chat/completions", _OPENAI | chat | _USAGE, "leave")


def _refused(vocab_size: int) -> Iterator[Request]:
    chat = _OPENAI | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    for params in (
        {"max_new_tokens": -1},
        {"temperature": -1},
        {"top_p": 2},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"regex": "("},
        {"json_schema": "no JSON"},
        {"stop_regex": "("},
        {"logit_bias": {str(10 * vocab_size): 1.0}},
    ):
        yield Request("bad sampling", "/generate", {"text": "hello", "sampling_params": params}, "refused")
    bad: list[dict[str, Any]] = [
        {"input_ids": [10 * vocab_size]},
        {"input_ids": [-1]},
        {"input_ids": []},
        {"text": "hello", "return_hidden_states": True},
        {"input_ids": [5] * 20000},
        {},
    ]
    for body in bad:
        yield Request("bad input", "/generate", body | {"sampling_params": {"max_new_tokens": 4}}, "refused")
    yield Request("bad OpenAI", "/v1/completions", _OPENAI | {"prompt": "hello", "max_tokens": -5}, "refused")
    yield Request("bad OpenAI", "/v1/chat/completions", chat | {"return_hidden_states": True}, "refused")
    yield Request("bad OpenAI", "/v1/chat/completions", chat | {"messages": []}, "refused")


def _request(
    kind: str, body: dict[str, Any], tokens: int, *, way: Way = "whole", stream: bool = False, **sampling: Any
) -> Request:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | sampling
    return Request(kind, "/generate", body | {"sampling_params": params} | ({"stream": True} if stream else {}), way)


def _ids(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    return rng.choices(range(vocab_size // 10, vocab_size * 9 // 10), k=length)  # special tokens are at the ends
