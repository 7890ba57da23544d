"""A chat between its body and its tokens, whichever API it came through."""

from typing import Any

import msgspec

__all__ = ["Chat", "chat"]

_ANSWERING_ROLE = "assistant"


class _Part(msgspec.Struct):
    text: str | None = None


_Content = str | list[_Part] | None


class _Message(msgspec.Struct):
    role: str = ""
    content: _Content = None


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """Messages as they were sent, and the other values that a template may use.

    `text` is their form for a worker without a template. With `continues` the last message is
    the beginning of the answer, and the output continues it.
    """

    messages: list[dict[str, Any]]
    text: str
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] = {}
    continues: bool = False


def chat(messages: list[dict[str, Any]], **fields: Any) -> Chat:
    """A chat of these messages; raises msgspec.ValidationError for an invalid message."""
    plain = msgspec.convert(messages, list[_Message])
    text = "".join(item.role + _text(item.content) for item in plain) + _ANSWERING_ROLE
    return Chat(messages=messages, text=text, **fields)


def _text(content: _Content) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or "" for part in content)
