"""Translates bodies of /v1/messages to chat messages, as SGLang (0.5.23) does.

Not supported is what depends on the options of the engine: thoughts of earlier turns in a body
without `thinking`, which only a parser of thoughts keeps. System messages between others are only
supported for templates that print them there; for others, the engine merges them.
"""

from typing import Any

from extproc.engines.sglang.chats import SglangChat, chat_prompt, thinking_kwargs
from extproc.engines.sglang.tools import chosen_tools, finished_tool
from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import AnthropicBody
from extproc.tokenization.prompts import Message, Tool
from extproc.tokenization.reasons import MALFORMED, MULTIMODAL, UNSUPPORTED

__all__ = ["anthropic_chat"]

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SERVER_TOOLS = ("web_search_", "computer_", "bash_", "text_editor_")


def anthropic_chat(body: AnthropicBody) -> SglangChat:
    """The chat that a body of /v1/messages is translated to; raises UnmappableError."""
    thinking = _thinking(body.thinking)
    messages = _system(body.system)
    if type(body.messages) is not list:
        raise UnmappableError(MALFORMED)
    tagged = False
    for message in body.messages:
        # Without a parser of thoughts the engine drops them. With `thinking`, it has one.
        untagged, message = message, _tagged(message) if thinking else message
        tagged = tagged or message is not untagged
        messages.extend(_messages(message))
    tools = _tools(bytes(body.tools))
    return chat_prompt(
        messages,
        tools=_chosen(tools, body.tool_choice),
        template_kwargs=thinking_kwargs(None, thinking),
        effort=_effort(body),
        thinking=thinking,
        late_system=any(_is_system(message) for message in body.messages),
        tagged_thoughts=tagged,
    )


def _is_system(message: Any) -> bool:
    return type(message) is dict and message.get("role") == "system"


def _thinking(given: Any) -> bool | None:
    if given is None:
        return None
    kind = given.get("type") if type(given) is dict else None
    if kind not in ("enabled", "adaptive", "disabled"):
        raise UnmappableError(MALFORMED)
    return bool(kind != "disabled")


def _tagged(given: Any) -> Any:
    """The message with the assistant's thoughts as a text in tags before all others."""
    blocks = given.get("content") if type(given) is dict else None
    if type(blocks) is not list or given.get("role") != "assistant":
        return given
    kept = [block for block in blocks if _kind(block) != "thinking"]
    thoughts = [block.get("thinking") for block in blocks if _kind(block) == "thinking"]
    if any(thought is not None and type(thought) is not str for thought in thoughts):
        raise UnmappableError(MALFORMED)
    text = "\n".join(thought for thought in thoughts if thought)
    if not text:
        return given
    first = {"type": "text", "text": f"<think>{text}\n</think>"}
    return {**given, "content": [first, *kept]}


def _system(given: Any) -> list[Message]:
    if not given:
        return []
    if type(given) is str:
        text = given if given.strip() else ""
    elif type(given) is list:
        texts = [_text(block) for block in given if _kind(block) == "text"]
        text = "\n".join(one for one in texts if one)
    else:
        raise UnmappableError(MALFORMED)
    return [{"role": "system", "content": text}] if text else []


def _messages(given: Any) -> list[Message]:
    """The chat messages for one message; each result of a tool becomes a message."""
    role = given.get("role") if type(given) is dict else None
    if role not in ("user", "assistant", "system"):
        raise UnmappableError(MALFORMED)
    content = given.get("content")
    if type(content) is str:
        return [{"role": role, "content": content}]
    if type(content) is not list:
        raise UnmappableError(MALFORMED)
    if role == "system":
        return [_late_system(content)]
    return _user(content) if role == "user" else _assistant(content)


def _late_system(blocks: list[Any]) -> Message:
    if any(_kind(block) != "text" for block in blocks):
        raise UnmappableError(UNSUPPORTED)
    parts: list[Message] = [{"type": "text", "text": _text(block)} for block in blocks]
    return {"role": "system", "content": _content(parts) if parts else ""}


def _user(blocks: list[Any]) -> list[Message]:
    messages: list[Message] = []
    parts: list[Message] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "text":
            parts.append({"type": "text", "text": _text(block)})
        elif kind == "image":
            parts.append(_image(block))
        elif kind == "tool_result":
            if parts:
                messages.append({"role": "user", "content": _content(parts)})
                parts = []
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": block.get("tool_use_id") or block.get("id") or "",
                    "content": _result(block.get("content")),
                }
            )
        elif kind != "thinking":
            raise UnmappableError(UNSUPPORTED)
    if parts:
        messages.append({"role": "user", "content": _content(parts)})
    return messages


