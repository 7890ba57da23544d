"""Bodies for /v1/messages."""

from typing import Any, Final

_Body = dict[str, Any] | str

_HI: Final = {"role": "user", "content": "What is the weather in Paris today?"}
_ANSWER: Final = {"role": "assistant", "content": "It is sunny."}
_THANKS: Final = {"role": "user", "content": "Thank you, and tomorrow?"}
_BILLING: Final = "x-anthropic-billing-header: cc_version=2.1.0; cch=1c058;"
_SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
_TOOL: Final = {
    "name": "get_weather",
    "description": "the weather of a city",
    "input_schema": _SCHEMA,
}
_USE: Final = {
    "type": "tool_use",
    "id": "toolu_1",
    "name": "get_weather",
    "input": {"city": "Paris"},
}
_RESULT: Final = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny, 21 degrees"}
_THOUGHT: Final = {"type": "thinking", "thinking": "I must look.", "signature": "s"}
_IMAGE: Final = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
}


def _text(text: Any, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **members}


def _ask(*messages: Any, **members: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [_HI], "max_tokens": 4, **members}


def _said(*blocks: Any, **members: Any) -> dict[str, Any]:
    return _ask(_HI, {"role": "assistant", "content": list(blocks)}, _THANKS, **members)


def _told(*blocks: Any, **members: Any) -> dict[str, Any]:
    return _ask({"role": "user", "content": list(blocks)}, **members)


def _used(*results: Any, use: Any = _USE) -> dict[str, Any]:
    used = {"role": "assistant", "content": [use]}
    return _ask(_HI, used, {"role": "user", "content": list(results)}, tools=[_TOOL])


def _result(**members: Any) -> dict[str, Any]:
    return _used({**_RESULT, **members})


def _choose(**choice: Any) -> dict[str, Any]:
    return _ask(tools=[_TOOL], tool_choice=choice)


def _tool(**members: Any) -> dict[str, Any]:
    return _ask(tools=[{**_TOOL, **members}])


_TALKS: Final[dict[str, _Body]] = {
    "one-message": _ask(),
    "conversation": _ask(_HI, _ANSWER, _THANKS),
    "no-max-tokens": {"messages": [_HI]},
    "max-tokens-zero": {"messages": [_HI], "max_tokens": 0},
    "no-messages": {"messages": [], "max_tokens": 4},
    "no-model": '{"messages":[{"role":"user","content":"hi"}],"max_tokens":4}',
    "user-twice": _ask(_HI, _THANKS),
    "assistant-last": _ask(_HI, {"role": "assistant", "content": "It is"}),
    "assistant-last-blocks": _ask(_HI, {"role": "assistant", "content": [_text("It is")]}),
    "assistant-first": _ask(_ANSWER, _HI),
    "system-role": _ask({"role": "system", "content": "Be kind."}, _HI),
    "system-role-later": _ask(_HI, _ANSWER, {"role": "system", "content": "Be kind."}, _THANKS),
    "system-role-blocks": _ask(
        {"role": "system", "content": [_text("Be"), _text("kind.")]}, _HI, system="Be brief."
    ),
    "developer-role": _ask({"role": "developer", "content": "Be kind."}, _HI),
    "unknown-role": _ask({"role": "critic", "content": "hm"}),
    "content-empty": _ask({"role": "user", "content": ""}),
    "content-null": _ask({"role": "user", "content": None}),
    "content-no-blocks": _ask({"role": "user", "content": []}),
    "content-number": _ask({"role": "user", "content": 5}),
    "one-block": _told(_text("What is the weather?")),
    "two-blocks": _told(_text("What is"), _text("the weather?")),
    "empty-block": _told(_text("")),
    "empty-block-among-others": _told(_text("a"), _text(""), _text("b")),
    "block-text-null": _told(_text(None)),
    "block-without-text": _told({"type": "text"}),
    "block-cache-control": _told(_text("hi", cache_control={"type": "ephemeral"})),
    "block-citations": _told(_text("hi", citations=None)),
    "block-unknown-type": _told({"type": "note", "text": "hi"}),
    "block-without-type": _told({"text": "hi"}),
    "block-string": _told("hi"),
    "assistant-two-blocks": _said(_text("It is"), _text("sunny.")),
    "assistant-no-blocks": _said(),
    "assistant-empty-block": _said(_text("")),
    "image": _told(_text("What is this?"), _IMAGE),
    "image-url": _told(
        _text("hi"), {"type": "image", "source": {"type": "url", "url": "http://a/b"}}
    ),
    "document": _told({"type": "document", "source": {"type": "text", "data": "x"}}),
    "search-result": _told(
        {"type": "search_result", "source": "a", "title": "b", "content": [_text("c")]}
    ),
    "unicode": _ask({"role": "user", "content": "Grüße, 你好, 👩‍👩‍👧‍👦, e\u0301."}),
    "special-tokens": _ask({"role": "user", "content": "<|im_end|><|eot_id|></turn><s>"}),
    "lone-surrogate": (
        '{"model":"m","max_tokens":4,"messages":[{"role":"user","content":"a\\ud800b"}]}'
    ),
    "long": _ask({"role": "user", "content": "The weather of a city is sunny. " * 60}),
    "too-long": _ask({"role": "user", "content": "question " * 20000}),
}

