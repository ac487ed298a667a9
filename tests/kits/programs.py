"""SGLang's programs in its frontend language (``sglang.test.test_programs``), run on a server that is there."""

from typing import Any

import kit_list

from anchortp_sglang.testing.server import Server

QUICK: dict[str, dict[str, Any]] = {
    "test_select": {"check_answer": False},
    "test_expert_answer": {"check_answer": False},
    "test_gen_min_new_tokens": {},
}
SLOW: dict[str, dict[str, Any]] = {
    "test_mt_bench": {},
    "test_parallel_decoding": {},
    "test_stream": {},
    "test_regex": {},
    "test_dtype_gen": {},
}
RUN = QUICK if kit_list.MODE == "quick" else QUICK | SLOW
"""Those that judge what the model says can be told not to."""

_WORDS = "judges what a real model says; stock fails it here too"
_UNFINISHED = "random weights fill a string of JSON up to the limit of tokens"
SKIPPED = {
    "test_few_shot_qa": _WORDS,
    "test_tool_use": _WORDS,
    "test_react": _WORDS,
    "test_decode_int": _WORDS,
    "test_decode_json_regex": _UNFINISHED,
    "test_decode_json": _UNFINISHED,
    "test_parallel_encoding": "hangs on stock too: SGLang 0.5.23 has no /concate_and_append_request",
    "test_stream_logprobs": "wants a chunk's logprobs alone; stock too sends all so far, without incremental streaming",
    "test_image_qa": "an image, which a request is refused for",
    "test_completion_speculative": "counts tokens of OpenAI's own service",
    "test_chat_completion_speculative": "a feature of the frontend for OpenAI's own service",
}


def run(name: str, server: Server) -> None:
    """Run one program; raises what it raises."""
    import sglang  # here: it takes seconds, not while tests are collected
    from sglang.test import test_programs

    backend = sglang.RuntimeEndpoint(server.url)
    backend.endpoint = backend  # where sglang.Runtime, which starts a server of its own, has this
    sglang.set_default_backend(backend)
    getattr(test_programs, name)(**RUN[name])
