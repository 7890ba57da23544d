"""What the reasoning parser of an engine changes in the prompts of /v1/messages."""

from typing import Any

import pytest
from msgspec import json

from extproc.engines.engine import DEFAULT_ENGINE, engine_named
from extproc.engines.sglang.chats import SglangChat
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Prompt, TemplateFacts, TemplateInput, read_prompt

MESSAGES = "/v1/messages"
USER = {"role": "user", "content": "x"}
ANSWER = {
    "role": "assistant",
    "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}],
}
SWITCHED = TemplateFacts(thinking_variables=frozenset({"enable_thinking"}))


def read(parser: str, path: str = MESSAGES, **body: Any) -> Prompt:
    rules = engine_named("sglang", "0.5.23", parser).rules
    return read_prompt(rules, path, json.encode({"messages": [USER], **body}))


def given(prompt: Prompt, facts: TemplateFacts = SWITCHED) -> TemplateInput:
    assert isinstance(prompt.chat, SglangChat)
    return prompt.chat.for_template(facts, {})


def test_an_engine_with_a_parser_is_another_engine() -> None:
    assert engine_named("sglang", "0.5.23", "qwen3") is engine_named("sglang", "", "deepseek-r1")
    assert engine_named("sglang", "0.5.23", "QWEN3") is engine_named("sglang", "", "qwen3")
    assert engine_named("sglang", "0.5.23", "gemma4") is not engine_named("sglang", "", "qwen3")
    assert engine_named("sglang", "0.5.23", "a") is engine_named("sglang", "0.5.23", "b")
    assert engine_named("sglang", "0.5.23", "") is DEFAULT_ENGINE
    assert engine_named("vllm", "0.32.0", "qwen3") is engine_named("vllm", "0.32.0")


@pytest.mark.parametrize(
    ("parser", "content"),
    [
        ("", "a"),
        ("qwen3", [{"type": "text", "text": "<think>hm\n</think>"}, {"type": "text", "text": "a"}]),
        (
            "gemma4",
            [
                {"type": "text", "text": "<|channel>thought\nhm\n<channel|>"},
                {"type": "text", "text": "a"},
            ],
        ),
    ],
)
def test_thoughts_of_earlier_answers_are_written_as_the_parser_has_them(
    parser: str, content: Any
) -> None:
    prompt = read(parser, messages=[USER, ANSWER, USER])
    assert isinstance(prompt.chat, SglangChat)
    assert prompt.chat.messages[1]["content"] == content


def test_thoughts_for_an_unknown_parser_have_no_tokens() -> None:
    prompt = read("of_tomorrow", messages=[USER, ANSWER, USER])
    assert (prompt.reason, prompt.member) == ("unsupported", "messages")


@pytest.mark.parametrize(
    ("kind", "on"), [("enabled", True), ("adaptive", True), ("disabled", False)]
)
def test_thinking_is_switched_by_the_variable_of_the_template(kind: str, on: bool) -> None:
    prompt = read("qwen3", thinking={"type": kind})
    assert given(prompt).kwargs == {"enable_thinking": on}
    assert given(prompt, TemplateFacts()).kwargs == {}
    both = TemplateFacts(thinking_variables=frozenset({"thinking", "enable_thinking"}))
    with pytest.raises(UnmappableError):
        given(prompt, both)


def test_without_a_parser_thinking_is_refused_or_left_as_it_is() -> None:
    assert read("", thinking={"type": "enabled"}).reason == "malformed"
    assert given(read("", thinking={"type": "disabled"})).kwargs == {}


@pytest.mark.parametrize("thinking", [5, {}, {"type": "x"}, {"type": []}])
def test_odd_forms_of_thinking_are_malformed(thinking: Any) -> None:
    assert read("qwen3", thinking=thinking).reason == "malformed"


def test_late_system_messages_go_to_the_first_one_if_the_template_hides_them() -> None:
    late = {"role": "system", "content": " s \n"}
    prompt = read("", system="top ", messages=[USER, late, USER])
    hidden = TemplateFacts(shows_late_system=False)
    assert given(prompt, hidden).messages[0] == {"role": "system", "content": "top \ns"}
    assert [one["role"] for one in given(prompt, hidden).messages] == ["system", "user", "user"]
    assert [one["role"] for one in given(prompt).messages] == ["system", "user", "system", "user"]


def test_a_developers_items_are_labelled_and_joined_as_paragraphs() -> None:
    items = [
        {"role": "user", "content": "x"},
        {"role": "developer", "content": "d"},
        {"role": "developer", "content": [{"type": "input_text", "text": "e"}]},
        {"role": "user", "content": "y"},
    ]
    prompt = read("", "/v1/responses", input=items, instructions="i", reasoning=None)
    first = given(prompt, TemplateFacts(shows_late_system=False)).messages[0]
    assert first["content"] == "i\n\nDeveloper instructions:\nd\n\nDeveloper instructions:\ne"
    kept = given(prompt, TemplateFacts(loops_over_parts=True)).messages
    assert [one["role"] for one in kept] == ["system", "user", "system", "system", "user"]
