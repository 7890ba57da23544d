"""Normalises chat messages to what the engine gives a chat template.

SGLang (0.5.23) reads messages into typed models and writes them out again. Unknown fields are
dropped, optional fields are written only if they have a value, and a tool call has exactly the
fields id, index, type and function, which may be null. Templates print tool calls as JSON and
test whether a field exists, so each of these details can change the prompt.

Two steps depend on the template and follow later, in `for_template`: whether content stays a list
of parts, and how a trailing assistant message is treated.
"""

import re
from typing import Any, Final, Literal

import msgspec

from extproc.engines.sglang.schema_types import plain_value
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.media import MEDIA_KINDS
from extproc.tokenization.prompts import Message
from extproc.tokenization.reasons import MALFORMED, MULTIMODAL, UNSUPPORTED

__all__ = [
    "LateSystem",
    "chat_messages",
    "for_template",
    "has_media",
    "with_one_system",
    "without_media",
]

LateSystem = Literal["stays", "joined", "stripped"]

_ROLES: Final = frozenset(
    {"system", "assistant", "tool", "function", "developer", "latest_reminder", "root"}
)
_PHASES: Final = frozenset({"commentary", "final_answer"})
# The kinds of media for the template, by the type of a part.
_MEDIA: Final = {
    "audio_url": "audio",
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
}
_THOUGHTS: Final = frozenset({"thinking", "reasoning"})
_STRINGS: Final = ("tool_call_id", "name", "phase", "reasoning_content")

_arguments_decoder: Final = msgspec.json.Decoder(dict[str, Any])
# The engine's parser of arguments turns integers over 64 bits into floats.
_HUGE_INTEGER: Final = re.compile(r"\d{19}")


def chat_messages(given: Any) -> tuple[list[Message], bool]:
    """The messages of a chat body, and whether the content of any message is a list of parts.

    Raises UnmappableError for what the engine refuses, and for fields with an unknown
    effect.
    """
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    messages = []
    parts = False
    for message in given:
        if type(message) is not dict:
            raise UnmappableError(MALFORMED)
        role = message.get("role")
        content = message.get("content")
        if role == "user":
            if type(content) is not str:
                content = _parts(content, role)
                parts = True
            messages.append({"role": role, "content": content})
        else:
            normal = _generic_message(message, role, content)
            parts = parts or type(normal["content"]) is list
            messages.append(normal)
    return messages, parts


def has_media(messages: list[Message]) -> bool:
    """True if some normalised message has an image, audio or video."""
    for message in messages:
        content = message["content"]
        if type(content) is list and any(part["type"] in MEDIA_KINDS for part in content):
            return True
    return False


def without_media(messages: list[Message]) -> list[Message]:
    """The normalised messages without images, audio and video."""
    return [
        message
        if type(message["content"]) is not list
        else {
            **message,
            "content": [one for one in message["content"] if one["type"] not in MEDIA_KINDS],
        }
        for message in messages
    ]


def for_template(
    messages: list[Message], keep_parts: bool, continue_final: bool
) -> tuple[list[Message], str]:
    """The messages for the template, and the text that follows its generation prompt.

    `keep_parts`: the template iterates over the parts of a content. With `continue_final`, a
    trailing assistant message is removed and its text is returned; otherwise it becomes a user's
    message, since the engine wants the last message to be a user's.
    """
    messages = [_flat(message, keep_parts) for message in messages]
    last = messages[-1]
    if last["role"] != "assistant" or type(last["content"]) is not str:
        return messages, ""
    if continue_final:
        return messages[:-1], last["content"]
    messages[-1] = {"role": "user", "content": last["content"]}
    return messages, ""


