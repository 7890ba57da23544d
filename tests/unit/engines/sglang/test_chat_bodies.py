"""Chat bodies give the messages, tools and arguments that a template gets."""

import json
from typing import Any

import pytest

from extproc.engines.engine import DEFAULT_ENGINE
from extproc.engines.sglang.chats import SglangChat
from extproc.engines.sglang.messages import for_template
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Prompt, TemplateFacts, read_prompt

SGLANG = DEFAULT_ENGINE.rules

USER = {"role": "user", "content": "hi"}


def _chat(**body: Any) -> Prompt:
    whole = {"messages": [USER], **body}
    return read_prompt(SGLANG, "/v1/chat/completions", json.dumps(whole).encode())


def _messages(*messages: Any) -> Any:
    prompt = _chat(messages=messages)
    assert prompt.reason == ""
    assert isinstance(prompt.chat, SglangChat)
    return prompt.chat.messages


# -- messages of a chat, as the engine writes them out


def test_unknown_fields_of_messages_are_dropped() -> None:
    assert _messages(
        {"role": "system", "content": "s", "name": None, "id": "7"},
        {"role": "user", "content": "u", "name": "Eve", "tool_calls": []},
        {"role": "Assistant", "refusal": None, "reasoning_content": "r", "tool_calls": None},
        {"role": "tool", "content": "t", "tool_call_id": "1", "name": "f"},
        {"role": "developer", "content": "d", "phase": "commentary"},
    ) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "reasoning_content": "r"},
        {"role": "tool", "content": "t", "tool_call_id": "1", "name": "f"},
        {"role": "developer", "content": "d", "phase": "commentary"},
    ]


def test_tool_calls_have_every_field_and_arguments_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1e2}'}}
    bare = {"function": {"arguments": {"b": None}, "more": 1}}
    (message,) = _messages({"role": "assistant", "tool_calls": [call, bare]})
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "1",
                "index": None,
                "type": "function",
                "function": {"name": "f", "arguments": {"a": 100.0}},
            },
            {
                "id": None,
                "index": None,
                "type": "function",
                "function": {"name": None, "arguments": {"b": None}},
            },
        ],
    }


def test_parts_keep_only_the_fields_that_templates_get() -> None:
    (message,) = _messages(
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "a", "cache_control": {}},
                {"type": "thinking", "thinking": "hm"},
                {"type": "tool_reference", "name": "f"},
            ],
        }
    )
    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "tool_reference", "name": "f"},
    ]


