"""Bodies with images. The picture is the same in most: 56 by 56 points in one colour."""

import base64
import struct
import zlib
from typing import Any, Final

__all__ = ["BODIES"]

_Body = dict[str, Any]


def _png(size: int, red: int) -> str:
    """A picture in one colour, as a URL."""
    row = b"\0" + bytes((red, 60, 90)) * size

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    data = zlib.compress(row * size, 9)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()


_URL: Final = _png(56, 200)
_LARGE: Final = _png(112, 10)
_IMAGE: Final[_Body] = {"type": "image_url", "image_url": {"url": _URL}}
_OTHER: Final[_Body] = {"type": "image_url", "image_url": {"url": _LARGE}}
_SYSTEM: Final = " ".join(
    f"Rule {number}: answer the questions of people about files and lines." for number in range(40)
)
_FUNCTION: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _text(text: str) -> _Body:
    return {"type": "text", "text": text}


def _chat(*contents: Any, **members: Any) -> _Body:
    """Messages of a system, a user, an assistant and so on in turn; None leaves the system out."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
        if content is not None
    ]
    return {"max_tokens": 1, "messages": messages, **members}


_CALL: Final = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    ],
}

_CHATS: Final[dict[str, _Body]] = {
    "image-last": _chat(_SYSTEM, [_text("What is this?"), _IMAGE]),
    "image-first": _chat(_SYSTEM, [_IMAGE, _text("What is this?")]),
    "image-alone": _chat(_SYSTEM, [_IMAGE]),
    "image-between": _chat(_SYSTEM, [_text("What is"), _IMAGE, _text("in this?")]),
    "two-images": _chat(_SYSTEM, [_text("Which of"), _IMAGE, _text("and"), _OTHER]),
    "no-system": _chat(None, [_text("What is this?"), _IMAGE]),
    "no-text": _chat(None, [_IMAGE]),
    "text-ends-with-a-blank": _chat(_SYSTEM, [_text("This is "), _IMAGE]),
    "text-ends-with-breaks": _chat(_SYSTEM, [_text("This is\n\n"), _IMAGE]),
    "text-ends-with-digits": _chat(_SYSTEM, [_text("Number 123"), _IMAGE]),
    "text-ends-within-a-token": _chat(_SYSTEM, [_text("This is <|im_"), _IMAGE]),
    "text-with-a-placeholder": _chat("You see <|image_pad|>. " + _SYSTEM, [_text("a"), _IMAGE]),
    "text-with-a-plain-placeholder": _chat("You see <image>. " + _SYSTEM, [_text("a"), _IMAGE]),
    "later-turn": _chat(_SYSTEM, "Hello there.", "Hello.", [_text("And this?"), _IMAGE]),
    "earlier-turn": _chat(_SYSTEM, [_text("What is it?"), _IMAGE], "A wall.", "Which colour?"),
    "each-turn": _chat(_SYSTEM, [_IMAGE, _text("this")], "A wall.", [_OTHER, _text("and this")]),
    "in-the-system": _chat([_text(_SYSTEM), _IMAGE], "What is this?"),
    "in-an-answer": _chat(_SYSTEM, "Draw a wall.", [_text("Here:"), _IMAGE], "Thanks"),
    "with-tools": _chat(_SYSTEM, [_text("What is this?"), _IMAGE], tools=[_FUNCTION]),
    "with-a-salt": _chat(_SYSTEM, [_text("What is this?"), _IMAGE], cache_salt="tenant"),
    "named": _chat(_SYSTEM, [_text("What is this?"), {**_IMAGE, "uuid": "wall-1"}]),
    "named-and-other-type": _chat(
        _SYSTEM, [_text("What?"), {"type": "x", "image_url": _URL, "uuid": "wall-2"}]
    ),
    "detail": _chat(
        _SYSTEM, [{"type": "image_url", "image_url": {"url": _URL, "detail": "low"}}, _text("a")]
    ),
    "extra-member": _chat(_SYSTEM, [{**_IMAGE, "resized_height": 56}, _text("a")]),
    "continued": _chat(
        _SYSTEM,
        [_text("What is this?"), _IMAGE],
        "It is a",
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    "special-tokens": _chat(_SYSTEM, [_text("What is this?"), _IMAGE], add_special_tokens=True),
    "truncated": _chat(_SYSTEM, [_text("What is this?"), _IMAGE], truncate_prompt_tokens=50),
    "developer": {
        "max_tokens": 1,
        "messages": [
            {"role": "developer", "content": _SYSTEM},
            {"role": "user", "content": [_text("What is this?"), _IMAGE]},
        ],
    },
    "result-of-a-tool": {
        "max_tokens": 1,
        "messages": [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": "Look."},
            _CALL,
            {"role": "tool", "tool_call_id": "c1", "content": [_text("seen"), _IMAGE]},
        ],
        "tools": [_FUNCTION],
    },
}
_SOURCE: Final = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": _URL.partition(",")[2]},
}


def _message(*contents: Any, **members: Any) -> _Body:
    roles = ["user", "assistant"] * len(contents)
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    return {"max_tokens": 1, "messages": messages, "system": _SYSTEM, **members}


_MESSAGES: Final[dict[str, _Body]] = {
    "image-last": _message([_text("What is this?"), _SOURCE]),
    "image-alone": _message([_SOURCE]),
    "image-first": _message([_SOURCE, _text("What is this?")]),
    "later-turn": _message("Hello there.", "Hello.", [_text("And this?"), _SOURCE]),
    "result-of-a-tool": _message(
        "Look.",
        [{"type": "tool_use", "id": "c1", "name": "get_weather", "input": {}}],
        [{"type": "tool_result", "tool_use_id": "c1", "content": [_text("seen"), _SOURCE]}],
    ),
}


def _response(*content: Any, **members: Any) -> _Body:
    given = [{"role": "user", "content": [*content]}]
    return {"max_output_tokens": 16, "instructions": _SYSTEM, "input": given, **members}


_INPUT: Final = {"type": "input_image", "image_url": _URL, "detail": "auto"}
_WORDS: Final = {"type": "input_text", "text": "What is this?"}
_RESPONSES: Final[dict[str, _Body]] = {
    "image-last": _response(_WORDS, _INPUT),
    "image-alone": _response(_INPUT),
    "image-first": _response(_INPUT, _WORDS),
}
# By path.
BODIES: Final = {
    "/v1/chat/completions": _CHATS,
    "/v1/messages": _MESSAGES,
    "/v1/responses": _RESPONSES,
}
