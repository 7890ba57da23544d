"""Translates bodies of /v1/responses to chat messages, as SGLang (0.5.23) does.

Not supported is what depends on the engine's memory or its options: earlier responses, tools
other than functions, and system messages after the first message, which the engine merges for
some templates and not for others.
"""

from typing import Any, Final

import msgspec

from extproc.engines.custom_tools import CUSTOM_PARAMETERS, custom_arguments
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
_DEVELOPER: Final = "Developer instructions:"
_BUILT_IN: Final = frozenset(
    {"code_interpreter", "local_shell", "mcp", "web_search", "web_search_preview"}
)
_REASONING_ONLY: Final = {"role", "reasoning_content"}


def responses_chat(body: ResponsesBody) -> SglangChat:
    """The chat that a body of /v1/responses is translated to; raises UnmappableError."""
    if body.previous_response_id is not None:
        raise UnmappableError(UNSUPPORTED, "previous_response_id")
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
        late_system="joined",
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
        identity, name = item.get("call_id") or item.get("id"), item.get("name")
        function = {"name": name, "arguments": custom_arguments(item.get("input"))}
        return {
            "role": "assistant",
            "tool_calls": [{"id": identity, "type": "function", "function": function}],
        }
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
    """A developer's content, with the line by which the engine tells it from a system's."""
    if type(content) is str:
        return f"{_DEVELOPER}\n{content}"
    if type(content) is not list:
        return content
    for index, part in enumerate(content):
        if type(part) is dict and type(part.get("text")) is str:
            labelled = {**part, "text": f"{_DEVELOPER}\n{part['text']}"}
            return [*content[:index], labelled, *content[index + 1 :]]
    return [{"type": "input_text", "text": _DEVELOPER}, *content]


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
        if type(kind) is str and kind in _BUILT_IN:
            # The model is not shown these.
            continue
        if kind == "custom":
            tools.append(_custom_tool(tool))
            continue
        if kind != "function":
            raise UnmappableError(UNSUPPORTED, "tools")
        if type(tool.get("name")) is not str:
            raise UnmappableError(MALFORMED)
        function = {
            "name": tool["name"],
            "description": tool.get("description"),
            "parameters": tool.get("parameters"),
            "strict": tool.get("strict", False),
        }
        # Here the engine leaves the types of schemas as they are.
        tools.append(finished_tool(function, rewrites=False))
    return tools


def _custom_tool(tool: dict[str, Any]) -> Tool:
    """The function that a tool with a text of its own format is shown as."""
    texts = [tool.get("description")]
    given = tool.get("format")
    if type(given) is dict and given.get("type") == "grammar":
        syntax, definition = given.get("syntax") or "lark", given.get("definition") or ""
        texts.append(f"The payload must conform to this {syntax} grammar:\n{definition}")
    if any(text is not None and type(text) is not str for text in texts):
        raise UnmappableError(MALFORMED)
    function = {
        "name": tool.get("name"),
        "description": "\n\n".join([text for text in texts if text]) or None,
        "parameters": CUSTOM_PARAMETERS,
        "strict": tool.get("strict", False),
    }
    if type(function["name"]) is not str:
        raise UnmappableError(MALFORMED)
    return finished_tool(function, rewrites=False)


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
