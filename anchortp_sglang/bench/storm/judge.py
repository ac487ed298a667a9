"""The storm's judge: compares a client's answer with that of an unbroken server. Pure."""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from anchortp_sglang.bench.storm.requests import Request

Ruling = Literal["right", "wrong", "failed"]

LOGPROB_TOLERANCE = 1e-3
_COMPARED_META = (
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "input_token_logprobs",
    "output_token_logprobs",
    "input_top_logprobs",
    "output_top_logprobs",
)
_COMPARED_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass
class Answer:
    """A client's answer. ``choices``: by number, each with the fields that must not depend on faults.

    ``code``: the HTTP status, or 0. ``ended``: the answer is complete. ``error``: what went wrong.
    """

    code: int = 0
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    ended: bool = False
    error: str | None = None

    def take(self, message: dict[str, Any]) -> None:
        """Add a message of /generate or OpenAI's API: a part of a stream, or the whole answer."""
        if "error" in message:
            self.error = str(message["error"])
        elif "choices" in message:
            for choice in message["choices"]:
                self._take_choice(choice)
            usage = message.get("usage")
            self.usage = {name: usage[name] for name in _COMPARED_USAGE} if usage else self.usage
        else:
            self._take_generated(message, message.get("index", 0))

    def _take_generated(self, message: dict[str, Any], number: int) -> None:
        before = self.choices.get(number, {}).get("output_ids", [])
        if message["output_ids"][: len(before)] != before:
            self.error = f"tokens given before were taken back: {before} became {message['output_ids']}"
        meta = {name: value for name, value in message["meta_info"].items() if name in _COMPARED_META}
        self.choices[number] = {"text": message["text"], "output_ids": message["output_ids"], **meta}

    def _take_choice(self, choice: dict[str, Any]) -> None:
        taken = self.choices.setdefault(choice["index"], {"text": "", "logprobs": []})
        part = choice.get("delta") or choice.get("message")
        taken["text"] += (part.get("content") if part is not None else choice.get("text")) or ""
        taken["logprobs"] += _listed(choice.get("logprobs"))
        taken |= {name: choice[name] for name in ("finish_reason", "matched_stop") if choice.get(name) is not None}

    @property
    def tokens(self) -> int:
        """Number of tokens received with their ids, which OpenAI's API does not send."""
        return sum(len(choice.get("output_ids", ())) for choice in self.choices.values())


_INCOMPLETE = "\ufffd"


def _listed(logprobs: Any) -> list[Any]:
    """Return one entry for each token, without text_offset, which counts from the beginning of the message.

    Tokens that end within a character are left out: a chat's stream has their logprobs only if text came in the same
    chunk (serving_chat.py), so that they depend on how tokens were bundled.
    """
    if not logprobs:
        return []
    if "content" in logprobs:
        return [entry for entry in logprobs["content"] or () if _INCOMPLETE not in entry["token"]]
    return [list(entry) for entry in zip(*(logprobs[k] for k in ("tokens", "token_logprobs")), strict=True)]


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer. ``wrong_tokens``: lost, doubled or changed ids; at least 1 if the answer is wrong."""

    ruling: Ruling
    why: str = ""
    wrong_tokens: int = 0


RIGHT = Verdict("right")


def judge(request: Request, expected: Answer | None, got: Answer) -> Verdict:
    """Judge ``got``. ``expected``: the unbroken answer to the same request; unused if it must be refused."""
    if request.way == "refused":
        return (
            RIGHT if got.code == 400 else Verdict("failed", f"answered {got.code} {got.error or ''} to a bad request")
        )
    assert expected is not None
    if got.error is not None:
        return Verdict("failed", f"{got.code} {got.error}")
    if request.way == "whole" or _is_complete(got):
        if not got.ended:
            return Verdict("failed", "the connection ended before the answer did")
        if reasons := [reason for reason in _reasons(got) if _is_abort(reason)]:
            return Verdict("failed", f"ended by the server: {reasons[0]}")
        problem = difference(_whole(expected), _whole(got))
    else:
        if request.way == "abort" and not got.ended:
            return Verdict("failed", "an aborted stream did not end")
        problem = _prefix_difference(expected, got)
    if problem is None:
        return RIGHT
    return Verdict("wrong", problem, max(1, wrong_tokens(expected, got, request.way == "whole")))


def _is_complete(answer: Answer) -> bool:
    reasons = _reasons(answer)
    return answer.ended and bool(reasons) and all(reasons) and not any(_is_abort(reason) for reason in reasons)


def _reasons(answer: Answer) -> list[Any]:
    return [choice.get("finish_reason") for choice in answer.choices.values()]


def _is_abort(reason: Any) -> bool:
    return reason == "abort" or (isinstance(reason, dict) and reason.get("type") == "abort")


def _whole(answer: Answer) -> dict[str, Any]:
    return {"choices": answer.choices, "usage": answer.usage}


def _prefix_difference(expected: Answer, got: Answer) -> str | None:
    for number, choice in got.choices.items():
        name = "output_ids" if "output_ids" in choice else "text"
        if number not in expected.choices:
            return f"choice {number} is not in the unbroken answer"
        if expected.choices[number][name][: len(choice[name])] != choice[name]:
            return f"choice {number} began as {choice[name]!r}, not as {expected.choices[number][name]!r}"
    return None


def wrong_tokens(expected: Answer, got: Answer, to_the_end: bool) -> int:
    """Count the token ids that differ from the expected ones; missing ones count only if ``to_the_end``."""
    count = 0
    for number in expected.choices.keys() | got.choices.keys():
        one = expected.choices.get(number, {}).get("output_ids", [])
        other = got.choices.get(number, {}).get("output_ids", [])
        pairs = itertools.zip_longest(one if to_the_end else one[: len(other)], other)
        count += sum(a != b for a, b in pairs)
    return count


def difference(expected: Any, got: Any, where: str = "") -> str | None:
    """Describe where and how two answers differ; None if they are equal. Floats (logprobs) may differ a little."""
    if isinstance(expected, float) and isinstance(got, float):
        same = expected == got or abs(expected - got) <= LOGPROB_TOLERANCE
    elif isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        return _first(difference(value, got[key], f"{where}.{key}") for key, value in expected.items())
    elif isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        pairs = zip(expected, got, strict=False)
        problem = _first(difference(a, b, f"{where}[{number}]") for number, (a, b) in enumerate(pairs))
        return problem or (
            None if len(expected) == len(got) else f"{where}: {len(got)} instead of {len(expected)} entries"
        )
    else:
        same = type(expected) is type(got) and expected == got
    return None if same else f"{where}: {_short(got)} instead of {_short(expected)}"


def _first(found: Any) -> str | None:
    return next((problem for problem in found if problem is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"
