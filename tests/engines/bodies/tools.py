"""Chats with tools and calls of tools, for /v1/chat/completions."""

from typing import Any, Final

_Body = dict[str, Any] | str

_HI: Final = {"role": "user", "content": "What is the weather in Paris today?"}
_PARAMETERS: Final = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "the city"},
        "days": {"type": "integer"},
    },
    "required": ["city"],
}
_WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather of a city",
        "parameters": _PARAMETERS,
    },
}
_READ: Final = {
    "type": "function",
    "function": {"name": "read_file", "parameters": {"type": "object", "properties": {}}},
}


def _tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def _with(*tools: Any, **members: Any) -> dict[str, Any]:
    return {"messages": [_HI], "tools": list(tools), **members}


def _schema(**parameters: Any) -> dict[str, Any]:
    return _with(_tool(description="d", parameters={"type": "object", **parameters}))


def _property(schema: Any) -> dict[str, Any]:
    return _schema(properties={"n": schema})


def _called(arguments: Any = '{"city": "Paris"}', **members: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function"}
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{**call, "function": function}],
        **members,
    }


_RESULT: Final = {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"}


def _history(*messages: Any, **members: Any) -> dict[str, Any]:
    return {"messages": [_HI, *messages], "tools": [_WEATHER], **members}


def _arguments(arguments: Any) -> dict[str, Any]:
    return _history(_called(arguments), _RESULT)


def _calls(calls: Any, content: Any = None) -> dict[str, Any]:
    return _history({"role": "assistant", "content": content, "tool_calls": calls}, _RESULT)


def _choose(choice: Any) -> dict[str, Any]:
    return _with(_WEATHER, _READ, tool_choice=choice)


def _result(**members: Any) -> dict[str, Any]:
    return _history(_called(), {**_RESULT, **members})


_OF_NAME: Final = {"type": "function", "function": {"name": "get_weather"}}

_CHOICES: Final[dict[str, _Body]] = {
    "one": _with(_WEATHER),
    "two": _with(_WEATHER, _READ),
    "with-system": {
        "messages": [{"role": "system", "content": "Be brief."}, _HI],
        "tools": [_WEATHER],
    },
    "with-developer": {
        "messages": [{"role": "developer", "content": "Be brief."}, _HI],
        "tools": [_WEATHER],
    },
    "none": {"messages": [_HI], "tools": []},
    "null": {"messages": [_HI], "tools": None},
    "choice-auto": _choose("auto"),
    "choice-none": _choose("none"),
    "choice-required": _choose("required"),
    "choice-named": _choose(_OF_NAME),
    "choice-named-unknown": _choose({"type": "function", "function": {"name": "other"}}),
    "choice-unknown": _choose("sometimes"),
    "choice-null": _choose(None),
    "choice-any": _choose("any"),
    "choice-allowed": _choose(
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [_OF_NAME]}}
    ),
    "choice-without-tools": {"messages": [_HI], "tool_choice": "auto"},
    "choice-none-without-tools": {"messages": [_HI], "tool_choice": "none"},
    "required-without-tools": {"messages": [_HI], "tool_choice": "required"},
    "choice-with-no-tools": {"messages": [_HI], "tools": [], "tool_choice": "auto"},
    "parallel": _with(_WEATHER, parallel_tool_calls=False),
    "functions": {"messages": [_HI], "functions": [_WEATHER["function"]], "function_call": "auto"},
}