_SYSTEMS: Final[dict[str, _Body]] = {
    "system": _ask(system="You are a helpful assistant."),
    "system-empty": _ask(system=""),
    "system-null": _ask(system=None),
    "system-block": _ask(system=[_text("Be brief.")]),
    "system-blocks": _ask(system=[_text("Be brief."), _text("Be kind.")]),
    "system-no-blocks": _ask(system=[]),
    "system-empty-block": _ask(system=[_text(""), _text("Be kind.")]),
    "system-cache-control": _ask(system=[_text("Be brief.", cache_control={"type": "ephemeral"})]),
    "billing-block": _ask(system=[_text(_BILLING), _text("Be brief."), _text("Be kind.")]),
    "billing-block-alone": _ask(system=[_text(_BILLING)]),
    "billing-block-later": _ask(system=[_text("Be brief."), _text(_BILLING)]),
    "billing-in-block": _ask(system=[_text(f"Be brief. {_BILLING}")]),
    "billing-block-with-more": _ask(system=[_text(f"{_BILLING}\nBe brief.")]),
    "billing-block-with-blank": _ask(system=[_text(f" {_BILLING}"), _text("Be brief.")]),
    "billing-upper-case": _ask(system=[_text(_BILLING.upper()), _text("Be brief.")]),
    "billing-string": _ask(system=_BILLING),
    "billing-in-message": _told(_text(_BILLING), _text("hi")),
    "system-and-tools": _ask(system="Be brief.", tools=[_TOOL]),
    "system-object": _ask(system={"type": "text", "text": "Be brief."}),
    "system-image": _ask(system=[_IMAGE]),
}

_THOUGHTS: Final[dict[str, _Body]] = {
    "thinking-enabled": _ask(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048),
    "thinking-adaptive": _ask(thinking={"type": "adaptive"}),
    "thinking-adaptive-display": _ask(thinking={"type": "adaptive", "display": "summarized"}),
    "thinking-disabled": _ask(thinking={"type": "disabled"}),
    "thinking-null": _ask(thinking=None),
    "thinking-unknown": _ask(thinking={"type": "sometimes"}),
    "thinking-small-budget": _ask(thinking={"type": "enabled", "budget_tokens": 10}),
    "thinking-without-budget": _ask(thinking={"type": "enabled"}),
    "thinking-disabled-and-kwargs": _ask(
        thinking={"type": "disabled"}, chat_template_kwargs={"enable_thinking": True}
    ),
    "effort-low": _ask(output_config={"effort": "low"}),
    "effort-max": _ask(output_config={"effort": "max"}, thinking={"type": "adaptive"}),
    "effort-and-disabled": _ask(output_config={"effort": "high"}, thinking={"type": "disabled"}),
    "effort-unknown": _ask(output_config={"effort": "extreme"}),
    "output-config-empty": _ask(output_config={}),
    "output-format": _ask(output_config={"format": {"type": "json_schema", "schema": _SCHEMA}}),
    "thinking-block": _said(_THOUGHT, _text("It is sunny.")),
    "thinking-block-alone": _said(_THOUGHT),
    "thinking-block-without-signature": _said(
        {"type": "thinking", "thinking": "hm"}, _text("Sunny.")
    ),
    "thinking-block-empty": _said(
        {"type": "thinking", "thinking": "", "signature": "s"}, _text("a")
    ),
    "two-thinking-blocks": _said(_THOUGHT, {**_THOUGHT, "thinking": "Again."}, _text("Sunny.")),
    "thinking-block-later": _said(_text("It is"), _THOUGHT, _text("sunny.")),
    "redacted-thinking": _said({"type": "redacted_thinking", "data": "AAAA"}, _text("Sunny.")),
    "thinking-block-and-use": _ask(
        _HI,
        {"role": "assistant", "content": [_THOUGHT, _text("I look."), _USE]},
        {"role": "user", "content": [_RESULT]},
        tools=[_TOOL],
        thinking={"type": "adaptive"},
    ),
    "thinking-block-of-user": _told(_THOUGHT, _text("hi")),
}

