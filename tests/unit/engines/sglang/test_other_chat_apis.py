"""Bodies of /v1/responses and /v1/messages become chat messages as in the engine."""

import json
from typing import Any

import pytest

from extproc.engines.engine import DEFAULT_ENGINE
from extproc.engines.sglang.chats import SglangChat
from extproc.tokenization.prompts import read_prompt

SGLANG = DEFAULT_ENGINE.rules


def _reason_of(path: str, **body: Any) -> str:
    return read_prompt(SGLANG, path, json.dumps(body).encode()).reason


def _chat(path: str, **body: Any) -> SglangChat:
    prompt = read_prompt(SGLANG, path, json.dumps(body).encode())
    assert prompt.reason == ""
    assert isinstance(prompt.chat, SglangChat)
    return prompt.chat


def _call(name: str, arguments: Any, identity: str | None = "c") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "index": None, "type": "function", "function": function}


# -- /v1/responses

RESPONSES = "/v1/responses"


def test_instructions_become_a_system_message() -> None:
    chat = _chat(RESPONSES, input="hi", instructions="be brief")
    assert chat.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert chat.responses_api
    assert _chat(RESPONSES, input="hi", instructions="").messages == [
        {"role": "user", "content": "hi"}
    ]


def test_the_items_of_one_turn_become_one_message() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "m",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me see", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "d", "name": "g", "arguments": '{"a": '},
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": "d",
            "output": [{"type": "input_text", "text": "r"}, {"type": "input_text", "text": "ain"}],
        },
        {"role": "assistant", "content": "a"},
        {"type": "message", "role": "assistant", "content": "b"},
        {"role": "user", "content": "and?"},
    ]
    assert _chat(RESPONSES, input=items).messages == [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Let me see"}],
            "reasoning_content": "hm",
            "tool_calls": [_call("f", {"a": 1}), _call("g", {}, "d")],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "c"},
        {"role": "tool", "content": "rain", "tool_call_id": "d"},
        {"role": "assistant", "content": "a\n\nb"},
        {"role": "user", "content": "and?"},
    ]


def test_thoughts_and_texts_of_one_turn_are_joined() -> None:
    items = [
        {"type": "reasoning", "summary": [], "content": [{"text": "one"}, {"text": "two"}]},
        {"type": "reasoning", "summary": []},
        {"type": "reasoning", "summary": [{"text": "three"}]},
        {"role": "assistant", "content": "x", "phase": "commentary"},
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "y"}],
            "phase": "commentary",
        },
        {"role": "assistant", "content": "z", "phase": "final_answer"},
    ]
    assert _chat(RESPONSES, input=items).messages == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
            "phase": "commentary",
            "reasoning_content": "one\ntwo\nthree",
        },
        {"role": "assistant", "content": "z", "phase": "final_answer"},
    ]


def test_a_system_message_may_come_first() -> None:
    items = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert _chat(RESPONSES, input=items).messages == items


def test_tools_of_responses_are_normalised() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "more": 1}]
    chat = _chat(RESPONSES, input="hi", tools=tools)
    assert chat.tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": None,
                "parameters": {"type": "object"},
                "strict": False,
            },
            "defer_loading": None,
        }
    ]
    assert list(chat.tools[0]["function"]) == ["name", "description", "parameters", "strict"]
    named = _chat(
        RESPONSES,
        input="hi",
        tools=[*tools, {"type": "function", "name": "g"}],
        tool_choice={"type": "function", "name": "g"},
    )
    assert named.tools is not None
    assert [tool["function"]["name"] for tool in named.tools] == ["g"]
    assert _chat(RESPONSES, input="hi", tools=tools, tool_choice="none").tools is None


@pytest.mark.parametrize(
    ("reasoning", "effort", "thinking"),
    [
        (None, None, None),
        ({}, "medium", True),
        ({"effort": "high"}, "high", True),
        ({"effort": "none"}, "none", False),
        ({"effort": None, "summary": "auto"}, None, None),
    ],
)
def test_reasoning_effort_of_responses_is_read(
    reasoning: Any, effort: Any, thinking: bool | None
) -> None:
    chat = _chat(RESPONSES, input="hi", reasoning=reasoning)
    assert chat.effort == effort
    expected = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    assert chat.template_kwargs == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "no_text"),
        ({"input": []}, "no_text"),
        ({"input": 1}, "malformed"),
        ({"input": [1]}, "malformed"),
        ({"input": "x", "instructions": 1}, "malformed"),
        ({"input": "x", "previous_response_id": "r"}, "unsupported"),
        ({"input": "x", "tools": [{"type": "function"}]}, "malformed"),
        ({"input": "x", "tools": {"a": 1}}, "malformed"),
        (
            {
                "input": "x",
                "tools": [{"type": "function", "name": "f"}],
                "tool_choice": {"type": "mcp"},
            },
            "unsupported",
        ),
        ({"input": "x", "reasoning": 1}, "malformed"),
        ({"input": "x", "reasoning": {"effort": "extreme"}}, "malformed"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "unsupported"),
        ({"input": [{"type": "reasoning", "summary": 1}]}, "malformed"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 1}]}]}, "malformed"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "multimodal"),
        ({"input": [{"type": "function_call_output", "output": [{"text": 1}]}]}, "malformed"),
        ({"input": [{"type": "function_call_output", "call_id": 1, "output": "x"}]}, "malformed"),
    ],
)
def test_responses_that_cannot_be_translated_have_a_reason(body: Any, reason: str) -> None:
    assert _reason_of(RESPONSES, **body) == reason