_SHAPES: Final[dict[str, _Body]] = {
    "key-order": _with(
        {
            "function": {
                "parameters": _PARAMETERS,
                "description": "the weather of a city",
                "name": "get_weather",
            },
            "type": "function",
        }
    ),
    "parameters-key-order": _with(
        _tool(
            parameters={
                "required": ["b"],
                "properties": {"b": {"type": "string"}},
                "type": "object",
            }
        )
    ),
    "strict": _with(_tool(description="d", parameters=_PARAMETERS, strict=True)),
    "strict-false": _with(_tool(description="d", parameters=_PARAMETERS, strict=False)),
    "strict-null": _with(_tool(description="d", parameters=_PARAMETERS, strict=None)),
    "defer-loading": _with({**_WEATHER, "defer_loading": True}),
    "defer-loading-false": _with({**_WEATHER, "defer_loading": False}),
    "defer-loading-in-function": _with(_tool(parameters=_PARAMETERS, defer_loading=True)),
    "unknown-member": _with({**_WEATHER, "note": "x"}),
    "unknown-member-in-function": _with(_tool(description="d", parameters=_PARAMETERS, note="x")),
    "response-schema": _with(
        _tool(description="d", parameters=_PARAMETERS, response={"type": "string"})
    ),
    "cache-control": _with({**_WEATHER, "cache_control": {"type": "ephemeral"}}),
    "no-parameters": _with(_tool(description="d")),
    "parameters-null": _with(_tool(description="d", parameters=None)),
    "parameters-empty": _with(_tool(description="d", parameters={})),
    "parameters-list": _with(_tool(description="d", parameters=[])),
    "parameters-string": _with(_tool(description="d", parameters="{}")),
    "description-null": _with(_tool(description=None, parameters=_PARAMETERS)),
    "description-empty": _with(_tool(description="", parameters=_PARAMETERS)),
    "description-number": _with(_tool(description=5, parameters=_PARAMETERS)),
    "no-description": _with(_tool(parameters=_PARAMETERS)),
    "name-missing": _with({"type": "function", "function": {"parameters": _PARAMETERS}}),
    "name-empty": _with(_tool(name="", parameters=_PARAMETERS)),
    "name-null": _with(_tool(name=None)),
    "name-number": _with(_tool(name=5)),
    "name-odd": _with(_tool(name="mcp__server/read file.v1", parameters=_PARAMETERS)),
    "type-missing": _with({"function": _WEATHER["function"]}),
    "type-null": _with({"type": None, "function": _WEATHER["function"]}),
    "type-custom": _with({"type": "custom", "custom": {"name": "f"}}),
    "type-web-search": _with({"type": "web_search"}),
    "type-upper-case": _with({"type": "Function", "function": _WEATHER["function"]}),
    "flat": _with({"type": "function", "name": "get_weather", "parameters": _PARAMETERS}),
    "same-name-twice": _with(_WEATHER, _WEATHER),
    "good-and-odd": _with(
        _WEATHER, _tool(parameters={"type": "object", "properties": {"n": {"type": "int"}}})
    ),
    "unicode": _with(_tool(description="Größe, 你好 \u2028 </tool> 👩", parameters=_PARAMETERS)),
    "escapes": _with(_tool(description='"quoted" <b>&\'</b> \\n \t', parameters=_PARAMETERS)),
    "many": _with(
        *[_tool(name=f"f{n}", description="d", parameters=_PARAMETERS) for n in range(12)]
    ),
    "function-null": _with({"type": "function", "function": None}),
    "tool-null": _with(None),
    "tools-object": {"messages": [_HI], "tools": {"type": "function"}},
}

_SCHEMAS: Final[dict[str, _Body]] = {
    "schema-int": _property({"type": "int"}),
    "schema-any": _property({"type": "any"}),
    "schema-types": _property({"type": ["string", "null"]}),
    "schema-type-null": _property({"type": None}),
    "schema-type-number": _property({"type": 5}),
    "schema-enum": _property({"enum": ["a", 1, None, True, 1.5]}),
    "schema-const": _property({"const": {"a": [1]}}),
    "schema-any-of": _property({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}),
    "schema-ref": _schema(
        properties={"n": {"$ref": "#/$defs/N"}}, **{"$defs": {"N": {"type": "string"}}}
    ),
    "schema-bad-ref": _property({"$ref": "#/$defs/Missing"}),
    "schema-pattern": _property({"type": "string", "pattern": "^[a-z](?=b)\\d+$"}),
    "schema-bad-pattern": _property({"type": "string", "pattern": "["}),
    "schema-numbers": _property(
        {"minimum": 0, "maximum": 1.0, "multipleOf": 0.1, "default": 1e22, "examples": [-0.0, 1e-7]}
    ),
    "schema-large-number": _property({"maximum": 123456789012345678901234567890}),
    "schema-format": _property({"type": "string", "format": "date-time", "minLength": -1}),
    "schema-dialect": _schema(
        **{"$schema": "http://json-schema.org/draft-07/schema#"},
        properties={},
        additionalProperties=False,
    ),
    "schema-required-string": _schema(properties={"n": {}}, required="n"),
    "schema-properties-list": _schema(properties=[]),
    "schema-deep": _property(
        {"type": "array", "items": {"type": "array", "items": {"type": "object"}}}
    ),
    "schema-true": _property(True),
    "schema-string": _property("string"),
    "schema-type-not-object": _with(_tool(parameters={"type": "string"})),
}

