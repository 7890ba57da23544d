"""Translates bodies of /v1/responses to chat messages, as SGLang (0.5.23) does.

Not supported is what depends on the engine's memory or its options: earlier responses, and thoughts
that only the engine can read.
"""

from typing import Any, Final

import msgspec

from extproc.engines.sglang.chats import SglangChat, chat_prompt, thinking_kwargs
from extproc.engines.sglang.tools import chosen_tools, finished_tool
from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import ResponsesBody
from extproc.tokenization.prompts import Message, Tool
from extproc.tokenization.reasons import MALFORMED, MULTIMODAL, NO_TEXT, UNSUPPORTED

__all__ = ["responses_chat"]

_EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})
_EFFORT_WITHOUT_WORD: Final = "medium"
_TEXT_PARTS: Final = frozenset({"input_text", "output_text"})
_ITEM_ONLY: Final = frozenset({"id", "status", "type"})
# The engine's own tools, which templates do not get.
_TOOLS_LEFT_OUT: Final = frozenset({"code_interpreter", "local_shell", "mcp", "namespace"})
# What the engine gives the model for a tool that takes a free text.
_CUSTOM: Final = {
    "type": "object",
    "properties": {
        "input": {"type": "string", "description": "The freeform text payload for this tool."}
    },
    "required": ["input"],
    "additionalProperties": False,
}
_DEVELOPER_LABEL: Final = "Developer instructions:"
_REASONING_ONLY: Final = {"role", "reasoning_content"}


def responses_chat(body: ResponsesBody) -> SglangChat:
    """The chat that a body of /v1/responses is translated to; raises UnmappableError."""
    if body.previous_response_id is not None:
        raise UnmappableError(UNSUPPORTED)
    effort = _effort(body.reasoning)
    kwargs = thinking_kwargs(
        body.chat_template_kwargs, None if effort is None else effort != "none"
    )
    return chat_prompt(
        _messages(body),
        tools=_chosen(_tools(bytes(body.tools)), body.tool_choice),
        template_kwargs=kwargs,
        effort=effort,
        responses_api=True,
    )


def _messages(body: ResponsesBody) -> list[Message]:
    given = body.input
    if type(given) is str:
        given = [{"role": "user", "content": given}]
    if type(given) is not list:
        raise UnmappableError(NO_TEXT if given is None else MALFORMED)
    messages: list[Message] = []
    instructions = body.instructions
    if instructions is not None and type(instructions) is not str:
        raise UnmappableError(MALFORMED)
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in given:
        message = _message(item)
        if message is not None:
            messages.append(message)
    return _merged(messages)


def _message(item: Any) -> Message | None:
    """The chat message for one input item; None for a thought without text."""
    if type(item) is not dict:
        raise UnmappableError(MALFORMED)
    kind = item.get("type")
    role = item.get("role")
    if role == "developer":
        item = {**item, "role": "system", "content": _labelled(item.get("content"))}
    if kind == "function_call":
        return _call(item)
    if kind == "custom_tool_call":
        text = item.get("input") or ""
        if type(text) is not str:
            raise UnmappableError(MALFORMED)
        return _call({**item, "arguments": msgspec.json.encode({"input": text}).decode()})
    if kind in ("function_call_output", "custom_tool_call_output"):
        return {
            "role": "tool",
            "tool_call_id": item.get("call_id"),
            "content": _output(item.get("output", "")),
        }
    if kind == "reasoning":
        return _thought(item)
    if kind is not None and kind != "message":
        raise UnmappableError(UNSUPPORTED)
    message = {
        field: value
        for field, value in item.items()
        if value is not None and field not in _ITEM_ONLY
    }
    content = message.get("content")
    if type(content) is list:
        message["content"] = [_part(part) for part in content]
    return message


def _labelled(content: Any) -> Any:
    """A developer's content under the engine's label: before the first part with a text."""
    if type(content) is str:
        return f"{_DEVELOPER_LABEL}\n{content}"
    if type(content) is not list:
        return content
    for at, part in enumerate(content):
        if type(part) is dict and type(part.get("text")) is str:
            labelled = {**part, "text": f"{_DEVELOPER_LABEL}\n{part['text']}"}
            return [*content[:at], labelled, *content[at + 1 :]]
    return [{"type": "input_text", "text": _DEVELOPER_LABEL}, *content]


def _call(item: Message) -> Message:
    arguments = item.get("arguments")
    if type(arguments) is str:
        # Of a call that was cut short, the engine drops the arguments.
        try:
            parsed = msgspec.json.decode(arguments) if arguments else None
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            parsed = None
        if type(parsed) is not dict:
            arguments = "{}"
    elif type(arguments) is not dict:
        arguments = "{}"
    identity = item.get("call_id") or item.get("id")
    function = {"name": item.get("name"), "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": identity, "type": "function", "function": function}],
    }


