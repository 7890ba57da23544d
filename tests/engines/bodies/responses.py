"""Bodies for /v1/responses."""

from typing import Any, Final

_Body = dict[str, Any] | str

_TEXT: Final = "What is the weather in Paris today?"
_FUNCTION: Final = {
    "type": "function",
    "name": "get_weather",
    "description": "the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
_CALL: Final = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "get_weather",
    "arguments": '{"city": "Paris"}',
}
_OUTPUT: Final = {
    "type": "function_call_output",
    "call_id": "call_1",
    "output": "sunny, 21 degrees",
}
_REASONING: Final = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "I must look."}],
}


def _message(
    text: str, role: str = "user", kind: str = "input_text", **members: Any
) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **members}


def _said(text: str = "It is sunny.", **members: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    members = {"id": "msg_1", "status": "completed", **members}
    return {"type": "message", "role": "assistant", "content": content, **members}


def _ask(content: Any = _TEXT, **members: Any) -> dict[str, Any]:
    return {"input": content, "max_output_tokens": 4, **members}


_HI: Final = _message(_TEXT)
_THANKS: Final = _message("Thank you, and tomorrow?")


def _items(*items: Any, **members: Any) -> dict[str, Any]:
    return _ask(list(items), **members)


def _output(output: Any, **members: Any) -> dict[str, Any]:
    return _items(_HI, _CALL, {**_OUTPUT, "output": output, **members}, tools=[_FUNCTION])


def _call(**members: Any) -> dict[str, Any]:
    return _items(_HI, {**_CALL, **members}, _OUTPUT, tools=[_FUNCTION])


def _tool(**members: Any) -> dict[str, Any]:
    return _ask(tools=[{**_FUNCTION, **members}])


def _builtin(kind: str, **members: Any) -> dict[str, Any]:
    return _ask(tools=[_FUNCTION, {"type": kind, **members}])


_INPUTS: Final[dict[str, _Body]] = {
    "text": _ask(),
    "text-empty": _ask(""),
    "input-missing": {"max_output_tokens": 4},
    "input-null": _ask(None),
    "input-empty-list": _ask([]),
    "input-number": _ask(5),
    "instructions": _ask(instructions="You are a helpful assistant."),
    "instructions-empty": _ask(instructions=""),
    "instructions-null": _ask(instructions=None),
    "instructions-list": _ask(instructions=[_HI]),
    "one-message": _items(_HI),
    "message-of-text": _items({"role": "user", "content": _TEXT}),
    "message-of-text-with-type": _items({"type": "message", "role": "user", "content": _TEXT}),
    "instructions-and-message": _items(_HI, instructions="Be brief."),
    "instructions-and-system": _items(
        _message("Be kind.", "system"), _HI, instructions="Be brief."
    ),
    "system": _items(_message("Be kind.", "system"), _HI),
    "developer": _items(_message("Be kind.", "developer"), _HI),
    "developer-text": _items({"role": "developer", "content": "Be kind."}, _HI),
    "instructions-and-developer": _items(
        _message("Be kind.", "developer"), _HI, instructions="Be brief."
    ),
    "developer-later": _items(_HI, _said(), _message("Be kind.", "developer"), _THANKS),
    "two-developers": _items(
        _message("Be kind.", "developer"), _message("Be brief.", "developer"), _HI
    ),
    "unknown-role": _items(_message("I think so.", "critic")),
    "two-parts": _items(
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is"},
                {"type": "input_text", "text": "the weather?"},
            ],
        }
    ),
    "content-null": _items({"role": "user", "content": None}),
    "content-empty": _items({"role": "user", "content": ""}),
    "content-no-parts": _items({"role": "user", "content": []}),
    "text-part": _items(_message(_TEXT, kind="text")),
    "unknown-part": _items(_message(_TEXT, kind="note")),
    "conversation": _items(_HI, _said(), _THANKS),
    "conversation-easy": _items(
        {"role": "user", "content": _TEXT},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "Thanks"},
    ),
    "assistant-input-text": _items(_HI, _message("Sunny.", "assistant"), _THANKS),
    "assistant-output-text": _items(_HI, _message("Sunny.", "assistant", "output_text"), _THANKS),
    "assistant-two-texts": _items(
        _HI,
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "It is", "annotations": []},
                {"type": "output_text", "text": "sunny.", "annotations": []},
            ],
        },
        _THANKS,
    ),
    "assistant-refusal": _items(
        _HI,
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No."}],
        },
        _THANKS,
    ),
    "assistant-last": _items(_HI, _said()),
    "assistant-last-incomplete": _items(_HI, _said("It is", status="incomplete")),
    "assistant-last-in-progress": _items(_HI, _said("It is", status="in_progress")),
    "assistant-phase": _items(_HI, _said(phase="commentary"), _THANKS),
    "image": _items(
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is this?"},
                {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
            ],
        }
    ),
    "file": _items(
        {"role": "user", "content": [{"type": "input_file", "file_data": "AAAA", "filename": "a"}]}
    ),
    "item-reference": _items({"type": "item_reference", "id": "msg_1"}),
    "unknown-item": _items(_HI, {"type": "something", "id": "x"}),
    "web-search-call": _items(
        _HI,
        {
            "type": "web_search_call",
            "id": "ws_1",
            "status": "completed",
            "action": {"type": "search", "query": "weather"},
        },
        _THANKS,
    ),
    "compaction": _items({"type": "compaction", "id": "c", "encrypted_content": "x"}, _HI),
    "item-id-and-status": _items(_message(_TEXT, id="msg_0", status="completed")),
    "unicode": _ask("Grüße, 你好, 👩‍👩‍👧‍👦, e\u0301."),
    "special-tokens": _ask("<|im_end|><|eot_id|></turn><|begin_of_text|>"),
    "lone-surrogate": '{"model":"m","input":"a\\ud800b","max_output_tokens":4}',
    "long": _ask("The weather of a city is sunny. " * 60),
}

