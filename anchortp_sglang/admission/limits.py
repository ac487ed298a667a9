"""Bounds within which no rank fails on a request, as pure functions.

SGLang 0.5.23 checks a request in ``SamplingParams.verify`` and ``TokenizerManager._validate_one_request``. Values that
pass there can still raise when the scheduler indexes, casts and samples. That ends the rank, and the replayed request
would end the next one. The functions here refuse such values. They judge the request as it would go to the ranks (a
``TokenizedGenerateReqInput``: token ids, normalized SamplingParams), so all APIs are judged alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT32_MAX = 3.4028234663852886e38
INT32_MAX = 2**31 - 1
MAX_PARALLEL_SAMPLES = 16384
"""Largest ``n``, over all prompts. Main expands it into requests before any other check."""
MAX_STOP_CHARS = 16384

_LOGIT_MAX = 1e6
"""Larger than any model's logit. Biases and divisors must keep a logit of this size finite."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. ``end_token_ids``: those that min_new_tokens suppresses in every request.

    ``seeded``: whether tokens are drawn with each request's sampling_seed (--enable-deterministic-inference).
    """

    vocab_size: int
    end_token_ids: frozenset[int] = frozenset()
    seeded: bool = False


def judge(request: Any, limits: Limits) -> str | None:
    """Return why ranks would fail on the request (field, value and bound), or None."""
    sampling = request.sampling_params
    return (
        _prompt(request.input_ids, limits)
        or _logprobs(request, limits)
        or _number("temperature", sampling.temperature, 0, FLOAT32_MAX)
        or _number("top_k", sampling.top_k, 1, INT32_MAX)
        or _min_p(sampling, limits)
        or _logit_bias(sampling)
        or _overflow(sampling)
        or _stop_token_ids(sampling, limits)
        or _no_token_left(sampling, limits)
    )


def without_what_has_no_effect(request: Any, limits: Limits) -> Any:
    """Clear the request's fields that have no effect on itself but can fail its batch, and return it.

    A batch takes the largest ``top_logprobs_num`` of its requests, and suppresses the stop tokens of all as soon as one
    of them asks for min_new_tokens.
    """
    sampling = request.sampling_params
    if not request.return_logprob:
        request.top_logprobs_num = 0
    if sampling.stop_token_ids:
        known = {token for token in sampling.stop_token_ids if 0 <= token < limits.vocab_size}
        sampling.stop_token_ids = known or None
    return request


def judge_as_received(sampling_params: Any, is_batch: bool, prompts: int = 1) -> str | None:
    """Return why main would fail on a request before it is tokenized, or None.

    SGLang would raise another error than ValueError (its 400), or expand the request without bound.
    ``sampling_params``: a mapping, a list of them, or None. ``prompts``: their number in the request.
    """
    for one in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        if not isinstance(one, Mapping):
            continue
        n, tokens = one.get("n", 1), one.get("max_new_tokens")
        if not isinstance(n, int) or n > MAX_PARALLEL_SAMPLES or (n < 1 and is_batch):
            return f"n is {shown(n)}; it must be an integer from 1 to {MAX_PARALLEL_SAMPLES}"
        if n * prompts > MAX_PARALLEL_SAMPLES:
            return f"n is {n} for {prompts} prompts; n times prompts may be at most {MAX_PARALLEL_SAMPLES}"
        if (reason := _stop(one.get("stop"))) is not None:
            return reason
        if not isinstance(tokens, int | None):
            return f"max_new_tokens is {shown(tokens)}; it must be an integer"
        if (reason := _stop_regex(one.get("stop_regex"))) is not None:
            return reason
    return None


def _stop(texts: Any) -> str | None:
    """Refuse long stop texts: SamplingParams.normalize tokenizes them on main's event loop."""
    strings = [text for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str)]
    longest = max(map(len, strings), default=0)
    return f"stop has {longest} characters; at most {MAX_STOP_CHARS} are allowed" if longest > MAX_STOP_CHARS else None


