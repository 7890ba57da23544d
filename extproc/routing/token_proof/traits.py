"""What of a request decides how an engine makes its tokens.

An engine that renders tools in its own way still renders chats without tools as expected. So a
difference concerns only requests that have what the probe has. A trait is a bit, since a set of
them is compared for each candidate of a request.
"""

from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

__all__ = [
    "CHAT",
    "CONTINUED",
    "MESSAGES",
    "PARTS",
    "RESPONSES",
    "TEXT",
    "THINKING",
    "TOOLS",
    "names_of",
    "traits_of",
]

TEXT: Final = 1
CHAT: Final = 2
# Contents that are lists of parts.
PARTS: Final = 4
# Tools, or calls of tools in the history.
TOOLS: Final = 8
# The last message is the beginning of the answer.
CONTINUED: Final = 16
# Arguments for the template, or how much to think.
THINKING: Final = 32
RESPONSES: Final = 64
MESSAGES: Final = 128

_NAMES: Final = {
    TEXT: "text",
    CHAT: "chat",
    PARTS: "parts",
    TOOLS: "tools",
    CONTINUED: "continued",
    THINKING: "thinking",
    RESPONSES: "responses",
    MESSAGES: "messages",
}
_OF_PATH: Final = {
    "/v1/completions": TEXT,
    "/v1/embeddings": TEXT,
    "/generate": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/responses": CHAT | RESPONSES,
    "/v1/messages": CHAT | MESSAGES,
}
_DETAILS: Final = PARTS | TOOLS | CONTINUED | THINKING
# A larger body is not decoded once more: it counts as one that has everything.
_DECODED_MAX_BYTES: Final = 1024 * 1024
_NULL: Final = Raw(b"null")
_EMPTY: Final = frozenset({b"null", b"[]", b"{}", b""})


class _Message(Struct):
    role: Raw = _NULL
    content: Raw = _NULL
    tool_calls: Raw = _NULL


class _Shape(Struct):
    messages: list[_Message] = []
    input: Raw = _NULL
    tools: Raw = _NULL
    thinking: Raw = _NULL
    reasoning: Raw = _NULL
    reasoning_effort: Raw = _NULL
    chat_template_kwargs: Raw = _NULL


_decoder: Final = msgspec.json.Decoder(_Shape)


def names_of(traits: int) -> list[str]:
    """The names of the traits in a set, in a stable order."""
    return [name for trait, name in _NAMES.items() if traits & trait]


def traits_of(path: str, body: bytes | bytearray, concerned: int) -> int:
    """The traits of a body sent to `path`; 0 for a path without a prompt.

    The body is only decoded if its path does not say whether it has one of those `concerned`.
    """
    found = _OF_PATH.get(path, 0)
    if not found & CHAT or found & concerned or not concerned & _DETAILS:
        return found
    if len(body) > _DECODED_MAX_BYTES:
        return found | _DETAILS
    try:
        shape = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return found | _DETAILS
    return found | _details(shape)


def _details(shape: _Shape) -> int:
    found = 0
    messages, roles = shape.messages, [bytes(one.role) for one in shape.messages]
    if any(bytes(one.content).startswith(b"[") for one in messages):
        found |= PARTS
    if (
        _given(shape.tools)
        or b'"tool"' in roles
        or any(_given(one.tool_calls) for one in messages)
        or b'"function_call' in bytes(shape.input)
    ):
        found |= TOOLS
    if roles and roles[-1] == b'"assistant"':
        found |= CONTINUED
    if any(map(_given, _thinking(shape))):
        found |= THINKING
    return found


def _thinking(shape: _Shape) -> tuple[Raw, ...]:
    return shape.thinking, shape.reasoning, shape.reasoning_effort, shape.chat_template_kwargs


def _given(raw: Any) -> bool:
    return bytes(raw) not in _EMPTY
