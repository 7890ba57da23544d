"""Converts `/v1/messages` to chat completions, as vLLM 0.32 does."""

import json
from collections.abc import Iterable
from typing import Any, Final

from extproc.simulator.vllm_chats import VllmChatError, function_tool

__all__ = ["DISABLED", "effort_of", "merge_system", "messages_of", "tools_of"]

_BILLING: Final = "x-anthropic-billing-header"
_ROLES: Final = ("user", "assistant", "system")
_CHANGES: Final = ("tool_addition", "tool_removal")
_IGNORED: Final = ("redacted_thinking", "tool_reference", *_CHANGES)
DISABLED: Final = "disabled"  # an effort that depends on the template

_Object = dict[str, Any]


def messages_of(messages: list[_Object], system: str | list[_Object] | None) -> list[_Object]:
    """The messages of chat completions; VllmChatError for blocks that the engine refuses."""
    made: list[_Object] = []
    said = system if isinstance(system, str) else "".join(_system_texts(system or []))
    if said:
        made.append({"role": "system", "content": said})
    for message in messages:
        made += _converted(message)
    return made


def merge_system(messages: list[_Object]) -> list[_Object]:
    """One system message at the beginning, for a template that takes no other."""
    said = [one["content"] for one in messages if one["role"] == "system"]
    others = [one for one in messages if one["role"] != "system"]
    return [{"role": "system", "content": "".join(said)}, *others] if said else others


def effort_of(thinking: _Object | None, output: _Object | None) -> str | None:
    """The reasoning effort, `DISABLED` where thinking is off."""
    if thinking is not None and thinking.get("type") == "disabled":
        return DISABLED
    return None if output is None else output.get("effort")


def tools_of(tools: list[_Object] | None, messages: list[_Object]) -> list[_Object] | None:
    """The tools in effect at the end of the conversation."""
    changes = [block for block in _blocks(messages) if block.get("type") in _CHANGES]
    if changes:
        tools = _changed(tools or [], changes)
    return None if tools is None else [function_tool(_tool(tool)) for tool in tools]


def _tool(tool: _Object) -> _Object:
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise VllmChatError("tools: an input_schema is needed")
    function = {name: tool.get(name) for name in ("name", "description", "strict", "defer_loading")}
    return {"function": function | {"parameters": {**schema, "type": schema.get("type", "object")}}}


def _changed(tools: list[_Object], changes: list[_Object]) -> list[_Object]:
    known = {tool["name"]: tool for tool in tools}
    removed = set()
    for block in changes:
        change = block.get("tool") or {}
        if change.get("type") == "tool_definition":
            name = change["definition"]["name"]
            known[name] = change["definition"]
        else:
            name = change.get("name")
            if name not in known:
                raise VllmChatError(f"messages: {block['type']} names no known tool")
            if block["type"] == "tool_addition":
                known[name] = known[name] | {"defer_loading": None}
        if block["type"] == "tool_removal":
            removed.add(name)
        else:
            removed.discard(name)
    return [tool for name, tool in known.items() if name not in removed]


def _blocks(messages: list[_Object]) -> Iterable[_Object]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (block for block in content if isinstance(block, dict))


def _system_texts(blocks: list[_Object]) -> Iterable[str]:
    for block in blocks:
        text = block.get("text")
        if block.get("type") == "text" and text and not text.startswith(_BILLING):
            yield text


def _converted(message: _Object) -> list[_Object]:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise VllmChatError(f"messages: the role {role!r} is not known")
    if not isinstance(content, str | list):
        raise VllmChatError("messages: content must be a text or blocks")
    if role == "system":
        if isinstance(content, str):
            said = "" if content.startswith(_BILLING) else content
        else:
            said = "".join(_system_texts(content))
        return [{"role": "system", "content": said}] if said else []
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    made, before = _message(role, content)
    return before if role == "user" and "content" not in made else [*before, made]


def _message(role: str, blocks: list[_Object]) -> tuple[_Object, list[_Object]]:
    """The message of these blocks, and the messages of tools that come before it."""
    parts: list[_Object] = []
    calls: list[_Object] = []
    thoughts: list[str] = []
    before: list[_Object] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            parts += [{"type": "text", "text": block["text"]}] if block.get("text") else []
        elif kind == "thinking":
            thoughts += [] if block.get("thinking") is None else [block["thinking"]]
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result" and role == "user":
            before += _results(block)
        elif kind == "tool_result":
            said = str(block["content"]) if block.get("content") else ""
            parts.append({"type": "text", "text": f"Tool result: {said}"})
        elif kind not in _IGNORED:
            raise VllmChatError(f"messages: a block of the type {kind!r} is not supported")
    made: _Object = {"role": role}
    if thoughts:
        made["reasoning"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    if parts:
        made["content"] = parts[0]["text"] if len(parts) == 1 else parts
    return made, before


def _call(block: _Object) -> _Object:
    arguments = json.dumps(block.get("input") or {})
    return {
        "id": block.get("id") or "call_0",
        "type": "function",
        "function": {"name": block.get("name") or "", "arguments": arguments},
    }


def _results(block: _Object) -> list[_Object]:
    """The answer of a tool, and the tools that it refers to."""
    content = block.get("content")
    items = content if isinstance(content, list) else []
    texts, references = [], []
    for item in items:
        match item.get("type"):
            case "text":
                texts.append(item.get("text", ""))
            case "image":
                raise VllmChatError("messages: images are not supported by this model")
            case "tool_reference":
                name = item.get("tool_name") or item.get("name")
                references += [{"type": "tool_reference", "name": name}] if name else []
    said = content if isinstance(content, str) else "\n".join(texts)
    head = {"role": "tool", "tool_call_id": block.get("tool_use_id") or ""}
    made = [head | {"content": said}]
    return [*made, head | {"content": references}] if references else made