def with_one_system(messages: list[Message], *, stripped: bool) -> list[Message]:
    """The messages with those of a system as the first one.

    `stripped`: texts after the first message lose their blanks, and are lines and not paragraphs.
    """
    texts: list[str] = []
    others: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] != "system":
            others.append(message)
            continue
        content = message["content"]
        parts = [content] if type(content) is str else [part.get("text") for part in content]
        found = [text for text in parts if type(text) is str]
        if stripped and index:
            found = [text for text in map(str.strip, found) if text]
        if stripped:
            texts.append("\n".join(found))
        else:
            texts += found
    if stripped:
        texts = [text for text in texts if text]
    if not texts:
        return others
    return [{"role": "system", "content": ("\n" if stripped else "\n\n").join(texts)}, *others]


def _flat(message: Message, keep_parts: bool) -> Message:
    content = message["content"]
    if type(content) is not list:
        return message
    if not keep_parts:
        return {**message, "content": _joined(content)}
    if message["role"] == "tool" and all(part["type"] == "text" for part in content):
        content = _joined(content)
    # The engine puts the content last here, and some templates print whole messages.
    others = {field: value for field, value in message.items() if field != "content"}
    return {**others, "content": content}


def _joined(parts: list[Message]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _generic_message(message: Message, role: Any, content: Any) -> Message:
    if type(role) is not str or (role := role.lower()) not in _ROLES:
        raise UnmappableError(MALFORMED)
    if content is None:
        content = ""
    elif type(content) is not str:
        content = _parts(content, role)
    normal: Message = {"role": role, "content": content}
    if len(message) == 2 and "content" in message:
        return normal
    # Only some encoders of the engine use the tools of a message and prefix completion.
    if message.get("tools") is not None or message.get("prefix") is not None:
        raise UnmappableError(UNSUPPORTED)
    for field in _STRINGS:
        value = message.get(field)
        if value is not None:
            if type(value) is not str:
                raise UnmappableError(MALFORMED)
            normal[field] = value
    if normal.get("phase", "commentary") not in _PHASES:
        raise UnmappableError(MALFORMED)
    calls = message.get("tool_calls")
    if calls is not None:
        if type(calls) is not list:
            raise UnmappableError(MALFORMED)
        normal["tool_calls"] = [_tool_call(call, role == "assistant") for call in calls]
    return normal


def _parts(given: Any, role: str) -> list[Message]:
    """The text, the references to tools and the media; templates get no thoughts."""
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    parts = []
    for part in given:
        kind = part.get("type") if type(part) is dict else None
        if type(kind) is not str:
            raise UnmappableError(MALFORMED)
        if kind == "text":
            text = part.get("text")
            if type(text) is not str:
                raise UnmappableError(MALFORMED)
            parts.append({"type": "text", "text": text})
        elif kind in _MEDIA:
            parts.append({"type": _MEDIA[kind]})
        elif kind == "input_audio":
            raise UnmappableError(MULTIMODAL)
        elif kind == "tool_reference":
            name = part.get("name")
            if type(name) is not str:
                raise UnmappableError(MALFORMED)
            parts.append({"type": kind, "name": name})
        elif kind not in _THOUGHTS or role != "assistant":
            raise UnmappableError(MALFORMED)
    return parts


def _tool_call(given: Any, assistant: bool) -> Message:
    function = given.get("function") if type(given) is dict else None
    if type(function) is not dict or given.get("type", "function") != "function":
        raise UnmappableError(MALFORMED)
    arguments = function.get("arguments")
    if type(arguments) is str:
        if assistant:
            arguments = _arguments(arguments)
    elif arguments is not None and type(arguments) is not dict:
        raise UnmappableError(MALFORMED)
    identity, index, name = given.get("id"), given.get("index"), function.get("name")
    if (
        (identity is not None and type(identity) is not str)
        or (index is not None and type(index) is not int)
        or (name is not None and type(name) is not str)
    ):
        raise UnmappableError(MALFORMED)
    return {
        "id": identity,
        "index": index,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = _arguments_decoder.decode(text)
        return plain_value(found) if _HUGE_INTEGER.search(text) else found
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise UnmappableError(MALFORMED) from None
