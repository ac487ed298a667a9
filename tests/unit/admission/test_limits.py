"""What ranks can take of a request: accepted within the bounds, refused beyond, and the field is named."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.admission.limits import (
    FLOAT32_MAX,
    INT32_MAX,
    MAX_PARALLEL_SAMPLES,
    Limits,
    judge,
    judge_as_received,
    without_what_has_no_effect,
)

VOCAB, EOS = 64, 2
LIMITS = Limits(VOCAB, frozenset({EOS}))
TOKENS = st.integers(0, VOCAB - 1)
STRANGERS = st.integers(-(2**63), -1) | st.integers(VOCAB, 2**63 - 1)


def sampling(**changed):
    fields = {
        "temperature": 1.0,
        "top_k": 1 << 30,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "logit_bias": None,
        "stop_token_ids": None,
    }
    return SimpleNamespace(**(fields | changed))


def request(input_ids=(1, 2, 3), return_logprob=False, top_logprobs_num=0, logprob_start_len=-1, **of_sampling):
    return SimpleNamespace(
        input_ids=input_ids,
        return_logprob=return_logprob,
        top_logprobs_num=top_logprobs_num,
        logprob_start_len=logprob_start_len,
        sampling_params=sampling(**of_sampling),
    )


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=9),
    top=st.integers(0, VOCAB),
    temperature=st.floats(1e-6, FLOAT32_MAX),
    top_k=st.integers(1, INT32_MAX),
    repetition_penalty=st.floats(1e-20, 2),
    bias=st.dictionaries(TOKENS.map(str), st.floats(-1e30, 100), max_size=9),
    stop=st.sets(TOKENS, max_size=9),
    data=st.data(),
)
def test_what_is_within_the_bounds_is_admitted(prompt, top, temperature, top_k, repetition_penalty, bias, stop, data):
    start = data.draw(st.integers(-1, len(prompt)))
    of_sampling = {"temperature": temperature, "top_k": top_k, "repetition_penalty": repetition_penalty}
    one = request(prompt, True, top, start, **of_sampling, logit_bias=bias, stop_token_ids=stop, min_new_tokens=1)
    assert judge(one, LIMITS) is None


@given(STRANGERS, st.lists(TOKENS, max_size=5))
def test_tokens_that_are_not_of_the_vocabulary_are_refused_in_prompts_and_where_they_are_suppressed(stranger, others):
    assert f"input_ids has the token {stranger}" in judge(request([*others, stranger]), LIMITS)
    one = request(stop_token_ids={*others, stranger}, min_new_tokens=4)
    assert f"stop_token_ids has the token {stranger}" in judge(one, LIMITS)


@given(STRANGERS, st.sets(TOKENS, max_size=5))
def test_unknown_stop_tokens_do_no_harm_to_others_of_the_batch(stranger, known):
    """Alone they would never match; a neighbour with min_new_tokens makes them an index."""
    one = request(stop_token_ids={*known, stranger})
    assert judge(one, LIMITS) is None
    assert without_what_has_no_effect(one, LIMITS).sampling_params.stop_token_ids == (known or None)


def test_min_p_is_refused_where_tokens_are_drawn_with_seeds():
    one = request(min_p=0.1)
    assert judge(one, LIMITS) is None
    assert "min_p is 0.1" in judge(one, Limits(VOCAB, seeded=True))
    assert judge(request(), Limits(VOCAB, seeded=True)) is None


def test_top_logprobs_without_logprobs_do_no_harm_to_others_of_the_batch():
    one = without_what_has_no_effect(request(top_logprobs_num=10**6), LIMITS)
    assert judge(one, LIMITS) is None and one.top_logprobs_num == 0
    assert without_what_has_no_effect(request(return_logprob=True, top_logprobs_num=5), LIMITS).top_logprobs_num == 5


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("input_ids is empty", {"input_ids": ()}),
        ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": VOCAB + 1}),
        ("top_logprobs_num", {"return_logprob": True, "top_logprobs_num": -1}),
        ("logprob_start_len is -9; it must be from -1 to 3", {"return_logprob": True, "logprob_start_len": -9}),
        ("logprob_start_len is 4", {"return_logprob": True, "logprob_start_len": 4}),
        ("temperature", {"temperature": 1e39}),
        ("top_k is 2147483648", {"top_k": INT32_MAX + 1}),
        ("logit_bias of token 5 is 1e+39", {"logit_bias": {"5": 1e39}}),
        ("logit_bias", {"logit_bias": {"5": math.nan}}),
        ("logit_bias", {"logit_bias": {"5": math.inf}}),
        ("logit_bias", {"logit_bias": {"5": -1e39}}),
        ("logit_bias is 3e+38", {"logit_bias": {"5": 3e38}, "temperature": 0.1}),
        ("repetition_penalty", {"repetition_penalty": 1e-38}),
        ("repetition_penalty", {"repetition_penalty": 5e-324, "temperature": 1e-6}),
        ("forbids every token", {"logit_bias": {str(token): -math.inf for token in range(VOCAB)}}),
        ("forbids every token", {"logit_bias": {str(token): -1e38 for token in range(VOCAB)}, "temperature": 0.1}),
        ("forbids every token", {"stop_token_ids": set(range(VOCAB)), "min_new_tokens": 1}),
        ("forbids every token", {"stop_token_ids": set(range(VOCAB)) - {EOS}, "min_new_tokens": 1}),
    ],
)
def test_what_would_end_a_rank_is_refused_and_the_field_named(named, fields):
    assert named in judge(request(**fields), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"5": -math.inf}},
        {"logit_bias": {"5": 100, "6": -100}, "temperature": 1e-6},
        {"logit_bias": {str(token): -math.inf for token in range(1, VOCAB)}},
        {"stop_token_ids": set(range(VOCAB)) - {EOS}},
        {"repetition_penalty": 1e-3},
        {"logprob_start_len": -9},
    ],
)
def test_what_ranks_can_serve_is_not_refused(fields):
    assert judge(request(**fields), LIMITS) is None


@given(
    bias=st.dictionaries(st.integers(0, 3), st.floats(-FLOAT32_MAX, FLOAT32_MAX) | st.just(-math.inf), max_size=4),
    temperature=st.floats(1e-6, 1e30),
    penalty=st.floats(1e-320, 2),
    logits=st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
)
def test_whatever_is_admitted_leaves_probabilities_that_can_be_sampled(bias, temperature, penalty, logits):
    """As SGLang's sampler computes them, for any token penalized; torch.multinomial raises on NaN."""
    fields = {"logit_bias": {str(token): value for token, value in bias.items()}, "temperature": temperature}
    if judge(request((1,), **fields, repetition_penalty=penalty), Limits(4)) is not None:
        return
    row = torch.tensor(logits, dtype=torch.float32)
    for token, value in bias.items():
        row[token] += torch.tensor(value, dtype=torch.float32)
    scale = torch.tensor(penalty, dtype=torch.float32)
    row = torch.where(row < 0, row * scale, row / scale) / torch.tensor(temperature, dtype=torch.float32)
    torch.multinomial(torch.softmax(row, -1), 1)


