"""Translates bodies of /v1/messages to chat messages, as vLLM (0.32) does.

Two steps depend on the chat template, so they are taken when it is known: whether a system's
messages go to the beginning, and what turns thinking off.
"""

from typing import Any, Final

from msgspec import Struct

from extproc.engines.tool_lists import kept_by_bytes
from extproc.engines.vllm.chats import VllmChat, checked_kwargs
from extproc.engines.vllm.messages import BuiltCall
from extproc.engines.vllm.tools import tool_of
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.fields import AnthropicBody
from extproc.tokenization.prompts import Message, TemplateFacts, TemplateInput, Tool
from extproc.tokenization.reasons import MALFORMED, NO_TEXT, UNSUPPORTED

__all__ = ["AnthropicChat", "anthropic_chat"]

_BILLING_HEADER: Final = "x-anthropic-billing-header"
_CHOICES: Final = frozenset({"auto", "any", "tool", "none"})
_EFFORTS: Final = frozenset({"low", "medium", "high", "xhigh", "max"})
_THINKING: Final = frozenset({"enabled", "disabled", "adaptive"})
_IGNORED_BLOCKS: Final = frozenset({"redacted_thinking", "tool_reference"})
# As the engine translates it; what it shows makes no difference here.
_IMAGE: Final[Message] = {"type": "image_url"}
_TOOL_CHANGES: Final = frozenset({"tool_addition", "tool_removal"})


class AnthropicChat(Struct, frozen=True, kw_only=True, eq=False):
    """A chat of /v1/messages. `system` is the top-level text; `messages` may have others of it.

    `thinking_off`: the client turns thinking off.
    """

    chat: VllmChat
    system: str
    thinking_off: bool

    @property
    def length(self) -> int:
        return self.chat.length

    @property
    def has_tools(self) -> bool:
        return self.chat.has_tools

    @property
    def has_media(self) -> bool:
        return self.chat.has_media

    @property
    def with_special(self) -> bool:
        return False

    @property
    def harmony_is_special(self) -> bool:
        return True

    def for_template(
        self, template: TemplateFacts, default_kwargs: dict[str, Any]
    ) -> TemplateInput:
        chat = self.chat
        messages, system = chat.messages, self.system
        if template.wants_system_first:
            texts = [one["content"] for one in messages if one["role"] == "system"]
            system = "".join([system, *texts])
            messages = [one for one in messages if one["role"] != "system"]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        effort = template.effort_without_thinking if self.thinking_off else chat.effort
        return chat.rendered(messages, effort, template, default_kwargs)


def anthropic_chat(body: AnthropicBody) -> AnthropicChat:
    """The chat that a body of /v1/messages is translated to; raises UnmappableError."""
    if type(body.messages) is not list:
        raise UnmappableError(NO_TEXT if body.messages is None else MALFORMED)
    messages: list[Message] = []
    for message in body.messages:
        _add(message, messages)
    tools = _tools(bytes(body.tools)) if bytes(body.tools) != b"null" else None
    _check_choice(body.tool_choice)
    chat = VllmChat(
        messages=messages,
        tools=tools,
        no_tool_wanted=type(body.tool_choice) is dict and body.tool_choice.get("type") == "none",
        template_kwargs=checked_kwargs(body.chat_template_kwargs),
        effort=_effort(body.output_config),
    )
    return AnthropicChat(
        chat=chat, system=_system(body.system), thinking_off=_thinking_off(body.thinking)
    )


def _system(given: Any) -> str:
    """The text of the system's blocks, joined by nothing."""
    if given is None or type(given) is str:
        return given or ""
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    texts = [_text(block) for block in given if _kind(block) == "text"]
    return "".join([text for text in texts if text and not text.startswith(_BILLING_HEADER)])


def _add(given: Any, messages: list[Message]) -> None:
    """Add the messages for one message; each result of a tool becomes a message."""
    role = given.get("role") if type(given) is dict else None
    if role not in ("user", "assistant", "system"):
        raise UnmappableError(MALFORMED)
    content = given.get("content")
    if type(content) is not str and type(content) is not list:
        raise UnmappableError(MALFORMED)
    if role == "system":
        text = _inline_system(content)
        if text:
            messages.append({"role": role, "content": text})
        return
    message: Message = {"role": role}
    if isinstance(content, str):
        message["content"] = content
    else:
        _read_blocks(content, message, messages)
    if role != "user" or "content" in message:
        messages.append(message)


