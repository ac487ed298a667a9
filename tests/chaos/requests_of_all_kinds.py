"""A call for every request feature that SGLang 0.5.23 serves on a generating model."""

import json
import time
from typing import Any

from calls import Ask, post
from histories import prompt

TOKENS = 48
THINK_START = 500  # of processors.ThinkingBudget


def generate(seed: int, /, stream: bool = True, length: int = 20, sampling: dict[str, Any] | None = None, **more: Any):
    """A greedy /generate call with a prompt of its own."""
    body = {"input_ids": prompt(seed, length), "sampling_params": params(**sampling or {})}
    return post("/generate", body | {"stream": stream} | more)


def params(**sampling: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True} | sampling


LOGPROBS = {"return_logprob": True}
FLAT = {"return_flat_raw_top_logprobs": True, "return_flat_raw_output_top_logprobs": True}
WITHOUT_EFFECT = {
    "routing_key": "tenant",
    "conversation_id": "talk",
    "session_id": "a name only",
    "no_logs": True,
    "log_metrics": False,
    "background": True,
    "custom_labels": {"team": "a"},
    "external_trace_header": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    "received_time": 1.0,
    "routed_dp_rank": 0,
    "return_bytes": True,
    "return_entropy": True,
    "kv_hints": {"protocol_version": "1", "message_id": "m", "actions": []},
    "http_worker_ipc": "ipc:///nowhere",
    "routed_experts_start_len": 3,
}
OF_MEDIA = {
    "mm_hashes": ["aa"],
    "mm_content_hashes": ["sha256:" + "0" * 64],
    "use_audio_in_video": True,
    "video_config": {"fps": 1},
    "modalities": ["image"],
    "images_config": {"image_mode": "gundam"},
    "mm_processor_kwargs": {"size": 1},
    "encoder_urls": ["http://nowhere"],
} | dict.fromkeys(("max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch", "video_max_dynamic_patch"), 2)