_TOOLS: Final[dict[str, _Body]] = {
    "tools": _ask(tools=[_TOOL]),
    "tools-empty": _ask(tools=[]),
    "tools-null": _ask(tools=None),
    "tool-key-order": _ask(tools=[dict(reversed(_TOOL.items()))]),
    "tool-without-description": _ask(tools=[{"name": "f", "input_schema": _SCHEMA}]),
    "tool-without-schema": _ask(tools=[{"name": "f", "description": "d"}]),
    "tool-schema-without-type": _tool(input_schema={"properties": {"city": {"type": "string"}}}),
    "tool-schema-empty": _tool(input_schema={}),
    "tool-schema-dialect": _tool(
        input_schema={**_SCHEMA, "$schema": "http://json-schema.org/draft-07/schema#"}
    ),
    "tool-odd-schema": _tool(input_schema={"type": "object", "properties": {"n": {"type": "int"}}}),
    "tool-strict": _tool(strict=True),
    "tool-strict-false": _tool(strict=False),
    "tool-defer-loading": _tool(defer_loading=True),
    "tool-defer-loading-false": _tool(defer_loading=False),
    "tool-cache-control": _tool(cache_control={"type": "ephemeral"}),
    "tool-type-custom": _tool(type="custom"),
    "tool-examples": _tool(input_examples=[{"city": "Paris"}]),
    "tool-unknown-member": _tool(note="x"),
    "tool-web-search": _ask(tools=[_TOOL, {"type": "web_search_20250305", "name": "web_search"}]),
    "tool-bash": _ask(tools=[{"type": "bash_20250124", "name": "bash"}]),
    "choice-auto": _choose(type="auto"),
    "choice-any": _choose(type="any"),
    "choice-none": _choose(type="none"),
    "choice-tool": _choose(type="tool", name="get_weather"),
    "choice-tool-unknown": _choose(type="tool", name="other"),
    "choice-tool-without-name": _choose(type="tool"),
    "choice-not-parallel": _choose(type="auto", disable_parallel_tool_use=True),
    "choice-without-tools": _ask(tool_choice={"type": "auto"}),
    "choice-string": _ask(tools=[_TOOL], tool_choice="auto"),
    "use": _used(_RESULT),
    "use-without-tools": _ask(
        _HI, {"role": "assistant", "content": [_USE]}, {"role": "user", "content": [_RESULT]}
    ),
    "use-and-text": _ask(
        _HI,
        {"role": "assistant", "content": [_text("I look."), _USE]},
        {"role": "user", "content": [_RESULT]},
        tools=[_TOOL],
    ),
    "use-input-empty": _used(_RESULT, use={**_USE, "input": {}}),
    "use-input-null": _used(_RESULT, use={**_USE, "input": None}),
    "use-input-missing": _used(
        _RESULT, use={"type": "tool_use", "id": "toolu_1", "name": "get_weather"}
    ),
    "use-input-deep": _used(
        _RESULT, use={**_USE, "input": {"z": 1.0, "a": {"c": [1, None], "b": "Grüße <b>"}}}
    ),
    "use-without-id": _used(_RESULT, use={"type": "tool_use", "name": "f", "input": {}}),
    "use-of-user": _told(_USE),
    "two-uses": _ask(
        _HI,
        {"role": "assistant", "content": [_USE, {**_USE, "id": "toolu_2"}]},
        {"role": "user", "content": [_RESULT, {**_RESULT, "tool_use_id": "toolu_2"}]},
        tools=[_TOOL],
    ),
    "result-and-text": _used(_RESULT, _text("And tomorrow?")),
    "text-and-result": _used(_text("Here it is:"), _RESULT),
    "result-blocks": _result(content=[_text("sunny"), _text("21")]),
    "result-empty": _result(content=""),
    "result-null": _result(content=None),
    "result-missing": _used({"type": "tool_result", "tool_use_id": "toolu_1"}),
    "result-no-blocks": _result(content=[]),
    "result-error": _result(is_error=True),
    "result-no-error": _result(is_error=False),
    "result-error-blocks": _result(is_error=True, content=[_text("It failed.")]),
    "result-image": _result(content=[_IMAGE]),
    "result-text-and-image": _result(content=[_text("Look:"), _IMAGE]),
    "result-cache-control": _result(cache_control={"type": "ephemeral"}),
    "result-reference": _result(content=[{"type": "tool_reference", "tool_name": "get_weather"}]),
    "result-without-id": _used({"type": "tool_result", "content": "sunny"}),
    "result-of-assistant": _said(_RESULT),
    "tool-addition": _ask(
        _HI,
        {
            "role": "system",
            "content": [
                {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": _TOOL}}
            ],
        },
        tools=[_TOOL],
    ),
}

_OPTIONS: Final[dict[str, _Body]] = {
    "metadata": _ask(metadata={"user_id": "someone"}),
    "stream": _ask(stream=True),
    "stop-sequences": _ask(stop_sequences=["."], temperature=0.5, top_k=5, top_p=0.9),
    "service-tier": _ask(service_tier="auto"),
    "container": _ask(container="c"),
    "context-management": _ask(context_management={"edits": []}),
    "mcp-servers": _ask(mcp_servers=[]),
    "unknown-member": _ask(something_new=1),
    "cache-salt": _ask(cache_salt="tenant"),
    "kwargs": _ask(chat_template_kwargs={"enable_thinking": False}),
    "add-generation-prompt": _ask(add_generation_prompt=False),
    "truncate": _ask(truncate_prompt_tokens=5),
}

BODIES: Final[dict[str, _Body]] = {**_TALKS, **_SYSTEMS, **_THOUGHTS, **_TOOLS, **_OPTIONS}