_CALLS: Final[dict[str, _Body]] = {
    "call": _items(_HI, _CALL, _OUTPUT, tools=[_FUNCTION]),
    "call-without-tools": _items(_HI, _CALL, _OUTPUT),
    "call-last": _items(_HI, _CALL, tools=[_FUNCTION]),
    "call-without-id": _items(
        _HI, {name: value for name, value in _CALL.items() if name != "id"}, _OUTPUT
    ),
    "call-status": _call(status="completed"),
    "call-namespace": _call(namespace="crm"),
    "call-arguments-empty": _call(arguments=""),
    "call-arguments-invalid": _call(arguments='{"city": '),
    "call-arguments-list": _call(arguments="[1]"),
    "call-arguments-object": _call(arguments={"city": "Paris"}),
    "call-arguments-order": _call(arguments='{"b": 1.0, "a": [1, {"d": 2, "c": 3}]}'),
    "two-calls": _items(
        _HI,
        _CALL,
        {**_CALL, "id": "fc_2", "call_id": "call_2", "arguments": '{"city": "Rome"}'},
        _OUTPUT,
        {**_OUTPUT, "call_id": "call_2"},
        tools=[_FUNCTION],
    ),
    "call-output-call-output": _items(
        _HI, _CALL, _OUTPUT, {**_CALL, "call_id": "call_2"}, {**_OUTPUT, "call_id": "call_2"}
    ),
    "said-and-call": _items(_HI, _said("I look."), _CALL, _OUTPUT, tools=[_FUNCTION]),
    "call-then-said": _items(_HI, _CALL, _OUTPUT, _said(), _THANKS, tools=[_FUNCTION]),
    "output-alone": _items(_HI, _OUTPUT),
    "output-parts": _output(
        [{"type": "input_text", "text": "sunny"}, {"type": "input_text", "text": "21"}]
    ),
    "output-image": _output([{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]),
    "output-empty": _output(""),
    "output-null": _output(None),
    "output-object": _output({"weather": "sunny"}),
    "output-id-and-status": _output("sunny", id="fco_1", status="completed"),
    "custom-call": _items(
        _HI,
        {"type": "custom_tool_call", "id": "ctc", "call_id": "call_1", "name": "sh", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "call_1", "output": "a.txt"},
        tools=[{"type": "custom", "name": "sh", "description": "a shell"}],
    ),
    "shell-call": _items(
        _HI,
        {
            "type": "local_shell_call",
            "id": "ls",
            "call_id": "call_1",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls"], "env": {}},
        },
        {"type": "local_shell_call_output", "id": "call_1", "output": "a.txt"},
    ),
    "mcp-call": _items(
        _HI,
        {
            "type": "mcp_call",
            "id": "m",
            "server_label": "s",
            "name": "f",
            "arguments": "{}",
            "output": "x",
        },
        _THANKS,
    ),
}

_THOUGHTS: Final[dict[str, _Body]] = {
    "reasoning-item": _items(_HI, _REASONING, _said(), _THANKS),
    "reasoning-and-call": _items(_HI, _REASONING, _CALL, _OUTPUT, tools=[_FUNCTION]),
    "reasoning-said-and-call": _items(
        _HI, _REASONING, _said("I look."), _CALL, _OUTPUT, tools=[_FUNCTION]
    ),
    "reasoning-summary": _items(
        _HI,
        {**_REASONING, "content": None, "summary": [{"type": "summary_text", "text": "looked"}]},
        _said(),
        _THANKS,
    ),
    "reasoning-without-content": _items(
        _HI, {"type": "reasoning", "id": "rs_1", "summary": []}, _said(), _THANKS
    ),
    "reasoning-encrypted": _items(
        _HI,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "AAAA"},
        _said(),
        _THANKS,
    ),
    "reasoning-two-texts": _items(
        _HI,
        {
            **_REASONING,
            "content": [
                {"type": "reasoning_text", "text": "one"},
                {"type": "reasoning_text", "text": "two"},
            ],
        },
        _said(),
        _THANKS,
    ),
    "two-reasonings": _items(_HI, _REASONING, {**_REASONING, "id": "rs_2"}, _said(), _THANKS),
    "reasoning-last": _items(_HI, _REASONING),
    "reasoning-last-in-progress": _items(_HI, {**_REASONING, "status": "in_progress"}),
    "reasoning-without-id": _items(
        _HI,
        {"type": "reasoning", "summary": [], "content": _REASONING["content"]},
        _said(),
        _THANKS,
    ),
    "effort-low": _ask(reasoning={"effort": "low"}),
    "effort-high-with-summary": _ask(reasoning={"effort": "high", "summary": "auto"}),
    "effort-none": _ask(reasoning={"effort": "none"}),
    "effort-minimal": _ask(reasoning={"effort": "minimal"}),
    "effort-unknown": _ask(reasoning={"effort": "extreme"}),
    "reasoning-empty": _ask(reasoning={}),
    "no-thinking": _ask(chat_template_kwargs={"enable_thinking": False}),
    "kwargs-unknown": _ask(chat_template_kwargs={"something": 1}),
}