_CALLS: Final[dict[str, _Body]] = {
    "history": _history(_called(), _RESULT),
    "history-answered": _history(
        _called(),
        _RESULT,
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
    ),
    "history-without-tools": {"messages": [_HI, _called(), _RESULT]},
    "content-and-calls": _history(_called(content="I look."), _RESULT),
    "content-empty-and-calls": _history(_called(content=""), _RESULT),
    "content-parts-and-calls": _history(
        _called(content=[{"type": "text", "text": "I"}, {"type": "text", "text": "look"}]), _RESULT
    ),
    "reasoning-and-calls": _history(_called(reasoning_content="I must look."), _RESULT),
    "content-missing-and-calls": _history(
        {"role": "assistant", "tool_calls": _called()["tool_calls"]}, _RESULT
    ),
    "two-calls": _calls(
        [
            _called()["tool_calls"][0],
            {**_called('{"city": "Rome"}')["tool_calls"][0], "id": "call_2"},
        ]
    ),
    "calls-empty": _calls([], content="No call."),
    "calls-null": _calls(None, content="No call."),
    "calls-empty-without-content": _calls([]),
    "calls-of-user": {"messages": [{**_HI, "tool_calls": _called()["tool_calls"]}]},
    "call-without-id": _calls([{"type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    "call-without-type": _calls([{"id": "c", "function": {"name": "f", "arguments": "{}"}}]),
    "call-without-arguments": _calls([{"id": "c", "type": "function", "function": {"name": "f"}}]),
    "call-without-name": _calls([{"id": "c", "type": "function", "function": {"arguments": "{}"}}]),
    "call-without-function": _calls([{"id": "c", "type": "function"}]),
    "call-custom": _calls([{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]),
    "call-index": _calls(
        [{"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    ),
    "call-key-order": _calls(
        [{"function": {"arguments": "{}", "name": "f"}, "type": "function", "id": "c"}]
    ),
    "arguments-order": _arguments('{"z": 1, "a": {"c": 2, "b": 3}}'),
    "arguments-empty": _arguments(""),
    "arguments-blank": _arguments("  "),
    "arguments-empty-object": _arguments("{}"),
    "arguments-null": _arguments(None),
    "arguments-null-text": _arguments("null"),
    "arguments-invalid": _arguments('{"city": '),
    "arguments-words": _arguments("Paris"),
    "arguments-list": _arguments("[1, 2]"),
    "arguments-number": _arguments("5"),
    "arguments-string": _arguments('"Paris"'),
    "arguments-object": _arguments({"city": "Paris"}),
    "arguments-empty-mapping": _arguments({}),
    "arguments-bare-list": _arguments([1]),
    "arguments-bare-number": _arguments(5),
    "arguments-false": _arguments(False),
    "arguments-numbers": _arguments('{"a": 1.0, "b": 1e3, "c": 12345678901234567890, "d": -0.0}'),
    "arguments-doubled-key": _arguments('{"a": 1, "a": 2}'),
    "arguments-nan": _arguments('{"a": NaN}'),
    "arguments-spaces": _arguments('{ "a" :  1 , "b":[1,2] }'),
    "arguments-unicode": _arguments('{"a": "Gr\\u00fc\\u00dfe 你好 \\ud83d\\ude00"}'),
    "arguments-escapes": _arguments('{"a": "<b>\\"&\'\\n"}'),
    "arguments-surrogate": _arguments('{"a": "\\ud800"}'),
    "arguments-trailing": _arguments('{"a": 1} and more'),
    "arguments-nested-text": _arguments('{"a": "{\\"b\\": 1}"}'),
    "arguments-long": _arguments('{"text": "' + "word " * 200 + '"}'),
    "result-parts": _result(
        content=[{"type": "text", "text": "sunny"}, {"type": "text", "text": "21"}]
    ),
    "result-null": _result(content=None),
    "result-empty": _result(content=""),
    "result-missing": _history(_called(), {"role": "tool", "tool_call_id": "call_1"}),
    "result-name": _result(name="get_weather"),
    "result-without-id": _history(_called(), {"role": "tool", "content": "sunny"}),
    "result-json": _result(content='{"weather": "sunny"}'),
    "result-object": _result(content={"weather": "sunny"}),
    "result-number": _result(content=21),
    "result-image": _result(
        content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    ),
    "results-first": {"messages": [_RESULT, _HI], "tools": [_WEATHER]},
    "trailing-call": _history(_called()),
    "continue-after-call": _history(
        _called(),
        _RESULT,
        {"role": "assistant", "content": "It"},
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    "function-call-member": _history(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    ),
    "no-thinking": _with(_WEATHER, chat_template_kwargs={"enable_thinking": False}),
    "json-schema": _with(
        _WEATHER,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object"}},
        },
    ),
    "truncate": _with(_WEATHER, truncate_prompt_tokens=20),
}

BODIES: Final[dict[str, _Body]] = {**_CHOICES, **_SHAPES, **_SCHEMAS, **_CALLS}
