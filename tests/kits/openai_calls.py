"""Calls of the OpenAI client, and what of their answers no fault may change."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

TOKENS = 48
AT_A_TIME = 16
PROMPTS = ["Once upon a time there was a ship with four anchors", "The wind did not wait for them, and"]
MESSAGES = [
    {"role": "system", "content": "Answer in the voice of a captain."},
    {"role": "user", "content": "Why does the sea wait for the ship? ⚓"},
]
LONGER = [*MESSAGES, {"role": "assistant", "content": "Aye."}, {"role": "user", "content": "And the crew?"}]
LOGPROB_APART = 1e-3


@dataclass(frozen=True)
class Answer:
    """By choice: text and finish reason, and the tokens' logprobs in order. ``usage``: prompt, completion, total."""

    choices: dict[int, tuple[str, str]]
    logprobs: dict[int, list[float]]
    usage: tuple[int, int, int]

    def same_as(self, other: "Answer") -> bool:
        """Logprobs may differ in their last bits: a narrower server sums in another order."""
        return (
            (self.choices, self.usage) == (other.choices, other.usage)
            and self.logprobs.keys() == other.logprobs.keys()
            and all(_close(values, other.logprobs[index]) for index, values in self.logprobs.items())
        )


def _close(one: list[float], other: list[float]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=0, abs_tol=LOGPROB_APART) for a, b in pairs)


@dataclass(frozen=True)
class Call:
    """One request; ``given`` on top of what all have: greedy, and as many tokens as are asked for."""

    given: dict[str, Any] = field(default_factory=dict)
    stream: bool = False

    def __call__(self, client: openai.OpenAI) -> Answer:
        create = client.chat.completions.create if "messages" in self.given else client.completions.create
        given = {"model": "default", "max_tokens": TOKENS, "temperature": 0} | self.given
        given["extra_body"] = {"ignore_eos": True} | given.get("extra_body", {})
        if self.stream:
            return _gathered(create(stream=True, stream_options={"include_usage": True}, **given))
        return _gathered([create(**given)])


def ask_all(url: str) -> dict[str, Answer]:
    """The answers to CALLS, made many at a time."""
    # No retries: a retried request would hide that it broke.
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(AT_A_TIME) as threads,
    ):
        return dict(zip(CALLS, threads.map(lambda call: call(client), CALLS.values()), strict=True))


def _gathered(chunks: Iterable[Any]) -> Answer:
    texts: dict[int, str] = {}
    reasons: dict[int, Any] = {}
    logprobs: dict[int, list[float]] = {}
    usage = None
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + _text(choice)
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            logprobs.setdefault(choice.index, []).extend(_logprobs(choice.logprobs))
        usage = chunk.usage or usage
    assert usage is not None, "an answer without usage"
    return Answer(
        {index: (text, reasons[index]) for index, text in texts.items()},
        logprobs,
        (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
    )


def _text(choice: Any) -> str:
    if hasattr(choice, "text"):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def _logprobs(given: Any) -> Iterable[float]:
    if given is None:
        return
    if hasattr(given, "token_logprobs"):
        # The first token of an echoed prompt has none.
        yield from (0.0 if value is None else value for value in given.token_logprobs)
    for token in getattr(given, "content", None) or []:
        yield token.logprob
        yield from (top.logprob for top in token.top_logprobs)


_BOTH: dict[str, dict[str, Any]] = {
    "": {},
    ", n=3": {"n": 3},
    ", stop": {"stop": ["e", "a", "0"]},
    ", stop, n=2": {"stop": ["b", "the"], "n": 2},
    ", stop_regex": {"extra_body": {"stop_regex": r"[aeiou]\d"}},
    ", one token": {"max_tokens": 1},
    ", penalties": {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    ", min_tokens": {"stop": ["e"], "extra_body": {"min_tokens": 12}},
}
_REQUESTS: dict[str, dict[str, Any]] = {
    **{f"completion{name}": {"prompt": PROMPTS[0]} | more for name, more in _BOTH.items()},
    "completion of tokens": {"prompt": list(range(100, 130))},
    "completion of a list": {"prompt": PROMPTS},
    "completion of a list, n=2": {"prompt": PROMPTS, "n": 2},
    "completion, echo": {"prompt": PROMPTS[0], "echo": True},
    "completion, logprobs": {"prompt": PROMPTS[0], "logprobs": 3},
    "completion, logprobs, n=2": {"prompt": PROMPTS[1], "logprobs": 2, "n": 2},
    "completion, echo, logprobs": {"prompt": PROMPTS[0], "logprobs": 2, "echo": True},
    **{f"chat{name}": {"messages": MESSAGES} | more for name, more in _BOTH.items()},
    "chat of several turns": {"messages": LONGER},
    "chat, logprobs": {"messages": MESSAGES, "logprobs": True},
    "chat, top_logprobs, n=2": {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, "n": 2},
}
CALLS = {
    name + (", streamed" if stream else ""): Call(given, stream)
    for name, given in _REQUESTS.items()
    for stream in (False, True)
}