_TOOLS: Final[dict[str, _Body]] = {
    "tools": _ask(tools=[_FUNCTION]),
    "tools-empty": _ask(tools=[]),
    "tools-null": _ask(tools=None),
    "tool-key-order": _ask(tools=[dict(reversed(_FUNCTION.items()))]),
    "tool-strict": _tool(strict=True),
    "tool-strict-null": _tool(strict=None),
    "tool-without-strict": _ask(
        tools=[{name: value for name, value in _FUNCTION.items() if name != "strict"}]
    ),
    "tool-without-description": _ask(
        tools=[{name: value for name, value in _FUNCTION.items() if name != "description"}]
    ),
    "tool-description-null": _tool(description=None),
    "tool-parameters-null": _tool(parameters=None),
    "tool-without-parameters": _ask(tools=[{"type": "function", "name": "f", "strict": True}]),
    "tool-defer-loading": _tool(defer_loading=True),
    "tool-unknown-member": _tool(note="x"),
    "tool-odd-schema": _tool(parameters={"type": "object", "properties": {"n": {"type": "int"}}}),
    "tool-chat-shape": _ask(tools=[{"type": "function", "function": {"name": "f"}}]),
    "tool-custom": _builtin("custom", name="sh", description="a shell"),
    "tool-custom-grammar": _builtin(
        "custom", name="sh", format={"type": "grammar", "syntax": "regex", "definition": "a+"}
    ),
    "tool-namespace": _ask(
        tools=[{"type": "namespace", "name": "crm", "description": "d", "tools": [_FUNCTION]}]
    ),
    "web-search": _builtin("web_search"),
    "web-search-preview": _builtin("web_search_preview"),
    "code-interpreter": _builtin("code_interpreter", container={"type": "auto"}),
    "local-shell": _builtin("local_shell"),
    "mcp": _builtin("mcp", server_label="s", server_url="http://127.0.0.1:9"),
    "unknown-tool": _builtin("something"),
    "web-search-alone": _ask(tools=[{"type": "web_search"}]),
    "choice-none": _ask(tools=[_FUNCTION], tool_choice="none"),
    "choice-auto": _ask(tools=[_FUNCTION], tool_choice="auto"),
    "choice-required": _ask(tools=[_FUNCTION], tool_choice="required"),
    "choice-named": _ask(
        tools=[_FUNCTION], tool_choice={"type": "function", "name": "get_weather"}
    ),
    "choice-unknown-name": _ask(tools=[_FUNCTION], tool_choice={"type": "function", "name": "x"}),
    "choice-without-tools": _ask(tool_choice="auto"),
    "required-without-tools": _ask(tool_choice="required"),
    "choice-allowed": _ask(
        tools=[_FUNCTION],
        tool_choice={
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ),
    "tools-and-instructions": _ask(tools=[_FUNCTION], instructions="Be brief."),
}

_OPTIONS: Final[dict[str, _Body]] = {
    "previous-response": _ask(previous_response_id="resp_1"),
    "previous-response-null": _ask(previous_response_id=None),
    "previous-messages": _ask(previous_input_messages=[{"role": "user", "content": "hi"}]),
    "conversation-member": _ask(conversation="conv_1"),
    "prompt-member": _ask(prompt={"id": "pmpt_1"}),
    "stream": _ask(stream=True),
    "store": _ask(store=False),
    "include": _ask(include=["reasoning.encrypted_content"], store=False),
    "background": _ask(background=True),
    "truncation-auto": _ask(truncation="auto"),
    "truncation-disabled": _ask(truncation="disabled"),
    "json-schema": _ask(
        text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
    ),
    "json-object": _ask(text={"format": {"type": "json_object"}}),
    "verbosity": _ask(text={"verbosity": "low"}),
    "cache-salt": _ask(cache_salt="tenant"),
    "prompt-cache-key": _ask(prompt_cache_key="key"),
    "metadata": _ask(metadata={"a": "b"}, user="someone", service_tier="auto"),
    "truncate": _ask(truncate_prompt_tokens=5),
    "no-special-tokens": _ask(add_special_tokens=False),
    "no-generation-prompt": _ask(add_generation_prompt=False),
    "max-output-tokens-missing": {"input": _TEXT},
    "max-tool-calls": _ask(max_tool_calls=3, parallel_tool_calls=False),
    "too-long": _ask("question " * 20000),
}

BODIES: Final[dict[str, _Body]] = {**_INPUTS, **_CALLS, **_THOUGHTS, **_TOOLS, **_OPTIONS}