def _stop_regex(patterns: Any) -> str | None:
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError, TypeError) as error:
            return f"stop_regex {shown(pattern)} is not a regular expression: {error}"
    return None


def _number(name: str, value: float, low: float, high: float) -> str | None:
    return None if low <= value <= high else f"{name} is {shown(value)}; it must be from {low} to {high}"


def _prompt(input_ids: Any, limits: Limits) -> str | None:
    if not input_ids:
        return "text, prompt or input_ids is empty: a prompt must have at least one token"
    tokens = np.asarray(input_ids, np.int64)  # no copy of SGLang's array, which may be long
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < limits.vocab_size:
            return f"input_ids has the token {token}; {_in_vocabulary(limits)}"
    return None


def _logprobs(request: Any, limits: Limits) -> str | None:
    if not request.return_logprob:
        return None
    count, start, length = request.top_logprobs_num, request.logprob_start_len, len(request.input_ids)
    if not 0 <= count <= limits.vocab_size:
        name = "top_logprobs_num (logprobs or top_logprobs in OpenAI's API)"
        return f"{name} is {count}; it must be from 0 to {limits.vocab_size}, the size of the vocabulary"
    if not -1 <= start <= length:
        return f"logprob_start_len is {start}; it must be from -1 to {length}, the tokens of the prompt"
    return None


def _min_p(sampling: Any, limits: Limits) -> str | None:
    """Refuse min_p beside seeds, which top_k_top_p_min_p_sampling_from_probs_torch asserts for the whole batch."""
    if sampling.min_p > 0 and limits.seeded:
        return f"min_p is {shown(sampling.min_p)}; with --enable-deterministic-inference it must be 0"
    return None


def _logit_bias(sampling: Any) -> str | None:
    for token, bias in (sampling.logit_bias or {}).items():
        if math.isnan(bias) or bias > FLOAT32_MAX or -math.inf < bias < -FLOAT32_MAX:
            return f"logit_bias of token {token} is {bias}; it must be a float32, or -inf"
    return None


def _overflow(sampling: Any) -> str | None:
    """Refuse infinite logits: two of them make every probability NaN, and sampling raises for the whole batch."""
    bias = max(0.0, *(sampling.logit_bias or {}).values(), 0.0)
    scale = min(1.0, sampling.temperature) * min(1.0, sampling.repetition_penalty)
    if bias + _LOGIT_MAX <= FLOAT32_MAX * scale:
        return None
    name, value = ("logit_bias", bias) if bias > _LOGIT_MAX else ("repetition_penalty", sampling.repetition_penalty)
    return (
        f"{name} is {value}: with temperature {sampling.temperature} and repetition_penalty "
        f"{sampling.repetition_penalty} logits would exceed {FLOAT32_MAX}, the largest float32"
    )


def _stop_token_ids(sampling: Any, limits: Limits) -> str | None:
    if sampling.min_new_tokens > 0:  # else an unknown token only never matches
        for token in sampling.stop_token_ids or ():
            if not 0 <= token < limits.vocab_size:
                return f"stop_token_ids has the token {token}; with min_new_tokens {_in_vocabulary(limits)}"
    return None


def _no_token_left(sampling: Any, limits: Limits) -> str | None:
    lowest = (_LOGIT_MAX - FLOAT32_MAX * min(1.0, sampling.temperature)) / 2  # penalties may double it to -inf
    banned = {int(token) for token, bias in (sampling.logit_bias or {}).items() if bias <= lowest}
    if sampling.min_new_tokens > 0:
        banned |= limits.end_token_ids | (sampling.stop_token_ids or set())
    if sum(0 <= token < limits.vocab_size for token in banned) < limits.vocab_size:
        return None
    return "logit_bias, or stop_token_ids with min_new_tokens, forbids every token of the vocabulary"


def _in_vocabulary(limits: Limits) -> str:
    return f"tokens must be from 0 to {limits.vocab_size - 1}, the vocabulary's last"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
