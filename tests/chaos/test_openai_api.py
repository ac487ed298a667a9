"""OpenAI's API and batches, streaming and not, cut by a kill: text and usage as in an unbroken run."""

import threading

import openai
import pytest
from faults import kill_rank, recovered
from histories import assert_identical, outcomes, prompt, request

from anchortp_sglang.testing.streams import Streams

TOKENS = 110
MESSAGES = [{"role": "user", "content": "Why does the sea wait for the ship? ⚓"}]
PROMPTS = ["Once upon a time there was an anchor", "The wind did not wait for them, and"]
GREEDY = {"model": "default", "max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
USAGE = {"stream_options": {"include_usage": True}}
CLOCK = [request(prompt(900, 20), TOKENS)]  # streams beside the others, and tells how far they are


def chat(client, n):
    answer = client.chat.completions.create(messages=MESSAGES, n=n, **GREEDY)
    return {c.index: (c.message.content, c.finish_reason) for c in answer.choices}, counted(answer.usage)


def chat_stream(client, n):
    chunks = client.chat.completions.create(messages=MESSAGES, n=n, stream=True, **USAGE, **GREEDY)
    return gathered(chunks, lambda choice: choice.delta.content)


def completion(client, prompt, n):
    answer = client.completions.create(prompt=prompt, n=n, **GREEDY)
    return {c.index: (c.text, c.finish_reason) for c in answer.choices}, counted(answer.usage)


def completion_stream(client, prompt, n):
    chunks = client.completions.create(prompt=prompt, n=n, stream=True, **USAGE, **GREEDY)
    return gathered(chunks, lambda choice: choice.text)


def gathered(chunks, text_of):
    """As the whole answers above: {index: (text, finish reason)}, usage."""
    texts, reasons, usage = {}, {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (text_of(choice) or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        usage = chunk.usage or usage
    return {index: (text, reasons[index]) for index, text in texts.items()}, counted(usage)


def counted(usage):
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


CALLS = {
    "chat": lambda client: chat(client, 1),
    "chat, n=2": lambda client: chat(client, 2),
    "chat stream": lambda client: chat_stream(client, 1),
    "chat stream, n=2": lambda client: chat_stream(client, 2),
    "completion": lambda client: completion(client, PROMPTS[0], 1),
    "completion of a list": lambda client: completion(client, PROMPTS, 1),
    "completion of a list, n=2": lambda client: completion(client, PROMPTS, 2),
    "completion stream": lambda client: completion_stream(client, PROMPTS[0], 1),
    "completion stream of a list, n=2": lambda client: completion_stream(client, PROMPTS, 2),
}


class Answers:
    """Every call of CALLS at once, each in its thread."""

    def __init__(self, server):
        # No retries: a retried request would hide that it broke.
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.given = {}
        self._threads = [threading.Thread(target=self._call, args=(name,)) for name in CALLS]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        for thread in self._threads:
            thread.join()
        self.client.close()

    def _call(self, name):
        try:
            self.given[name] = CALLS[name](self.client)
        except Exception as error:  # whatever the client raises is what its user would see
            self.given[name] = repr(error)


@pytest.fixture(scope="module")
def answers(shared):
    """What the calls give when nothing happens."""
    server, _ = shared
    with Answers(server) as unbroken:
        pass
    return unbroken.given


@pytest.mark.parametrize("rank", [0, 2])
def test_text_and_usage_are_those_of_an_unbroken_run(server, unbroken, answers, rank):
    expected = unbroken(CLOCK)
    with Answers(server) as broken, Streams(server.url, CLOCK) as clock:
        clock.wait_tokens(TOKENS // 2)
        assert not any("chat" in name for name in broken.given), "an answer was complete before the kill"
        recovered(server, kill_rank(server, rank), "process")
    assert_identical(expected, outcomes(clock.histories))
    for name in CALLS:
        assert broken.given[name] == answers[name], name


def test_the_unbroken_answers_are_whole(answers):
    for name, given in answers.items():
        assert not isinstance(given, str), f"{name}: {given}"
        choices, (prompt_tokens, completion_tokens, total_tokens) = given
        assert len(choices) == (2 if "list" in name else 1) * (2 if "n=2" in name else 1)
        assert all(text and reason == "length" for text, reason in choices.values())
        assert completion_tokens == TOKENS * len(choices)
        assert prompt_tokens > 0 and total_tokens == prompt_tokens + completion_tokens


BATCH = {
    "input_ids": [prompt(910, 20), prompt(911, 30), prompt(912, 40)],
    "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
}


def batch_answers(server, body):
    return [
        (one["output_ids"], one["text"], one["meta_info"]["prompt_tokens"], one["meta_info"]["completion_tokens"])
        for one in server.post("/generate", body)
    ]


def test_a_batch_sent_to_generate_is_answered_whole(server, unbroken):
    n = 2
    body = BATCH | {"sampling_params": BATCH["sampling_params"] | {"n": n}}
    expected, clock_expected = batch_answers(server, body), unbroken(CLOCK)
    assert len(expected) == 3 * n
    given = []
    thread = threading.Thread(target=lambda: given.extend(batch_answers(server, body)))
    with Streams(server.url, CLOCK) as clock:
        thread.start()
        clock.wait_tokens(TOKENS // 2)
        assert not given, "the answer was complete before the kill"
        recovered(server, kill_rank(server, 1), "process")
        thread.join()
    assert given == expected
    assert_identical(clock_expected, outcomes(clock.histories))
