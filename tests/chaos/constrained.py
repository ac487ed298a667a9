"""Requests whose output a grammar constrains, of each kind that SGLang has, and what their text must be."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from histories import prompt, request
from tokenizers import Tokenizer

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

THINK_END = 507
"""The last token of the tiny tokenizer that is not special: here it is ``</think>``."""
CLOSING_BRACE = "92"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z ]{5,30}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "minItems": 6, "maxItems": 9},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WORDS = "(yes|no|perhaps)( (yes|no|perhaps)){12,20}"
NUMBERS = 'root ::= "[" item ("," item){12,20} "]"\nitem ::= [1-9][0-9]{1,3}'
TRIGGERED = {
    "structures": [{"begin": "<call>", "schema": SCHEMA, "end": "</call>"}],
    "triggers": ["<call>"],
    "at_least_one": True,
}
TAG = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}


def thinking_checkpoint(folder):
    """A tiny checkpoint whose tokenizer has a token for the end of reasoning."""
    write_checkpoint(folder, "qwen3")
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    vocab = made["model"]["vocab"]
    replaced = next(token for token, number in vocab.items() if number == THINK_END)
    vocab["</think>"] = vocab.pop(replaced)
    made["model"]["merges"] = [pair for pair in made["model"]["merges"] if "".join(pair) != replaced]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    made["added_tokens"].append({"id": THINK_END, "content": "</think>"} | plain)
    file.write_text(json.dumps(made))
    return folder


def no_blanks(checkpoint):
    """A bias against white space, which JSON in a structural tag may have without end."""
    vocab = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    return {str(number): -50.0 for token, number in vocab.items() if not token.strip("ĉĊčĠ")}


def is_json(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def within(begin: str, end: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert text.startswith(begin) and end in text, text
        is_json(text.removeprefix(begin).partition(end)[0])

    return check


def matches(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


def after_reasoning(text: str) -> None:
    thoughts, end, answer = text.partition("</think>")
    assert end and len(thoughts) > 5, text
    is_json(answer)


def begins_an_object(text: str) -> None:
    """Random weights do not close it again."""
    assert text.startswith('{"'), text


def grammars(bias: dict[str, float]) -> dict[str, tuple[dict[str, Any], Callable[[str], None]]]:
    """By name: what /generate is asked beside the prompt, and a check of the text."""

    def ask(**sampling: Any) -> dict[str, Any]:
        return {"max_new_tokens": 300, "temperature": 0} | sampling

    return {
        "json_schema": (ask(json_schema=json.dumps(SCHEMA)), is_json),
        "json_object": (
            ask(json_schema='{"type": "object"}', logit_bias={CLOSING_BRACE: -4.0}, max_new_tokens=80),
            begins_an_object,
        ),
        "regex": (ask(regex=WORDS), matches(WORDS)),
        "ebnf": (ask(ebnf=NUMBERS), matches(r"\[[1-9]\d{1,3}(,[1-9]\d{1,3}){12,20}\]")),
        "triggered tags": (
            ask(structural_tag=json.dumps(TRIGGERED), logit_bias=bias, max_new_tokens=90),
            within("<call>", "</call>"),
        ),
        "tag": (
            ask(structural_tag=json.dumps({"type": "structural_tag", "format": TAG}), logit_bias=bias),
            within("<f>", "</f>"),
        ),
        "reasoning": (ask(json_schema=json.dumps(SCHEMA), logit_bias={str(THINK_END): 2.2}), after_reasoning),
        "penalties": (
            ask(json_schema=json.dumps(SCHEMA), frequency_penalty=0.3, repetition_penalty=1.1),
            is_json,
        ),
    }


def generate(name: str, sampling: dict[str, Any], seed: int, length: int) -> dict[str, Any]:
    """A /generate request with a prompt of its own."""
    thinks = {"require_reasoning": True} if name == "reasoning" else {}
    return request(prompt(seed, length), sampling["max_new_tokens"], ignore_eos=False, **sampling) | thinks


def nested(depth: int, title: str) -> str:
    """A JSON schema of nested arrays. xgrammar compiles 300 of them in two seconds; it keeps the last ones, by text."""
    return '{"type": "array", "items": ' * depth + json.dumps({"type": "integer", "title": title}) + "}" * depth


# ---- OpenAI's API

TOOL = {"type": "function", "function": {"name": "book", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "book"}}
LOOSE = {"type": "function", "function": {"name": "book", "parameters": SCHEMA}}
CALL = (
    '<tool_call>\\n\\{"name": "book", "arguments": \\{"name": "[a-z ]{5,20}", "age": [1-9][0-9]{0,3}, '
    '"tags": \\["a"(, "(a|bc)"){5,7}\\]\\}\\}\\n</tool_call>'
)
"""The text of a model that chooses to call a tool, in the format that the parser qwen25 reads."""
CHAT_TOKENS = 80
TOOL_TOKENS = 180


def calls(bias: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Chats by name, as keyword arguments of the OpenAI client. In all of them reasoning ends at some token."""
    schema = {"type": "json_schema", "json_schema": {"name": "booking", "schema": SCHEMA}}
    tools = {"tools": [TOOL]}
    asked: dict[str, dict[str, Any]] = {
        "response_format json_schema": {"response_format": schema},
        "response_format json_object": {"response_format": {"type": "json_object"}},
        "tool_choice required": tools | {"tool_choice": "required", "max_tokens": TOOL_TOKENS},
        "tool_choice named": tools | {"tool_choice": NAMED, "max_tokens": TOOL_TOKENS},
        "tool_choice auto": tools | {"tool_choice": "auto"},
        "tool_choice auto, a call": {"tools": [LOOSE], "extra_body": {"regex": CALL}, "max_tokens": TOOL_TOKENS},
        "n=2": {"response_format": schema, "n": 2},
        "regex": {"extra_body": {"regex": WORDS}},
    }
    biased = bias | {str(THINK_END): 2.0}
    common = {"model": "default", "max_tokens": CHAT_TOKENS, "temperature": 0, "logit_bias": biased}
    common["messages"] = [{"role": "user", "content": "Book a table"}]
    return {name: common | body for name, body in asked.items()}


@dataclass
class Said:
    """A choice's answer so far. ``tools``: [name, arguments] of each call."""

    reasoning: str = ""
    content: str = ""
    tools: dict[int, list[str]] = field(default_factory=dict)
    finish_reason: str | None = None

    def take(self, choice: Any, message: Any) -> None:
        self.reasoning += getattr(message, "reasoning_content", None) or ""
        self.content += message.content or ""
        for position, call in enumerate(message.tool_calls or ()):
            index = position if getattr(call, "index", None) is None else call.index
            made = self.tools.setdefault(index, ["", ""])
            made[0] += call.function.name or ""
            made[1] += call.function.arguments or ""
        self.finish_reason = choice.finish_reason or self.finish_reason


def whole(client: Any, body: dict[str, Any]) -> tuple[dict[int, Said], Any]:
    answer = client.chat.completions.create(**body)
    said: dict[int, Said] = {}
    for choice in answer.choices:
        said.setdefault(choice.index, Said()).take(choice, choice.message)
    return said, answer.usage.completion_tokens


def streamed(client: Any, body: dict[str, Any]) -> tuple[dict[int, Said], Any]:
    usage, said = None, {}
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            said.setdefault(choice.index, Said()).take(choice, choice.delta)
        usage = chunk.usage or usage
    return said, usage.completion_tokens