def of_generate() -> dict[str, Ask]:
    shared = prompt(700, 150)
    calls = {
        "logprobs from the start": generate(
            701, length=150, logprob_start_len=0, top_logprobs_num=3, token_ids_logprob=[3, 250], **LOGPROBS
        ),
        "logprobs from the middle": generate(
            702, False, 200, logprob_start_len=120, top_logprobs_num=2, return_text_in_logprobs=True, **LOGPROBS
        ),
        "logprobs of the output": generate(703, top_logprobs_num=2, token_ids_logprob=[7], **LOGPROBS),
        "logprobs as flat arrays": generate(
            704, False, 150, logprob_start_len=0, top_logprobs_num=2, **LOGPROBS, **FLAT
        ),
        "logprobs as base64": generate(
            705, False, top_logprobs_num=2, return_flat_raw_top_logprobs_b64=True, **LOGPROBS, **FLAT
        ),
        "flat logprobs of the prompt, streamed": generate(
            706, length=150, logprob_start_len=0, top_logprobs_num=2, return_flat_raw_top_logprobs=True, **LOGPROBS
        ),
        "return_prompt_token_ids": generate(707, return_prompt_token_ids=True),
        "logit_bias": generate(708, sampling={"logit_bias": {str(token): 3.0 for token in range(40, 60)}}),
        "min_new_tokens": generate(709, sampling={"min_new_tokens": 30, "stop_token_ids": list(range(0, 480, 2))}),
        "stop_token_ids": generate(710, sampling={"stop_token_ids": list(range(5, 480, 37))}),
        "stop_regex": generate(711, sampling={"stop_regex": "[qxz][a-z]"}),
        "penalties": generate(
            712, sampling={"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3}
        ),
        "ignore_eos off": generate(713, sampling={"ignore_eos": False}),
        "special tokens shown": generate(
            714, sampling={"skip_special_tokens": False, "spaces_between_special_tokens": False}
        ),
        "stream_interval": generate(715, sampling={"stream_interval": 7}),
        "stream_interval, whole": generate(716, False, sampling={"stream_interval": 1000}),
        "top_k 1": generate(717, sampling={"temperature": 1.0, "top_k": 1}),
        "top_p near 0": generate(718, sampling={"temperature": 1.3, "top_p": 1e-6}),
        "beam_width 1": generate(719, sampling={"beam_width": 1}),
        "extra_key": post("/generate", {"input_ids": shared, "sampling_params": params(), "extra_key": "a"}),
        "cache_salt": post("/generate", {"input_ids": shared, "sampling_params": params(), "cache_salt": "b"}),
        "without effect": generate(720, **WITHOUT_EFFECT),
        "without media": generate(726, data_parallel_rank=0, **OF_MEDIA),
        "priority": generate(721, priority=1),
        "n=3": generate(722, False, sampling={"n": 3}),
        "batch": post(
            "/generate",
            {
                "input_ids": [prompt(723, 20), prompt(724, 150)],
                "rid": ["batch-one", "batch-two"],
                "sampling_params": [params(), params(max_new_tokens=40, min_new_tokens=10)],
                "return_logprob": [False, True],
                "logprob_start_len": [-1, 100],
                "top_logprobs_num": [0, 2],
            },
        ),
        "text": post("/generate", {"text": "The wind did not wait ⚓", "sampling_params": params(), "stream": True}),
    }
    return calls


def stops(text: str) -> dict[str, Ask]:
    """Calls that stop at strings of many tokens, all over ``text``: what prompt 725 leads to, up to token 45.

    SGLang gives out every 50th token of an answer that is not streamed, also in the middle of a stop string.
    """
    calls = {}
    for number, first in enumerate(range(len(text) // 5, len(text) - 30, len(text) // 5)):
        stop = text[first : first + 30]
        calls[f"stop at {first}"] = generate(725, bool(number % 2), sampling={"stop": [stop, "never seen"]})
        calls[f"stop at {first}, shown"] = generate(725, sampling={"stop": stop, "no_stop_trim": True})
    return calls


# ---- the APIs on top of it

MESSAGES = [{"role": "user", "content": "Why does the sea wait for the ship? ⚓"}]
OPENAI = {"model": "default", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
CHAT = OPENAI | {"messages": MESSAGES}
ENDS = {"stream": True, "stream_options": {"include_usage": True}}
LETTERS = {str(token): 30.0 for token in range(32, 58)}
"""SGLang's chat streams lose the logprobs of a message without text, such as that of half a character."""
TEXT = OPENAI | {"prompt": "Once upon a time there was an anchor"}
OLLAMA = {"model": "any", "options": {"num_predict": TOKENS, "temperature": 0}}
VERTEX = {"instances": [{"text": "a ship"}, {"text": "a sea"}], "parameters": {"sampling_params": params()}}


def of_apis(model: str) -> dict[str, Ask]:
    answer = {"model": model, "input": "Why does the sea wait?", "max_output_tokens": TOKENS, "temperature": 0}
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    return {
        "completion, echo": post("/v1/completions", TEXT | {"echo": True, "logprobs": 2}),
        "completion, echo, streamed": post("/v1/completions", TEXT | {"echo": True, "logprobs": 2} | ENDS),
        "chat, logprobs": post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2}),
        "chat, logprobs, streamed": post(
            "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "logit_bias": LETTERS} | ENDS
        ),
        "chat, logit_bias": post("/v1/chat/completions", CHAT | {"logit_bias": {"50": 4.0, "60": 3.5}}),
        "invocations": post("/invocations", CHAT),
        "invocations, streamed": post("/invocations", CHAT | ENDS),
        "vertex": post("/vertex_generate", VERTEX),
        "messages": post("/v1/messages", {"model": "any", "max_tokens": TOKENS, "messages": MESSAGES, "top_k": 1}),
        "messages, streamed": post(
            "/v1/messages", {"model": "any", "max_tokens": TOKENS, "messages": MESSAGES, "top_k": 1, "stream": True}
        ),
        "ollama chat": post("/api/chat", OLLAMA | {"messages": MESSAGES, "stream": False}),
        "ollama chat, streamed": post("/api/chat", OLLAMA | {"messages": MESSAGES}),
        "ollama generate": post("/api/generate", OLLAMA | {"prompt": "a ship", "stream": False}),
        "ollama generate, streamed": post("/api/generate", OLLAMA | {"prompt": "a ship"}),
        "responses": post("/v1/responses", answer | logprobs),
        "responses, streamed": post("/v1/responses", answer | {"stream": True}),
    }


def stored_responses(model: str) -> dict[str, Ask]:
    """Those that need --enable-response-store: one in the background, and one that goes on from another."""
    body = {"model": model, "input": "Why does the sea wait?", "max_output_tokens": TOKENS, "temperature": 0}

    def in_background(server: Any) -> Any:
        name = post("/v1/responses", body | {"background": True})(server)["id"]
        while (answer := server.get(f"/v1/responses/{name}"))["status"] in ("queued", "in_progress"):
            time.sleep(0.05)
        return answer

    def after_another(server: Any) -> Any:
        first = post("/v1/responses", body | {"max_output_tokens": 8})(server)
        return post("/v1/responses", body | {"previous_response_id": first["id"]})(server)

    return {"responses, background": in_background, "responses, previous": after_another}


# ---- what needs flags of the server


def processor(name: str, module: str = "sglang.srt.sampling.custom_logit_processor") -> str:
    """Serialize a class that ranks can import, as CustomLogitProcessor.to_str does."""
    return json.dumps({"callable": f"c{module}\n{name}\n.".encode().hex()})


def of_flags() -> dict[str, Ask]:
    masked = {"return_sampling_mask": True}
    drawn = {"temperature": 1.0, "top_k": 8}
    thinking = [*prompt(730, 15), THINK_START]
    return {
        "processor without state": generate(
            731,
            custom_logit_processor=processor("DisallowedTokensLogitsProcessor"),
            sampling={"custom_params": {"token_ids": list(range(0, 480, 3))}},
        ),
        "processor that reads the tokens": generate(
            732,
            custom_logit_processor=processor("DeepseekOCRNoRepeatNGramLogitProcessor"),
            sampling={"custom_params": {"ngram_size": 1, "window_size": 40}},
        ),
        "processor with a thinking budget": post(
            "/generate",
            {
                "input_ids": thinking,
                "custom_logit_processor": processor("ThinkingBudget", "processors"),
                "sampling_params": params(custom_params={"thinking_budget": 24}),
                "stream": True,
            },
        ),
        "sampling mask, greedy": generate(733, **masked),
        "sampling mask, drawn": generate(734, sampling=drawn | {"sampling_seed": 1}, **masked),
        "sampling mask, whole": generate(
            735, False, sampling=drawn | {"sampling_seed": 2}, sampling_logprobs_mode="support", **masked
        ),
        "hidden states of the last token": post("/v1/chat/completions", CHAT | {"return_hidden_states": "last"}),
        "hidden states, streamed": post("/v1/chat/completions", CHAT | {"return_hidden_states": "last"} | ENDS),
        "sampling_seed": generate(736, sampling={"temperature": 1.0, "sampling_seed": 7}),
        "sampling_seed, whole": generate(737, False, sampling={"temperature": 1.5, "sampling_seed": -8}),
        "sampling_seed, top_p, penalties": generate(
            738,
            sampling={"temperature": 1.0, "top_p": 0.8, "top_k": 50, "sampling_seed": 9, "frequency_penalty": 0.5},
            **LOGPROBS,
        ),
        "no seed where seeds count": generate(739, sampling={"temperature": 1.0}),
        "OpenAI's seed": post("/v1/chat/completions", CHAT | {"temperature": 1.0, "seed": 5} | ENDS),
    }
