"""Prompts, comparison and verdict of ``anchortp parity``: do two servers of a model give the same answers? Pure."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

PROMPT_LENGTHS = (1, 5, 33, 128, 300)

Logprob = float | None
"""A logprob in JSON. SGLang sends null for NaN and infinity, which JSON does not have."""


class BadAnswer(ValueError):
    """A server's answer does not fit the request; the text says why."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer: logprobs of all prompt tokens but the first, new tokens, and their logprobs."""

    prompt_logprobs: tuple[Logprob, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs):
            raise BadAnswer(f"{len(self.tokens)} tokens came with {len(self.logprobs)} logprobs")
        if not self.tokens:
            raise BadAnswer("no token was generated")


@dataclass(frozen=True)
class Delta:
    """|delta logprob| over ``pairs`` of numbers. ``unpaired``: places where a side has no number."""

    max: float
    mean: float
    pairs: int
    unpaired: int

    def within(self, tolerance: float) -> bool:
        return not self.unpaired and self.max <= tolerance


@dataclass(frozen=True)
class Comparison:
    """Our answer to a prompt against stock's. ``first_difference``: index of the first new token that differs.

    ``decode`` covers the tokens up to the first difference: until there both sides had the same input.
    """

    prompt_tokens: int
    first_difference: int | None
    distinct_tokens: int
    distinct_stock_tokens: int
    prefill: Delta
    decode: Delta

    @property
    def tokens_equal(self) -> bool:
        return self.first_difference is None

    def equal(self, tolerance: float) -> bool:
        return self.tokens_equal and self.prefill.within(tolerance) and self.decode.within(tolerance)


@dataclass(frozen=True)
class Round:
    """The comparisons of all prompts. ``when``: "before loss", "after loss", or "" if no device is lost."""

    when: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Verdict:
    equal: bool
    text: str

    @property
    def exit_code(self) -> int:
        return 0 if self.equal else 1


def make_prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """Return the same random prompts on each call. They avoid the vocabulary's ends, where special tokens are."""
    first, end = vocab_size // 10, vocab_size - vocab_size // 10
    rng = random.Random(vocab_size)
    return [[first + int(rng.random() * (end - first)) for _ in range(length)] for length in lengths]


def request(prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Return the body of ``POST /generate`` whose answer ``read_answer`` reads."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def read_answer(prompt: Sequence[int], body: Any) -> Answer:
    """Read the JSON answer to ``prompt``. Raises BadAnswer if ``body`` is not one."""
    try:
        inputs, outputs = body["meta_info"]["input_token_logprobs"], body["meta_info"]["output_token_logprobs"]
        if [entry[1] for entry in inputs] != list(prompt):
            raise BadAnswer(f"prompt logprobs are not those of the {len(prompt)} tokens that were sent")
        return Answer(
            prompt_logprobs=tuple(entry[0] for entry in inputs[1:]),  # nothing predicts the first one
            tokens=tuple(body["output_ids"]),
            logprobs=tuple(entry[0] for entry in outputs),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"the answer has no tokens with logprobs ({error!r}): {str(body)[:200]}") from None


def answers_as_json(answers: Sequence[Answer]) -> dict[str, Any]:
    return {"answers": [asdict(answer) for answer in answers]}


def answers_from_json(stored: dict[str, Any]) -> list[Answer]:
    """Read what ``answers_as_json`` returned. Raises KeyError, TypeError or BadAnswer for anything else."""
    return [Answer(**{name: tuple(values) for name, values in answer.items()}) for answer in stored["answers"]]


def compare(stock: Answer, ours: Answer) -> Comparison:
    """Compare two answers to the same prompt."""
    first = _first_difference(stock.tokens, ours.tokens)
    shorter = min(len(stock.tokens), len(ours.tokens))
    shared = shorter if first is None else min(first + 1, shorter)
    return Comparison(
        prompt_tokens=len(stock.prompt_logprobs) + 1,
        first_difference=first,
        distinct_tokens=len(set(ours.tokens)),
        distinct_stock_tokens=len(set(stock.tokens)),
        prefill=_delta(stock.prompt_logprobs, ours.prompt_logprobs),
        decode=_delta(stock.logprobs[:shared], ours.logprobs[:shared]),
    )


def compare_all(when: str, stock: Sequence[Answer], ours: Sequence[Answer]) -> Round:
    return Round(when, tuple(compare(one, other) for one, other in zip(stock, ours, strict=True)))


def verdict(rounds: Sequence[Round], tolerance: float) -> Verdict:
    """Return whether all tokens are equal and all logprobs at most ``tolerance`` apart; if not, why."""
    comparisons = [comparison for each in rounds for comparison in each.comparisons]
    deltas = [delta for comparison in comparisons for delta in (comparison.prefill, comparison.decode)]
    furthest = max((delta.max for delta in deltas), default=0.0)
    unpaired = sum(delta.unpaired for delta in deltas)
    changed = [_place(each, one) for each in rounds for one in each.comparisons if not one.tokens_equal]
    reasons = []
    if not comparisons:
        reasons.append("nothing was compared")
    if changed:
        reasons.append(f"tokens differ in {len(changed)} of {len(comparisons)} answers ({', '.join(changed)})")
    if unpaired:
        reasons.append(f"{unpaired} logprobs are not a number on one side or on both")
    if furthest > tolerance:
        reasons.append(f"logprobs are up to {furthest:.1e} apart, more than {tolerance:g}")
    if reasons:
        return Verdict(False, f"DIFFERENT: {'; '.join(reasons)}")
    text = f"EQUAL: all tokens are the same, logprobs at most {furthest:.1e} apart (tolerance {tolerance:g})"
    constant = sum(one.distinct_stock_tokens == 1 < one.decode.pairs for one in comparisons)
    if constant:
        text += f"; but {constant} of {len(comparisons)} answers repeat one token, which would hide errors"
    return Verdict(True, text)


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    return [
        {
            "when": each.when,
            "prompts": [{"tokens_equal": one.tokens_equal} | asdict(one) for one in each.comparisons],
        }
        for each in rounds
    ]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((n for n, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)


def _delta(one: Sequence[Logprob], other: Sequence[Logprob]) -> Delta:
    pairs = list(zip_longest(one, other))
    apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    numbers = [delta for delta in apart if math.isfinite(delta)]  # max() ignores NaN
    mean = math.fsum(numbers) / len(numbers) if numbers else 0.0
    return Delta(max(numbers, default=0.0), mean, len(numbers), len(pairs) - len(numbers))


def _place(each: Round, one: Comparison) -> str:
    where = f"prompt of {one.prompt_tokens}, token {one.first_difference}"
    return f"{each.when}: {where}" if each.when else where