def _assistant(blocks: list[Any]) -> list[Message]:
    parts: list[Message] = []
    calls: list[Message] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "text":
            parts.append({"type": "text", "text": _text(block)})
        elif kind == "image":
            parts.append(_image(block))
        elif kind == "tool_use":
            arguments, name, identity = block.get("input"), block.get("name"), block.get("id")
            if type(identity) is not str or type(name) is not str:
                raise UnmappableError(MALFORMED)
            # If there is no id, the engine makes a random one.
            if not identity:
                raise UnmappableError(UNSUPPORTED)
            function = {"name": name, "arguments": arguments or {}}
            calls.append({"id": identity, "type": "function", "function": function})
        elif kind == "tool_result":
            result = _result(block.get("content"))
            texts = [result] if type(result) is str else [part.get("text") for part in result]
            if any(type(text) is not str for text in texts):
                raise UnmappableError(UNSUPPORTED)
            parts.append({"type": "text", "text": "Tool result: " + "\n".join(texts)})
        elif kind != "thinking" or block.get("thinking"):
            raise UnmappableError(UNSUPPORTED)
    message: Message = {"role": "assistant"}
    if calls:
        message["tool_calls"] = calls
    if parts:
        message["content"] = _content(parts)
    elif not calls:
        message["content"] = ""
    return [message]


def _result(given: Any) -> Any:
    """The content of a tool's message."""
    if type(given) is str:
        return given
    if not given:
        return ""
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    parts = []
    for item in given:
        kind = _kind(item)
        if kind == "image":
            parts.append(_image(item))
            continue
        if kind != "text":
            raise UnmappableError(UNSUPPORTED)
        text = _text(item)
        if text:
            parts.append({"type": "text", "text": text})
    return _content(parts) if parts else ""


def _content(parts: list[Message]) -> Any:
    """The text alone if there is one part, else the list of parts."""
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def _kind(block: Any) -> Any:
    if type(block) is not dict:
        raise UnmappableError(MALFORMED)
    return block.get("type")


def _text(block: Message) -> str:
    text = block.get("text")
    if type(text) is not str:
        raise UnmappableError(MALFORMED)
    return text


def _image(block: Message) -> Message:
    source = block.get("source")
    given = "data" if type(source) is dict and source.get("type") == "base64" else "url"
    if type(source) is not dict or not source.get(given):
        # The engine may leave it out.
        raise UnmappableError(MULTIMODAL)
    return {"type": "image_url"}


@kept_by_bytes
def _tools(given: Any) -> list[Tool]:
    if not given:
        return []
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    tools = []
    for tool in given:
        if type(tool) is not dict or type(tool.get("name")) is not str:
            raise UnmappableError(MALFORMED)
        kind = tool.get("type") or "custom"
        if type(kind) is str and kind.startswith(_SERVER_TOOLS):
            # The engine ignores these tools.
            continue
        schema = tool.get("input_schema")
        if kind != "custom" or type(schema) is not dict:
            raise UnmappableError(MALFORMED)
        if "type" not in schema:
            schema = {**schema, "type": "object"}
        function = {
            "name": tool["name"],
            "description": tool.get("description") or "",
            "parameters": schema,
            "strict": tool.get("strict", False),
        }
        tools.append(finished_tool(function, defer=tool.get("defer_loading")))
    return tools


def _chosen(tools: list[Tool], choice: Any) -> list[Tool] | None:
    if choice is None:
        return tools or None
    kind = choice.get("type") if type(choice) is dict else None
    if kind == "tool" and tools:
        return chosen_tools(tools, {"function": {"name": choice.get("name")}})
    if type(kind) is not str or kind not in _CHOICES or (kind == "any" and not tools):
        raise UnmappableError(MALFORMED)
    return chosen_tools(tools, _CHOICES[kind])


def _effort(body: AnthropicBody) -> str | None:
    config = body.output_config
    if config is None:
        return None
    effort = config.get("effort") if type(config) is dict else None
    if effort is not None and type(effort) is not str:
        raise UnmappableError(MALFORMED)
    return "max" if effort == "xhigh" else effort