# -- /v1/messages

MESSAGES = "/v1/messages"


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("s", "s"),
        (" s ", " s "),
        ("  ", None),
        ("", None),
        (None, None),
        ([_text("a"), _text(""), _text("b")], "a\nb"),
        ([], None),
    ],
)
def test_the_system_prompt_is_a_text_or_blocks(system: Any, expected: str | None) -> None:
    chat = _chat(MESSAGES, system=system, messages=[{"role": "user", "content": "u"}])
    before = [] if expected is None else [{"role": "system", "content": expected}]
    assert chat.messages == [*before, {"role": "user", "content": "u"}]


def test_blocks_become_texts_tool_calls_and_results() -> None:
    messages = [
        {"role": "user", "content": [_text("a"), _text("b")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": ""},
                _text("let me"),
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "d", "name": "g"},
            ],
        },
        {
            "role": "user",
            "content": [
                _text("before"),
                {"type": "tool_result", "tool_use_id": "c", "content": "sun"},
                {
                    "type": "tool_result",
                    "tool_use_id": "d",
                    "content": [_text("r"), _text(""), _text("ain")],
                },
                {"type": "tool_result", "tool_use_id": "e"},
                {"type": "tool_result", "tool_use_id": "f", "content": [_text("one")]},
                _text("after"),
            ],
        },
        {"role": "assistant", "content": []},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "g", "content": "x"}]},
        {"role": "assistant", "content": [_text("")]},
    ]
    assert _chat(MESSAGES, messages=messages).messages == [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {
            "role": "assistant",
            "content": "let me",
            "tool_calls": [_call("f", {"x": 1}), _call("g", {}, "d")],
        },
        {"role": "user", "content": "before"},
        {"role": "tool", "content": "sun", "tool_call_id": "c"},
        {
            "role": "tool",
            "content": [{"type": "text", "text": t} for t in ("r", "ain")],
            "tool_call_id": "d",
        },
        {"role": "tool", "content": "", "tool_call_id": "e"},
        {"role": "tool", "content": "one", "tool_call_id": "f"},
        {"role": "user", "content": "after"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "x", "tool_call_id": "g"},
        {"role": "assistant", "content": ""},
    ]


USER = [{"role": "user", "content": "u"}]
SCHEMA = {"type": "object", "properties": {}}


def test_tools_of_messages_are_normalised() -> None:
    tools = [
        {"name": "f", "input_schema": {"properties": {}}, "cache_control": {}},
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "custom", "name": "g", "description": "d", "input_schema": SCHEMA},
    ]
    chat = _chat(MESSAGES, messages=USER, tools=tools)
    assert chat.tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "",
                "parameters": {"properties": {}, "type": "object"},
                "strict": False,
            },
            "defer_loading": None,
        },
        {
            "type": "function",
            "function": {"name": "g", "description": "d", "parameters": SCHEMA, "strict": False},
            "defer_loading": None,
        },
    ]
    for choice, names in (
        ({"type": "auto"}, ["f", "g"]),
        ({"type": "any"}, ["f", "g"]),
        ({"type": "tool", "name": "g"}, ["g"]),
        ({"type": "none"}, None),
    ):
        chosen = _chat(MESSAGES, messages=USER, tools=tools, tool_choice=choice).tools
        found = None if chosen is None else [tool["function"]["name"] for tool in chosen]
        assert found == names


@pytest.mark.parametrize(("given", "effort"), [("high", "high"), ("xhigh", "max"), (None, None)])
def test_effort_of_messages_is_read(given: Any, effort: Any) -> None:
    chat = _chat(MESSAGES, messages=USER, output_config={"effort": given})
    assert (chat.effort, chat.template_kwargs) == (effort, {})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "malformed"),
        ({"messages": []}, "no_text"),
        ({"messages": USER, "system": 1}, "malformed"),
        ({"messages": USER, "system": [1]}, "malformed"),
        ({"messages": USER, "system": [{"type": "text", "text": 1}]}, "malformed"),
        ({"messages": [1]}, "malformed"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "malformed"),
        ({"messages": [{"role": "user", "content": 1}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [1]}]}, "malformed"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "multimodal"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "unsupported"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "", "name": "f"}]}
                ]
            },
            "unsupported",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
            "malformed",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "multimodal",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]},
            "malformed",
        ),
        ({"messages": USER, "tools": {"a": 1}}, "malformed"),
        ({"messages": USER, "tools": [{"name": "f"}]}, "malformed"),
        ({"messages": USER, "tools": [{"input_schema": {}}]}, "malformed"),
        ({"messages": USER, "tool_choice": {"type": "any"}}, "malformed"),
        ({"messages": USER, "tool_choice": {"type": "tool", "name": "f"}}, "malformed"),
        ({"messages": USER, "tool_choice": "auto"}, "malformed"),
        (
            {
                "messages": USER,
                "tools": [{"name": "f", "input_schema": SCHEMA}],
                "tool_choice": {"type": "tool", "name": "g"},
            },
            "malformed",
        ),
        ({"messages": USER, "output_config": {"effort": 1}}, "malformed"),
    ],
)
def test_messages_that_cannot_be_translated_have_a_reason(body: Any, reason: str) -> None:
    assert _reason_of(MESSAGES, **body) == reason
