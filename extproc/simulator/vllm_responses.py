"""Converts `/v1/responses` to chat completions, as vLLM 0.32 does.

Items that follow each other become one message of the assistant where they say different things:
thoughts, a text, calls of tools.
"""

import json
from typing import Any, Final

from extproc.simulator.vllm_chats import VllmChatError, function_tool

__all__ = ["continues", "input_messages", "response_tools"]

_UNFINISHED: Final = ("in_progress", "incomplete")
_FREE_TEXT: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "input": {"type": "string", "description": "The freeform text payload for this tool."}
    },
    "required": ["input"],
    "additionalProperties": False,
}

_Object = dict[str, Any]


def continues(given: str | list[Any]) -> bool:
    """True if the last item is an unfinished message or thought of the assistant."""
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, dict) or last.get("type", "message") not in ("message", "reasoning"):
        return False
    return last.get("status") in _UNFINISHED


def input_messages(instructions: str | None, given: str | list[Any]) -> list[_Object]:
    """The messages of chat completions; VllmChatError for items that the engine refuses."""
    messages: list[_Object] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    made: list[_Object] = []
    for item in given:
        if not isinstance(item, dict):
            raise VllmChatError("input: an item must be an object")
        _add(made, item)
    return messages + made


def response_tools(tools: list[Any]) -> list[_Object] | None:
    """Functions, also those of namespaces and of free text; built-in tools are not shown."""
    if not tools:
        return None
    made: list[_Object] = []
    for tool in tools:
        match tool:
            case {"type": "function"}:
                made.append(tool)
            case {"type": "namespace", "name": name, "tools": list(inner)}:
                made += [
                    {**one, "name": f"{name}__{one['name']}"}
                    for one in inner
                    if one.get("type") == "function"
                ]
            case {"type": "custom", "name": name}:
                if (tool.get("format") or {}).get("type") == "grammar":
                    raise VllmChatError("tools: a grammar is not supported")
                about = {"name": name, "description": tool.get("description")}
                made.append(about | {"parameters": _FREE_TEXT})
    return [function_tool({"function": tool}) for tool in made]


def _add(made: list[_Object], item: _Object) -> None:
    last = made[-1] if made and made[-1]["role"] == "assistant" else None
    if (call := _call(item)) is not None:
        if last is None:
            made.append({"role": "assistant", "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
        return
    match item.get("type"):
        case "reasoning":
            _say(made, last, "reasoning", _thought(item))
        case "function_call_output" | "custom_tool_call_output":
            message = {"role": "tool", "content": item.get("output")}
            made.append(message | {"tool_call_id": item.get("call_id")})
        case "message" | None if "role" in item:
            text = _said(item) if item["role"] == "assistant" else None
            if text is None:
                made.append(item)
            else:
                _say(made, last, "content", text)
        case kind:
            raise VllmChatError(f"input: an item of the type {kind!r} is not supported")


def _say(made: list[_Object], last: _Object | None, name: str, text: str) -> None:
    if last is not None and last.get(name) is None:
        last[name] = text
    else:
        made.append({"role": "assistant", name: text})


def _call(item: _Object) -> _Object | None:
    """The call of a tool that an item stands for, None for other items."""
    match item:
        case {"type": "function_call", "call_id": id_, "name": name, "arguments": str(arguments)}:
            if space := item.get("namespace"):
                name = f"{space}__{name}"
        case {"type": "custom_tool_call", "call_id": id_, "name": name}:
            arguments = json.dumps({"input": item.get("input") or ""}, ensure_ascii=False)
        case _:
            return None
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _thought(item: _Object) -> str:
    if item.get("encrypted_content"):
        raise VllmChatError("input: encrypted content is not supported")
    for part in (*(item.get("content") or ()), *(item.get("summary") or ())):
        return str(part["text"])
    return ""


def _said(item: _Object) -> str | None:
    content = item.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and isinstance(content[0], dict):
        text = content[0].get("text")
        return text if isinstance(text, str) else None
    return None
