"""Translates bodies of /v1/responses to chat messages, as vLLM (0.32) does.

Not supported is what depends on the engine's memory: earlier responses.
"""

from typing import Any, Final

from extproc.engines.custom_tools import CUSTOM_PARAMETERS, custom_arguments
from extproc.engines.tool_lists import kept_by_bytes
from extproc.engines.vllm.chats import EFFORTS, VllmChat, checked_kwargs
from extproc.engines.vllm.messages import BuiltCall, checked_messages
from extproc.engines.vllm.tools import tool_of
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import ResponsesBody
from extproc.tokenization.prompts import Message, Tool
from extproc.tokenization.reasons import MALFORMED, NO_TEXT, UNSUPPORTED

__all__ = ["responses_chat"]

_OPEN: Final = ("in_progress", "incomplete")


def responses_chat(body: ResponsesBody) -> VllmChat:
    """The chat that a body of /v1/responses is translated to; raises UnmappableError."""
    for member in ("previous_response_id", "previous_input_messages"):
        if getattr(body, member) is not None:
            raise UnmappableError(UNSUPPORTED, member)
    if body.prompt is not None:
        raise UnmappableError(MALFORMED)
    given = body.input
    if type(given) is str:
        items: list[Any] = [{"role": "user", "content": given}]
    elif type(given) is list:
        items = given
    else:
        raise UnmappableError(NO_TEXT if given is None else MALFORMED)
    open_end = type(given) is list and _is_open(given)
    return VllmChat(
        messages=_messages(body.instructions, items),
        tools=_tools(bytes(body.tools)) if _has_tools(body) else None,
        no_tool_wanted=body.tool_choice == "none",
        template_kwargs=checked_kwargs(body.chat_template_kwargs),
        effort=_effort(body.reasoning),
        generation_prompt=not open_end,
        continue_final=open_end,
        with_special=True,
    )


def _is_open(items: list[Any]) -> bool:
    """True if the last item is an answer that the model is to continue."""
    last = items[-1] if items else None
    return (
        type(last) is dict
        and last.get("type", "message") in ("message", "reasoning")
        and last.get("status") in _OPEN
    )


def _messages(instructions: Any, items: list[Any]) -> list[Message]:
    messages: list[Message] = []
    if instructions:
        if type(instructions) is not str:
            raise UnmappableError(MALFORMED)
        messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(items):
        # The instructions are a message of their own.
        before = messages[-1] if index and messages else None
        message = _message(item, before)
        if message is not None:
            messages.append(message)
    if not messages:
        raise UnmappableError(NO_TEXT)
    return messages


def _message(item: Any, before: Message | None) -> Message | None:
    """The message for an item; None if it went into the assistant's message before it."""
    if type(item) is not dict:
        raise UnmappableError(MALFORMED)
    answer = before if before is not None and before["role"] == "assistant" else None
    kind = item.get("type")
    if kind == "function_call":
        return _with_call(_call(item, item.get("arguments")), answer)
    if kind == "custom_tool_call":
        return _with_call(_call(item, custom_arguments(item.get("input"))), answer)
    if kind in ("function_call_output", "custom_tool_call_output"):
        return _checked(
            {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
        )
    if kind == "reasoning":
        return _with_value("reasoning", _thought(item), answer)
    if kind is not None and kind != "message":
        raise UnmappableError(UNSUPPORTED, "input")
    if item.get("role") == "assistant":
        text = _answer_text(item.get("content"))
        if text is not None:
            return _with_value("content", text, answer)
    return _checked(dict(item))


def _checked(message: Message) -> Message:
    return checked_messages([message])[0]


def _with_call(call: BuiltCall, answer: Message | None) -> Message | None:
    if answer is None:
        return {"role": "assistant", "tool_calls": [call]}
    answer["tool_calls"] = [*(answer.get("tool_calls") or []), call]
    return None


def _with_value(field: str, value: str, answer: Message | None) -> Message | None:
    if answer is None or answer.get(field) is not None:
        return {"role": "assistant", field: value}
    answer[field] = value
    return None


def _call(item: Message, arguments: Any) -> BuiltCall:
    name, identity, namespace = item.get("name"), item.get("call_id"), item.get("namespace")
    if type(name) is not str or type(identity) is not str or type(arguments) not in (str, dict):
        raise UnmappableError(MALFORMED)
    if namespace:
        name = f"{namespace}__{name}"
    return BuiltCall(identity, name, arguments, name_first=True)


def _thought(item: Message) -> str:
    if item.get("encrypted_content"):
        raise UnmappableError(MALFORMED)
    content, summary = item.get("content"), item.get("summary")
    for parts in (content, summary):
        if parts:
            first = parts[0] if type(parts) is list else None
            text = first.get("text") if type(first) is dict else None
            if type(text) is not str:
                raise UnmappableError(MALFORMED)
            return text
    return ""


def _answer_text(content: Any) -> str | None:
    """The text of an answer: the engine looks at the first part only."""
    if type(content) is str:
        return content
    if type(content) is not list or not content:
        return None
    text = content[0].get("text") if type(content[0]) is dict else None
    if text is not None and type(text) is not str:
        raise UnmappableError(MALFORMED)
    return text


def _has_tools(body: ResponsesBody) -> bool:
    return bytes(body.tools) not in (b"null", b"[]")


@kept_by_bytes
def _tools(given: Any) -> list[Tool]:
    """The functions that the model is shown; the engine's own tools are not among them."""
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    tools: list[Tool] = []
    for tool in given:
        kind = tool.get("type") if type(tool) is dict else None
        if type(kind) is not str:
            raise UnmappableError(MALFORMED)
        tools.extend(map(tool_of, _functions(kind, tool)))
    return tools


def _functions(kind: str, tool: dict[str, Any]) -> list[dict[str, Any]]:
    if kind == "function":
        return [tool]
    if kind == "custom":
        if type(tool.get("format")) is dict and tool["format"].get("type") == "grammar":
            raise UnmappableError(MALFORMED)
        described = {field: tool.get(field) for field in ("name", "description")}
        return [{**described, "parameters": CUSTOM_PARAMETERS}]
    if kind == "namespace":
        given, name = tool.get("tools"), tool.get("name")
        if type(given) is not list or type(name) is not str:
            raise UnmappableError(MALFORMED)
        return [
            {**one, "name": f"{name}__{one.get('name')}"}
            for one in given
            if type(one) is dict and one.get("type") == "function"
        ]
    return []


def _effort(reasoning: Any) -> str | None:
    if reasoning is None:
        return None
    effort = reasoning.get("effort") if type(reasoning) is dict else MALFORMED
    if effort is not None and (type(effort) is not str or effort not in EFFORTS):
        raise UnmappableError(MALFORMED)
    return effort
