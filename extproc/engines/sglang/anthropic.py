"""Translates bodies of /v1/messages to chat messages, as SGLang (0.5.23) does.

Whether thinking can be switched, and how thoughts of earlier answers are written, depends on the
reasoning parser of the engine.
"""

from typing import Any

from extproc.engines.sglang.chats import SglangChat, chat_prompt
from extproc.engines.sglang.thinking import ReasoningParser
from extproc.engines.sglang.tools import chosen_tools, finished_tool
from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import AnthropicBody
from extproc.tokenization.prompts import Message, Tool
from extproc.tokenization.reasons import MALFORMED, MULTIMODAL, UNSUPPORTED

__all__ = ["anthropic_chat"]

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}
_SERVER_TOOLS = ("web_search_", "computer_", "bash_", "text_editor_")


def anthropic_chat(body: AnthropicBody, parser: ReasoningParser) -> SglangChat:
    """The chat that a body of /v1/messages is translated to; raises UnmappableError.

    `parser` is the one that the engine was started with.
    """
    messages = _system(body.system)
    if type(body.messages) is not list:
        raise UnmappableError(MALFORMED)
    for message in body.messages:
        messages.extend(_messages(message, parser))
    tools = _tools(bytes(body.tools))
    return chat_prompt(
        messages,
        tools=_chosen(tools, body.tool_choice),
        effort=_effort(body),
        late_system="stripped",
        thinking=_thinking(body.thinking, parser),
    )


def _thinking(given: Any, parser: ReasoningParser) -> bool | None:
    """Whether thinking is turned on or off; None if it is left as it is."""
    if given is None:
        return None
    kind = given.get("type") if type(given) is dict else None
    if type(kind) is not str or kind not in _THINKING:
        raise UnmappableError(MALFORMED)
    on = _THINKING[kind]
    if parser.exists and not parser.switched:
        raise UnmappableError(UNSUPPORTED, "thinking")
    if not parser.exists:
        if on:
            raise UnmappableError(MALFORMED)
        return None
    return on


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


def _messages(given: Any, parser: ReasoningParser) -> list[Message]:
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
        texts = [{"type": "text", "text": _text(one)} for one in content if _kind(one) == "text"]
        return [{"role": role, "content": _content(texts)}] if texts else []
    return _user(content) if role == "user" else _assistant(content, parser)


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
        else:
            raise UnmappableError(UNSUPPORTED)
    if parts:
        messages.append({"role": "user", "content": _content(parts)})
    return messages


def _assistant(blocks: list[Any], parser: ReasoningParser) -> list[Message]:
    parts = _thoughts(blocks, parser)
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
            text = _text_of_result(block.get("content"))
            parts.append({"type": "text", "text": f"Tool result: {text}"})
        elif kind != "thinking":
            raise UnmappableError(UNSUPPORTED, "messages")
    message: Message = {"role": "assistant"}
    if calls:
        message["tool_calls"] = calls
    if parts:
        message["content"] = _content(parts)
    elif not calls:
        message["content"] = ""
    return [message]


def _thoughts(blocks: list[Any], parser: ReasoningParser) -> list[Message]:
    """The part with the thoughts of an earlier answer; without a parser, they are dropped."""
    texts = [block.get("thinking") for block in blocks if _kind(block) == "thinking"]
    if any(text is not None and type(text) is not str for text in texts):
        raise UnmappableError(MALFORMED)
    thoughts = "\n".join([text for text in texts if text])
    if not thoughts or not parser.exists:
        return []
    if not parser.start:
        raise UnmappableError(UNSUPPORTED, "messages")
    return [{"type": "text", "text": parser.written(thoughts)}]


def _text_of_result(given: Any) -> str:
    found = _result(given)
    return found if type(found) is str else "\n".join([part["text"] for part in found])


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