def test_fields_are_in_the_engines_order() -> None:
    """Some templates print whole messages."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = {"reasoning_content": "r", "phase": "commentary", "name": "n", "content": parts}
    messages = _messages({"tool_calls": [], **given, "role": "tool", "tool_call_id": "i"})
    others = ["tool_call_id", "name", "phase", "reasoning_content", "tool_calls"]
    for keep_parts, order in (
        (False, ["role", "content", *others]),
        (True, ["role", *others, "content"]),
    ):
        ((message,), _) = for_template(messages, keep_parts, False)
        assert list(message) == order
        assert message["content"] == "a b"


def test_a_trailing_assistant_message_is_continued_or_becomes_a_users() -> None:
    user = {"role": "user", "content": "u"}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    in_parts = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    assert for_template([user, answer], False, False) == (
        [user, {"role": "user", "content": "a"}],
        "",
    )
    assert for_template([user, answer], False, True) == ([user], "a")
    assert for_template([user, in_parts], False, True) == ([user], "a")
    assert for_template([user, in_parts], True, True) == ([user, in_parts], "")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("image_url", "image"),
        ("input_image", "image"),
        ("video_url", "video"),
        ("audio_url", "audio"),
    ],
)
def test_templates_get_the_kinds_of_media(given: str, shown: str) -> None:
    text = {"type": "text", "text": "a"}
    content = [text, {"type": given, given: {"url": "http://x"}}]
    chat = _chat(messages=[{"role": "user", "content": content}]).chat
    assert chat is not None
    assert chat.has_media
    rendered = chat.for_template(TemplateFacts(loops_over_parts=True), {})
    assert rendered.messages[0]["content"] == [text, {"type": shown}]
    assert rendered.other_media == [{"role": "user", "content": [text]}]
    with pytest.raises(UnmappableError, match="multimodal"):
        chat.for_template(TemplateFacts(loops_over_parts=False), {})


def test_audio_that_the_engine_does_not_read_is_multimodal() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]
    assert _chat(messages=[{"role": "user", "content": content}]).reason == "multimodal"


@pytest.mark.parametrize(
    "message",
    [
        None,
        "x",
        [],
        {},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 1},
        {"role": "user", "content": {}},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": [{"type": "nonsense"}]},
        {"role": "user", "content": [{"type": []}]},
        {"role": "user", "content": [{"type": "thinking", "thinking": "x"}]},
        {"role": "User", "content": "x"},
        {"role": "wizard", "content": "x"},
        {"role": 1, "content": "x"},
        {"role": [], "content": "x"},
        {"role": "system", "content": 1},
        {"role": "tool", "content": "x", "tool_call_id": 1},
        {"role": "assistant", "content": "x", "phase": "end"},
        {"role": "assistant", "content": "x", "phase": []},
        {"role": "assistant", "content": [{"type": "tool_reference", "name": 1}]},
        {"role": "assistant", "tool_calls": {}},
        {"role": "assistant", "tool_calls": [1]},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "not json"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": ""}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"a":' * 9999}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": 1}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]},
        {"role": "assistant", "tool_calls": [{"type": "x", "function": {}}]},
        {"role": "assistant", "tool_calls": [{"id": 1, "function": {}}]},
    ],
)
def test_messages_that_the_engine_refuses_are_malformed(message: Any) -> None:
    assert _chat(messages=[message]).reason == "malformed"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "x", "tools": []},
    ],
)
def test_messages_with_an_unknown_effect_are_unsupported(message: Any) -> None:
    assert _chat(messages=[message]).reason == "unsupported"


@pytest.mark.parametrize("messages", [None, 1, "x", {}])
def test_messages_that_are_not_a_list_are_malformed(messages: Any) -> None:
    assert _chat(messages=messages).reason == "malformed"


def test_an_empty_chat_has_no_text() -> None:
    assert _chat(messages=[]).reason == "no_text"


# -- what goes to the template besides


@pytest.mark.parametrize(
    ("body", "effort", "kwargs"),
    [
        ({}, None, {}),
        ({"reasoning_effort": None}, None, {}),
        ({"reasoning_effort": "low"}, "low", {"thinking": True, "enable_thinking": True}),
        ({"reasoning_effort": "none"}, "none", {"thinking": False, "enable_thinking": False}),
        ({"reasoning_effort": 0}, 0.0, {"thinking": True, "enable_thinking": True}),
        ({"reasoning_effort": "0.5"}, 0.5, {"thinking": True, "enable_thinking": True}),
        ({"reasoning": {"effort": "max"}}, "max", {"thinking": True, "enable_thinking": True}),
        ({"reasoning": {"enabled": True}}, None, {"thinking": True, "enable_thinking": True}),
        ({"reasoning": {"enable": "On "}}, None, {"thinking": True, "enable_thinking": True}),
        ({"reasoning": {"enabled": False}}, None, {}),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"thinking": 7}},
            "low",
            {"thinking": 7, "enable_thinking": True},
        ),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "high", {}),
        ({"chat_template_kwargs": {"reasoning_effort": None, "x": [1]}}, None, {"x": [1]}),
        ({"chat_template_kwargs": {"documents": [{"a": 1}]}}, None, {"documents": [{"a": 1}]}),
    ],
)
def test_effort_and_template_arguments_are_combined_as_in_the_engine(
    body: Any, effort: Any, kwargs: Any
) -> None:
    prompt = _chat(**body)
    assert isinstance(prompt.chat, SglangChat)
    assert (prompt.chat.effort, prompt.chat.template_kwargs) == (effort, kwargs)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"chat_template_kwargs": [1]}, "malformed"),
        ({"chat_template_kwargs": {"documents": "x"}}, "malformed"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "unsupported"),
        ({"chat_template_kwargs": {"tokenize": True}}, "unsupported"),
        ({"chat_template_kwargs": {"messages": []}}, "unsupported"),
        ({"chat_template_kwargs": {"reasoning_effort": []}}, "unsupported"),
        ({"reasoning_effort": "extreme"}, "malformed"),
        ({"reasoning_effort": True}, "malformed"),
        ({"reasoning_effort": 2}, "malformed"),
        ({"reasoning_effort": "nan"}, "malformed"),
        ({"reasoning_effort": []}, "malformed"),
        ({"reasoning": {"effort": {}}}, "malformed"),
        ({"continue_final_message": "yes"}, "malformed"),
        ({"task": "query"}, "unsupported"),
        ({"tools": {}}, "malformed"),
        ({"tools": [1]}, "malformed"),
        ({"tools": [{"type": "function"}]}, "malformed"),
        ({"tools": [{"function": {}}]}, "malformed"),
        ({"tools": [{"function": {"name": 1}}]}, "malformed"),
        ({"tools": [{"function": {"name": "f", "strict": 1}}]}, "malformed"),
        ({"tools": [{"function": {"name": "f", "description": 1}}]}, "malformed"),
        ({"tools": [{"type": 1, "function": {"name": "f"}}]}, "malformed"),
        ({"tools": [{"defer_loading": 1, "function": {"name": "f"}}]}, "malformed"),
        ({"tool_choice": "sometimes"}, "malformed"),
        ({"tool_choice": []}, "malformed"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "malformed"),
        ({"tool_choice": {"function": []}}, "malformed"),
    ],
)
def test_fields_that_cannot_reach_the_template_have_a_reason(body: Any, reason: str) -> None:
    assert _chat(**body).reason == reason


def _tools(*functions: Any, **tool: Any) -> Any:
    prompt = _chat(tools=[{**tool, "function": function} for function in functions])
    assert prompt.reason == ""
    assert isinstance(prompt.chat, SglangChat)
    return prompt.chat.tools


def test_tools_keep_the_clients_order_of_known_fields() -> None:
    (tool,) = _tools(
        {"strict": None, "parameters": {"type": "object"}, "name": "f", "returns": 1},
        type="function",
        comment="x",
    )
    assert tool == {
        "type": "function",
        "function": {"parameters": {"type": "object"}, "name": "f", "description": None},
        "defer_loading": None,
    }
    assert list(tool) == ["type", "function", "defer_loading"]
    assert list(tool["function"]) == ["parameters", "name", "description"]


def test_tools_keep_strict_and_defer_loading() -> None:
    (tool,) = _tools({"name": "f", "strict": False}, defer_loading=True)
    assert tool["function"] == {
        "name": "f",
        "strict": False,
        "description": None,
        "parameters": None,
        "defer_loading": True,
    }
    assert list(tool["function"])[-1] == "defer_loading"
    assert tool["defer_loading"] is True
    (tool,) = _tools({"defer_loading": None, "name": "f"}, defer_loading=False)
    assert next(iter(tool["function"].items())) == ("defer_loading", False)


def test_without_tools_the_template_gets_no_tools() -> None:
    for nothing in ("null", "[]"):
        prompt = _chat(tools=json.loads(nothing))
        assert isinstance(prompt.chat, SglangChat)
        assert prompt.chat.tools is None


@pytest.mark.parametrize(
    ("schema", "rewritten"),
    [
        ({"type": "varchar(255)"}, {"type": "string"}),
        ({"type": ["string", "int", "uuid"]}, {"type": ["string", "integer"]}),
        (
            {"properties": {"type": {"items": [{"type": "dict"}]}}},
            {"properties": {"type": {"items": [{"type": "object"}]}}},
        ),
        ({"anyOf": [{"anyOf": [{"type": "float"}]}]}, {"anyOf": [{"anyOf": [{"type": "number"}]}]}),
        ({"default": {"type": "int"}}, {"default": {"type": "int"}}),
        ({"type": "internal"}, {"type": "internal"}),
        ({"maximum": 1 << 64}, {"maximum": 2.0**64}),
    ],
)
def test_types_in_schemas_are_rewritten_as_the_engine_does(schema: Any, rewritten: Any) -> None:
    (tool,) = _tools({"name": "f", "parameters": schema})
    assert tool["function"]["parameters"] == rewritten


def test_tool_lists_too_large_for_the_cache_are_read() -> None:
    names = [f"f{n}" for n in range(20_000)]
    assert [tool["function"]["name"] for tool in _tools(*({"name": n} for n in names))] == names


def test_deep_schemas_are_unsupported() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    assert _chat(tools=[{"function": {"name": "f", "parameters": schema}}]).reason == "unsupported"


def test_the_same_list_of_tools_gives_the_same_objects() -> None:
    """So that its texts can be remembered."""
    tools = [{"function": {"name": "f"}}]
    bodies = [_chat(messages=[{**USER, "content": text}], tools=tools) for text in "ab"]
    first, second = (prompt.chat for prompt in bodies)
    assert isinstance(first, SglangChat)
    assert isinstance(second, SglangChat)
    assert first.tools is second.tools