def _inline_system(content: str | list[Any]) -> str:
    if type(content) is str:
        return "" if content.startswith(_BILLING_HEADER) else content
    if any(_kind(block) in _TOOL_CHANGES for block in content):
        raise UnmappableError(UNSUPPORTED, "messages")
    return _system(content)


def _read_blocks(blocks: list[Any], message: Message, messages: list[Message]) -> None:
    """Put the blocks of a message into it, and results of tools before it."""
    parts: list[Message] = []
    calls: list[BuiltCall] = []
    thoughts: list[str] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "text":
            text = _text(block)
            if text:
                parts.append({"type": "text", "text": text})
        elif kind == "thinking":
            thought = block.get("thinking")
            if thought is not None:
                thoughts.append(_string(thought))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result":
            if message["role"] == "user":
                messages.extend(_result(block))
            else:
                content = block.get("content")
                parts.append({"type": "text", "text": f"Tool result: {content or ''}"})
        elif kind == "image":
            if block.get("source"):
                parts.append(_IMAGE)
        elif kind not in _IGNORED_BLOCKS:
            raise UnmappableError(MALFORMED)
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if parts:
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        message["content"] = parts[0]["text"] if alone else parts


def _call(block: Message) -> BuiltCall:
    identity, name, arguments = block.get("id"), block.get("name"), block.get("input")
    if not identity:
        # The engine makes one from its clock.
        raise UnmappableError(UNSUPPORTED, "messages")
    if type(identity) is not str or (name is not None and type(name) is not str):
        raise UnmappableError(MALFORMED)
    if arguments is not None and type(arguments) is not dict:
        raise UnmappableError(MALFORMED)
    return BuiltCall(identity, name or "", arguments or {}, name_first=False)


def _result(block: Message) -> list[Message]:
    content, identity = block.get("content"), block.get("tool_use_id") or ""
    texts: list[str] = []
    references: list[Message] = []
    images: list[Message] = []
    if type(content) is str:
        texts.append(content)
    elif type(content) is list:
        for item in content:
            # Unlike those of messages, these blocks may be of any type.
            kind = item.get("type") if type(item) is dict else MALFORMED
            if kind == "text":
                texts.append(_string(item.get("text", "")))
            elif kind == "image":
                if item.get("source") != {"type": "url", "url": ""}:
                    images.append(_IMAGE)
            elif kind == "tool_reference":
                name = item.get("tool_name") or item.get("name")
                if name:
                    references.append({"type": kind, "name": name})
            elif kind == MALFORMED:
                raise UnmappableError(MALFORMED)
    elif content is not None:
        raise UnmappableError(MALFORMED)
    found: list[Message] = [{"role": "tool", "tool_call_id": identity, "content": "\n".join(texts)}]
    if images:
        found.append({"role": "user", "content": images})
    if references:
        found.append({"role": "tool", "tool_call_id": identity, "content": references})
    return found


def _kind(block: Any) -> str:
    """The type of a block, or of another object that has one."""
    return _string(block.get("type") if type(block) is dict else None)


def _text(block: Message) -> str:
    text = block.get("text")
    return "" if text is None else _string(text)


def _string(given: Any) -> str:
    if type(given) is not str:
        raise UnmappableError(MALFORMED)
    return given


@kept_by_bytes
def _tools(given: Any) -> list[Tool]:
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    tools = []
    for tool in given:
        schema = tool.get("input_schema") if type(tool) is dict else None
        if type(schema) is not dict:
            raise UnmappableError(MALFORMED)
        if "type" not in schema:
            schema = {**schema, "type": "object"}
        tools.append(tool_of({**tool, "parameters": schema}))
    return tools


def _check_choice(choice: Any) -> None:
    if choice is None:
        return
    kind = _kind(choice)
    if kind not in _CHOICES or (kind == "tool" and not choice.get("name")):
        raise UnmappableError(MALFORMED)


def _thinking_off(thinking: Any) -> bool:
    if thinking is None:
        return False
    kind = _kind(thinking)
    if kind not in _THINKING:
        raise UnmappableError(MALFORMED)
    return kind == "disabled"


def _effort(config: Any) -> str | None:
    effort = None if config is None else config.get("effort") if type(config) is dict else MALFORMED
    if effort is not None and (type(effort) is not str or effort not in _EFFORTS):
        raise UnmappableError(MALFORMED)
    return effort
