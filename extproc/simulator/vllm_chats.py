"""A chat as vLLM 0.32 makes it of messages, before its template is applied.

Texts in parts are joined by a newline for a template that reads strings. Arguments of tool calls
become objects, whatever was sent. Errors are those with which the engine answers 400.
"""

import json
from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

__all__ = [
    "ContentFormat",
    "VllmChat",
    "VllmChatError",
    "VllmText",
    "conversation",
    "function_tool",
    "typed_calls",
]

ContentFormat = Literal["string", "openai"]

_TEXT_PARTS: Final = ("text", "input_text", "output_text", "refusal", "thinking")
_SKIPPED_WITHOUT_TEXT: Final = ("text", "refusal")
_KNOWN_PART_MEMBERS: Final = frozenset(
    ("type", "text", "refusal", "thinking", "closed", "uuid", "name", "detail", "data")
)
_BILLING: Final = "x-anthropic-billing-header"
_TOOL_MEMBERS: Final = ("name", "description", "parameters")
_OPTIONAL_TOOL_MEMBERS: Final = ("strict", "defer_loading")


class VllmChatError(ValueError):
    """The engine refuses the chat."""


class VllmText(msgspec.Struct, frozen=True):
    """A text, or ids that were sent, and how it is encoded.

    `special_tokens` are those that a tokenizer puts around a text. `truncate` keeps so many tokens,
    at the `side` that is named, or as the tokenizer does; -1 as many as the model takes, less one
    if the request limits its output (`limits_output`).
    """

    text: str | list[int]
    special_tokens: bool = False
    truncate: int | None = None
    side: str | None = None
    limits_output: bool = False


class VllmChat(msgspec.Struct, frozen=True, kw_only=True):
    """Messages in the form of chat completions, and how they are rendered and encoded.

    `variables` are those of the template; the other members as in a text. What a chat of
    `/v1/messages` becomes depends on the template, so it is marked, with its `effort`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    special_tokens: bool = False
    truncate: int | None = None
    side: str | None = None
    limits_output: bool = False
    is_anthropic: bool = False
    effort: str | None = None


def function_tool(tool: Any) -> dict[str, Any]:
    """A tool of chat completions with the members that the engine keeps, in its order."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise VllmChatError("tools: a function with a name is needed")
    deferred = tool.get("defer_loading")
    kept: dict[str, Any] = {name: function.get(name) for name in _TOOL_MEMBERS}
    for name in _OPTIONAL_TOOL_MEMBERS:
        value = function.get(name)
        if name == "defer_loading" and value is None:
            value = deferred
        if value is not None:
            kept[name] = value
    made = {"type": "function", "function": kept}
    return made if deferred is None else made | {"defer_loading": deferred}


def typed_calls(messages: list[Any]) -> list[Any]:
    """The messages of a body: calls of tools have known members, in the engine's order."""
    made = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list):
            made.append({**message, "tool_calls": [_typed(call) for call in calls]})
        else:
            made.append(message)
    return made


def _typed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    kept = {name: function[name] for name in ("arguments", "name") if name in function}
    known = {"id": call.get("id"), "function": kept, "type": call.get("type", "function")}
    return {name: value for name, value in known.items() if name in call or name == "function"}


def conversation(messages: list[dict[str, Any]], form: ContentFormat) -> list[dict[str, Any]]:
    """The messages for a template; raises VllmChatError."""
    made = [_message(message, form) for message in messages]
    for message in made:
        if message["role"] == "assistant" and isinstance(message.get("tool_calls"), list):
            _mend_calls(message)
    return made


def _message(given: Any, form: ContentFormat) -> dict[str, Any]:
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(role, str):
        raise VllmChatError("messages: a message needs a role")
    content = given.get("content")
    if content is None:
        if role != "assistant" and "content" in given:
            raise VllmChatError("messages: content must not be null")
        content = []
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise VllmChatError("messages: content must be a text or parts")
    if role == "system":
        parts = [*_without_billing(parts)]
    made: dict[str, Any] = {"role": role, "content": _content(parts, form)}
    if role == "assistant":
        _add_thoughts_and_calls(made, given)
    elif role == "tool":
        if "tool_call_id" in given:
            made["tool_call_id"] = given["tool_call_id"]
        made["content"] = _tool_content(made["content"])
    made |= {name: given[name] for name in ("name", "task") if isinstance(given.get(name), str)}
    if role == "developer":
        made["tools"] = given.get("tools")
    return made


def _add_thoughts_and_calls(made: dict[str, Any], given: dict[str, Any]) -> None:
    if isinstance(given.get("tool_calls"), list):
        made["tool_calls"] = [*given["tool_calls"]]
    thoughts = given.get("reasoning")
    if thoughts is None:
        thoughts = given.get("reasoning_content")
    if thoughts is not None:
        made["reasoning"] = made["reasoning_content"] = thoughts


def _content(parts: list[Any], form: ContentFormat) -> Any:
    read = [one for part in parts if (one := _part(part, form))]
    return read if form == "openai" else "\n".join(read)


def _part(part: Any, form: ContentFormat) -> Any:
    """A part as text, or as the object that a template reads; None or "" for one without."""
    if isinstance(part, str):
        return part if form == "string" else {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise VllmChatError("messages: a part must be a text or an object")
    kind = part.get("type")
    if kind == "tool_reference":
        name = part.get("name")
        return name if form == "string" else {"type": kind, "name": name}
    if kind not in _TEXT_PARTS:
        raise VllmChatError(f"messages: a part of the type {kind!r} is not supported")
    text = part.get(kind if kind in ("refusal", "thinking") else "text")
    if text is None and kind in _SKIPPED_WITHOUT_TEXT:
        return None
    if not isinstance(text, str):
        raise VllmChatError("messages: the text of a part must be a text")
    if form == "string":
        return text
    more = {name: value for name, value in part.items() if name not in _KNOWN_PART_MEMBERS}
    return {"type": "text", "text": text} | more


def _without_billing(parts: list[Any]) -> Iterable[Any]:
    """Drop the line that agents put before their system prompt: it differs at every request."""
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str) or not text.startswith(_BILLING):
            yield part
        elif rest := text.partition("\n")[2]:
            yield rest if isinstance(part, str) else {**part, "text": rest}


def _tool_content(content: Any) -> Any:
    """Texts of a tool's answer are joined; references to tools stay objects."""
    if not isinstance(content, list) or any(part.get("type") != "text" for part in content):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _mend_calls(message: dict[str, Any]) -> None:
    if not message["tool_calls"]:
        del message["tool_calls"]
        return
    message["tool_calls"] = [_call(call) for call in message["tool_calls"]]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise VllmChatError("messages: a tool call needs a function")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> dict[str, Any]:
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    return given if isinstance(given, dict) else {}
