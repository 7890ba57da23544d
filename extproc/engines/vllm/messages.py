"""Turns chat messages into what vLLM (0.32) gives a chat template.

Unlike SGLang, vLLM keeps the fields of a message that it knows and drops the others, writes a
content as one text or as a list of parts, and lets a trailing answer of the assistant stand.
Arguments of tool calls that are not an object become an empty one.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.media import MEDIA_KINDS
from extproc.tokenization.prompts import ContentFormat, Message
from extproc.tokenization.reasons import MALFORMED, MULTIMODAL

__all__ = ["BuiltCall", "checked_messages", "has_media", "template_messages"]

_BILLING_HEADER: Final = "x-anthropic-billing-header"
_TEXT_FIELDS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# The kinds of media for the template, by the type of a part.
_MEDIA: Final = {
    "audio_embeds": "audio",
    "audio_url": "audio",
    "image_embeds": "image",
    "image_pil": "image",
    "image_url": "image",
    "input_audio": "audio",
    "input_image": "image",
    "video_embeds": "video",
    "video_url": "video",
}
# The engine puts these at places of its own.
_OTHER_MEDIA: Final = frozenset({"file", "prompt_embeds"})
# In this order, if the client names the medium.
_FIELDS_OF_NAMED: Final = (
    "image_url",
    "image_pil",
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
    "audio_url",
    "input_audio",
    "video_url",
    "tool_reference",
)
# They stand for what the engine puts before the texts of a message with media: its placeholders.
_MARKS: Final = ("\ue000", "\ue001")
# Fields of parts that the engine reads itself; it passes all others on to the template.
_PART_FIELDS: Final = frozenset(
    {
        *_MEDIA.keys() - {"input_image"},
        "file",
        "closed",
        "data",
        "name",
        "prompt_cache_breakpoint",
        "refusal",
        "text",
        "thinking",
        "type",
        "uuid",
    }
)
_CONTENT_MAY_BE_NULL: Final = frozenset({"assistant", "function"})
_NUMBERS: Final = re.compile(r"NaN|Infinity|\d{18}")
_decoder: Final = msgspec.json.Decoder()


def checked_messages(given: Any) -> list[Message]:
    """The messages of a chat body; raises UnmappableError for what the engine refuses."""
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    return [_checked(message) for message in given]


def _checked(message: Any) -> Message:
    role = message.get("role") if type(message) is dict else None
    if type(role) is not str:
        raise UnmappableError(MALFORMED)
    content = message.get("content")
    if content is None and "content" in message and role not in _CONTENT_MAY_BE_NULL:
        raise UnmappableError(MALFORMED)
    for field in ("name", "reasoning_content", "reasoning"):
        value = message.get(field)
        if value is not None and type(value) is not str:
            raise UnmappableError(MALFORMED)
    checked: Message = message
    return checked


def has_media(messages: list[Message]) -> bool:
    """True if some message has a part that is neither a text nor a reference to a tool."""
    for message in messages:
        content = message.get("content")
        if type(content) is list and any(map(_is_medium, content)):
            return True
    return False


def _is_medium(part: Any) -> bool:
    if type(part) is not dict:
        return False
    kind = part.get("type")
    return part.get("uuid") is not None or (type(kind) is str and kind in _MEDIA)


def template_messages(
    messages: list[Message], content_format: ContentFormat, *, other_media: bool = False
) -> list[Message]:
    """The messages as the template gets them; raises UnmappableError.

    With `other_media`, they differ from those without it in nothing but their media.
    """
    return [_message(message, content_format, other_media) for message in messages]


def _message(given: Message, content_format: ContentFormat, other_media: bool) -> Message:
    role = given["role"]
    parts = _parts(given.get("content"))
    if role == "system":
        parts = _without_billing_header(parts)
    content = _content(list(parts), content_format, other_media)
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        calls = given.get("tool_calls")
        if calls is not None:
            if type(calls) is not list:
                raise UnmappableError(MALFORMED)
            if calls:
                message["tool_calls"] = [_tool_call(call) for call in calls]
        reasoning = given.get("reasoning")
        if reasoning is None:
            reasoning = given.get("reasoning_content")
        if reasoning is not None:
            message["reasoning"] = message["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in given:
            message["tool_call_id"] = given["tool_call_id"]
        content = message["content"]
        if type(content) is list and all(part["type"] == "text" for part in content):
            message["content"] = "\n".join([part["text"] for part in content])
    for field in ("name", "task"):
        if type(given.get(field)) is str:
            message[field] = given[field]
    if role == "developer":
        message["tools"] = given.get("tools")
    return message


def _parts(content: Any) -> Iterator[Message]:
    """The parts of a content, with the text of each as `text`."""
    if content is None:
        return
    if type(content) is str:
        yield {"type": "text", "text": content}
        return
    if type(content) is not list:
        raise UnmappableError(MALFORMED)
    for part in content:
        if type(part) is str:
            yield {"type": "text", "text": part}
            continue
        kind = part.get("type") if type(part) is dict else None
        if type(kind) is not str:
            raise UnmappableError(MULTIMODAL if type(part) is dict else MALFORMED)
        if part.get("uuid") is not None:
            kind = next((field for field in _FIELDS_OF_NAMED if field in part), kind)
        field = _TEXT_FIELDS.get(kind)
        if kind == "tool_reference":
            yield {"type": kind, "name": part.get("name")}
            continue
        if kind in _OTHER_MEDIA:
            raise UnmappableError(MULTIMODAL)
        known: Message
        if kind in _MEDIA:
            known = {"type": _MEDIA[kind]}
        elif field is not None and part.get("uuid") is None and type(part.get(field)) is str:
            known = {"type": "text", "text": part[field]}
        else:
            raise UnmappableError(MALFORMED)
        yield known | {name: part[name] for name in part if name not in _PART_FIELDS}


def _without_billing_header(parts: Iterator[Message]) -> Iterator[Message]:
    """The parts without the line by which an agent names its account.

    It differs in every request, so the engine drops it.
    """
    for part in parts:
        text = part.get("text")
        if type(text) is str and text.startswith(_BILLING_HEADER):
            rest = text.partition("\n")[2]
            if rest:
                yield {**part, "text": rest}
        else:
            yield part


def _content(parts: list[Message], content_format: ContentFormat, other_media: bool) -> Any:
    kept = [part for part in parts if part["type"] not in MEDIA_KINDS]
    if content_format == "openai":
        return kept if other_media else parts
    texts = [part["text"] if part["type"] == "text" else part["name"] for part in kept]
    if not all(type(text) is str for text in texts):
        raise UnmappableError(MALFORMED)
    if len(kept) < len(parts):
        texts.insert(0, _MARKS[other_media])
    # A part without text leaves no line.
    return "\n".join(filter(None, texts))


class BuiltCall(NamedTuple):
    """A call that the engine makes from an item or block of another API.

    `name_first`: its function has the name before the arguments.
    """

    id: str
    name: str
    arguments: str | dict[str, Any]
    name_first: bool


def _tool_call(given: Any) -> Message:
    if type(given) is BuiltCall:
        built = given.arguments
        if isinstance(built, str):
            built = _arguments(built)
        fields: list[tuple[str, Any]] = [("arguments", built), ("name", given.name)]
        if given.name_first:
            fields.reverse()
        return {"id": given.id, "function": dict(fields), "type": "function"}
    function = given.get("function") if type(given) is dict else None
    if type(function) is not dict or given.get("type") != "function":
        raise UnmappableError(MALFORMED)
    identity, name = given.get("id"), function.get("name")
    arguments = function.get("arguments")
    if type(identity) is not str or type(name) is not str or type(arguments) is not str:
        raise UnmappableError(MALFORMED)
    # In the order of the engine's own type, with further fields after those that it knows.
    ordered = {"arguments": _arguments(arguments), "name": name}
    ordered.update({field: value for field, value in function.items() if field not in ordered})
    call = {"id": identity, "function": ordered, "type": "function"}
    call.update({field: value for field, value in given.items() if field not in call})
    return call


def _arguments(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        # The faster decoder does not know NaN, and takes large integers for floats.
        found = json.loads(text) if _NUMBERS.search(text) else _decoder.decode(text)
    except RecursionError:
        raise UnmappableError(MALFORMED) from None
    except ValueError:
        return {}
    return found if type(found) is dict else {}