def _output(given: Any) -> Any:
    if type(given) is not list:
        return given
    texts = [part.get("text", "") for part in given if type(part) is dict]
    if any(type(text) is not str for text in texts):
        raise UnmappableError(MALFORMED)
    return "".join(texts)


def _thought(item: Message) -> Message | None:
    texts = _texts(item.get("summary")) or _texts(item.get("content"))
    if texts:
        return {"role": "assistant", "reasoning_content": "\n".join(texts)}
    if item.get("encrypted_content"):
        raise UnmappableError(UNSUPPORTED)
    return None


def _texts(parts: Any) -> list[str]:
    if not parts:
        return []
    if type(parts) is not list:
        raise UnmappableError(MALFORMED)
    texts = [part["text"] for part in parts if type(part) is dict and part.get("text")]
    if any(type(text) is not str for text in texts):
        raise UnmappableError(MALFORMED)
    return texts


def _part(part: Any) -> Any:
    kind = part.get("type") if type(part) is dict else None
    if type(kind) is str and kind in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text", "")}
    if kind == "input_image" and not part.get("image_url"):
        # The image is known to the engine only.
        raise UnmappableError(MULTIMODAL)
    return part


def _merged(messages: list[Message]) -> list[Message]:
    """The messages, with those of one turn of the assistant merged into one."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else {}
        if (
            message.get("role") == "assistant"
            and last.get("role") == "assistant"
            and (last.get("phase") == message.get("phase") or set(last) == _REASONING_ONLY)
        ):
            merged[-1] = _joined(last, message)
        else:
            merged.append(message)
    return merged


def _joined(last: Message, message: Message) -> Message:
    joined = dict(last)
    if message.get("phase") is not None:
        joined["phase"] = message["phase"]
    content, before = message.get("content"), last.get("content")
    if content is not None and content != "":
        if before is None or before == "":
            joined["content"] = content
        elif type(before) is str and type(content) is str:
            joined["content"] = f"{before}\n\n{content}"
        else:
            joined["content"] = [*_as_parts(before), *_as_parts(content)]
    if message.get("tool_calls"):
        joined["tool_calls"] = [*(last.get("tool_calls") or []), *message["tool_calls"]]
    thought, thought_before = message.get("reasoning_content"), last.get("reasoning_content")
    if thought:
        joined["reasoning_content"] = f"{thought_before}\n{thought}" if thought_before else thought
    return joined


def _as_parts(content: Any) -> list[Any]:
    if type(content) is list:
        return content
    return [{"type": "text", "text": content}] if content else []


@kept_by_bytes
def _tools(given: Any) -> list[Tool]:
    if not given:
        return []
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    tools = []
    for tool in given:
        kind = tool.get("type") if type(tool) is dict else None
        if type(kind) is not str:
            raise UnmappableError(MALFORMED)
        if kind in _TOOLS_LEFT_OUT or kind.startswith("web_search"):
            continue
        if kind not in ("function", "custom"):
            raise UnmappableError(UNSUPPORTED)
        if type(tool.get("name")) is not str:
            raise UnmappableError(MALFORMED)
        if kind == "custom":
            tool = {**tool, "description": _custom_description(tool), "parameters": _CUSTOM}
        function = {
            "name": tool["name"],
            "description": tool.get("description"),
            "parameters": tool.get("parameters"),
            "strict": tool.get("strict", False),
        }
        tools.append(finished_tool(function, renames_types=False))
    return tools


def _custom_description(tool: dict[str, Any]) -> str | None:
    """The description of a tool for free text, with the grammar of the text."""
    description, form = tool.get("description"), tool.get("format")
    if description is not None and type(description) is not str:
        raise UnmappableError(MALFORMED)
    parts = [description] if description else []
    if type(form) is dict and form.get("type") == "grammar":
        syntax, definition = form.get("syntax") or "lark", form.get("definition") or ""
        parts.append(f"The payload must conform to this {syntax} grammar:\n{definition}")
    return "\n\n".join(parts) or None


def _chosen(tools: list[Tool], choice: Any) -> list[Tool] | None:
    if not tools:
        return None
    if type(choice) is dict:
        # The engine leaves forced tools other than functions to the model.
        name = choice.get("name")
        if choice.get("type") != "function" or type(name) is not str:
            raise UnmappableError(UNSUPPORTED)
        choice = {"function": {"name": name}}
    return chosen_tools(tools, choice)


def _effort(reasoning: Any) -> str | None:
    if reasoning is None:
        return None
    if type(reasoning) is not dict:
        raise UnmappableError(MALFORMED)
    # A null turns reasoning effort off; a missing field stands for the default.
    effort = reasoning.get("effort", _EFFORT_WITHOUT_WORD)
    if effort is not None and (type(effort) is not str or effort not in _EFFORTS):
        raise UnmappableError(MALFORMED)
    return effort
