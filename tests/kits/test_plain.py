"""SGLang's own tests, frontend and benchmark, and the OpenAI client, on our server without faults."""

from collections import Counter
from dataclasses import replace

import kit_list
import programs
import sglang_tests
from kit_tests import test_every_request_of_the_benchmark_succeeds, test_kit, test_program  # noqa: F401
from openai_calls import CALLS, Answer


def test_every_kit_test_is_either_run_or_left_out_for_one_reason():
    found = Counter({test: len(kit_list.places(test)) for test in sglang_tests.kit_tests()})
    assert found.total() > 100
    assert {test: times for test, times in found.items() if times != 1} == {}
    assert [pattern for pattern in kit_list.PATTERNS if not kit_list.matching(pattern, found)] == []


def test_every_program_is_either_run_or_left_out_for_a_reason():
    assert sorted([*programs.QUICK, *programs.SLOW, *programs.SKIPPED]) == sorted(sglang_tests.programs())


def test_answers_differ_by_text_usage_and_logprobs_but_not_by_last_bits():
    answer = Answer({0: ("Aye.", "stop")}, {0: [-1.0, -2.0]}, (5, 2, 7))
    assert answer.same_as(replace(answer, logprobs={0: [-1.0001, -2.0]}))
    for other in (
        replace(answer, choices={0: ("Aye", "stop")}),
        replace(answer, choices={0: ("Aye.", "length")}),
        replace(answer, choices={**answer.choices, 1: ("", "stop")}),
        replace(answer, logprobs={0: [-1.0]}),
        replace(answer, logprobs={0: [-1.0, -2.1]}),
        replace(answer, usage=(5, 3, 8)),
    ):
        assert not answer.same_as(other)


def test_answers_to_the_openai_client_are_whole(answers):
    for name, answer in answers.items():
        given = CALLS[name].given
        prompts = len(given["prompt"]) if "of a list" in name else 1
        assert sorted(answer.choices) == list(range(prompts * given.get("n", 1))), name
        stops = "stop" in given or "stop_regex" in given.get("extra_body", {})
        assert {reason for _, reason in answer.choices.values()} == {"stop" if stops else "length"}, name
        assert stops or all(text for text, _ in answer.choices.values()), name
        assert bool(any(answer.logprobs.values())) == ("logprobs" in given), name


def test_a_stream_says_what_a_whole_answer_does(answers):
    for name, answer in answers.items():
        if CALLS[name].stream:
            assert answer.same_as(answers[name.removesuffix(", streamed")]), name