@given(st.integers(1, MAX_PARALLEL_SAMPLES), st.booleans(), st.none() | st.integers())
def test_whole_numbers_are_taken_as_received(n, is_batch, tokens):
    assert judge_as_received({"n": n, "max_new_tokens": tokens}, is_batch) is None


@pytest.mark.parametrize("n", [MAX_PARALLEL_SAMPLES + 1, 10**30, 1.5, "2", None])
def test_what_main_could_not_expand_is_refused(n):
    assert judge_as_received([{}, {"n": n}], True).startswith("n is ")


@pytest.mark.parametrize("pattern", ["(", ["a", "*"], "(?<=a+)b", "a{99999999999}", "a(?i)", 5, [None, 7]])
def test_what_is_no_regular_expression_is_refused(pattern):
    assert judge_as_received([{}, {"stop_regex": pattern}], True).startswith("stop_regex ")


@pytest.mark.parametrize("pattern", [None, "", "[0-9]+", ["a|b", "(?i)c"]])
def test_regular_expressions_are_taken(pattern):
    assert judge_as_received({"stop_regex": pattern}, False) is None


def test_numbers_that_main_computes_with_are_judged_as_received():
    assert judge_as_received({"max_new_tokens": "8"}, False).startswith("max_new_tokens is '8'")
    assert judge_as_received({"n": 0}, True).startswith("n is 0")
    assert judge_as_received({"n": 0}, False) is None  # served as 1
    assert judge_as_received(None, False) is None


def test_n_is_bounded_over_all_prompts_of_a_request():
    assert judge_as_received({"n": 100}, True, prompts=100) is None
    assert judge_as_received({"n": 10_000}, True, prompts=100).startswith("n is 10000 for 100 prompts")


def test_stop_strings_that_would_keep_main_busy_are_refused():
    assert judge_as_received({"stop": ["a" * 1000, "b"]}, False) is None
    assert judge_as_received({"stop": ["a", "b" * 10**6]}, False).startswith("stop has 1000000 characters")
